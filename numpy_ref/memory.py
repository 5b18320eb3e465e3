"""Memory that is used again, for the large arrays of a training step."""

from __future__ import annotations

import math
import sys
import threading

import numpy as np
import numpy.typing as npt

from numpy_ref.layers import Array

_lock = threading.Lock()
_blocks: dict[int, list[npt.NDArray[np.uint8]]] = {}


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """`np.empty`, in memory that an array of the same size had before, once nothing refers to that any more.

    A fresh array costs more than it seems: the system hands out its memory page by page, at the first touch
    of each, which for a pass over a large array is as slow as the pass. A training step asks for the same
    sizes every time. The arrays behave like any others: as long as anything refers to one, its block has more
    references than the list's own, and is not given out again.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with _lock:
        blocks = _blocks.setdefault(size, [])
        for block in blocks:
            if sys.getrefcount(block) == _UNUSED:
                return np.ndarray(shape, dtype, block.data)
        blocks.append(np.empty(size, np.uint8))
        return np.ndarray(shape, dtype, blocks[-1].data)


def _count_references() -> int:
    """What `sys.getrefcount` says of a block that only its list and the loop over it refer to."""
    for block in [np.empty(1, np.uint8)]:
        return sys.getrefcount(block)
    raise AssertionError


_UNUSED = _count_references()


def empty_like(array: Array) -> Array:
    """`empty` in the shape and type of an array."""
    return empty(array.shape, array.dtype)


def release() -> None:
    """Give the memory of arrays that nothing refers to back to the system."""
    for size, blocks in list(_blocks.items()):
        _blocks[size] = [block for block in blocks if sys.getrefcount(block) > _UNUSED + 1]
