"""Layers that work on each number alone, and Flatten, which only moves them."""

from __future__ import annotations

import math

import numpy as np

from numpy_ref.layers.module import Array, Layer


class ReLU(Layer):
    """y = max(x, 0)."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x of any shape to the same shape."""
        y = np.maximum(x, 0)
        self.save_for_backward(y)
        return y

    def backward(self, dy: Array) -> Array:
        """dy/dx is 1 where x > 0, else 0 (at the kink too, as in PyTorch); y > 0 is the same as x > 0."""
        (y,) = self.saved
        return np.asarray(dy * (y > 0))


class Sigmoid(Layer):
    """y = 1 / (1 + exp(-x))."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x of any shape to the same shape. exp gets only numbers <= 0, and so cannot overflow."""
        small = np.exp(-np.abs(x))
        y = np.where(x >= 0, 1 / (1 + small), small / (1 + small))
        self.save_for_backward(y)
        return y

    def backward(self, dy: Array) -> Array:
        """dy/dx = exp(-x) / (1 + exp(-x))^2 = y (1 - y)."""
        (y,) = self.saved
        return np.asarray(dy * y * (1 - y))


class Flatten(Layer):
    """[N, H, W, C] to [N, C * H * W], in the order PyTorch flattens [N, C, H, W]."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [N, H, W, C] to [N, C * H * W], channels outermost."""
        self.save_for_backward(x)
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2)).reshape(len(x), math.prod(x.shape[1:]))

    def backward(self, dy: Array) -> Array:
        """The same elements in their old places, in the memory order of x."""
        x: Array = self.saved[0]
        n, h, w, c = x.shape
        dx = np.empty_like(x)
        dx[...] = dy.reshape(n, c, h, w).transpose(0, 2, 3, 1)
        return dx
