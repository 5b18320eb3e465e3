"""Gradients that depart although the forward pass agrees: parts that do not pass, wrong derivatives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parity.causes import Departure, activation, recurrent
from parity.causes.stage import Form, first_input
from parity.trace import Array

Found = tuple[str, Array, str]


def derivatives(departure: Departure, form: Form | None) -> Iterator[Found]:
    """Wrong backward passes: id, the gradient that they give, and the rest of the sentence."""
    name = departure.result_name
    truth, dy, x = departure.result, departure.gradient, first_input(departure)
    yield "stop-gradient", np.zeros_like(truth), f"lets no gradient pass to {name}: remove the stop_gradient"
    theirs = departure.candidate_result
    if theirs.shape == truth.shape and (theirs == 0).any():
        does = f"lets the gradient to {name} pass at some places only: "
        id_ = "wrong-custom-derivative" if has_custom_derivative(departure) else "stop-gradient"
        does += (
            "correct its custom derivative"
            if has_custom_derivative(departure)
            else "remove the stop_gradient"
        )
        yield id_, np.where(theirs == 0, 0, truth), does
    if departure.what == "parameter gradient" and theirs.shape == truth.shape and truth.ndim == 2:
        yield from _padding_row(name, truth, theirs)
    if dy is None or departure.what != "input gradient":
        return
    if form is not None and "axes" in form.knobs and "eps" in form.knobs:
        for id_, array, does in _constant_statistics(form, form.view(dy)):
            if has_custom_derivative(departure):
                id_, does = "wrong-custom-derivative", f"{does}; correct the custom derivative"
            yield id_, array, does
    if form is not None and "layers" in form.knobs:
        for state, array in recurrent.stopped_gradients(form, dy):
            does = f"lets no gradient pass through the {state} from step to step: remove the stop_gradient"
            yield "stop-gradient", array, does
    if dy.shape == truth.shape:
        if activation.name_of(departure) is not None:
            does = "passes the gradient on unchanged (straight-through), the reference does not"
            yield "wrong-custom-derivative", dy, does
        else:
            does = (
                f"passes only the direct part of the gradient to {name}: remove the stop_gradient elsewhere"
            )
            yield "stop-gradient", dy, does
        for other in departure.inputs.values():
            if (
                np.broadcast_shapes(other.shape, dy.shape) == dy.shape
                and "mul" in departure.reference.operation
            ):
                does = f"passes to {name} only what this product gives: remove the stop_gradient elsewhere"
                yield "stop-gradient", dy * other, does
        if (
            x is not None
            and x.shape == dy.shape
            and activation.name_of(departure) == "relu"
            and (x == 0).any()
        ):
            does = "lets the gradient pass where the input is 0, the reference does not"
            yield "wrong-custom-derivative", dy * (x >= 0), does


def _padding_row(name: str, truth: Array, theirs: Array) -> Iterator[Found]:
    """One row of a table without a gradient: `padding_idx` of PyTorch's embedding."""
    for does, zero, other in (
        (
            "gives row {row} of {name} a gradient, the reference gives it none (padding_idx={row})",
            truth,
            theirs,
        ),
        ("gives row {row} of {name} no gradient (padding), the reference gives it one", theirs, truth),
    ):
        rows = np.flatnonzero((zero == 0).all(1) & (other != 0).any(1))
        if len(rows) == 1:
            result = truth.copy()
            result[rows] = theirs[rows]
            yield "padding-row", result, does.format(row=rows[0], name=name)


def has_custom_derivative(departure: Departure) -> bool:
    """True if the candidate's stage holds a function whose derivative the user wrote."""
    return any("custom_derivative" in value.attributes for value in (departure.candidate, *departure.segment))


def _constant_statistics(form: Form, dy: Array) -> Iterator[Found]:
    """Mean, variance or both taken for constants in the backward pass of a normalization."""
    x, weight, groups = form.knobs["x"], form.knobs["weight"], form.knobs.get("groups")
    axes = form.knobs["axes"]
    if form.knobs.get("fixed") is not None or dy.shape != x.shape:
        return
    g = dy if weight is None else dy * weight
    shape = x.shape if groups is None else (len(x), groups, -1, *x.shape[2:])
    g, y = g.reshape(shape), x.reshape(shape)
    centered = y - y.mean(axes, keepdims=True)
    inverse = 1 / np.sqrt(y.var(axes, keepdims=True) + form.knobs["eps"])
    of_mean = -g.mean(axes, keepdims=True)
    of_var = -centered * inverse**2 * (g * centered).mean(axes, keepdims=True)
    parts = {"mean and variance": g, "the variance": g + of_mean, "the mean": g + of_var}
    for words, part in parts.items():
        pronoun = "them" if "and" in words else "it"
        does = f"takes {words} for constants in the backward pass: differentiate through {pronoun}"
        yield "batch-statistics-constant", (part * inverse).reshape(x.shape), does
