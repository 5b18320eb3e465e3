"""Models in PyTorch: any `torch.nn.Module`, recorded function by function."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from parity.nesting import arguments, named_arguments, named_leaves
from parity.torch_recorder import Recorder, to_numpy
from parity.trace import Array, Inputs, Model, ParityError, Trace


class TorchModel(Model):
    """A module of PyTorch. See `torch_model`."""

    framework = "torch"

    def __init__(self, module: torch.nn.Module, train: bool | None) -> None:
        self._module, self._train = module, train
        self._keys: dict[str, str] = {}  # of the values by their names, known after a run

    def precision(self) -> str:
        """See `Model`."""
        types = Counter(p.dtype for p in self._module.parameters() if p.is_floating_point())
        return str(types.most_common(1)[0][0]).removeprefix("torch.") if types else "float32"

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
        if any(name not in self._keys for name in replace or {}):
            self.run(inputs, float64=float64)
        module = self._copy(float64)
        dtype = torch.float64 if float64 else getattr(torch, self.precision())
        before = {n: to_numpy(b) for n, b in module.named_buffers() if b.is_floating_point()}
        parameters = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
        first = next(iter(module.parameters()), None)
        device = torch.device("cpu") if first is None else first.device
        recorder = Recorder(
            parameters,
            float64=float64,
            gradients=cotangents is not None,
            replace={self._keys[name]: array for name, array in (replace or {}).items()},
            replace_gradients=replace_gradients or {},
            device=device,
            stop=_forward.__code__,
        )
        with (
            _as_found(device),
            torch.inference_mode(False),
            torch.enable_grad(),
            contextlib.closing(recorder),
        ):
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            recorder.watch(module)
            args, kwargs = arguments(inputs, lambda value: _tensor(value, dtype, device))
            leaves = {n: t for n, t in named_arguments(args, kwargs).items() if isinstance(t, torch.Tensor)}
            floats = {name: t.requires_grad_(True) for name, t in leaves.items() if t.is_floating_point()}
            if float64:
                torch.set_default_dtype(torch.float64)
            output = _forward(module, recorder, args, kwargs)
            recorder.name_values(leaves)
            self._keys.update({record.name: record.key for record in recorder.records})
            tensors = {n: t for n, t in named_leaves(output, "output") if isinstance(t, torch.Tensor)}
            outputs = {name: t for name, t in tensors.items() if t.is_floating_point()}
            gradients = _gradients(outputs, {**floats, **parameters}, cotangents)
            order = {name: parameters[name] for name in [*recorder.used, *parameters]}
            return Trace(
                values=recorder.values(),
                outputs={name: to_numpy(t) for name, t in outputs.items()},
                output_values={
                    name: record.name if (record := recorder.record_of(t)) and record.key else ""
                    for name, t in outputs.items()
                },
                inputs={name: to_numpy(t) for name, t in floats.items()},
                input_gradients={name: gradients[id(t)] for name, t in floats.items() if gradients},
                parameters={name: to_numpy(p) for name, p in order.items()},
                parameter_gradients={name: gradients[id(p)] for name, p in order.items() if gradients},
                state={n: to_numpy(b) for n, b in module.named_buffers() if b.is_floating_point()},
                state_before=before,
            )

    def _copy(self, float64: bool) -> torch.nn.Module:
        """A copy of the user's module, in the mode and precision asked for."""
        module = getattr(self._module, "_orig_mod", self._module)  # what torch.compile was given
        attributes = [value for part in module.modules() for value in vars(part).values()]
        history = [v for v in attributes if isinstance(v, torch.Tensor) and not v.is_leaf]
        try:  # deepcopy refuses tensors with a history, such as the weight that nn.utils.weight_norm computes
            module = copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in history})
        except Exception as error:
            raise ParityError(
                f"the module {type(module).__name__} cannot be copied, and the comparison runs a copy so "
                f"that yours stays as it is: {_one_line(error)}. Remove from it what copy.deepcopy refuses, "
                "such as an open file or a lock"
            ) from error
        if float64:
            module.double()
        if self._train is not None:
            module.train(self._train)
        return module


