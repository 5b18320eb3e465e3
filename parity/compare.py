"""`compare`: run two models side by side and say where they differ.

1. Both run as float64 twins, where rounding is 1e-16, and their values are paired (`alignment`).
2. Every paired value of the candidate is replaced by the reference's, and every gradient likewise. What the
   candidate computes then differs only by the error that each stage makes itself, not by what it was given.
3. The same is done in the models' own precision, which shows a stage that computes too coarsely.
4. Noise is measured on the reference alone: each stage in its own precision against its twin, and each stage
   on numbers moved by a last bit. A stage departs if its error is larger than `FACTOR` times its noise.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np

from parity.alignment import Pair, align, replacements
from parity.axes import best_axes, largest_error, squeeze
from parity.noise import EPS, measure
from parity.report import Report, Stage, Tensor
from parity.tensors import (
    Pick,
    check_finite,
    paired_inputs,
    paired_outputs,
    paired_state,
    pick_gradient,
    pick_input_gradient,
    pick_output,
    pick_parameter_gradient,
    pick_state,
    pick_value,
    value_named,
)
from parity.trace import Array, Inputs, Model, ParityError, Trace, random_cotangents
from parity.verdict import Verdict
from parity.weights import Match, audit

FACTOR = 10.0  # errors above this many times the noise depart, in float64
FACTOR_NATIVE = 30.0  # the same in the models' own precision, where right algorithms differ more
_ROUNDED = 2.0**-7  # a parameter in a lower precision is still the same one
_NAMES = 8  # listed in a note
_TRIALS = 12  # places tried for a wrong gradient


def compare(
    reference: Model,
    candidate: Model,
    inputs: Inputs,
    candidate_inputs: Inputs = None,
    *,
    gradients: bool = True,
    names: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Report:
    """Compare two models on the same inputs: outputs, gradients, running statistics, stage by stage.

    Args:
        reference: the model that is right.
        candidate: the model in question.
        inputs: an array, a tuple (positional) or a dictionary (by keyword), as the reference takes them.
        candidate_inputs: as the candidate takes them, where that differs (NHWC for NCHW); same order.
        gradients: also compare the gradients of a random linear function of the outputs, with respect to
            every value, the inputs and the parameters.
        names: {reference's name: candidate's name} of values that are the same stage, if you know some.
        seed: of that function and of the last bits.

    Raises:
        ParityError: the two cannot be compared; the message says why and what to do.

    Examples:
        >>> models = parity.torch_model(module), parity.nnx_model(port)
        >>> report = parity.compare(*models, x, x.transpose(0, 2, 3, 1))  # NCHW and NHWC
        >>> print(report)
    """
    comparison = _Comparison(reference, candidate, inputs, candidate_inputs, gradients, names, seed)
    return comparison.report()


class _Comparison:
    """The runs of two models and what follows from them."""

    def __init__(
        self,
        reference: Model,
        candidate: Model,
        inputs: Inputs,
        candidate_inputs: Inputs,
        gradients: bool,
        names: Mapping[str, str] | None,
        seed: int,
    ) -> None:
        _require_model("reference", reference)
        _require_model("candidate", candidate)
        self.reference, self.candidate = reference, candidate
        self.inputs, self.names, self.seed = inputs, names, seed
        self.candidate_inputs = inputs if candidate_inputs is None else candidate_inputs
        self.gradients = gradients and reference.records and candidate.records
        self.native = max(reference.precision(), candidate.precision(), key=lambda name: EPS[name])
        self.mixed = reference.precision() != candidate.precision()

    def report(self) -> Report:
        """Make all runs and the verdict."""
        plain = self.reference.run(self.inputs, float64=True)
        theirs = self.candidate.run(self.candidate_inputs, float64=True)
        self.outputs = paired_outputs(plain, theirs)
        check_finite(plain)
        self.cotangents = self._cotangents(plain)
        self.twin = self._run_reference(float64=True)
        self._check_names(theirs)
        del plain, theirs  # a run of a large model takes gigabytes
        pairs = align(self.twin, lambda replace: self._run_candidate(True, replace=replace), self.names)
        self.pairs = pairs
        self.whole_twin = replace(self._without_gradients(self._run_candidate(True)), parameter_gradients={})
        self.weights = audit(self.twin, self._run_candidate(True, replace=self._numbers()), pairs)
        self._check_common()
        # Total errors: the models as they are. Errors made here: each stage on the reference's numbers.
        self.whole = self._of_pairs(self._run_candidate())
        self.alone: dict[bool, Trace] = {}
        self.noise = measure(
            self._run_reference, self.twin, pairs.keys(), self.inputs, self.native, self.seed
        )
        departed = self._departing_gradients()
        gradients = replacements(departed, _as_gradients(self.twin), self.whole_twin)
        replaced = {"replace": self._numbers(), "replace_gradients": gradients}
        self.alone.clear()
        self.alone[True] = self._without_gradients(self._run_candidate(True, **replaced))
        self.alone[False] = self._of_pairs(self._run_candidate(False, **replaced))
        stages = [self._stage(name, pair, name in departed) for name, pair in pairs.items()]
        tensors = self._tensors()
        verdict = Verdict(
            partial(self._run_reference, True), self.twin, self.whole_twin, self.alone, pairs, self.weights
        )
        return Report(
            reference=self.reference.framework,
            candidate=self.candidate.framework,
            precision=self.native,
            stages=stages,
            tensors=tensors,
            weights=self.weights,
            unmatched=self._unmatched(),
            first_difference=verdict.first_difference(stages, tensors),
            notes=self._notes(),
        )

    def _of_pairs(self, trace: Trace) -> Trace:
        """A run of the candidate with its paired values alone."""
        names = {pair.candidate for pair in self.pairs.values()}
        return replace(trace, values=[value for value in trace.values if value.name in names])

    def _without_gradients(self, trace: Trace) -> Trace:
        """A run of the candidate without the gradients of unpaired values, which nobody reads."""
        names = {pair.candidate for pair in self.pairs.values()}
        values = [value if value.name in names else replace(value, gradient=None) for value in trace.values]
        return replace(trace, values=values)

    def _check_names(self, theirs: Trace) -> None:
        """Refuse names that the user gives and a model does not have."""
        for side, trace, names in (
            ("reference", self.twin, self.names.keys() if self.names else ()),
            ("candidate", theirs, self.names.values() if self.names else ()),
        ):
            known = [value.name for value in trace.values]
            for name in names:
                if name not in known:
                    near = ", ".join(difflib.get_close_matches(name, known, 3, 0.0))
                    raise ParityError(f"names: the {side} has no value {name}; the nearest are {near}")

    def _check_common(self) -> None:
        """Refuse two models of which no value and no parameter belong together."""
        matched = any(match.candidate for match in self.weights.matches)
        if self.twin.parameters and not matched and not any(pair.same for pair in self.pairs.values()):
            raise ParityError(
                "the models have nothing in common but the shape of their outputs: no value of the candidate "
                "has the numbers of one of the reference's, and no parameter even its shape. Compare a model "
                "with a port of it, after loading the weights"
            )

    def _notes(self) -> list[str]:
        """Parts not compared."""
        notes = []
        if self.mixed:
            types = f"{self.reference.precision()} and {self.candidate.precision()}"
            notes.append(f"The models are in {types}: rounding was not compared, only their float64 twins.")
        if not (self.reference.records and self.candidate.records):
            notes.append("Of a plain function only outputs are known: no stages, no gradients.")
        left_out = [m.reference for m in self.weights.matches if self.gradients and not self._is_the_same(m)]
        if left_out:
            notes.append(
                "Gradients not compared, of parameters that the candidate stores otherwise: "
                f"{_listed(left_out)}."
            )
        if self.weights.extra:
            notes.append(f"Parameters that only the candidate has: {_listed(self.weights.extra)}.")
        return notes

    def _cotangents(self, plain: Trace) -> tuple[dict[str, Array], dict[str, Array]] | None:
        """Random weights of the outputs, in the layout of each side."""
        if not self.gradients:
            return None
        ours = random_cotangents(plain, self.seed)
        theirs = {}
        for a, (b, axes, shape) in self.outputs.items():
            theirs[b] = squeeze(ours[a]).transpose(np.argsort(axes)).reshape(shape)
        return ours, theirs

    def _run_reference(
        self, float64: bool = False, inputs: Inputs = None, **replaced: Mapping[str, Array]
    ) -> Trace:
        cotangents = None if self.cotangents is None else self.cotangents[0]
        inputs = self.inputs if inputs is None else inputs
        return self.reference.run(inputs, float64=float64, cotangents=cotangents, **replaced)

    def _run_candidate(self, float64: bool = False, **replaced: Mapping[str, Array]) -> Trace:
        cotangents = None if self.cotangents is None else self.cotangents[1]
        return self.candidate.run(self.candidate_inputs, float64=float64, cotangents=cotangents, **replaced)

    def _numbers(self) -> dict[str, Array]:
        """The twin's values in place of the candidate's."""
        return replacements(self.pairs, self.twin, self.whole_twin)

    def _departing_gradients(self) -> dict[str, Pair]:
        """Values whose gradient the candidate computes wrongly from correct gradients of later values.

        Only an error that reaches inputs or parameters counts. In between, correct models may differ: the
        derivative for a mean depends on how the variance is written.
        """
        departed: dict[str, Pair] = {}
        if not self.gradients:
            return departed
        while True:
            wrong, right = self._gradients_compared(departed)
            open_names = self._open_gradients(wrong, right | set(departed))
            values = [value for value in reversed(self.twin.values) if value.name in open_names]
            # One at a time; then all of a kind, for a fault that every step or block of a model has.
            groups = [[value.name] for value in values[:_TRIALS]]
            kinds = dict.fromkeys((value.operation, value.is_module) for value in values)
            groups += [[v.name for v in values if (v.operation, v.is_module) == kind] for kind in kinds]
            best: tuple[int, list[str]] | None = None
            for names in groups:
                if best is not None and len(names) > 1:
                    break
                now, _ = self._gradients_compared({**departed, **{name: self.pairs[name] for name in names}})
                gain = len(wrong) - len(now)
                if gain > 0 and (best is None or gain > best[0]):
                    best = gain, names
            if best is None:
                return departed
            departed.update({name: self.pairs[name] for name in best[1]})

    def _gradients_compared(self, departed: Mapping[str, Pair]) -> tuple[set[str], set[str]]:
        """The inputs and parameters whose gradient is wrong, and the values whose gradient is right."""
        gradients = replacements(departed, _as_gradients(self.twin), self.whole_twin)
        self.alone.clear()  # frees memory for the next
        self.alone[True] = self._run_candidate(True, replace=self._numbers(), replace_gradients=gradients)
        wrong = {tensor.reference for tensor in self._gradients_of_leaves() if tensor.departs}
        right = set()
        for name, pair in self.pairs.items():
            if not self._tensor(
                "input gradient", name, pair.candidate, pair.axes, pick_gradient, self._floor
            ).departs:
                right.add(name)
        return wrong, right

    def _open_gradients(self, wrong: set[str], right: set[str]) -> set[str]:
        """Paired values with wrong gradients that reach a wrong leaf through such values alone."""
        readers: dict[str, list[str]] = {}
        for value in self.twin.values:
            for name in (*value.inputs, *value.parameters):
                readers.setdefault(name, []).append(value.name)
        found: set[str] = set()
        seen: set[str] = set()
        waiting = list(wrong)
        while waiting:
            for name in readers.get(waiting.pop(), ()):
                if name not in seen and name not in right:
                    seen.add(name)
                    waiting.append(name)
                    found |= {name} & set(self.pairs)
        return found

    def _tensor(
        self, what: str, name: str, other: str, axes: tuple[int, ...], pick: Pick, floor: float = 0.0
    ) -> Tensor:
        """Compare one tensor: error and noise of each kind, relative to the tensor's largest magnitude."""
        truth = pick(self.twin, name)
        assert truth is not None
        scale = max(float(np.abs(truth[np.isfinite(truth)]).max(initial=0)), floor)

        def error(theirs: Trace) -> float:
            array = pick(theirs, other)
            if array is None and pick in (pick_value, pick_gradient):
                return 0.0  # this run has no such value: the model's code depends on the precision
            if array is None:
                return largest_error(truth, np.zeros(truth.shape), scale)
            return largest_error(truth, squeeze(array).transpose(axes).reshape(truth.shape), scale)

        def noise(key: str, eps: float) -> float:
            return max(eps, self.noise[key].get((pick, name), 0.0) / scale if scale else 0.0)

        native_eps = EPS[self.native]
        made, made_noise = error(self.alone[True]), noise("float64", EPS["float64"])
        native_noise = noise("native", native_eps)
        native = error(self.alone[False]) if False in self.alone else 0.0
        # A constant such as 0.1 that is stored in float32 is no fault.
        allowed = max(FACTOR * made_noise, 2 * native_eps if self.native != "float64" else 0.0)
        exact = made > allowed
        coarse = not exact and not self.mixed and native > FACTOR_NATIVE * native_noise
        whole = error(self.whole)
        return Tensor(
            what=what,
            reference=name,
            candidate=other,
            shape=truth.shape,
            error=whole,
            noise=noise("whole", native_eps),
            made_here=native if coarse else made,
            allowed=FACTOR_NATIVE * native_noise if coarse else allowed,
            departs=exact or coarse,
            coarse=coarse,
            factor=FACTOR_NATIVE if coarse else FACTOR,
        )

    def _stage(self, name: str, pair: Pair, departs: bool) -> Stage:
        value, other = value_named(self.twin, name), value_named(self.whole_twin, pair.candidate)
        forward = self._tensor("output", name, pair.candidate, pair.axes, pick_value)
        backward = None
        if self.gradients and value.gradient is not None:
            backward = self._tensor(
                "input gradient", name, pair.candidate, pair.axes, pick_gradient, self._floor
            )
            backward = replace(backward, departs=departs)
        return Stage(value=value, other=other, pair=pair, forward=forward, backward=backward)

    @cached_property
    def _floor(self) -> float:
        """Gradients far below the largest are rounding: that of a bias before batch norm is exactly 0."""
        gradients = (*self.twin.parameter_gradients.values(), *self.twin.input_gradients.values())
        return 1e-7 * max((float(np.abs(array).max(initial=0)) for array in gradients), default=0.0)

    def _gradients_of_leaves(self) -> list[Tensor]:
        """The gradients of inputs and parameters."""
        tensors, floor = [], self._floor
        theirs = self.whole_twin.inputs
        for a, b in paired_inputs(self.twin, self.whole_twin):
            found = best_axes(self.twin.inputs[a], theirs[b])
            if found is not None:
                tensors.append(self._tensor("input gradient", a, b, found[0], pick_input_gradient, floor))
        for match in self.weights.matches:
            if self._is_the_same(match) and match.reference in self.twin.parameter_gradients:
                names = match.reference, match.candidate
                tensors.append(
                    self._tensor("parameter gradient", *names, match.axes, pick_parameter_gradient, floor)
                )
        return tensors

    def _is_the_same(self, match: Match) -> bool:
        """True if the candidate stores a parameter by itself, in the same shape: its gradient is the same.

        A kernel that a batch norm was merged into has another one.
        """
        ours = self.twin.parameters[match.reference]
        if not match.candidate or len(match.axes) != squeeze(ours).ndim:
            return False
        theirs = squeeze(self.whole_twin.parameters[match.candidate]).transpose(match.axes)
        return match.equal or largest_error(squeeze(ours), theirs) < _ROUNDED

    def _tensors(self) -> list[Tensor]:
        """Gradients of inputs and parameters, and the state after the run."""
        tensors = []
        for a, (b, axes, _) in self.outputs.items():
            if self.twin.output_values[a] not in self.pairs:
                tensors.append(self._tensor("output", a, b, axes, pick_output))
        tensors += self._gradients_of_leaves() if self.gradients else []
        modules = {}
        for name, pair in self.pairs.items():
            ours, theirs = value_named(self.twin, name), value_named(self.whole_twin, pair.candidate)
            if ours.is_module:
                modules[ours.module] = theirs.module
        for a, b, axes in paired_state(self.twin, self.alone[True], modules):
            tensors.append(self._tensor("statistics", a, b, axes, pick_state))
        return tensors

    def _unmatched(self) -> list[str]:
        """Modules of the reference without a counterpart."""
        paired = set(self.pairs)
        return [value.name for value in self.twin.values if value.is_module and value.name not in paired]


def _require_model(side: str, model: object) -> None:
    if not isinstance(model, Model):
        adapters = "torch_model, nnx_model, linen_model, jax_model, numpy_model or function_model"
        raise ParityError(f"the {side} is a {type(model).__name__}: put it into parity.{adapters}")


def _listed(names: Sequence[str]) -> str:
    """The names, of many only the first."""
    if len(names) <= _NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:_NAMES])} and {len(names) - _NAMES} more"


def _as_gradients(trace: Trace) -> Trace:
    """The trace with its gradients in place of its values; values without one are left out."""
    values = [replace(value, value=value.gradient) for value in trace.values if value.gradient is not None]
    return replace(trace, values=values)
