"""Memory that is used again, for the large arrays of a training step."""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from numpy_ref.layers import Array

SLAB = 1 << 25  # bytes that are asked of the system at once
_lock = threading.Lock()
_blocks: dict[int, list[Any]] = {}
_slab, _used = np.empty(0, np.uint8), 0  # the newest slab, and how many of its bytes are given out


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """`np.empty`, in memory that an array of the same size had before, once nothing refers to that any more.

    A fresh array costs more than it seems: the system hands out memory page by page, at the first touch of
    each, which for a pass over a large array is as slow as the pass. A training step asks for the same sizes
    every time. And blocks cut from large slabs lie on large pages, where NumPy asks for them.

    The arrays behave like any others: as long as anything refers to one, its block has more references than
    the list's own, and is not given out again.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with _lock:
        blocks = _blocks.setdefault(size, [])
        for block in reversed(blocks):  # the last ones are free the soonest
            if sys.getrefcount(block) == _UNUSED:
                return np.ndarray(shape, dtype, block)
        blocks.append(_cut(size))
        return np.ndarray(shape, dtype, blocks[-1])


def empty_like(array: Array) -> Array:
    """`empty` in the shape and type of an array."""
    return empty(array.shape, array.dtype)


def trim() -> None:
    """Hand freed memory back to the system, where the C library (glibc) would keep it for later."""
    with suppress(AttributeError, OSError, TypeError):  # it is another C library
        ctypes.CDLL(None).malloc_trim(0)


def _cut(size: int) -> Any:
    """A block of the newest slab, or of a new one: an object of its own, that arrays upon it refer to."""
    global _slab, _used
    if _used + size > len(_slab):
        _slab, _used = np.empty(max(SLAB, size) + 64, np.uint8), 0
        _used = -_slab.ctypes.data % 64
    block = (ctypes.c_byte * size).from_buffer(_slab.data, _used)
    _used += -(-size // 64) * 64  # whole cache lines
    return block


def _count_references() -> int:
    """What `sys.getrefcount` says of a block that only its list and the loop over it refer to."""
    for block in [(ctypes.c_byte * 1)()]:
        return sys.getrefcount(block)
    raise AssertionError


_UNUSED = _count_references()
