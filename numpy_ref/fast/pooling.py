"""Max pooling by whole-array maxima."""

from __future__ import annotations

import numpy as np

from numpy_ref import layers
from numpy_ref.fast.blocks import blocks
from numpy_ref.fast.taps import clipped_taps
from numpy_ref.layers import Array, output_size
from numpy_ref.memory import empty, empty_like


class MaxPool2d(layers.MaxPool2d):
    """`layers.MaxPool2d` by whole-array maxima; backward looks for the place of each maximum again."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [N, H, W, C] to [N, OH, OW, C]."""
        n, h, w, c = x.shape
        size = output_size((h, w), self.kernel, self.stride, self.padding)
        taps = list(clipped_taps(self.kernel, self.stride, self.padding, (h, w), size))
        y = empty((n, *size, c), x.dtype)
        y.fill(-np.inf)

        for part in blocks(x):
            for _, out, inner in taps:
                largest = y[part, *out]
                np.maximum(largest, x[part, *inner], out=largest)
        self.save_for_backward(x, y, taps)
        return y

    def backward(self, dy: Array) -> Array:
        """Return dL/dx. The first tap that equals the maximum gets all of the gradient, later ones none."""
        x, y, taps = self.saved
        dx = empty_like(x)

        for part in blocks(x):
            dx[part] = 0
            left = dy[part].copy()
            for _, out, inner in taps:
                taken = left[:, *out] * (x[part, *inner] == y[part, *out])
                dx[part, *inner] += taken
                left[:, *out] -= taken
        return dx
