"""Several seeds trained in lockstep: one compiled step, `vmap` over states, batches and learning rates.

    vmapped = VmappedEngines([Engine(..., seed=seed) for seed in seeds])
    for stacked, metrics in vmapped.train(states, batches_of_all):
        ...

Chosen by a study, for seeds of one configuration. The networks share the compiled function and nothing else:
each computes what it would compute alone, up to rounding. It fills a GPU that one small network leaves idle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Barrier
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_resnet.engine import Engine, Tree
from jax_resnet.state import TrainState
from jax_resnet.step import Batch, Metrics, StepOutput, train_step


class VmappedEngines:
    """Engines that differ in the seed alone, and in what follows from it: initial weights, the mean and
    standard deviation of the data, class weights, the learning rates of a plateau.

    Args:
        engines: S engines.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self._main = self.engines[0]  # its configuration is that of all
        self._mean = np.stack([engine.network.mean for engine in engines])
        self._std = np.stack([engine.network.std for engine in engines])
        weights = [engine.network.loss.class_weights for engine in engines]
        self._class_weights = None if None in weights else np.array(weights)
        self._compiled = jax.jit(jax.vmap(self._one_step), donate_argnums=0)

    def train(
        self, states: Sequence[TrainState], batches: Iterable[Sequence[Batch]]
    ) -> Iterator[tuple[TrainState, Metrics]]:
        """Take one step of every engine for each item of `batches`, which holds a batch for each.

        Yields states and metrics after it, stacked: every array has a leading axis [S]; `one` selects that of
        one engine. A stacked state that went into a step is gone (donated). All states must be at the same
        step.
        """
        step = int(states[0].step)
        stacked = self.stack(states)
        for parts in batches:
            stacked, metrics = self.step(stacked, parts, step)
            step += 1
            yield stacked, metrics

    def stack(self, states: Sequence[TrainState]) -> TrainState:
        """One state whose arrays have a leading axis [S]."""
        with self._main._precision():
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def step(self, stacked: TrainState, parts: Sequence[Batch], step: int) -> tuple[TrainState, Metrics]:
        """Take the step that follows `step` steps; as in `train`."""
        batch = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        with self._main._precision():
            lrs = np.array([engine.learning_rate(step) for engine in self.engines], self._main.network.dtype)
            output = self._compiled(stacked, batch, lrs, self._mean, self._std, self._class_weights)
        return output.state, {**output.log(), "label": batch["label"]}

    def one(self, stacked: Any, index: int) -> Any:
        """The tree of one engine, from a tree whose arrays have a leading axis [S]."""
        with self._main._precision():
            return jax.tree.map(lambda array: array[index], stacked)

    def _one_step(
        self,
        state: TrainState,
        batch: Batch,
        lr: jax.Array,
        mean: jax.Array,
        std: jax.Array,
        class_weights: jax.Array | None,
    ) -> StepOutput:
        loss = dataclasses.replace(self._main.network.loss, class_weights=class_weights)
        network = dataclasses.replace(self._main.network, mean=mean, std=std, loss=loss)
        return train_step(
            network,
            self._main.optimizer,
            state,
            batch,
            lr,
            gradient_fn=self._main.gradient_fn,
            log_gradients=self._main.log_gradients,
            ema_decay=self._main.ema_decay,
        )


