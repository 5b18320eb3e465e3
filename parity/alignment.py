"""Pairs of values of the candidate and of the reference, found by the numbers alone.

Two values are the same if they differ only in the order of axes (NCHW and NHWC). After a fault all values
differ. So the first value that departs is paired by order, shape and likeness. The candidate continues with
the reference's numbers in its place, and later values are the same again.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity.axes import best_axes, departing_axes, largest_error, squeeze
from parity.counterparts import by_parameters, find_choices, parameter_owners
from parity.trace import Array, Trace, Value, segment

SAME = 1e-6  # of float64 twins: two values this near, relative to the largest magnitude, are the same
_TRIALS = 24  # pairs tried for a value that departs
_JOINT = 6  # values of which two are paired at once
_ROUNDS = 60  # faults, one after the other, before the search ends


@dataclass(frozen=True)
class Pair:
    """A value of the reference and the candidate's.

    Attributes:
        reference, candidate: their names.
        axes: `candidate_array.transpose(axes)` without axes of length 1 is in the reference's order.
        same: the candidate's value, made from the reference's numbers, is the reference's.
    """

    reference: str
    candidate: str
    axes: tuple[int, ...]
    same: bool


def to_reference(pair: Pair, array: Array, shape: Sequence[int]) -> Array:
    """A candidate's array in the axis order and shape of the reference."""
    return squeeze(array).transpose(pair.axes).reshape(shape)


def to_candidate(pair: Pair, array: Array, shape: Sequence[int]) -> Array:
    """A reference's array in the axis order and shape of the candidate."""
    return squeeze(array).transpose(np.argsort(pair.axes)).reshape(shape)


def align(
    reference: Trace,
    run: Callable[[Mapping[str, Array]], Trace],
    given: Mapping[str, str] | None = None,
) -> dict[str, Pair]:
    """Pair the reference's values with the candidate's.

    Args:
        reference: a run of the reference's float64 twin.
        run: runs the candidate's float64 twin with values replaced.
        given: {reference's name: candidate's name}, pairs that the user knows.

    Returns:
        {reference's name: Pair} in the reference's order. The outputs are always paired.
    """
    by_name = {value.name: value for value in reference.values}
    departed: dict[str, Pair] = {}
    trace = run({})
    owners = parameter_owners(reference, trace)
    same = _same_values(reference, trace, departed)
    for name, other in (given or {}).items():
        same.setdefault(name, _pair(by_name[name], {v.name: v for v in trace.values}[other], {}))
    for _ in range(_ROUNDS):
        open_values = _open_values(reference, {**same, **departed})
        if not open_values:
            break
        found = _same_kind(reference, open_values, trace, same, departed, run)
        found = found or _departure(reference, open_values, trace, same, departed, run, owners)
        if found is None:
            break
        pairs, trace, same = found
        departed.update(pairs)
    pairs = {**same, **departed}
    _pair_outputs(reference, trace, pairs)
    return {value.name: pairs[value.name] for value in reference.values if value.name in pairs}


def usual_axes(reference: Trace, candidate: Trace, same: Mapping[str, Pair]) -> dict[int, tuple[int, ...]]:
    """The order of axes that most equal inputs and values have, by the number of axes."""
    counts: dict[int, Counter[tuple[int, ...]]] = {}
    for a, b in zip(reference.inputs.values(), candidate.inputs.values(), strict=False):
        found = best_axes(a, b)
        if found is not None and found[1] <= SAME:
            counts.setdefault(len(found[0]), Counter())[found[0]] += 1
    for pair in same.values():
        counts.setdefault(len(pair.axes), Counter())[pair.axes] += 1
    return {rank: counter.most_common(1)[0][0] for rank, counter in counts.items()}


def _pair(a: Value, b: Value, usual: Mapping[int, tuple[int, ...]]) -> Pair:
    """A pair of values that differ. Their numbers do not show the order of axes: take the usual one."""
    return Pair(a.name, b.name, departing_axes(a.value, b.value, usual), False)


def _pair_outputs(reference: Trace, trace: Trace, pairs: dict[str, Pair]) -> None:
    """Pair outputs with outputs, in their order, where nothing else was found for them."""
    by_name = [{value.name: value for value in t.values} for t in (reference, trace)]
    taken = {pair.candidate for pair in pairs.values()}
    for a, b in zip(reference.output_values.values(), trace.output_values.values(), strict=False):
        if not a or not b or a in pairs or b in taken:
            continue
        if best_axes(by_name[0][a].value, by_name[1][b].value) is not None:
            pairs[a] = _pair(by_name[0][a], by_name[1][b], usual_axes(reference, trace, pairs))


