"""Runs with a sentinel, and faults injected into a step of either engine.

A fault is in the engine that trains alone: the engines that verify are others, in the same process here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

import jax_resnet
import numpy_ref
from experiment.files.checkpoints import Checkpoints
from experiment.options.resolving import resolve
from experiment.run.sentinel import Sentinel, name_first
from experiment.run.update_rule import UpdateRule
from experiment.run.verifier import Request, Setup, Verdict, Verifier
from jax_resnet.optimizers import state_to_dict
from jax_resnet.strategies import blockwise
from tests.helpers.jax_engine import CLASSES, MEAN, SHAPE, STD, THIN, learning_rate

ENGINES: dict[str, Any] = {"jax": jax_resnet.Engine, "numpy": numpy_ref.Engine}
KINDS = ("weight", "activation", "gradient", "moment", "statistic", "product")
BLOCK = 1  # the residual block, from 0, that is faulty: in resnet8 the first of layer2
NAME = "layer2.0.conv1.weight"


def thin_arguments(model: str = "resnet8", optimizer: str = "adam", **options: Any) -> dict[str, Any]:
    """The arguments that both engines take for a thin network in float32."""
    flags = {"optimizer": optimizer, **options.pop("flags", {})}
    return {
        "model": model,
        "model_options": THIN[model],
        "num_classes": CLASSES,
        "image_shape": SHAPE,
        "mean": MEAN,
        "std": STD,
        "optimizer": optimizer,
        "optimizer_options": resolve(flags).optimizer_options(),
        "precision": "float32",
        **options,
    }


class InlineSecond:
    """In place of `SecondProcess`: verifies in this process, at once."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.verdicts: list[Verdict] = []
        self.is_idle = True

    def ask(self, request: Request) -> None:
        self.verdicts.append(self.verifier.check(request))
        self.is_idle = False

    def take(self) -> Verdict | None:
        if self.is_idle:
            return None
        self.is_idle = True
        return self.verdicts[-1]

    def close(self) -> None:
        pass


