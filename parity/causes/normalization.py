"""Normalization: which statistics, over which axes, which epsilon, what is applied afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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

EPSILONS = np.geomspace(1e-12, 10, 27).tolist()


@dataclass(frozen=True)
class Statistics:
    """Fixed mean and variance, in a shape that fits x."""

    mean: Array
    var: Array


def normalize(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    axes: tuple[int, ...],
    groups: int | None = None,
    fixed: Statistics | None = None,
    ddof: int = 0,
    centered: bool = True,
    outside: bool = False,
    plus_one: bool = False,
    interleaved: bool = False,
) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias.

    Args:
        x: channels in axis 1 for groups.
        weight, bias: in a shape that fits x.
        axes: over which mean and variance are taken; of [N, groups, C / groups, ...] with groups.
        fixed: running statistics, in place of those of x.
        ddof: 1 for the unbiased variance.
        centered: False for the root mean square alone.
        outside: divide by sqrt(var) + eps.
        plus_one: multiply by weight + 1.
        interleaved: group g has channels g, g + groups, ...
    """
    y = x
    if groups is not None:
        if interleaved:
            y = y.reshape(len(x), -1, groups, *x.shape[2:]).swapaxes(1, 2)
        else:
            y = y.reshape(len(x), groups, -1, *x.shape[2:])
    if fixed is not None:
        mean, var = fixed.mean, fixed.var
    else:
        mean = y.mean(axes, keepdims=True) if centered else np.zeros(())
        var = np.square(y - mean).sum(axes, keepdims=True)
        var = var / (y.size / var.size - ddof)
    y = (y - mean) / (np.sqrt(var) + eps if outside else np.sqrt(var + eps))
    y = (y.swapaxes(1, 2) if interleaved else y).reshape(x.shape)
    if weight is not None:
        y = y * (weight + plus_one)
    return np.asarray(y if bias is None else y + bias)


def rounded(form: Form, rounding: Callable[[Array], Array]) -> Statistics:
    """The statistics of a form without groups, their variance made in a lower precision."""
    x, axes = form.knobs["x"], form.knobs["axes"]
    mean = x.mean(axes, keepdims=True)
    squares = rounding(np.square(rounding(x - mean)))
    return Statistics(mean, rounding(squares.mean(axes, keepdims=True)))


def forms(departure: Departure) -> Iterator[Form]:
    """The normalization in each layout."""
    x, name = first_input(departure), departure.reference.operation.lower().replace("_", "")
    if x is None or x.ndim < 2:
        return
    weight, bias = weight_of(departure), bias_of(departure)
    if weight is bias:
        weight = None
    eps = attribute(departure, "eps", "epsilon")
    if "batch" in name or "group" in name or "instance" in name:
        for channels in dict.fromkeys((1, x.ndim - 1)):
            moved = np.moveaxis(x, channels, 1)
            view = lambda y, c=channels: np.moveaxis(y, c, 1)  # noqa: E731
            if "batch" in name:
                yield _form(departure, moved, weight, bias, 1e-5 if eps is None else eps, None, view)
                continue
            groups = attribute(departure, "num_groups", default=32) if "group" in name else moved.shape[1]
            if moved.shape[1] % groups == 0:
                for value in (1e-5, 1e-6) if eps is None else (eps,):
                    yield _form(departure, moved, weight, bias, value, groups, view)
        return
    centered = "rms" not in name
    shape = attribute(departure, "normalized_shape", default=(x.shape[-1],))
    axes = tuple(range(x.ndim - (1 if isinstance(shape, int) else len(shape)), x.ndim))
    for value in (1e-5, 1e-6, np.finfo(np.float32).eps, np.finfo(np.float64).eps) if eps is None else (eps,):
        yield _layer_form(departure, x, weight, bias, float(value), axes, centered)


