"""One training step compared with the same step of the other engine; where they differ, float64 decides.

Three engines take the step once more: the other one in float32, and where it matters also in float64, and the
run's own in float32. None of them shares memory or compiled functions with the run.

Noise is measured, tensor by tensor: the largest difference between a right float32 result and that of
float64. The right results are those of the other engine and, within `OWN_LIMIT` times that, of the run's
engine, which may add up in float32 where the other adds up in float64. What is compared: running statistics,
the loss, the first moments (they are linear in the gradient) and the norm of the gradient. Everything else
must follow from the first moments by the optimizer's rule: see `update_rule.py`.

A gradient has jumps: where a number before a ReLU is 0 but for rounding, two right engines may take different
sides. So before a gradient counts as wrong, the other engine takes the step again from weights that are moved
by a few last bits, up to `MOVED` times: a jump that is within rounding shows in some of these steps, too, and
is then part of the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from experiment.engines import Batch, load_engine
from experiment.run.step_tensors import Array, Arrays, in_blocks, largest, largest_difference, step_tensors
from experiment.run.update_rule import EPS, UpdateRule

FACTOR = 8.0  # a tensor departs where its error is more than this many times the noise
NEAR = 4.0  # up to this many times the noise, the other engine's float32 is near enough: no float64 step
OWN_LIMIT = 64.0
MOVED = 16
LAST_BITS = 8.0  # by how many a weight is moved at most

NameFirst = Callable[[Arrays, Arrays, Mapping[str, float]], tuple[str, float, float]]
"""(right tensors, others, largest relative errors) to the first that departs: its name, error and limit."""


@dataclass(frozen=True)
class Request:
    """A step to compare.

    Attributes:
        step: its number, from 1.
        lr: its learning rate.
        before, after: the state before and after it, as `Engine.arrays` returns it; copies.
        loss, grad_norm: as the engine reported them.
        batch: with "image", the images themselves.
    """

    step: int
    lr: float
    before: Arrays
    after: Arrays
    loss: float
    grad_norm: float
    batch: Batch


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison.

    Attributes:
        step: the step.
        by_float64: True if a float64 step was needed.
        wrong: the name of the first tensor that departs, in the order of computation; "" if none does.
        error, noise: of that tensor, relative to its largest magnitude.
        sizes: {tensor: its error in units of the noise}, of all that were compared in float64.
    """

    step: int
    by_float64: bool = False
    wrong: str = ""
    error: float = 0.0
    noise: float = 0.0
    sizes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What a verifier is made of; plain values.

    Attributes:
        own, other: names of the run's engine and of the other, in `experiment.engines.ENGINES`.
        arguments: {engine: keyword arguments of its class}, without learning rate and precision.
        rule: of the run's optimizer.
    """

    own: str
    other: str
    arguments: Mapping[str, Mapping[str, Any]]
    rule: UpdateRule


class Stepper:
    """An engine that takes single steps, each from a given state."""

    def __init__(self, name: str, arguments: Mapping[str, Any], precision: str) -> None:
        own = {"processes": 1} if name == "numpy" else {}
        self._dtype, self._rate = np.dtype(precision), 0.0
        options: dict[str, Any] = {**arguments, **own, "precision": precision}
        self._engine = load_engine(name)(**options, learning_rate=lambda step: self._rate)
        self._state: Any = None

    def take(self, step: Request) -> dict[str, Array]:
        """The tensors after the step that are compared with another engine's, in the order of computation."""
        self._rate = step.lr
        before = {
            path: array.astype(self._dtype, copy=False) if array.dtype.kind == "f" else array
            for path, array in step.before.items()
            if not path.startswith("ema/")
        }
        state = self._engine.from_arrays(before, reuse=self._state)
        self._state, metrics = next(iter(self._engine.train(state, [step.batch])))
        after = self._engine.arrays(self._state)
        tensors = compared(after, float(metrics["loss"]), float(metrics["grad_norm"]))
        return {name: np.array(tensor) for name, tensor in tensors.items()}  # the next step writes there


def is_compared(name: str) -> bool:
    """True for a tensor that is compared with that of the other engine."""
    return name.startswith(("batch_stats/", "loss", "optimizer/mu/", "optimizer/trace/", "grad_norm"))


def compared(after: Arrays, loss: float, grad_norm: float) -> dict[str, Array]:
    """The tensors of a step that two engines compute alike, in the order of computation."""
    tensors = step_tensors(after, loss, grad_norm)
    return {name: tensor for name, tensor in tensors.items() if is_compared(name)}


