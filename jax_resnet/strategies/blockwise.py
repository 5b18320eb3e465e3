"""A ResNet block by block, with compiled functions for each kind of block.

Chosen on a single CPU device. `whole.py` compiles a training step into one function. ResNet-101 has 33 blocks
of eight kinds, and such a function contains each of them. Here XLA compiles, and loads from its cache, every
kind once; and a block compiled by itself also runs faster, by a fifth (benchmarks/HISTORY.md).

Forward computes each block with `jax.vjp`, and so returns the block's output and its pullback: the function
from dL/dy to dL/dparams and dL/dx, with the arrays that it saved. Backward calls the pullbacks in reverse,
and updates the parameters of a block at once, in place: no more than one block's gradient is in memory.
With `remat` only the inputs of the blocks are saved, and backward computes each block again.
Clipping needs the norm of all gradients first: with it, backward ends before the first update.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_resnet.losses import labels_of
from jax_resnet.optimizers import clip_scale
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
    gradient_norms,
    l2_norm,
    merge_metrics,
    scale_gradients,
    update_average,
)


def compiler_options() -> dict[str, int | str]:
    """Return XLA's options for a CPU, without those that XLA_FLAGS sets.

    XLA compiles in a tenth less time at level 1, and the code is no slower: most of it is library calls.
    Products and sums are YNNPACK's, as by default. Convolutions are not, but Eigen's. In milliseconds, 3x3 on
    two AMD EPYC cores (AVX-512), jax 0.10.2, 30 November 2026, YNNPACK and Eigen, freed memory reused
    (mallopt): 128 maps of 16x16x32, forward 2.6 and 1.8, gradient of the kernel 7.6 and 4.6; of 8x8x64,
    2.7 and 1.6, 5.2 and 1.9.
    """
    libraries = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    options: dict[str, int | str] = {
        "xla_backend_optimization_level": 1,
        "xla_cpu_experimental_ynn_fusion_type": libraries,
    }
    return {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}


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
        self.loss = jit_for_cpu(jax.value_and_grad(network.loss))
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
        self,
        blocks: Blocks,
        optimizer: Optimizer,
        placement: Placement,
        *,
        remat: bool = False,
        log_gradients: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        self._blocks, self._placement, self._remat = blocks, placement, remat
        self._clip_grad_norm, self._ema_decay = optimizer.clip_grad_norm, ema_decay
        self._backward = jit_for_cpu(partial(_backward, optimizer, log_gradients), donate_argnums=(0, 1))
        self._pull_back = jit_for_cpu(partial(_pull_back, log_gradients))
        self._update = jit_for_cpu(partial(_update, optimizer), donate_argnums=(0, 1))
        self._average = jit_for_cpu(partial(update_average, ema_decay or 0.0), donate_argnums=0)
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
        keeps: list[jax.Array | None] = [None] * len(self._blocks.blocks)
        if "drop_path" in batch:
            keeps[1:-1] = _columns(batch["drop_path"])  # neither the stem nor the head
        inputs, pullbacks = [], []
        new_batch_stats: Arrays = {}
        for number, (block, keep) in enumerate(zip(self._blocks.blocks, keeps, strict=True)):
            inputs.append(x)
            params = take(state.params, block.params)
            batch_stats = take(state.batch_stats, block.batch_stats)
            x, pullback, updated_stats = _forward(block.train, number > 0, params, batch_stats, x, keep)
            pullbacks.append(None if self._remat else pullback)
            del pullback
            new_batch_stats |= rename(updated_stats, block.batch_stats)
        logits = x
        loss, dy = self._blocks.loss(logits, labels_of(batch))

        counts = counts_of(state.opt_state)
        updates: list[Update] = []
        norms: Metrics = {}
        clipped: Metrics = {}
        unclipped: list[tuple[Block, Arrays, jax.Array]] = []  # with clipping: blocks, gradients, their norms
        for number, block in reversed(list(enumerate(self._blocks.blocks))):
            params = take(state.params, block.params)
            pullback = pullbacks.pop()  # the arrays that it saved are free after this
            x = inputs.pop()
            if self._remat:
                batch_stats = take(state.batch_stats, block.batch_stats)
                _, pullback, _ = _forward(block.train, number > 0, params, batch_stats, x, keeps[number])
            if self._clip_grad_norm is None:
                moments = moments_of(state.opt_state, block.params)
                update, block_norms, dy = self._backward(params, moments, counts, pullback, x, dy, lr)
                updates.append(rename_update(update, block.params))
            else:
                grads, grad_norm, block_norms, dy = self._pull_back(params, pullback, x, dy)
                unclipped.append((block, grads, grad_norm))
            del pullback, x
            names = {f"grad_norm/{name}": f"grad_norm/{whole}" for name, whole in block.params.items()}
            norms |= rename(block_norms, names)
        if self._clip_grad_norm is not None:
            scale, clipped = _clip([norm for _, _, norm in unclipped], self._clip_grad_norm)
            for block, grads, _ in unclipped:
                params = take(state.params, block.params)
                moments = moments_of(state.opt_state, block.params)
                update = self._update(params, moments, counts, grads, scale, lr)
                updates.append(rename_update(update, block.params))

        params = union(*(update.params for update in updates))
        opt_state = map_moments(union, *(update.opt_state for update in updates))
        metrics, step, first_nonfinite_step = self._summarize(
            state.step, state.first_nonfinite_step, loss, [update.metrics for update in updates], clipped
        )
        ema = self._averaged(state, params, new_batch_stats)
        new_state = TrainState(params, new_batch_stats, opt_state, step, first_nonfinite_step, ema)
        return StepOutput(new_state, loss, logits, batch["label"], {**metrics, **norms})

    def _averaged(self, state: TrainState, params: Arrays, batch_stats: Arrays) -> dict[str, Arrays] | None:
        """The averages after the step, block by block; None in a run without."""
        if self._ema_decay is None or state.ema is None:
            return None
        averages: dict[str, Arrays] = {"params": {}, "batch_stats": {}}
        for block in self._blocks.blocks:
            names = {"params": block.params, "batch_stats": block.batch_stats}
            average = {part: take(state.ema[part], names[part]) for part in names}
            latest = {"params": take(params, names["params"])}
            latest["batch_stats"] = take(batch_stats, names["batch_stats"])
            average = self._average(average, latest, state.step)
            for part in names:
                averages[part] |= rename(average[part], names[part])
        return averages


@partial(jit_for_cpu, static_argnums=0)
def _evaluate(graph: Any, params: Arrays, batch_stats: Arrays, x: jax.Array) -> jax.Array:
    return apply(graph, params, batch_stats, x)[0]


@partial(jit_for_cpu, static_argnums=(0, 1))
def _forward(
    graph: Any, needs_dx: bool, params: Arrays, batch_stats: Arrays, x: jax.Array, keep: jax.Array | None
) -> tuple[jax.Array, Any, Arrays]:
    """y, the pullback from dL/dy to (dL/dparams, dL/dx) or (dL/dparams,), and the batch statistics after.

    The pullback is returned without its arguments, which the compiled function would copy: `_backward` puts
    them back. See "First-class VJPs" in JAX's documentation.
    """

    def forward(params: Arrays, x: jax.Array = x) -> tuple[jax.Array, Arrays]:
        return apply(graph, params, batch_stats, x, keep)

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
    grads, norms, dx = _gradients(log_gradients, params, pullback, x, dy)
    return _apply(optimizer, params, moments, counts, grads, lr), norms, dx


def _pull_back(
    log_gradients: bool, params: Arrays, pullback: Any, x: jax.Array, dy: jax.Array
) -> tuple[Arrays, jax.Array, Metrics, jax.Array | None]:
    """`_backward` without the update: the block's gradients, their norm, `gradient_norms`, and dL/dx."""
    grads, norms, dx = _gradients(log_gradients, params, pullback, x, dy)
    return grads, l2_norm(grads), norms, dx


