"""The gradient of a batch from micro-batches, one after another, with the memory of one.

Chosen by `Engine(accumulate=K)`. `accumulate_gradient` replaces `compute_gradient` inside a compiled step,
whole or chunked, as a loop. On a CPU XLA's convolutions are slow in a loop: a step of ResNet-20 with K = 4
took 19 times as long (jax 0.10.2). There, `Accumulated` calls a compiled function for each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_resnet.placement import Placement
from jax_resnet.state import Arrays, TrainState
from jax_resnet.step import Batch, Gradient, Metrics, Network, StepOutput, compute_gradient

Sums = tuple[jax.Array, Arrays]  # of losses, and of gradients


def accumulate_gradient(
    micro_batches: int, network: Network, params: Arrays, batch_stats: Arrays, batch: Batch
) -> Gradient:
    """Average the gradients of K micro-batches; each sees the running statistics that the last one left.

    Micro-batch i has the examples i, i + K, ...: each device has its share of every one.
    """
    k = micro_batches

    def add(carry: tuple[Sums, Arrays], micro_batch: Batch) -> tuple[tuple[Sums, Arrays], jax.Array]:
        sums, batch_stats, logits = _add(network, params, *carry, micro_batch)
        return (sums, batch_stats), logits

    start = _zeros(network, params), batch_stats
    (sums, batch_stats), logits = jax.lax.scan(add, start, _split(batch, k))
    return _mean(k, sums, batch_stats, logits)


class Accumulated:
    """The step of `accumulate_gradient` as K + 2 calls of three compiled functions."""

    max_steps = 1

    def __init__(
        self,
        micro_batches: int,
        network: Network,
        step: Callable[..., StepOutput],
        placement: Placement,
    ) -> None:
        self._k, self._placement = micro_batches, placement
        jit = partial(jax.jit, out_shardings=placement.replicated)
        self._zeros = jit(partial(_zeros, network))
        self._add = jit(partial(_add, network), donate_argnums=1)
        self._update = jit(partial(self._take, step), donate_argnums=0)

    def _take(
        self,
        step: Callable[..., StepOutput],
        state: TrainState,
        batch_stats: Arrays,
        sums: Sums,
        logits: Sequence[jax.Array],
        batch: Batch,
        lr: jax.Array,
    ) -> StepOutput:
        gradient = _mean(self._k, sums, batch_stats, jnp.stack(logits))
        return step(state, batch, lr, gradient_fn=lambda *_: gradient)

    def run(
        self, state: TrainState, batches: Sequence[Batch], lrs: np.ndarray
    ) -> tuple[TrainState, list[Metrics]]:
        """As `Strategy.run`."""
        (batch,) = batches
        sums, batch_stats, logits = self._zeros(state.params), state.batch_stats, []
        for part in range(self._k):
            micro_batch = self._placement.shard_batch({name: x[part :: self._k] for name, x in batch.items()})
            sums, batch_stats, of_part = self._add(state.params, sums, batch_stats, micro_batch)
            logits.append(of_part)
        label = self._placement.shard_batch({"label": batch["label"]})
        output = self._update(state, batch_stats, sums, logits, label, lrs[0])
        return output.state, [output.log()]


def _zeros(network: Network, params: Arrays) -> Sums:
    return jnp.zeros((), network.dtype), jax.tree.map(jnp.zeros_like, network.trainable(params))


def _add(
    network: Network, params: Arrays, sums: Sums, batch_stats: Arrays, micro_batch: Mapping[str, Any]
) -> tuple[Sums, Arrays, jax.Array]:
    """Add the loss and the gradient of a micro-batch; also return its statistics and logits."""
    gradient = compute_gradient(network, params, batch_stats, micro_batch)
    sums = jax.tree.map(jnp.add, sums, (gradient.loss, gradient.grads))
    return sums, gradient.batch_stats, gradient.logits


def _mean(k: int, sums: Sums, batch_stats: Arrays, logits: jax.Array) -> Gradient:
    """The gradient of the batch; `logits` [K, N / K, classes] return to the order of its examples."""
    loss, grads = jax.tree.map(lambda total: total / k, sums)
    return Gradient(loss, jnp.moveaxis(logits, 0, 1).reshape(-1, logits.shape[-1]), grads, batch_stats)


def _split(batch: Batch, k: int) -> dict[str, jax.Array]:
    """Arrays [N, ...] as micro-batches [K, N / K, ...]."""
    return {name: jnp.moveaxis(x.reshape(-1, k, *x.shape[1:]), 1, 0) for name, x in batch.items()}
