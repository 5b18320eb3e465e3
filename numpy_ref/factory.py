"""Makes the layers of a network: plain or fast, with batch norm or without."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from numpy_ref import fast as fast_layers
from numpy_ref import layers as plain_layers
from numpy_ref.layers import BatchNorm, Layer, Linear, NoNorm, Sequential


class LayerFactory:
    """Makes the layers of a network: plain or fast, with batch norm or without.

    With `fused`, its norms compute the ReLU after them; `group` is theirs.
    """

    def __init__(
        self,
        *,
        batch_norm: bool = True,
        group: int | None = None,
        rng: np.random.Generator | None,
        dtype: npt.DTypeLike,
        fast: bool,
        fused: bool = False,
    ) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise ValueError(f"dtype must be float32 or float64, not {self.dtype}")
        self.batch_norm, self.group, self.fused = batch_norm, group, fused
        self.forms: Any = fast_layers if fast else plain_layers
        self.conv = partial(self.forms.Conv2d, bias=not batch_norm, rng=rng, dtype=dtype)
        self.linear = partial(Linear, rng=rng, dtype=dtype)

    def norm(self, num_features: int) -> BatchNorm | NoNorm:
        """A norm that a ReLU follows, perhaps after a sum."""
        if self.fused:
            return fast_layers.BatchNormAddRelu(num_features, group=self.group, dtype=self.dtype)
        return self.plain_norm(num_features)

    def plain_norm(self, num_features: int) -> BatchNorm | NoNorm:
        """A norm that no ReLU follows."""
        if not self.batch_norm:
            return NoNorm()
        norm: BatchNorm = self.forms.BatchNorm(num_features, group=self.group, dtype=self.dtype)
        return norm

    def shortcut(self, kind: str, in_channels: int, out_channels: int, stride: int) -> Layer | None:
        """The layer of the shortcut where the shape changes; elsewhere None, as in torchvision."""
        if kind not in ("projection", "option-A"):
            raise ValueError(f'shortcut must be "projection" or "option-A", not {kind!r}')
        if stride == 1 and in_channels == out_channels:
            return None
        if kind == "option-A":
            layer: Layer = self.forms.OptionA(in_channels, out_channels, stride=stride)
            return layer
        conv = self.conv(in_channels, out_channels, 1, stride=stride)
        return Sequential(conv, self.plain_norm(out_channels))
