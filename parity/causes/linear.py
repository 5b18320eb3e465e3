"""Products of matrices, sums of two values, and the order in which numbers are laid out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from parity.causes import Departure
from parity.causes.activation import FUNCTIONS, apply
from parity.causes.stage import Change, Form, attribute, bias_of, first_input, number, solve, weight_of
from parity.trace import Array


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """x [..., in] times the transpose of weight [out, in], plus bias [out]."""
    y = x @ weight.T
    return np.asarray(y if bias is None else y + bias)


def forms(departure: Departure) -> Iterator[Form]:
    """A product with a parameter, stored as [out, in] or [in, out]; else one of two values."""
    x, weight = first_input(departure), weight_of(departure)
    if x is None:
        return
    if weight is None or weight.ndim != 2:
        yield from _products(departure)
        return
    for array in (weight, weight.T):
        if array.shape[1] != x.shape[-1]:
            continue

        def changes(target: Array, array: Array = array) -> Iterable[Change]:
            if array.shape[0] == array.shape[1]:
                does, write = "multiplies by the kernel transposed", "the kernel, transposed once"
                yield Change("kernel-transposed", does, "does not", write, {"weight": array.T})
            yield from _features(x, "x", x.ndim - 1)

        yield Form(
            linear, {"x": x, "weight": array, "bias": bias_of(departure)}, changes, per_example=x.ndim > 1
        )


def _features(x: Array, knob: str, axis: int) -> Iterator[Change]:
    """The features as if they had been flattened in another order."""
    side = x.shape[axis]
    for channels in range(2, side):
        if side % channels == 0:
            order = np.arange(side).reshape(channels, -1).T.reshape(-1)
            words = f"(pixels, {channels}) features", f"({channels}, pixels)"
            does = f"reads {words[0]} where the kernel has"
            write = "x.transpose(0, 3, 1, 2) before the reshape, or the rows of the kernel in that order"
            yield Change("flatten-order", does, words[1], write, {knob: x.take(order, axis)})


def _products(departure: Departure) -> Iterator[Form]:
    """a @ b, or any contraction that its dimension numbers give."""
    arrays = [*departure.inputs.values(), *departure.parameters.values()]
    if len(arrays) == 1:
        arrays *= 2
    numbers = attribute(departure, "dimension_numbers")
    for a, b in itertools.permutations(arrays[:3], 2):

        def changes(target: Array, a: Array = a, b: Array = b) -> Iterable[Change]:
            for knob, array in (("x", a), ("other", b)):
                if array.ndim > 1 and array.shape[-1] == array.shape[-2]:
                    does = f"transposes the {'first' if knob == 'x' else 'second'} factor"
                    yield Change(
                        "factor-transposed", does, "does not", "it as it is", {knob: array.swapaxes(-1, -2)}
                    )
            yield Change(
                "factors-exchanged",
                "multiplies b @ a",
                "a @ b",
                "the factors in that order",
                {"x": b, "other": a},
            )

        yield Form(lambda x, other: contract(x, other, numbers), {"x": a, "other": b}, changes)


def contract(a: Array, b: Array, numbers: Sequence[Sequence[Sequence[int]]] | None) -> Array:
    """a @ b, or JAX's `dot_general` by its dimension numbers ((a, b) contracted, (a, b) of the batch)."""
    if numbers is None:
        return np.asarray(a @ b)
    (a_sum, b_sum), (a_batch, b_batch) = numbers
    names = iter(range(52))
    a_names = [next(names) for _ in range(a.ndim)]
    b_names = [next(names) for _ in range(b.ndim)]
    for i, j in (*zip(a_sum, b_sum, strict=True), *zip(a_batch, b_batch, strict=True)):
        b_names[j] = a_names[i]
    free = [n for i, n in enumerate(a_names) if i not in (*a_sum, *a_batch)]
    free += [n for j, n in enumerate(b_names) if j not in (*b_sum, *b_batch)]
    return np.asarray(
        np.einsum(a, a_names, b, b_names, [*(a_names[i] for i in a_batch), *free], optimize=True)
    )


def reshape_forms(departure: Departure) -> Iterator[Form]:
    """A reshape or flatten: other orders of the axes before it or after it."""
    x, shape = first_input(departure), departure.output.shape
    if x is None or x.size != math.prod(shape) or x.ndim > 6:
        return

    def changes(target: Array) -> Iterable[Change]:
        for axes in itertools.permutations(range(x.ndim)):
            if axes != tuple(range(x.ndim)):
                does = f"lays the axes out in the order {axes}"
                write = f"transpose with {tuple(np.argsort(axes).tolist())} before the reshape"
                yield Change("flatten-order", does, "as they are", write, {"x": x.transpose(axes)})
        for axes in itertools.permutations(range(len(shape))) if len(shape) < 7 else ():
            inner = tuple(shape[axis] for axis in axes)
            if axes != tuple(range(len(shape))):
                does = f"reshapes to {inner} and transposes"
                back = tuple(np.argsort(axes).tolist())
                knobs = {"inner": inner, "axes": back}
                yield Change("flatten-order", does, f"reshapes to {shape}", f"a reshape to {shape}", knobs)

    def compute(x: Array, inner: tuple[int, ...], axes: tuple[int, ...]) -> Array:
        return x.reshape(inner).transpose(axes)

    yield Form(compute, {"x": x, "inner": shape, "axes": tuple(range(len(shape)))}, changes)


