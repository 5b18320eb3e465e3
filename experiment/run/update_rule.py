"""What an optimizer must make of one gradient, in float64, tensor by tensor.

Two right engines may update a parameter whose gradient is near 0 in opposite directions: Adam's first update
is the sign of the gradient. So an engine's update is not compared with another engine's, but with the rule,
applied to the gradient that the engine's own first moment shows:

    g = (mu_t - b1 mu_(t-1)) / (1 - b1),        sgd: g = trace_t - momentum trace_(t-1)

Second moments, parameters and averages follow from g, number by number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from experiment.engines import load_module
from experiment.run.step_tensors import Array, Arrays, blocks, first_moment

EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)  # smaller numbers may be rounded to 0
MOMENTS = ("trace", "mu", "nu", "nu_max")
DECOUPLED = ("adamw", "adaboundw")  # weight decay is no part of their gradient
NO_DECAY: dict[str, Any] = {"weight_decay": 0.0, "norm_weight_decay": None, "bias_weight_decay": None}


class Expected(NamedTuple):
    """A tensor after a step: its name, its value by the rule, and the rounding of float32, per number."""

    name: str
    value: Array
    noise: Array


@dataclass(frozen=True)
class UpdateRule:
    """The update of a run.

    Attributes:
        optimizer: name in `OPTIMIZERS`.
        options: all of `Config.optimizer_options`.
        ema_decay: of the average of the weights, or None.
    """

    optimizer: str
    options: Mapping[str, Any]
    ema_decay: float | None = None

    def expected(self, before: Arrays, after: Arrays, lr: float, step: int) -> Iterator[Expected]:
        """Yield all tensors that follow from the first moment, in no order.

        Args:
            before, after: the state before and after the step, in float32.
            lr: the learning rate of the step.
            step: its number, from 1.
        """
        field = first_moment(after)
        for path in (path for path in before if path.startswith("params/")):
            name = path.removeprefix("params/")
            if f"optimizer/{field}/{name}" in after:
                yield from self._trained(field, name, before, after, lr, step)
            else:  # frozen
                yield Expected(path, before[path].astype(np.float64), np.zeros(before[path].shape))
        if self.ema_decay is not None:
            yield from _averages(before, after, step, self.ema_decay)

    def _trained(
        self, field: str, name: str, before: Arrays, after: Arrays, lr: float, step: int
    ) -> Iterator[Expected]:
        """The rule at g, and its noise, in blocks: the rule is the same for each number."""
        paths = {"params": f"params/{name}", **{part: f"optimizer/{part}/{name}" for part in MOMENTS}}
        olds = {part: before[path].reshape(-1) for part, path in paths.items() if path in before}
        new = after[paths[field]].reshape(-1)
        values, noises = ({part: np.empty(new.shape) for part in olds} for _ in range(2))
        for block in blocks(new.size):
            old = {part: array[block].astype(np.float64) for part, array in olds.items()}
            for part, value, noise in self._rule(field, name, old, new[block].astype(np.float64), lr, step):
                values[part][block], noises[part][block] = value, noise
        shape = after[paths[field]].shape
        for part in olds.keys() - {field}:
            yield Expected(paths[part], values[part].reshape(shape), noises[part].reshape(shape))

    def _rule(
        self, field: str, name: str, olds: Arrays, new: Array, lr: float, step: int
    ) -> Iterator[tuple[str, Array, Array]]:
        """(part, value, noise) of a block of a parameter; the noise is how far the rule moves with g by the
        rounding of the first moment."""
        old = olds[field]
        decay = self.options["momentum" if field == "trace" else "b1"]
        share = 1.0 if field == "trace" else 1 - decay
        gradient = (new - decay * old) / share
        rounding = (EPS * (np.abs(new) + decay * np.abs(old)) + TINY) / share
        exact = self._take(name, olds, lr, step, gradient)
        higher = self._take(name, olds, lr, step, gradient + rounding)
        lower = self._take(name, olds, lr, step, gradient - rounding)
        for part, value in exact.items():
            noise = np.maximum(np.abs(higher[part] - value), np.abs(lower[part] - value))
            noise += EPS * np.abs(value) + TINY
            if part == "params":
                start = olds["params"]
                noise += EPS * np.abs(start) + self._rounding(step) * np.abs(value - start)
            yield part, value, noise

    def _rounding(self, step: int) -> float:
        """The relative rounding of an update in float32, of which that of 1 - b^t is the largest part.

        b^t is near 1 at first, and b itself is rounded: for b = 0.999 the difference has an error of 1e-4 at
        step 1. optax computes it so.
        """
        powers = [float(self.options[name]) ** step for name in ("b1", "b2")]
        return EPS * (2 + sum((1 + step * power) / (1 - power) for power in powers))

    def _take(self, name: str, olds: Arrays, lr: float, step: int, gradient: Array) -> dict[str, Array]:
        """A part of one parameter and its moments after a step in float64, by NumPy's optimizers."""
        layers, optimizers = load_module("numpy", "layers"), load_module("numpy", "optimizers")
        parameter = layers.Parameter(olds["params"].copy())
        # Decay that is coupled is part of the gradient already
        options = {**self.options, **({} if self.optimizer in DECOUPLED else NO_DECAY)}
        optimizer = optimizers.make_optimizer(self.optimizer, {name: parameter}, lr, **options)
        optimizer.count = step - 1
        for field, arrays in optimizer.moments.items():
            arrays[0][...] = olds[field]
        parameter.add_grad(gradient)
        optimizer.step()
        return {
            "params": parameter.value,
            **{field: arrays[0] for field, arrays in optimizer.moments.items()},
        }


def _averages(before: Arrays, after: Arrays, step: int, decay: float) -> Iterator[Expected]:
    for path in (path for path in before if path.startswith("ema/")):
        old, latest = before[path].astype(np.float64), after[path.removeprefix("ema/")].astype(np.float64)
        value = latest if step == 1 else old + (1 - decay) * (latest - old)
        yield Expected(path, value, EPS * (np.abs(old) + np.abs(latest)) + TINY)
