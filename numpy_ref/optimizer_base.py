"""The base of all optimizers: parameters in groups, moments, and the update by blocks and threads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from numpy_ref.cores import thread_count
from numpy_ref.layers import Array, Parameter

BLOCK = 1 << 17  # numbers in a block: five arrays of that size about fill a second-level cache
_threads = thread_count()


def _start_pool() -> None:
    """Start the threads that optimizers share; again in the child of a fork, where they are gone."""
    global _pool
    _pool = ThreadPoolExecutor(_threads)


_pool: ThreadPoolExecutor
_start_pool()
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_start_pool)

RANGES: dict[str, tuple[str, float, float]] = {  # description, minimum, limit (excluded)
    **dict.fromkeys(("b1", "b2"), ("in [0, 1)", 0, 1)),
    **dict.fromkeys(("lr", "eps", "momentum", "weight_decay"), ("finite and not negative", 0, math.inf)),
    **dict.fromkeys(("final_lr", "base_lr", "gamma"), ("finite and positive", math.ulp(0), math.inf)),
}


def check_hyperparameters(**values: Any) -> dict[str, float]:
    """Return the values as Python numbers; they may be NumPy scalars and 0-d arrays.

    NumPy numbers would decide the type of the arithmetic: 1 - b2**t of float32 numbers has four digits.

    Raises:
        TypeError: names the first value that is not a number.
        ValueError: names the first value that is out of its range.
    """
    checked = {}
    for name, value in values.items():
        requirement, least, limit = RANGES[name]
        if np.ndim(value) or np.asarray(value).dtype.kind not in "fiu":
            hint = "; for a schedule set it before each step" if callable(value) else ""
            raise TypeError(f"{name} must be a number, got {value!r}{hint}")
        checked[name] = float(value)
        if not least <= checked[name] < limit:
            raise ValueError(f"{name} must be {requirement}, got {value}")
    return checked


class Hyperparameter:
    """An attribute of an optimizer: reads the value of the first group, sets that of all groups."""

    def __set_name__(self, owner: type[Optimizer], name: str) -> None:
        self.name = name

    def __get__(self, optimizer: Optimizer | None, owner: type[Optimizer]) -> Any:
        return self if optimizer is None else optimizer.param_groups[0][self.name]

    def __set__(self, optimizer: Optimizer, value: Any) -> None:
        for group in optimizer.param_groups:
            group[self.name] = value


class Optimizer:
    """Parameters, a count of steps, and moments in the parameters' shapes.

    Args:
        parameters: the parameters to train; those with `trainable` False are skipped. Or groups of them as in
            `torch.optim`, mappings such as {"params": [...], "weight_decay": 0.0}: a value that a group does
            not name is that of the argument.
        lr: the learning rate; may be set before every step, as an attribute in all groups, or in a group.
        weight_decay: the L2 penalty, added to the gradient of all parameters, as in PyTorch; in the
            optimizers whose names end in W, decoupled from the gradient and scaled by the learning rate.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if an argument is out of its range, a group names an unknown value, or a parameter is
            given twice.

    Attributes:
        count: the number of steps taken.
        param_groups: [{"params": parameters, "lr": ..., and each of the other arguments}], read at each step.
        parameters: those of all groups, in order.
        moments: {field: [array for each parameter]}, float32 for a parameter of float16.
        fields: the names of the moments, those of the checkpoint tree.
        uses_step_count: True if updates depend on `count`, which is then part of the state.
        decoupled: True if weight decay is not part of the gradient.
    """

    fields: ClassVar[tuple[str, ...]] = ("mu", "nu")
    uses_step_count: ClassVar[bool] = True
    decoupled: ClassVar[bool] = False
    lr = Hyperparameter()
    weight_decay = Hyperparameter()

    def __init__(
        self, parameters: Iterable[Parameter] | Iterable[Mapping[str, Any]], lr: float, **others: float | None
    ) -> None:
        if not isinstance(parameters, Iterable):
            raise TypeError(f"expected parameters, such as layer.parameters(), got {parameters!r}")
        given: list[Any] = list(parameters)
        groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
        defaults = {"lr": lr, **others}
        self.param_groups = [self._group(group, defaults) for group in groups]
        self.parameters: list[Parameter] = [p for group in self.param_groups for p in group["params"]]
        if len(set(self.parameters)) < len(self.parameters):
            raise ValueError("a parameter is given twice")
        self.count = 0
        types = [np.promote_types(p.value.dtype, np.float32) for p in self.parameters]
        self.moments = {
            name: [np.zeros(p.value.shape, dtype) for p, dtype in zip(self.parameters, types, strict=True)]
            for name in self.fields
        }

    def _group(self, given: Any, defaults: Mapping[str, float | None]) -> dict[str, Any]:
        """Return a group with all its values, checked."""
        if not isinstance(given, Mapping) or "params" not in given:
            raise TypeError(f'a parameter group must be a mapping that has "params", got {given!r}')
        if unknown := given.keys() - defaults.keys() - {"params"}:
            names = ", ".join(["params", *defaults])
            raise ValueError(f"a parameter group has {', '.join(sorted(unknown))}, and may have {names}")
        parameters = given["params"]
        parameters = [parameters] if isinstance(parameters, Parameter) else list(parameters)
        for parameter in parameters:
            if not isinstance(parameter, Parameter):
                raise TypeError(
                    f"expected parameters, such as layer.parameters(), got {type(parameter).__name__}"
                )
        values = {name: given.get(name, default) for name, default in defaults.items()}
        if "base_lr" in values and values["base_lr"] is None:
            values["base_lr"] = values["lr"]
        return {"params": parameters, **check_hyperparameters(**values)}

    def zero_grad(self) -> None:
        """Set the gradients to 0."""
        for parameter in self.parameters:
            parameter.zero_grad()

    def step(self) -> Array:
        """Update all parameters by their gradients. Returns the sums of `update_parameters`."""
        self.begin_step()
        return self.update_parameters(range(len(self.parameters)))

    def begin_step(self) -> None:
        """Begin a step, in which every parameter is updated once. Raises as `check_hyperparameters`."""
        checked = [_checked_values(group) for group in self.param_groups]
        self.count += 1
        self._hyperparameters: list[SimpleNamespace] = []  # of each parameter, in this step
        for group, values in zip(self.param_groups, checked, strict=True):
            group.update(values)
            h = SimpleNamespace(**values)
            self.precompute(h)
            self._hyperparameters += [h] * len(group["params"])

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that lasts from step to step, in the form of `torch.optim`.

        {"count": int, "state": {i: {field: array}}, "param_groups": [{"params": [i, ...], "lr": ..., ...}]}
        where i is the index of a parameter in `parameters`.
        """
        index = {parameter: i for i, parameter in enumerate(self.parameters)}
        return {
            "count": self.count,
            "state": {
                i: {name: arrays[i].copy() for name, arrays in self.moments.items()} for i in index.values()
            },
            "param_groups": [
                {**group, "params": [index[parameter] for parameter in group["params"]]}
                for group in self.param_groups
            ],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a result of `state_dict`, in place: moments, the count, and the values of the groups.

        Raises ValueError if it is that of another optimizer, or of parameters of other shapes or in other
        groups; then nothing changes.
        """
        if problems := _differences(self.state_dict(), state_dict):
            raise ValueError("the optimizer's state does not fit: " + "; ".join(problems))
        count = int(state_dict["count"])
        checked = [_checked_values(group) for group in state_dict["param_groups"]]
        for group, values in zip(self.param_groups, checked, strict=True):
            group.update(values)
        self.count = count
        for name, arrays in self.moments.items():
            for i, array in enumerate(arrays):
                array[...] = state_dict["state"][i][name]

    def update_parameters(
        self,
        indices: Iterable[int],
        gradients: Sequence[Sequence[Array]] | None = None,
        share: tuple[int, int] = (0, 1),
        scale: float = 1.0,
    ) -> Array:
        """Update some of the parameters by their gradients.

        Every number is updated by itself, so the arrays are cut into blocks that stay in the cache through
        all operations of an update. Threads share the blocks: NumPy releases Python's lock.

        Args:
            indices: those of the parameters.
            gradients: for each part of the batch, the gradient of every parameter; they are added up. By
                default the parameters' own.
            share: (i, n): only every n-th block, from the i-th on; other processes update the others.
            scale: the factor of all gradients; see `optimizers.clip_scale`.

        Returns:
            float64 [4]: the sums of the squares of the gradients, without decay and before they are scaled,
            and of the updates; and how
            many step sizes were clipped to a lower and to an upper bound (AdaBound and its variants).
        """
        blocks: list[tuple[SimpleNamespace, list[Array]]] = []
        for index in indices:
            parameter = self.parameters[index]
            if parameter.trainable:
                parts = [parameter.grad] if gradients is None else [part[index] for part in gradients]
                arrays = [parameter.value, *(self.moments[name][index] for name in self.fields)]
                if arrays[0].shape != arrays[1].shape:
                    raise ValueError(
                        f"parameter {index} has shape {arrays[0].shape}, and had {arrays[1].shape} when the "
                        "optimizer was made"
                    )
                flat, h = [a.reshape(-1) for a in (*parts, *arrays)], self._hyperparameters[index]
                blocks += [(h, [a[i : i + BLOCK] for a in flat]) for i in range(0, flat[0].size, BLOCK)]
        blocks = blocks[share[0] :: share[1]]
        count = 1 if gradients is None else len(gradients)
        work = [blocks[thread::_threads] for thread in range(_threads)]
        if _threads == 1:
            return self._update_blocks(work[0], count, scale)
        return np.asarray(sum(_pool.map(lambda blocks: self._update_blocks(blocks, count, scale), work)))

    @np.errstate(all="ignore")  # the norms show what is not finite; threads do not inherit the caller's state
    def _update_blocks(
        self, blocks: Sequence[tuple[SimpleNamespace, Sequence[Array]]], parts: int, scale: float
    ) -> Array:
        """Update blocks (hyperparameters, [gradients of the parts, value, moments]); return their sums."""
        sums = np.zeros(4)
        scratch: dict[np.dtype[Any], Array] = {}  # for each type of moments
        for h, arrays in blocks:
            (grad, *others), (value, *moments) = arrays[:parts], arrays[parts:]
            dtype = moments[0].dtype
            if dtype not in scratch:
                scratch[dtype] = np.empty((2, BLOCK), dtype)
            delta, total = scratch[dtype][:, : len(value)]
            grad = grad.astype(dtype, copy=False)
            for other in others:
                grad = np.add(grad, other, out=total)
            sums[0] += grad @ grad
            if scale != 1:
                grad = grad * dtype.type(scale)
            if h.weight_decay and not self.decoupled:
                grad = grad + h.weight_decay * value
            clipped = self.update(grad, moments, delta, h)
            if clipped:
                sums[2:] += clipped
            if h.weight_decay and self.decoupled:
                delta += h.lr * h.weight_decay * value
            value -= delta
            sums[1] += delta @ delta
        return sums

    def precompute(self, h: SimpleNamespace) -> None:
        """Add to a group's values those that all its numbers share in step `count`."""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval of the first group's step sizes in step `count`, or None if they have no bounds."""
        return None

    def update(
        self, grad: Array, moments: Sequence[Array], delta: Array, h: SimpleNamespace
    ) -> tuple[int, int] | None:
        """Update the moments in place, and write into `delta` the amount to subtract from the value.

        `h` has the values of the parameter's group, such as `h.lr`, and those that `precompute` added.
        Returns how many step sizes were clipped to the lower bound and to the upper, or None.
        """
        raise NotImplementedError


def update_moments(grad: Array, mu: Array, nu: Array, b1: float, b2: float, scratch: Array) -> None:
    """Update the exponential averages of gradients and of their squares, in place.

    mu_t = b1 mu_(t-1) + (1 - b1) g_t,   nu_t = b2 nu_(t-1) + (1 - b2) g_t^2
    """
    mu *= b1
    mu += np.multiply(grad, 1 - b1, out=scratch)
    nu *= b2
    np.multiply(grad, grad, out=scratch)
    scratch *= 1 - b2
    nu += scratch


def second_moment(moments: Sequence[Array]) -> Array:
    """Return nu_t; if there is nu_max, update it to the maximum of all nu and return that."""
    if len(moments) == 2:
        return moments[1]
    return np.maximum(moments[2], moments[1], out=moments[2])


def _checked_values(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a group, as `check_hyperparameters` does."""
    return check_hyperparameters(**{name: value for name, value in group.items() if name != "params"})


def _differences(expected: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return the reasons why an optimizer of the state dict `expected` cannot load another one."""
    if missing := expected.keys() - given.keys():
        return [f"missing {', '.join(sorted(missing))}"]
    groups, expected_groups = given["param_groups"], expected["param_groups"]
    if [list(group["params"]) for group in groups] != [group["params"] for group in expected_groups]:
        sizes = [[len(group["params"]) for group in some] for some in (groups, expected_groups)]
        return [f"it has groups of {sizes[0]} parameters, not {sizes[1]}"]
    for group, expected_group in zip(groups, expected_groups, strict=True):
        if group.keys() != expected_group.keys():
            return [f"its groups have {', '.join(group)}, not {', '.join(expected_group)}"]
    problems = []
    for i, expected_moments in expected["state"].items():
        moments = given["state"].get(i, {})
        if moments.keys() != expected_moments.keys():
            names = ", ".join(moments) or "no state"
            return [f"parameter {i} has {names}, not {', '.join(expected_moments)}"]
        for name, array in expected_moments.items():
            shape = np.shape(moments[name])
            if shape != array.shape:
                problems.append(f"{name} of parameter {i} has shape {shape}, not {array.shape}")
    return problems
