"""Where two models differ first: the stage, and the search for its cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from parity.alignment import SAME, Pair, usual_axes
from parity.axes import best_axes, departing_axes, largest_error, squeeze
from parity.causes import Cause
from parity.causes.search import find_cause, find_precision
from parity.causes.stage import distance
from parity.counterparts import family
from parity.inside import dropped, inside, rounded
from parity.report import Difference, Stage, Tensor
from parity.runs import Runs
from parity.tensors import PICKS, pick_value
from parity.trace import Array, Value, segment, stage_parameters
from parity.weights import Audit

_READERS = 8  # stages that read one value, each tried for a wrong gradient


@dataclass(frozen=True)
class Verdict(Runs):
    """Finds the first difference in the runs that `compare` made.

    Attributes:
        weights: the audit of the parameters.
    """

    weights: Audit

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
                return self._gradient_difference(*self._first_of_its_line(stage, stages), stages)
        for tensor in tensors:
            if tensor.departs:
                return self._gradient_difference(tensor, self._reader_of(tensor.reference, stages), stages)
        return None

    def _output_difference(self, stage: Stage) -> Difference:
        """A stage that departs forward, with its cause, or the value inside it that has one."""
        found = self._difference(stage.forward, stage)
        if found.cause_id == "position-offset":  # a table of positions is no value, but a module
            tables = (name.rpartition(".")[0] for name in stage.value.parameters)
            table = next((name for name in tables if name and name != stage.value.module), "")
            return replace(found, reference=table or found.reference)
        if found.cause is not None:
            return found
        if stage.forward.coarse:
            return rounded(self, stage, found) or found
        return dropped(self, stage, found) or inside(self, stage, found) or found

    def _gradient_difference(
        self, tensor: Tensor, stage: Stage | None, stages: Sequence[Stage]
    ) -> Difference:
        """A gradient or statistic that departs, with its cause."""
        found = self._difference(tensor, stage)
        if tensor.what == "statistics":
            left = self.twin.state_before.get(tensor.reference)
            right = self.whole_twin.state_before.get(tensor.candidate)
            apart = None if left is None or right is None else best_axes(left, right)
            if apart is not None and apart[1] > SAME:
                sentence = f"{tensor.candidate} differs before the step already: load {tensor.reference}"
                return replace(found, cause=sentence, cause_id="weight-not-loaded")
        own_rule = stage is not None and "custom_derivative" in stage.other.attributes
        certain = found.cause is not None and (found.cause_id != "wrong-custom-derivative" or own_rule)
        if certain or not tensor.what.endswith("gradient"):
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
        """Parameters that the candidate reads here and the reference elsewhere."""
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
        """A value before a departing stage that has no pair because its shape or its order differs."""
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

    def _first_of_its_line(self, last: Stage, stages: Sequence[Stage]) -> tuple[Tensor, Stage]:
        """The first wrong gradient that the candidate makes at the line, in the kind of stage, of the last.

        A line that every block runs is wrong in all of them; outputs are named where it runs first.
        """
        reader = self._reader(last, stages)
        for stage in stages:
            if stage.backward is not None and stage.backward.departs:
                other = self._reader(stage, stages)
                here, there = ((s.value.operation, s.other.where) for s in (other, reader))
                if here == there and here[1] and other is not reader:
                    return stage.backward, other
        assert last.backward is not None
        return last.backward, reader

    def _reader(self, stage: Stage, stages: Sequence[Stage]) -> Stage:
        """The stage that reads a value: its backward pass makes the gradient of that value."""
        return self._reader_of(stage.value.name, stages) or stage

    def _reader_of(self, name: str, stages: Sequence[Stage]) -> Stage | None:
        """The first paired stage that reads a value, an input or a parameter."""
        module = name.rpartition(".")[0]
        for stage in stages:
            of_module = stage.value.module == module and (stage.value.is_module or not module)
            if name in self.twin.state and of_module:
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
        name, other, where = tensor.reference, tensor.candidate, "" if stage is None else stage.other.where
        if cause is not None and cause.place in self.pairs and tensor.what == "output":
            name, other = cause.place, self.pairs[cause.place].candidate
            where = cause.sentence.partition(" ")[0] if where else ""
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
            where=where,
            cause_id="" if cause is None else cause.id,
        )

    def _cause(self, tensor: Tensor, stage: Stage, truth: Array, array: Array) -> Cause | None:
        """Try the hypotheses on the stage alone."""
        departure = self.departure(tensor, stage, truth, array)
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
    if family(value.operation) not in ("convolution", "pooling", "resize", "interpolate", "cat"):
        return None  # only these can give another shape
    return next(iter(same_kind), None)
