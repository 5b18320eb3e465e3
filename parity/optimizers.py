"""Where do two optimizers first differ? Both get the same parameters and gradients, in float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.optimizer_causes import Evidence, Update, explain
from parity.optimizer_hints import optax_hint, torch_hint
from parity.optimizer_words import sentence
from parity.trace import Array, ParityError

FACTOR = 32.0
"""A coordinate departs where its error exceeds this many times its noise. Four correct pairs stay
under 2 in 1,000 steps, either side as the reference."""

ULP = float(np.finfo(np.float64).eps)

Run = Callable[[Array, Array, Array], Array]
"""Parameters [P], gradients [T, P], factors of the parameters after each step [T, P] -> path [T + 1, P]."""


@dataclass(frozen=True)
class OptimizerDifference:
    """The first difference of two optimizers.

    Attributes:
        sequence: "steady", "sparse", "exploding" or "zero".
        step: 1 is the first update.
        parameter: its name; `coordinate` is the index in it.
        reference, candidate: the values after the step.
        error: their distance; `noise` is what rounding makes of the reference there.
        cause: a sentence, or None if no hypothesis gives the candidate's steps.
    """

    sequence: str
    step: int
    parameter: str
    coordinate: tuple[int, ...]
    reference: float
    candidate: float
    error: float
    noise: float
    cause: str | None


@dataclass(frozen=True)
class OptimizerReport:
    """The result of `compare_optimizers`; `print` it.

    Attributes:
        first_difference: None if both agree.
        largest: for each gradient sequence, the largest error, and the largest ratio of error to noise.
        steps: the number of steps.
    """

    first_difference: OptimizerDifference | None
    largest: Mapping[str, tuple[float, float]]
    steps: int

    @property
    def agrees(self) -> bool:
        """True if no coordinate departs at any step."""
        return self.first_difference is None

    def __str__(self) -> str:
        lines = [
            f"{'gradients':<12}{'largest error':>15}{'error / noise':>15}   ({self.steps} steps, float64)"
        ]
        lines += [f"{name:<12}{error:>15.1e}{ratio:>15.1e}" for name, (error, ratio) in self.largest.items()]
        d = self.first_difference
        if d is None:
            return "\n".join([*lines, f"The optimizers agree: no error exceeds {FACTOR:g} times its noise."])
        place = d.parameter + (str(list(d.coordinate)) if d.coordinate else "")
        cause = (
            d.cause
            or "no variant of SGD, Adam, RMSprop or Adagrad that was tried gives both optimizers' steps."
        )
        lines += [
            f"They differ first after step {d.step} of the {d.sequence} gradients, in {place}:",
            f"reference {d.reference:.17g}, candidate {d.candidate:.17g}, "
            f"error {d.error:.1e}, noise {d.noise:.1e}.",
            f"Cause: {cause}",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Parameters:
    """Named arrays as one flat vector, in the order of the (nested) mapping."""

    shapes: Mapping[tuple[str, ...], tuple[int, ...]]
    values: Array

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Parameters:
        """Flatten a mapping of arrays, nested or not."""
        leaves: dict[tuple[str, ...], Array] = {}

        def visit(node: Any, path: tuple[str, ...]) -> None:
            if isinstance(node, Mapping):
                for name, child in node.items():
                    visit(child, (*path, str(name)))
            else:
                leaves[path] = np.asarray(node, np.float64)

        visit(tree, ())
        if not leaves or () in leaves:
            raise ParityError(
                "parameters is a mapping of names to arrays, nested or not, with at least one array."
            )
        flat = np.concatenate([value.ravel() for value in leaves.values()])
        return cls({path: value.shape for path, value in leaves.items()}, flat)

    def split(self, flat: Any) -> dict[tuple[str, ...], Any]:
        """Arrays by path, of a vector of any framework whose last axis is P."""
        arrays, start = {}, 0
        for path, shape in self.shapes.items():
            stop = start + int(np.prod(shape))
            arrays[path] = flat[..., start:stop].reshape((*flat.shape[:-1], *shape))
            start = stop
        return arrays

    def nested(self, flat: Any) -> dict[str, Any]:
        """The mapping that `of` was given."""
        tree: dict[str, Any] = {}
        for path, array in self.split(flat).items():
            node = tree
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = array
        return tree

    def locate(self, index: int) -> tuple[str, tuple[int, ...]]:
        """The name and the index inside it of one coordinate of the flat vector."""
        for path, positions in self.split(np.arange(self.values.size)).items():
            hits = np.argwhere(positions == index)
            if len(hits):
                return ".".join(path), tuple(int(i) for i in hits[0])
        raise IndexError(index)

    def ndims(self) -> Array:
        """For each coordinate, the number of axes of its parameter: [P]."""
        return np.concatenate([np.full(int(np.prod(shape)), len(shape)) for shape in self.shapes.values()])


def default_parameters() -> dict[str, Any]:
    """A kernel, matrices, vectors of every kind that decay may leave out, and a scalar: float64, about 1."""
    rng = np.random.default_rng(0)
    return {
        "conv": {"kernel": rng.normal(size=(2, 2, 1, 3))},
        "norm": {"scale": 1 + 0.1 * rng.normal(size=3), "bias": 0.1 * rng.normal(size=3)},
        "dense": {"kernel": rng.normal(size=(3, 4)), "bias": 0.1 * rng.normal(size=4)},
        "temperature": np.array(0.7),
    }


def gradient_sequences(steps: int, size: int) -> dict[str, Array]:
    """Gradients that expose differences of optimizers: each [steps, size].

    steady: a constant of 1e-3 to 1 and 10 % of noise. sparse: 9 of 10 are 0. exploding: from 1e-4 to 1e4 and
    back, so that a maximum of past moments matters. zero: exactly 0, so that decay alone acts.
    """
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(steps, size))
    rise = np.minimum(np.linspace(-4, 8, steps), 4) - np.maximum(np.linspace(-8, 8, steps), 0)
    return {
        "steady": 10 ** np.linspace(-3, 0, size) * rng.choice([-1, 1], size) * (1 + 0.1 * noise),
        "sparse": noise * (rng.random((steps, size)) < 0.1),
        "exploding": noise * 10 ** rise[:, None],
        "zero": np.zeros((steps, size)),
    }


def compare_optimizers(
    reference: Any, candidate: Any, *, steps: int = 1000, parameters: Mapping[str, Any] | None = None
) -> OptimizerReport:
    """Compare two optimizers on the same parameters and the same gradients, in float64.

    Noise is the largest change of the reference in two reruns, and at least four last bits. In both, every
    gradient, and every parameter after a step, moves by a last bit: in one in the same direction at every
    step, in the other at random. A coordinate departs where its error exceeds
    `FACTOR` times its noise. For the cause, both are also run for a few steps on gradients from 1e-10 to 1e3,
    and equations in NumPy are fitted to the steps that they take (`parity.optimizer_causes`).

    Args:
        reference, candidate: each a PyTorch factory, `lambda p: torch.optim.AdamW(p, 1e-3)`, with p a list of
            tensors, or an optax transformation (any object with `init` and `update`). A factory may return
            `(optimizer, scheduler)`: each step calls `step()` of every one of them.
        steps: the number of steps of each gradient sequence (`gradient_sequences`).
        parameters: the initial parameters by name, nested or not; None for `default_parameters()`.

    Raises:
        ParityError: an optimizer is of another kind, or does not run.

    Examples:
        >>> report = compare_optimizers(lambda p: torch.optim.RMSprop(p, 1e-3), optax.rmsprop(1e-3, 0.99))
        >>> print(report.first_difference.cause)
        The candidate adds eps inside the root, sqrt(v + eps), the reference adds eps beside the root,
        sqrt(v) + eps: write `optax.rmsprop(..., eps_in_sqrt=False)`.
    """
    if steps < 1:
        raise ParityError(f"steps={steps}: at least 1.")
    start = Parameters.of(default_parameters() if parameters is None else parameters)
    with contextlib.ExitStack() as stack:
        run_reference = stack.enter_context(runner("reference", reference, start))
        run_candidate = stack.enter_context(runner("candidate", candidate, start))
        pairs = []
        for name, gradients in gradient_sequences(steps, start.values.size).items():
            path, noise = path_and_noise(run_reference, start.values, gradients)
            other = run_candidate(start.values, gradients, np.ones_like(gradients))
            pairs.append(Pair(name, gradients, path, other, noise))
        largest = {pair.name: (float(pair.error.max()), float(pair.ratio.max())) for pair in pairs}
        pair = min(pairs, key=lambda pair: pair.first_step)
        if pair.first_step == math.inf:
            return OptimizerReport(None, largest, steps)
        short = collect(run_reference, start), collect(run_candidate, start)
        found = explain(short, pair.evidence(start), (hint(reference, start), hint(candidate, start)))
    cause = sentence(*found, kind_of("candidate", candidate)) if found else None
    return OptimizerReport(pair.difference(start, cause), largest, steps)


@dataclass(frozen=True)
class Pair:
    """The paths of both optimizers [T + 1, P] on one sequence of gradients [T, P], and their noise."""

    name: str
    gradients: Array
    reference: Array
    candidate: Array
    noise: Array

    @property
    def error(self) -> Array:
        """|candidate - reference|; 0 where both are NaN or equal, infinite where only one is finite."""
        with np.errstate(invalid="ignore"):
            error = np.abs(self.candidate - self.reference)
        same = (self.candidate == self.reference) | (np.isnan(self.candidate) & np.isnan(self.reference))
        return np.where(same, 0.0, np.where(np.isfinite(error), error, np.inf))

    @property
    def ratio(self) -> Array:
        """error / noise, infinite where the noise is 0 and the error is not."""
        error = self.error
        infinite = np.where(error > 0, np.inf, 0.0)
        return np.asarray(np.divide(error, self.noise, out=infinite, where=self.noise > 0))

    @property
    def first_step(self) -> float:
        """The first step at which a coordinate departs, or infinity."""
        departed = np.flatnonzero((self.ratio > FACTOR).any(axis=1))
        return float(departed[0]) if departed.size else math.inf

    def difference(self, start: Parameters, cause: str | None) -> OptimizerDifference:
        """The coordinate that departs most at the first step."""
        t = int(self.first_step)
        i = int(self.ratio[t].argmax())
        ours, theirs = float(self.reference[t, i]), float(self.candidate[t, i])
        error, noise = float(self.error[t, i]), float(self.noise[t, i])
        return OptimizerDifference(self.name, t, *start.locate(i), ours, theirs, error, noise, cause)

    def evidence(self, start: Parameters) -> tuple[Evidence, Evidence]:
        """The run of each, up to 100 steps after the first difference."""
        stop = int(self.first_step) + 100
        tolerance = np.fmax(FACTOR * self.noise, 1e-30)[: stop + 1]
        data = start.values, self.gradients[:stop]
        return (
            Evidence(*data, self.reference[: stop + 1], tolerance, start.ndims()),
            Evidence(*data, self.candidate[: stop + 1], tolerance, start.ndims()),
        )


def path_and_noise(run: Run, values: Array, gradients: Array) -> tuple[Array, Array]:
    """The path of the parameters, and what rounding makes of it up to each step: both [T + 1, P]."""
    path = run(values, gradients, np.ones_like(gradients))
    noise = 4 * ULP * np.abs(path)
    rng = np.random.default_rng(2)
    for rows in (1, len(gradients)):  # rounding of a constant such as 1 - lr wd has one sign in every step
        signs = rng.choice([-1.0, 1.0], size=(2, rows, len(values)))
        moved, factors = (np.broadcast_to(1 + ULP * sign, gradients.shape) for sign in signs)
        noise = np.fmax(noise, np.abs(run(values, gradients * moved, factors) - path))
    return path, np.fmax.accumulate(noise)


def collect(run: Run, start: Parameters) -> Evidence:
    """A short run on gradients in which every variant shows: from 1e-10 to 1e3, with a burst and zeros.

    Half of the parameters begin at 0: their steps are known to the last bit.
    """
    steps, size = 16, start.values.size
    rng = np.random.default_rng(3)
    profile = np.array([1, 1, 0.5, 30, 1, 0.1, 0, 1, 0.2, 0.02, 3, 0.01, 1, 0.3, 0.1, 1])
    gradients = (
        rng.normal(size=(steps, size)) * profile[:, None] * 10 ** rng.permutation(np.linspace(-10, 1.5, size))
    )
    gradients[:3, ::3] = 0.0
    values = np.where(np.arange(size) % 2, start.values, 0.0)
    path, noise = path_and_noise(run, values, gradients)
    return Evidence(values, gradients, path, np.fmax(FACTOR * noise, 1e-30), start.ndims())


def kind_of(side: str, optimizer: Any) -> str:
    """ "torch" for a factory, "optax" for an object with `init` and `update`."""
    if callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None)):
        return "optax"
    if hasattr(optimizer, "param_groups"):
        raise ParityError(
            f"The {side} is an optimizer that has parameters already. Give a factory, so that it can be "
            "built on the comparison's own: `lambda p: torch.optim.Adam(p, 1e-3)`."
        )
    if callable(optimizer):
        return "torch"
    raise ParityError(
        f"The {side} is a {type(optimizer).__name__}: neither a PyTorch factory, "
        "`lambda p: torch.optim.Adam(p, 1e-3)`, nor an optax transformation, `optax.adam(1e-3)`."
    )


def hint(optimizer: Any, start: Parameters) -> list[Update]:
    """Guesses of the equation from the settings; empty where they are of no known kind."""
    try:
        if hasattr(optimizer, "update"):
            return optax_hint(optimizer)
        import torch

        built = optimizer([torch.nn.Parameter(torch.tensor(x)) for x in start.split(start.values).values()])
        return [
            u for part in (built if isinstance(built, (tuple, list)) else [built]) for u in torch_hint(part)
        ]
    except (AttributeError, KeyError, TypeError, ValueError):  # settings of another kind: no guess
        return []


@contextlib.contextmanager
def runner(side: str, optimizer: Any, start: Parameters) -> Iterator[Run]:
    """The function that runs one side; leaves the framework's settings and random state as they were."""
    if kind_of(side, optimizer) == "torch":
        import torch

        with torch.random.fork_rng():
            yield torch_run(side, optimizer, start)
    else:
        import jax

        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            yield optax_run(side, optimizer, start)


