"""Placement of arrays: batches are split over all devices, and every device holds the whole state.

The mesh has one axis, `data`, of all devices, those of other processes included. So one device, eight, or two
hosts run the same code, and batch norm sees the whole batch, or the same groups of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


class Placement:
    """Shardings over all devices, and the functions that put arrays there.

    Attributes:
        replicated: the whole array on every device.
        sharded: rows [N, ...] split over the devices.
    """

    def __init__(self) -> None:
        mesh = Mesh(np.array(jax.devices()), ("data",))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.sharded = NamedSharding(mesh, PartitionSpec("data"))
        self._sharded_chunk = NamedSharding(mesh, PartitionSpec(None, "data"))

    def shard_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Split a batch [N, ...] over the devices; of several processes each gives its rows."""
        return jax.make_array_from_process_local_data(self.sharded, dict(batch))

    def shard_chunk(self, batches: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Split stacked batches [K, N, ...] over the devices, along N; as `shard_batch`."""
        return jax.make_array_from_process_local_data(self._sharded_chunk, batches)

    def replicate(self, tree: Tree) -> Tree:
        """Copy a tree to all devices; every process must pass an equal one."""
        if jax.process_count() == 1:
            return jax.device_put(tree, self.replicated)

        def spread(x: Any) -> jax.Array:
            return jax.make_array_from_process_local_data(self.replicated, np.asarray(x), x.shape)

        return jax.tree.map(spread, tree)