def _update(
    optimizer: Optimizer,
    params: Arrays,
    moments: Any,
    counts: Any,
    grads: Arrays,
    scale: jax.Array,
    lr: jax.Array,
) -> Update:
    """The block's parameters and optimizer state after the update by its gradients times `scale`."""
    return _apply(optimizer, params, moments, counts, scale_gradients(grads, scale), lr)


@jit_for_cpu
def _columns(array: jax.Array) -> list[jax.Array]:
    """The columns of an array [N, K]; one compiled function for all of them."""
    return list(array.T)


@jit_for_cpu
def _clip(norms: Sequence[jax.Array], max_norm: float) -> tuple[jax.Array, Metrics]:
    """The factor of all gradients, from the norms of the blocks'; and the norm of all, before clipping."""
    grad_norm = optax.tree.norm(norms)
    return clip_scale(grad_norm, max_norm), {"grad_norm": grad_norm}


def _gradients(
    log_gradients: bool, params: Arrays, pullback: Any, x: jax.Array, dy: jax.Array
) -> tuple[Arrays, Metrics, jax.Array | None]:
    """dL/dparams, its `gradient_norms`, and dL/dx."""
    pullback.args_res = [params, x][: len(pullback.args_res)]
    grads, *dx = pullback(dy)
    norms = gradient_norms(grads) if log_gradients else {}
    return grads, norms, dx[0] if dx else None


