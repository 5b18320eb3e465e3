"""Pooling: the maximum and the mean over windows, and the mean over the whole image."""

from __future__ import annotations

import numpy as np

from numpy_ref.layers.convolution import output_size, pad2d, taps, unpad2d
from numpy_ref.layers.module import Array, Layer, Pair, pair, sum_type


class Pool2d(Layer):
    """The window of a pooling layer: kernel, stride (by default the kernel's size) and padding."""

    def __init__(
        self, kernel_size: int | Pair, *, stride: int | Pair | None = None, padding: int | Pair = 0
    ) -> None:
        self.kernel, self.padding = pair("kernel_size", kernel_size), pair("padding", padding, 0)
        self.stride = self.kernel if stride is None else pair("stride", stride)
        if any(2 * p > k for p, k in zip(self.padding, self.kernel, strict=True)):
            raise ValueError(f"padding {self.padding} is more than half of the kernel {self.kernel}")

    def _taps(self, x: Array) -> tuple[Pair, list[tuple[slice, slice]]]:
        size = output_size(x.shape[1:3], self.kernel, self.stride, self.padding)
        return size, list(taps(self.kernel, self.stride, size))


class MaxPool2d(Pool2d):
    """Maximum over windows. Padding is never the maximum; of equal values the first in reading order is."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [N, H, W, C] to [N, OH, OW, C]. A NaN in a window is its maximum, as in PyTorch."""
        (oh, ow), slices = self._taps(x)
        padded = pad2d(x, self.padding, -np.inf)
        y = np.full((len(x), oh, ow, x.shape[-1]), -np.inf, x.dtype)
        argmax = np.zeros(y.shape, np.uint8 if len(slices) <= 256 else np.int64)
        for tap, (rows, cols) in enumerate(slices):
            candidate = padded[:, rows, cols]
            better = (candidate > y) | np.isnan(candidate)
            np.copyto(y, candidate, where=better)
            argmax[better] = tap
        self.save_for_backward(x.shape, argmax, slices)
        return y

    def backward(self, dy: Array) -> Array:
        """y is a copy of the window's maximum, which alone gets dy; where windows overlap, gradients add."""
        (n, h, w, c), argmax, slices = self.saved
        dpadded = np.zeros((n, h + 2 * self.padding[0], w + 2 * self.padding[1], c), dy.dtype)
        for tap, (rows, cols) in enumerate(slices):
            dpadded[:, rows, cols] += dy * (argmax == tap)
        return unpad2d(dpadded, self.padding)


class AvgPool2d(Pool2d):
    """Mean over windows, in which the padding counts as zeros (PyTorch's `count_include_pad`)."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [N, H, W, C] to [N, OH, OW, C]."""
        (oh, ow), slices = self._taps(x)
        padded = pad2d(x, self.padding)
        y = np.zeros((len(x), oh, ow, x.shape[-1]), sum_type(x.dtype, len(slices)))
        for rows, cols in slices:
            y += padded[:, rows, cols]
        y /= len(slices)
        self.save_for_backward(x.shape, slices)
        return y.astype(x.dtype, copy=False)

    def backward(self, dy: Array) -> Array:
        """Each of the KH * KW values of a window enters its mean with 1 / (KH * KW)."""
        (n, h, w, c), slices = self.saved
        dpadded = np.zeros((n, h + 2 * self.padding[0], w + 2 * self.padding[1], c), dy.dtype)
        for rows, cols in slices:
            dpadded[:, rows, cols] += dy / len(slices)
        return unpad2d(dpadded, self.padding)


class GlobalAvgPool2d(Layer):
    """Mean over height and width."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [N, H, W, C] to [N, C]."""
        self.save_for_backward(x.shape)
        mean = x.mean((1, 2), sum_type(x.dtype, x.shape[1] * x.shape[2]))
        return np.asarray(mean, x.dtype if x.dtype.kind == "f" else None)

    def backward(self, dy: Array) -> Array:
        """Each of the H * W values enters with 1 / (H * W)."""
        ((n, h, w, c),) = self.saved
        return np.broadcast_to((dy / (h * w))[:, np.newaxis, np.newaxis], (n, h, w, c)).copy()
