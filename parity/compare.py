"""`compare`: run two models side by side and say where they part.

1. Both run as float64 twins, where rounding is 1e-16, and their values are paired (`alignment`).
2. Every paired value of the candidate is replaced by the reference's, and every gradient likewise. What the
   candidate computes then differs only by the error that each stage makes itself, not by what it was given.
3. The same is done in the models' own precision, which shows a stage that computes too coarsely.
4. Noise is measured on the reference alone: each stage in its own precision against its twin, and each stage
   on numbers moved by a last bit. A stage departs if its error is larger than `FACTOR` times its noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from parity.alignment import (
    SAME,
    Pair,
    align,
    best_axes,
    departing_axes,
    family,
    largest_error,
    replacements,
    squeeze,
    to_reference,
    usual_axes,
)
from parity.causes import Cause, Departure
from parity.causes.search import find_cause, find_precision
from parity.report import Difference, Report, Stage, Tensor
from parity.trace import Array, Inputs, Model, ParityError, Trace, Value, random_cotangents
from parity.weights import audit, segment, stage_parameters

_Pick = Callable[[Trace, str], Array | None]

FACTOR = 10.0  # errors above this many times the noise depart, in float64
FACTOR_NATIVE = 30.0  # the same in the models' own precision, where right algorithms differ more
_EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
_TRIALS = 12  # places tried for a wrong gradient
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
        self.reference, self.candidate = reference, candidate
        self.inputs, self.names, self.seed = inputs, names, seed
        self.candidate_inputs = inputs if candidate_inputs is None else candidate_inputs
        self.gradients = gradients and reference.records and candidate.records
        self.native = max(reference.precision(), candidate.precision(), key=lambda name: _EPS[name])
        self.mixed = reference.precision() != candidate.precision()

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
        self.whole = self._run_candidate()
        self.whole_twin = self._run_candidate(True)
        self.alone = {True: self._run_candidate(True, replace=self._numbers())}
        self.noise = self._noise()
        departed = self._departing_gradients()
        gradients = replacements(departed, _as_gradients(self.twin), self.whole_twin)
        self.alone = {
            float64: self._run_candidate(float64, replace=self._numbers(), replace_gradients=gradients)
            for float64 in (True, False)
        }
        stages = [self._stage(name, pair, name in departed) for name, pair in pairs.items()]
        tensors = self._tensors()
        return Report(
            reference=self.reference.framework,
            candidate=self.candidate.framework,
            precision=self.native,
            stages=stages,
            tensors=tensors,
            weights=self.weights,
            unmatched=self._unmatched(),
            first_difference=self._first_difference(stages, tensors),
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        """What was not compared."""
        notes = []
        if self.mixed:
            types = self.reference.precision(), self.candidate.precision()
            both = "The reference is in {}, the candidate in {}".format(*types)
            notes.append(f"{both}: rounding was not compared, only their float64 twins.")
        if not (self.reference.records and self.candidate.records):
            notes.append("Of a plain function only outputs are known: no stages, no gradients.")
        if self.weights.extra:
            notes.append(f"Parameters that only the candidate has: {', '.join(self.weights.extra)}.")
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

    def _noise(self) -> dict[str, list[Trace]]:
        """Runs of the reference that are as right as the twin but for last bits.

        "float64" and "native": each stage on the twin's numbers, moved by last bits. "whole": the reference
        as it is, and on inputs moved by last bits.
        """
        values = {value.name: value.value for value in self.twin.values if value.name in self.pairs}
        noisy: dict[str, list[Trace]] = {"float64": [], "native": [], "whole": [self._run_reference()]}
        noisy["native"].append(self._run_reference(False, replace=values))
        for seed in _LAST_BITS:
            rng = np.random.default_rng([self.seed, seed])
            for key, float64 in (("float64", True), ("native", False)):
                eps = _EPS["float64" if float64 else self.native]
                moved = {name: _moved(array, eps, rng) for name, array in values.items()}
                inputs = _map_inputs(self.inputs, partial(_moved, eps=eps, rng=rng))
                noisy[key].append(self._run_reference(float64, inputs, replace=moved))
            inputs = _map_inputs(self.inputs, partial(_moved, eps=_EPS[self.native], rng=rng))
            noisy["whole"].append(self._run_reference(False, inputs))
        return noisy

    def _departing_gradients(self) -> dict[str, Pair]:
        """Values whose gradient the candidate computes wrongly from right gradients behind them.

        Only a gradient that spoils those of inputs or parameters counts. Between them two right models may
        differ: the derivative by a mean depends on how the variance beside it was written.
        """
        departed: dict[str, Pair] = {}
        if not self.gradients:
            return departed
        while True:
            wrong, right = self._gradients_compared(departed)
            open_names = self._open_gradients(wrong, right | set(departed))
            best: tuple[int, str] | None = None
            for name in [value.name for value in reversed(self.twin.values) if value.name in open_names][
                :_TRIALS
            ]:
                now, _ = self._gradients_compared({**departed, name: self.pairs[name]})
                gain = len(wrong) - len(now)
                if gain > 0 and (best is None or gain > best[0]):
                    best = gain, name
            if best is None:
                return departed
            departed[best[1]] = self.pairs[best[1]]

    def _gradients_compared(self, departed: Mapping[str, Pair]) -> tuple[set[str], set[str]]:
        """The inputs and parameters whose gradient is wrong, and the values whose gradient is right."""
        gradients = replacements(departed, _as_gradients(self.twin), self.whole_twin)
        self.alone[True] = self._run_candidate(True, replace=self._numbers(), replace_gradients=gradients)
        wrong = {tensor.reference for tensor in self._gradients_of_leaves() if tensor.departs}
        right = set()
        for name, pair in self.pairs.items():
            if not self._tensor(
                "input gradient", name, pair.candidate, pair.axes, _pick_gradient, self._floor()
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
            errors = [
                largest_error(truth, array, scale)
                for t in self.noise[key]
                if (array := pick(t, name)) is not None
            ]
            return max([eps, *errors])

        native_eps = _EPS[self.native]
        made, made_noise = error(self.alone[True]), noise("float64", _EPS["float64"])
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
        )

    def _stage(self, name: str, pair: Pair, departs: bool) -> Stage:
        value, other = _value(self.twin, name), _value(self.whole_twin, pair.candidate)
        forward = self._tensor("output", name, pair.candidate, pair.axes, _pick_value)
        backward = None
        if self.gradients and value.gradient is not None:
            backward = self._tensor(
                "input gradient", name, pair.candidate, pair.axes, _pick_gradient, self._floor()
            )
            backward = replace(backward, departs=departs)
        return Stage(value=value, other=other, pair=pair, forward=forward, backward=backward)

    def _floor(self) -> float:
        """Gradients far below the largest are rounding: that of a bias before batch norm is exactly 0."""
        gradients = (*self.twin.parameter_gradients.values(), *self.twin.input_gradients.values())
        return 1e-7 * max((float(np.abs(array).max(initial=0)) for array in gradients), default=0.0)

    def _gradients_of_leaves(self) -> list[Tensor]:
        """The gradients of inputs and parameters."""
        tensors, floor = [], self._floor()
        theirs = self.whole_twin.inputs
        for a, b in zip(self.twin.input_gradients, self.whole_twin.input_gradients, strict=False):
            found = best_axes(self.twin.inputs[a], theirs[b])
            if found is not None:
                tensors.append(self._tensor("input gradient", a, b, found[0], _pick_input_gradient, floor))
        for match in self.weights.matches:
            if match.candidate and match.reference in self.twin.parameter_gradients:
                names = match.reference, match.candidate
                tensors.append(
                    self._tensor("parameter gradient", *names, match.axes, _pick_parameter_gradient, floor)
                )
        return tensors

    def _tensors(self) -> list[Tensor]:
        """Gradients of inputs and parameters, and the state after the run."""
        tensors = []
        for a, (b, axes, _) in self.outputs.items():
            if self.twin.output_values[a] not in self.pairs:
                tensors.append(self._tensor("output", a, b, axes, _pick_output))
        tensors += self._gradients_of_leaves() if self.gradients else []
        for a, b, axes in _paired_state(self.twin, self.alone[True]):
            tensors.append(self._tensor("statistics", a, b, axes, _pick_state))
        return tensors

    def _unmatched(self) -> list[str]:
        """Modules of the reference without a counterpart."""
        paired = set(self.pairs)
        return [value.name for value in self.twin.values if value.is_module and value.name not in paired]

    def _first_difference(self, stages: Sequence[Stage], tensors: Sequence[Tensor]) -> Difference | None:
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
        theirs = segment(self.whole_twin, stage.other.name, {pair.candidate for pair in self.pairs.values()})[
            :-1
        ]
        for value in ours:
            if any(
                best_axes(value.value, other.value) is not None
                for other in theirs
                if _same_kind(value, other)
            ):
                fits = [other for other in theirs if other.value.size == value.value.size]
                reordered = [other for other in fits if _reordered(value.value, other.value)]
                if not reordered:
                    continue
                other = reordered[0]
            else:
                same_kind = [other for other in theirs if _same_kind(value, other)]
                if not same_kind:
                    continue
                other = same_kind[0]
            usual = usual_axes(self.twin, self.whole_twin, {n: p for n, p in self.pairs.items() if p.same})
            pair = Pair(value.name, other.name, departing_axes(value.value, other.value, usual), False)
            made = _pick_value(self.alone[True], other.name)
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
        pick = _PICKS[(tensor.what, is_value)]
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
            noise=tensor.allowed / (FACTOR_NATIVE if tensor.coarse else FACTOR),
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
        other = _pick_value(self.alone[not tensor.coarse], stage.pair.candidate)
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
            noise=tensor.allowed / FACTOR,
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


def _value(trace: Trace, name: str) -> Value:
    return next(value for value in trace.values if value.name == name)


def _pick_value(trace: Trace, name: str) -> Array | None:
    return next((value.value for value in trace.values if value.name == name), None)


def _pick_output(trace: Trace, name: str) -> Array | None:
    return trace.outputs.get(name)


def _pick_gradient(trace: Trace, name: str) -> Array | None:
    """The gradient; 0 where nothing flows back."""
    value = next((value for value in trace.values if value.name == name), None)
    if value is None:
        return None
    return np.zeros(value.value.shape) if value.gradient is None else value.gradient


def _pick_input_gradient(trace: Trace, name: str) -> Array | None:
    return trace.input_gradients.get(name)


def _pick_parameter_gradient(trace: Trace, name: str) -> Array | None:
    return trace.parameter_gradients.get(name)


def _pick_state(trace: Trace, name: str) -> Array | None:
    return trace.state.get(name)


_PICKS: dict[tuple[str, bool], _Pick] = {
    ("output", True): _pick_value,
    ("output", False): _pick_output,
    ("input gradient", True): _pick_gradient,
    ("input gradient", False): _pick_input_gradient,
    ("parameter gradient", False): _pick_parameter_gradient,
    ("statistics", False): _pick_state,
}


def _as_gradients(trace: Trace) -> Trace:
    """The trace with its gradients in place of its values; values without one are left out."""
    values = [replace(value, value=value.gradient) for value in trace.values if value.gradient is not None]
    return replace(trace, values=values)


def _moved(array: Array, eps: float, rng: np.random.Generator) -> Array:
    """Every number moved by up to half a last bit."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    return np.asarray(array * (1 + eps / 2 * rng.uniform(-1, 1, array.shape)))