def replacements(pairs: Mapping[str, Pair], reference: Trace, candidate: Trace) -> dict[str, Array]:
    """For each paired value of the candidate the reference's numbers, in the candidate's layout."""
    arrays = {value.name: value.value for value in reference.values}
    shapes = {value.name: value.value.shape for value in candidate.values}
    return {
        pair.candidate: to_candidate(pair, arrays[name], shapes[pair.candidate])
        for name, pair in pairs.items()
        if pair.candidate in shapes and name in arrays
    }


def _signature(array: Array) -> Array:
    """Numbers that no order of axes changes."""
    flat = array.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        rms = float(np.sqrt(np.mean(flat**2)))
        return np.array([rms, flat.max(), flat.min(), np.mean(np.abs(flat))]) if flat.size else np.zeros(4)


def _same_values(reference: Trace, trace: Trace, departed: Mapping[str, Pair]) -> dict[str, Pair]:
    """All pairs of equal values, one to one; among equals by the gradient, then by order."""
    taken = {pair.candidate for pair in departed.values()}
    by_size: dict[int, list[tuple[int, Value, Array]]] = {}
    for position, value in enumerate(trace.values):
        if value.name not in taken:
            by_size.setdefault(value.value.size, []).append((position, value, _signature(value.value)))
    same: dict[str, Pair] = {}
    last = -1
    for value in reference.values:
        if value.name in departed or not np.isfinite(value.value).all():
            continue
        wanted = _signature(value.value)
        scale = max(float(np.abs(value.value).max(initial=0)), 1e-300)
        fits: list[tuple[float, int, int, Value, tuple[int, ...]]] = []
        for position, other, signature in by_size.get(value.value.size, ()):
            if other.name in taken or np.abs(signature - wanted).max() > SAME * scale * 4:
                continue
            found = best_axes(value.value, other.value)
            if found is not None and found[1] <= SAME:
                fits.append(
                    (_gradient_distance(value, other, found[0]), position <= last, position, other, found[0])
                )
        if fits:
            _, _, position, other, axes = min(fits, key=lambda fit: fit[:3])
            same[value.name] = Pair(value.name, other.name, axes, True)
            taken.add(other.name)
            last = position
    return same


def _gradient_distance(a: Value, b: Value, axes: tuple[int, ...]) -> float:
    """0 if the gradients are equal too, or unknown; 1 if they are not."""
    if a.gradient is None or b.gradient is None:
        return 0.0
    error = largest_error(squeeze(a.gradient), squeeze(b.gradient).transpose(axes))
    return 0.0 if error <= SAME else 1.0


def _open_values(reference: Trace, pairs: Mapping[str, Pair]) -> list[Value]:
    """Unpaired values on which an output depends with no paired value in between."""
    by_name = {value.name: value for value in reference.values}

    def is_layout(value: Value) -> bool:
        """True if the value is a paired one with its axes in another order."""
        sources = (by_name[name].value for name in value.inputs if name in pairs)
        same_size = (source for source in sources if source.size == value.value.size)
        found = (best_axes(value.value, source) for source in same_size)
        return any(best is not None and best[1] <= SAME for best in found)

    open_names: set[str] = set()
    waiting = [name for name in reference.output_values.values() if name and name not in pairs]
    while waiting:
        name = waiting.pop()
        if name in open_names or name in pairs or name not in by_name or is_layout(by_name[name]):
            continue
        open_names.add(name)
        waiting += by_name[name].inputs
    return [value for value in reference.values if value.name in open_names]


def _same_kind(
    reference: Trace,
    open_values: Sequence[Value],
    trace: Trace,
    same: Mapping[str, Pair],
    departed: Mapping[str, Pair],
    run: Callable[[Mapping[str, Array]], Trace],
) -> tuple[dict[str, Pair], Trace, dict[str, Pair]] | None:
    """Pair all values of the kind that departed last, in their order: one fault in many modules."""
    if not departed:
        return None
    pair = list(departed.values())[-1]
    kinds = {value.name: (value.operation, value.is_module) for t in (reference, trace) for value in t.values}
    first, second = kinds[pair.reference], {v.name: v for v in trace.values}[pair.candidate]
    if kinds[open_values[0].name] != first:
        return None
    taken = {p.candidate for p in (*same.values(), *departed.values())}
    ours = [value for value in open_values if kinds[value.name] == first]
    theirs = [
        v
        for v in trace.values
        if v.name not in taken and (v.operation, v.is_module) == (second.operation, second.is_module)
    ]
    if len(ours) != len(theirs) or any(
        best_axes(a.value, b.value) is None for a, b in zip(ours, theirs, strict=True)
    ):
        return None
    usual = usual_axes(reference, trace, same)
    pairs = {a.name: _pair(a, b, usual) for a, b in zip(ours, theirs, strict=True)}
    tried = run(replacements({**departed, **pairs}, reference, trace))
    now = _same_values(reference, tried, {**departed, **pairs})
    return (pairs, tried, now) if len(now) > len(same) else None


