"""Several seeds trained together: one compiled step, `vmap` over parameters, state and batches.

    together = VmappedEngines([Engine(..., seed=seed) for seed in seeds])
    for stacked, metrics in together.train(states, batches_of_all):
        ...

The networks share nothing but the program: each computes what it would compute alone, up to rounding. A GPU
that one small network leaves idle is filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Barrier
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_resnet.chunks import Batch
from jax_resnet.engine import Engine, Metrics, State, Tree
from jax_resnet.pictures import normalize


class VmappedEngines:
    """Engines that differ in the seed alone, and in what follows from it: initial weights, the data's mean
    and deviation, the rates of a plateau.

    Args:
        engines: S of them.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self._main = self.engines[0]  # whose program serves all
        self._mean, self._std = (np.stack([getattr(e, name) for e in engines]) for name in ("_mean", "_std"))
        self._step = jax.jit(jax.vmap(self._one_step), donate_argnums=0)

    def train(
        self, states: Sequence[State], batches: Iterable[Sequence[Batch]]
    ) -> Iterator[tuple[State, Metrics]]:
        """Take one step of every engine for each item of `batches`, which holds a batch for each.

        Yields states and metrics after it, stacked: every array has a leading axis [S]; `one` takes a seed's
        out. A stacked state that went into a step is gone (donated). All states must be at the same step.
        """
        step = int(states[0]["step"])
        stacked = self.stack(states)
        for parts in batches:
            stacked, metrics = self.step(stacked, parts, step)
            step += 1
            yield stacked, metrics

    def stack(self, states: Sequence[State]) -> State:
        """One state whose arrays have a leading axis [S]."""
        with self._main._precision():
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def step(self, stacked: State, parts: Sequence[Batch], step: int) -> tuple[State, Metrics]:
        """The step after `step` steps; as in `train`."""
        batch = {name: np.stack([part[name] for part in parts]) for name in ("image", "label")}
        with self._main._precision():
            rates = np.array([engine.learning_rate(step) for engine in self.engines], self._main._dtype)
            stacked, metrics = self._step(stacked, batch, rates, self._mean, self._std)
        return stacked, {**metrics, "label": batch["label"]}

    def one(self, stacked: Any, index: int) -> Any:
        """Of a tree whose arrays have a leading axis [S], that of one engine."""
        with self._main._precision():
            return jax.tree.map(lambda array: array[index], stacked)

    def _one_step(
        self, state: State, batch: dict[str, jax.Array], lr: jax.Array, mean: jax.Array, std: jax.Array
    ) -> tuple[State, Metrics]:
        image = normalize(batch["image"], mean, std, self._main._dtype)
        return self._main._step(state, {**batch, "image": image}, lr)


class Rendezvous:
    """Where engines meet that train together, each driven by a thread of its own as if it were alone.

    A driver takes what `join` gives it for its engine. A step is taken when every driver has asked for it;
    the states lie in one stack meanwhile.

    Args:
        size: how many drivers there are.
    """

    def __init__(self, size: int) -> None:
        self._all_joined = Barrier(size, self._unite)
        self._all_ready = Barrier(size, self._advance)
        self._all_answered = Barrier(size, self._take_largest)
        self._answers: dict[int, int] = {}
        self._largest = 0
        self._engines: dict[int, Engine] = {}
        self._asked: dict[int, tuple[State | None, Batch]] = {}
        self._stacked: State = {}
        self._metrics: Metrics = {}
        self._steps = 0

    def join(self, index: int, engine: Engine) -> EngineProxy:
        """What driver number `index`, from 0, is to use for its engine; waits for all drivers."""
        self._engines[index] = engine
        self._all_joined.wait()
        return EngineProxy(self, index, engine)

    def leave(self) -> None:
        """End the rendezvous: whoever waits or comes gets a BrokenBarrierError."""
        for barrier in (self._all_joined, self._all_ready, self._all_answered):
            barrier.abort()

    def step(self, index: int, state: State | None, batch: Batch) -> Metrics:
        """Take part in a step; `state` is None from the second on. Returns the member's metrics."""
        self._asked[index] = state, batch
        self._all_ready.wait()
        return self._together.one(self._metrics, index)

    def state(self, index: int) -> State:
        """A member's state, as it is until its driver asks for the next step."""
        return self._together.one(self._stacked, index)

    def all_reduce_max(self, index: int, number: int) -> int:
        """The largest of the numbers that the drivers give; waits until every one has given its own."""
        self._answers[index] = number
        self._all_answered.wait()
        return self._largest

    def _take_largest(self) -> None:
        self._largest = max(self._answers.values())

    def _unite(self) -> None:
        self._together = VmappedEngines([self._engines[i] for i in sorted(self._engines)])

    def _advance(self) -> None:
        """Done by one driver while the others wait."""
        states, batches = zip(*(self._asked[i] for i in sorted(self._asked)), strict=True)
        if states[0] is not None:
            self._steps, *others = (int(state["step"]) for state in states)
            if others != [self._steps] * len(others):
                raise ValueError(
                    f"states that train together must be at one step, not {self._steps}, {others}"
                )
            self._stacked = self._together.stack(states)
        self._stacked, self._metrics = self._together.step(self._stacked, batches, self._steps)
        self._steps += 1


class EngineProxy:
    """An engine at a rendezvous; of `Engine`'s methods those that a driver calls.

    The state that `train` yields is the member itself, and stands for its part of the stack.
    """

    def __init__(self, rendezvous: Rendezvous, index: int, engine: Engine) -> None:
        self._rendezvous, self._index, self._engine = rendezvous, index, engine
        self.learning_rate, self.init, self.from_tree = engine.learning_rate, engine.init, engine.from_tree
        self.device, self.device_count = engine.device, engine.device_count
        self.compiles, self.holds_images, self.is_synchronized = True, False, True

    def train(
        self, state: State, batches: Iterable[Batch], needs_state: Callable[[int], bool] | None = None
    ) -> Iterator[tuple[EngineProxy, Metrics]]:
        """As `Engine.train`, but every step is a call of its own.

        Raises threading.BrokenBarrierError when another driver has left.
        """
        begun: State | None = state
        for batch in batches:
            metrics = self._rendezvous.step(self._index, begun, batch)
            begun = None
            yield self, metrics

    def evaluate(self, state: State | EngineProxy, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
        """As `Engine.evaluate`."""
        return self._engine.evaluate(self._own(state), batches)

    def hold(self, images: np.ndarray, fill: Sequence[int]) -> None:
        """Not supported: `holds_images` is False."""
        raise NotImplementedError("engines trained in lockstep hold no images on the device")

    def all_reduce_max(self, number: int) -> int:
        """Return the largest number that any driver passed; every driver must call this."""
        return self._rendezvous.all_reduce_max(self._index, number)

    def first_nonfinite_step(self, state: State | EngineProxy) -> int | None:
        """As `Engine.first_nonfinite_step`."""
        return self._engine.first_nonfinite_step(self._own(state))

    def to_tree(self, state: State | EngineProxy) -> Tree:
        """As `Engine.to_tree`."""
        return self._engine.to_tree(self._own(state))

    def _own(self, state: State | EngineProxy) -> State:
        return self._rendezvous.state(self._index) if isinstance(state, EngineProxy) else state
