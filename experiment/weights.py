"""State dicts as safetensors files: {torchvision parameter name: array in PyTorch's layout}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiment.errors import UserError
from experiment.rundir import write_file

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
"""The types in a safetensors file as NumPy's. It has none for BF16: the upper half of a float32."""


def from_tree(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of a checkpoint tree: its parameters and batch statistics."""
    return {**tree["params"], **tree["batch_stats"]}


def load(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, from whatever program; bfloat16 as float32, which is exact.

    Raises:
        UserError: the file is absent, damaged, or has a type that no network here has.
    """
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except SafetensorError as error:
        remedy = "`python -m experiment convert` makes one of PyTorch's files"
        raise UserError(f"{path}: no safetensors file, or a damaged one ({error}); {remedy}") from None
    tensors = {}
    for name, entry in entries:
        kind, data = entry["dtype"], entry["data"]
        if kind == "BF16":
            array = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif kind in TYPES:
            array = np.frombuffer(data, TYPES[kind])
        else:
            raise UserError(f"{path}: {name} is of type {kind}; save it as one of {', '.join(TYPES)}, BF16")
        tensors[name] = array.reshape(entry["shape"])
    return tensors


def step_of(path: Path) -> int | None:
    """Return the step that a run wrote into its safetensors file, or None if the file has none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return int(json.loads(file.metadata()["run"])["step"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def save(path: Path, state_dict: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file, whole or not at all; the same content gives the same bytes."""
    from safetensors.numpy import save as serialize

    # One entry only: the library writes several in an order that changes from call to call.
    header = {"run": json.dumps(dict(metadata))}
    write_file(path, serialize({name: np.ascontiguousarray(a) for name, a in state_dict.items()}, header))
