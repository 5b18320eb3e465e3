"""`find_cause`: try every hypothesis about a stage and return the one that gives the candidate's numbers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from parity.causes import (
    Cause,
    Departure,
    activation,
    attention,
    convolution,
    gradients,
    linear,
    normalization,
    pooling,
    precision,
    recurrent,
    resizing,
    statistics,
)
from parity.causes.stage import Change, Form, distance, number
from parity.trace import Array

_PAIRS = 3000  # so many pairs of changes are tried
_FORMS: tuple[tuple[str, Callable[[Departure], Iterator[Form]]], ...] = (
    (r".*conv.*", convolution.forms),
    (r".*norm", normalization.forms),
    (r".*pool|reduce_window.*|mean|sum|amax|reduce_(sum|max|mean)", pooling.forms),
    (r"(log_?)?softmax", activation.softmax_forms),
    (r"linear|dense|matmul|bmm|mm|addmm|dot_general|einsum", linear.forms),
    (r"flatten|reshape|view|unflatten|ravel", linear.reshape_forms),
    (r"permute|transpose|swapaxes|movedim|moveaxis|t", linear.transpose_forms),
    (r"cat|concat|concatenate", linear.concatenate_forms),
    (r"scaled_dot_product_attention|dot_product_attention", attention.forms),
    (r"masked_fill|where|select_n", attention.mask_forms),
    (r"interpolate|upsample.*|resize", resizing.forms),
    (r"pixel_?shuffle", resizing.shuffle_forms),
    (r".*(lstm|gru|rnn).*", recurrent.forms),
)


def find_cause(departure: Departure) -> Cause | None:
    """Name the change of the reference's operation that gives the candidate's result, or None.

    A change of the operation is tried only if the operation, as it is written here, gives the reference's
    own result. One change is preferred to two, a change of the operation to a mere factor.

    Examples:
        >>> find_cause(departure).sentence
        'port.py:41 pads 0 before and 1 after (SAME), the reference 1 and 1: write padding=((1, 1), (1, 1))'
    """
    if departure.what == "statistics":
        return _first_fit(departure, statistics.updates(departure)) or _general(departure)
    form = known_form(departure)
    if departure.what == "output":
        found = None if form is None else _search(departure, form)
        return found or _general(departure)
    found = _first_fit(departure, gradients.derivatives(departure, form)) or _general(departure)
    custom = activation.name_of(departure) is not None or gradients.has_custom_derivative(departure)
    if found is None and departure.what == "input gradient" and custom:
        words = (
            f"has a derivative that is not that of {departure.reference.operation}: correct its custom rule"
        )
        error = distance(departure.result, departure.candidate_result)
        return Cause("wrong-custom-derivative", f"{_place(departure)} {words}", error)
    return found


def find_precision(departure: Departure, native: Array) -> Cause | None:
    """Name the precision to which a stage rounds, where the float64 twins agree.

    Args:
        departure: of the twins.
        native: the candidate's output in its own precision, made from the reference's inputs, in the axis
            order of the reference.
    """
    return precision.rounded_to(departure, native, known_form(departure))


def tolerance(departure: Departure) -> float:
    """How near a variant must be: the noise, or float32 constants where the departure is far larger."""
    error = distance(departure.candidate_result, departure.result)
    return max(10 * departure.noise, 1e-9, min(3e-7, 1e-3 * error))


def kind_of(operation: str) -> str:
    """The name of an operation without dimensions: "conv" for "Conv2d", "conv2d" and "conv"."""
    return re.sub(r"_?\d+d(_|$)", "", operation.lower().strip("_")).removesuffix("_layer")


def known_form(departure: Departure) -> Form | None:
    """The operation in NumPy, in the layout in which it gives the reference's own output."""
    operation = departure.reference.operation
    makers = [make for pattern, make in _FORMS if re.fullmatch(pattern, kind_of(operation))]
    if activation.name_of(departure) is not None:
        makers.insert(0, activation.forms)
    if linear.is_binary(operation):
        makers.append(linear.binary_forms)
    limit = max(10 * departure.noise, 1e-7)
    for make in makers:
        for form in make(departure):
            if distance(form.result(), form.view(departure.output)) <= limit:
                return form
    return None


def _place(departure: Departure) -> str:
    return departure.candidate.where or departure.candidate.name


