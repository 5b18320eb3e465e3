"""The reference's operation as a function of knobs, and changes of these knobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.causes import Departure
from parity.trace import Array

Padding = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Change:
    """Other values of one or a few knobs, and the words for them.

    Attributes:
        id: see `Cause`.
        does: what the candidate does: "uses epsilon 0.001".
        reference: what the reference does: "1e-05".
        write: what to write in the candidate: "epsilon=1e-05".
        knobs: the changed knobs.
        place: the name of the value at which the models differ, where that is an operand.
    """

    id: str
    does: str
    reference: str
    write: str
    knobs: Mapping[str, Any]
    place: str = ""


@dataclass(frozen=True)
class Form:
    """An operation in NumPy.

    Attributes:
        compute: the operation; its arguments are the knobs, the arrays it reads among them.
        knobs: those of the reference.
        changes: hypotheses, given the candidate's result in the form's own layout.
        view: a result of the reference in the form's own layout.
        per_example: example 0 of the result depends on example 0 of the knob `x` alone.
    """

    compute: Callable[..., Array]
    knobs: Mapping[str, Any]
    changes: Callable[[Array], Iterable[Change]]
    view: Callable[[Array], Array] = np.asarray
    per_example: bool = False

    def result(self, knobs: Mapping[str, Any] | None = None) -> Array:
        """Compute the operation with some knobs changed; an empty array if they do not go together."""
        try:
            with np.errstate(all="ignore"):
                return np.asarray(self.compute(**{**self.knobs, **(knobs or {})}))
        except (ValueError, IndexError, ZeroDivisionError):
            return np.empty(0)


def distance(result: Array, target: Array) -> float:
    """The largest difference relative to the largest magnitude of `target`; infinite for another shape."""
    if result.shape != target.shape or not result.size:
        return np.inf
    with np.errstate(all="ignore"):
        error = np.abs(result - target).max()
        scale = np.abs(target).max()
    if not np.isfinite(error):
        same = (result == target) | (np.isnan(result) & np.isnan(target))
        finite = np.isfinite(target) & np.isfinite(result)
        if not (same | finite).all() or not finite.any():
            return np.inf
        error, scale = np.abs(result[finite] - target[finite]).max(), np.abs(target[finite]).max()
    return float(error / scale) if scale else (0.0 if error == 0 else np.inf)


def solve(compute: Callable[[float], Array], target: Array, grid: Iterable[float]) -> float | None:
    """The number at which `compute` comes nearest to `target`: the best of a grid, then Gauss-Newton.

    A number that has few digits is preferred where it is as near.
    """
    with np.errstate(all="ignore"):
        errors = {value: _squares(compute(value), target) for value in grid}
        best = min(errors, key=lambda value: errors[value])
        if not np.isfinite(errors[best]):
            return None
        for _ in range(30):
            step = 1e-4 * abs(best) or 1e-6
            base = compute(best)
            slope = (compute(best + step) - compute(best - step)) / (2 * step)
            square = float(np.vdot(slope, slope))
            if not square or not np.isfinite(square):
                break
            update = float(np.vdot(slope, target - base)) / square
            while abs(update) > 1e-17 and not _squares(compute(best + update), target) < _squares(
                base, target
            ):
                update /= 4
            if abs(update) <= max(1e-14 * abs(best), 1e-17):
                break
            best += update
        error = distance(compute(best), target)
        for digits in range(1, 7):
            rounded = float(f"{best:.{digits}g}")
            if distance(compute(rounded), target) <= max(2 * error, 1e-10):
                return rounded
    return float(best)


def _squares(result: Array, target: Array) -> float:
    if result.shape != target.shape:
        return np.inf
    value = float(np.square(result - target).sum())
    return value if np.isfinite(value) else np.inf


def number(value: float) -> str:
    """A number to print, with as few digits as it has."""
    return f"{value:.6g}"


def attribute(departure: Departure, *names: str, default: Any = None) -> Any:
    """The first of these attributes that the reference has and that is not None."""
    for name in names:
        value = departure.reference.attributes.get(name)
        if value is not None:
            return value
    return default


def candidate_word(departure: Departure, *names: str) -> str:
    """The one of several names of an attribute that the candidate's segment has; else the first."""
    for value in (departure.candidate, *departure.segment):
        for name in names:
            if name in value.attributes:
                return name
    return names[0]


