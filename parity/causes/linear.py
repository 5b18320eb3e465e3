"""Products with a matrix: a missing bias, a transposed matrix, inputs in another order; sums of two values."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from parity.causes import Departure
from parity.causes.stage import Change, Form, bias_of, first_input, weight_of
from parity.trace import Array


def product(x: Array, weight: Array, bias: Array | None) -> Array:
    """x @ weight.T + bias, with weight [out, in] as PyTorch has it."""
    result = x @ weight.T
    return result if bias is None else np.asarray(result + bias)


def forms(departure: Departure) -> Iterator[Form]:
    """The linear layer, its matrix as PyTorch has it or transposed."""
    x, weight = first_input(departure), weight_of(departure)
    if x is None or weight is None or weight.ndim != 2:
        return
    bias = bias_of(departure)
    for matrix in (weight, weight.T):
        if matrix.shape[1] != x.shape[-1]:
            continue

        def changes(target: Array, matrix: Array = matrix) -> Iterable[Change]:
            if bias is not None:
                yield Change("missing-bias", "adds no bias", "adds one", "the bias", {"bias": None})
                yield Change("bias-twice", "adds the bias twice", "once", "the bias once", {"bias": 2 * bias})
            if matrix.shape[0] == matrix.shape[1]:
                write = "the matrix transposed"
                yield Change(
                    "kernel-transposed",
                    "multiplies by the transposed matrix",
                    "does not",
                    write,
                    {"weight": matrix.T},
                )
            source = departure.reference.inputs[0] if departure.reference.inputs else ""
            for order, words in _orders(departure, x.shape[-1]):
                does = f"flattens its input in the order {words}"
                yield Change(
                    "flatten-order",
                    does,
                    "(channel, row, column)",
                    f"a transpose before {source} is flattened",
                    {"x": x[..., order]},
                )

        yield Form(product, {"x": x, "weight": matrix, "bias": bias}, changes)


def _orders(departure: Departure, length: int) -> Iterator[tuple[Array, str]]:
    """Orders in which a map of channels, rows and columns can be flattened; its sides are tried."""
    index = np.arange(length)
    for channels in range(2, length // 2 + 1):
        pixels = length // channels
        if channels * pixels != length:
            continue
        yield index.reshape(channels, pixels).T.reshape(-1), "(row, column, channel)"
        yield index.reshape(pixels, channels).T.reshape(-1), "(row, column, channel)"


def sums(departure: Departure) -> Iterator[Form]:
    """The sum of two values: a shortcut."""
    arrays = [array for array in departure.inputs.values() if array.shape == departure.output.shape]
    if len(arrays) != 2:
        return

    def compute(a: Array, b: Array) -> Array:
        return np.asarray(a + b)

    def changes(target: Array) -> Iterable[Change]:
        zero = np.zeros_like(arrays[0])
        for key, name in zip(("a", "b"), departure.inputs, strict=False):
            yield Change(
                "missing-shortcut", f"does not add {name}", "adds it", f"the sum with {name}", {key: zero}
            )
        for (key, array), (name, _) in zip(
            {"a": arrays[0], "b": arrays[1]}.items(), departure.inputs.items(), strict=False
        ):
            does = f"applies ReLU to {name} before the sum"
            yield Change(
                "norm-activation-order", does, "does not", "the sum first", {key: np.maximum(array, 0)}
            )

    yield Form(compute, {"a": arrays[0], "b": arrays[1]}, changes)


def permutations(departure: Departure) -> Iterator[Form]:
    """Reshapes and transposes: the same numbers in another order."""
    x = first_input(departure)
    if x is None or x.size != departure.output.size:
        return
    shape = departure.output.shape
    for axes in itertools.permutations(range(x.ndim)):

        def compute(axes: tuple[int, ...]) -> Array:
            return x.transpose(axes).reshape(shape)

        if not np.array_equal(compute(axes), departure.output):
            continue

        def changes(target: Array, axes: tuple[int, ...] = axes) -> Iterable[Change]:
            for other in itertools.permutations(range(x.ndim)):
                if other != axes:
                    does = f"orders the axes of {next(iter(departure.inputs))} as {other}"
                    yield Change(
                        "flatten-order", does, f"{axes}", f"a transpose to {axes} first", {"axes": other}
                    )

        yield Form(compute, {"axes": axes}, changes)
        return
