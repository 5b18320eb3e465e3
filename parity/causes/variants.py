"""Variants of a value inside a stage: left out, of another operand, with an activation, with another knob."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity.causes import Departure, activation, attention
from parity.causes.search import known_form
from parity.causes.stage import Form
from parity.counterparts import family
from parity.trace import Array, Trace, Value

_OPERANDS = 24  # other values that are tried in the place of an operand
_SPLITS = ("chunk", "split", "unbind", "tensor_split", "split_with_sizes")
_EXTRA = ("relu", "gelu", "silu", "tanh", "sigmoid")


@dataclass(frozen=True)
class Variant:
    """A possible replacement of a value in the candidate.

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


def own_variants(departure: Departure, trace: Trace, target: Array | None) -> Iterator[Variant]:
    """Variants of `departure.reference`, a value of the reference's run `trace`, on what it reads.

    `target` is the candidate's, for the value in which the stage ends.
    """
    by_name = {one.name: one for one in trace.values}
    form = _form(departure)
    yield from _masked_softmax(departure, by_name, target)
    yield from _scaled_before_product(departure, trace, by_name)
    if form is not None:
        for change in form.changes(form.view(departure.output)):
            array = _in_reference_layout(form, form.result(change.knobs), departure.output)
            if array is not None:
                sentence = f"{change.does}, the reference {change.reference}: write {change.write}"
                yield Variant(change.id, array, sentence)


def _form(departure: Departure) -> Form | None:
    return None if departure.reference.is_module and not departure.inputs else known_form(departure)


def other_variants(departure: Departure, trace: Trace, target: Array | None) -> Iterator[Variant]:
    """The operation on other values of the run, and an activation after it; see `own_variants`."""
    value, form = departure.reference, _form(departure)
    if form is not None:
        yield from _other_operands(departure, form, trace, {one.name: one for one in trace.values})
    for name in _EXTRA:
        array = activation.apply(departure.output, name)
        sentence = f"applies {name} to what is {value.name} in the reference: move or remove it"
        yield Variant("norm-activation-order", array, sentence)


def exchanged_parameters(
    departures: Sequence[Departure],
) -> Iterator[tuple[dict[str, Array], Variant]]:
    """Two operations that exchanged a parameter: the replacements and the variant.

    Its place is the parameter of the first.
    """
    forms = [(departure, _form(departure)) for departure in departures if departure.parameters]
    for (one, first), (two, second) in itertools.combinations(forms, 2):
        if first is None or second is None:
            continue
        for knob in ("weight", "bias"):
            a, b = first.knobs.get(knob), second.knobs.get(knob)
            if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)) or a.shape != b.shape:
                continue
            arrays = (
                _in_reference_layout(first, first.result({knob: b}), one.output),
                _in_reference_layout(second, second.result({knob: a}), two.output),
            )
            names = [next((p for p in d.parameters if p.endswith(f".{knob}")), "") for d in (one, two)]
            if arrays[0] is not None and arrays[1] is not None and all(names) and not np.array_equal(a, b):
                words = f"reads {names[1]} for {names[0]} and the reverse: exchange them"
                replaced = {one.reference.name: arrays[0], two.reference.name: arrays[1]}
                yield replaced, Variant("weights-swapped", arrays[0], words, names[0])


def applied_before(moved: Departure, departure: Departure) -> Iterator[Variant]:
    """An operation that the reference has elsewhere, applied to what another one reads."""
    form, other = _form(departure), _form(moved)
    x = next(iter(departure.inputs.values()), None)
    if form is None or other is None or x is None or "x" not in form.knobs or x.shape != moved.output.shape:
        return
    result = _in_reference_layout(other, other.result({"x": _view(other, x)}), moved.output)
    array = None if result is None else form.result({"x": _view(form, result)})
    array = None if array is None else _in_reference_layout(form, array, departure.output)
    if array is not None:
        one, two = moved.reference.name, departure.reference.name
        id_ = "norm-activation-order" if family(moved.reference.operation) == "normalization" else "order"
        yield Variant(id_, array, f"applies {one} before {two}: write it where it belongs")


