"""Records what a PyTorch module computes, function by function, while it runs.

A `TorchFunctionMode` sees every call of a function of PyTorch (`F.conv2d`, `torch.add`, `Tensor.mean`). Hooks
of modules track which module is running. The mode does not see two kinds of results: those of a custom
`autograd.Function`, and tensors changed in place through a view. They are noticed when they are
read: an unknown tensor by its `grad_fn`, a changed one by its version.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from parity.nesting import is_plain, named_leaves, unique_name
from parity.torch_functions import (
    FACTORIES,
    METADATA,
    OPENED,
    SAME,
    attributes_of,
    changes_first,
    node_operation,
    operation_name,
    widened,
)
from parity.trace import Array, ParityError, Value

_FOREIGN = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)


class _Replace(torch.autograd.Function):
    """The second array; the gradient passes to the first. Exact for infinities too, unlike a sum."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, replacement: torch.Tensor) -> torch.Tensor:
        return replacement.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


@dataclasses.dataclass(eq=False)
class Record:
    """A value in the making, or an input of the model (`key` is "")."""

    key: str  # unique, and the same in each run; the name is known when its module has ended
    name: str
    operation: str = ""
    array: Array | None = None
    gradient: Array | None = None
    inputs: tuple[Record, ...] = ()
    parameters: tuple[str, ...] = ()
    module: str = ""
    where: str = ""
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_module: bool = False


@dataclasses.dataclass
class _Known:
    """Facts about a tensor: the value that it is, or the parameters that it is made from."""

    tensor: torch.Tensor  # keeps its id from being used again
    version: int
    record: Record | None
    parameters: tuple[str, ...] = ()
    current: torch.Tensor | None = None  # read in its place, where it could not be replaced itself