def _map_inputs(inputs: Inputs, change: Callable[[Array], Array]) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: change(np.asarray(array)) for name, array in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(change(np.asarray(array)) for array in inputs)
    return change(np.asarray(inputs))


def _paired_outputs(ours: Trace, theirs: Trace) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """{reference's output: (candidate's, axes, its shape)}, in their order."""
    if len(ours.outputs) != len(theirs.outputs):
        raise ParityError(
            f"the reference gives {len(ours.outputs)} outputs ({', '.join(ours.outputs)}), the candidate "
            f"{len(theirs.outputs)} ({', '.join(theirs.outputs)}): let both return the same, in one order"
        )
    pairs = {}
    for (a, left), (b, right) in zip(ours.outputs.items(), theirs.outputs.items(), strict=True):
        found = best_axes(left, right)
        if found is None:
            raise ParityError(
                f"{a} of the reference has shape {list(left.shape)}, of the candidate {list(right.shape)}, "
                "which no order of axes makes equal: check the sizes of both models and what each is given "
                "(candidate_inputs= for another layout)"
            )
        pairs[a] = b, found[0], right.shape
    return pairs


def _check_finite(ours: Trace, theirs: Trace, outputs: Mapping[str, tuple[str, Any, Any]]) -> None:
    """Refuse a reference without finite numbers: nothing can be compared with it."""
    for name, array in ours.outputs.items():
        if not np.isfinite(array).all():
            first = next((v.name for v in ours.values if not np.isfinite(v.value).all()), name)
            raise ParityError(
                f"the reference itself gives NaN or infinity, first at {first}: give other inputs or weights"
            )


