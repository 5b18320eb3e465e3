"""Captured tensors in a file, so that two models can be compared on two machines.

parity.save("reference.safetensors", parity.torch_model(module), x)                         # with PyTorch
parity.compare(parity.saved_model("reference.safetensors"), parity.nnx_model(port), x)      # with JAX
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from parity.trace import Array, Inputs, Model, ParityError, Trace, Value, random_cotangents

_FORMAT = "parity 1"
_TABLES = (
    "outputs",
    "inputs",
    "input_gradients",
    "parameters",
    "parameter_gradients",
    "state",
    "state_before",
)


class SavedModel(Model):
    """Two runs of a model, its float64 twin and its own precision, read from a file.

    It serves as the reference. Its own noise is then that of the whole run, not of each stage alone.
    """

    def __init__(self, framework: str, precision: str, seed: int, twin: Trace, native: Trace) -> None:
        self.framework = framework
        self._precision, self._seed, self._twin, self._native = precision, seed, twin, native

    def precision(self) -> str:
        """See `Model`."""
        return self._precision

    def run(
        self,
        inputs: Inputs,
        *,
        float64: bool = False,
        cotangents: Mapping[str, Array] | None = None,
        replace: Mapping[str, Array] | None = None,
        replace_gradients: Mapping[str, Array] | None = None,
    ) -> Trace:
        """Return the saved run. See `Model`."""
        if cotangents is not None:
            ours = random_cotangents(self._twin, self._seed)
            if any(not np.array_equal(ours[name], array) for name, array in cotangents.items()):
                raise ParityError(f"the saved gradients are of seed {self._seed}: give seed={self._seed}")
        return self._twin if float64 else self._native


def save(path: str | Path, model: Model, inputs: Inputs, *, seed: int = 0) -> None:
    """Run a model and write all that `compare` needs of a reference to a safetensors file.

    Args:
        path: of the file; one that exists is replaced.
        model: the reference.
        inputs: as for `compare`.
        seed: the one to give to `compare`.
    """
    plain = model.run(inputs, float64=True)
    cotangents = random_cotangents(plain, seed) if model.records else None
    runs = {"twin": model.run(inputs, float64=True, cotangents=cotangents)}
    runs["native"] = model.run(inputs, cotangents=cotangents)
    arrays: dict[str, Array] = {}
    about: dict[str, Any] = {"framework": model.framework, "precision": model.precision(), "seed": seed}
    for key, trace in runs.items():
        for table in _TABLES:
            arrays |= {f"{key}/{table}/{name}": array for name, array in getattr(trace, table).items()}
        for value in trace.values:
            arrays[f"{key}/value/{value.name}"] = value.value
            if value.gradient is not None:
                arrays[f"{key}/gradient/{value.name}"] = value.gradient
        rows = [dataclasses.asdict(dataclasses.replace(v, value=None, gradient=None)) for v in trace.values]  # type: ignore[arg-type]
        names = {table: list(getattr(trace, table)) for table in _TABLES}
        about[key] = {"values": rows, "names": names, "output_values": dict(trace.output_values)}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, path, metadata={"format": _FORMAT, "about": json.dumps(about)})


def saved_model(path: str | Path) -> Model:
    """A reference that was written by `save`. Its framework need not be installed.

    Raises:
        ParityError: the file cannot be read, or is not one of `save`'s.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != _FORMAT:
            raise ParityError(f"{path} was not written by parity.save; its metadata lacks format {_FORMAT!r}")
        about = json.loads(metadata["about"])
        traces = [_trace(key, about[key], arrays) for key in ("twin", "native")]
        return SavedModel(about["framework"], about["precision"], about["seed"], *traces)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ParityError(f"{path} cannot be read: {error}") from error


def _trace(key: str, about: Mapping[str, Any], arrays: Mapping[str, Array]) -> Trace:
    values = []
    for row in about["values"]:
        fields = {**row, "inputs": tuple(row["inputs"]), "parameters": tuple(row["parameters"])}
        fields["value"] = arrays[f"{key}/value/{row['name']}"]
        fields["gradient"] = arrays.get(f"{key}/gradient/{row['name']}")
        fields["attributes"] = {name: _tuples(item) for name, item in row["attributes"].items()}
        values.append(Value(**fields))
    tables = {
        table: {name: arrays[f"{key}/{table}/{name}"] for name in about["names"][table]} for table in _TABLES
    }
    return Trace(values=values, output_values=about["output_values"], **tables)


def _tuples(item: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(_tuples, item)) if isinstance(item, list) else item
