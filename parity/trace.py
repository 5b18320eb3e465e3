"""The trace of a model: the values that it computes, in order, and the gradients with respect to them.

An adapter (`torch_model`, `jax_model`, ...) makes a `Model`. `Model.run` returns a `Trace` of plain NumPy
arrays, so that later code depends on no framework.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
Inputs = Any
"""An array, a tuple of arrays (positional arguments), or a dictionary of arrays (keyword arguments)."""


@dataclass(frozen=True)
class Value:
    """One value that a model computes from its inputs.

    Attributes:
        name: unique in the trace and the same in each run: "layer1.conv1", "layer1.add", "add.2".
        operation: the kind, as the framework calls it: "conv2d", "batch_norm", "conv_general_dilated", "add".
        value: the array, as the model computed it, before any replacement.
        gradient: the derivative of the sum of all outputs times their cotangents with respect to the value,
            before any replacement; None without gradients, or where nothing flows back.
        inputs: names of the values and model inputs that the operation reads ("input", "input.1").
        parameters: names of the parameters that the operation reads.
        module: dotted path of the module in which it was computed; "" at the top.
        where: "port.py:41", the line of the user's own code; "" if unknown.
        attributes: arguments of the operation, by the framework's names: strides, padding, eps, ...
        is_module: the value is the output of a whole module, not of a single operation.
    """

    name: str
    operation: str
    value: Array
    gradient: Array | None = None
    inputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    module: str = ""
    where: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    is_module: bool = False


@dataclass(frozen=True)
class Trace:
    """One run of a model.

    Attributes:
        values: floating-point values that depend on the inputs, in the order of computation.
        outputs: the floating-point outputs by name: "output", or "output.0", "output.logits", ...
        output_values: for each output, the name of the value that it is ("" if it is an input itself).
        inputs: floating-point inputs by name: "input", or "input.0", "input.mask", ...
        input_gradients: by name of the input; empty without gradients.
        parameters: by name, in the order of their first use.
        parameter_gradients: by name; 0 where a parameter has no effect; empty without gradients.
        state: running statistics and other state after the run, by name.
        state_before: the same before the run.
    """

    values: Sequence[Value]
    outputs: Mapping[str, Array]
    output_values: Mapping[str, str]
    inputs: Mapping[str, Array]
    input_gradients: Mapping[str, Array]
    parameters: Mapping[str, Array]
    parameter_gradients: Mapping[str, Array]
    state: Mapping[str, Array]
    state_before: Mapping[str, Array] = field(default_factory=dict)


class Model(abc.ABC):
    """A model that `parity.compare` can run. Running it changes nothing of the user's.

    Attributes:
        framework: "torch", "jax", "numpy" or "function".
        records: False if only outputs are known (`function_model`).
    """

    framework: str
    records: bool = True

    @abc.abstractmethod
    def run(
        self,
        inputs: Inputs,
        *,
        float64: bool = False,
        cotangents: Mapping[str, Array] | None = None,
        replace: Mapping[str, Array] | None = None,
        replace_gradients: Mapping[str, Array] | None = None,
    ) -> Trace:
        """Run the model once.

        Args:
            inputs: see `Inputs`; floating-point arrays are converted to the model's precision.
            float64: every floating-point number of the model and its inputs in float64.
            cotangents: by name of the output; None for no gradients.
            replace: by name of the value; the following operations read this in place of it. The gradient
                passes through unchanged.
            replace_gradients: by name of the value; in the backward pass what lies before the value gets
                this in place of its gradient.

        Raises:
            ParityError: the model does not run; the message says what to do.
        """

    @abc.abstractmethod
    def precision(self) -> str:
        """The precision of the parameters: "float32", "float64", "bfloat16", "float16"."""


def segment(trace: Trace, name: str, matched: set[str]) -> list[Value]:
    """The operations from the paired values before a value up to it, in order."""
    by_name = {value.name: value for value in trace.values}
    inside: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in inside or current not in by_name or (current in matched and current != name):
            continue
        inside.add(current)
        waiting += by_name[current].inputs
    return [value for value in trace.values if value.name in inside]


def stage_parameters(trace: Trace, name: str, matched: set[str]) -> list[str]:
    """The parameters that a stage reads, those of its unpaired operations among them."""
    return list(dict.fromkeys(p for value in segment(trace, name, matched) for p in value.parameters))


def random_cotangents(trace: Trace, seed: int) -> dict[str, Array]:
    """Standard normal numbers in the shape of each output; gradients are those of their sum of products."""
    return {
        name: np.random.default_rng([seed, index]).normal(size=array.shape)
        for index, (name, array) in enumerate(trace.outputs.items())
    }


class ParityError(Exception):
    """A comparison that cannot be made. The message is one paragraph for the user."""
