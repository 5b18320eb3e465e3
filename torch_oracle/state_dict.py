"""A model as a state dict: {torchvision name: array}, in PyTorch's layout.

The same functions are in `jax_resnet/state_dict.py` and `numpy_ref/state_dict.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Array = npt.NDArray[Any]


class ParameterCount(NamedTuple):
    """Numbers of parameters; running statistics are not counted."""

    total: int
    trainable: int
    frozen: int


def parameter_count(model: nn.Module) -> ParameterCount:
    """Count a model's parameters; those with `requires_grad` False are frozen."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ParameterCount(total, trainable, total - trainable)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state dict, without PyTorch's count of batches: no result depends on it."""
    return {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


def state_dict(model: nn.Module) -> dict[str, Array]:
    """Copies of a model's parameters and running statistics, by name, in torchvision's layout and order."""
    return {name: tensor.cpu().numpy().copy() for name, tensor in _tensors(model).items()}


def load_state_dict(model: nn.Module, mapping: Mapping[str, Array]) -> None:
    """Load a state dict in place, keeping the model's dtypes; nothing is changed unless everything fits.

    Args:
        model: the model to load into.
        mapping: arrays by torchvision's names. `linear.*` is read as `fc.*`, as many CIFAR checkpoints have
            it; `num_batches_tracked` is ignored.

    Raises:
        ValueError: names are missing or unexpected, or shapes do not match; it lists them all.
    """
    expected = _tensors(model)
    given: dict[str, Array] = {}
    for name, array in mapping.items():
        alias = "fc." + name.removeprefix("linear.") if name.startswith("linear.") else name
        if not name.endswith("num_batches_tracked"):
            given[name if alias in mapping else alias] = array
    mismatches = [
        f"{name} {np.shape(given[name])} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and np.shape(given[name]) != tuple(tensor.shape)
    ]
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    faults = {"missing": missing, "unexpected": unexpected, "shape mismatch": mismatches}
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"the state dict does not fit the model; {listed}")
    with torch.no_grad():
        for name, tensor in expected.items():
            # float64 holds every float format exactly, bfloat16 too, which torch does not take from NumPy
            tensor.copy_(torch.from_numpy(np.array(given[name], dtype=np.float64)))