def _search(departure: Departure, form: Form) -> Cause | None:
    """The best single change, else the best pair of changes of different knobs."""
    limit = tolerance(departure)
    for target in _targets(departure, form):
        if distance(form.result(), target) <= limit:
            return None
        singles = [*form.changes(target), *_of_inputs(departure, form)]
        found = _best(departure, form, target, limit, [(change,) for change in singles])
        found = found or _best(departure, form, target, limit, _pairs(singles))
        if found is not None:
            return found
    return None


def _targets(departure: Departure, form: Form) -> Iterator[Array]:
    """The candidate's output in the form's layout; of another shape, in each layout that it may have."""
    theirs = departure.candidate_output
    if theirs.shape == departure.output.shape:
        yield form.view(theirs)
    elif theirs.ndim == departure.output.ndim and theirs.ndim > 2:
        yield from (theirs, np.moveaxis(theirs, -1, 1))


def _pairs(changes: Sequence[Change]) -> Iterator[tuple[Change, Change]]:
    pairs = itertools.combinations(changes, 2)
    apart = (pair for pair in pairs if not set(pair[0].knobs) & set(pair[1].knobs))
    yield from itertools.islice(apart, _PAIRS)


def _best(
    departure: Departure, form: Form, target: Array, limit: float, variants: Iterable[tuple[Change, ...]]
) -> Cause | None:
    """The variant with the smallest error within the limit; of errors far within it the first."""
    best: tuple[float, tuple[Change, ...]] | None = None
    for changes in variants:
        knobs = {knob: value for change in changes for knob, value in change.knobs.items()}
        error = _error(form, knobs, target, limit)
        if error <= limit and (best is None or error < best[0]):
            best = error, changes
            if error <= limit / 10:
                break
    if best is None:
        return None
    parts = [f"{change.does}, the reference {change.reference}: write {change.write}" for change in best[1]]
    place = best[1][0].place
    lines = (value.where for value in departure.segment if value.where) if place else ()
    where = next(iter(lines), _place(departure))
    return Cause(best[1][0].id, f"{where} {'; and it '.join(parts)}", best[0], place)


def _error(form: Form, knobs: dict[str, object], target: Array, limit: float) -> float:
    """The distance of a variant; infinite if the first example alone rules it out."""
    x = knobs.get("x", form.knobs.get("x"))
    if form.per_example and isinstance(x, np.ndarray) and len(x) > 1 and len(x) == len(target):
        first = form.result({**knobs, "x": x[:1]})
        if first.shape != target[:1].shape:
            return np.inf
        with np.errstate(all="ignore"):
            if np.abs(first - target[:1]).max() > 1.01 * limit * np.abs(target).max():
                return np.inf
    return distance(form.result(knobs), target)


def _of_inputs(departure: Departure, form: Form) -> Iterator[Change]:
    """Changes of what any operation reads: its bias, its input."""
    bias = form.knobs.get("bias")
    if bias is not None:
        yield Change("missing-bias", "adds no bias", "does", "the bias too", {"bias": None})
        yield Change("bias-twice", "adds the bias twice", "once", "it once", {"bias": 2 * bias})
        yield Change("bias-sign", "subtracts the bias", "adds it", "+ bias", {"bias": -bias})
    x = form.knobs.get("x")
    if x is None or "function" in form.knobs:
        return
    for name in ("relu", "gelu", "gelu-tanh", "silu", "tanh", "sigmoid", "relu6", "leaky_relu", "elu"):
        does, knobs = f"applies {name} before this operation", {"x": activation.apply(x, name)}
        yield linear.extra_activation(departure, name, does, x, knobs)
    if x.ndim > 1:
        does, write = "reads the channels in reverse order", "the channels in their order (RGB, not BGR)"
        yield Change("channels-reversed", does, "does not", write, {"x": np.flip(x, 1)})
    for axis in range(2, x.ndim):
        does, write = f"reads axis {axis} of its input backwards", "the input as it is"
        yield Change("input-flipped", does, "does not", write, {"x": np.flip(x, axis)})
    if x.ndim > 2 and x.shape[-1] == x.shape[-2]:
        does, write = "exchanges the last two axes of its input", "the axes in their order"
        yield Change("input-axes", does, "does not", write, {"x": x.swapaxes(-1, -2)})


def _general(departure: Departure) -> Cause | None:
    """Try simple functions of the reference's result, whatever the operation."""
    if departure.result.shape != departure.candidate_result.shape:
        return None
    return _first_fit(departure, _functions_of_result(departure))


