"""What a failing case leaves: a folder with the tensors as safetensors and the rest as JSON; no pickle.

inputs.safetensors      x, target, state/NAME, ...
ENGINE.safetensors      each engine's results
case.json               the case, the versions of everything, and how the engines disagreed
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.parity.case import Case, Inputs, Results

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "parity-dumps"  # git ignores it
PACKAGES = ("numpy", "jax", "jaxlib", "flax", "optax", "torch")


class Dump(NamedTuple):
    """A dump, read."""

    case: Case
    inputs: Inputs
    results: dict[str, Results]
    faults: list[str]
    versions: dict[str, str]


def command(path: Path) -> str:
    """What replays a dump, to be typed in the repository's root."""
    return f"python -m tests.parity replay {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}"


def versions() -> dict[str, str]:
    """Of everything that computes."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages, "machine": platform.machine()}


def write(case: Case, inputs: Inputs, results: Mapping[str, Results], faults: Sequence[str]) -> Path:
    """Write a dump, in place of an older one of the same case, and return its folder."""
    folder = FOLDER / re.sub(r"[^\w.-]+", "-", f"{case.name}-{case.precision}")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    for name, tensors in {"inputs": inputs, **results}.items():
        whole = {key: np.require(array, requirements="C") for key, array in tensors.items()}
        save_file(whole, folder / f"{name}.safetensors")
    notes = {"case": asdict(case), "engines": list(results), "faults": list(faults), "versions": versions()}
    (folder / "case.json").write_text(json.dumps(notes, indent=1))
    return folder


def read(folder: Path) -> Dump:
    """Read a dump."""
    notes = json.loads((folder / "case.json").read_text())
    results = {name: load_file(folder / f"{name}.safetensors") for name in notes["engines"]}
    inputs = load_file(folder / "inputs.safetensors")
    return Dump(Case(**_tuples(notes["case"])), inputs, results, notes["faults"], notes["versions"])


def _tuples(value: Any) -> Any:
    """JSON knows lists only; shapes and windows are tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
