"""A model as a state dict under torchvision's names; the same functions as `torch_oracle/state_dict.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from numpy_ref.layers import Array, Layer, Parameter


def to_torch_layout(array: Array) -> Array:
    """Return a copy in PyTorch's layout: kernels HWIO to OIHW, matrices [in, out] to [out, in]."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
    return np.array(array if axes is None else array.transpose(axes), order="C")


def from_torch_layout(array: Array) -> Array:
    """Return a copy in this engine's layout; the inverse of `to_torch_layout`."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return np.array(array if axes is None else array.transpose(axes), order="C")


def arrays(model: Layer) -> dict[str, Array]:
    """Parameters and running statistics by name, not copied, in this engine's layout."""
    return {name: v.value if isinstance(v, Parameter) else v for name, v in model.variables().items()}


def state_dict(model: Layer) -> dict[str, Array]:
    """Copies of parameters and running statistics under torchvision's names, in PyTorch's layout."""
    return {name: to_torch_layout(array) for name, array in arrays(model).items()}


def load_state_dict(model: Layer, mapping: Mapping[str, Array]) -> None:
    """Set every parameter and running statistic, in place; the inverse of `state_dict`.

    `linear.*` is read as `fc.*`, and `num_batches_tracked` is ignored. Raises ValueError that lists every
    name that is missing, unexpected or of another shape; nothing changes then.
    """
    expected, given = arrays(model), {}
    for name, array in mapping.items():
        alias = "fc." + name.removeprefix("linear.") if name.startswith("linear.") else name
        if not name.endswith("num_batches_tracked"):
            # With both in the file, it is not known which is meant: `linear.*` is unexpected.
            given[name if alias in mapping else alias] = np.asarray(array)
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in expected]
    for name in expected.keys() & given.keys():
        shape = to_torch_layout(expected[name]).shape
        if given[name].shape != shape:
            problems.append(f"{name} has shape {list(given[name].shape)}, not {list(shape)}")
    if problems:
        raise ValueError("the state dict does not fit: " + "; ".join(sorted(problems)))
    for name, array in expected.items():
        array[...] = from_torch_layout(given[name])


class ParameterCount(NamedTuple):
    """Numbers of parameters; running statistics are not counted."""

    total: int
    trainable: int
    frozen: int


def parameter_count(model: Layer) -> ParameterCount:
    """Count a model's parameters; those with `trainable` False are frozen."""
    total = sum(p.value.size for p in model.parameters())
    trainable = sum(p.value.size for p in model.parameters() if p.trainable)
    return ParameterCount(total, trainable, total - trainable)