def exchanges(segment: Sequence[Value], trace: Trace) -> Iterator[tuple[dict[str, Array], Variant]]:
    """Two values that a segment has or reads, exchanged: the replacements and the variant.

    Ignore the variant's `array`: the rest of the segment must still be computed.
    """
    by_name = {value.name: value for value in trace.values}
    names = dict.fromkeys(name for value in segment for name in value.inputs if name in by_name)
    for a, b in itertools.combinations((by_name[name] for name in names), 2):
        if a.value.shape != b.value.shape or np.array_equal(a.value, b.value):
            continue
        complement = bool(np.isfinite(a.value).all()) and np.abs(a.value + b.value - 1).max() < 1e-9
        if not complement and (a.name in b.inputs or b.name in a.inputs):
            continue
        id_ = "update-gate-convention" if complement else _operand_id(a.name, b.name, by_name)
        both = next((value for value in segment if {a.name, b.name} <= set(value.inputs)), segment[-1])
        id_ = "concat-order" if "cat" in both.operation else id_
        words = f"exchanges {a.name} and {b.name}: write each in the other's place"
        yield {a.name: b.value, b.name: a.value}, Variant(id_, a.value, words, both.name)


def fused_orders(segment: Sequence[Value], trace: Trace) -> Iterator[tuple[dict[str, Array], Variant]]:
    """Queries, keys and values of one product, split in another order: the replacements and the variant.

    Its place is the first of the three.
    """
    by_name = {value.name: value for value in trace.values}
    inside = {value.name for value in segment}
    groups: dict[tuple[tuple[str, ...], tuple[int, ...]], list[Value]] = {}
    for value in trace.values:
        product = by_name.get(value.inputs[0]) if len(value.inputs) == 1 else None
        if (
            product is not None
            and family(product.operation) == "product"
            and family(value.operation) == "order"
        ):
            groups.setdefault((product.inputs, value.value.shape), []).append(value)
    for three in groups.values():
        products = [by_name[value.inputs[0]] for value in three]
        if len(three) != 3 or len({p.name for p in products}) != 3 or three[0].value.ndim < 4:
            continue
        if not inside & {value.name for value in three}:
            continue
        whole = np.concatenate([value.value for value in products], -1)
        *batch, count, size = three[0].value.shape
        if list(products[0].value.shape) != [*batch, count * size]:
            continue
        sides, names = (3, count, size), ("query, key, value", "head", "feature")
        for order in list(itertools.permutations(range(3)))[1:]:
            parts = whole.reshape(*batch, *(sides[axis] for axis in order))
            parts = np.moveaxis(parts, [len(batch) + order.index(axis) for axis in range(3)], [0, -2, -1])
            own = "; ".join(names)
            words = f"splits the product as ({'; '.join(names[axis] for axis in order)}): write ({own})"
            replaced = {value.name: part for value, part in zip(three, parts, strict=True)}
            yield replaced, Variant("flatten-order", parts[0], words, three[0].name)


def swapped(before: Departure, after: Departure) -> Iterator[Variant]:
    """The second of two operations first: norm(relu(x)) for relu(norm(x))."""
    first, second = known_form(before), known_form(after)
    if first is None or second is None or not {"x"} <= set(first.knobs) & set(second.knobs):
        return
    x = next(iter(before.inputs.values()))
    inner = second.result({"x": x}) if x.shape == after.output.shape else np.empty(0)
    if inner.shape != x.shape:
        return
    array = _in_reference_layout(first, first.result({"x": first.view(inner)}), after.output)
    if array is not None:
        one, two = before.reference.name, after.reference.name
        words = f"applies {two} before {one}, the reference after it: exchange the two"
        yield Variant("norm-activation-order", array, words)


def _in_reference_layout(form: Form, result: Array, output: Array) -> Array | None:
    """A result in the form's own layout, in that of the reference; None if its shape is another one."""
    order = form.view(np.arange(output.size).reshape(output.shape))
    if order.shape != result.shape:
        return None
    array = np.empty(output.size)
    array[order.reshape(-1)] = result.reshape(-1)
    return array.reshape(output.shape)


def left_out(value: Value, by_name: Mapping[str, Value], trace: Trace) -> Iterator[Variant]:
    """The operation left out: one of its operands as it is."""
    arrays = {**trace.inputs, **trace.parameters, **{name: one.value for name, one in by_name.items()}}
    for name in (*value.inputs, *value.parameters):
        if name in arrays and arrays[name].shape == value.value.shape:
            id_ = _left_out_id(value, by_name)
            words = f"leaves out {value.name} ({value.operation}) and goes on with {name}: write it there"
            yield Variant(id_, arrays[name], words)


def _left_out_id(value: Value, by_name: Mapping[str, Value]) -> str:
    operation = value.operation.lower().strip("_")
    if operation in ("add", "iadd", "sub"):
        return "missing-shortcut"
    if operation in ("div", "true_divide", "mul", "imul"):
        embedded = any(
            "embedding" in by_name[name].operation.lower() for name in value.inputs if name in by_name
        )
        scores = any(family(by_name[name].operation) == "product" for name in value.inputs if name in by_name)
        return "embedding-scale" if embedded else "attention-scale" if scores else "operand-scaled"
    if operation in activation.FUNCTIONS or operation in activation.ALIASES:
        return "activation"
    return "operation-missing"


