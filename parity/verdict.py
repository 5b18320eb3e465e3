"""Where two models differ first: the stage, and the search for its cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from parity.alignment import SAME, Pair, family, to_reference, usual_axes
from parity.axes import best_axes, departing_axes, largest_error, squeeze
from parity.causes import Cause, Departure
from parity.causes.search import find_cause, find_precision
from parity.report import Difference, Stage, Tensor
from parity.tensors import PICKS, pick_value
from parity.trace import Array, Trace, Value
from parity.weights import Audit, segment, stage_parameters


class Verdict:
    """Finds the first difference in the runs that `compare` made.

    Args:
        twin: the reference's float64 twin.
        whole_twin: the candidate's, as it is.
        alone: the candidate with each stage on the reference's numbers: {True: in float64, False: as it is}.
        pairs: of values, by the reference's name.
        weights: the audit of the parameters.
    """

    def __init__(
        self,
        twin: Trace,
        whole_twin: Trace,
        alone: Mapping[bool, Trace],
        pairs: Mapping[str, Pair],
        weights: Audit,
    ) -> None:
        self.twin, self.whole_twin, self.alone = twin, whole_twin, alone
        self.pairs, self.weights = pairs, weights

    def first_difference(self, stages: Sequence[Stage], tensors: Sequence[Tensor]) -> Difference | None:
        """The first departing stage forward, else the last backward, else the first of the other tensors."""
        for stage in stages:
            if stage.forward.departs:
                return (
                    self._weight_fault(stage)
                    or self._earlier_difference(stage)
                    or self._difference(stage.forward, stage)
                )
        for stage in reversed(stages):
            if stage.backward is not None and stage.backward.departs:
                return self._difference(stage.backward, self._reader(stage, stages))
        for tensor in tensors:
            if tensor.departs:
                return self._difference(tensor, self._reader_of(tensor.reference, stages))
        return None

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
        return None

    def _earlier_difference(self, stage: Stage) -> Difference | None:
        """A value before a departing stage that has no pair since its shape or its order is another one."""
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
            inside = segment(self.twin, stage.value.name, set(self.pairs))
            if any(name in (*value.inputs, *value.parameters) for value in inside):
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
        if is_value and tensor.what == "input gradient" and stage is not None:
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
        ours = segment(self.twin, stage.value.name, set(self.pairs))
        candidates = {pair.candidate for pair in self.pairs.values()}
        read = dict.fromkeys(name for value in ours for name in value.inputs)
        arrays = {**self.twin.inputs, **{value.name: value.value for value in self.twin.values}}
        inside = {value.name for value in ours}
        module = stage.value.module
        other = pick_value(self.alone[not tensor.coarse], stage.pair.candidate)
        assert other is not None
        departure = Departure(
            what=tensor.what,
            reference=stage.value,
            candidate=stage.other,
            segment=tuple(segment(self.whole_twin, stage.pair.candidate, candidates)),
            inputs={name: arrays[name] for name in read if name in arrays and name not in inside},
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
            result_name=tensor.reference,
            noise=tensor.allowed / tensor.factor,
            train=bool(stage.value.attributes.get("training", False)),
        )
        if tensor.coarse and tensor.what == "output":
            return find_precision(departure, array)
        return find_cause(departure)

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
    return next(iter(same_kind), None)
