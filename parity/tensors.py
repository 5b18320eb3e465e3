"""The tensors of two traces: how one is picked by its name, and which belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from parity.axes import best_axes
from parity.trace import Array, ParityError, Trace, Value

_EQUAL = 1e-6  # of statistics, relative

Pick = Callable[[Trace, str], Array | None]
"""Returns the array of a trace that has this name; None if it has none."""


def value_named(trace: Trace, name: str) -> Value:
    """The value of that name."""
    return next(value for value in trace.values if value.name == name)


def pick_value(trace: Trace, name: str) -> Array | None:
    """A value."""
    return next((value.value for value in trace.values if value.name == name), None)


def pick_output(trace: Trace, name: str) -> Array | None:
    """An output."""
    return trace.outputs.get(name)


def pick_gradient(trace: Trace, name: str) -> Array | None:
    """The gradient for a value; 0 where nothing flows back."""
    value = next((value for value in trace.values if value.name == name), None)
    if value is None:
        return None
    return np.zeros(value.value.shape) if value.gradient is None else value.gradient


def pick_input_gradient(trace: Trace, name: str) -> Array | None:
    """The gradient for an input."""
    return trace.input_gradients.get(name)


def pick_parameter_gradient(trace: Trace, name: str) -> Array | None:
    """The gradient for a parameter."""
    return trace.parameter_gradients.get(name)


def pick_state(trace: Trace, name: str) -> Array | None:
    """A running statistic after the run."""
    return trace.state.get(name)


PICKS: dict[tuple[str, bool], Pick] = {
    ("output", True): pick_value,
    ("output", False): pick_output,
    ("input gradient", True): pick_gradient,
    ("input gradient", False): pick_input_gradient,
    ("parameter gradient", False): pick_parameter_gradient,
    ("statistics", False): pick_state,
}


def paired_inputs(ours: Trace, theirs: Trace) -> list[tuple[str, str]]:
    """The floating-point inputs of both: by name if the names are the same, else in their order."""
    if ours.inputs.keys() == theirs.inputs.keys():
        return [(name, name) for name in ours.inputs]
    return list(zip(ours.inputs, theirs.inputs, strict=False))


def paired_outputs(ours: Trace, theirs: Trace) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """{reference's output: (candidate's, axes, its shape)}, in their order."""
    for side, trace in (("reference", ours), ("candidate", theirs)):
        if not any(array.size for array in trace.outputs.values()):
            raise ParityError(
                f"the {side} gives no floating-point number: compare what it computes before argmax or "
                "rounding, on inputs that are not empty"
            )
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


def check_finite(ours: Trace) -> None:
    """Refuse a reference without finite numbers: nothing can be compared with it."""
    for name, array in ours.outputs.items():
        if not np.isfinite(array).all():
            first = next((v.name for v in ours.values if not np.isfinite(v.value).all()), name)
            raise ParityError(
                f"the reference itself gives NaN or infinity, first at {first}: give other inputs or weights"
            )


def paired_state(
    ours: Trace, theirs: Trace, modules: Mapping[str, str]
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Running statistics of both: pairs that are equal after the step, before it, or alike by name.

    Where a module of the candidate has the same statistic twice (the running average and the sum that it is
    made from), nothing tells which one evaluation reads. One that departs is taken, so that none is missed.

    Args:
        modules: {reference's module: candidate's} of paired values.
    """
    fits: list[tuple[tuple[bool, ...], int, int, str, str, tuple[int, ...]]] = []
    twice = _stored_twice(theirs)
    for i, (a, left) in enumerate(ours.state.items()):
        for j, (b, right) in enumerate(theirs.state.items()):
            found = None if left.size == 1 else best_axes(left, right)
            if found is not None:
                before = ours.state_before.get(a), theirs.state_before.get(b)
                module, path = modules.get(a.rpartition(".")[0]), b.rpartition(".")[0]
                others = (best_axes(left, theirs.state[name]) for name in twice.get(b, ()))
                hides = found[1] <= _EQUAL and any(o is not None and o[1] > _EQUAL for o in others)
                unlikely = (
                    hides,
                    found[1] > _EQUAL,
                    not _equal(*before),
                    _kind(a) != _kind(b),
                    module not in (path, path.partition(".")[2]),  # Linen puts "batch_stats." before it
                    "hidden" in b,  # Haiku's moving average without its correction
                )
                fits.append((unlikely, i, j, a, b, found[0]))
    pairs: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    taken: set[str] = set()
    for _, _, _, a, b, axes in sorted(fits, key=lambda fit: fit[:3]):
        if a not in pairs and b not in taken:
            pairs[a] = a, b, axes
            taken.add(b)
    return [pairs[a] for a in ours.state if a in pairs]


def _stored_twice(trace: Trace) -> dict[str, list[str]]:
    """For each statistic those of the same module and kind that were equal to it before the step."""
    before = trace.state_before
    return {
        name: [
            other
            for other in before
            if other != name
            and other.rpartition(".")[0] == name.rpartition(".")[0]
            and _kind(other) == _kind(name)
            and np.array_equal(before[other], before[name])
        ]
        for name in trace.state
        if name in before
    }


def _equal(left: Array | None, right: Array | None) -> bool:
    """True if both have equal numbers that are not constant, as initial statistics often are."""
    if left is None or right is None or np.ptp(left) == 0:
        return False
    found = best_axes(left, right)
    return found is not None and found[1] <= _EQUAL


def _kind(name: str) -> str:
    """Mean or variance, as far as a name tells."""
    for part in reversed(name.lower().replace("/", ".").split(".")):
        if "var" in part or "mean" in part:
            return "var" if "var" in part else "mean"
    return name.rpartition(".")[2]