class Verifier:
    """Compares steps of a run; see the module. The first step that it gets is always taken in float64.

    Args:
        setup: the engines and the optimizer.
        name_first: names the first tensor that departs.

    Attributes:
        noise: the largest noise of each tensor so far, jumps left out, relative to how far a step moves it.
    """

    def __init__(self, setup: Setup, name_first: NameFirst) -> None:
        self._setup, self._name_first = setup, name_first
        self._steppers: dict[tuple[str, str], Stepper] = {}
        self.noise: dict[str, float] = {}

    def check(self, step: Request) -> Verdict:
        """Compare a step."""
        ours = compared(step.after, step.loss, step.grad_norm)
        other = self._take(self._setup.other, "float32", step)
        updates = self._updates(step)
        near = bool(self.noise) and all(
            largest_difference(tensor, other[name])
            <= NEAR * self.noise[name] * _movement(name, other[name], step)
            for name, tensor in ours.items()
        )
        if near and not any(update.departs for update in updates.values()):
            return Verdict(step.step)
        return self._decide(step, ours, other, updates)

    def _decide(
        self,
        step: Request,
        ours: Arrays,
        other: Arrays,
        updates: Mapping[str, _Update],
    ) -> Verdict:
        """Take the step in float64 and measure the noise; see the module."""
        exact = self._take(self._setup.other, "float64", step)
        own = self._take(self._setup.own, "float32", step)
        errors = {name: largest_difference(tensor, exact[name]) for name, tensor in ours.items()}
        noise = {}
        for name, truth in exact.items():
            rounding = EPS / 2 * largest(truth)  # float32 cannot be nearer
            of_other = max(largest_difference(other[name], truth), rounding)
            of_own = largest_difference(own[name], truth)
            earlier = self.noise.get(name, 0.0) * _movement(name, truth, step)
            noise[name] = max(of_other, min(of_own, OWN_LIMIT * of_other), earlier)
        remembered = dict(noise)  # a jump counts at its own step alone
        for trial in range(MOVED):
            suspects = [name for name, error in errors.items() if error > FACTOR * noise[name]]
            if not suspects:
                break
            moved = self._take(self._setup.other, "float32", _moved(step, trial))
            for name in suspects:
                noise[name] = max(noise[name], largest_difference(moved[name], exact[name]))
        return self._verdict(step, ours, exact, noise, remembered, updates)

    def _verdict(
        self,
        step: Request,
        ours: Arrays,
        exact: Arrays,
        noise: Mapping[str, float],
        remembered: Mapping[str, float],
        updates: Mapping[str, _Update],
    ) -> Verdict:
        """Name the first tensor that departs; where none does, remember the noise without that of jumps."""
        errors = {name: largest_difference(tensor, exact[name]) for name, tensor in ours.items()}
        limits = {name: FACTOR * value for name, value in noise.items()}
        sizes = {name: errors[name] / value if value else 0.0 for name, value in noise.items()}
        sizes |= {name: update.size for name, update in updates.items()}
        departed = any(errors[name] > limits[name] for name in errors)
        if not departed and not any(update.departs for update in updates.values()):
            for name, value in remembered.items():
                movement = _movement(name, exact[name], step)
                self.noise[name] = max(self.noise.get(name, 0.0), value / movement if movement else 0.0)
            return Verdict(step.step, by_float64=True, sizes=sizes)
        tensors = step_tensors(step.after, step.loss, step.grad_norm)
        truths = dict(exact)
        truths |= {name: update.value for name, update in updates.items() if update.value is not None}
        allowed = {}
        for name, truth in truths.items():
            scale = largest(truth) or 1.0
            allowed[name] = (limits[name] if name in limits else updates[name].limit) / scale
        in_order = {name: truths[name] for name in tensors if name in truths}
        wrong, error, limit = self._name_first(in_order, tensors, allowed)
        return Verdict(step.step, True, wrong, error, limit / FACTOR, sizes)

    def _updates(self, step: Request) -> dict[str, _Update]:
        """Compare what follows from the first moments with the optimizer's rule."""
        actual = step_tensors(step.after, step.loss, step.grad_norm)
        rule = self._setup.rule.expected(step.before, step.after, step.lr, step.step)
        return {name: _compare_update(actual[name], value, noise) for name, value, noise in rule}

    def _take(self, engine: str, precision: str, step: Request) -> dict[str, Array]:
        key = engine, precision
        if key not in self._steppers:
            self._steppers[key] = Stepper(engine, self._setup.arguments[engine], precision)
        return self._steppers[key].take(step)


@dataclass(frozen=True)
class _Update:
    """A tensor beside its value by the rule.

    Attributes:
        value: by the rule, where it departs; else None, to free the memory.
        size: the largest error of a number, in units of its noise.
        departs: that is more than `FACTOR`.
        limit: the absolute error of the tensor above which it departs.
    """

    value: Array | None
    size: float
    departs: bool
    limit: float


def _compare_update(actual: Array, value: Array, noise: Array) -> _Update:
    size, limit = 0.0, np.inf
    for actual_part, value_part, noise_part in in_blocks(actual, value, noise):
        if not np.isfinite(value_part).all():  # the rule has no number here: 0 / 0 with eps = 0
            return _Update(None, 0.0, False, np.inf)
        errors = np.abs(actual_part - value_part)  # float64, as the value
        errors[~np.isfinite(errors)] = np.inf
        with np.errstate(divide="ignore", invalid="ignore"):
            sizes = np.where(errors == 0, 0.0, errors / noise_part)
        worst = int(sizes.argmax())
        if sizes[worst] >= size:
            size, limit = float(sizes[worst]), FACTOR * float(noise_part[worst])
    departs = size > FACTOR
    return _Update(value if departs else None, size, departs, limit)


def _movement(name: str, tensor: Array, step: Request) -> float:
    """How far a step moves a tensor at most: what noise is relative to. Of a scalar, its magnitude."""
    if name in ("loss", "grad_norm"):
        return abs(float(tensor))
    return largest_difference(tensor, step.before[name]) + EPS * largest(tensor)


def _moved(step: Request, trial: int) -> Request:
    """The step from weights that are moved by up to `LAST_BITS` last bits."""
    rng = np.random.default_rng([step.step, trial])
    params = {
        path: (array * (1 + LAST_BITS * EPS * rng.uniform(-1, 1, array.shape))).astype(array.dtype)
        for path, array in step.before.items()
        if path.startswith("params/")
    }
    return replace(step, before={**step.before, **params})
