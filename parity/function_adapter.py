"""Any function of arrays, of which only the outputs are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from parity.nesting import arguments, named_arguments, named_leaves
from parity.trace import Array, Inputs, Model, ParityError, Trace


class FunctionModel(Model):
    """A function with outputs alone. See `function_model`."""

    framework = "function"
    records = False

    def __init__(self, f: Callable[..., Any]) -> None:
        self._f = f

    def precision(self) -> str:
        """ "float32": the function gets its inputs in it."""
        return "float32"

    def run(
        self,
        inputs: Inputs,
        *,
        float64: bool = False,
        cotangents: Mapping[str, Array] | None = None,
        replace: Mapping[str, Array] | None = None,
        replace_gradients: Mapping[str, Array] | None = None,
    ) -> Trace:
        """See `Model`. Without values there is nothing to replace, and gradients are not known."""
        dtype = np.float64 if float64 else np.float32

        def convert(value: Any) -> Any:
            array = np.array(value)
            return array.astype(dtype) if array.dtype.kind == "f" else array

        args, kwargs = arguments(inputs, convert)
        named = {name: a.copy() for name, a in named_arguments(args, kwargs).items() if a.dtype.kind == "f"}
        try:
            output = self._f(*args, **kwargs)
        except Exception as error:
            raise ParityError(
                f"the function does not run on these inputs: {type(error).__name__}: {error}"
            ) from error
        outputs = {name: _array(leaf) for name, leaf in named_leaves(output, "output")}
        outputs = {name: array for name, array in outputs.items() if array.dtype.kind == "f"}
        return Trace([], outputs, dict.fromkeys(outputs, ""), named, {}, {}, {}, {})


def _array(leaf: Any) -> Array:
    """A NumPy array of its own; tensors that require gradients are detached, bfloat16 becomes float32."""
    if hasattr(leaf, "detach"):
        leaf = leaf.detach().cpu()
        leaf = (leaf.float() if "bfloat16" in str(leaf.dtype) else leaf).numpy()
    array = np.array(leaf)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def function_model(f: Callable[..., Any]) -> Model:
    """A model of which only the outputs are compared: f(*inputs) -> outputs.

    Args:
        f: any function of NumPy arrays; a dictionary of inputs is passed by keyword. It returns an array, or
            a tuple, list, dictionary or dataclass of arrays (of NumPy, JAX or PyTorch). It gets float32, or
            float64 for its twin, and should compute in the precision of what it gets.

    Examples:
        >>> parity.function_model(lambda x: np.tanh(x) @ w)
    """
    return FunctionModel(f)
