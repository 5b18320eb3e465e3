"""Models in NumPy: layers and networks with `forward`, `backward` and `parameters()`.

Each layer's `forward` and `backward` are wrapped on a copy. A value is what a layer returns; what it computes
inside is not seen, so layers that are fused into one give one value.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

from parity.nesting import arguments, is_plain, named_arguments, unique_name
from parity.trace import Array, Inputs, Model, ParityError, Trace, Value


class NumpyModel(Model):
    """A layer or network in NumPy. See `numpy_model`."""

    framework = "numpy"

    def __init__(self, layer: Any, train: bool) -> None:
        self._layer, self._train = layer, train

    def precision(self) -> str:
        """See `Model`."""
        types = Counter(str(parameter.value.dtype) for parameter in _parameters(self._layer).values())
        return types.most_common(1)[0][0] if types else "float32"

    def run(
        self,
        inputs: Inputs,
        *,
        float64: bool = False,
        cotangents: Mapping[str, Array] | None = None,
        replace: Mapping[str, Array] | None = None,
        replace_gradients: Mapping[str, Array] | None = None,
    ) -> Trace:
        """See `Model`. The one output is "output"."""
        dtype = "float64" if float64 else self.precision()
        try:
            layer = copy.deepcopy(self._layer)
        except Exception as error:
            raise ParityError(
                f"{type(self._layer).__name__} cannot be copied, and the comparison runs a copy so that "
                f"yours stays as it is: {type(error).__name__}: {error}"
            ) from error
        if float64:
            _widen(layer, {})
        parameters, state = _parameters(layer), _state(layer)

        def convert(value: Any) -> Array:
            array = np.array(value)
            return array.astype(dtype) if array.dtype.kind == "f" else array

        args, kwargs = arguments(inputs, convert)
        named = {name: a for name, a in named_arguments(args, kwargs).items() if a.dtype.kind == "f"}
        before = {name: array.copy() for name, array in named.items()}
        state_before = _arrays(state)
        recorder = _Recorder(parameters, named, replace or {}, replace_gradients or {})
        recorder.wrap(layer)
        if "train" in inspect.signature(layer.forward).parameters:
            kwargs["train"] = self._train
        try:
            output = np.asarray(layer.forward(*args, **kwargs))
            output_value = recorder.name_of(output)
            result = output.copy()
            gradients: dict[str, Array] = {}
            if cotangents is not None:
                gradients = _backward(
                    layer, parameters, cotangents["output"].astype(output.dtype), list(named)
                )
        except Exception as error:
            fault = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ParityError(f"the NumPy model does not run on these inputs: {fault}") from error
        order = dict.fromkeys([*recorder.used, *parameters])
        return Trace(
            values=recorder.values,
            outputs={"output": result},
            output_values={"output": output_value if output_value not in named else ""},
            inputs=before,
            input_gradients={name: gradients[name] for name in named if name in gradients},
            parameters={name: parameters[name].value.copy() for name in order},
            parameter_gradients={
                name: np.array(parameters[name].grad) for name in order if cotangents is not None
            },
            state=_arrays(state),
            state_before=state_before,
        )


def _backward(layer: Any, parameters: Mapping[str, Any], dy: Array, inputs: list[str]) -> dict[str, Array]:
    """Run the backward pass from gradients of 0. Return the inputs' gradients."""
    for parameter in parameters.values():
        if hasattr(parameter, "zero_grad"):
            parameter.zero_grad()
        else:
            parameter.grad = np.zeros_like(parameter.value)
    dx = layer.backward(dy)
    every = dx if isinstance(dx, tuple | list) else (dx,)
    return {name: np.array(array) for name, array in zip(inputs, every, strict=False) if array is not None}


class _Recorder:
    """Wraps layers so that what they return is recorded."""

    def __init__(
        self,
        parameters: Mapping[str, Any],
        inputs: Mapping[str, Array],
        replace: Mapping[str, Array],
        replace_gradients: Mapping[str, Array],
    ) -> None:
        self.values: list[Value] = []
        self.used: dict[str, None] = {}
        self._parameters = parameters
        self._replace, self._replace_gradients = replace, replace_gradients
        self._taken = set(inputs)
        self._arrays = {id(array): (name, array) for name, array in inputs.items()}

    def name_of(self, array: Any) -> str:
        """The name of the value or input that an array is or is a view of; "" if it is none."""
        base = getattr(array, "base", None)
        return next((self._arrays[id(a)][0] for a in (array, base) if id(a) in self._arrays), "")

    def wrap(self, layer: Any) -> None:
        """Wrap a layer and all its parts, each once."""
        seen: set[int] = set()
        for path, part in _walk(layer, ""):
            if id(part) not in seen:
                seen.add(id(part))
                self._wrap_one(path, part)

    def _wrap_one(self, path: str, layer: Any) -> None:
        forward, backward = layer.forward, layer.backward
        calls: list[int | None] = []  # the value that each call gave, for the backward that belongs to it
        own = {id(value) for value in vars(layer).values()}
        names = tuple(name for name, parameter in self._parameters.items() if id(parameter) in own)
        attributes = {k: v for k, v in vars(layer).items() if not k.startswith("_") and is_plain(v)}

        @functools.wraps(forward)
        def recorded_forward(*args: Any, **kwargs: Any) -> Any:
            self.used.update(dict.fromkeys(names))
            out = forward(*args, **kwargs)
            is_value = isinstance(out, np.ndarray) and out.dtype.kind == "f" and id(out) not in self._arrays
            calls.append(len(self.values) if is_value else None)
            if not is_value:
                return out
            read = [self.name_of(a) for a in (*args, *kwargs.values()) if isinstance(a, np.ndarray)]
            value = Value(
                name=unique_name(path or type(layer).__name__, self._taken),
                operation=type(layer).__name__,
                value=out.copy(),
                inputs=tuple(dict.fromkeys(name for name in read if name)),
                parameters=names,
                module=path,
                where=_where(layer),
                attributes={**attributes, **_training(forward, args, kwargs)},
                is_module=True,
            )
            self.values.append(value)
            if value.name in self._replace:
                out = np.array(self._replace[value.name], out.dtype)
            self._arrays[id(out)] = value.name, out
            return out

        @functools.wraps(backward)
        def recorded_backward(dy: Any, *args: Any, **kwargs: Any) -> Any:
            index = calls.pop() if calls else None
            if index is not None:
                value = self.values[index] = replace(self.values[index], gradient=np.array(dy))
                if value.name in self._replace_gradients:
                    dy = np.array(self._replace_gradients[value.name], dy.dtype)
            return backward(dy, *args, **kwargs)

        layer.forward, layer.backward = recorded_forward, recorded_backward


