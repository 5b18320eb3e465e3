"""Batch, layer and group normalization: epsilon, variance, whose statistics, which axes, how many groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from parity.causes import Departure
from parity.causes.stage import (
    Change,
    Form,
    attribute,
    bias_of,
    epsilon_word,
    first_input,
    named,
    number,
    solve,
    weight_of,
)
from parity.trace import Array

_EPSILONS = (1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def normalize(
    x: Array,
    axes: tuple[int, ...],
    eps: float,
    weight: Array | None,
    bias: Array | None,
    channel: int,
    correction: int = 0,
    statistics: tuple[Array, Array] | None = None,
    groups: int = 1,
    interleaved: bool = False,
    relu: bool = False,
) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias.

    Args:
        x: any array.
        axes: over which mean and variance are taken.
        channel: the axis of weight and bias, if they are vectors.
        correction: 1 divides the squares by n - 1.
        statistics: mean and variance in place of those of `x`, along `channel`.
        groups: of channels, each with statistics of its own; `interleaved` deals the channels out in turns.
        relu: of the input, before all else.
    """
    x = np.maximum(x, 0) if relu else x
    if groups > 1:
        moved = np.moveaxis(x, channel, 1)
        parts = (moved.shape[1] // groups, groups) if interleaved else (groups, moved.shape[1] // groups)
        split = moved.reshape(moved.shape[0], *parts, *moved.shape[2:])
        over = tuple(axis for axis in range(1, split.ndim) if axis != (2 if interleaved else 1))
        mean, var = split.mean(over, keepdims=True), split.var(over, keepdims=True, ddof=correction)
        out = np.moveaxis(((split - mean) / np.sqrt(var + eps)).reshape(moved.shape), 1, channel)
    else:
        shape = [-1 if axis == channel % x.ndim else 1 for axis in range(x.ndim)]
        if statistics is None:
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True, ddof=correction)
        else:
            mean, var = (np.reshape(array, shape) for array in statistics)
        out = (x - mean) / np.sqrt(var + eps)
    for array, scales in ((weight, True), (bias, False)):
        if array is None:
            continue
        shape = [-1 if axis == channel % x.ndim else 1 for axis in range(x.ndim)]
        array = array if array.ndim > 1 else array.reshape(shape)
        out = out * array if scales else out + array
    return np.asarray(out)


def forms(departure: Departure) -> Iterator[Form]:
    """The normalization with channels in each place that its parameters allow."""
    x, name = first_input(departure), departure.reference.operation.lower()
    if x is None:
        return
    eps = float(attribute(departure, "eps", "epsilon", default=1e-5))
    weight, bias = weight_of(departure), bias_of(departure)
    if bias is weight:
        bias = None
    running = named(departure.state, "running_mean", "mean"), named(departure.state, "running_var", "var")
    kept = None if running[0] is None or running[1] is None else (running[0], running[1])
    layer = "layer" in name
    groups = int(attribute(departure, "num_groups", default=1)) if "group" in name else 1
    for channel in dict.fromkeys((1, x.ndim - 1)) if not layer else (x.ndim - 1,):
        if weight is not None and weight.ndim == 1 and weight.size != x.shape[channel]:
            continue
        every = tuple(axis for axis in range(x.ndim) if axis != channel)
        axes = every
        if layer:
            count = len(attribute(departure, "normalized_shape", default=(0,)))
            axes = tuple(range(x.ndim - count, x.ndim))
        elif "group" in name:
            axes = tuple(range(1, x.ndim))
        evaluates = "batch" in name and kept is not None and not departure.train
        knobs = {"x": x, "axes": axes, "eps": eps, "weight": weight, "bias": bias, "channel": channel}
        knobs |= {"statistics": kept if evaluates else None, "groups": groups}

        def changes(
            target: Array, knobs: dict[str, object] = knobs, every: tuple[int, ...] = every
        ) -> Iterable[Change]:
            word = epsilon_word(departure)

            def with_eps(value: float) -> Array:
                return normalize(**{**knobs, "eps": value})  # type: ignore[arg-type]

            value = solve(with_eps, target, _EPSILONS)
            if value is not None and value > 0:
                yield Change(
                    "epsilon",
                    f"uses epsilon {number(value)}",
                    number(eps),
                    f"{word}={number(eps)}",
                    {"eps": value},
                )
            if knobs["statistics"] is None:
                does, write = "divides by the unbiased variance (n - 1)", "the biased variance (n)"
                yield Change("unbiased-variance", does, write, write, {"correction": 1})
                if kept is not None:
                    does, write = "normalizes with the running statistics", "those of the batch"
                    yield Change(
                        "batch-statistics-vs-running", does, write, "train mode", {"statistics": kept}
                    )
            else:
                does, write = "normalizes with the statistics of the batch", "the running ones"
                yield Change("batch-statistics-vs-running", does, write, "eval mode", {"statistics": None})
            does, write = "applies the activation before the normalization", "after it"
            yield Change("norm-activation-order", does, write, "the normalization first", {"relu": True})
            for name in ("weight", "bias"):
                if knobs[name] is not None:
                    yield Change(
                        f"missing-{name}", f"leaves out the {name}", "has one", f"the {name}", {name: None}
                    )
            others = [tuple(range(k, x.ndim)) for k in range(x.ndim)] + [every, (1,), (x.ndim - 1,), (0,)]
            for tried in dict.fromkeys(others):
                if tried != knobs["axes"] or knobs["groups"] != 1:
                    does = f"takes mean and variance over axes {tried}"
                    identifier = "layer-norm-axes" if knobs["groups"] == 1 else "groups"
                    yield Change(
                        identifier,
                        does,
                        f"{knobs['axes']}",
                        f"axes {knobs['axes']}",
                        {"axes": tried, "groups": 1},
                    )
            if "group" in departure.reference.operation.lower():
                side = x.shape[int(knobs["channel"])]  # type: ignore[call-overload]
                for other in range(2, side + 1):
                    for interleaved in (False, True):
                        if side % other == 0 and (other != groups or interleaved):
                            does = f"has {other} groups" + (" of interleaved channels" if interleaved else "")
                            write = f"{groups} groups of neighboring channels"
                            yield Change(
                                "groups",
                                does,
                                str(groups),
                                write,
                                {"groups": other, "interleaved": interleaved},
                            )

        yield Form(normalize, knobs, changes)
