"""Convolutions: padding, dilation, the orientation of the kernel, the order of channels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from parity.causes import Departure
from parity.causes.stage import (
    Change,
    Form,
    Padding,
    attribute,
    bias_of,
    first_input,
    pad,
    padding_changes,
    paddings,
    per_axis,
    weight_of,
    windows,
)
from parity.counterparts import family
from parity.trace import Array

_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def convolve(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int = 1,
    input_dilation: Sequence[int] = (1,),
    mode: str = "constant",
) -> Array:
    """Cross-correlation.

    Args:
        x: [N, C, *spatial].
        weight: [O, C / groups, *kernel].
        bias: [O] or None.
        mode: of `numpy.pad`.

    Returns:
        [N, O, *out].
    """
    rank = x.ndim - 2
    if max(input_dilation) > 1:
        sides = [(n - 1) * d + 1 for n, d in zip(x.shape[2:], input_dilation, strict=True)]
        spread = np.zeros((*x.shape[:2], *sides))
        places: tuple[Any, ...] = (..., *(slice(None, None, d) for d in input_dilation))
        spread[places] = x
        x = spread
    x = pad(x, padding, mode=mode)
    kernel = weight.shape[2:]
    matrices = weight.reshape(groups, weight.shape[0] // groups, -1)
    outs = []
    for example in x:
        patches = windows(example, kernel, stride, dilation)  # [C, *out, *kernel]
        out = patches.shape[1 : 1 + rank]
        patches = patches.reshape(groups, -1, *patches.shape[1:])
        patches = np.moveaxis(patches, range(2, 2 + rank), range(-rank, 0)).reshape(
            groups, matrices.shape[2], -1
        )
        outs.append((matrices @ patches).reshape(weight.shape[0], *out))
    result = np.stack(outs)
    return result if bias is None else result + bias.reshape(-1, *[1] * rank)


def forms(departure: Departure) -> Iterator[Form]:
    """The convolution in each layout that its shapes allow."""
    x, weight = first_input(departure), weight_of(departure)
    if x is None or weight is None or x.ndim < 3 or weight.ndim != x.ndim:
        return
    transposed = "transpose" in departure.reference.operation.lower()
    last, first = (0, x.ndim - 1, *range(1, x.ndim - 1)), tuple(range(x.ndim))
    kernels = [first, (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2))]
    layouts = [(axes, kernel, axes) for axes in (first, last) for kernel in kernels]
    if numbers := attribute(departure, "dimension_numbers"):
        layouts = [tuple(tuple(map(int, spec)) for spec in numbers)]  # type: ignore[list-item]
    for x_axes, kernel_axes, out_axes in layouts:
        form = _form(departure, x.transpose(x_axes), weight.transpose(kernel_axes), out_axes, transposed)
        if form is not None:
            yield form


def _form(
    departure: Departure, x: Array, weight: Array, out_axes: tuple[int, ...], transposed: bool
) -> Form | None:
    rank = x.ndim - 2
    groups = int(attribute(departure, "groups", "feature_group_count", default=1))
    stride = per_axis(attribute(departure, "stride", "strides", "window_strides", default=1), rank)
    dilation = per_axis(attribute(departure, "dilation", "kernel_dilation", "rhs_dilation", default=1), rank)
    spread = per_axis(attribute(departure, "input_dilation", "lhs_dilation", default=1), rank)
    sides = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    sizes = [(n - 1) * d + 1 for n, d in zip(x.shape[2:], spread, strict=True)]
    padding = paddings(attribute(departure, "padding", default=0), sizes, sides, stride)
    if transposed:
        # The gradient of a convolution: the input is spread, the kernel turned, its channels exchanged.
        extra = per_axis(attribute(departure, "output_padding", default=0), rank)
        parts = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
        weight = np.flip(parts.reshape(-1, *parts.shape[2:]), tuple(range(2, rank + 2)))
        spread, stride = stride, (1,) * rank
        padding = tuple(
            (k - 1 - a, k - 1 - b + e) for k, (a, b), e in zip(sides, padding, extra, strict=True)
        )
    if weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups:
        return None
    knobs = {
        "x": x,
        "weight": weight,
        "bias": bias_of(departure),
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "input_dilation": spread,
        "mode": _MODES.get(attribute(departure, "padding_mode", default="zeros"), "constant"),
    }
    sizes = [(n - 1) * d + 1 for n, d in zip(x.shape[2:], spread, strict=True)]

    def changes(target: Array) -> Iterable[Change]:
        for change in padding_changes(departure, padding, sizes, sides, stride):
            yield replace(change, id="output-padding") if transposed else change
        yield from _paddings_of_other_kinds(knobs["mode"])  # type: ignore[arg-type]
        yield from _strides(stride)
        yield from _dilations(weight, padding, dilation)
        if stride == weight.shape[2:] and not any(map(any, padding)) and groups == 1:
            yield from _patches(departure, weight)
        yield from _kernels(weight, groups)
        yield from _channels(x, weight, groups)

    return Form(convolve, knobs, changes, lambda y: y.transpose(out_axes), per_example=True)


def _paddings_of_other_kinds(mode: str) -> Iterator[Change]:
    words = {"constant": "zeros", **{v: k for k, v in _MODES.items()}}
    for other, word in words.items():
        if other != mode:
            write = f"padding of the kind {words[mode]!r}"
            yield Change(
                "padding-mode", f"pads with the kind {word!r}", f"{words[mode]!r}", write, {"mode": other}
            )


def _strides(stride: tuple[int, ...]) -> Iterator[Change]:
    for other in range(1, 5):
        if any(s != other for s in stride):
            write = f"a stride of {stride}"
            yield Change(
                "stride-placement",
                f"has stride {other}",
                f"{stride[0]}",
                write,
                {"stride": (other,) * len(stride)},
            )


def _dilations(weight: Array, padding: Padding, dilation: tuple[int, ...]) -> Iterator[Change]:
    for other in range(1, 5):
        if all(d == other for d in dilation):
            continue
        more = [(other - d) * (k - 1) for k, d in zip(weight.shape[2:], dilation, strict=True)]
        wider = tuple((a + m // 2, b + m - m // 2) for (a, b), m in zip(padding, more, strict=True))
        knobs = {"dilation": (other,) * len(dilation), "padding": wider}
        yield Change(
            "dilation",
            f"dilates the kernel by {other}",
            f"by {dilation[0]}",
            f"a dilation of {dilation}",
            knobs,
        )


def _patches(departure: Departure, weight: Array) -> Iterator[Change]:
    """Patches and a product in place of the convolution: both flattened, each in an order of its own."""
    if any(family(value.operation) == "convolution" for value in departure.segment):
        return
    names = np.array(["channels", *(f"pixels along axis {axis}" for axis in range(1, weight.ndim - 1))])
    orders = list(itertools.permutations(range(1, weight.ndim)))
    seen = [weight]
    for kernel, patch in itertools.product(orders, orders):
        rows = weight.transpose(0, *kernel).reshape(len(weight), *(weight.shape[axis] for axis in patch))
        array = rows.transpose(0, *(1 + np.argsort(patch)))
        if any(np.array_equal(array, other) for other in seen):
            continue
        seen.append(array)
        words = [", ".join(names[np.array(order) - 1]) for order in (patch, kernel)]
        does = f"flattens patches in the order ({words[0]}) where the kernel has ({words[1]})"
        write = "a transposition of the patches before the reshape"
        yield Change("flatten-order", does, "has one order for both", write, {"weight": array})


def _kernels(weight: Array, groups: int) -> Iterator[Change]:
    spatial = tuple(range(2, weight.ndim))
    turned = np.flip(weight, spatial)
    uses = "as it is"
    if max(weight.shape[2:]) > 1:
        write = "a cross-correlation, kernel not flipped"
        yield Change(
            "kernel-flipped", "flips the kernel (a true convolution)", "does not", write, {"weight": turned}
        )
    swapped = weight.swapaxes(-1, -2) if weight.ndim == 4 else weight
    if weight.ndim == 4 and weight.shape[2] == weight.shape[3] > 1:
        does, write = "exchanges height and width of the kernel", "the kernel with height before width"
        yield Change("kernel-transposed", does, f"uses it {uses}", write, {"weight": swapped})
        does = "exchanges height and width of the kernel and flips it"
        yield Change(
            "kernel-transposed", does, f"uses it {uses}", write, {"weight": np.flip(swapped, spatial)}
        )
    if groups == 1 and weight.shape[0] == weight.shape[1]:
        exchanged = weight.swapaxes(0, 1)
        write = "the kernel with its two channel axes exchanged"
        for array, also in (
            (exchanged, ""),
            (np.flip(exchanged, spatial), " and flips it"),
            (exchanged.swapaxes(-1, -2), " and height and width"),
        ):
            does = f"exchanges input and output channels of the kernel{also}"
            yield Change("kernel-transposed", does, f"uses it {uses}", write, {"weight": array})


def _channels(x: Array, weight: Array, groups: int) -> Iterator[Change]:
    """Channels in another order, before or after a convolution in groups."""
    if groups == 1:
        return
    for array, name, axis in ((x, "x", 1), (weight, "weight", 0)):
        side = array.shape[axis]
        for parts in dict.fromkeys((groups, side // groups)):
            if 1 < parts < side:
                order = np.arange(side).reshape(parts, -1).T.reshape(-1)
                word = "input" if name == "x" else "output"
                does = f"has the {word} channels of the groups interleaved"
                write = "the channels of one group side by side"
                yield Change(
                    "groups",
                    does,
                    "has them side by side",
                    write,
                    {name: array.take(order, axis)},
                )
    if weight.shape[0] % (groups + 1):
        rolled = weight.reshape(groups, -1, *weight.shape[1:])[::-1].reshape(weight.shape)
        yield Change(
            "groups",
            "takes the groups in reverse order",
            "in order",
            "the groups in order",
            {"weight": rolled},
        )
