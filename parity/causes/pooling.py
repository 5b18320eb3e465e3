"""Pooling and reductions: padding, what an average counts, mean against sum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from parity.causes import Departure
from parity.causes.stage import (
    Change,
    Form,
    Padding,
    attribute,
    first_input,
    pad,
    padding_changes,
    paddings,
    per_axis,
    windows,
)
from parity.trace import Array


def pool(
    x: Array,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    extra: Sequence[int],
    counted: str = "all",
    pad_value: float = -np.inf,
) -> Array:
    """Maximum or mean of windows over the last axes.

    Args:
        kind: "max", "avg" or "sum".
        extra: further elements after the padding, for ceil mode; an average never counts them.
        counted: "all" (padding too) or "inside": what an average divides by.
        pad_value: what a maximum sees in the padding.
    """
    wide = tuple((a, b + e) for (a, b), e in zip(padding, extra, strict=True))
    rank = tuple(range(-len(kernel), 0))
    if kind == "max":
        return windows(pad(x, wide, pad_value), kernel, stride, dilation).max(axis=rank)  # type: ignore[no-any-return]
    sums = windows(pad(x, wide), kernel, stride, dilation).sum(axis=rank)
    if kind == "sum":
        return sums  # type: ignore[no-any-return]
    ones = np.ones(x.shape[-len(kernel) :])
    ones = pad(pad(ones, padding, float(counted == "all")), tuple((0, e) for e in extra))
    return sums / windows(ones, kernel, stride, dilation).sum(axis=rank)  # type: ignore[no-any-return]


def forms(departure: Departure) -> Iterator[Form]:
    """The pooling with channels before or after the pixels."""
    x, name = first_input(departure), departure.reference.operation.lower()
    if x is None:
        return
    kind = "max" if "max" in name else "sum" if "sum" in name else "avg"
    kernel = attribute(departure, "kernel_size", "window_shape", "window_dimensions")
    if kernel is None or "adaptive" in name:
        yield from _adaptive(departure, x, kind)
        return
    if "window_dimensions" in departure.reference.attributes:
        yield _form(departure, x, kind, tuple(kernel), lambda y: y)
        return
    for channels in (1, -1):
        moved = np.moveaxis(x, channels, 1)
        yield _form(
            departure, moved, kind, per_axis(kernel, x.ndim - 2), lambda y, c=channels: np.moveaxis(y, c, 1)
        )


def _form(departure: Departure, x: Array, kind: str, kernel: tuple[int, ...], view: Any) -> Form:
    rank = len(kernel)
    stride = attribute(departure, "stride", "strides", "window_strides", default=()) or kernel
    stride = per_axis(stride, rank)
    dilation = per_axis(attribute(departure, "dilation", "window_dilation", default=1), rank)
    sides = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = x.shape[-rank:]
    padding = paddings(attribute(departure, "padding", default=0), sizes, sides, stride)
    ceil = []
    for n, k, s, (a, b) in zip(sizes, sides, stride, padding, strict=True):
        count = -(-(n + a + b - k) // s) + 1
        count -= (count - 1) * s >= n + a  # the last window starts inside
        ceil.append(max((count - 1) * s + k - n - a - b, 0))
    extra = ceil if attribute(departure, "ceil_mode", default=False) else [0] * rank
    counted = "all" if attribute(departure, "count_include_pad", default=True) else "inside"
    knobs = {"x": x, "kind": kind, "kernel": kernel, "stride": stride, "padding": padding}
    knobs |= {"dilation": dilation, "extra": extra, "counted": counted}

    def changes(target: Array) -> Iterable[Change]:
        if kind == "avg":
            other, words = (
                ("inside", ("does not count", "does"))
                if counted == "all"
                else ("all", ("counts", "does not"))
            )
            write = f"count_include_pad={counted == 'all'}"
            yield Change(
                "count-include-pad",
                f"{words[0]} the padding in the mean",
                words[1],
                write,
                {"counted": other},
            )
        if any(ceil):
            words = ("floor mode", "ceil mode") if any(extra) else ("ceil mode", "floor mode")
            rest = [0] * rank if any(extra) else ceil
            write = f"the last, partial window {'too' if any(extra) else 'left out'}"
            yield Change("ceil-mode", f"uses {words[0]}", words[1], write, {"extra": rest})
        spatial = [axis for axis in range(rank) if kernel[axis] > 1]
        for change in padding_changes(
            departure,
            tuple(padding[a] for a in spatial),
            [sizes[a] for a in spatial],
            [sides[a] for a in spatial],
            [stride[a] for a in spatial],
        ):
            every = list(padding)
            for axis, pair in zip(spatial, change.knobs["padding"], strict=True):
                every[axis] = pair
            for rest, word in (([0] * rank, change), (extra, change)):
                yield Change(
                    word.id, word.does, word.reference, word.write, {"padding": tuple(every), "extra": rest}
                )
        if kind == "max":
            yield Change(
                "pool-padding-value",
                "pads the maximum with 0",
                "with -inf",
                "a padding of -inf",
                {"pad_value": 0.0},
            )
        for other in {"max", "avg", "sum"} - {kind}:
            yield Change("pool-kind", f"pools by {other}", f"by {kind}", f"{kind} pooling", {"kind": other})
        for step in range(1, 4):
            yield Change(
                "dilation",
                f"dilates the window by {step}",
                f"by {dilation[0]}",
                f"a dilation of {dilation}",
                {"dilation": (step,) * rank},
            )

    return Form(pool, knobs, changes, view, per_example=True)


def reduce(
    x: Array, kind: str, axes: tuple[int, ...], shape: tuple[int, ...], divisor: float | None = None
) -> Array:
    """Mean, sum or maximum over some axes, in a given shape."""
    if kind == "avg":
        return (x.sum(axes) / (divisor or math.prod(x.shape[axis] for axis in axes))).reshape(shape)  # type: ignore[no-any-return]
    return getattr(x, kind)(axes).reshape(shape)  # type: ignore[no-any-return]


def _adaptive(departure: Departure, x: Array, kind: str) -> Iterator[Form]:
    """Reductions, global pooling among them: axes are those that the shapes leave possible."""
    shape = departure.output.shape
    given = attribute(departure, "dim", "axis", "axes")
    every = [axes for count in range(1, x.ndim + 1) for axes in itertools.combinations(range(x.ndim), count)]
    if given is not None:
        every = [tuple(axis % x.ndim for axis in per_axis(given, 1))]
    every = [
        axes for axes in every if x.size // math.prod(x.shape[axis] for axis in axes) == departure.output.size
    ]
    for axes in every:

        def changes(target: Array, axes: tuple[int, ...] = axes) -> Iterable[Change]:
            for other in {"max", "avg", "sum"} - {kind}:
                does, write = f"takes the {_WORDS[other]}", f"the {_WORDS[kind]}"
                yield Change(
                    "pool-kind" if {kind, other} == {"avg", "max"} else "mean-or-sum",
                    does,
                    write,
                    write,
                    {"kind": other},
                )
            for count in range(1, x.ndim + 1):
                for tried in itertools.combinations(range(x.ndim), count):
                    if tried != axes:
                        yield Change(
                            "reduction-axes",
                            f"reduces axes {tried}",
                            f"axes {axes}",
                            f"axes {axes}",
                            {"axes": tried},
                        )

        yield Form(reduce, {"x": x, "kind": kind, "axes": axes, "shape": shape}, changes)


_WORDS = {"avg": "mean", "sum": "sum", "max": "maximum"}
