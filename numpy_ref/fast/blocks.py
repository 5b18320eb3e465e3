"""Blocks of rows that fit the cache, rows wide enough for NumPy, and sums over them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from numpy_ref.layers import Array

BLOCK = 1 << 18  # bytes of one array in a block: several arrays of a block fit into a second-level cache
PATCHES_BLOCK = 1 << 22  # bytes of patches in a block: matrix products need many rows to be fast


def blocks(rows: Array) -> Iterator[slice]:
    """Slices of the first axis with as many rows as `BLOCK` bytes hold, at least one."""
    return slices(len(rows), max(1, BLOCK * len(rows) // max(rows.nbytes, 1)))


def slices(n: int, step: int) -> Iterator[slice]:
    """Slices of range(n), `step` long but for the last."""
    return (slice(i, i + step) for i in range(0, n, step))


def even_blocks(n: int, nbytes: int) -> Iterator[slice]:
    """Even slices of n images, of about `PATCHES_BLOCK` bytes each, if all images take `nbytes`."""
    count = max(1, min(n, math.ceil(nbytes / PATCHES_BLOCK)))
    bounds = [n * i // count for i in range(count + 1)]
    return (slice(start, stop) for start, stop in pairwise(bounds))


def widen(x: Array) -> tuple[Array, int]:
    """Return x [..., C] as [M, F * C], F pixels side by side, and F = `fold_of(x.shape)`."""
    fold = fold_of(x.shape)
    return x.reshape(math.prod(x.shape[:-1]) // fold, fold * x.shape[-1]), fold


def fold_of(shape: tuple[int, ...]) -> int:
    """How many pixels of [..., C] stand side by side in a row: NumPy is slow at short rows."""
    pixels, fold = math.prod(shape[:-1]), 1
    while fold * shape[-1] < 1024 and pixels % (2 * fold) == 0:
        fold *= 2
    return fold


def repeat(a: Array, fold: int) -> Array:
    """Repeat a [C] for each of F pixels side by side: [F * C]."""
    return np.concatenate([a] * fold)  # `np.tile` takes as long as an operation on a small block


def fold_sums(sums: Array, fold: int) -> Array:
    """Add up sums [..., F * C] over F pixels side by side: [..., C]."""
    return sums if fold == 1 else np.asarray(sums.reshape(*sums.shape[:-1], fold, -1).sum(-2))


def sum_pixels(x: Array) -> Array:
    """Add up x [..., C] over all axes but the last, [C]; float32 in float64, 128 rows at a time."""
    if x.dtype == np.float64:
        return np.asarray(x.sum(tuple(range(x.ndim - 1))))
    rows, fold = widen(x)
    ones, sums = np.ones(len(rows), rows.dtype), np.zeros(rows.shape[1], np.float64)
    for part in slices(len(rows), 128):
        sums += ones[part] @ rows[part]
    return fold_sums(sums, fold)
