"""A model as plain data: split for a jitted step, and as a state dict under torchvision's names.

The functions of the state dict are also in `numpy_ref/state_dict.py` and `torch_oracle/state_dict.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Parts(NamedTuple):
    """A model that was split: graphs that never change, and plain dicts {torchvision name: array}."""

    train: nnx.GraphDef[Any]
    eval: nnx.GraphDef[Any]
    params: dict[str, jax.Array]
    batch_stats: dict[str, jax.Array]


def split(model: nnx.Module) -> Parts:
    """Split a model, once, so that a jitted step handles plain dicts only; leaves it in train mode."""
    model.eval()
    eval_graph = nnx.graphdef(model)
    model.train()
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    return Parts(graphdef, eval_graph, _flat(params), _flat(batch_stats))


def apply(
    graphdef: nnx.GraphDef[Any],
    params: Mapping[str, jax.Array],
    batch_stats: Mapping[str, jax.Array],
    x: jax.Array,
    keep: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Images [N, H, W, C] to (logits [N, num_classes], the new batch statistics); pure.

    `keep`, where it is given, is the model's second argument; see `ResNet.__call__`.
    """
    variables: list[tuple[Any, nnx.Variable[Any]]] = [
        (_path(name), nnx.Param(value)) for name, value in params.items()
    ]
    variables += [(_path(name), nnx.BatchStat(value)) for name, value in batch_stats.items()]
    model = nnx.merge(graphdef, nnx.from_flat_state(variables))
    logits = model(x) if keep is None else model(x, keep)
    return logits, _flat(nnx.state(model, nnx.BatchStat))


def _flat(state: Any) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}
"""{dimensions: order of the axes}: kernels HWIO and OIHW, matrices [in, out] and [out, in]."""


def to_torch_layout(array: Any) -> np.ndarray:
    """Return a copy in PyTorch's layout: kernels HWIO to OIHW, matrices [in, out] to [out, in]."""
    array = np.asarray(array)
    axes = TO_TORCH.get(array.ndim)
    return np.array(array if axes is None else array.transpose(axes), order="C")


def from_torch_layout(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    axes = FROM_TORCH.get(array.ndim)
    return np.array(array if axes is None else array.transpose(axes), order="C")


def state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """Parameters and batch statistics under torchvision's names, in PyTorch's layout."""
    return {name: to_torch_layout(variable[...]) for name, variable in _variables(model).items()}


def load_state_dict(model: nnx.Module, mapping: Mapping[str, np.ndarray]) -> None:
    """Set every parameter and batch statistic, in place; the inverse of `state_dict`.

    `linear.*` is read as `fc.*`, and `num_batches_tracked` is ignored. Raises ValueError, which lists every
    missing and unexpected name and every shape mismatch, and then changes nothing.
    """
    variables = _variables(model)
    arrays = {}
    for name, array in mapping.items():
        alias = "fc." + name.removeprefix("linear.") if name.startswith("linear.") else name
        if not name.endswith("num_batches_tracked"):
            # With both in the file, `linear.*` is unexpected: it is unknown which of the two is meant.
            arrays[name if alias in mapping else alias] = np.asarray(array)
    problems = [f"missing {name}" for name in variables if name not in arrays]
    problems += [f"unexpected {name}" for name in arrays if name not in variables]
    for name in variables.keys() & arrays.keys():
        expected = to_torch_layout(np.empty(variables[name].shape)).shape
        if arrays[name].shape != expected:
            problems.append(f"{name} has shape {list(arrays[name].shape)}, not {list(expected)}")
    if problems:
        raise ValueError("the state dict does not fit: " + "; ".join(sorted(problems)))
    for name, variable in variables.items():
        variable[...] = jnp.asarray(from_torch_layout(arrays[name]), variable.dtype)


def _variables(model: nnx.Module, kind: Any = (nnx.Param, nnx.BatchStat)) -> dict[str, nnx.Variable[Any]]:
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {".".join(map(str, path)): variable for path, variable in flat}


class ParameterCount(NamedTuple):
    """Numbers of parameters; batch statistics are not counted."""

    total: int
    trainable: int
    frozen: int


def parameter_count(model: nnx.Module, frozen: Callable[[str], bool] = lambda name: False) -> ParameterCount:
    """Count a model's parameters; those whose name makes `frozen` True are not trained."""
    sizes = {name: variable.size for name, variable in _variables(model, nnx.Param).items()}
    total = sum(sizes.values())
    not_trained = sum(size for name, size in sizes.items() if frozen(name))
    return ParameterCount(total, total - not_trained, not_trained)
