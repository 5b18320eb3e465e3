"""A ResNet block by block, with compiled functions for each kind of block.

Chosen on a single CPU device. `whole.py` compiles a training step into one function. ResNet-101 has 33 blocks
of eight kinds, and such a function contains each of them. Here XLA compiles, and loads from its cache, every
kind once; and a block compiled by itself also runs faster, by a fifth (benchmarks/RESULTS.md).

Forward computes each block with `jax.vjp`, and so returns the block's output and its pullback: the function
from dL/dy to dL/dparams and dL/dx, with the arrays that it saved. Backward calls the pullbacks in reverse,
and updates the parameters of a block at once, in place: no more than one block's gradient is in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_resnet.placement import Placement
from jax_resnet.resnet import ResNet
from jax_resnet.state import Arrays, TrainState
from jax_resnet.state_dict import apply, split
from jax_resnet.step import (
    Batch,
    Metrics,
    Network,
    Optimizer,
    StepOutput,
    Update,
    apply_gradients,
    count_step,
    cross_entropy,
    gradient_norms,
    merge_metrics,
)


def compiler_options() -> dict[str, int] | None:
    """Return XLA's options for a CPU; None if XLA_FLAGS sets an optimization level.

    XLA compiles in a tenth less time at level 1, and the code is no slower: most of it is library calls.
    """
    level = "xla_backend_optimization_level"
    return None if level in os.environ.get("XLA_FLAGS", "") else {level: 1}


jit_for_cpu = partial(jax.jit, compiler_options=compiler_options())


class Block(NamedTuple):
    """A part of a network: the stem, a residual block or the head.

    `params` and `batch_stats` map the names of its arrays to those in the network. Blocks of a kind have
    equal graphs and names, and so share their compiled functions.
    """

    train: nnx.GraphDef[Any]
    eval: nnx.GraphDef[Any]
    params: Mapping[str, str]
    batch_stats: Mapping[str, str]


class Blocks:
    """A network as a list of blocks.

    Args:
        model: the network; the values of its arrays are not used.
        network: its static description.
    """

    def __init__(self, model: ResNet, network: Network) -> None:
        self.normalize = jit_for_cpu(network.normalize)
        self.blocks = []
        for prefix, module in model.parts():
            parts = split(module)
            params = {name: prefix + name for name in parts.params}
            batch_stats = {name: prefix + name for name in parts.batch_stats}
            self.blocks.append(Block(parts.train, parts.eval, params, batch_stats))

    def eval_step(self, params: Arrays, batch_stats: Arrays, image: jax.Array) -> jax.Array:
        """As `step.eval_step`."""
        x = self.normalize(image)
        for block in self.blocks:
            x = _evaluate(block.eval, take(params, block.params), take(batch_stats, block.batch_stats), x)
        return x


class Blockwise:
    """See the module. Equal to a whole step but for rounding.

    The optimizer must be element-wise, as all of ours are: it gets the vectors of a block as one array
    (`pack_vectors`).
    """

    max_steps = 1

    def __init__(
        self, blocks: Blocks, optimizer: Optimizer, placement: Placement, *, log_gradients: bool = False
    ) -> None:
        self._blocks, self._placement = blocks, placement
        self._loss = jit_for_cpu(jax.value_and_grad(cross_entropy))
        self._backward = jit_for_cpu(partial(_backward, optimizer, log_gradients), donate_argnums=(0, 1))
        self._summarize = jit_for_cpu(_summarize)

    def run(
        self, state: TrainState, batches: Sequence[Batch], lrs: np.ndarray
    ) -> tuple[TrainState, list[Metrics]]:
        """As `Strategy.run`; the counters of the state are not donated."""
        output = self.step(state, self._placement.shard_batch(batches[0]), lrs[0])
        return output.state, [output.log()]

    def step(self, state: TrainState, batch: Batch, lr: jax.Array) -> StepOutput:
        """As `step.train_step`: forward through all blocks, backward and update through all blocks."""
        x = self._blocks.normalize(batch["image"])
        inputs, pullbacks = [], []
        new_batch_stats: Arrays = {}
        for number, block in enumerate(self._blocks.blocks):
            inputs.append(x)
            params = take(state.params, block.params)
            batch_stats = take(state.batch_stats, block.batch_stats)
            x, pullback, updated_stats = _forward(block.train, number > 0, params, batch_stats, x)
            pullbacks.append(pullback)
            new_batch_stats |= rename(updated_stats, block.batch_stats)
        logits = x
        loss, dy = self._loss(logits, batch["label"])

        counts = counts_of(state.opt_state)
        updates = []
        norms: Metrics = {}
        for block in reversed(self._blocks.blocks):
            params = take(state.params, block.params)
            moments = moments_of(state.opt_state, block.params)
            pullback = pullbacks.pop()  # the arrays that it saved are free after this
            x = inputs.pop()
            update, block_norms, dy = self._backward(params, moments, counts, pullback, x, dy, lr)
            del pullback, x
            updates.append(rename_update(update, block.params))
            norms |= rename(
                block_norms, {f"grad_norm/{k}": f"grad_norm/{v}" for k, v in block.params.items()}
            )

        params = union(*(update.params for update in updates))
        opt_state = map_moments(union, *(update.opt_state for update in updates))
        metrics, step, first_nonfinite_step = self._summarize(
            state.step, state.first_nonfinite_step, loss, [update.metrics for update in updates]
        )
        new_state = TrainState(params, new_batch_stats, opt_state, step, first_nonfinite_step)
        return StepOutput(new_state, loss, logits, batch["label"], {**metrics, **norms})


@partial(jit_for_cpu, static_argnums=0)
def _evaluate(graph: Any, params: Arrays, batch_stats: Arrays, x: jax.Array) -> jax.Array:
    return apply(graph, params, batch_stats, x)[0]


@partial(jit_for_cpu, static_argnums=(0, 1))
def _forward(
    graph: Any, needs_dx: bool, params: Arrays, batch_stats: Arrays, x: jax.Array
) -> tuple[jax.Array, Any, Arrays]:
    """y, the pullback from dL/dy to (dL/dparams, dL/dx) or (dL/dparams,), and the batch statistics after.

    The pullback is returned without its arguments, which the compiled function would copy: `_backward` puts
    them back. See "First-class VJPs" in JAX's documentation.
    """

    def forward(params: Arrays, x: jax.Array = x) -> tuple[jax.Array, Arrays]:
        return apply(graph, params, batch_stats, x)

    inputs = (params, x) if needs_dx else (params,)
    pullback: Any  # with fields, of which `jax.vjp` declares none
    y, pullback, new_batch_stats = jax.vjp(forward, *inputs, has_aux=True)
    pullback.args_res = [None] * len(pullback.args_res)
    return y, pullback, new_batch_stats


def _backward(
    optimizer: Optimizer,
    log_gradients: bool,
    params: Arrays,
    moments: Any,
    counts: Any,
    pullback: Any,
    x: jax.Array,
    dy: jax.Array,
    lr: jax.Array,
) -> tuple[Update, Metrics, jax.Array | None]:
    """The block's parameters and optimizer state after the update, its `gradient_norms`, and dL/dx."""
    pullback.args_res = [params, x][: len(pullback.args_res)]
    grads, *dx = pullback(dy)
    opt_state = map_moments(pack_vectors, join_opt_state(moments, counts))
    update = apply_gradients(optimizer, pack_vectors(params), opt_state, pack_vectors(grads), lr)
    unpack = partial(unpack_vectors, like=params)
    unpacked = Update(unpack(update.params), map_moments(unpack, update.opt_state), update.metrics)
    norms = gradient_norms(grads) if log_gradients else {}
    return unpacked, norms, dx[0] if dx else None


