"""The axes of two arrays: in which order they are those of each other, and how far the numbers are apart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from parity.trace import Array


def squeeze(array: Array) -> Array:
    """The array without axes of length 1."""
    return array.reshape([side for side in array.shape if side != 1])


def largest_error(a: Array, b: Array, scale: float | None = None) -> float:
    """The largest difference, relative to `scale` or the largest magnitude of `a`; infinite for a NaN."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.size == 0:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(a - b)
    error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, error)
    if not np.isfinite(error).all():
        return float("inf")
    finite = np.abs(a[np.isfinite(a)])
    scale = float(finite.max(initial=0.0)) if scale is None else scale
    return float(error.max()) / scale if scale else (0.0 if error.max() == 0 else float("inf"))


def best_axes(reference: Array, candidate: Array) -> tuple[tuple[int, ...], float] | None:
    """The order of the candidate's axes that is nearest to the reference, and the error; None if none fits.

    Axes of length 1 do not count. Of equal errors the first wins, in the order: unchanged, channels moved
    from last to second place, all others.
    """
    a, b = squeeze(reference), squeeze(candidate)
    if sorted(a.shape) != sorted(b.shape):
        return None
    best: tuple[tuple[int, ...], float] | None = None
    for axes in _orders(a.ndim):
        if tuple(b.shape[axis] for axis in axes) == a.shape:
            error = largest_error(a, b.transpose(axes))
            if best is None or error < best[1] * 0.999:
                best = axes, error
            if error <= 1e-12:
                break
    return best


def _orders(rank: int) -> list[tuple[int, ...]]:
    if rank > 5:
        return [tuple(range(rank))]
    usual = [tuple(range(rank))]
    if rank >= 3:
        usual += [
            (0, rank - 1, *range(1, rank - 1)),
            (0, *range(2, rank), 1),
            (*range(1, rank - 1), rank - 1, 0),
        ]
    if rank == 3:
        usual += [(2, 0, 1), (1, 2, 0)]
    return list(dict.fromkeys([*usual, *itertools.permutations(range(rank))]))


def departing_axes(a: Array, b: Array, usual: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    """The usual order of the axes of `b` if its shape allows that, else the one that is nearest to `a`.

    Of numbers that differ the nearest order says little, so the batch stays first where it can.
    """
    shape = squeeze(b).shape
    axes = usual.get(len(shape))
    if axes is not None and (tuple(shape[axis] for axis in axes) == squeeze(a).shape or a.size != b.size):
        return axes
    if len(shape) > 2 and shape[0] == squeeze(a).shape[0]:
        found = best_axes(squeeze(a)[0], squeeze(b)[0])
        if found is not None:
            return (0, *(axis + 1 for axis in found[0]))
    found = best_axes(a, b)
    return found[0] if found is not None else tuple(range(len(shape)))
