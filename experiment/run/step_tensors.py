"""The tensors of one training step, in the order in which a step computes them.

Arrays are those of `Engine.arrays`. A tensor's name is its path there, as "batch_stats/bn1.running_mean". The
loss and the norm of the gradient are "loss" and "grad_norm".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
BLOCK = 1 << 15  # numbers: so that what is computed from them in float64 stays in the cache

# Forward from the stem to the head; backward, which the moments show, from the head to the stem; the update.
BACKWARD = ("optimizer/trace/", "optimizer/mu/", "optimizer/nu/", "optimizer/nu_max/")
PHASES = ("batch_stats/", "loss", *BACKWARD, "grad_norm", "params/", "ema/")
_LAYERS = {
    "conv": 0,
    "bn": 1,
}  # within a block: conv1, bn1, conv2, ...; other names, such as downsample, last


def step_tensors(arrays: Arrays, loss: float, grad_norm: float) -> dict[str, Array]:
    """Return all tensors of a step by name, in the order of computation.

    Args:
        arrays: the state after the step.
        loss, grad_norm: as the engine reports them.
    """
    everything = {**arrays, "loss": np.asarray(loss), "grad_norm": np.asarray(grad_norm)}
    ordered = {}
    for phase in PHASES:
        names = [name for name in everything if name.startswith(phase)]
        for name in sorted(names, key=_variable_order, reverse=phase in BACKWARD):
            ordered[name] = everything[name]
    return ordered


def first_moment(arrays: Arrays) -> str:
    """Return the name of the moment that is linear in the gradient: "mu", or "trace" of sgd."""
    return "trace" if any(name.startswith("optimizer/trace/") for name in arrays) else "mu"


def _variable_order(name: str) -> tuple[Any, ...]:
    return network_order(name.rpartition("/")[2])


def network_order(variable: str) -> tuple[Any, ...]:
    """Return the sort key of a parameter or statistic that puts it where forward uses it.

    Examples:
        >>> sorted(["fc.bias", "layer1.10.bn1.bias", "layer1.9.conv2.bias", "bn1.bias"], key=network_order)
        ['bn1.bias', 'layer1.9.conv2.bias', 'layer1.10.bn1.bias', 'fc.bias']
    """
    *modules, _ = variable.split(".")
    first = modules[0] if modules else ""
    stage = 2 if first == "fc" else 1 if first.startswith("layer") else 0
    return stage, tuple(_module_order(module) for module in modules), variable


def _module_order(module: str) -> tuple[float, int]:
    match = re.fullmatch(r"([A-Za-z_]*)(\d*)", module)
    word, digits = (match[1], match[2]) if match else (module, "")
    return float(digits) if digits else np.inf, _LAYERS.get(word, 2)


def place(name: str) -> str:
    """Return in words where in a step a tensor is computed.

    Examples:
        >>> place("batch_stats/layer1.0.bn1.running_mean")
        'forward pass, layer1.0.bn1'
    """
    path, _, variable = name.rpartition("/")
    module = variable.rpartition(".")[0]
    if path == "batch_stats":
        return f"forward pass, {module}"
    if name == "loss":
        return "forward pass, the loss"
    if name == "logits":
        return "forward pass, the logits"
    if name == "grad_norm":
        return "backward pass"
    if path.startswith("optimizer"):
        return f"backward pass, {module}"
    return f"average of the weights, {module}" if path.startswith("ema") else f"update, {module}"


def checksums(arrays: Arrays) -> dict[str, int]:
    """Return a checksum of each array: the sum of its 8-byte words, modulo 2**64.

    Every single flipped bit changes it. It takes one pass at the speed of memory, in the order of memory.
    """
    return {name: _checksum(np.asarray(array)) for name, array in arrays.items()}


def _checksum(array: Array) -> int:
    data = array.ravel("K").view(np.uint8)
    whole = data.size - data.size % 8
    total = int(data[:whole].view(np.uint64).sum(dtype=np.uint64)) if whole else 0
    return (total + int.from_bytes(data[whole:].tobytes(), "little")) % 2**64


def blocks(size: int) -> Iterator[slice]:
    """Yield slices of `BLOCK` numbers, the last one of what is left."""
    for start in range(0, size, BLOCK):
        yield slice(start, start + BLOCK)


def in_blocks(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Yield the same block of each of these arrays of one shape, flat."""
    flat = [np.asarray(array).reshape(-1) for array in arrays]
    for block in blocks(flat[0].size):
        yield tuple(array[block] for array in flat)


def largest(array: Array) -> float:
    """Return the largest magnitude; 0 of an empty array."""
    return float(np.abs(array).max(initial=0.0))


def largest_difference(one: Array, other: Array) -> float:
    """Return the largest absolute difference; infinite where just one of the two is NaN or infinite."""
    parts = in_blocks(one, other)
    return max(
        (_largest_difference(a.astype(np.float64), b.astype(np.float64)) for a, b in parts), default=0.0
    )


def _largest_difference(a: Array, b: Array) -> float:
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b)
    if np.isfinite(total := float(difference.max())):
        return total
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return float(np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference)).max())