def _masked_softmax(
    departure: Departure, by_name: Mapping[str, Value], target: Array | None
) -> Iterator[Variant]:
    """A softmax whose mask is another one."""
    value = departure.reference
    masked = by_name.get(value.inputs[0]) if value.inputs else None
    if "softmax" not in value.operation.lower() or masked is None:
        return
    axis = value.attributes.get("dim", value.attributes.get("axis", -1))
    for name in masked.inputs:
        if name in by_name and isinstance(axis, int):
            found = attention.softmax_variants(by_name[name].value, masked.value, axis, target)
            for id_, array, words in found:
                place = masked.name if id_ in ("mask-value", "mask-inverted", "mask-missing") else ""
                yield Variant(id_, array, words, place)


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
            (name for name, a in departure.inputs.items() if np.array_equal(_view(form, a), array)), ""
        )
        for other in _candidates(value, own, trace):
            viewed = _view(form, other.value)
            if viewed.shape != array.shape or np.array_equal(viewed, array):
                continue
            result = _in_reference_layout(form, form.result({knob: viewed}), departure.output)
            if result is None:
                continue
            words = f"reads {other.name} where the reference reads {own or 'another value'}"
            id_ = _operand_id(own, other.name, by_name)
            place = own if id_ == "gate-order" else ""
            yield Variant(id_, result, words, place)


def _view(form: Form, array: Array) -> Array:
    """Return an operand in the form's layout, or as it is if the view does not fit its shape."""
    try:
        return form.view(array)
    except ValueError:
        return array


def _candidates(value: Value, own: str, trace: Trace) -> list[Value]:
    """Values and inputs that were there before `value`, the nearest first."""
    names = [one.name for one in trace.values]
    end = names.index(value.name)
    shape = next((one.value.shape for one in trace.values if one.name == own), None)
    inputs = [Value(name, "input", array) for name, array in trace.inputs.items()]
    before = [one for one in (*inputs, *trace.values[:end]) if one.name != own]
    before = [one for one in before if shape is None or one.value.shape == shape]
    return before[::-1][:_OPERANDS]


def _operand_id(own: str, other: str, by_name: Mapping[str, Value]) -> str:
    """Gates exchanged, or a shortcut from another place."""
    return "gate-order" if _split_before(own, by_name) & _split_before(other, by_name) else "shortcut-source"


def _scaled_before_product(
    departure: Departure, trace: Trace, by_name: Mapping[str, Value]
) -> Iterator[Variant]:
    """a * (part of x W + b) as part of (a x) W + b: the reset gate of a GRU before its product."""
    value = departure.reference
    if value.operation.lower().strip("_") not in ("mul", "imul") or len(value.inputs) != 2:
        return
    for gate, part in itertools.permutations([name for name in value.inputs if name in by_name], 2):
        for name in _split_before(part, by_name):
            product = by_name.get(name)
            if product is None or len(product.inputs) != 1 or not product.parameters:
                continue
            x = by_name[product.inputs[0]].value if product.inputs[0] in by_name else None
            x = trace.inputs.get(product.inputs[0]) if x is None else x
            weights = [trace.parameters[p] for p in product.parameters]
            weight = next((w for w in weights if w.ndim == 2), None)
            bias = next((w for w in weights if w.ndim == 1), None)
            if x is None or weight is None or x.shape != by_name[gate].value.shape:
                continue
            for matrix in (weight, weight.T):
                if matrix.shape[1] != x.shape[-1] or matrix.shape[0] != product.value.shape[-1]:
                    continue
                scaled = (by_name[gate].value * x) @ matrix.T + (0 if bias is None else bias)
                size = value.value.shape[-1]
                for start in range(0, scaled.shape[-1] - size + 1, size):
                    if np.array_equal(product.value[..., start : start + size], by_name[part].value):
                        words = (
                            f"multiplies by {gate} before the product of {name}, the reference after it: "
                            "write it there (reset_after=True)"
                        )
                        yield Variant("reset-gate-placement", scaled[..., start : start + size], words)


def _split_before(name: str, by_name: Mapping[str, Value], steps: int = 4) -> set[str]:
    """The modules or values whose split a value comes from, a few operations before it."""
    value = by_name.get(name)
    if value is None or steps == 0:
        return set()
    if value.operation in _SPLITS:
        return set(value.inputs)
    return set().union(*(_split_before(one, by_name, steps - 1) for one in value.inputs))