class VerifiedRun:
    """A thin network that trains on as `Trainer` has it train, with a sentinel.

    Args:
        framework: the engine that trains.
        folder: of the checkpoints; nothing is written there.
        every: N.
        arguments: of both engines; see `thin_arguments`.
    """

    def __init__(self, framework: str, folder: Path, every: int = 1, **arguments: Any) -> None:
        arguments = thin_arguments(**arguments)
        (other,) = ENGINES.keys() - {framework}
        self.framework = framework
        own = {"processes": 1} if framework == "numpy" else {"chunk": 1}
        self.engine = ENGINES[framework](**arguments, **own, learning_rate=learning_rate)
        plain = {name: value for name, value in arguments.items() if name != "ema_decay"}
        rule = UpdateRule(arguments["optimizer"], arguments["optimizer_options"], arguments.get("ema_decay"))
        self.second = InlineSecond(
            Verifier(Setup(framework, other, dict.fromkeys(ENGINES, plain), rule), name_first)
        )
        self.lines: list[str] = []
        self._checkpoints, self._other = Checkpoints(folder / "checkpoints", 1), other
        self.restart(every)

    def restart(self, every: int) -> None:
        """Begin again, with the same engines, which have compiled their functions by now."""
        self.second.verifier.noise.clear()
        self.second.verdicts.clear()
        self.second.is_idle = True
        self.sentinel = Sentinel(
            self.engine,
            every,
            second=self.second,
            second_name=self._other,
            checkpoints=self._checkpoints,
            report=self.lines.append,
        )
        self.state, self.step = self.engine.init(), 0

    def train(self, batches: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Take a step for each batch. Raises WrongStepError, as a run does."""
        narrow = ({**batch, "image": batch["image"].astype(np.float32)} for batch in batches)
        watched = self.sentinel.watch(narrow, self.step)
        self.sentinel.before_next(self.step, self.state)
        for state, metrics in self.engine.train(self.state, watched):
            self.step += 1
            self.state = state
            self.sentinel.after(self.step, state, metrics)
            self.sentinel.before_next(self.step, state)
        self.sentinel.finish(self.state, lambda: False)


@dataclasses.dataclass
class Fault:
    """A fault in one residual block.

    Attributes:
        kind: in `KINDS`. "product" multiplies a channel of the block's output by 1 + 2**(bit - 23).
            The others flip a bit of the largest number of an array when it is read or written.
        bit: which one, from 0; 23 to 30 are the exponent's.
        permanent: it stays; if False, one computation of a step has it.
        active: the next computation has it.
        output: of the block, in the last forward pass.
    """

    kind: str
    bit: int
    permanent: bool = True
    active: bool = False
    output: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(1))

    def strikes(self, *kinds: str) -> bool:
        """True if this computation has the fault, of one of these kinds."""
        strikes = self.active and self.kind in kinds
        if strikes and not self.permanent:
            self.active = False
        return strikes

    def flip(self, array: np.ndarray) -> None:
        """Flip the bit in the largest number, in place; of a gradient, the largest that ReLU lets pass."""
        magnitudes = np.abs(array) * (self.output > 0) if self.kind == "gradient" else np.abs(array)
        index = np.unravel_index(magnitudes.argmax(), array.shape)
        word = np.float32(array[index]).view(np.uint32) ^ np.uint32(1 << self.bit)
        array[index] = np.uint32(word).view(np.float32)

    def multiply(self, array: np.ndarray) -> None:
        """Multiply the first channel, in place."""
        array[..., 0] *= np.float32(1 + 2.0 ** (self.bit - 23))


@contextmanager
def injected(run: VerifiedRun, fault: Fault) -> Iterator[None]:
    """Context in which the run's engine has a fault, while `fault.active`."""
    if isinstance(run.engine, numpy_ref.Engine):
        _inject_numpy(run.state.replica, fault)
        yield
    else:
        with _injected_jax(run.engine, fault):
            yield


def _inject_numpy(replica: Any, fault: Fault) -> None:
    block = [layer for _, layer in replica.network.body() if layer.has_branch][BLOCK]
    forward, backward, update_average = block.forward, block.backward, replica.update_average

    def faulty_forward(x: np.ndarray, train: bool = False, keep: np.ndarray | None = None) -> np.ndarray:
        strikes = fault.strikes("weight", "activation", "statistic", "product")
        weight = block.conv1.weight.value
        right = weight.copy()
        if strikes and fault.kind == "weight":
            fault.flip(weight)
        y = forward(x, train) if keep is None else forward(x, train, keep)
        weight[...] = right
        fault.output = np.array(y)
        if strikes and fault.kind == "activation":
            fault.flip(y)
        elif strikes and fault.kind == "product":
            fault.multiply(y)
        elif strikes and fault.kind == "statistic":
            fault.flip(block.bn1.running_mean)
        return y

    def faulty_backward(dy: np.ndarray) -> np.ndarray:
        if fault.strikes("gradient"):
            dy = dy.copy()
            fault.flip(dy)
        return backward(dy)

    def faulty_update_average(step: int) -> None:
        update_average(step)
        if fault.strikes("moment"):
            index = list(replica.parameters).index(NAME)
            fault.flip(next(iter(replica.optimizer.moments.values()))[index])

    block.forward, block.backward = faulty_forward, faulty_backward
    replica.update_average = faulty_update_average


@contextmanager
def _injected_jax(engine: Any, fault: Fault) -> Iterator[None]:
    strategy, original = engine._strategy, blockwise._forward
    run, backward, blocks = strategy.run, strategy._backward, len(strategy._blocks.blocks)
    calls = {"forward": -1, "backward": blocks}  # numbers of the blocks; forward is -1 outside of `run`

    def changed(array: Any, change: Any) -> Any:
        copy = np.array(array)
        change(copy)
        return jax.device_put(copy, array.sharding)

    def faulty_run(state: Any, batches: Any, lrs: Any) -> Any:
        calls.update(forward=0, backward=blocks)
        try:
            state, rows = run(state, batches, lrs)
        finally:
            calls["forward"] = -1
        if fault.strikes("moment"):
            fields = state_to_dict(state.opt_state)
            target = fields["trace" if "trace" in fields else "mu"][NAME]
            moved = changed(target, fault.flip)
            opt_state = jax.tree.map(lambda leaf: moved if leaf is target else leaf, state.opt_state)
            state = dataclasses.replace(state, opt_state=opt_state)
        return state, rows

    def faulty_forward(graph: Any, needs_dx: bool, params: Any, batch_stats: Any, x: Any, keep: Any) -> Any:
        number = calls["forward"]
        calls["forward"] += number >= 0
        struck = number == BLOCK + 1 and fault.strikes("weight", "activation", "statistic", "product")
        if struck and fault.kind == "weight":
            params = {**params, "conv1.weight": changed(params["conv1.weight"], fault.flip)}
        y, pullback, stats = original(graph, needs_dx, params, batch_stats, x, keep)
        if number == BLOCK + 1:
            fault.output = np.array(y)
        if struck and fault.kind == "activation":
            y = changed(y, fault.flip)
        elif struck and fault.kind == "product":
            y = changed(y, fault.multiply)
        elif struck and fault.kind == "statistic":
            stats = {**stats, "bn1.running_mean": changed(stats["bn1.running_mean"], fault.flip)}
        return y, pullback, stats

    def faulty_backward(
        params: Any, moments: Any, counts: Any, pullback: Any, x: Any, dy: Any, lr: Any
    ) -> Any:
        calls["backward"] -= 1
        if calls["backward"] == BLOCK + 1 and fault.strikes("gradient"):
            dy = changed(dy, fault.flip)
        return backward(params, moments, counts, pullback, x, dy, lr)

    strategy.run, strategy._backward = faulty_run, faulty_backward
    try:
        with mock.patch.object(blockwise, "_forward", faulty_forward):
            yield
    finally:
        del strategy.run
        strategy._backward = backward
