"""Several training steps in one call of a compiled function.

Chosen on GPUs. A GPU idles while Python starts a step, which for a small network takes longer than the step
itself. A CPU has no such gaps, and runs convolutions slower inside a loop.

The images may lie on the device (`images`). A batch then holds their indices and how each is shifted and
flipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_resnet.placement import Placement
from jax_resnet.state import TrainState
from jax_resnet.step import Batch, Metrics, StepOutput


def best_chunk() -> int:
    """The most steps that one call should take on this back end."""
    return 1 if jax.default_backend() == "cpu" else 10


def chunks_of(
    batches: Iterable[Batch], step: int, max_steps: int, needs_state: Callable[[int], bool]
) -> Iterator[list[Batch]]:
    """Yield lists of up to `max_steps` batches; the first batch is that of step + 1.

    A list ends after a step whose state the caller needs.
    """
    chunk = []
    for number, batch in enumerate(batches, step + 1):
        chunk.append(batch)
        if len(chunk) == max_steps or needs_state(number):
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Chunked:
    """See the module.

    Args:
        step: the training step.
        placement: where batches go.
        max_steps: the most steps that one call takes.
        images: {"images": uint8 [M, H, W, C], "fill": uint8 [C]} on the devices, or empty; see
            `gather_images`.

    Attributes:
        compiled: the jitted chunk of steps; its state is donated.
    """

    def __init__(
        self,
        step: Callable[..., StepOutput],
        placement: Placement,
        max_steps: int,
        images: Mapping[str, jax.Array] | None = None,
    ) -> None:
        self.max_steps = max_steps
        self._placement, self._images = placement, images or {}
        self.compiled = jax.jit(
            partial(run_chunk, step), donate_argnums=0, out_shardings=placement.replicated
        )

    def run(
        self, state: TrainState, batches: Sequence[Batch], lrs: np.ndarray
    ) -> tuple[TrainState, list[Metrics]]:
        """As `Strategy.run`; a chunk that is not full is padded, and the padding is not computed."""
        count = len(batches)
        padding = self.max_steps - count
        padded = [*batches, *[batches[-1]] * padding]
        stacked = {name: np.stack([batch[name] for batch in padded]) for name in batches[0]}
        placed = self._placement.shard_chunk(stacked)
        lrs = np.pad(lrs, (0, padding), mode="edge")
        state, rows = self.compiled(state, self._images, placed, lrs, count)
        return state, [{name: LazyRow(values, i) for name, values in rows.items()} for i in range(count)]


def run_chunk(
    train_step: Callable[..., StepOutput],
    state: TrainState,
    images: Mapping[str, jax.Array],
    batches: Mapping[str, jax.Array],
    lrs: jax.Array,
    count: jax.Array,
) -> tuple[TrainState, Metrics]:
    """Take the first `count` of the steps whose batches and rates are stacked along the first axis.

    The count is an argument: chunks of any length share one compiled function, and the bits of a step do not
    depend on the chunk.
    """

    def take_step(state: TrainState, i: Any) -> StepOutput:
        batch = {name: x[i] for name, x in batches.items()}
        if images:
            image = gather_images(images["images"], images["fill"], batch)
            drawn = {"index", "shift", "flip"}
            batch = {"image": image, **{name: x for name, x in batch.items() if name not in drawn}}
        return train_step(state, batch, lrs[i])

    def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, rows = carry
        output = take_step(state, i)
        return output.state, jax.tree.map(lambda row, value: row.at[i].set(value), rows, output.log())

    one = jax.eval_shape(take_step, state, 0).log()
    rows = jax.tree.map(lambda x: jnp.zeros((len(lrs), *x.shape), x.dtype), one)
    return jax.lax.fori_loop(0, count, body, (state, rows))


def gather_images(images: Any, fill: Any, batch: Mapping[str, Any]) -> jax.Array:
    """Images `batch["index"]` [N] of images [M, H, W, C], shifted, then flipped: [N, H, W, C].

    Pixel (y, x) of an image that is not flipped is (y, x) + `batch["shift"]` of the one that is held, or
    `fill` [C] beyond its edge. The same bits as `pad_crop` and `flip` of `experiment.data.augmentation`.
    """
    height, width = images.shape[1:3]
    columns = jnp.arange(width)
    y = jnp.arange(height) + batch["shift"][:, :1]  # [N, H]
    x = jnp.where(batch["flip"][:, None], columns[::-1], columns) + batch["shift"][:, 1:]  # [N, W]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    y, x = y.clip(0, height - 1), x.clip(0, width - 1)
    pixels = jnp.asarray(images)[batch["index"][:, None, None], y[:, :, None], x[:, None, :]]
    return jnp.where(inside[..., None], pixels, fill)


class LazyRow:
    """Row `index` of a device array. The whole array is fetched once, when any of its rows is first read."""

    def __init__(self, array: jax.Array, index: int) -> None:
        self._array, self._index = array, index

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(np.asarray(self._array)[self._index], dtype)

    def __float__(self) -> float:
        return float(np.asarray(self._array)[self._index])
