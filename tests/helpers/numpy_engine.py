"""NumPy engines of thin networks."""

from __future__ import annotations

from typing import Any

from numpy_ref import Engine
from tests.helpers.jax_engine import CLASSES, MEAN, SHAPE, STD, THIN, learning_rate


def make_engine(
    model: str = "resnet18", optimizer: str = "adam", processes: int = 1, **options: Any
) -> Engine:
    defaults: dict[str, Any] = {
        "model_options": THIN[model],
        "num_classes": CLASSES,
        "image_shape": SHAPE,
        "mean": MEAN,
        "std": STD,
        "optimizer_options": {"base_lr": 1e-3},
        "learning_rate": learning_rate,
        "precision": "float64",
    }
    return Engine(model=model, optimizer=optimizer, processes=processes, **(defaults | options))
