"""What the compiled step does to pictures before the network sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def normalize(image: jax.Array, mean: ArrayLike, std: ArrayLike, dtype: Any) -> jax.Array:
    """Pictures [N, H, W, C] of type uint8 as (x / 255 - mean) / std, per channel; others as they are."""
    if image.dtype != jnp.uint8:
        return image.astype(dtype)
    return (image.astype(dtype) / 255 - jnp.asarray(mean, dtype)) / jnp.asarray(std, dtype)


def picture(image: Any, fill: Any, batch: Mapping[str, Any]) -> jax.Array:
    """The pictures `batch["index"]` [N] of image [M, H, W, C], shifted, then mirrored: [N, H, W, C].

    Pixel (y, x) of a picture that is not mirrored is (y, x) + `batch["shift"]` of the one that is held, or
    `fill` [C] beyond its edge. The same bits as `pad_crop` and `flip` of `experiment.data.augmentation`.
    """
    height, width = image.shape[1:3]
    columns = jnp.arange(width)
    y = jnp.arange(height) + batch["shift"][:, :1]  # [N, H]
    x = jnp.where(batch["flip"][:, None], columns[::-1], columns) + batch["shift"][:, 1:]  # [N, W]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    y, x = y.clip(0, height - 1), x.clip(0, width - 1)
    found = jnp.asarray(image)[batch["index"][:, None, None], y[:, :, None], x[:, None, :]]
    return jnp.where(inside[..., None], found, fill)
