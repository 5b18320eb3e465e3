"""Recorded tensors of two programs, by name, within limits that are given: no noise is measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from parity.report import Difference, Report, Tensor
from parity.trace import Array
from parity.weights import Audit


def compare_tensors(
    reference: Mapping[str, Array],
    candidate: Mapping[str, Array],
    allowed: float | Mapping[str, float],
) -> Report:
    """Compare tensors of the same names, for programs whose rounding is known.

    Args:
        reference: the right tensors by name, in the order of computation.
        candidate: the others, in the same shapes; what only the candidate has is noted.
        allowed: the largest error of a tensor, or of each by its name. Errors are relative to the largest
            magnitude of the reference's tensor, or absolute where all of it is 0. A number that is not finite
            is an infinite error.

    Returns:
        A report without stages: its `tensors` in the reference's order, its `first_difference`.

    Examples:
        >>> ours, theirs = {"logits": np.ones(3)}, {"logits": np.array([1, 1, 1.5])}
        >>> print(parity.compare_tensors(ours, theirs, 1e-6).first_difference.distance)
        off by 5.0e-01 of its largest magnitude, allowed 1.0e-06, most at [2]
    """
    tensors, first = [], None
    for name, truth in reference.items():
        truth = np.asarray(truth)
        error, index, fault = _largest_error(truth, candidate.get(name))
        limit = allowed if isinstance(allowed, float | int) else allowed[name]
        departs = not error <= limit
        tensors.append(
            Tensor(
                what="tensor",
                reference=name,
                candidate=name,
                shape=truth.shape,
                error=error,
                noise=limit,
                made_here=error,
                allowed=limit,
                departs=departs,
                coarse=False,
                factor=1.0,
            )
        )
        if departs and first is None:
            first = Difference("tensor", name, name, error, limit, index, fault, "")
    extra = ", ".join(name for name in candidate if name not in reference)
    return Report(
        reference="tensors",
        candidate="tensors",
        precision=", ".join(sorted({str(np.asarray(array).dtype) for array in reference.values()})),
        stages=[],
        tensors=tensors,
        weights=Audit([], [], []),
        unmatched=[name for name in reference if name not in candidate],
        first_difference=first,
        notes=[f"Tensors that only the candidate has: {extra}."] if extra else [],
    )


def _largest_error(truth: Array, array: Array | None) -> tuple[float, tuple[int, ...] | None, str]:
    """The largest error, its index, and both numbers there; no index if the two cannot be compared."""
    if array is None:
        return np.inf, None, "The candidate has none."
    array = np.asarray(array)
    if truth.shape != array.shape:
        return np.inf, None, f"Shape {list(array.shape)}, not {list(truth.shape)}."
    if truth.size == 0:
        return 0.0, None, ""
    exact, other = truth.astype(np.float64), array.astype(np.float64)
    finite = np.isfinite(exact) & np.isfinite(other)
    scale = np.abs(exact[finite]).max(initial=0.0)
    error = np.full(truth.shape, np.inf)
    error[finite] = np.abs(other[finite] - exact[finite]) / (scale or 1.0)
    index = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
    numbers = f"{array[index]!s}, not {truth[index]!s}"
    return float(error[index]), index, f"{numbers}; the tensor's largest magnitude is {scale:.3g}."
