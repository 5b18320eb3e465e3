"""Convolution as the sum of 1x1 convolutions of the shifted image, one for each tap of the kernel.

Where the image is not much larger than its padding, only this form leaves out the products with zeros.
"""

from __future__ import annotations

import numpy as np

from numpy_ref.fast.algorithm import Algorithm
from numpy_ref.fast.taps import Tap, clipped_taps
from numpy_ref.layers import Array


class Shifted(Algorithm):
    """y = sum over taps of (x shifted by the tap) @ weight[tap]; taps in the padding alone are left out."""

    def forward(self, x: Array, y: Array) -> list[Array]:
        """Save nothing but x."""
        y.fill(0)
        weight = self._weight_by_tap()
        for tap, out, inner in self._taps(x, y):
            inputs, outputs = x[:, *inner], y[:, *out]
            outputs += (inputs.reshape(-1, x.shape[-1]) @ weight[tap]).reshape(outputs.shape)
        return []

    def backward(self, x: Array, saved: list[Array], dy: Array, dx: Array | None) -> None:
        """For each tap dx += dy @ weight[tap].T at its inputs, and dweight[tap] = inputs.T @ dy."""
        taps = self._taps(x, dy)
        weight = self._weight_by_tap()
        if dx is not None:
            dx.fill(0)
            for tap, out, inner in taps:
                inputs, outputs = dx[:, *inner], dy[:, *out]
                inputs += (outputs.reshape(-1, dy.shape[-1]) @ weight[tap].T).reshape(inputs.shape)

        def write_dweight(gradient: Array) -> None:
            dweight = gradient.reshape(weight.shape)
            for unused in set(range(len(dweight))) - {tap for tap, _, _ in taps}:
                dweight[unused] = 0
            for tap, out, inner in taps:
                inputs, outputs = x[:, *inner], dy[:, *out]
                rows = inputs.reshape(-1, x.shape[-1])
                np.matmul(rows.T, outputs.reshape(-1, dy.shape[-1]), out=dweight[tap])

        self.weight.add_written(write_dweight)

    def _taps(self, x: Array, y: Array) -> list[Tap]:
        return list(clipped_taps(self.kernel, self.stride, self.padding, x.shape[1:3], y.shape[1:3]))

    def _weight_by_tap(self) -> Array:
        """The weight as [KH * KW, I, O], a view."""
        return self.weight.value.reshape(-1, *self.weight.value.shape[2:])
