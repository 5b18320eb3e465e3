"""Several steps in one call of a compiled program: which batches go into it, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

Batch = Mapping[str, np.ndarray]


def best_chunk() -> int:
    """How many steps one call of a compiled program takes at most.

    A GPU idles while Python starts a step, which for a small network takes longer than the step itself. A CPU
    has no such gaps, and runs convolutions slower inside a loop.
    """
    return 1 if jax.default_backend() == "cpu" else 10


def chunks_of(
    batches: Iterable[Batch], step: int, most: int, needs_state: Callable[[int], bool]
) -> Iterator[list[Batch]]:
    """Yield lists of up to `most` batches; a list ends where `needs_state` is true. The first is step + 1."""
    chunk = []
    for number, batch in enumerate(batches, step + 1):
        chunk.append(batch)
        if len(chunk) == most or needs_state(number):
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Row:
    """Row `index` of an array on the device, which is fetched when it is read: once for all its rows."""

    def __init__(self, array: jax.Array, index: int) -> None:
        self._array, self._index = array, index

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(np.asarray(self._array)[self._index], dtype)

    def __float__(self) -> float:
        return float(np.asarray(self._array)[self._index])
