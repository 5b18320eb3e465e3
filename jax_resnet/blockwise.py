"""A ResNet as a row of programs, one for each kind of block: how a single CPU device trains it.

`Engine` compiles a training step into one program, which is what a GPU wants. ResNet-101 has 33 blocks of
eight kinds, and such a program holds each of them. Here XLA compiles, and loads from its cache, every kind
once; and what it makes of a block by itself is faster too, by a fifth (benchmarks/RESULTS.md).

Backward is JAX's: `jax.vjp` in the forward program of a part gives, beside its output, the function that
pulls a gradient back, with the arrays that were kept for it. The backward program calls that, and updates
the parameters of the part at once, in place: no more than one part's gradient is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_resnet.resnet import ResNet
from jax_resnet.state_dict import apply, split

# XLA compiles in a tenth less time so, and what it makes is no slower: most of it is calls of libraries
jit_for_cpu = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})

Arrays = dict[str, jax.Array]
Names = Mapping[str, str]  # {the name of an array in its part: that in the network}


class Part(NamedTuple):
    """A part of a network: its graphs, and the names of its arrays."""

    train: nnx.GraphDef[Any]
    eval: nnx.GraphDef[Any]
    params: Names
    batch_stats: Names


@partial(jax.tree_util.register_dataclass, data_fields=["kept"], meta_fields=["tree", "places"])
@dataclass(frozen=True)
class WayBack:
    """The function from dL/dy to dL/dparams, and dL/dx if it was asked for, between two programs.

    Attributes:
        kept: the arrays that it holds and that are neither parameters nor x: a program would copy those.
        tree: what it is without its arrays.
        places: where each of them is in [*parameters, x, *kept].
    """

    kept: list[jax.Array]
    tree: Any
    places: tuple[int, ...]

    @staticmethod
    def of(function: Any, params: Arrays, x: jax.Array) -> WayBack:
        """What `jax.vjp` gave."""
        leaves, tree = jax.tree.flatten(function)
        given = jax.tree.leaves((params, x))
        arrays = list({id(array): array for array in (*given, *leaves)}.values())
        number = {id(array): i for i, array in enumerate(arrays)}
        return WayBack(arrays[len(given) :], tree, tuple(number[id(leaf)] for leaf in leaves))

    def __call__(self, params: Arrays, x: jax.Array, dy: jax.Array) -> tuple[Any, ...]:
        """(dL/dparams, dL/dx) or (dL/dparams,)."""
        arrays = [*jax.tree.leaves((params, x)), *self.kept]
        gradients: tuple[Any, ...] = jax.tree.unflatten(self.tree, [arrays[i] for i in self.places])(dy)
        return gradients


class Blockwise:
    """Computes one network, given as plain dicts {torchvision name: array}.

    Args:
        model: the network; its arrays are not looked at, and may be abstract.
        loss: (logits [N, num_classes], label [N]) to a scalar.
        descend: (params, optimizer state, gradient, learning rate) of some of the parameters to the first
            two after an update, and its metrics; called inside a compiled program. It is given the vectors
            among them as one, under a name of its own: it must do the same to every number.
    """

    def __init__(self, model: ResNet, loss: Callable[..., jax.Array], descend: Callable[..., Any]) -> None:
        self._parts = []
        for prefix, module in model.parts():
            train, eval, *arrays = split(module)
            params, stats = ({name: prefix + name for name in each} for each in arrays)
            self._parts.append(Part(train, eval, params, stats))
        self._loss = jit_for_cpu(jax.value_and_grad(loss))
        self._backward = jit_for_cpu(partial(_backward, descend), donate_argnums=(0, 1))

    def logits(
        self, params: Mapping[str, jax.Array], stats: Mapping[str, jax.Array], x: jax.Array
    ) -> jax.Array:
        """Of pictures x [N, H, W, C], with the running statistics: [N, num_classes]."""
        for part in self._parts:
            own, kept = _take(params, part.params), _take(stats, part.batch_stats)
            x = _evaluate(part.eval, own, kept, x)
        return x

    def step(
        self,
        params: Mapping[str, jax.Array],
        stats: Mapping[str, jax.Array],
        optimizer: Any,
        x: jax.Array,
        label: jax.Array,
        lr: jax.Array,
    ) -> tuple[Arrays, Arrays, Any, list[Any], jax.Array, jax.Array]:
        """One step on pictures x [N, H, W, C].

        Returns parameters, batch statistics and the optimizer's state after it, the metrics of each part's
        update, the loss and the logits. The parameters that went in, and the optimizer's arrays of their
        shapes, are gone (donated).
        """
        after: Arrays = {}
        ways_back = []
        for number, part in enumerate(self._parts):
            own, kept = _take(params, part.params), _take(stats, part.batch_stats)
            y, way_back, moved = _forward(part.train, number > 0, own, kept, x)
            ways_back.append((way_back, x))
            after |= _give(moved, part.batch_stats)
            x = y
        loss, dy = self._loss(x, label)

        logits, states, metrics = x, [], []
        new_params: Arrays = {}
        for part in reversed(self._parts):
            way_back, x = ways_back.pop()  # what was kept is free after this
            own, (moments, rest) = _take(params, part.params), _moments(optimizer, part.params)
            own, state, each, dy = self._backward(own, moments, rest, way_back, x, dy, lr)
            new_params |= _give(own, part.params)
            states.append(_map(partial(_give, names=part.params), state))
            metrics.append(each)
        return new_params, after, _map(_union, *states), metrics, loss, logits


@partial(jit_for_cpu, static_argnums=0)
def _evaluate(graph: Any, params: Arrays, stats: Arrays, x: jax.Array) -> jax.Array:
    return apply(graph, params, stats, x)[0]


@partial(jit_for_cpu, static_argnums=(0, 1))
def _forward(
    graph: Any, needs_dx: bool, params: Arrays, stats: Arrays, x: jax.Array
) -> tuple[jax.Array, WayBack, Arrays]:
    """y, the way back from it, to x as well if `needs_dx`, and the batch statistics after."""
    if needs_dx:
        y, way_back, after = jax.vjp(lambda p, x: apply(graph, p, stats, x), params, x, has_aux=True)
    else:
        y, way_back, after = jax.vjp(lambda p: apply(graph, p, stats, x), params, has_aux=True)
    return y, WayBack.of(way_back, params, x), after


def _backward(
    descend: Callable[..., Any],
    params: Arrays,
    moments: list[Arrays],
    rest: Any,
    way_back: WayBack,
    x: jax.Array,
    dy: jax.Array,
    lr: jax.Array,
) -> tuple[Arrays, Any, Any, jax.Array | None]:
    """What `descend` makes of dL/dparams, and dL/dx."""
    grads, *dx = way_back(params, x, dy)
    left = iter(moments)
    optimizer = jax.tree.map(
        lambda leaf: _pack(next(left)) if leaf is None else leaf, rest, is_leaf=lambda leaf: leaf is None
    )
    new, optimizer, metrics = descend(_pack(params), optimizer, _pack(grads), lr)
    unpack = partial(_unpack, like=params)
    return unpack(new), _map(unpack, optimizer), metrics, dx[0] if dx else None


def _pack(arrays: Arrays) -> Arrays:
    """The arrays with all vectors, which are most of them, as one: a third of the code for an update.

    Right for optimizers that do the same to every number, whatever it is a part of; all of ours do.
    """
    vectors = [array for array in arrays.values() if array.ndim == 1]
    rest = {name: array for name, array in arrays.items() if array.ndim != 1}
    return {**rest, "vectors": jnp.concatenate(vectors)} if vectors else rest


def _unpack(arrays: Arrays, like: Arrays) -> Arrays:
    """The inverse of `_pack`."""
    names = [name for name, array in like.items() if array.ndim == 1]
    if not names:
        return arrays
    ends = np.cumsum([like[name].size for name in names])
    both = arrays | dict(zip(names, jnp.split(arrays["vectors"], ends[:-1]), strict=True))
    return {name: both[name] for name in like}


def _take(arrays: Mapping[str, jax.Array], names: Names) -> Arrays:
    return {own: arrays[name] for own, name in names.items()}


def _give(arrays: Arrays, names: Names) -> Arrays:
    return {names[own]: array for own, array in arrays.items()}


def _union(*dicts: Arrays) -> Arrays:
    return {name: array for each in dicts for name, array in each.items()}


def _map(function: Callable[..., Any], *states: Any) -> Any:
    """The function of the dicts of arrays in the states of an optimizer; of all else the first state's."""

    def one(*leaves: Any) -> Any:
        return function(*leaves) if isinstance(leaves[0], dict) else leaves[0]

    return jax.tree.map(one, *states, is_leaf=lambda leaf: isinstance(leaf, dict))


def _moments(optimizer: Any, names: Names) -> tuple[list[Arrays], Any]:
    """The dicts of arrays in the state of an optimizer, those of a part alone; and the state with None in
    their places: its counts serve all parts, and cannot be donated."""
    moments: list[Arrays] = []
    return moments, _map(lambda arrays: moments.append(_take(arrays, names)), optimizer)