class Rendezvous:
    """Rendezvous for engines trained in lockstep, each driven by a thread as if it were alone.

    A driver uses what `wrap` returns in place of its engine. A step is taken when every driver has asked for
    it; the states are stacked meanwhile.

    Args:
        size: number of drivers.
    """

    def __init__(self, size: int) -> None:
        self._all_wrapped = Barrier(size, self._vmap_engines)
        self._all_ready = Barrier(size, self._take_step)
        self._all_answered = Barrier(size, self._take_largest)
        self._numbers: dict[int, int] = {}
        self._largest = 0
        self._engines: dict[int, Engine] = {}
        self._requests: dict[int, tuple[TrainState | None, Batch]] = {}
        self._stacked: TrainState | None = None
        self._metrics: Metrics = {}
        self._steps = 0

    def wrap(self, index: int, engine: Engine) -> EngineProxy:
        """Return what driver number `index`, from 0, uses in place of its engine; waits for all drivers."""
        self._engines[index] = engine
        self._all_wrapped.wait()
        return EngineProxy(self, index, engine)

    def leave(self) -> None:
        """End the rendezvous: every driver that waits, or waits later, gets a BrokenBarrierError."""
        for barrier in (self._all_wrapped, self._all_ready, self._all_answered):
            barrier.abort()

    def step(self, index: int, state: TrainState | None, batch: Batch) -> Metrics:
        """Take part in a step; `state` is None from the second on. Returns the metrics of this engine."""
        self._requests[index] = state, batch
        self._all_ready.wait()
        return self._vmapped.one(self._metrics, index)

    def state(self, index: int) -> TrainState:
        """The state of one engine, valid until its driver asks for the next step."""
        return self._vmapped.one(self._stacked, index)

    def all_reduce_max(self, index: int, number: int) -> int:
        """Return the largest number that any driver passed; waits for all drivers."""
        self._numbers[index] = number
        self._all_answered.wait()
        return self._largest

    def _take_largest(self) -> None:
        self._largest = max(self._numbers.values())

    def _vmap_engines(self) -> None:
        self._vmapped = VmappedEngines([self._engines[i] for i in sorted(self._engines)])

    def _take_step(self) -> None:
        """Take a step of all engines; one driver calls this while the others wait."""
        requests = [self._requests[index] for index in sorted(self._requests)]
        states = [state for state, _ in requests if state is not None]
        if states:
            self._steps, *others = (int(state.step) for state in states)
            if others != [self._steps] * len(others):
                raise ValueError(
                    f"states that train together must be at one step, not {self._steps}, {others}"
                )
            self._stacked = self._vmapped.stack(states)
        assert self._stacked is not None
        batches = [batch for _, batch in requests]
        self._stacked, self._metrics = self._vmapped.step(self._stacked, batches, self._steps)
        self._steps += 1


class EngineProxy:
    """Stands for one engine of a rendezvous; has the methods of `Engine` that a driver calls.

    The state that `train` yields is the proxy itself, and stands for its engine's part of the stack.
    """

    def __init__(self, rendezvous: Rendezvous, index: int, engine: Engine) -> None:
        self._rendezvous, self._index, self._engine = rendezvous, index, engine
        self.learning_rate, self.init, self.from_tree = engine.learning_rate, engine.init, engine.from_tree
        self.device, self.device_count = engine.device, engine.device_count
        self.threads, self.from_arrays = engine.threads, engine.from_arrays
        self.num_blocks = engine.num_blocks
        self.compiles, self.holds_images, self.is_synchronized = True, False, True

    def train(
        self,
        state: TrainState,
        batches: Iterable[Batch],
        needs_state: Callable[[int], bool] | None = None,
    ) -> Iterator[tuple[EngineProxy, Metrics]]:
        """As `Engine.train`, but every step is a call of its own.

        Raises threading.BrokenBarrierError when another driver has left.
        """
        first_state: TrainState | None = state
        for batch in batches:
            metrics = self._rendezvous.step(self._index, first_state, batch)
            first_state = None
            yield self, metrics

    def evaluate(self, state: TrainState | EngineProxy, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
        """As `Engine.evaluate`."""
        return self._engine.evaluate(self._resolve(state), batches)

    def hold(self, images: np.ndarray, fill: Sequence[int]) -> None:
        """Not supported: `holds_images` is False."""
        raise NotImplementedError("engines trained in lockstep hold no images on the device")

    def all_reduce_max(self, number: int) -> int:
        """Return the largest number that any driver passed; every driver must call this."""
        return self._rendezvous.all_reduce_max(self._index, number)

    def first_nonfinite_step(self, state: TrainState | EngineProxy) -> int | None:
        """As `Engine.first_nonfinite_step`."""
        return self._engine.first_nonfinite_step(self._resolve(state))

    def to_tree(self, state: TrainState | EngineProxy) -> Tree:
        """As `Engine.to_tree`."""
        return self._engine.to_tree(self._resolve(state))

    def arrays(self, state: TrainState | EngineProxy) -> dict[str, np.ndarray]:
        """As `Engine.arrays`."""
        return self._engine.arrays(self._resolve(state))

    def _resolve(self, state: TrainState | EngineProxy) -> TrainState:
        return self._rendezvous.state(self._index) if isinstance(state, EngineProxy) else state
