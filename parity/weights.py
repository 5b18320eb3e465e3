"""Are the candidate's parameters the reference's? Each is looked up by its numbers, not by its name."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity.alignment import SAME, Pair
from parity.axes import best_axes, largest_error, squeeze
from parity.trace import Array, Trace, stage_parameters

_ROUNDED = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative; the finest first


@dataclass(frozen=True)
class Match:
    """A parameter of the reference and the candidate's; "" if none was found.

    Attributes:
        reference, candidate: names.
        axes: the candidate's array transposed by these is in the reference's order.
        equal: the numbers are the same.
    """

    reference: str
    candidate: str
    axes: tuple[int, ...]
    equal: bool


@dataclass(frozen=True)
class WeightFault:
    """A parameter that is not what the reference has, and what it looks like."""

    reference: str
    candidate: str
    error: float
    sentence: str
    id: str


@dataclass(frozen=True)
class Audit:
    """The reference's parameters with their matches, faults, and the candidate's extra parameters."""

    matches: Sequence[Match]
    faults: Sequence[WeightFault]
    extra: Sequence[str]


def audit(reference: Trace, candidate: Trace, pairs: Mapping[str, Pair]) -> Audit:
    """Match the parameters of two models: in paired stages first, by equal numbers, then by shape.

    Args:
        reference: its run.
        candidate: a run on the reference's numbers: where its backward pass is right, its gradients are the
            reference's.
        pairs: of the values.
    """
    ours, theirs = reference.parameters, candidate.parameters
    names = set(pairs), {pair.candidate for pair in pairs.values()}
    stages = [
        (stage_parameters(reference, name, names[0]), stage_parameters(candidate, pair.candidate, names[1]))
        for name, pair in pairs.items()
    ]
    found = _match_equal(reference, candidate, stages)
    taken = {match.candidate for match in found.values()}
    _match_reshaped(found, taken, ours, theirs)
    _match_by_shape(found, taken, ours, theirs, stages)
    _match_constants(found, taken, ours, theirs)
    matches = [found.get(name, Match(name, "", (), False)) for name in ours]
    faults = [fault for one in matches for fault in _faults(one, matches, ours, theirs, stages)]
    return Audit(matches, faults, [name for name in theirs if name not in taken])


def _match_equal(
    reference: Trace, candidate: Trace, stages: Sequence[tuple[Sequence[str], Sequence[str]]]
) -> dict[str, Match]:
    """Match what has the same numbers.

    Of several with the same numbers, such as biases that are 0, the gradient tells; then the stage, then the
    name, then the order.
    """
    ours, theirs = reference.parameters, candidate.parameters
    together = {(name, other) for left, right in stages for name in left for other in right}
    by_numbers: dict[tuple[float, ...], list[str]] = {}
    for other, array in theirs.items():
        by_numbers.setdefault(_key(array), []).append(other)
    fits: list[tuple[tuple[bool, bool, float], str, str, tuple[int, ...]]] = []
    for name, array in ours.items():
        for other in by_numbers.get(_key(array), ()):
            best = best_axes(array, theirs[other])
            if best is not None and best[1] == 0:
                left = reference.parameter_gradients.get(name)
                right = candidate.parameter_gradients.get(other)
                differs = False
                if left is not None and right is not None:
                    differs = largest_error(squeeze(left), squeeze(right).transpose(best[0])) > SAME
                likeness = difflib.SequenceMatcher(None, name, other, autojunk=False).ratio()
                fits.append(((differs, (name, other) not in together, -likeness), name, other, best[0]))
    found: dict[str, Match] = {}
    taken: set[str] = set()
    for _, name, other, axes in sorted(fits, key=lambda fit: fit[0]):
        if name not in found and other not in taken:
            found[name] = Match(name, other, axes, True)
            taken.add(other)
    return found


def _key(array: Array) -> tuple[float, ...]:
    """What equal numbers have in common in any order."""
    return (array.size, float(array.min(initial=np.inf)), float(array.max(initial=-np.inf)))


def _match_by_shape(
    found: dict[str, Match],
    taken: set[str],
    ours: Mapping[str, Array],
    theirs: Mapping[str, Array],
    stages: Sequence[tuple[Sequence[str], Sequence[str]]],
) -> None:
    """Match what is read by the same stage and has the same shape, in the order in which it is read."""
    for left, right in stages:
        for name in left:
            for other in right:
                best = None if name in found or other in taken else best_axes(ours[name], theirs[other])
                if best is not None:
                    axes = _usual_axes(found, ours, ours[name].ndim) or best[0]
                    axes = axes if _fits(ours[name], theirs[other], axes) else best[0]
                    found[name] = Match(name, other, axes, best[1] == 0)
                    taken.add(other)


def _match_reshaped(
    found: dict[str, Match], taken: set[str], ours: Mapping[str, Array], theirs: Mapping[str, Array]
) -> None:
    """Match what has the same numbers, perhaps rounded, in another shape: a kernel for flat images."""
    for name, array in ours.items():
        for other, numbers in theirs.items():
            if name in found or other in taken or array.size != numbers.size or array.size < 2:
                continue
            a, b = np.sort(array, axis=None), np.sort(numbers, axis=None)
            if best_axes(array, numbers) is None and largest_error(a, b) <= 2 * _ROUNDED["bfloat16"]:
                found[name] = Match(name, other, (), bool(np.array_equal(a, b)))
                taken.add(other)


def _match_constants(
    found: dict[str, Match], taken: set[str], ours: Mapping[str, Array], theirs: Mapping[str, Array]
) -> None:
    """Match what is left with what is left at one number everywhere: a bias of 0, read at another stage."""
    for name, array in ours.items():
        for other, numbers in theirs.items():
            if name not in found and other not in taken and numbers.size > 1 and np.ptp(numbers) == 0:
                best = best_axes(array, numbers)
                if best is not None:
                    found[name] = Match(name, other, best[0], False)
                    taken.add(other)


def _fits(a: Array, b: Array, axes: tuple[int, ...]) -> bool:
    a, b = squeeze(a), squeeze(b)
    return len(axes) == b.ndim == a.ndim and tuple(b.shape[axis] for axis in axes) == a.shape


def _usual_axes(found: Mapping[str, Match], ours: Mapping[str, Array], rank: int) -> tuple[int, ...] | None:
    """The order of axes that most equal parameters of this rank have."""
    counts = Counter(
        match.axes
        for name, match in found.items()
        if match.equal and ours[name].ndim == rank == len(match.axes)
    )
    return counts.most_common(1)[0][0] if counts else None


def _faults(
    match: Match,
    matches: Sequence[Match],
    ours: Mapping[str, Array],
    theirs: Mapping[str, Array],
    stages: Sequence[tuple[Sequence[str], Sequence[str]]],
) -> list[WeightFault]:
    """The faults of one parameter."""
    name, other = match.reference, match.candidate
    if not other and any(_contains(array, ours[name]) for array in theirs.values()):
        return []  # one parameter of the candidate has the numbers of several: q, k and v in one kernel
    if not other and name.rpartition(".")[2] == "bias":
        return [
            WeightFault(
                name, "", float("inf"), f"The candidate has no {name}: add a bias there", "missing-bias"
            )
        ]
    if not other:
        return [
            WeightFault(
                name,
                "",
                float("inf"),
                f"The candidate has no parameter like {name} {list(ours[name].shape)}",
                "missing-parameter",
            )
        ]
    if match.equal:
        return _equal_faults(match, matches, ours, theirs, stages)
    truth = squeeze(ours[name])
    array = squeeze(theirs[other])
    array = array.transpose(match.axes) if len(match.axes) == array.ndim else array
    if array.shape != truth.shape:
        truth, array = np.sort(truth, axis=None), np.sort(array, axis=None)
    error = largest_error(truth, array)
    if not np.isfinite(array).all():
        sentence = f"{other} is NaN or infinite in {(~np.isfinite(array)).sum()} of its {array.size} numbers"
        return [WeightFault(name, other, error, sentence, "weight-not-finite")]
    for precision, rounding in _ROUNDED.items():
        relative = np.abs(truth - array) / np.maximum(np.abs(truth), 1e-300)
        if (
            np.median(relative) > 0
            and relative.max(initial=0) <= 2 * rounding * 1.01
            and np.median(relative) > rounding / 64
        ):
            sentence = f"{other} is {name} rounded to {precision}: load it in its own precision"
            return [WeightFault(name, other, error, sentence, "weight-of-lower-precision")]
    if array.size and np.ptp(array) == 0 and np.ptp(truth) > 0:
        sentence = (
            f"{other} is {array.reshape(-1)[0]:g} everywhere, {name} is not: it was left at its initial value"
        )
        return [WeightFault(name, other, error, sentence, "weight-not-loaded")]
    flat = truth.reshape(-1), array.reshape(-1)
    dot = float(flat[0] @ flat[0])
    factor = float(flat[0] @ flat[1]) / dot if dot else 0.0
    if dot and factor and largest_error(flat[1], factor * flat[0]) < 1e-6:
        return [WeightFault(name, other, error, f"{other} is {factor:.6g} times {name}", "weight-scaled")]
    for count in range(1, truth.ndim - 1):
        for flipped in itertools.combinations(range(2, truth.ndim), count):
            if np.array_equal(np.flip(truth, flipped), array):
                mirrored = f"{other} is {name} mirrored along its axes {flipped}"
                sentence = f"{mirrored}: PyTorch and JAX both correlate, do not flip"
                return [WeightFault(name, other, error, sentence, "kernel-flipped")]
    if truth.ndim > 1 and sorted(map(float, flat[0])) == sorted(map(float, flat[1])):
        sentence = (
            f"{other} has the numbers of {name} in another order: reshaped instead of transposed, or flipped"
        )
        return [WeightFault(name, other, error, sentence, "weight-reordered")]
    apart = f"largest difference {error:.1e} of its largest magnitude"
    sentence = f"{other} is not {name} ({apart}): it was not loaded, or it is another one"
    return [WeightFault(name, other, error, sentence, "weight-not-loaded")]


def _contains(array: Array, part: Array) -> bool:
    """True if a larger array has all the numbers of another one, which are not all the same."""
    return array.size > part.size > 1 and np.ptp(part) > 0 and bool(np.isin(part, array).all())


def _equal_faults(
    match: Match,
    matches: Sequence[Match],
    ours: Mapping[str, Array],
    theirs: Mapping[str, Array],
    stages: Sequence[tuple[Sequence[str], Sequence[str]]],
) -> list[WeightFault]:
    """A parameter with the right numbers that is transposed unlike the others, or read at another place."""
    name, other = match.reference, match.candidate
    rank = squeeze(ours[name]).ndim
    peers = [m for m in matches if m.equal and m.reference != name and len(m.axes) == rank]
    usual = Counter(m.axes for m in peers).most_common(1)
    if len(match.axes) == rank > 1 and peers and usual[0][0] != match.axes and usual[0][1] > len(peers) / 2:
        shape = squeeze(theirs[other]).shape
        if tuple(shape[axis] for axis in usual[0][0]) == squeeze(ours[name]).shape:
            orders = f"its axes in the order {match.axes}; the others have {usual[0][0]}"
            sentence = f"{other} is {name} with {orders}: transpose it like them"
            return [WeightFault(name, other, float("inf"), sentence, "kernel-transposed")]
    readers = [(left, right) for left, right in stages if name in left]
    if readers and all(other not in right for _, right in readers):
        place = next((left for left, right in stages if other in right), [])
        here = {m.reference: m.candidate for m in matches}
        like = [p for p in place if ours[p].shape == ours[name].shape and p != name]
        like = [p for p in like if any(here[p] in right for _, right in readers)]
        if like:
            sentence = (
                f"{other}, which has the numbers of {name}, is where {like[0]} belongs: they are swapped"
            )
            return [WeightFault(name, other, float("inf"), sentence, "weights-swapped")]
    return []
