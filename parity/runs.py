"""The runs that a comparison made, and what follows from them about one stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from parity.alignment import SAME, Pair, to_reference
from parity.axes import best_axes, squeeze
from parity.causes import Departure
from parity.report import Stage, Tensor
from parity.tensors import pick_value
from parity.trace import Array, Trace, segment


@dataclass(frozen=True)
class Runs:
    """The runs of two models.

    Attributes:
        rerun: runs the reference's float64 twin; `replace` and `replace_gradients` as in `Model.run`.
        twin: the reference's float64 twin.
        whole_twin: the candidate's, as it is.
        alone: the candidate with each stage on the reference's numbers: {True: in float64, False: as it is}.
        pairs: of values, by the reference's name.
    """

    rerun: Callable[..., Trace]
    twin: Trace
    whole_twin: Trace
    alone: Mapping[bool, Trace]
    pairs: Mapping[str, Pair]

    def departure(self, tensor: Tensor, stage: Stage, truth: Array, array: Array) -> Departure:
        """The facts from which the cause of a stage's departure is found.

        The inputs of a module are those of the whole module. Where the module has the name of its last
        operation, its output is treated as that operation's alone.
        """
        module = stage.value.module
        ours = segment(self.twin, stage.value.name, set(self.pairs))
        named_by_class = stage.value.operation[:1].isupper()  # else by the last operation of the module
        if stage.value.is_module and (named_by_class or tensor.what != "output"):
            ours = [value for value in ours if f"{value.module}.".startswith(f"{module}.")]
        else:
            ours = ours[-1:]
        candidates = {pair.candidate for pair in self.pairs.values()}
        read = dict.fromkeys(name for value in ours for name in value.inputs)
        arrays = {**self.twin.inputs, **{value.name: value.value for value in self.twin.values}}
        inside = {value.name for value in ours}
        other = pick_value(self.alone[not tensor.coarse], stage.pair.candidate)
        if other is None:  # the run in the model's own precision has no such value
            other = pick_value(self.alone[True], stage.pair.candidate)
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
            state={
                n: a
                for n, a in self.twin.state_before.items()
                if n.startswith(f"{module}." if module else "")
            },
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
            readers=tuple(
                value.operation.lower() for value in self.twin.values if stage.value.name in value.inputs
            ),
        )

    def where_of(self, name: str, stage: Stage) -> str:
        """The candidate's line of the value paired with `name`, else the first of the stage's segment."""
        if name in self.pairs:
            other = self.pairs[name].candidate
            where = next((value.where for value in self.whole_twin.values if value.name == other), "")
            return where or stage.other.where
        taken = {pair.candidate for pair in self.pairs.values()}
        inside = segment(self.whole_twin, stage.other.name, taken)
        return next((value.where for value in inside if value.where), stage.other.where)
