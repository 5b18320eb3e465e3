"""Where do two training loops, or two learning-rate schedules, first differ? Tensor by tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.optimizer_words import rate_sentence
from parity.trace import Array, ParityError

FACTOR = 32.0
"""With `perturbed`: a tensor departs where its error exceeds this many times its noise."""
ROUNDING, GROWTH = 64.0, 1.5
"""Without it: where it exceeds 64 units of rounding times 1.5 for each step. Measured: in float32 training
of a small ResNet a last bit of one weight moves the loss by 1e-3 at step 20, 1e4 units of rounding."""

Step = Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class TrainingDifference:
    """The first tensor of the first step that departs.

    Attributes:
        step: 1 is the first step.
        reference, candidate: the tensor's names.
        axes: the permutation of the candidate's axes that was compared.
        error, noise: relative to the largest number of the reference's tensor.
        index: of the largest error.
        departed: every tensor of the reference that departs at this step.
        cause: which part of the step is wrong, or None if the tensors cannot show it.
    """

    step: int
    reference: str
    candidate: str
    axes: tuple[int, ...]
    error: float
    noise: float
    index: tuple[int, ...]
    departed: tuple[str, ...]
    cause: str | None


@dataclass(frozen=True)
class TrainingReport:
    """The result of `compare_training`; `print` it.

    Attributes:
        first_difference: None if no tensor departs.
        pairs: the candidate's name for each of the reference's.
        unmatched: names without a partner, of either side.
        errors: for each step, the largest relative error and the tolerance there.
    """

    first_difference: TrainingDifference | None
    pairs: Mapping[str, str]
    unmatched: tuple[str, ...]
    errors: tuple[tuple[float, float], ...]

    @property
    def agrees(self) -> bool:
        """True if no tensor departs at any step and every tensor has a partner."""
        return self.first_difference is None and not self.unmatched

    def __str__(self) -> str:
        lines = [f"{'step':>5}{'largest error':>15}{'tolerance':>12}   (relative)"]
        lines += [f"{i:>5}{error:>15.1e}{limit:>12.1e}" for i, (error, limit) in enumerate(self.errors, 1)]
        if self.unmatched:
            lines.append("No partner by name or by value: " + ", ".join(self.unmatched) + ".")
        d = self.first_difference
        if d is None:
            return "\n".join([*lines, f"The loops agree in {len(self.pairs)} tensors at every step."])
        lines += [
            f"They differ first at step {d.step}, in {d.reference} (candidate: {d.candidate}) at "
            f"{list(d.index)}: error {d.error:.1e}, noise {d.noise:.1e}, relative to its largest number.",
            f"At this step {', '.join(d.departed)} differ." + (f" {d.cause}" if d.cause else ""),
        ]
        return "\n".join(lines)


def compare_training(
    reference_step: Step,
    candidate_step: Step,
    batches: Iterable[Any],
    *,
    candidate_batches: Iterable[Any] | None = None,
    perturbed: Step | None = None,
) -> TrainingReport:
    """Run two training loops side by side and find the first step and tensor that depart.

    Return tensors in the order of computation, so that the first one that departs is where to look: the loss,
    then gradients, then parameters after the step. Equal names are matched, others by value at the first step
    up to a permutation of axes, the nearest pairs first. It stops after the first step that differs.

    The tolerance: give `perturbed`, the reference's loop once more from parameters moved by a last bit. Its
    distance to the reference is the noise, at least 8 units of rounding. A tensor departs where its error
    exceeds `FACTOR` times the largest noise so far. Without `perturbed` the tolerance is 64 units of rounding
    of the less precise side, times 1.5 for each step after the first, at most 1: 8e-3 at step 20 in float32.
    Training is chaotic: compare a few steps, in float64 where you can.

    Args:
        reference_step, candidate_step: take a batch, train on it, return the tensors of this step: a mapping
            of names to arrays of any framework, nested or not: {"loss": ..., "parameters": {...}}.
        batches: one for each step.
        candidate_batches: the same in the candidate's layout, where it differs.

    Raises:
        ParityError: there are no batches, a step returns no mapping, or nothing can be matched.

    Examples:
        >>> def torch_step(batch):
        ...     loss = criterion(model(batch["x"]), batch["y"])
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        ...     parameters = dict(model.named_parameters())
        ...     gradients = {name: p.grad for name, p in parameters.items()}
        ...     return {"loss": loss, "gradients": gradients, "parameters": parameters}
        >>> print(compare_training(torch_step, jax_step, batches))
    """
    errors: list[tuple[float, float]] = []
    pairs: dict[str, tuple[str, tuple[int, ...]]] = {}
    unmatched: tuple[str, ...] = ()
    noise: dict[str, float] = {}
    theirs = itertools.repeat(None) if candidate_batches is None else iter(candidate_batches)
    for i, (batch, other) in enumerate(zip(batches, theirs, strict=candidate_batches is not None)):
        reference = tensors("reference", reference_step(batch))
        candidate = tensors("candidate", candidate_step(batch if candidate_batches is None else other))
        moved = None if perturbed is None else tensors("perturbed", perturbed(batch))
        if not i:
            pairs, unmatched = match(reference, candidate)
        departed, worst = [], (0.0, 0.0)
        for name, (partner, axes) in pairs.items():
            ours, aligned = reference[name], candidate[partner].transpose(axes)
            error, index = relative(ours, aligned)
            rounding = max(float(np.finfo(x.dtype).eps) / 2 for x in (ours, aligned))
            if moved is None:
                noise[name] = min(rounding * GROWTH**i, 1 / ROUNDING)
                limit = ROUNDING * noise[name]
            else:
                noise[name] = max(noise.get(name, 8 * rounding), relative(ours, moved[name])[0])
                limit = FACTOR * noise[name]
            if not error <= limit:
                departed.append((name, partner, axes, error, noise[name], index))
            if not error <= worst[0] or worst == (0.0, 0.0):
                worst = error, limit
        errors.append(worst)
        if departed:
            names = tuple(name for name, *_ in departed)
            difference = TrainingDifference(
                i + 1, *departed[0], names, cause=part_of_step(i, names, list(pairs))
            )
            return report(difference, pairs, unmatched, errors)
    if not errors:
        raise ParityError("batches is empty: there is no step to compare.")
    return report(None, pairs, unmatched, errors)


def report(
    difference: TrainingDifference | None,
    pairs: Mapping[str, tuple[str, tuple[int, ...]]],
    unmatched: tuple[str, ...],
    errors: list[tuple[float, float]],
) -> TrainingReport:
    """The report, with the names of `pairs` alone."""
    return TrainingReport(difference, {a: b for a, (b, _) in pairs.items()}, unmatched, tuple(errors))


def part_of_step(i: int, departed: tuple[str, ...], names: list[str]) -> str | None:
    """Which part of a step is wrong, from what departs and what does not."""
    kinds = {kind: [n for n in names if kind in n.lower()] for kind in ("loss", "grad", "param")}
    wrong = {kind for kind, members in kinds.items() if any(n in departed for n in members)}
    if "loss" in wrong and i == 0:
        return "The loss differs before any update: the forward pass, the batch or the initial parameters."
    if "grad" in wrong and kinds["loss"] and "loss" not in wrong:
        return (
            "The loss agrees, gradients do not: the backward pass, or how gradients are averaged or clipped."
        )
    if "param" in wrong and kinds["grad"] and "grad" not in wrong:
        return (
            "The gradients agree, the parameters after the step do not: the optimizer (`compare_optimizers`)."
        )
    return None


def tensors(side: str, result: Any) -> dict[str, Array]:
    """Copies of the floating-point tensors of one step by dotted name."""
    if not isinstance(result, Mapping) or not result:
        kind = "an empty mapping" if isinstance(result, Mapping) else f"a {type(result).__name__}"
        raise ParityError(
            f"The {side}'s step returns {kind}. Return a mapping of names to arrays: "
            '{"loss": ..., "gradients": {...}, "parameters": {...}}.'
        )
    found: dict[str, Array] = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, Mapping):
            children = [(str(key), child) for key, child in node.items()]
        elif isinstance(node, (list, tuple)):
            children = [(str(key), child) for key, child in enumerate(node)]
        elif node is None:
            return
        else:
            array = to_numpy(node)
            if array.dtype.kind == "f":
                found[name] = array
            return
        for key, child in children:
            visit(f"{name}.{key}" if name else key, child)

    visit("", result)
    return found


def to_numpy(tensor: Any) -> Array:
    """A copy, so that the loop may update the tensor in place; bfloat16 as float32."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
        return np.array(tensor.numpy())
    array = np.array(tensor)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def relative(reference: Array, candidate: Array) -> tuple[float, tuple[int, ...]]:
    """The largest error over the largest number of the reference, and its index; NaN against NaN is 0."""
    ours, theirs = reference.astype(np.float64), candidate.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.abs(theirs - ours)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    error = np.where(same, 0.0, np.where(np.isfinite(error), error, np.inf))
    if not error.size:
        return 0.0, ()
    scale = np.abs(ours[np.isfinite(ours)]).max(initial=0.0)
    index = tuple(int(k) for k in np.unravel_index(error.argmax(), error.shape))
    largest = float(error.max())
    return (largest / scale if scale > 0 else float(np.inf if largest else 0.0)), index


