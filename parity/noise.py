"""Noise: differences between runs of the reference that are all equally right.

Three kinds of runs: the reference in its own precision, on numbers moved by a last bit, and on arrays whose
axes lie in memory in another order, for which PyTorch sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

import numpy as np

from parity.axes import largest_error
from parity.tensors import (
    Pick,
    pick_gradient,
    pick_input_gradient,
    pick_output,
    pick_parameter_gradient,
    pick_state,
    pick_value,
)
from parity.trace import Array, Inputs, ParityError, Trace

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
_EVALUATIONS = 2  # moved by last bits, each time others; the last of them with axes in another order

Noise = Mapping[str, Mapping[tuple[Pick, str], float]]
"""{"float64", "native" or "whole": {tensor: its largest absolute difference}}."""


def measure(
    run: Callable[..., Trace], twin: Trace, names: Collection[str], inputs: Inputs, native: str, seed: int
) -> Noise:
    """Run the reference several times, and compare each tensor with the twin's.

    Args:
        run: the reference: run(float64, inputs, replace=...).
        twin: its float64 twin.
        names: of the values that are stages.
        inputs: as the reference takes them.
        native: the precision of the models.
        seed: of the last bits.

    Returns:
        "float64" and "native": each stage alone, on the twin's numbers, in these precisions. "whole": the
        reference as it is, in its own. The runs themselves are not kept.
    """
    values = {value.name: value.value for value in twin.values if value.name in names}
    noise: dict[str, dict[tuple[Pick, str], float]] = {"float64": {}, "native": {}, "whole": {}}

    def add(key: str, trace: Trace) -> None:
        for what, error in _differences(twin, trace, names).items():
            noise[key][what] = max(error, noise[key].get(what, 0.0))

    add("whole", run(False, inputs))
    add("native", run(False, inputs, replace=values))
    for evaluation in range(1, _EVALUATIONS + 1):
        rng = np.random.default_rng([seed, evaluation])
        again = run if evaluation < _EVALUATIONS else partial(_in_another_order, run)
        for key, float64 in (("float64", True), ("native", False)):
            move = partial(_moved, eps=EPS["float64" if float64 else native], rng=rng)
            moved = {name: move(array) for name, array in values.items()}
            add(key, again(float64, _map_inputs(inputs, move), replace=moved))
        add("whole", again(False, _map_inputs(inputs, partial(_moved, eps=EPS[native], rng=rng))))
    return noise


def _differences(twin: Trace, trace: Trace, names: Collection[str]) -> dict[tuple[Pick, str], float]:
    """The largest absolute difference of each tensor of a run of the reference from the twin's."""
    found: dict[tuple[Pick, str], float] = {}
    ours = {value.name: value for value in twin.values if value.name in names}
    for value in trace.values:
        if value.name in ours:
            truth = ours[value.name]
            found[pick_value, value.name] = largest_error(truth.value, value.value, 1.0)
            if truth.gradient is not None or value.gradient is not None:
                a, b = (np.zeros(v.value.shape) if v.gradient is None else v.gradient for v in (truth, value))
                found[pick_gradient, value.name] = largest_error(a, b, 1.0)
    pairs: tuple[tuple[Pick, Mapping[str, Array], Mapping[str, Array]], ...] = (
        (pick_output, twin.outputs, trace.outputs),
        (pick_input_gradient, twin.input_gradients, trace.input_gradients),
        (pick_parameter_gradient, twin.parameter_gradients, trace.parameter_gradients),
        (pick_state, twin.state, trace.state),
    )
    for pick, left, right in pairs:
        found |= {(pick, name): largest_error(left[name], right[name], 1.0) for name in left if name in right}
    return found


def _moved(array: Array, eps: float, rng: np.random.Generator) -> Array:
    """Every number moved by up to half a last bit."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    return np.asarray(array * (1 + eps / 2 * rng.uniform(-1, 1, array.shape)))


def _in_another_order(
    run: Callable[..., Trace], float64: bool, inputs: Inputs, replace: Mapping[str, Array] | None = None
) -> Trace:
    """The run on arrays in another memory order; on those given, if the model's code wants their order."""
    replaced = {name: _channels_last(array) for name, array in (replace or {}).items()}
    try:
        return run(float64, _map_inputs(inputs, _channels_last), replace=replaced)
    except ParityError:  # such as a `view`, which is bound to the order in memory
        return run(float64, inputs, replace=replace)


def _channels_last(array: Array) -> Array:
    """The same array of three or more axes, with the second one last in memory."""
    if array.ndim < 3:
        return array
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


def _map_inputs(inputs: Inputs, change: Callable[[Array], Array]) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: change(np.asarray(array)) for name, array in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(change(np.asarray(array)) for array in inputs)
    return change(np.asarray(inputs))