def _apply(
    optimizer: Optimizer, params: Arrays, moments: Any, counts: Any, grads: Arrays, lr: jax.Array
) -> Update:
    """The block's parameters and optimizer state after the update."""
    pack = partial(pack_vectors, key=optimizer.vectors_with)
    opt_state = map_moments(pack, join_opt_state(moments, counts))
    update = apply_gradients(optimizer, pack(params), opt_state, pack(grads), lr)
    unpack = partial(unpack_vectors, like=params, key=optimizer.vectors_with)
    return Update(unpack(update.params), map_moments(unpack, update.opt_state), update.metrics)


def _summarize(
    step: jax.Array,
    first_nonfinite_step: jax.Array,
    loss: jax.Array,
    parts: Sequence[Metrics],
    clipped: Metrics,
) -> tuple[Metrics, jax.Array, jax.Array]:
    """The metrics of a step and the counters after it, from the metrics of the blocks' updates."""
    metrics = {**merge_metrics(parts), **clipped}
    return metrics, *count_step(step, first_nonfinite_step, loss, metrics["grad_norm"])


def pack_vectors(arrays: Arrays, key: Callable[[str], str]) -> Arrays:
    """The arrays with vectors, which are most of them, as one: a third of the code for an update.

    Vectors with equal key(name) become one array of that name: `Optimizer.vectors_with`.
    """
    vectors: dict[str, list[jax.Array]] = {}
    for name, array in arrays.items():
        if array.ndim == 1:
            vectors.setdefault(key(name), []).append(array)
    others = {name: array for name, array in arrays.items() if array.ndim != 1}
    return {**others, **{name: jnp.concatenate(group) for name, group in vectors.items()}}


def unpack_vectors(arrays: Arrays, like: Arrays, key: Callable[[str], str]) -> Arrays:
    """The inverse of `pack_vectors`, for arrays of the names and shapes of `like`."""
    names: dict[str, list[str]] = {}
    for name, array in like.items():
        if array.ndim == 1:
            names.setdefault(key(name), []).append(name)
    for packed, group in names.items():
        ends = np.cumsum([like[name].size for name in group])
        vectors = jnp.split(arrays[packed], ends[:-1])
        arrays = {**arrays, **dict(zip(group, vectors, strict=True))}
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