def match(
    reference: Mapping[str, Array], candidate: Mapping[str, Array]
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], tuple[str, ...]]:
    """Pair tensors: by equal name and size, then by value up to a permutation of axes, the nearest first."""
    distances: list[tuple[Any, ...]] = []
    for (name, ours), (partner, theirs) in itertools.product(reference.items(), candidate.items()):
        if ours.ndim != theirs.ndim or sorted(ours.shape) != sorted(theirs.shape):
            continue
        for axes in itertools.permutations(range(ours.ndim)):
            aligned = theirs.transpose(axes)
            if aligned.shape == ours.shape:
                same_kind = (
                    name.split(".")[0] == partner.split(".")[0]
                )  # both are gradients, or both parameters
                distances.append(
                    (
                        name != partner,
                        not same_kind,
                        relative(ours, aligned)[0],
                        len(distances),
                        name,
                        partner,
                        axes,
                    )
                )
    pairs: dict[str, tuple[str, tuple[int, ...]]] = {}
    taken: set[str] = set()
    for *_, name, partner, axes in sorted(distances):
        if name not in pairs and partner not in taken:
            pairs[name] = (partner, axes)
            taken.add(partner)
    if not pairs:
        raise ParityError(
            "The steps have nothing in common: no tensor of the candidate has the shape of one of the "
            f"reference in any order of axes. Reference: {shapes(reference)}. Candidate: {shapes(candidate)}."
        )
    unmatched = [n for n in reference if n not in pairs] + [n for n in candidate if n not in taken]
    return {name: pairs[name] for name in reference if name in pairs}, tuple(unmatched)


