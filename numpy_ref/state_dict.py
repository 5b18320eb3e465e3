"""A model as a state dict under torchvision's names. The same functions stand in `torch_oracle/resnet.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from numpy_ref.layers import Array, Layer, Parameter


def to_torch_layout(array: Array) -> Array:
    """This engine's layout to PyTorch's: kernels HWIO to OIHW, matrices [in, out] to [out, in]; a copy."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
    return np.array(array if axes is None else array.transpose(axes), order="C")


def from_torch_layout(array: Array) -> Array:
    """The inverse of `to_torch_layout`."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return np.array(array if axes is None else array.transpose(axes), order="C")


def arrays(model: Layer) -> dict[str, Array]:
    """Parameters and running statistics as they lie in the model, not copied."""
    return {name: v.value if isinstance(v, Parameter) else v for name, v in model.variables().items()}


def state_dict(model: Layer) -> dict[str, Array]:
    """Parameters and batch statistics under torchvision's names, in PyTorch's layout."""
    return {name: to_torch_layout(array) for name, array in arrays(model).items()}


def load_state_dict(model: Layer, mapping: Mapping[str, Array]) -> None:
    """Set every parameter and batch statistic, in place; the inverse of `state_dict`.

    `linear.*` is read as `fc.*`, and `num_batches_tracked` is passed over. Raises ValueError that lists every
    missing, surplus and misshapen name, and then changes nothing.
    """
    own, given = arrays(model), {}
    for name, array in mapping.items():
        alias = "fc." + name.removeprefix("linear.") if name.startswith("linear.") else name
        if not name.endswith("num_batches_tracked"):
            # With both in the file, `linear.*` is surplus: which of the two is meant, nobody knows.
            given[name if alias in mapping else alias] = np.asarray(array)
    problems = [f"missing {name}" for name in own if name not in given]
    problems += [f"surplus {name}" for name in given if name not in own]
    for name in own.keys() & given.keys():
        wanted = to_torch_layout(own[name]).shape
        if given[name].shape != wanted:
            problems.append(f"{name} has shape {list(given[name].shape)}, not {list(wanted)}")
    if problems:
        raise ValueError("the state dict does not fit: " + "; ".join(sorted(problems)))
    for name, array in own.items():
        array[...] = from_torch_layout(given[name])


class ParameterCount(NamedTuple):
    """Numbers of parameters; batch statistics are none."""

    total: int
    trainable: int
    frozen: int


def parameter_count(model: Layer) -> ParameterCount:
    """Count a model's parameters; those with `trainable` False are frozen."""
    sizes = [(p.value.size, p.trainable) for p in model.parameters()]
    total, trainable = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    return ParameterCount(total, trainable, total - trainable)