def _paired_state(ours: Trace, theirs: Trace) -> list[tuple[str, str, tuple[int, ...]]]:
    """Running statistics of both, by equal numbers, then by shape in their order."""
    pairs: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    taken: set[str] = set()
    for limit in (1e-6, np.inf):
        for a, left in ours.state.items():
            fits = (
                []
                if a in pairs
                else [
                    (found[1], index, b, found[0])
                    for index, (b, right) in enumerate(theirs.state.items())
                    if b not in taken and (found := best_axes(left, right)) is not None and found[1] <= limit
                ]
            )
            if fits and left.size > 1:
                _, _, b, axes = min(fits, key=lambda fit: (fit[0] > 1e-6, _kind(fit[2]) != _kind(a), fit[1]))
                pairs[a] = a, b, axes
                taken.add(b)
    return [pairs[a] for a in ours.state if a in pairs]


def _same_kind(a: Value, b: Value) -> bool:
    return family(a.operation) == family(b.operation)


def _reordered(a: Array, b: Array) -> bool:
    """True if two arrays have the same numbers, but are not the same with other axes."""
    found = best_axes(a, b)
    if found is not None and found[1] <= SAME:
        return False
    return largest_error(np.sort(a, axis=None), np.sort(b, axis=None)) <= SAME


def _kind(name: str) -> str:
    """Mean or variance, as far as a name tells."""
    last = name.rpartition(".")[2]
    return "var" if "var" in last else "mean" if "mean" in last else last