def shapes(found: Mapping[str, Array]) -> str:
    """Names and shapes, the first eight."""
    return ", ".join(f"{name} {list(array.shape)}" for name, array in list(found.items())[:8]) or "none"


@dataclass(frozen=True)
class ScheduleReport:
    """The result of `compare_schedules`; `first_difference` is the first step, from 0, or None."""

    first_difference: int | None
    reference: Array
    candidate: Array
    cause: str | None

    @property
    def agrees(self) -> bool:
        """True if all rates are equal to rounding."""
        return self.first_difference is None

    def __str__(self) -> str:
        k = self.first_difference
        if k is None:
            return f"The schedules agree at all {len(self.reference)} steps."
        return (
            f"The schedules differ first at step {k} (from 0): reference {self.reference[k]:.9g}, candidate "
            f"{self.candidate[k]:.9g}. {self.cause}"
        )


def compare_schedules(reference: Any, candidate: Any, steps: int, *, base_lr: float = 1.0) -> ScheduleReport:
    """Compare two learning-rate schedules over `steps` steps, from step 0.

    Rates are equal within 1e-12 of the largest one, the rounding of float64.

    Args:
        reference, candidate: each a function of the step, an optax schedule, or a factory of a PyTorch
            scheduler, `lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30)`.
        base_lr: the learning rate of the optimizer that a factory is given.

    Raises:
        ParityError: one is neither.
    """
    if steps < 1:
        raise ParityError(f"steps={steps}: at least 1.")
    ours, theirs = (
        rates(*side, steps, base_lr) for side in (("reference", reference), ("candidate", candidate))
    )
    wrong = np.flatnonzero(
        ~np.isclose(theirs, ours, rtol=0, atol=1e-12 * float(np.abs(ours).max()), equal_nan=True)
    )
    if not wrong.size:
        return ScheduleReport(None, ours, theirs, None)
    largest = float(np.abs(ours).max())
    if np.allclose(theirs, ours, rtol=0, atol=3e-7 * largest):
        return ScheduleReport(
            int(wrong[0]), ours, theirs, "They agree to float32: one is not computed in float64."
        )
    return ScheduleReport(int(wrong[0]), ours, theirs, rate_sentence(ours, theirs))


def rates(side: str, schedule: Any, steps: int, base_lr: float) -> Array:
    """The rates [steps] of a function of the step or of a factory of a PyTorch scheduler."""
    if not callable(schedule):
        raise ParityError(
            f"The {side} is a {type(schedule).__name__}: neither a function of the step nor a factory."
        )
    try:
        import jax
    except ImportError:
        values = try_function(schedule, steps)
    else:
        with jax.enable_x64(True):
            values = try_function(schedule, steps)
    if values is not None:
        return values
    try:
        import torch

        weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], base_lr)
        scheduler = schedule(optimizer)
        found = []
        for _ in range(steps):
            found.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
    except Exception as error:
        raise ParityError(
            f"The {side} is neither a function of the step, step -> learning rate, nor a factory of a "
            f"PyTorch scheduler, `lambda optimizer: StepLR(optimizer, 30)`: {error}"
        ) from error
    return np.array(found)


def try_function(schedule: Any, steps: int) -> Array | None:
    """The rates of a function of the step; None if it is not one."""
    try:
        return np.array([float(schedule(step)) for step in range(steps)])
    except Exception:
        return None
