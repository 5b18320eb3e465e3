"""Reused memory for the large arrays of a training step."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import sys
import threading
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from numpy_ref.layers import Array

SLAB = 1 << 25  # bytes requested from the system at once
SPARE = 1 << 27  # bytes that may be kept beyond those in use
_lock = threading.Lock()
_clock = itertools.count()


class _Slab:
    """Memory that blocks are cut from, and the time when one of them was last used."""

    def __init__(self, size: int) -> None:
        self.memory = np.empty(size + 64, np.uint8)
        self.used = -self.memory.ctypes.data % 64
        self.last_use = next(_clock)

    def cut(self, size: int) -> Any:
        """Cut a block: an object that the arrays in it refer to."""
        block = (ctypes.c_byte * size).from_buffer(self.memory.data, self.used)
        self.used += -(-size // 64) * 64  # whole cache lines
        return block


_blocks: dict[int, list[tuple[Any, _Slab]]] = {}  # by size
_newest = _Slab(0)
_peak = 0  # the most bytes in use when a slab was requested


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """`np.empty` in the memory of an earlier array of the same size that nothing refers to any more.

    A fresh array is expensive: the system provides memory page by page, at the first write to each, which
    for a large array takes as long as a pass over it. A training step needs the same sizes every time.
    Besides, blocks cut from large slabs lie on large pages, where NumPy requests them.

    The arrays behave like any others: as long as anything refers to one, its block has more references than
    those of the lists here, and is not reused. The memory kept, in use or not, is at most twice the peak use,
    plus `SPARE`; the slabs unused for the longest time are freed first.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with _lock:
        for block, slab in reversed(_blocks.get(size, ())):  # the last ones become free first
            if sys.getrefcount(block) == _UNUSED:
                slab.last_use = next(_clock)
                return np.ndarray(shape, dtype, block)
        slab = _slab_with(size)
        block = slab.cut(size)
        _blocks.setdefault(size, []).append((block, slab))
        return np.ndarray(shape, dtype, block)


def empty_like(array: Array) -> Array:
    """`empty` in the shape and type of an array."""
    return empty(array.shape, array.dtype)


def trim() -> None:
    """Return freed memory to the system, which the C library (glibc) would keep for later."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _slab_with(size: int) -> _Slab:
    """The newest slab, or if `size` bytes do not fit, a new one, after the excess is freed."""
    global _newest
    if _newest.used + size > len(_newest.memory):
        _free_excess(size)
        _newest = _Slab(max(SLAB, size))
    return _newest


def _free_excess(size: int) -> None:
    """Free slabs without a block in use, the longest unused first, until the bound of `empty` holds."""
    global _peak
    slabs: dict[_Slab, int] = {}  # bytes
    busy, in_use = set(), size
    for length, blocks in _blocks.items():
        for block, slab in blocks:
            slabs[slab] = slabs.get(slab, 0) + length
            if sys.getrefcount(block) > _UNUSED:
                busy.add(slab)
                in_use += length
    _peak = max(_peak, in_use)
    excess = size + sum(slabs.values()) - 2 * _peak - SPARE
    dropped = set()
    for slab in sorted(slabs.keys() - busy, key=lambda slab: slab.last_use):
        if excess <= 0:
            break
        dropped.add(slab)
        excess -= slabs[slab]
    if dropped:
        for length, blocks in list(_blocks.items()):
            _blocks[length] = [(block, slab) for block, slab in blocks if slab not in dropped]
            if not _blocks[length]:
                del _blocks[length]


def _after_fork() -> None:
    """Replace the lock in the child: another thread of the parent may have held it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _count_references() -> int:
    """The result of `sys.getrefcount` for a block that only its list and the loop over it refer to."""
    for block, _ in [((ctypes.c_byte * 1)(), None)]:
        return sys.getrefcount(block)
    raise AssertionError


_UNUSED = _count_references()