def _summarize(
    step: jax.Array, first_nonfinite_step: jax.Array, loss: jax.Array, parts: Sequence[Metrics]
) -> tuple[Metrics, jax.Array, jax.Array]:
    """The metrics of a step and the counters after it, from the metrics of the blocks' updates."""
    metrics = merge_metrics(parts)
    return metrics, *count_step(step, first_nonfinite_step, loss, metrics["grad_norm"])


def pack_vectors(arrays: Arrays) -> Arrays:
    """The arrays with all vectors, which are most of them, as one: a third of the code for an update."""
    vectors = [array for array in arrays.values() if array.ndim == 1]
    others = {name: array for name, array in arrays.items() if array.ndim != 1}
    return {**others, "vectors": jnp.concatenate(vectors)} if vectors else others


def unpack_vectors(arrays: Arrays, like: Arrays) -> Arrays:
    """The inverse of `pack_vectors`, for arrays of the names and shapes of `like`."""
    names = [name for name, array in like.items() if array.ndim == 1]
    if not names:
        return arrays
    ends = np.cumsum([like[name].size for name in names])
    vectors = jnp.split(arrays["vectors"], ends[:-1])
    arrays = {**arrays, **dict(zip(names, vectors, strict=True))}
    return {name: arrays[name] for name in like}


def take(arrays: Arrays, names: Mapping[str, str]) -> Arrays:
    """A block's arrays, by their names in the block."""
    return {name: arrays[network_name] for name, network_name in names.items()}


def rename(arrays: Arrays, names: Mapping[str, str]) -> Arrays:
    """A block's arrays, by their names in the network."""
    return {names[name]: array for name, array in arrays.items()}


def union(*blocks: Arrays) -> Arrays:
    """The arrays of all blocks."""
    return {name: array for arrays in blocks for name, array in arrays.items()}


def rename_update(update: Update, names: Mapping[str, str]) -> Update:
    """A block's update, by the names in the network."""
    opt_state = map_moments(lambda arrays: rename(arrays, names), update.opt_state)
    return Update(rename(update.params, names), opt_state, update.metrics)


# The state of an optimizer is a tree of moments, {name: array}, and of counts, which serve all parameters.


def _is_moment(node: Any) -> bool:
    return isinstance(node, dict)


def map_moments(function: Callable[..., Arrays], *states: Any) -> Any:
    """The state with the function applied to each moment of all states; the counts are the first's."""
    return jax.tree.map(
        lambda *nodes: function(*nodes) if _is_moment(nodes[0]) else nodes[0], *states, is_leaf=_is_moment
    )


def moments_of(opt_state: Any, names: Mapping[str, str]) -> Any:
    """The state of one block's moments, with None in place of the counts; it can be donated."""
    return jax.tree.map(lambda x: take(x, names) if _is_moment(x) else None, opt_state, is_leaf=_is_moment)


def counts_of(opt_state: Any) -> Any:
    """The state of the counts, with None in place of the moments; all blocks read it."""
    return jax.tree.map(lambda x: None if _is_moment(x) else x, opt_state, is_leaf=_is_moment)


def join_opt_state(moments: Any, counts: Any) -> Any:
    """The state of one block, from its moments and the counts."""
    return jax.tree.map(
        lambda moment, count: count if moment is None else moment,
        moments,
        counts,
        is_leaf=lambda x: x is None or _is_moment(x),
    )
