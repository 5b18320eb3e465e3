"""Trees and run data for checkpoints."""

from __future__ import annotations

import numpy as np


def make_tree(step, seed=0):
    """A tree with every kind of leaf that an engine may hand over."""
    rng = np.random.default_rng([seed, step])
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324, 1 / 3])
    return {
        "params": {
            "conv1.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
            "layer1.0.bn1.weight": rng.normal(size=5),
            "layer1.0.downsample.0.weight": rng.normal(size=(3, 5)).astype(np.float32).T,  # a view, strided
            "fc.bias": odd,
        },
        "batch_stats": {},
        "optimizer": {
            "count": np.array(step, np.int32),
            "mu": {"conv1.weight": np.zeros((4, 3, 3, 3), np.float32), "fc.bias": odd.astype(np.float32)},
        },
        "step": np.array(step, np.int32),
    }


RUN = {"history": {"length": 7, "sha256": "ab" * 32}, "best": None, "clock": {"wall_seconds": 0.1 + 0.2}}