def _form(
    departure: Departure,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    groups: int | None,
    view: object,
) -> Form:
    """Batch norm, or group norm with groups; x has its channels in axis 1."""

    def across(array: Array | None) -> Array | None:
        return None if array is None else array.reshape(-1, *[1] * (x.ndim - 2))

    axes = (0, *range(2, x.ndim)) if groups is None else tuple(range(2, x.ndim + 1))
    mean, var = (
        across(named(departure.state, "running_mean", "mean")),
        across(named(departure.state, "running_var", "var")),
    )
    running = Statistics(mean, var) if mean is not None and var is not None else None
    train = bool(attribute(departure, "training", default=departure.train)) if groups is None else True
    knobs: dict[str, Any] = {
        "x": x,
        "weight": across(weight),
        "bias": across(bias),
        "eps": float(eps),
        "axes": axes,
        "groups": groups,
    }
    knobs["fixed"] = None if train else running

    def changes(target: Array) -> Iterable[Change]:
        if groups is None:
            yield from _batch_or_running(train, running)
            if train and running is not None:
                yield from _updated(form, running, target)
        else:
            yield from _groups(x, groups)
        yield from _common(departure, form, target, train)
        names = {
            (0, *range(2, x.ndim)): "the batch (batch norm)",
            tuple(range(2, x.ndim)): "each image and channel (instance norm)",
        }
        names |= {
            tuple(range(1, x.ndim)): "each image (layer norm)",
            (1,): "the channels of each pixel",
            (0,): "the batch alone",
        }
        for other, word in names.items():
            if other and (groups is not None or other != axes):
                own = "the batch" if groups is None else "each group of channels"
                knobs = {"axes": other, "groups": None, "fixed": None}
                yield Change(
                    "layer-norm-axes",
                    f"takes the statistics over {word}",
                    f"over {own}",
                    f"statistics over {own}",
                    knobs,
                )

    form = Form(normalize, knobs, changes, view)  # type: ignore[arg-type]
    return form


def _batch_or_running(train: bool, running: Statistics | None) -> Iterator[Change]:
    if not train:
        does, write = (
            "normalizes with the statistics of the batch",
            "the running ones (eval mode, use_running_average=True)",
        )
        yield Change("batch-statistics-vs-running", does, "with the running ones", write, {"fixed": None})
    elif running is not None:
        does, write = (
            "normalizes with the running statistics",
            "those of the batch (train mode, use_running_average=False)",
        )
        yield Change(
            "batch-statistics-vs-running", does, "with those of the batch", write, {"fixed": running}
        )
    if running is not None and not train:
        swapped = Statistics(running.var, running.mean)
        yield Change(
            "statistics-swapped",
            "has running mean and variance exchanged",
            "does not",
            "each in its place",
            {"fixed": swapped},
        )
        squared = Statistics(running.mean, running.var**2)
        does = "takes the running variance for a standard deviation"
        yield Change("variance-as-deviation", does, "does not", "sqrt(var + eps)", {"fixed": squared})
        fresh = Statistics(np.zeros_like(running.mean), np.ones_like(running.var))
        does = "normalizes with mean 0 and variance 1 (statistics not loaded)"
        yield Change(
            "weight-not-loaded",
            does,
            "with its running statistics",
            "the loaded statistics",
            {"fixed": fresh},
        )


def _updated(form: Form, running: Statistics, target: Array) -> Iterator[Change]:
    """Train mode with the running statistics after the step, a part old and a part of the batch."""
    x, axes = form.knobs["x"], form.knobs["axes"]
    batch = Statistics(x.mean(axes, keepdims=True)[0], x.var(axes, keepdims=True)[0])

    def mixed(old: float) -> Statistics:
        return Statistics(
            old * running.mean + (1 - old) * batch.mean, old * running.var + (1 - old) * batch.var
        )

    old = solve(lambda share: form.result({"fixed": mixed(share)}), target, (0.01, 0.1, 0.5, 0.9, 0.99))
    if old is not None and 0 < old < 1:
        does = f"normalizes with the running statistics after the step, {number(old)} of which are old"
        write = "the statistics of the batch alone"
        yield Change(
            "batch-statistics-vs-running", does, "with those of the batch", write, {"fixed": mixed(old)}
        )


