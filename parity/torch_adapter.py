"""Models in PyTorch: every function that a module calls, by a `TorchFunctionMode` on a copy of the module."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from parity.trace import Array, Inputs, Model, ParityError, Trace, Value

_LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}", os.path.dirname(__file__))
_PLAIN = (bool, int, float, str, type(None))
# Functions whose result has the same numbers as their argument, or that only ask about a tensor.
_SAME = {"to", "type", "float", "double", "contiguous", "clone", "detach", "requires_grad_", "cpu", "cuda"}
_SAME |= {"__get__", "size", "dim", "unsqueeze", "squeeze", "expand", "expand_as", "is_floating_point"}
_NAMES = {"__add__": "add", "__radd__": "add", "__iadd__": "add", "__mul__": "mul", "__rmul__": "mul"}
_NAMES |= {"__sub__": "sub", "__rsub__": "sub", "__truediv__": "div", "__matmul__": "matmul", "__pow__": "pow"}


class TorchModel(Model):
    """A `torch.nn.Module`. See `torch_model`."""

    framework = "torch"

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def precision(self) -> str:
        """See `Model`."""
        types = Counter(str(p.dtype) for p in self._module.parameters() if p.is_floating_point())
        return types.most_common(1)[0][0].removeprefix("torch.") if types else "float32"

    def run(
        self,
        inputs: Inputs,
        *,
        float64: bool = False,
        cotangents: Mapping[str, Array] | None = None,
        replace: Mapping[str, Array] | None = None,
        replace_gradients: Mapping[str, Array] | None = None,
    ) -> Trace:
        """See `Model`."""
        module = _copied(self._module)
        module = module.double() if float64 else module
        dtype = torch.float64 if float64 else getattr(torch, self.precision())
        args, kwargs, named = _arguments(inputs, dtype, cotangents is not None)
        before = _state(module)
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(cotangents is not None):
            recorder = _Recorder(module, named, replace or {}, replace_gradients or {})
            try:
                with recorder.hooks(), recorder:
                    output = module(*args, **kwargs)
            except ParityError:
                raise
            except Exception as error:
                fault = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                raise ParityError(f"the PyTorch model does not run on these inputs: {fault}") from error
            outputs = {name: t for name, t in _named("output", output) if t.is_floating_point()}
            if cotangents is not None:
                total = sum(
                    (t * torch.as_tensor(np.asarray(cotangents[name]), dtype=t.dtype)).sum()
                    for name, t in outputs.items()
                )
                if isinstance(total, torch.Tensor) and total.requires_grad:
                    total.backward()
        parameters = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
        order = [name for name in recorder.used if name in parameters]
        order += [name for name in parameters if name not in recorder.used]
        floats = {name: t for name, t in named.items() if t.is_floating_point()}
        graded = cotangents is not None
        return Trace(
            values=[_value(fields) for fields in recorder.records],
            outputs={name: _numpy(t) for name, t in outputs.items()},
            output_values={
                name: found if (found := recorder.names.get(id(t), "")) not in named else "" for name, t in outputs.items()
            },
            inputs={name: _numpy(t) for name, t in floats.items()},
            input_gradients={name: _gradient(t) for name, t in floats.items()} if graded else {},
            parameters={name: _numpy(parameters[name]) for name in order},
            parameter_gradients={name: _gradient(parameters[name]) for name in order} if graded else {},
            state=_state(module),
            state_before=before,
        )


class _Recorder(TorchFunctionMode):
    """Keeps the floating-point results that depend on the inputs, and replaces them where asked."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        replace: Mapping[str, Array],
        replace_gradients: Mapping[str, Array],
    ) -> None:
        super().__init__()
        self.replace, self.replace_gradients = replace, replace_gradients
        self.records: list[dict[str, Any]] = []
        self.used: dict[str, None] = {}
        self.names: dict[int, str] = {id(t): name for name, t in inputs.items()}  # of a tensor by its identity
        self._made_of: dict[int, tuple[str, ...]] = {id(p): (name,) for name, p in module.named_parameters()}
        self._alive: list[Any] = [*inputs.values()]  # an identity is used again once its tensor is gone
        self._by_name: dict[str, dict[str, Any]] = {}
        self._counts: Counter[str] = Counter()
        self._paths = {part: path for path, part in module.named_modules()}
        self._stack: list[str] = []
        self._own = False  # True while a hook of this class computes

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Context in which the modules say where in the network a function is called."""
        handles = []
        for part, path in self._paths.items():
            handles.append(part.register_forward_pre_hook(self._entered(path)))
            handles.append(part.register_forward_hook(self._left(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, path: str) -> Callable[..., None]:
        def enter(part: nn.Module, args: Any) -> None:
            _refuse_dropout(part, path)
            self._stack.append(path)

        return enter

    def _left(self, path: str) -> Callable[..., Any]:
        def leave(part: nn.Module, args: Any, output: Any) -> Any:
            self._stack.pop()
            self._own = True
            try:
                return _mapped(output, lambda tensor: self._mark_module(path, part, tensor))
            finally:
                self._own = False

        return leave

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch in place of each of its functions."""
        kwargs = dict(kwargs or {})
        if self._own:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", None) or str(resolve_name(func)).rpartition(".")[2]
        told = _bound(func, args, kwargs) if "dropout" in name else {}
        if told.get("training") and told.get("p"):
            raise ParityError(
                "the PyTorch model draws dropout: two models draw other numbers. Call model.eval(), or set p to 0"
            )
        read = [t for t in _tensors((args, kwargs)) if id(t) in self.names]
        weights = [w for t in _tensors((args, kwargs)) if id(t) not in self.names for w in self._made_of.get(id(t), ())]
        result = func(*args, **kwargs)
        self._alive += [result, args, kwargs]
        outs = _tensors(result)
        if not read:
            for t in outs:
                if weights:
                    self._made_of.setdefault(id(t), tuple(dict.fromkeys(weights)))
            return result
        operation = _NAMES.get(name, name if name.startswith("__") else name.rstrip("_"))
        if operation in _SAME:
            for t in outs:
                self.names[id(t)] = self.names[id(read[0])]
            return result
        self.used.update(dict.fromkeys(weights))
        fields = {
            "operation": operation,
            "inputs": tuple(dict.fromkeys(self.names[id(t)] for t in read)),
            "parameters": tuple(dict.fromkeys(weights)),
            "module": self._stack[-1] if self._stack else "",
            "where": _where(),
            "attributes": _attributes(func, operation, args, kwargs),
        }
        changed = {id(t) for t in _tensors((args, kwargs))}
        return _mapped(result, lambda t: self._record(t, dict(fields), in_place=id(t) in changed))

    def _record(self, tensor: torch.Tensor, fields: dict[str, Any], in_place: bool) -> torch.Tensor:
        if not tensor.is_floating_point():
            self.names[id(tensor)] = fields["inputs"][0]
            return tensor
        fields["name"] = self._unique(".".join(part for part in (fields["module"], fields["operation"]) if part))
        fields["array"] = _numpy(tensor)
        self.records.append(fields)
        self._by_name[fields["name"]] = fields
        if tensor.requires_grad:
            tensor.register_hook(self._gradient_hook(fields))
        return self._replaced(tensor, fields, in_place)

    def _gradient_hook(self, fields: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def hook(gradient: torch.Tensor) -> torch.Tensor | None:
            fields["gradient"] = _numpy(gradient)
            given = self.replace_gradients.get(fields["name"])
            return None if given is None else torch.as_tensor(np.asarray(given), dtype=gradient.dtype)

        return hook

    def _replaced(self, tensor: torch.Tensor, fields: dict[str, Any], in_place: bool = False) -> torch.Tensor:
        """The tensor by its name, with other numbers if asked; the gradient passes through unchanged."""
        given = self.replace.get(fields["name"])
        if given is not None:
            array = torch.as_tensor(np.asarray(given), dtype=tensor.dtype)
            if in_place:
                tensor.data.copy_(array)
            else:
                tensor = array + (tensor - tensor.detach()) if tensor.requires_grad else array
                self._alive.append(tensor)
        self.names[id(tensor)] = fields["name"]
        return tensor

    def _mark_module(self, path: str, part: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
        """Give the value that a module returns the name of the module."""
        fields = self._by_name.get(self.names.get(id(tensor), ""))
        if fields is None or fields.get("is_module") or not _within(fields["module"], path):
            return tensor
        inside = [f for f in self.records if path and _within(f["module"], path)] or [fields]
        fields.update(
            name=self._unique(path or type(part).__name__),
            is_module=True,
            module=path,
            parameters=tuple(dict.fromkeys(name for f in inside for name in f["parameters"])),
            attributes={**_plain(vars(part)), **fields["attributes"]},
        )
        if len(inside) > 1:
            fields["operation"] = type(part).__name__
        self._by_name[fields["name"]] = fields
        return self._replaced(tensor, fields)

    def _unique(self, name: str) -> str:
        self._counts[name] += 1
        return name if self._counts[name] == 1 else f"{name}.{self._counts[name]}"


def torch_model(module: nn.Module, *, train: bool | None = None) -> Model:
    """A PyTorch module, in the mode in which it is, or in the given one.

    Args:
        module: a `torch.nn.Module`. It is not changed: copies of it are run.
        train: True for `module.train()`, False for `module.eval()`, None as it is.

    Raises:
        ParityError: a module that cannot be copied.

    Example:
        >>> parity.torch_model(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
    """
    copied = _copied(module)
    if train is not None:
        copied.train(train)
    return TorchModel(copied)


def _copied(module: nn.Module) -> nn.Module:
    """A copy whose layers do not change their inputs in place."""
    try:
        copied = copy.deepcopy(module)
    except Exception as error:
        raise ParityError(
            f"the PyTorch model cannot be copied (copy.deepcopy: {error}), and it must not be changed: "
            "detach tensors that it keeps, or give a function that makes it anew"
        ) from error
    copied.zero_grad(set_to_none=True)
    for part in copied.modules():
        if getattr(part, "inplace", None) is True:
            part.inplace = False  # type: ignore[assignment]
    return copied


def _refuse_dropout(part: nn.Module, path: str) -> None:
    if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
        raise ParityError(
            f"{path or 'the model'} is a Dropout that is active: two models draw other numbers. Call "
            "model.eval(), or set its p to 0 and keep train mode"
        )
    if isinstance(part, nn.RNNBase | nn.MultiheadAttention) and part.training and part.dropout:
        raise ParityError(f"{path or 'the model'} has dropout that is active: call model.eval(), or set it to 0")


_SIGNATURES = {
    "conv1d": "input weight bias stride padding dilation groups",
    "conv2d": "input weight bias stride padding dilation groups",
    "conv3d": "input weight bias stride padding dilation groups",
    "conv_transpose2d": "input weight bias stride padding output_padding groups dilation",
    "avg_pool2d": "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
    "max_pool2d": "input kernel_size stride padding dilation ceil_mode",
    "gelu": "input approximate",
    "flatten": "input start_dim end_dim",
    "mean": "input dim keepdim",
    "softmax": "input dim",
    "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal scale",
    "permute": "input dims",
    "cat": "tensors dim",
}


def _bound(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, with the defaults, as far as the function has a signature."""
    try:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
    except (TypeError, ValueError):
        return dict(kwargs)


def _attributes(func: Any, operation: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a function was told besides tensors."""
    if operation in _SIGNATURES:
        return _plain({**dict(zip(_SIGNATURES[operation].split(), args, strict=False)), **kwargs})
    return _plain(_bound(func, args, kwargs))


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers, words and shapes among attributes."""

    def is_plain(value: Any) -> bool:
        return isinstance(value, _PLAIN) or (isinstance(value, tuple | list) and all(map(is_plain, value)))

    return {k: tuple(v) if isinstance(v, list) else v for k, v in attributes.items() if k[0] != "_" and is_plain(v)}


def _where() -> str:
    """File and line of the innermost call outside of PyTorch and this package."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not any(library in file for library in _LIBRARIES) and not file.startswith("<"):
            return f"{os.path.basename(file)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _within(module: str, path: str) -> bool:
    return not path or module == path or module.startswith(f"{path}.")


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for _, t in _named("", tree)]


def _named(name: str, tree: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a tree of tuples, lists and dictionaries, by name."""
    if isinstance(tree, torch.Tensor):
        return [(name, tree)]
    if isinstance(tree, Mapping):
        return [pair for key, item in tree.items() for pair in _named(f"{name}.{key}", item)]
    if isinstance(tree, tuple | list):
        return [pair for index, item in enumerate(tree) for pair in _named(f"{name}.{index}", item)]
    return []


def _mapped(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A result of PyTorch with each of its tensors changed."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return type(tree)(**{key: _mapped(item, change) for key, item in tree.items()})  # type: ignore[call-arg]
    if isinstance(tree, tuple | list):
        items = [_mapped(item, change) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def _arguments(
    inputs: Inputs, dtype: torch.dtype, graded: bool
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Positional and keyword arguments, and all of them by name."""

    def tensor(array: Any) -> torch.Tensor:
        array = torch.tensor(np.asarray(array.detach() if isinstance(array, torch.Tensor) else array))
        if array.is_floating_point():
            return array.to(dtype).requires_grad_(graded)
        return array if array.dtype == torch.bool else array.long()

    if isinstance(inputs, Mapping):
        kwargs = {name: tensor(array) for name, array in inputs.items()}
        return (), kwargs, {f"input.{name}": kwargs[name] for name in sorted(kwargs)}
    if isinstance(inputs, tuple | list):
        args = tuple(tensor(array) for array in inputs)
        return args, {}, {"input" if len(args) == 1 else f"input.{i}": t for i, t in enumerate(args)}
    only = tensor(inputs)
    return (only,), {}, {"input": only}


def _state(module: nn.Module) -> dict[str, Array]:
    return {name: _numpy(b) for name, b in module.named_buffers() if b.is_floating_point()}


def _numpy(tensor: torch.Tensor) -> Array:
    """A NumPy array of its own; bfloat16 as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()


def _gradient(tensor: torch.Tensor) -> Array:
    return np.zeros(tensor.shape) if tensor.grad is None else _numpy(tensor.grad)


def _value(fields: Mapping[str, Any]) -> Value:
    known = {key: item for key, item in fields.items() if key != "array"}
    return Value(value=fields["array"], **known)