class Recorder(TorchFunctionMode):
    """Context in which the values of a model are recorded, in the order of computation.

    Attributes:
        records: the values.
        stop: code of the function in which the search for the user's line ends.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        *,
        float64: bool,
        gradients: bool,
        replace: Mapping[str, Array],
        replace_gradients: Mapping[str, Array],
        device: torch.device,
        stop: types.CodeType,
    ) -> None:
        """
        Args:
            parameters: by name.
            float64: casts to another floating type become casts to float64.
            gradients: record the gradients in the backward pass that follows.
            replace: arrays by the key of the value.
            replace_gradients: arrays by the name of the value.
            device: where random numbers would be drawn.
            stop: see above.
        """
        super().__init__()
        self.records: list[Record] = []
        self.used: dict[str, None] = {}  # parameters in the order of their first use
        self.stop = stop
        self._float64, self._gradients = float64, gradients
        self._replace, self._replace_gradients = replace, replace_gradients
        self._known: dict[int, _Known] = {}
        self._nodes: dict[Any, Record] = {}  # by grad_fn
        self._leaves = {id(parameter): name for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            self._known[id(parameter)] = _Known(parameter, -1, None, (name,))
        self._modules: list[str] = []
        self._keys: set[str] = set()
        self._quiet = self._ended = False
        self._custom = _custom_functions(torch.autograd.Function)
        self._generator = _generator(device)
        self._random = self._generator.get_state()

    def add_input(self, name: str, tensor: torch.Tensor) -> None:
        """Make a tensor known as an input of the model."""
        self._know(tensor, Record("", name))

    def record_of(self, tensor: Any) -> Record | None:
        """The value or input that a tensor is; None if it depends on no input."""
        known = self._known.get(id(tensor))
        return None if known is None else known.record

    def watch(self, module: torch.nn.Module) -> None:
        """Register the hooks that follow a module and all its parts."""
        for path, part in module.named_modules():
            if isinstance(part, torch.jit.ScriptModule):
                continue  # takes no hooks
            attributes = {k: v for k, v in vars(part).items() if not k.startswith("_") and is_plain(v)}
            attributes.pop("training", None)

            def enter(part: Any, args: Any, path: str = path) -> None:
                if self._ended:
                    raise ParityError(
                        f"{path or 'the model'} is computed again in the backward pass "
                        "(torch.utils.checkpoint): switch checkpointing off for the comparison"
                    )
                self._modules.append(path)

            def leave(
                part: Any, args: Any, output: Any, path: str = path, attributes: dict[str, Any] = attributes
            ) -> Any:
                if self._ended:
                    return output
                self._quiet = True
                try:
                    output = self._resolved(output)
                    self._name_outputs(path, attributes, output)
                finally:
                    self._quiet = False
                    self._modules.pop()
                return output

            part.register_forward_pre_hook(enter, prepend=True)
            part.register_forward_hook(leave, always_call=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute one function of PyTorch and record its results."""
        kwargs = kwargs or {}
        if self._quiet or self._in_custom_function():
            return func(*args, **kwargs)
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs)
        operation = operation_name(func)
        target = args[0] if args and changes_first(func, args, kwargs) else None
        args, kwargs = self._resolved((args, kwargs), target)
        if self._float64:
            func, args, kwargs = widened(func, args, kwargs)
        if operation in FACTORIES:
            return func(*args, **kwargs)
        read = [self._known[id(t)] for t in _tensors((args, kwargs)) if id(t) in self._known]
        sources = tuple(dict.fromkeys(known.record for known in read if known.record is not None))
        parameters = tuple(
            dict.fromkeys(p for known in read if known.record is None for p in known.parameters)
        )
        in_place = target is not None and operation not in METADATA and target.is_floating_point()
        if in_place and sources:
            copy = args[0].clone()
            result = func(copy, *args[1:], **kwargs)
            self._check_random(operation)
            attributes = attributes_of(func, operation, args, kwargs)
            new, record = self._recorded(copy, operation, sources, parameters, attributes)
            args[0].copy_(new)
            self._know(args[0], record)
            return args[0] if isinstance(result, torch.Tensor) else result
        result = func(*args, **kwargs)
        if not _tensors(result) and target is None:
            return result
        self._check_random(operation)
        if not sources:
            for tensor in [*_tensors(result), *_tensors(target)] if parameters else ():
                if self.record_of(tensor) is None and id(tensor) not in self._leaves:
                    before = self._known[id(tensor)].parameters if id(tensor) in self._known else ()
                    self._know(tensor, None, tuple(dict.fromkeys((*before, *parameters))))
            return result
        if target is not None:
            if operation not in METADATA:
                self._know(target, sources[0])
            return result
        given = {id(t) for t in _tensors((args, kwargs))}
        attributes = attributes_of(func, operation, args, kwargs)

        def new_tensor(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or id(leaf) in given:
                return leaf
            if operation in SAME or not leaf.is_floating_point():
                self._know(leaf, sources[0])
                return leaf
            return self._recorded(leaf, operation, sources, parameters, attributes)[0]

        return tree_map(new_tensor, result)

    def _recorded(
        self,
        tensor: torch.Tensor,
        operation: str,
        sources: tuple[Record, ...],
        parameters: tuple[str, ...],
        attributes: dict[str, Any],
    ) -> tuple[torch.Tensor, Record]:
        """Record a value. Return the tensor that the following operations read, and the record."""
        module = self._modules[-1] if self._modules else ""
        name = ".".join(part for part in (module, operation) if part)
        self.used.update(dict.fromkeys(parameters))
        record = Record(
            key=unique_name(name, self._keys),
            name=name,
            operation=operation,
            array=to_numpy(tensor),
            inputs=sources,
            parameters=parameters,
            module=module,
            where=self._where(),
            attributes=attributes,
        )
        self.records.append(record)
        self._know(tensor, record)
        if record.key in self._replace:
            replacement = torch.from_numpy(np.array(self._replace[record.key])).to(tensor)
            tensor = _Replace.apply(tensor, replacement)  # type: ignore[no-untyped-call]
            self._know(tensor, record)
        if self._gradients and tensor.requires_grad:
            like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

            def hook(gradient: torch.Tensor | None) -> torch.Tensor | None:
                if gradient is not None:  # it is None for an unused result of several, as of chunk
                    array = to_numpy(gradient)
                    record.gradient = array if record.gradient is None else record.gradient + array
                other = self._replace_gradients.get(record.name)
                return None if other is None else torch.tensor(other).to(like)

            tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        return tensor, record

    def _know(self, tensor: torch.Tensor, record: Record | None, parameters: tuple[str, ...] = ()) -> None:
        self._known[id(tensor)] = _Known(tensor, tensor._version, record, parameters)
        if record is not None and tensor.grad_fn is not None:
            self._nodes[tensor.grad_fn] = record

    def _resolved(self, tree: Any, target: torch.Tensor | None = None) -> Any:
        """The same tree. Tensors that the mode has not seen are recorded, or replaced.

        In float64 constants of a lower precision are cast, but for `target`, which is changed in place.
        """

        def resolve(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            known = self._known.get(id(leaf))
            if known is None and leaf.grad_fn is not None:
                known = self._adopt(leaf)
            elif known is not None and known.record is not None and known.version != leaf._version:
                known = self._adopt_changed(leaf, known)
            if known is not None and known.current is not None:
                return known.current
            narrow = leaf.is_floating_point() and leaf.dtype != torch.float64
            if self._float64 and narrow and leaf is not target:
                wide = leaf.double()
                if known is not None:
                    self._know(wide, known.record, known.parameters)
                return wide
            return leaf

        return tree_map(resolve, tree)

    def _adopt(self, tensor: torch.Tensor) -> _Known:
        """Make a tensor known by the graph of its derivatives: the result of a custom function."""
        sources: dict[Record, None] = {}
        parameters: dict[str, None] = {}
        seen, open_nodes = set(), [tensor.grad_fn]
        while open_nodes:
            node = open_nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self._nodes:
                sources[self._nodes[node]] = None
            elif (leaf := id(getattr(node, "variable", None))) in self._leaves:
                parameters[self._leaves[leaf]] = None
            else:
                open_nodes += [inner for inner, _ in reversed(node.next_functions)]
        self._make_known(tensor, tuple(sources), tuple(parameters))
        return self._known[id(tensor)]

    def _adopt_changed(self, tensor: torch.Tensor, known: _Known) -> _Known:
        """Record again a tensor that was changed through a view, or a view of one that was changed."""
        record = known.record
        assert record is not None
        array = to_numpy(tensor) if tensor.is_floating_point() else None
        if array is None or (record.array is not None and _equal(array, record.array)):
            known.version = tensor._version
        else:
            others = (self._nodes[tensor.grad_fn],) if tensor.grad_fn in self._nodes else ()
            self._make_known(tensor, tuple(dict.fromkeys((record, *others))), ())
        return self._known[id(tensor)]

    def _make_known(
        self, tensor: torch.Tensor, sources: tuple[Record, ...], parameters: tuple[str, ...]
    ) -> None:
        if not sources or not tensor.is_floating_point():
            self._know(tensor, sources[0] if sources else None, parameters)
            return
        node = tensor.grad_fn.name().rpartition("::")[2] if tensor.grad_fn is not None else "in_place"
        operation = node_operation(node)
        attributes = {} if operation.islower() else {"custom_derivative": True}  # MyFunction, not copy_slices
        current, _ = self._recorded(tensor, operation, sources, parameters, attributes)
        if current is not tensor:
            self._known[id(tensor)].current = current

    def _name_outputs(self, path: str, attributes: Mapping[str, Any], output: Any) -> None:
        """Give the values that a module returns its name, unless a module inside it has done so."""
        leaves = [
            (name, leaf) for name, leaf in named_leaves(output, "output") if self.record_of(leaf) is not None
        ]
        for name, leaf in leaves:
            record = self.record_of(leaf)
            inside = record is not None and (record.module == path or record.module.startswith(f"{path}."))
            if not path or record is None or not record.key or record.is_module or not inside:
                continue
            record.name = path if len(leaves) == 1 else f"{path}.{name}"
            record.is_module, record.module = True, path
            record.attributes = {**attributes, **record.attributes}

    def _check_random(self, operation: str) -> None:
        if torch.equal(self._generator.get_state(), self._random):
            return
        place = (self._modules[-1] if self._modules else "") or "the model"
        raise ParityError(
            f"{place} draws random numbers ({operation}): two models draw different ones. If it is a "
            "dropout, call module.eval(), or set its p to 0 and keep train mode; else make them an input"
        )

    def _in_custom_function(self) -> bool:
        """True inside the forward of a `torch.autograd.Function`, whose result alone is a value."""
        if torch.is_grad_enabled():
            return False
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not self.stop:
            if frame.f_code in self._custom:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False

    def _where(self) -> str:
        """File and line of the first caller outside PyTorch and this package."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not self.stop:
            file = frame.f_code.co_filename
            if not file.startswith(_FOREIGN) and not file.startswith("<"):
                return f"{os.path.basename(file)}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return ""

    def name_values(self, inputs: Iterable[str]) -> None:
        """Give every value its final, unique name. Call it once the model has run."""
        self._ended = True
        taken = set(inputs)
        for record in self.records:
            record.name = unique_name(record.name, taken)

    def close(self) -> None:
        """Forget all tensors. Their hooks hold the recorder, which Python's garbage collector cannot see."""
        self.records, self._known, self._nodes = [], {}, {}

    def values(self) -> list[Value]:
        """The values, with their gradients as far as the backward pass has run."""
        return [
            Value(
                name=record.name,
                operation=record.operation,
                value=record.array,
                gradient=record.gradient,
                inputs=tuple(dict.fromkeys(source.name for source in record.inputs)),
                parameters=record.parameters,
                module=record.module,
                where=record.where,
                attributes=record.attributes,
                is_module=record.is_module,
            )
            for record in self.records
            if record.array is not None
        ]


def to_numpy(tensor: torch.Tensor) -> Array:
    """A NumPy array of its own; bfloat16 as float32."""
    tensor = tensor.detach().cpu()
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()
    return array


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def _custom_functions(base: type) -> set[types.CodeType]:
    """The code of the forward of every subclass of `torch.autograd.Function`."""
    forward = getattr(base, "forward", None)
    codes = {forward.__code__} if isinstance(forward, types.FunctionType) else set()
    return codes.union(*map(_custom_functions, base.__subclasses__()))


def _equal(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