def _walk(layer: Any, path: str) -> Iterator[tuple[str, Any]]:
    """A layer and all its parts by dotted path."""
    yield path, layer
    for name, part in _parts(layer):
        yield from _walk(part, f"{path}.{name}" if path else name)


def _parts(layer: Any) -> Iterator[tuple[str, Any]]:
    """The layers that a layer is made of: by its own `parts()`, else its attributes and their items."""
    if callable(getattr(layer, "parts", None)):
        yield from layer.parts()
        return

    def layers_in(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if _is_layer(value):
            yield name, value
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                yield from layers_in(f"{name}.{index}", item)
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from layers_in(f"{name}.{key}", item)

    for name, value in vars(layer).items():
        yield from layers_in(name, value)


def _is_layer(value: Any) -> bool:
    methods = (getattr(value, name, None) for name in ("forward", "backward"))
    return not isinstance(value, type) and all(map(callable, methods))


def _parameters(layer: Any) -> dict[str, Any]:
    """The parameters by name: by `named_parameters()`, else by the path of the attribute that holds each."""
    if callable(getattr(layer, "named_parameters", None)):
        named = dict(layer.named_parameters())
    else:
        paths = {
            id(value): f"{path}.{name}" if path else name
            for path, part in _walk(layer, "")
            for name, value in vars(part).items()
        }
        named = {paths.get(id(p), f"parameter.{index}"): p for index, p in enumerate(layer.parameters())}
    distinct = {id(parameter): name for name, parameter in reversed(named.items())}
    return {name: parameter for name, parameter in named.items() if distinct[id(parameter)] == name}


def _state(layer: Any) -> dict[str, tuple[Any, str]]:
    """Owner and attribute of each floating-point array in a layer, such as running statistics."""
    return {
        f"{path}.{name}" if path else name: (part, name)
        for path, part in _walk(layer, "")
        for name, value in vars(part).items()
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not name.startswith("_")
    }


def _training(forward: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, bool]:
    """{"training": ...} for a forward that takes `train`."""
    signature = inspect.signature(forward)
    if "train" not in signature.parameters:
        return {}
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return {"training": bool(bound.arguments["train"])}


def _arrays(state: Mapping[str, tuple[Any, str]]) -> dict[str, Array]:
    return {name: np.array(vars(part)[attribute]) for name, (part, attribute) in state.items()}


def _where(layer: Any) -> str:
    """The line of `forward`, or of `backward` if the layer's own class defines only that."""
    own = next((name for name in ("forward", "backward") if name in vars(type(layer))), "forward")
    code = getattr(getattr(type(layer), own, None), "__code__", None)
    return "" if code is None else f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}"


def _widen(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """The same with every floating type as float64; objects, lists and dictionaries are changed in place."""
    if id(value) in done:
        return done[id(value)][1]
    wide = value
    if isinstance(value, np.ndarray | np.floating) and value.dtype.kind == "f":
        wide = value.astype(np.float64)
    elif isinstance(value, np.dtype) and value.kind == "f":
        wide = np.dtype(np.float64)
    elif isinstance(value, type) and issubclass(value, np.floating):
        wide = np.float64
    elif isinstance(value, tuple) and type(value) is tuple:
        wide = tuple(_widen(item, done) for item in value)
    done[id(value)] = value, wide
    if isinstance(value, list):
        value[:] = [_widen(item, done) for item in value]
    elif isinstance(value, dict):
        value.update({key: _widen(item, done) for key, item in value.items()})
    elif hasattr(value, "__dict__") and not isinstance(value, type | ModuleType | FunctionType):
        _widen(vars(value), done)
    return wide


def numpy_model(layer: Any, *, train: bool = False) -> Model:
    """A layer or network in NumPy, with what each layer in it returns as a value.

    A deep copy is run. In the float64 twin every array, type and scalar of a floating type in it is float64.

    Args:
        layer: has `forward(x)` or `forward(x, train)`, `backward(dy)` that returns the gradient with respect
            to x and adds to the parameters', and `parameters()`, a list of objects with arrays `value` and
            `grad`. Its parts are attributes of the same kind (also in lists and dictionaries), or what
            `parts()` gives as pairs of name and layer. `named_parameters()` is used if there is one.
        train: passed to a `forward` that takes it.

    Raises:
        ParityError: if the layer has none of these methods; from `Model.run`, if it does not run.

    Examples:
        >>> parity.numpy_model(numpy_ref.resnet20(10, rng=np.random.default_rng(0)), train=True)
    """
    if not _is_layer(layer) or not callable(getattr(layer, "parameters", None)):
        raise ParityError(
            f"numpy_model takes a layer with the methods forward, backward and parameters, got "
            f"{type(layer).__name__}; for a function of which only the outputs are known use function_model"
        )
    return NumpyModel(layer, train)