_Found = tuple[int, dict[str, Pair], Trace, dict[str, Pair]]


def _departure(
    reference: Trace,
    open_values: Sequence[Value],
    trace: Trace,
    same: Mapping[str, Pair],
    departed: Mapping[str, Pair],
    run: Callable[[Mapping[str, Array]], Trace],
    owners: Mapping[str, str],
) -> tuple[dict[str, Pair], Trace, dict[str, Pair]] | None:
    """Find the first value that departs and its pair: that with which most later values are the same."""
    by_name = {value.name: value for value in reference.values}
    places = {value.name: place for place, value in enumerate(trace.values)}
    taken = {pair.candidate for pair in (*same.values(), *departed.values())}
    matched = {*same, *departed}, taken
    outputs = dict(zip(reference.output_values.values(), trace.output_values.values(), strict=False))
    free = [value for value in trace.values if value.name not in taken]
    usual = usual_axes(reference, trace, same)
    before = len(same)
    trials = 0
    first_choices: list[Pair] = []

    def attempt(pairs: dict[str, Pair], best: _Found | None) -> _Found | None:
        tried = run(replacements({**departed, **pairs}, reference, trace))
        now = _same_values(reference, tried, {**departed, **pairs})
        # At a wrong place the value may make equal what it is itself made from. That is no gain.
        made_from = {one.name for name in pairs for one in segment(reference, name, matched[0])}
        gain = len(now) - before - len(made_from & set(now)) or int(any(name in outputs for name in pairs))
        return (gain, pairs, tried, now) if gain > 0 and (best is None or gain > best[0]) else best

    def joint(choices: Sequence[Pair]) -> _Found | None:
        """Two at once: both paths into a sum depart."""
        best: _Found | None = None
        for two in itertools.combinations(choices[:_JOINT], 2):
            if two[0].candidate != two[1].candidate:
                best = attempt({pair.reference: pair for pair in two}, best)
        return best

    for value in open_values:
        best: _Found | None = None
        possible, readers = by_parameters(value, reference, trace, matched, free, owners)
        possible = free if value.name in outputs else possible
        read = {name for one in segment(reference, value.name, matched[0]) for name in one.inputs}
        sources = {pair.candidate for name, pair in {**same, **departed}.items() if name in read}
        first = min((places[name] for name in sources), default=-1)
        possible = [other for other in possible if places[other.name] > first] or possible
        orders = [usual]
        for name in value.inputs:
            if name in same and by_name[name].value.shape == value.value.shape:
                orders.append({**usual, len(same[name].axes): same[name].axes})
        choices = find_choices(value, possible, outputs.get(value.name), orders, readers, sources)
        if value.name in outputs:
            best = joint(first_choices)
        for other, axes in choices if best is None else ():
            trials += 1
            best = attempt({value.name: Pair(value.name, other.name, axes, False)}, best)
        if best is not None:
            return best[1:]
        first_choices += [Pair(value.name, other.name, axes, False) for other, axes in choices[:1]]
        if trials >= _TRIALS and value.name not in outputs:
            open_values = [v for v in open_values if v.name in outputs]
            return _output_departure(reference, open_values, trace, taken, departed, run)
    return None


def _output_departure(
    reference: Trace,
    outputs: Sequence[Value],
    trace: Trace,
    taken: set[str],
    departed: Mapping[str, Pair],
    run: Callable[[Mapping[str, Array]], Trace],
) -> tuple[dict[str, Pair], Trace, dict[str, Pair]] | None:
    """Where nothing in between could be paired: the outputs themselves."""
    pairs = dict(departed)
    _pair_outputs(reference, trace, pairs)
    new = {name: pair for name, pair in pairs.items() if name not in departed and pair.candidate not in taken}
    new = {name: pair for name, pair in new.items() if name in {value.name for value in outputs}}
    if not new:
        return None
    tried = run(replacements({**departed, **new}, reference, trace))
    return new, tried, _same_values(reference, tried, {**departed, **new})
