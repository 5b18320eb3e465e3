"""Facts about a PyTorch function: its name, its arguments, and whether it works in place."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from parity.nesting import is_plain

# These return what they are given: in another precision, place or shape without a change of order.
SAME = {
    "alias",
    "broadcast_to",
    "clone",
    "contiguous",
    "cpu",
    "cuda",
    "data",
    "detach",
    "expand",
    "expand_as",
}
SAME |= {"squeeze", "unsqueeze", "to", "type", "type_as", "float", "double", "half", "bfloat16"}
SAME |= {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}  # p = 0
_NARROWER = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}
# In place, but the values stay: run as they are.
METADATA = {"detach", "requires_grad", "resize", "resize_as", "set", "share_memory", "squeeze", "unsqueeze"}
METADATA |= {"as_strided", "retain_grad", "swapaxes", "swapdims", "t", "transpose"}
# These read a shape and a type, but no numbers.
FACTORIES = {"empty_like", "full_like", "ones_like", "zeros_like"}
FACTORIES |= {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"}
# These are two functions under one name, with and without indices.
_POOLS = {f"{kind}max_pool{n}d" for kind in ("", "adaptive_", "fractional_") for n in (1, 2, 3)}


def _opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same Python function, whose inner calls the mode sees."""
    assert isinstance(function, types.FunctionType)
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


OPENED = {F.multi_head_attention_forward: _opened(F.multi_head_attention_forward)}


def operation_name(func: Callable[..., Any]) -> str:
    """ "add" for torch.add, Tensor.add_ and Tensor.__add__; "T" for the property."""
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_")


def node_operation(name: str) -> str:
    """ "MyFunction" for MyFunctionBackward, "copy_slices" for CopySlices, "unbind" for UnbindBackward0."""
    builtin = re.fullmatch(r"(\w+?)Backward\d+|CopySlices|AsStridedBackward", name)
    name = re.sub(r"Backward\d*$", "", name)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() if builtin else name


def changes_first(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """True if the function works in place on its first argument."""
    name = getattr(func, "__name__", "")
    if not isinstance(args[0], torch.Tensor):
        return False
    if name == "__setitem__" or re.fullmatch(
        r"__i(add|sub|mul|truediv|floordiv|pow|matmul|and|or|xor)__", name
    ):
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    parameters = [parameter.name for parameter in _python_parameters(func)]
    index = parameters.index("inplace") if "inplace" in parameters else len(args)
    return bool(kwargs.get("inplace", index < len(args) and args[index]))


def widened(func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any, Any]:
    """The same call with float64 in place of every other floating type."""

    def widen(leaf: Any) -> Any:
        return torch.float64 if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf

    func = torch.Tensor.double if func in _NARROWER else func
    return func, *tree_map(widen, (args, kwargs))


def attributes_of(func: Callable[..., Any], operation: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """The plain Python values among the arguments of a function, by name, with defaults."""
    given: dict[str, Any] = {}
    for parameters in _signatures(func, operation):
        bound = _bind(parameters, args, kwargs)
        if bound is not None:
            given = bound
            break
    else:
        given = {"args": tuple(a for a in args if is_plain(a)), **kwargs}
    return {
        name: value
        for name, value in given.items()
        if is_plain(value) and not name.startswith("_") and value != () and name != "inplace"
    }


def _signatures(func: Callable[..., Any], operation: str) -> list[list[tuple[str, bool, Any]]]:
    """The parameters of each form of a function: (name, by keyword only, default)."""
    inner = getattr(F, f"_{operation}", func) if operation in _POOLS else func
    parameters = _python_parameters(inner)
    if parameters and all(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return [[(p.name, p.kind is inspect.Parameter.KEYWORD_ONLY, p.default) for p in parameters]]
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{operation}")
    empty = inspect.Parameter.empty
    return [
        [
            (a.name, a.kwarg_only, a.default_value if a.has_default_value() else empty)
            for a in schema.arguments
        ]
        for schema in schemas
    ]


def _python_parameters(func: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a function written in Python; none for a builtin, also where Python wraps it."""
    if not isinstance(func, types.FunctionType):
        return []
    try:
        return list(inspect.signature(func).parameters.values())
    except ValueError:  # Tensor.__pow__ wraps a builtin
        return []


def _bind(parameters: list[tuple[str, bool, Any]], args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Arguments by name, with defaults; None if they do not fit."""
    positional = [name for name, keyword_only, _ in parameters if not keyword_only]
    if len(args) > len(positional) and all(isinstance(a, int) for a in args[1:]) and len(positional) > 1:
        args = (args[0], tuple(args[1:]))  # x.permute(0, 2, 1)
    if len(args) > len(positional):
        return None
    bound = dict(zip(positional, args, strict=False))
    names = {name for name, _, _ in parameters}
    for name, value in kwargs.items():
        name = "self" if name == "input" and "self" in names else name
        if name not in names or name in bound:
            return None
        bound[name] = value
    for name, _, default in parameters:
        if name not in bound:
            if default is inspect.Parameter.empty:
                return None
            bound[name] = default
    return bound
