"""The gradient of a batch from micro-batches, one after another, with the memory of one.

Chosen by `Engine(accumulate=K)`. It replaces `compute_gradient` inside a training step, so that it works in
whole and in chunked steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_resnet.state import Arrays
from jax_resnet.step import Batch, Gradient, Network, compute_gradient

Carry = tuple[tuple[jax.Array, Arrays], Arrays]  # (sums of loss and gradients), batch statistics


def accumulate_gradient(
    micro_batches: int, network: Network, params: Arrays, batch_stats: Arrays, batch: Batch
) -> Gradient:
    """Average the gradients of K micro-batches; each sees the running statistics that the last one left.

    Micro-batch i has the examples i, i + K, ...: each device has its share of every one.
    """
    k = micro_batches

    def add(carry: Carry, micro_batch: Batch) -> tuple[Carry, jax.Array]:
        sums, batch_stats = carry
        gradient = compute_gradient(network, params, batch_stats, micro_batch)
        sums = jax.tree.map(jnp.add, sums, (gradient.loss, gradient.grads))
        return (sums, gradient.batch_stats), gradient.logits

    zeros = jax.tree.map(jnp.zeros_like, network.trainable(params))
    start = (jnp.zeros((), network.dtype), zeros), batch_stats
    (sums, batch_stats), logits = jax.lax.scan(add, start, _split(batch, k))
    loss, grads = jax.tree.map(lambda total: total / k, sums)
    return Gradient(loss, jnp.moveaxis(logits, 0, 1).reshape(-1, logits.shape[-1]), grads, batch_stats)


def _split(batch: Batch, k: int) -> dict[str, jax.Array]:
    """Arrays [N, ...] as micro-batches [K, N / K, ...]."""
    return {name: jnp.moveaxis(x.reshape(-1, k, *x.shape[1:]), 1, 0) for name, x in batch.items()}
