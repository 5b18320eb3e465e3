"""`compare`: run two models side by side and say where they part.

1. Both run as float64 twins, where rounding is 1e-16, and their values are paired (`alignment`).
2. Every paired value of the candidate is replaced by the reference's, and every gradient likewise. What the
   candidate computes then differs only by the error that each stage makes itself, not by what it was given.
3. The same is done in the models' own precision, which shows a stage that computes too coarsely.
4. Noise is measured on the reference alone: each stage in its own precision against its twin, and each stage
   on numbers moved by a last bit. A stage departs if its error is larger than `FACTOR` times its noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from parity.alignment import Pair, align, best_axes, largest_error, replacements, squeeze, to_reference
from parity.causes import Cause, Departure
from parity.report import Difference, Report, Stage, Tensor
from parity.trace import Array, Inputs, Model, ParityError, Trace, Value
from parity.weights import Audit, audit

FACTOR = 10.0  # errors above this many times the noise depart, in float64
FACTOR_NATIVE = 30.0  # the same in the models' own precision, where right algorithms differ more
_EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
_LAST_BITS = (1, 2)  # seeds of the numbers moved by a last bit


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

    Example:
        >>> report = parity.compare(parity.torch_model(module), parity.nnx_model(port), x, x.transpose(0, 2, 3, 1))
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
        self.reference, self.candidate = reference, candidate
        self.inputs, self.names, self.seed = inputs, names, seed
        self.candidate_inputs = inputs if candidate_inputs is None else candidate_inputs
        self.gradients = gradients and reference.records and candidate.records
        self.native = reference.precision()

    def report(self) -> Report:
        """Make all runs and the verdict."""
        plain = self.reference.run(self.inputs, float64=True)
        theirs = self.candidate.run(self.candidate_inputs, float64=True)
        self.outputs = _paired_outputs(plain, theirs)
        _check_finite(plain, theirs, self.outputs)
        self.cotangents = self._cotangents(plain)
        self.twin = self._run_reference(float64=True)
        pairs = align(self.twin, lambda replace: self._run_candidate(True, replace=replace), self.names)
        self.pairs = pairs
        self.weights = audit(self.twin, theirs, pairs)
        # Total errors: the models as they are. Errors made here: each stage on the reference's numbers.
        self.whole = self._run_reference(), self._run_candidate()
        self.whole_twin = self.twin, self._run_candidate(True)
        self.alone = {True: self._alone(True), False: self._alone(False)}
        self.noise = self._noise()
        stages = [self._stage(name, pair) for name, pair in pairs.items()]
        tensors = self._tensors()
        unmatched = self._unmatched()
        first = self._first_difference(stages, tensors)
        return Report(
            reference=self.reference.framework,
            candidate=self.candidate.framework,
            precision=self.native,
            stages=stages,
            tensors=tensors,
            weights=self.weights,
            unmatched=unmatched,
            first_difference=first,
        )

    def _cotangents(self, plain: Trace) -> tuple[dict[str, Array], dict[str, Array]] | None:
        """Random weights of the outputs, in the layout of each side."""
        if not self.gradients:
            return None
        ours, theirs = {}, {}
        for index, (a, (b, axes, shape)) in enumerate(self.outputs.items()):
            rng = np.random.default_rng([self.seed, index])
            ours[a] = rng.normal(size=plain.outputs[a].shape)
            theirs[b] = squeeze(ours[a]).transpose(np.argsort(axes)).reshape(shape)
        return ours, theirs

    def _run_reference(self, float64: bool = False, inputs: Inputs = None, **replaced: Mapping[str, Array]) -> Trace:
        cotangents = None if self.cotangents is None else self.cotangents[0]
        inputs = self.inputs if inputs is None else inputs
        return self.reference.run(inputs, float64=float64, cotangents=cotangents, **replaced)

    def _run_candidate(self, float64: bool = False, **replaced: Mapping[str, Array]) -> Trace:
        cotangents = None if self.cotangents is None else self.cotangents[1]
        return self.candidate.run(self.candidate_inputs, float64=float64, cotangents=cotangents, **replaced)

    def _alone(self, float64: bool) -> tuple[Trace, Trace]:
        """Both models, each stage on the twin's numbers: forward its inputs, backward its output's gradient."""
        values, gradients = _numbers(self.twin, self.pairs)
        ours = self._run_reference(float64, replace=values, replace_gradients=gradients)
        shapes = self.whole_twin[1]
        replace = replacements(self.pairs, self.twin, shapes)
        replace_gradients = replacements(self.pairs, _as_gradients(self.twin), shapes)
        theirs = self._run_candidate(float64, replace=replace, replace_gradients=replace_gradients)
        return ours, theirs

    def _noise(self) -> dict[str, list[Trace]]:
        """Runs of the reference that are as right as the twin but for last bits, each stage alone."""
        values, gradients = _numbers(self.twin, self.pairs)
        noisy: dict[str, list[Trace]] = {"float64": [], "native": [self.alone[False][0]], "whole": [self.whole[0]]}
        for seed in _LAST_BITS:
            rng = np.random.default_rng([self.seed, seed])
            for key, float64 in (("float64", True), ("native", False)):
                eps = _EPS["float64" if float64 else self.native]
                moved = [{n: _moved(a, eps, rng) for n, a in arrays.items()} for arrays in (values, gradients)]
                inputs = _map_inputs(self.inputs, lambda a, eps=eps, rng=rng: _moved(a, eps, rng))
                noisy[key].append(
                    self._run_reference(float64, inputs, replace=moved[0], replace_gradients=moved[1])
                )
            inputs = _map_inputs(self.inputs, lambda a, rng=rng: _moved(a, _EPS[self.native], rng))
            noisy["whole"].append(self._run_reference(False, inputs))
        return noisy

    def _tensor(
        self, what: str, name: str, other: str, axes: tuple[int, ...], pick: _Pick, floor: float = 0.0
    ) -> Tensor:
        """Compare one tensor: error and noise of each kind, relative to the tensor's largest magnitude."""
        truth = pick(self.twin, name)
        assert truth is not None
        scale = max(float(np.abs(truth[np.isfinite(truth)]).max(initial=0)), floor)

        def error(theirs: Trace) -> float:
            array = pick(theirs, other)
            if array is None:
                array = np.zeros([truth.shape[i] for i in range(truth.ndim)])
                return largest_error(truth, array, scale)
            return largest_error(truth, squeeze(array).transpose(axes).reshape(truth.shape), scale)

        def noise(key: str, eps: float) -> float:
            errors = [largest_error(truth, array, scale) for t in self.noise[key] if (array := pick(t, name)) is not None]
            return max([eps, *errors])

        native_eps = _EPS[self.native]
        made, made_noise = error(self.alone[True][1]), noise("float64", _EPS["float64"])
        native, native_noise = error(self.alone[False][1]), noise("native", native_eps)
        # A constant such as 0.1 that is stored in float32 is no fault.
        allowed = max(FACTOR * made_noise, 2 * native_eps if self.native != "float64" else 0.0)
        exact = made > allowed
        coarse = not exact and native > FACTOR_NATIVE * native_noise
        whole = error(self.whole[1])
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
        )

    def _stage(self, name: str, pair: Pair) -> Stage:
        value, other = _value(self.twin, name), _value(self.whole_twin[1], pair.candidate)
        forward = self._tensor("output", name, pair.candidate, pair.axes, _pick_value)
        backward = None
        if self.gradients and value.gradient is not None:
            backward = self._tensor("input gradient", name, pair.candidate, pair.axes, _pick_gradient, self._floor())
        return Stage(value=value, other=other, pair=pair, forward=forward, backward=backward)

    def _floor(self) -> float:
        """Gradients far below the largest are rounding: a bias before batch norm has none in exact arithmetic."""
        largest = [float(np.abs(a).max(initial=0)) for a in self.twin.parameter_gradients.values()]
        largest += [float(np.abs(a).max(initial=0)) for a in self.twin.input_gradients.values()]
        return 1e-7 * max(largest, default=0.0)

    def _tensors(self) -> list[Tensor]:
        """Gradients of inputs and parameters, and the state after the run."""
        tensors = []
        if self.gradients:
            floor = self._floor()
            for a, b in zip(self.twin.input_gradients, self.whole_twin[1].input_gradients, strict=False):
                found = best_axes(self.twin.inputs[a], self.whole_twin[1].inputs[b])
                if found is not None:
                    tensors.append(self._tensor("input gradient", a, b, found[0], _pick_input_gradient, floor))
            for match in self.weights.matches:
                if match.candidate and match.reference in self.twin.parameter_gradients:
                    tensors.append(
                        self._tensor(
                            "parameter gradient", match.reference, match.candidate, match.axes, _pick_parameter_gradient, floor
                        )
                    )
        alone = self.alone[True]
        for a, b, axes in _paired_state(self.alone[True][0], alone[1]):
            tensors.append(self._tensor("statistics", a, b, axes, _pick_state))
        return tensors

    def _unmatched(self) -> list[str]:
        """Modules of the reference without a counterpart."""
        paired = set(self.pairs)
        return [value.name for value in self.twin.values if value.is_module and value.name not in paired]

    def _first_difference(self, stages: Sequence[Stage], tensors: Sequence[Tensor]) -> Difference | None:
        for stage in stages:
            if stage.forward.departs:
                return self._difference(stage.forward, stage)
        for stage in reversed(stages):
            # The gradient of a stage is made by the operations behind it.
            if stage.backward is not None and stage.backward.departs:
                return self._difference(stage.backward, stage)
        for tensor in tensors:
            if tensor.departs:
                return self._difference(tensor, None)
        for fault in self.weights.faults:
            return Difference("parameter", fault.reference, fault.candidate, fault.error, 0.0, None, fault.sentence, "")
        return None

    def _difference(self, tensor: Tensor, stage: Stage | None) -> Difference:
        pick = _PICKS[(tensor.what, stage is not None)]
        trace = self.alone[not tensor.coarse][1]
        truth, array = pick(self.twin, tensor.reference), pick(trace, tensor.candidate)
        assert truth is not None
        index: tuple[int, ...] | None = None
        axes = self._axes(tensor, stage)
        if array is not None:
            array = squeeze(array).transpose(axes).reshape(truth.shape)
            with np.errstate(invalid="ignore"):
                apart = np.nan_to_num(np.abs(truth - array), nan=np.inf)
            index = tuple(int(i) for i in np.unravel_index(int(apart.argmax()), truth.shape))
        cause = None
        where = stage.other.where if stage is not None else ""
        return Difference(
            what=tensor.what,
            reference=tensor.reference,
            candidate=tensor.candidate,
            error=tensor.made_here,
            noise=tensor.allowed / (FACTOR_NATIVE if tensor.coarse else FACTOR),
            index=index,
            cause=cause,
            where=where,
        )

    def _axes(self, tensor: Tensor, stage: Stage | None) -> tuple[int, ...]:
        if stage is not None:
            return stage.pair.axes
        for match in self.weights.matches:
            if tensor.what == "parameter gradient" and match.reference == tensor.reference:
                return match.axes
        found = best_axes(*(np.asarray(_PICKS[(tensor.what, False)](t, n)) for t, n in ((self.twin, tensor.reference), (self.alone[True][1], tensor.candidate))))
        return found[0] if found is not None else ()


_Pick = object  # replaced below