def torch_run(side: str, factory: Any, start: Parameters) -> Run:
    """Run a PyTorch optimizer by its own `step()`."""
    import torch

    def build(tensors: list[Any]) -> list[Any]:
        try:
            built = factory(list(tensors))
        except Exception as error:
            raise ParityError(f"The {side}'s factory fails on a list of tensors: {error}") from error
        parts = list(built) if isinstance(built, (tuple, list)) and not hasattr(built, "init") else [built]
        if all(callable(getattr(part, "step", None)) for part in parts):
            return parts
        hint = " If it is one of optax, call it first: `optax.adam(1e-3)`." if hasattr(built, "init") else ""
        raise ParityError(
            f"The {side}'s factory returns a {type(built).__name__}, which has no `step()`. A factory takes "
            f"a list of tensors and returns a PyTorch optimizer, or an optimizer and a scheduler.{hint}"
        )

    def run(values: Array, gradients: Array, factors: Array) -> Array:
        tensors = [
            torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in start.split(values).values()
        ]
        parts = build(tensors)
        grads = [torch.tensor(g, dtype=torch.float64) for g in start.split(gradients).values()]
        moves = [torch.tensor(f, dtype=torch.float64) for f in start.split(factors).values()]
        path = [np.concatenate([p.detach().numpy().ravel() for p in tensors])]
        for t in range(len(gradients)):
            for p, grad in zip(tensors, grads, strict=True):
                p.grad = grad[t].clone()
            try:
                for part in parts:
                    part.step()
            except Exception as error:
                raise ParityError(f"The {side} fails at step {t + 1}: {error}") from error
            with torch.no_grad():
                for p, move in zip(tensors, moves, strict=True):
                    p.mul_(move[t])
            path.append(np.concatenate([p.detach().numpy().ravel() for p in tensors]))
        return np.stack(path)

    return run


