"""The residual block with its sum and its ReLUs inside the passes of its norms."""

from __future__ import annotations

from typing import Any

from numpy_ref.fast.batch_norm_add_relu import BatchNormAddRelu
from numpy_ref.layers import Array, Layer, ReLU


class FusedBlock(Layer):
    """Mixin for a block of `resnet.py` whose norms are all `BatchNormAddRelu`; comes before the block class.

    Each norm computes the ReLU after it, and the last one the sum with the shortcut, too.
    """

    branch: Any  # see `resnet.ResidualBlock`
    shortcut: Any

    def forward(self, x: Array, train: bool = False, keep: Array | None = None) -> Array:
        """relu(branch(x) + shortcut(x)), or relu(keep * branch(x) + shortcut(x)); keep is [N]."""
        shortcut = self.shortcut().forward(x, train)
        layers, last_norm = self._layers()
        for layer in layers:
            x = layer.forward(x, train)
        return last_norm.forward(x, train, shortcut, keep)

    def backward(self, dy: Array) -> Array:
        """x enters y on two paths, the branch and the shortcut: dL/dx is the sum of both gradients."""
        layers, last_norm = self._layers()
        dx = last_norm.backward(dy)
        for layer in reversed(layers):
            dx = layer.backward(dx)
        dx += self.shortcut().backward(last_norm.dshortcut)
        return dx

    def _layers(self) -> tuple[list[Layer], BatchNormAddRelu]:
        """Return the branch's layers without the ReLUs: all but the last, and the last, which is a norm."""
        *layers, last_norm = [layer for layer in self.branch() if not isinstance(layer, ReLU)]
        return layers, last_norm
