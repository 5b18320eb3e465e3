"""Types of the labeled set, and how weights of a PyTorch module become those of a port.

Each module beside this one holds a reference in PyTorch, its ports and their faults. A port takes the name of
one fault, so that the fault is one line of it. That line ends in `# fault: NAME`, by which `Fault.where`
finds it. A fault in copied weights has no such line: the operations of the model are right.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

Array = np.ndarray
Arrays = Mapping[str, Array]
Tree = dict[str, Any]
Adapter = Literal["nnx", "linen", "jax"]
What = Literal["output", "input gradient", "parameter gradient", "statistics", "parameter"]


@dataclass(frozen=True)
class Case:
    """A reference and a candidate, with the same weights, in the mode in which they are compared.

    Attributes:
        reference: in train or eval mode, as `train` is.
        candidate: a module of Flax NNX (in that mode too) or Linen, or, for "jax", a function
            f(params, *inputs), or f(params, state, *inputs) -> (output, state).
        variables: of a Linen module {"params", "batch_stats"}, of a function its params; None for NNX.
        state: running statistics of a function; None if it has none.
        inputs: an array, a tuple, or a dictionary by argument; images are NCHW.
        candidate_inputs: the same for the candidate.
        nhwc: the candidate's inputs and outputs of four axes are NHWC.
        train: the mode.
        convert: takes arrays by the reference's names (weights, their gradients, statistics) to the
            candidate's names and layouts.
        same_gradients: False where the candidate merges parameters, so that `convert` does not hold for
            gradients.
    """

    adapter: Adapter
    reference: torch.nn.Module
    candidate: Any
    inputs: Any
    candidate_inputs: Any
    convert: Callable[[Arrays], dict[str, Array]]
    variables: Any = None
    state: Any = None
    nhwc: bool = False
    train: bool = False
    same_gradients: bool = True


Build = Callable[..., Case]
"""`build(seed, fault="", dtype="float32")`: the port, correct without a fault."""


@dataclass(frozen=True)
class Port:
    """A correct port: `port.build(seed)` is a case in which both models agree.

    `float32_inside` says that a library rounds to float32 on the way even where everything else is float64.
    """

    name: str
    build: Build
    float32_inside: bool = False


@dataclass(frozen=True)
class Fault:
    """One fault and its label: `fault.build(seed)` is a case in which the candidate has it.

    Attributes:
        name: "cnn-nnx/same-padding".
        port: the correct port.
        stage: the module, or "module.operation", of the reference where the first error arises. For a
            gradient: the one whose backward pass is wrong, given the right gradient of its output.
        what: the first number that is wrong.
        cause: one of `causes.CAUSES`.
        parameter: the reference's name of the parameter or statistic that is wrong; "" if none is.
        accept: other stages that are as right, such as the sum that a shortcut ends in.
    """

    name: str
    port: Port
    build: Build
    stage: str
    what: What
    cause: str
    parameter: str = ""
    accept: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The faulty line, as "cnn.py:41"; "" for a fault in copied weights."""
        function = self.build
        while isinstance(function, functools.partial):
            function = function.func
        path = Path(inspect.getfile(function))
        flag = self.name.partition("/")[2]
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            marker = re.search(r"# faults?: (.*)$", line)
            if marker and flag in marker[1].split(", "):
                return f"{path.name}:{number}"
        return ""


def fault(
    port: Port,
    flag: str,
    stage: str,
    what: What = "output",
    cause: str = "",
    parameter: str = "",
    accept: tuple[str, ...] = (),
) -> Fault:
    """Label the fault that `port.build(seed, flag)` has; the cause is the flag if none is given."""
    build = functools.partial(port.build, fault=flag)
    return Fault(f"{port.name}/{flag}", port, build, stage, what, cause or flag, parameter, accept)


NORMS = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.LayerNorm, torch.nn.GroupNorm)


def seeded(make: Callable[[], torch.nn.Module], seed: int, dtype: str, train: bool) -> torch.nn.Module:
    """The reference at random weights, in which no scale is 1 and no shift 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reference = make()
        with torch.no_grad():
            for module in reference.modules():
                tensors = dict(module.named_parameters(recurse=False)) | dict(
                    module.named_buffers(recurse=False)
                )
                for name, tensor in tensors.items():
                    if name == "weight" and isinstance(module, NORMS):
                        tensor.normal_(1, 0.2)
                    elif name == "running_var":
                        tensor.uniform_(0.5, 1.5)
                    elif name == "running_mean" or name.startswith("bias"):
                        tensor.normal_(0, 0.2)
    return reference.to(getattr(torch, dtype)).train(train)


def normal(seed: int, shape: tuple[int, ...], dtype: str) -> Array:
    """Inputs from the standard normal distribution, the same numbers in each precision."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(dtype)


def nhwc(images: Array) -> Array:
    """NCHW to NHWC."""
    return np.ascontiguousarray(np.moveaxis(images, 1, -1))


def arrays_of(reference: torch.nn.Module) -> dict[str, Array]:
    """Parameters and statistics by name, as copies."""
    return {name: tensor.detach().numpy().copy() for name, tensor in reference.state_dict().items()}


def to_flax(reference: torch.nn.Module, arrays: Arrays) -> dict[str, Array]:
    """Flax's names and layouts: kernels HWIO or [in, out], scale, mean, var, embedding."""
    result = {}
    for name, array in arrays.items():
        path, _, leaf = name.rpartition(".")
        module = reference.get_submodule(path)
        if leaf == "num_batches_tracked":
            continue
        if isinstance(module, NORMS):
            leaf = {"weight": "scale", "running_mean": "mean", "running_var": "var"}.get(leaf, leaf)
        elif isinstance(module, torch.nn.Embedding):
            leaf = "embedding"
        elif leaf == "weight":
            leaf, array = "kernel", array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        result[f"{path}.{leaf}" if path else leaf] = array
    return result


def nested(arrays: Arrays) -> Tree:
    """{"layer1.conv.kernel": a} as {"layer1": {"conv": {"kernel": a}}}, of JAX arrays."""
    tree: Tree = {}
    for name, array in arrays.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = jnp.asarray(array)
    return tree


STATISTICS = ("mean", "var", "running_mean", "running_var")


def parameters_of(arrays: Arrays) -> dict[str, Array]:
    """What is no running statistic."""
    return {name: array for name, array in arrays.items() if name.rpartition(".")[2] not in STATISTICS}


def statistics_of(arrays: Arrays) -> dict[str, Array]:
    """The running statistics."""
    return {name: array for name, array in arrays.items() if name.rpartition(".")[2] in STATISTICS}


def linen_variables(arrays: Arrays) -> Tree:
    """The collections of a Linen module."""
    variables = {"params": nested(parameters_of(arrays)), "batch_stats": nested(statistics_of(arrays))}
    return {name: tree for name, tree in variables.items() if tree}


def load_nnx(model: nnx.Module, arrays: Arrays, missing: tuple[str, ...] = ()) -> None:
    """Set the parameters and statistics of an NNX module; `missing` ones keep their initial values.

    Raises:
        ValueError: a name is in only one of both, or a shape differs.
    """
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    if set(variables) - set(missing) != set(arrays):
        raise ValueError(f"names differ: {sorted(set(variables) ^ set(arrays))}")
    for name, variable in variables.items():
        value = jnp.asarray(arrays.get(name, np.asarray(variable[...], next(iter(arrays.values())).dtype)))
        if value.shape != variable.shape:
            raise ValueError(f"{name}: shape {value.shape} instead of {variable.shape}")
        variable.set_value(value)
    nnx.update(model, state)
