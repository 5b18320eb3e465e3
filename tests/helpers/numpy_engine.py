"""NumPy engines of thin networks."""

from __future__ import annotations

from typing import Any

from numpy_ref import Engine
from tests.helpers.jax_engine import thin_options


def make_engine(
    model: str = "resnet18", optimizer: str = "adam", processes: int = 1, **options: Any
) -> Engine:
    return Engine(model=model, optimizer=optimizer, processes=processes, **{**thin_options(model), **options})
