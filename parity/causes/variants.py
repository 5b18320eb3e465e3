"""Variants of a value inside a stage: left out, of another operand, with an activation, with another knob."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from parity.causes import Departure, activation
from parity.causes.search import known_form
from parity.causes.stage import Form
from parity.trace import Array, Trace, Value

_OPERANDS = 24  # other values that are tried in the place of an operand
_SPLITS = ("chunk", "split", "unbind", "tensor_split", "split_with_sizes")
_EXTRA = ("relu", "gelu", "silu", "tanh", "sigmoid")


@dataclass(frozen=True)
class Variant:
    """What the candidate may have in the place of a value.

    Attributes:
        id: see `Cause`.
        array: in the reference's layout.
        sentence: what the candidate does and what to write, without the line.
        place: the value at which the models differ, where that is not the value itself.
    """

    id: str
    array: Array
    sentence: str
    place: str = ""


def variants(departure: Departure, trace: Trace) -> Iterator[Variant]:
    """Variants of `departure.reference`, a value of the reference's run `trace`, the likeliest first."""
    value = departure.reference
    by_name = {one.name: one for one in trace.values}
    yield from _left_out(departure, by_name)
    form = None if value.is_module and not departure.inputs else known_form(departure)
    if form is not None:
        for change in form.changes(form.view(departure.output)):
            array = _in_reference_layout(form, form.result(change.knobs), departure.output)
            if array is not None:
                sentence = f"{change.does}, the reference {change.reference}: write {change.write}"
                yield Variant(change.id, array, sentence)
        yield from _other_operands(departure, form, trace, by_name)
    for name in _EXTRA:
        with np.errstate(all="ignore"):
            array = activation.apply(departure.output, name)
        sentence = f"applies {name} to what is {value.name} in the reference: move or remove it"
        yield Variant("norm-activation-order", array, sentence)


def _in_reference_layout(form: Form, result: Array, output: Array) -> Array | None:
    """A result in the form's own layout, in that of the reference; None if its shape is another one."""
    order = form.view(np.arange(output.size).reshape(output.shape))
    if order.shape != result.shape:
        return None
    array = np.empty(output.size)
    array[order.reshape(-1)] = result.reshape(-1)
    return array.reshape(output.shape)


def _left_out(departure: Departure, by_name: Mapping[str, Value]) -> Iterator[Variant]:
    """The operation left out: one of its operands as it is."""
    value = departure.reference
    arrays = {**departure.inputs, **departure.parameters}
    for name, x in arrays.items():
        if x.shape == value.value.shape:
            id_ = _left_out_id(value, by_name)
            words = f"leaves out {value.name} ({value.operation}) and goes on with {name}: write it there"
            yield Variant(id_, x, words)


def _left_out_id(value: Value, by_name: Mapping[str, Value]) -> str:
    operation = value.operation.lower().strip("_")
    if operation in ("add", "iadd", "sub"):
        return "missing-shortcut"
    if operation in ("div", "true_divide", "mul", "imul"):
        embedded = any(
            "embedding" in by_name[name].operation.lower() for name in value.inputs if name in by_name
        )
        return "embedding-scale" if embedded else "attention-scale"
    if operation in activation.FUNCTIONS or operation in activation.ALIASES:
        return "activation"
    return "operation-missing"


def _other_operands(
    departure: Departure, form: Form, trace: Trace, by_name: Mapping[str, Value]
) -> Iterator[Variant]:
    """Another value of the run in the place of an operand."""
    value = departure.reference
    for knob in ("x", "other"):
        array = form.knobs.get(knob)
        if not isinstance(array, np.ndarray):
            continue
        own = next(
            (name for name, a in departure.inputs.items() if np.array_equal(form_view(form, a), array)), ""
        )
        for other in _candidates(value, own, trace):
            viewed = form_view(form, other.value)
            if viewed.shape != array.shape or np.array_equal(viewed, array):
                continue
            result = _in_reference_layout(form, form.result({knob: viewed}), departure.output)
            if result is None:
                continue
            words = f"reads {other.name} where the reference reads {own or 'another value'}"
            id_ = _operand_id(value, own, other.name, by_name)
            place = own if id_ == "gate-order" else ""
            yield Variant(id_, result, words, place)


def form_view(form: Form, array: Array) -> Array:
    """An operand in the form's layout; as it is if the view is not made for its shape."""
    try:
        return form.view(array)
    except ValueError:
        return array


def _candidates(value: Value, own: str, trace: Trace) -> list[Value]:
    """Values that were there before `value`, the nearest first."""
    names = [one.name for one in trace.values]
    end = names.index(value.name)
    shape = next((one.value.shape for one in trace.values if one.name == own), None)
    before = [one for one in trace.values[:end] if one.name != own]
    before = [one for one in before if shape is None or one.value.shape == shape]
    return before[::-1][:_OPERANDS]


def _operand_id(value: Value, own: str, other: str, by_name: Mapping[str, Value]) -> str:
    """Gates exchanged, a shortcut from another place, or another input."""
    if _split_before(own, by_name) & _split_before(other, by_name):
        return "gate-order"
    return "shortcut-source"


def _split_before(name: str, by_name: Mapping[str, Value], steps: int = 4) -> set[str]:
    """The modules or values whose split a value comes from, a few operations before it."""
    value = by_name.get(name)
    if value is None or steps == 0:
        return set()
    if value.operation in _SPLITS:
        return set(value.inputs)
    return set().union(*(_split_before(one, by_name, steps - 1) for one in value.inputs))