def _groups(x: Array, groups: int) -> Iterator[Change]:
    channels = x.shape[1]
    for count in range(1, channels + 1):
        if channels % count == 0 and count != groups:
            does = f"has {count} groups ({channels // count} channels each)"
            yield Change("groups", does, f"{groups}", f"num_groups={groups}", {"groups": count})
    if 1 < groups < channels:
        does = f"takes every {groups}th channel for a group"
        yield Change(
            "groups",
            does,
            "neighboring channels",
            "groups of neighboring channels",
            {"interleaved": True},
        )
    only = tuple(range(2, 3))
    yield Change(
        "layer-norm-axes",
        "takes the statistics of each pixel alone",
        "over the pixels too",
        "all pixels",
        {"axes": only},
    )


def _layer_form(
    departure: Departure,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    axes: tuple[int, ...],
    centered: bool,
) -> Form:
    """Layer norm, or root-mean-square norm."""
    knobs = {"x": x, "weight": weight, "bias": bias, "eps": eps, "axes": axes, "centered": centered}

    def changes(target: Array) -> Iterable[Change]:
        yield from _common(departure, form, target, True)
        for count in range(1, x.ndim + 1):
            for other in itertools.combinations(range(x.ndim), count):
                if other != axes:
                    does, own = f"normalizes over axes {other}", f"axes {axes}"
                    yield Change(
                        "layer-norm-axes", does, f"over {own}", f"statistics over {own}", {"axes": other}
                    )

    form = Form(normalize, knobs, changes, per_example=min(axes) > 0)
    return form


def _common(departure: Departure, form: Form, target: Array, of_batch: bool) -> Iterator[Change]:
    eps, weight, bias = form.knobs["eps"], form.knobs["weight"], form.knobs["bias"]
    word = epsilon_word(departure)
    value = solve(lambda v: form.result({"eps": abs(v)}), target, EPSILONS)
    if value is not None and abs(value) != eps and abs(value) > 1e-9:
        yield Change(
            "epsilon",
            f"uses epsilon {number(abs(value))}",
            number(eps),
            f"{word}={number(eps)}",
            {"eps": abs(value)},
        )
    yield Change("epsilon", "uses no epsilon", number(eps), f"{word}={number(eps)}", {"eps": 0.0})
    yield Change(
        "epsilon-outside-root", "adds epsilon to the root", "under it", "sqrt(var + eps)", {"outside": True}
    )
    if of_batch:
        does = "divides by the unbiased standard deviation (n - 1)"
        yield Change(
            "unbiased-variance", does, "by the biased one (n)", "the variance without correction", {"ddof": 1}
        )
        centered = form.knobs.get("centered", True)
        words = ("subtracts the mean", "does not", "the root mean square alone")
        if centered:
            words = ("does not subtract the mean", "does", "(x - mean) / sqrt(var + eps)")
        yield Change("mean-subtraction", *words, {"centered": not centered})
    if weight is not None or bias is not None:
        write = "its scale and bias"
        yield Change(
            "affine-missing", "applies neither scale nor bias", "does", write, {"weight": None, "bias": None}
        )
    if weight is not None:
        yield Change("scale-missing", "does not apply the scale", "does", "use_scale=True", {"weight": None})
        yield Change(
            "scale-plus-one",
            "multiplies by 1 + scale",
            "by the scale",
            "the scale itself",
            {"plus_one": True},
        )
        if bias is not None and weight.shape == bias.shape:
            does = "has scale and bias exchanged"
            yield Change(
                "weights-swapped", does, "does not", "each in its place", {"weight": bias, "bias": weight}
            )