def optax_run(side: str, optimizer: Any, start: Parameters) -> Run:
    """Run an optax transformation, compiled in one scan; step by step if it cannot be traced."""
    import jax
    import jax.numpy as jnp

    steps: list[int] = []

    def step(carry: Any, inputs: Any) -> Any:
        params, state = carry
        gradients, factors = inputs
        updates, state = optimizer.update(start.nested(gradients), state, params)
        moved = jax.tree.map(lambda p, u, f: (p + u) * f, params, updates, start.nested(factors))
        return (moved, state), flatten(moved)

    def flatten(tree: Any) -> Any:
        leaves = []
        for path in start.shapes:
            node = tree
            for name in path:
                node = node[name]
            leaves.append(jnp.ravel(node))
        return jnp.concatenate(leaves)

    def begin(values: Any) -> Any:
        """Parameters and state; counts in int64, since int32 / int is float32 in JAX, in schedules too."""
        params = start.nested(values)
        state = optimizer.init(params)
        wide = jax.tree.map(
            lambda x: x.astype(jnp.int64) if getattr(x, "dtype", None) == jnp.int32 else x, state
        )
        return params, wide

    @jax.jit
    def scan(values: Any, gradients: Any, factors: Any) -> Any:
        return jax.lax.scan(step, begin(values), (gradients, factors))[1]

    def loop(values: Any, gradients: Any, factors: Any) -> Any:
        carry, path = begin(values), []
        for t in range(len(gradients)):
            carry, flat = step(carry, (gradients[t], factors[t]))
            path.append(flat)
        return jnp.stack(path)

    def run(values: Array, gradients: Array, factors: Array) -> Array:
        steps.append(len(gradients))
        rest = ((0, max(steps) - len(gradients)), (0, 0))  # one length, compiled once
        arguments = [jnp.asarray(values), jnp.asarray(gradients), jnp.asarray(factors)]
        try:
            path = scan(values, np.pad(gradients, rest), np.pad(factors, rest))[: len(gradients)]
        except Exception:
            try:
                path = loop(*arguments)
            except Exception as error:
                raise ParityError(f"The {side}'s init or update fails on the parameters: {error}") from error
        return np.concatenate([values[None], np.asarray(path)])

    return run