def epsilon_word(departure: Departure) -> str:
    """The candidate's name of epsilon; if unknown, the name that the reference does not use."""
    other = "epsilon" if "eps" in departure.reference.attributes else "eps"
    return candidate_word(departure, other, "epsilon", "eps")


def named(arrays: Mapping[str, Array], *endings: str) -> Array | None:
    """The array whose last name is one of these."""
    for ending in endings:
        for name, array in arrays.items():
            if name.rpartition(".")[2] == ending:
                return array
    return None


def weight_of(departure: Departure) -> Array | None:
    """The kernel or scale that the operation reads; the largest array if none has such a name."""
    found = named(departure.parameters, "weight", "kernel", "scale", "w", "gamma")
    if found is None and departure.parameters:
        found = max(departure.parameters.values(), key=lambda array: (array.ndim, array.size))
    return found


def bias_of(departure: Departure) -> Array | None:
    """The bias that the operation reads; None without one."""
    found = named(departure.parameters, "bias", "b", "beta", "offset")
    if found is None and len(departure.parameters) == 2:
        weight = weight_of(departure)
        found = next((a for a in departure.parameters.values() if a is not weight and a.ndim == 1), None)
    return found


def first_input(departure: Departure) -> Array | None:
    """The first array that the operation reads."""
    return next(iter(departure.inputs.values()), None)


def per_axis(value: Any, rank: int) -> tuple[int, ...]:
    """One number for each axis, from a number or a sequence."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return tuple(int(v) for v in values) * (rank if len(values) == 1 else 1)


def same_padding(shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int]) -> Padding:
    """TensorFlow's and JAX's "SAME": the odd one last."""
    totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(shape, kernel, stride, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def paddings(value: Any, shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int]) -> Padding:
    """(before, after) for each axis from any framework's form; `kernel` is dilated already."""
    if isinstance(value, str):
        return same_padding(shape, kernel, stride) if value.upper() == "SAME" else ((0, 0),) * len(shape)
    if isinstance(value, Sequence) and value and isinstance(value[0], Sequence):
        return tuple((int(a), int(b)) for a, b in value)
    return tuple((p, p) for p in per_axis(value, len(shape)))


def padding_changes(
    departure: Departure, base: Padding, shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int]
) -> Iterator[Change]:
    """Other paddings, equal along all axes; `kernel` is dilated already. SAME first."""
    same = same_padding(shape, kernel, stride)
    every = [same]
    side = max(kernel)
    for before in range(1 - max(stride), side):
        every += [((before, after),) * len(shape) for after in range(1 - max(stride), side)]
    here = ", ".join(f"{a} and {b}" for a, b in dict.fromkeys(base))
    for padding in dict.fromkeys(every):
        if padding == base:
            continue
        before, after = padding[0]
        yield Change(
            "same-padding" if padding == same else "padding",
            f"pads {before} before and {after} after" + (" (SAME)" if padding == same else ""),
            here,
            f"{candidate_word(departure, 'padding')}={base}",
            {"padding": padding},
        )


def pad(x: Array, padding: Padding, value: float = 0.0, mode: str = "constant") -> Array:
    """Pad the last axes; negative numbers cut."""
    lead = x.ndim - len(padding)
    for axis, (before, after) in enumerate(padding, lead):
        end = x.shape[axis] + min(after, 0)
        x = x[(slice(None),) * axis + (slice(max(-before, 0), end),)]
    widths = [(0, 0)] * lead + [(max(a, 0), max(b, 0)) for a, b in padding]
    if mode == "constant":
        return np.pad(x, widths, constant_values=value)
    return np.asarray(np.pad(x, widths, mode=mode))  # type: ignore[call-overload]


def windows(x: Array, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Array:
    """Windows over the last axes: [..., *out, *kernel]."""
    rank = len(kernel)
    sides = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    every = np.lib.stride_tricks.sliding_window_view(x, sides, axis=tuple(range(-rank, 0)))
    steps: tuple[Any, ...] = tuple(slice(None, None, s) for s in (*stride, *dilation))
    return np.asarray(every[(..., *steps)])
