"""Where two models differ first: the stage, and the search for its cause."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from parity.alignment import SAME, Pair, family, to_candidate, to_reference, usual_axes
from parity.axes import best_axes, departing_axes, largest_error, squeeze
from parity.causes import Cause, Departure
from parity.causes.search import find_cause, find_precision
from parity.causes.stage import distance
from parity.causes.variants import Variant, exchanges, left_out, swapped, variants
from parity.report import Difference, Stage, Tensor
from parity.tensors import PICKS, pick_value
from parity.trace import Array, Trace, Value, segment, stage_parameters
from parity.weights import Audit

_RERUNS = 150  # runs of the reference in the search for a cause inside a stage
_READERS = 8  # stages that read one value, each tried for a wrong gradient

Rerun = Callable[..., Trace]
"""Runs the reference's float64 twin; `replace` and `replace_gradients` as in `Model.run`."""


class Verdict:
    """Finds the first difference in the runs that `compare` made.

    Args:
        rerun: see `Rerun`.
        twin: the reference's float64 twin.
        whole_twin: the candidate's, as it is.
        alone: the candidate with each stage on the reference's numbers: {True: in float64, False: as it is}.
        pairs: of values, by the reference's name.
        weights: the audit of the parameters.
    """

    def __init__(
        self,
        rerun: Rerun,
        twin: Trace,
        whole_twin: Trace,
        alone: Mapping[bool, Trace],
        pairs: Mapping[str, Pair],
        weights: Audit,
    ) -> None:
        self.rerun = rerun
        self.twin, self.whole_twin, self.alone = twin, whole_twin, alone
        self.pairs, self.weights = pairs, weights

    def first_difference(self, stages: Sequence[Stage], tensors: Sequence[Tensor]) -> Difference | None:
        """The first departing stage forward, else the last backward, else the first of the other tensors."""
        for stage in stages:
            if stage.forward.departs:
                return (
                    self._weight_fault(stage)
                    or self._earlier_difference(stage)
                    or self._output_difference(stage)
                )
        for stage in reversed(stages):
            if stage.backward is not None and stage.backward.departs:
                return self._gradient_difference(stage.backward, self._reader(stage, stages), stages)
        for tensor in tensors:
            if tensor.departs:
                return self._gradient_difference(tensor, self._reader_of(tensor.reference, stages), stages)
        return None

    def _output_difference(self, stage: Stage) -> Difference:
        """A stage that departs forward, with its cause, or the value inside it that has one."""
        found = self._difference(stage.forward, stage)
        if found.cause_id == "position-offset":  # a table of positions is no value, but a module
            table = next(name for name in stage.value.parameters if name)
            return replace(found, reference=table.rpartition(".")[0])
        if found.cause is not None or stage.forward.coarse:
            return found
        inside = self._dropout(stage, found) or self._inside(stage, found)
        return found if inside is None else inside

    def _dropout(self, stage: Stage, outside: Difference) -> Difference | None:
        """A value that the candidate sets to 0 at some places and multiplies by one number at the others."""
        taken = {pair.candidate: name for name, pair in self.pairs.items()}
        inside = segment(self.whole_twin, stage.other.name, set(taken))
        sources = dict.fromkeys(name for value in inside for name in value.inputs if name in taken)
        arrays = {value.name: value.value for value in self.twin.values}
        for value, source in itertools.product(inside, sources):
            made, pair = pick_value(self.alone[True], value.name), self.pairs[taken[source]]
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

    def _inside(self, stage: Stage, outside: Difference) -> Difference | None:
        """A value of the stage's segment of which a variant gives the candidate's output of the stage.

        The rest of the segment is computed by the reference itself.
        """
        ours = segment(self.twin, stage.value.name, set(self.pairs))
        candidate = pick_value(self.alone[True], stage.pair.candidate)
        assert candidate is not None
        if candidate.size != stage.value.value.size:
            return None
        target = to_reference(stage.pair, candidate, stage.value.value.shape)
        limit = 10 * outside.noise
        limit = max(limit, 1e-9, min(3e-7, 1e-3 * distance(target, stage.value.value)))

        def fits(replaced: Mapping[str, Array]) -> bool:
            result = replaced.get(stage.value.name)
            if result is None:
                result = pick_value(self.rerun(replace=replaced), stage.value.name)
            return result is not None and distance(result, target) <= limit

        for replaced, variant in itertools.islice(self._variants(stage, ours, target), _RERUNS):
            if fits(replaced):
                where = self._where_of(variant.place, stage)
                sentence = f"{where or stage.other.name} {variant.sentence}"
                found = replace(outside, reference=variant.place, index=None, where=where)
                return replace(found, cause=sentence, cause_id=variant.id)
        return None

    def _variants(
        self, stage: Stage, ours: Sequence[Value], target: Array
    ) -> Iterator[tuple[dict[str, Array], Variant]]:
        """Values to replace in the reference, and what that would mean."""
        by_name = {value.name: value for value in self.twin.values}
        for value in ours:
            for variant in left_out(value, by_name, self.twin):
                yield {value.name: variant.array}, replace(variant, place=value.name)
        for replaced, variant in exchanges(ours, self.twin):
            yield replaced, variant
        departures = {
            value.name: self._departure(stage.forward, replace(stage, value=value), value.value, value.value)
            for value in ours
        }
        for before, behind in itertools.pairwise(ours):
            if behind.inputs == (before.name,):
                for variant in swapped(departures[before.name], departures[behind.name]):
                    yield {behind.name: variant.array}, replace(variant, place=before.name)
        for value in ours:
            of_stage = target if value is ours[-1] else None
            for variant in variants(departures[value.name], self.twin, of_stage):
                if variant.array.shape == value.value.shape:
                    yield {value.name: variant.array}, replace(variant, place=variant.place or value.name)

    def _where_of(self, name: str, stage: Stage) -> str:
        """The candidate's line of the value paired with `name`, else the first of the stage's segment."""
        if name in self.pairs:
            other = self.pairs[name].candidate
            where = next((value.where for value in self.whole_twin.values if value.name == other), "")
            return where or stage.other.where
        taken = {pair.candidate for pair in self.pairs.values()}
        inside = segment(self.whole_twin, stage.other.name, taken)
        return next((value.where for value in inside if value.where), stage.other.where)

    def _gradient_difference(
        self, tensor: Tensor, stage: Stage | None, stages: Sequence[Stage]
    ) -> Difference:
        """A gradient or statistic that departs, with its cause."""
        found = self._difference(tensor, stage)
        if found.cause is not None or not tensor.what.endswith("gradient"):
            return found
        name = tensor.reference
        pick = PICKS[(tensor.what, name in self.pairs)]
        truth, array = pick(self.twin, name), pick(self.alone[True], tensor.candidate)
        readers = [one for one in stages if name in self._read(one)]
        if truth is None or array is None or not 1 < len(readers) <= _READERS:
            return found
        theirs = squeeze(array).transpose(self._axes(tensor, truth, array)).reshape(truth.shape)
        limit = max(tensor.allowed, 1e-9)
        for reader in readers:
            zeros = np.zeros(reader.value.value.shape)
            without = pick(self.rerun(replace_gradients={reader.value.name: zeros}), name)
            assert without is not None
            others = [one for one in readers if one is not reader]
            for result, stopped in ((without, reader), (truth - without, others[0])):
                if distance(result, theirs) <= limit:
                    sentence = f"lets no gradient pass from {stopped.value.name} to {name}"
                    cause = Cause("stop-gradient", f"{sentence}: remove the stop_gradient", 0.0)
                    return self._at(found, stopped, cause)
            if distance(truth - without, theirs - without) > limit:
                of_reader = self._cause(tensor, reader, truth - without, theirs - without)
                if of_reader is not None:
                    return self._at(found, reader, of_reader)
        return found

    def _at(self, found: Difference, stage: Stage, cause: Cause) -> Difference:
        """The same difference, at a stage and with a cause."""
        where = stage.other.where
        place = where or stage.other.name
        sentence = cause.sentence if cause.sentence.startswith(place) else f"{place} {cause.sentence}"
        names = {"reference": stage.value.name, "candidate": stage.other.name}
        return replace(found, **names, where=where, cause=sentence, cause_id=cause.id)  # type: ignore[arg-type]

    def _read(self, stage: Stage) -> set[str]:
        """Names of the values, inputs and parameters that a stage reads."""
        inside = segment(self.twin, stage.value.name, set(self.pairs))
        return {name for value in inside for name in (*value.inputs, *value.parameters)}

    def _weight_fault(self, stage: Stage) -> Difference | None:
        """A parameter of a departing stage that is not the reference's."""
        read = stage_parameters(self.twin, stage.value.name, set(self.pairs))
        for fault in self.weights.faults:
            if fault.reference in read:
                where = stage.other.where
                return Difference(
                    "parameter",
                    fault.reference,
                    fault.candidate,
                    fault.error,
                    0.0,
                    None,
                    fault.sentence,
                    where,
                    fault.id,
                )
        return self._exchanged_weights(stage, read)

    def _exchanged_weights(self, stage: Stage, read: Sequence[str]) -> Difference | None:
        """Parameters of another place of the reference, read here by the candidate."""
        taken = {pair.candidate for pair in self.pairs.values()}
        owners = {match.candidate: match.reference for match in self.weights.matches if match.equal}
        theirs = stage_parameters(self.whole_twin, stage.other.name, taken)
        foreign = [name for name in theirs if name in owners and owners[name] not in read]
        parameters = self.twin.parameters
        for name in read:
            like = [f for f in foreign if parameters[owners[f]].shape == parameters[name].shape]
            if like and not any(owners.get(other) == name for other in theirs):
                where = stage.other.where
                sentence = (
                    f"{where or stage.other.name} reads {like[0]}, which has the numbers of "
                    f"{owners[like[0]]}; the reference reads {name} here: exchange them, or the order of "
                    "the two modules"
                )
                return Difference(
                    "parameter", name, like[0], float("inf"), 0.0, None, sentence, where, "weights-swapped"
                )
        return None

    def _earlier_difference(self, stage: Stage) -> Difference | None:
        """A value before a departing stage that has no pair since its shape or its order is another one."""
        if stage.forward.coarse:
            return None
        ours = segment(self.twin, stage.value.name, set(self.pairs))[:-1]
        taken = {pair.candidate for pair in self.pairs.values()}
        theirs = segment(self.whole_twin, stage.other.name, taken)[:-1]
        for value in ours:
            other = _counterpart(value, theirs)
            if other is None:
                continue
            usual = usual_axes(self.twin, self.whole_twin, {n: p for n, p in self.pairs.items() if p.same})
            pair = Pair(value.name, other.name, departing_axes(value.value, other.value, usual), False)
            made = pick_value(self.alone[True], other.name)
            assert made is not None
            forward = replace(stage.forward, reference=value.name, candidate=other.name)
            early = replace(stage, value=value, other=other, pair=pair, forward=forward)
            cause = self._cause(forward, early, value.value, made)
            shapes = f"{list(value.value.shape)} and {list(made.shape)}"
            if value.value.size != made.size:
                sentence = f"The shapes differ: {shapes} (the reference's and the candidate's)."
            else:
                sentence = "The candidate has the same numbers in another order."
            sentence = sentence if cause is None else cause.sentence
            found = "" if cause is None else cause.id
            return Difference(
                "output", value.name, other.name, float("inf"), 0.0, None, sentence, other.where, found
            )
        return None

    def _reader(self, stage: Stage, stages: Sequence[Stage]) -> Stage:
        """The stage that reads a value: its backward pass makes the gradient of that value."""
        return self._reader_of(stage.value.name, stages) or stage

    def _reader_of(self, name: str, stages: Sequence[Stage]) -> Stage | None:
        """The first paired stage that reads a value, an input or a parameter."""
        module = name.rpartition(".")[0]
        for stage in stages:
            if name in self.twin.state and stage.value.is_module and stage.value.module == module:
                return stage  # its running statistics
            if name in self._read(stage):
                return stage
        return None

    def _difference(self, tensor: Tensor, stage: Stage | None) -> Difference:
        """Describe a tensor that departs, with its cause. `stage` made it."""
        is_value = tensor.reference in self.pairs
        pick = PICKS[(tensor.what, is_value)]
        truth, array = (
            pick(self.twin, tensor.reference),
            pick(self.alone[not tensor.coarse], tensor.candidate),
        )
        assert truth is not None
        index, aligned = None, np.zeros(truth.shape)
        if array is not None:
            aligned = squeeze(array).transpose(self._axes(tensor, truth, array)).reshape(truth.shape)
            with np.errstate(invalid="ignore"):
                apart = np.nan_to_num(np.abs(truth - aligned), nan=np.inf)
            index = tuple(int(i) for i in np.unravel_index(int(apart.argmax()), truth.shape))
        cause = None if stage is None else self._cause(tensor, stage, truth, aligned)
        name, other = tensor.reference, tensor.candidate
        nothing = not aligned.any() and is_value  # no gradient passes back into the value itself
        if tensor.what == "input gradient" and stage is not None and not nothing:
            name, other = stage.value.name, stage.other.name
        return Difference(
            what=tensor.what,
            reference=name,
            candidate=other,
            error=tensor.made_here,
            noise=tensor.allowed / tensor.factor,
            index=index,
            cause=None if cause is None else cause.sentence,
            where=stage.other.where if stage is not None else "",
            cause_id="" if cause is None else cause.id,
        )

    def _cause(self, tensor: Tensor, stage: Stage, truth: Array, array: Array) -> Cause | None:
        """Try the hypotheses on the stage alone."""
        departure = self._departure(tensor, stage, truth, array)
        if tensor.coarse and tensor.what == "output":
            return find_precision(departure, array)
        return find_cause(departure)

    def _departure(self, tensor: Tensor, stage: Stage, truth: Array, array: Array) -> Departure:
        """What is known of a stage. Of a module its inputs are those of the whole module."""
        module = stage.value.module
        ours = segment(self.twin, stage.value.name, set(self.pairs))
        if stage.value.is_module:
            ours = [value for value in ours if f"{value.module}.".startswith(f"{module}.")]
        else:
            ours = ours[-1:]
        candidates = {pair.candidate for pair in self.pairs.values()}
        read = dict.fromkeys(name for value in ours for name in value.inputs)
        arrays = {**self.twin.inputs, **{value.name: value.value for value in self.twin.values}}
        inside = {value.name for value in ours}
        other = pick_value(self.alone[not tensor.coarse], stage.pair.candidate)
        assert other is not None
        inputs = {name: arrays[name] for name in read if name in arrays and name not in inside}
        name = tensor.reference
        if tensor.what == "input gradient" and name in arrays and name not in inputs:
            for own, x in inputs.items():  # the stage may read the value with its axes in another order
                found = best_axes(x, arrays[name])
                if found is not None and found[1] <= SAME and x.ndim == arrays[name].ndim == len(found[0]):
                    name, truth, array = own, truth.transpose(found[0]), array.transpose(found[0])
                    break
        return Departure(
            what=tensor.what,
            reference=stage.value,
            candidate=stage.other,
            segment=tuple(segment(self.whole_twin, stage.pair.candidate, candidates)),
            inputs=inputs,
            parameters={p: self.twin.parameters[p] for value in ours for p in value.parameters},
            state={n: a for n, a in self.twin.state_before.items() if module and n.startswith(f"{module}.")},
            output=stage.value.value,
            candidate_output=(
                to_reference(stage.pair, other, stage.value.value.shape)
                if other.size == stage.value.value.size
                else squeeze(other).transpose(stage.pair.axes)
            ),
            gradient=stage.value.gradient,
            result=truth,
            candidate_result=array,
            result_name=name,
            noise=tensor.allowed / tensor.factor,
            train=bool(stage.value.attributes.get("training", False)),
        )

    def _axes(self, tensor: Tensor, truth: Array, array: Array) -> tuple[int, ...]:
        if tensor.reference in self.pairs:
            return self.pairs[tensor.reference].axes
        for match in self.weights.matches:
            if tensor.what == "parameter gradient" and match.reference == tensor.reference:
                return match.axes
        found = best_axes(truth, array)
        return found[0] if found is not None else ()


def _same_kind(a: Value, b: Value) -> bool:
    return family(a.operation) == family(b.operation)


def _reordered(a: Array, b: Array) -> bool:
    """True if two arrays have the same numbers, but are not the same with other axes."""
    found = best_axes(a, b)
    if found is not None and found[1] <= SAME:
        return False
    return largest_error(np.sort(a, axis=None), np.sort(b, axis=None)) <= SAME


def _counterpart(value: Value, theirs: Sequence[Value]) -> Value | None:
    """The candidate's value of that kind with another shape, or with the same numbers in another order."""
    same_kind = [other for other in theirs if _same_kind(value, other)]
    if any(best_axes(value.value, other.value) is not None for other in same_kind):
        fits = [other for other in theirs if other.value.size == value.value.size]
        return next((other for other in fits if _reordered(value.value, other.value)), None)
    if family(value.operation) not in ("convolution", "product", "pooling", "resize", "interpolate", "cat"):
        return None  # only these can give another shape
    return next(iter(same_kind), None)
