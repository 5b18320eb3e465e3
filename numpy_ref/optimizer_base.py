"""What all optimizers of the NumPy engine share."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from numpy_ref.layers import Array, Parameter
from numpy_ref.parallel import thread_count

TILE = 1 << 17  # numbers: five arrays of so many about fill a second-level cache
_threads = thread_count(os.cpu_count() or 1)


def _start_pool() -> None:
    """Make the pool that optimizers share; in the child of a fork too, where its threads are gone."""
    global _pool
    _pool = ThreadPoolExecutor(_threads)


_pool: ThreadPoolExecutor
_start_pool()
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_start_pool)

RANGES: dict[str, tuple[str, float, float]] = {  # what it must be, at least, less than
    **dict.fromkeys(("b1", "b2"), ("in [0, 1)", 0, 1)),
    **dict.fromkeys(("lr", "eps", "momentum", "weight_decay"), ("finite and not negative", 0, math.inf)),
    **dict.fromkeys(("final_lr", "base_lr", "gamma"), ("finite and positive", math.ulp(0), math.inf)),
}


def check_hyperparameters(**values: Any) -> dict[str, float]:
    """Return the values as Python numbers, NumPy's scalars and 0-d arrays among them.

    NumPy's own would decide the type of the arithmetic: 1 - b2**t of float32 numbers has four digits.

    Raises:
        TypeError: if a value is not a number; it names the first.
        ValueError: if a value is out of its range; likewise.
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
    """An attribute of an optimizer that reads a value of the first group, and sets it in all groups."""

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
        parameters: what to train; those with `trainable` False are passed over. Or groups of them as in
            `torch.optim`, mappings such as {"params": [...], "weight_decay": 0.0}: what a group does not name
            has the value of the argument.
        lr: the learning rate; may be set before every step, as an attribute in all groups, or in a group.
        weight_decay: the L2 penalty, added to the gradient of all parameters, as in PyTorch; in the
            optimizers whose names end in W, decoupled from the gradient and scaled by the learning rate.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if an argument is out of its range, a group names what the optimizer does not have, or a
            parameter is given twice.

    Attributes:
        count: the number of steps made.
        param_groups: [{"params": parameters, "lr": ..., and each of the other arguments}], read at each step.
        parameters: those of all groups, in order.
        moments: {field: [array for each parameter]}, float32 for a parameter of float16.
        fields: the names of the moments, those of the checkpoint tree.
        counts: whether `count` matters, and is part of the state.
    """

    fields: ClassVar[tuple[str, ...]] = ("mu", "nu")
    counts: ClassVar[bool] = True
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
        """Let the next gradients replace the sums."""
        for parameter in self.parameters:
            parameter.zero_grad()

    def step(self) -> Array:
        """Change all parameters by their gradients; what it returns is that of `change`."""
        self.begin()
        return self.change(range(len(self.parameters)))

    def begin(self) -> None:
        """Begin the next step; then every parameter is changed once. Raises as `check_hyperparameters`."""
        checked = [_checked_values(group) for group in self.param_groups]
        self.count += 1
        self._now: list[SimpleNamespace] = []  # for each parameter
        for group, values in zip(self.param_groups, checked, strict=True):
            group.update(values)
            h = SimpleNamespace(**values)
            self.prepare(h)
            self._now += [h] * len(group["params"])

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that lasts from step to step, in the form of `torch.optim`'s.

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
        """Take over what `state_dict` returned, in place: moments, the count, and the values of the groups.

        Raises ValueError if it is of another optimizer, or of parameters of other shapes or in other groups;
        then nothing changes.
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

    def change(
        self,
        which: Iterable[int],
        gradients: Sequence[Sequence[Array]] | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> Array:
        """Change some of the parameters by their gradients.

        Every number is on its own, so the arrays are walked through in tiles, which stay in the cache through
        all the operations of an update; each tile by some thread, since NumPy lets go of Python's lock.

        Args:
            which: the indices of the parameters.
            gradients: for each part of the batch, the gradient of every parameter; they are added up. By
                default the parameters' own.
            share: (i, n): only every n-th tile, from the i-th on; the others are somebody else's.

        Returns:
            float64 [4]: the sums of the squares of the gradients, without decay, and of the changes; and how
            many step sizes were clipped to a lower and to an upper bound (AdaBound and its variants).
        """
        tiles: list[tuple[SimpleNamespace, list[Array]]] = []
        for index in which:
            parameter = self.parameters[index]
            if parameter.trainable:
                own = [parameter.grad] if gradients is None else [part[index] for part in gradients]
                arrays = [parameter.value, *(self.moments[name][index] for name in self.fields)]
                if arrays[0].shape != arrays[1].shape:
                    raise ValueError(
                        f"parameter {index} has shape {arrays[0].shape}, and had {arrays[1].shape} when the "
                        "optimizer was made"
                    )
                flat, h = [a.reshape(-1) for a in (*own, *arrays)], self._now[index]
                tiles += [(h, [a[i : i + TILE] for a in flat]) for i in range(0, flat[0].size, TILE)]
        tiles = tiles[share[0] :: share[1]]
        parts = 1 if gradients is None else len(gradients)
        work = [tiles[thread::_threads] for thread in range(_threads)]
        if _threads == 1:
            return self._step_tiles(work[0], parts)
        return np.asarray(sum(_pool.map(lambda each: self._step_tiles(each, parts), work)))

    @np.errstate(all="ignore")  # the norms tell; threads do not have what their caller has set
    def _step_tiles(self, tiles: Sequence[tuple[SimpleNamespace, Sequence[Array]]], parts: int) -> Array:
        sums = np.zeros(4)
        scratch: dict[np.dtype[Any], Array] = {}  # of each type that parameters have
        for h, arrays in tiles:
            (grad, *others), (value, *moments) = arrays[:parts], arrays[parts:]
            dtype = moments[0].dtype
            if dtype not in scratch:
                scratch[dtype] = np.empty((2, TILE), dtype)
            change, total = scratch[dtype][:, : len(value)]
            grad = grad.astype(dtype, copy=False)
            for other in others:
                grad = np.add(grad, other, out=total)
            sums[0] += grad @ grad
            if h.weight_decay and not self.decoupled:
                grad = grad + h.weight_decay * value
            held = self.update(grad, moments, change, h)
            if held:
                sums[2:] += held
            if h.weight_decay and self.decoupled:
                change += h.lr * h.weight_decay * value
            value -= change
            sums[1] += change @ change
        return sums

    def prepare(self, h: SimpleNamespace) -> None:
        """Add to the values of a group what is the same for all its numbers in step `count`."""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval of the first group's step sizes in step `count`, or None if they have no bounds."""
        return None

    def update(
        self, grad: Array, moments: Sequence[Array], change: Array, h: SimpleNamespace
    ) -> tuple[int, int] | None:
        """Advance the moments in place, and write what is to be subtracted from the value into `change`.

        `h` has the values of the parameter's group, such as `h.lr`, and what `prepare` added to them. Returns
        how many step sizes were clipped to the lower bound and to the upper, or None.
        """
        raise NotImplementedError


def update_moments(grad: Array, mu: Array, nu: Array, b1: float, b2: float, scratch: Array) -> None:
    """The next exponential averages of gradients and of their squares, in place.

    mu_t = b1 mu_(t-1) + (1 - b1) g_t,   nu_t = b2 nu_(t-1) + (1 - b2) g_t^2
    """
    mu *= b1
    mu += np.multiply(grad, 1 - b1, out=scratch)
    nu *= b2
    np.multiply(grad, grad, out=scratch)
    scratch *= 1 - b2
    nu += scratch


def _checked_values(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a group, as `check_hyperparameters` does."""
    return check_hyperparameters(**{name: value for name, value in group.items() if name != "params"})


def _differences(own: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return why the state dict of an optimizer does not fit another, or nothing."""
    if missing := own.keys() - given.keys():
        return [f"missing {', '.join(sorted(missing))}"]
    groups, own_groups = given["param_groups"], own["param_groups"]
    if [list(group["params"]) for group in groups] != [group["params"] for group in own_groups]:
        sizes = [[len(group["params"]) for group in some] for some in (groups, own_groups)]
        return [f"it has groups of {sizes[0]} parameters, not {sizes[1]}"]
    for group, wanted in zip(groups, own_groups, strict=True):
        if group.keys() != wanted.keys():
            return [f"its groups have {', '.join(group)}, not {', '.join(wanted)}"]
    problems = []
    for i, moments in own["state"].items():
        found = given["state"].get(i, {})
        if found.keys() != moments.keys():
            return [f"parameter {i} has {', '.join(found) or 'no state'}, not {', '.join(moments)}"]
        for name, array in moments.items():
            if np.shape(found[name]) != array.shape:
                problems.append(
                    f"{name} of parameter {i} has shape {np.shape(found[name])}, not {array.shape}"
                )
    return problems