def transpose_forms(departure: Departure) -> Iterator[Form]:
    """A permutation of axes, found from the output."""
    x, shape = first_input(departure), departure.output.shape
    if x is None or x.ndim > 6 or x.ndim != len(shape):
        return
    for axes in itertools.permutations(range(x.ndim)):
        if np.array_equal(x.transpose(axes), departure.output):

            def changes(target: Array, axes: tuple[int, ...] = axes) -> Iterable[Change]:
                for other in itertools.permutations(range(x.ndim)):
                    if other != axes:
                        yield Change(
                            "axis-order",
                            f"orders the axes {other}",
                            f"{axes}",
                            f"transpose{axes}",
                            {"axes": other},
                        )

            yield Form(lambda x, axes: x.transpose(axes), {"x": x, "axes": axes}, changes)
            return


def binary_forms(departure: Departure) -> Iterator[Form]:
    """a + b, a - b, a * b, a / b, the larger; with a parameter for b too."""
    arrays = [*departure.inputs.values(), *departure.parameters.values()]
    given = attribute(departure, "other", "value") if len(arrays) == 1 else None
    kind = _BINARY_NAMES[departure.reference.operation.lower().rstrip("_").removeprefix("i")]
    alpha = float(attribute(departure, "alpha", default=1.0))
    orders = [arrays]
    if len(arrays) == 1:
        orders = [[arrays[0], arrays[0] if given is None else np.full(arrays[0].shape, float(given))]]
        if given is None and kind == "add" and arrays[0].shape == departure.output.shape:
            orders.append([arrays[0], departure.output - arrays[0]])  # a constant of the code
    elif len(arrays) != 2:
        return
    elif arrays[1].ndim == 2 and departure.output.shape[-2:] != arrays[1].shape:
        yield from _table_forms(departure, *arrays)
        return
    orders += [arrays[::-1]] if kind in ("subtract", "divide") else []
    for x, other in orders:

        def changes(target: Array, x: Array = x, other: Array = other) -> Iterable[Change]:
            own = _BINARY_WORDS[kind]
            if kind == "add":
                yield from _other_positions(x, other, target)
            yield Change("missing-shortcut", "leaves the second value out", own, own, {"function": "first"})
            yield Change("missing-shortcut", "leaves the first value out", own, own, {"function": "second"})
            for function in ("relu", "gelu", "silu", "tanh", "sigmoid"):
                for knob, array in (("x", x), ("other", other)):
                    place = "first" if knob == "x" else "second"
                    does = f"applies {function} to the {place} value before it {own}"
                    knobs = {knob: apply(array, function)}
                    yield extra_activation(departure, function, does, array, knobs)
                yield Change(
                    "norm-activation-order",
                    f"applies {function} here",
                    "does not",
                    f"{function} elsewhere",
                    {"function": function},
                )
            for word in _BINARY_WORDS:
                if word != kind and given is None:  # of a number the factor says more
                    yield Change("operator", _BINARY_WORDS[word], own, own, {"function": word})
            for knob, word in (("alpha", "second"), ("scale", "first")):

                def scaled(value: float, knob: str = knob) -> Array:
                    return compute(x, other, kind, **{knob: value})

                value = solve(scaled, target, (-1.0, 0.1, 1.0, 4.0))
                if value is not None and given is not None and knob == "alpha":
                    names = " ".join(departure.inputs).lower()
                    id_ = "embedding-scale" if "embed" in names else "operand-scaled"
                    scores = any(word in names for word in ("matmul", "bmm", "einsum", "dot_general"))
                    verb = {"divide": "divides by", "multiply": "multiplies by"}.get(kind, f"{own} by")
                    yield Change(
                        "attention-scale" if scores else id_,
                        f"{verb} {number(float(given) * value)}",
                        f"by {number(float(given))}",
                        number(float(given)),
                        {knob: value},
                    )
                elif value is not None:
                    does = f"scales the {word} value by {number(value)}"
                    yield Change(
                        "operand-scaled", does, "does not", f"{own} without the factor", {knob: value}
                    )

        def compute(x: Array, other: Array, function: str, alpha: float = alpha, scale: float = 1.0) -> Array:
            x, other = x * scale, other * alpha
            if function in FUNCTIONS:
                return apply(_BINARY[kind](x, other), function)
            return np.asarray(_BINARY[function](x, other))

        yield Form(compute, {"x": x, "other": other, "function": kind}, changes)


