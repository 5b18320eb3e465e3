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


def save(path: Path, state_dict: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; the same content gives the same bytes."""
    from safetensors.numpy import save as serialize

    content = serialize({name: np.ascontiguousarray(a) for name, a in state_dict.items()}, dict(metadata))
    # The library writes the metadata in an order that changes from call to call.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_file(path, len(text).to_bytes(8, "little") + text + content[start:])
