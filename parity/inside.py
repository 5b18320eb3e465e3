"""What a departing stage holds: the value inside it at which the models differ first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from parity.alignment import to_candidate, to_reference
from parity.causes.stage import distance
from parity.causes.variants import Variant, exchanges, left_out, swapped, variants
from parity.report import Difference, Stage
from parity.runs import Runs
from parity.tensors import pick_value
from parity.trace import Array, Value, segment

_RERUNS = 150  # runs of the reference in the search for a cause inside a stage


def dropped(runs: Runs, stage: Stage, outside: Difference) -> Difference | None:
    """A value that the candidate sets to 0 at some places and multiplies by one number at the others."""
    taken = {pair.candidate: name for name, pair in runs.pairs.items()}
    theirs = segment(runs.whole_twin, stage.other.name, set(taken))
    sources = dict.fromkeys(name for value in theirs for name in value.inputs if name in taken)
    arrays = {value.name: value.value for value in runs.twin.values}
    for value, source in itertools.product(theirs, sources):
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
    """A value of the stage's segment of which a variant gives the candidate's output of the stage.

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

    for replaced, variant in itertools.islice(_variants(runs, stage, ours, target), _RERUNS):
        if fits(replaced):
            where = runs.where_of(variant.place, stage)
            sentence = f"{where or stage.other.name} {variant.sentence}"
            found = replace(outside, reference=variant.place, index=None, where=where)
            return replace(found, cause=sentence, cause_id=variant.id)
    return None


def _variants(
    runs: Runs, stage: Stage, ours: Sequence[Value], target: Array
) -> Iterator[tuple[dict[str, Array], Variant]]:
    """Values to replace in the reference, and what that would mean."""
    by_name = {value.name: value for value in runs.twin.values}
    for value in ours:
        for variant in left_out(value, by_name, runs.twin):
            yield {value.name: variant.array}, replace(variant, place=value.name)
    for replaced, variant in exchanges(ours, runs.twin):
        yield replaced, variant
    departures = {
        value.name: runs.departure(stage.forward, replace(stage, value=value), value.value, value.value)
        for value in ours
    }
    for before, behind in itertools.pairwise(ours):
        if behind.inputs == (before.name,):
            for variant in swapped(departures[before.name], departures[behind.name]):
                yield {behind.name: variant.array}, replace(variant, place=before.name)
    for value in ours:
        of_stage = target if value is ours[-1] else None
        for variant in variants(departures[value.name], runs.twin, of_stage):
            if variant.array.shape == value.value.shape:
                yield {value.name: variant.array}, replace(variant, place=variant.place or value.name)