def _first_fit(departure: Departure, results: Iterable[tuple[str, Array, str]]) -> Cause | None:
    """The first of (id, result, rest of the sentence) that is the candidate's result."""
    limit, theirs = tolerance(departure), departure.candidate_result
    if distance(departure.result, theirs) <= limit / 10:
        return None
    for id_, result, words in results:
        error = distance(result, theirs)
        if error <= limit:
            return Cause(id_, f"{_place(departure)} {words}", error)
    return None


def _functions_of_result(departure: Departure) -> Iterator[tuple[str, Array, str]]:
    truth, theirs = departure.result, departure.candidate_result
    if not (np.isfinite(truth).all() and np.isfinite(theirs).all()):
        return
    yield "zero", np.zeros_like(truth), "gives 0, the reference does not"
    gradient = departure.what.endswith("gradient")
    if departure.what == "output":
        yield from _without_and_more(departure, truth)
    square = float(np.vdot(truth, truth))
    factor = _simple(float(np.vdot(truth, theirs)) / square) if square else 0.0
    if factor:
        id_ = "wrong-custom-derivative" if departure.what == "input gradient" else "constant-factor"
        divides = departure.reference.operation.lower() in ("div", "mul", "true_divide")
        id_ = "attention-scale" if divides and departure.what == "output" else id_
        what = "a gradient that is " if gradient else ""
        yield (
            id_,
            factor * truth,
            f"gives {what}{number(factor)} times the reference's{_meaning(factor, departure)}",
        )
    if gradient:
        return
    offset = float(np.median(theirs - truth))
    yield "offset", truth + offset, f"gives the reference's plus {number(offset)} everywhere"
    for axis in range(truth.ndim):
        order = _order_along(truth, theirs, axis)
        if order is not None:
            words = f"has another order along axis {axis}: its index 1 is the reference's {order[1]}"
            flipped = (order == np.arange(len(order))[::-1]).all()
            yield (
                "output-flipped" if flipped else "groups" if axis == 1 and truth.ndim > 3 else "order",
                truth.take(order, axis),
                words,
            )
    for axes in itertools.permutations(range(truth.ndim)) if truth.ndim <= 5 else ():
        if tuple(truth.shape[axis] for axis in axes) == truth.shape:
            yield (
                "output-axes",
                truth.transpose(axes),
                f"gives the reference's with its axes in the order {axes}",
            )


def _order_along(truth: Array, theirs: Array, axis: int) -> Array | None:
    """The order in which the candidate has the slices along an axis, by their norms; None if the same."""
    if truth.shape[axis] < 2:
        return None
    ours, found = (
        np.square(np.moveaxis(a, axis, 0)).reshape(a.shape[axis], -1).sum(1) for a in (truth, theirs)
    )
    order = np.empty(len(ours), int)
    order[np.argsort(found)] = np.argsort(ours)
    return None if (order == np.arange(len(order))).all() else order


def _without_and_more(departure: Departure, truth: Array) -> Iterator[tuple[str, Array, str]]:
    """The operation left out, or another one after it."""
    for name, x in departure.inputs.items():
        if x.shape == truth.shape:
            words = f"gives {name} as it is, the reference applies {departure.reference.operation}"
            yield "operation-missing", x, words
            yield "residual-added", truth + x, f"adds {name} to the result, the reference does not here"
    for name, function in activation.FUNCTIONS.items():
        if name not in ("identity", "exp", "erf", "square"):
            with np.errstate(all="ignore"):
                result = function(truth)
            yield "activation", result, f"applies {name} to the result, the reference does not here"


def _simple(value: float) -> float:
    """The same number with few digits, or the inverse of an integer, where it is one to 1e-9."""
    inverse = 1 / round(1 / value) if 1e-9 < abs(value) <= 1 else value
    for other in (float(f"{value:.3g}"), inverse):
        if abs(other - value) <= 1e-9 * abs(value):
            return other
    return value


def _meaning(factor: float, departure: Departure) -> str:
    """Explain a factor by sizes of arrays."""
    for array in (*departure.inputs.values(), departure.output):
        if not array.ndim:
            continue
        sizes = {"batch": len(array), "last axis": array.shape[-1], "whole array": array.size}
        for (name, size), power in itertools.product(sizes.items(), (1.0, 0.5)):
            words = f"the {'root of the ' if power < 1 else ''}size of the {name}"
            if size > 1 and abs(factor * size**power - 1) < 1e-9:
                return f" (1 / {number(size**power)}, {words})"
            if size > 1 and abs(factor / size**power - 1) < 1e-9:
                return f" ({words})"
    return ""