def extra_activation(
    departure: Departure, function: str, does: str, operand: Array, knobs: dict[str, Array]
) -> Change:
    """An activation of an operand: exchanged with this operation if the reference has it after it.

    Else it is one too many, at the operand.
    """
    readers = departure.readers
    if readers is None or any(name.startswith(function) for name in readers):
        return Change("norm-activation-order", does, "does not", f"{function} after it", knobs)
    place = next((name for name, array in departure.inputs.items() if array is operand), "")
    return Change("activation", does, "does not", f"no {function} here", knobs, place)


def _other_positions(x: Array, other: Array, target: Array) -> Iterator[Change]:
    """Rows of a constant, along the axis before the last, that stand at other places: shifted positions."""
    if x.ndim < 2 or x.shape != target.shape:
        return
    rows = np.broadcast_to(other, x.shape)
    theirs = target - x
    scale = 3e-7 * np.abs(rows).max(initial=0)
    length = x.shape[-2]
    for shift in (sign * n for n in range(1, min(length // 2 + 1, 65)) for sign in (1, -1)):
        here, there = rows[..., max(shift, 0) :, :], theirs[..., max(-shift, 0) :, :]
        count = length - abs(shift)
        here, there = here[..., :count, :], there[..., :count, :]
        if np.ptp(here, -2).max(initial=0) > scale and np.abs(here - there).max(initial=0) <= scale:
            does = f"adds at position i what the reference adds at position i {'+' if shift > 0 else '-'} "
            words = f"{does}{abs(shift)}", "counts from 0", "positions that are counted from 0"
            yield Change("position-offset", *words, {"other": theirs})


def _table_forms(departure: Departure, x: Array, table: Array) -> Iterator[Form]:
    """x [..., length, width] plus the first rows of a table: learned positions."""
    length = departure.output.shape[-2] if departure.output.ndim > 1 else 0
    if not length or length > len(table) or x.shape != departure.output.shape:
        return

    def compute(x: Array, table: Array, first: int) -> Array:
        return np.asarray(x + table[first : first + length])

    def changes(target: Array) -> Iterable[Change]:
        for first in range(1, len(table) - length + 1):
            yield Change("position-offset", f"counts positions from {first}", "from 0", "0", {"first": first})

    yield Form(compute, {"x": x, "table": table, "first": 0}, changes)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "maximum": np.maximum,
    "first": lambda a, b: a + 0 * b,
    "second": lambda a, b: b + 0 * a,
}
_BINARY_WORDS = {
    "add": "adds",
    "subtract": "subtracts",
    "multiply": "multiplies",
    "divide": "divides",
    "maximum": "takes the larger",
}
_BINARY_NAMES = {name: name for name in _BINARY} | {
    "sub": "subtract",
    "mul": "multiply",
    "div": "divide",
    "true_divide": "divide",
}
_BINARY_NAMES |= {"max": "maximum", "add_any": "add"}


def is_binary(name: str) -> bool:
    """An operation that `binary_forms` knows."""
    return name.lower().rstrip("_").removeprefix("i") in _BINARY_NAMES


def concatenate_forms(departure: Departure) -> Iterator[Form]:
    """A concatenation: the parts in another order, or interleaved."""
    given = attribute(departure, "dim", "axis", "dimension", default=None)
    for axis in range(departure.output.ndim) if given is None else [int(given)]:
        arrays = _parts(list(departure.inputs.values()), departure.output, axis)

        def changes(target: Array, arrays: list[Array] = arrays) -> Iterable[Change]:
            for order in itertools.islice(itertools.permutations(range(len(arrays))), 1, 120):
                does, own = f"has the parts in the order {order}", tuple(range(len(arrays)))
                yield Change("concat-order", does, f"{own}", f"the order {own}", {"order": order})

        def compute(order: tuple[int, ...], axis: int = axis, arrays: list[Array] = arrays) -> Array:
            return np.concatenate([arrays[i] for i in order], axis)

        yield Form(compute, {"order": tuple(range(len(arrays)))}, changes)


def _parts(arrays: list[Array], output: Array, axis: int) -> list[Array]:
    """The parts of a concatenation in order; none if an input is not among them.

    What no input gives, such as a class token, is a part too.
    """
    whole = np.moveaxis(output, axis, 0)
    waiting = [np.moveaxis(array, axis, 0) for array in arrays if array.ndim == output.ndim]
    parts: list[Array] = []
    start = position = 0
    while position < len(whole):
        here = (k for k, a in enumerate(waiting) if np.array_equal(whole[position : position + len(a)], a))
        found = next(here, None)
        if found is None:
            position += 1
            continue
        parts += [whole[start:position]] if start < position else []
        parts.append(waiting.pop(found))
        start = position = position + len(parts[-1])
    parts += [whole[start:]] if start < len(whole) else []
    return [] if waiting else [np.moveaxis(part, 0, axis) for part in parts]
