"""Memory that is used again, for the large arrays of a training step."""

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

SLAB = 1 << 25  # bytes that are asked of the system at once
SPARE = 1 << 27  # bytes that may be kept beside what is in use
_lock = threading.Lock()
_clock = itertools.count()


class _Slab:
    """Memory that blocks are cut from, and when one of them was last given out."""

    def __init__(self, size: int) -> None:
        self.memory = np.empty(size + 64, np.uint8)
        self.used = -self.memory.ctypes.data % 64
        self.last_use = next(_clock)

    def cut(self, size: int) -> Any:
        """A block: an object of its own, that arrays upon it refer to."""
        block = (ctypes.c_byte * size).from_buffer(self.memory.data, self.used)
        self.used += -(-size // 64) * 64  # whole cache lines
        return block


_blocks: dict[int, list[tuple[Any, _Slab]]] = {}  # by their size
_newest = _Slab(0)
_peak = 0  # the most bytes that were in use when a slab was asked for


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """`np.empty`, in memory that an array of the same size had before, once nothing refers to that any more.

    A fresh array costs more than it seems: the system hands out memory page by page, at the first touch of
    each, which for a pass over a large array is as slow as the pass. A training step asks for the same sizes
    every time. And blocks cut from large slabs lie on large pages, where NumPy asks for them.

    The arrays behave like any others: as long as anything refers to one, its block has more references than
    the lists' own, and is not given out again. All that is kept, in use or not, is at most twice what was in
    use at one time, and `SPARE`; slabs unused for the longest go first.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with _lock:
        for block, slab in reversed(_blocks.get(size, ())):  # the last ones are free the soonest
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
    """Hand freed memory back to the system, where the C library (glibc) would keep it for later."""
    with suppress(AttributeError, OSError, TypeError):  # it is another C library
        ctypes.CDLL(None).malloc_trim(0)


def kept_bytes() -> int:
    """Bytes of all blocks, in use or not."""
    with _lock:
        return sum(size * len(blocks) for size, blocks in _blocks.items())


def _slab_with(size: int) -> _Slab:
    """The newest slab, or a new one if so many bytes do not fit; then what is too much is let go."""
    global _newest
    if _newest.used + size > len(_newest.memory):
        _let_go(size)
        _newest = _Slab(max(SLAB, size))
    return _newest


def _let_go(size: int) -> None:
    """Drop slabs without a block in use, the longest unused first, while more is kept than may be."""
    global _peak
    slabs: dict[_Slab, int] = {}  # bytes of each
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
    """In the child: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _count_references() -> int:
    """What `sys.getrefcount` says of a block that only its list and the loop over it refer to."""
    for block, _ in [((ctypes.c_byte * 1)(), None)]:
        return sys.getrefcount(block)
    raise AssertionError


_UNUSED = _count_references()
