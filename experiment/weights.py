"""State dicts as safetensors files: {torchvision parameter name: array in PyTorch's layout}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiment.rundir import write_file


def from_tree(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of a checkpoint tree: its parameters and batch statistics."""
    return {**tree["params"], **tree["batch_stats"]}


def save(path: Path, state_dict: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file, whole or not at all; the same content gives the same bytes."""
    from safetensors.numpy import save as serialize

    # One entry only: the library writes several in an order that changes from call to call.
    header = {"run": json.dumps(dict(metadata))}
    write_file(path, serialize({name: np.ascontiguousarray(a) for name, a in state_dict.items()}, header))
