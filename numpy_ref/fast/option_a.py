"""The shortcut of the CIFAR family, in the memory order of its input."""

from __future__ import annotations

from numpy_ref import layers
from numpy_ref.fast.memory_order import NHWC, order_of
from numpy_ref.layers import Array


class OptionA(layers.OptionA):
    """`layers.OptionA`, whose results lie in memory as x does."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [N, H, W, I] to [N, ceil(H / stride), ceil(W / stride), O]."""
        order, (front, back) = order_of(x), self.pad
        read = x[:, :: self.stride, :: self.stride]
        y = order.empty((*read.shape[:3], front + x.shape[-1] + back), x.dtype)
        y[..., :front] = 0
        y[..., front : front + x.shape[-1]] = read
        y[..., front + x.shape[-1] :] = 0
        self.save_for_backward(x.shape, order)
        return y

    def backward(self, dy: Array) -> Array:
        """Return dL/dx."""
        order: type[NHWC]
        (shape, order), front = self.saved, self.pad[0]
        dx = order.empty(shape, dy.dtype)
        dx[...] = 0
        dx[:, :: self.stride, :: self.stride] = dy[..., front : front + shape[-1]]
        return dx