def _forward(module: torch.nn.Module, recorder: Recorder, args: Any, kwargs: Any) -> Any:
    """Run the module on copies of the inputs, which it may change in place."""

    def given(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.clone()
        recorder.add_input(name, value)
        return value

    names = list(named_arguments(args, kwargs))
    args = tuple(map(given, names, args))
    kwargs = {key: given(name, kwargs[key]) for name, key in zip(names[len(args) :], kwargs, strict=True)}
    try:
        with recorder:
            return module(*args, **kwargs)
    except ParityError:
        raise
    except Exception as error:
        raise ParityError(f"the PyTorch model does not run on these inputs: {_one_line(error)}") from error


def _gradients(
    outputs: Mapping[str, torch.Tensor],
    variables: Mapping[str, torch.Tensor],
    cotangents: Mapping[str, Array] | None,
) -> dict[int, Array]:
    """The gradient for each variable, by id; 0 where it has no effect. Empty without cotangents."""
    if cotangents is None:
        return {}
    reached = {name: t for name, t in outputs.items() if t.requires_grad and name in cotangents}
    found: Any = [None] * len(variables)
    if reached and variables:
        try:
            found = torch.autograd.grad(
                list(reached.values()),
                list(variables.values()),
                [torch.tensor(cotangents[n], dtype=t.dtype, device=t.device) for n, t in reached.items()],
                allow_unused=True,
            )
        except ParityError:
            raise
        except Exception as error:
            raise ParityError(f"the PyTorch model has no gradients: {_one_line(error)}") from error
    return {
        id(t): to_numpy(torch.zeros_like(t) if gradient is None else gradient)
        for t, gradient in zip(variables.values(), found, strict=True)
    }


def _tensor(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of its own: floating-point numbers in `dtype`, integers as int64, others as they are."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().clone().to(device)
    else:
        array = np.array(value)
        if array.dtype.kind not in "fiubc" and array.dtype.name != "bfloat16":
            return value
        array = array if array.dtype.name != "bfloat16" else array.astype(np.float32)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        tensor = torch.from_numpy(array).to(device)  # keeps the order of the axes in memory
    if tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor if tensor.dtype == torch.bool or tensor.is_complex() else tensor.long()


@contextlib.contextmanager
def _as_found(device: torch.device) -> Iterator[None]:
    """Context after which random states and the default type are what they were."""
    python, default = random.getstate(), torch.get_default_dtype()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        torch.set_default_dtype(default)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def torch_model(module: torch.nn.Module, *, train: bool | None = None) -> Model:
    """A module of PyTorch, with every function that it calls as a value.

    A deep copy is run: parameters, statistics, mode, hooks and random state of `module` stay as they are.
    Frozen parameters (`requires_grad=False`) get gradients, too. Hooks of the module are run, as part of the
    model.

    Values are functions of PyTorch (`F.conv2d`, `torch.add`, `Tensor.mean`); what a module returns has the
    module's name. `nn.MultiheadAttention` is opened; `nn.LSTM`, `nn.GRU`, `F.scaled_dot_product_attention`
    and functions compiled by `torch.jit` are single operations.

    Args:
        module: any module. Inputs go to its `forward`, a dictionary by keyword.
        train: True or False for train or eval mode; None for the mode in which it is. A dropout with p > 0
            in train mode is refused.

    Raises:
        ParityError: it is no module; or, from `Model.run`, it cannot be copied, does not run, draws random
            numbers, or uses `torch.utils.checkpoint`.

    Examples:
        >>> parity.torch_model(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()))
    """
    if not isinstance(module, torch.nn.Module):
        raise ParityError(f"torch_model takes a torch.nn.Module, not {type(module).__name__}")
    return TorchModel(module, train)
