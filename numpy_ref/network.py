"""The common part of all networks: stages, freezing, and the passes through the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from numpy_ref.layers import Array, Layer, no_grad


def block_factors(keep: Array | None) -> Iterator[Array]:
    """The factors [N] of each block's branch, of keep [N, blocks]; nothing without stochastic depth."""
    return iter(() if keep is None else keep.T)


def run(layer: Any, x: Array, train: bool, factors: Iterator[Array]) -> Array:
    """layer(x); a residual block takes the next of the factors, if there are any."""
    keep = next(factors, None) if layer.has_branch else None
    y: Array = layer.forward(x, train) if keep is None else layer.forward(x, train, keep)
    return y


class Network(Layer):
    """Layers one after another, from images to logits, in stages that have names.

    Attributes:
        dtype: of every array.
        frozen: the number of layers of the body, from the first, that are frozen; see `freeze_backbone`.
    """

    dtype: np.dtype[Any]
    frozen = 0

    def body(self) -> Iterator[tuple[str, Layer]]:
        """The layers in order, each with the name of the stage it belongs to."""
        raise NotImplementedError

    def stages(self, x: Array, train: bool = False, keep: Array | None = None) -> dict[str, Array]:
        """The output of every stage, in order."""
        out = {}
        x, factors = np.asarray(x, self.dtype), block_factors(keep)
        for stage, layer in self.body():
            x = out[stage] = run(layer, x, train, factors)
        return out

    def freeze_backbone(self) -> None:
        """Freeze everything but the head `fc`: the layers before it always compute as in evaluation, save
        nothing for backward, and have no part in it."""
        for name, parameter in self.named_parameters().items():
            parameter.trainable = name.startswith("fc.")
        self.frozen = len(list(self.body())) - 1

    def trained_layers(self) -> list[Layer]:
        """The layers of the body that are not frozen, in order."""
        return [layer for _, layer in self.body()][self.frozen :]

    def forward(self, x: Array, train: bool = False, keep: Array | None = None) -> Array:
        """Map images [N, H, W, C] to logits [N, num_classes].

        Args:
            x: the images.
            train: as in `Layer.forward`.
            keep: stochastic depth in training: the factor of each residual branch, [N, num_blocks], such as
                `[[1, 0, 1 / (1 - p)]]`; see `resnet.ResidualBlock`. None keeps every branch.
        """
        x, factors = np.asarray(x, self.dtype), block_factors(keep)
        for _, layer in islice(self.body(), self.frozen):
            with no_grad():
                x = layer.forward(x)
        for layer in self.trained_layers():
            x = run(layer, x, train, factors)
        return x

    def backward(self, dy: Array, done: Callable[[Layer], object] = lambda layer: None) -> Array:
        """Map dL/dlogits [N, num_classes] to dL/dx [N, H, W, C], or to that of the first layer not frozen.

        Each layer frees what it saved. `done(layer)` is called for a layer of the body when its gradients are
        complete and backward needs nothing of it any more.
        """
        for layer in reversed(self.trained_layers()):
            dy = layer.backward(dy)
            layer.free_saved()
            done(layer)
        return dy
