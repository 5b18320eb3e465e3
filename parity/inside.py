"""The search inside a departing stage for the value at which the models differ first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice, pairwise, product, zip_longest

import numpy as np

from parity.alignment import to_candidate, to_reference
from parity.causes import Departure, precision
from parity.causes.stage import distance
from parity.causes.variants import (
    Variant,
    applied_before,
    exchanged_parameters,
    exchanges,
    fused_orders,
    left_out,
    other_variants,
    own_variants,
    swapped,
)
from parity.report import Difference, Stage
from parity.runs import Runs
from parity.tensors import pick_value
from parity.trace import Array, Trace, Value, segment, stage_parameters

Kind = Callable[[Departure, Trace, Array | None], Iterator[Variant]]
_RERUNS = 150  # runs of the reference in the search for a cause inside a stage


def dropped(runs: Runs, stage: Stage, outside: Difference) -> Difference | None:
    """A value that the candidate sets to 0 at some places and multiplies by one number at the others."""
    taken = {pair.candidate: name for name, pair in runs.pairs.items()}
    theirs = segment(runs.whole_twin, stage.other.name, set(taken))
    sources = dict.fromkeys(name for value in theirs for name in value.inputs if name in taken)
    arrays = {value.name: value.value for value in runs.twin.values}
    for value, source in product(theirs, sources):
        made, pair = pick_value(runs.alone[True], value.name), runs.pairs[taken[source]]
        if made is not None and made.size == arrays[pair.reference].size:
            read = to_candidate(pair, arrays[pair.reference], made.shape)
            kept = made != 0
            ratios = made[kept] / read[kept] if kept.any() and (read[kept] != 0).all() else np.ones(1)
            if 0 < kept.mean() < 1 and ratios[0] > 1.001 and np.ptp(ratios) < 1e-9 * ratios[0]:
                sentence = (
                    f"{value.where or value.name} drops some numbers of {taken[source]} and multiplies "
                    f"the others by {ratios[0]:.6g}: dropout is active, switch it off "
                    "(deterministic=True, eval mode)"
                )
                found = replace(outside, reference=taken[source], candidate=value.name, index=None)
                return replace(found, cause=sentence, where=value.where, cause_id="dropout-active")
    return None


def inside(runs: Runs, stage: Stage, outside: Difference) -> Difference | None:
    """Find a value of the stage's segment with a variant that gives the candidate's output.

    The rest of the segment is computed by the reference itself.
    """
    ours = segment(runs.twin, stage.value.name, set(runs.pairs))
    candidate = pick_value(runs.alone[True], stage.pair.candidate)
    assert candidate is not None
    if candidate.size != stage.value.value.size:
        return None
    target = to_reference(stage.pair, candidate, stage.value.value.shape)
    limit = 10 * outside.noise
    limit = max(limit, 1e-9, min(3e-7, 1e-3 * distance(target, stage.value.value)))

    def fits(replaced: Mapping[str, Array]) -> bool:
        result = replaced.get(stage.value.name)
        if result is None:
            result = pick_value(runs.rerun(replace=replaced), stage.value.name)
        return result is not None and distance(result, target) <= limit

    for replaced, variant in islice(_variants(runs, stage, ours, target), _RERUNS):
        if fits(replaced):
            return _at(runs, stage, outside, variant)
    return None


def rounded(runs: Runs, stage: Stage, outside: Difference) -> Difference | None:
    """A value of the stage's segment that the candidate rounds to a lower precision."""
    native = pick_value(runs.alone[False], stage.pair.candidate)
    if native is None or native.size != stage.value.value.size:
        return None
    theirs = to_reference(stage.pair, native, stage.value.value.shape)
    found: list[tuple[float, Variant]] = []
    for value in segment(runs.twin, stage.value.name, set(runs.pairs))[:-1]:
        for name in ("bfloat16", "float16"):
            array = precision.ROUNDINGS[name](value.value)
            result = pick_value(runs.rerun(replace={value.name: array}), stage.value.name)
            words = f"rounds {value.name} to {name}, the reference does not: write the reference's precision"
            assert result is not None
            variant = Variant(precision.IDS[name], array, words, value.name)
            found.append((precision.size(theirs - result), variant))
    limit = precision.SHARE * precision.size(theirs - stage.value.value)
    near = [one for one in found if one[0] <= limit]
    return _at(runs, stage, outside, min(near, key=lambda one: one[0])[1]) if near else None


def _at(runs: Runs, stage: Stage, outside: Difference, variant: Variant) -> Difference:
    """The difference at the place of a variant, with its cause."""
    where = runs.where_of(variant.place, stage)
    sentence = f"{where or stage.other.name} {variant.sentence}"
    what = "parameter" if variant.place in runs.twin.parameters else outside.what
    found = replace(outside, what=what, reference=variant.place, index=None, where=where)
    return replace(found, cause=sentence, cause_id=variant.id)


def _variants(
    runs: Runs, stage: Stage, ours: Sequence[Value], target: Array
) -> Iterator[tuple[dict[str, Array], Variant]]:
    """Values to replace in the reference, and what that would mean."""
    by_name = {value.name: value for value in runs.twin.values}
    for value in ours:
        for variant in left_out(value, by_name, runs.twin):
            yield {value.name: variant.array}, replace(variant, place=value.name)

    def departure(value: Value) -> Departure:
        return runs.departure(stage.forward, replace(stage, value=value), value.value, value.value)

    departures = {value.name: departure(value) for value in ours}
    yield from exchanged_parameters(list(departures.values()))
    yield from fused_orders(ours, runs.twin)
    yield from exchanges(ours, runs.twin)
    for value in _read_early(runs, stage, ours):
        for after in ours:
            for variant in applied_before(departure(value), departures[after.name]):
                yield {after.name: variant.array}, replace(variant, place=after.name)
    for before, after in pairwise(ours):
        if after.inputs == (before.name,):
            for variant in swapped(departures[before.name], departures[after.name]):
                yield {after.name: variant.array}, replace(variant, place=before.name)
    for kind in (own_variants, other_variants):  # of all values what is likely, then the rest

        def of(value: Value, kind: Kind = kind) -> Iterator[tuple[Value, Variant]]:
            of_stage = target if value is ours[-1] else None
            return ((value, variant) for variant in kind(departures[value.name], runs.twin, of_stage))

        # In turns: a value with many variants must not use up the runs.
        for value, variant in filter(None, chain.from_iterable(zip_longest(*map(of, ours)))):
            if variant.array.shape == value.value.shape:
                yield {value.name: variant.array}, replace(variant, place=variant.place or value.name)


def _read_early(runs: Runs, stage: Stage, ours: Sequence[Value]) -> Iterator[Value]:
    """Operations of the reference outside the stage whose parameters the candidate reads inside it."""
    taken = {pair.candidate for pair in runs.pairs.values()}
    theirs = [
        runs.whole_twin.parameters[p] for p in stage_parameters(runs.whole_twin, stage.other.name, taken)
    ]
    names = {value.name for value in ours}
    for value in runs.twin.values:
        read = [runs.twin.parameters[p] for p in value.parameters]
        if read and value.name not in names and all(any(np.array_equal(a, b) for b in theirs) for a in read):
            yield value
