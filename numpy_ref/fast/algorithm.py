"""The interface of the algorithms of convolution; `convolution.choose_algorithm` chooses one."""

from __future__ import annotations

from typing import Any

from numpy_ref.fast.memory_order import NHWC
from numpy_ref.layers import Array, Pair, Parameter


class Algorithm:
    """One way to compute a convolution; an instance serves one forward pass and its backward pass.

    Args:
        weight: the kernel [KH, KW, I, O].
        stride: of the kernel, (rows, columns).
        padding: zeros on each side, (rows, columns).
        keep_patches: save for backward what is made of the images, instead of making it again.

    Attributes:
        order: in which x, y, dy and dx lie in memory.
    """

    order: type[NHWC] = NHWC

    def __init__(self, weight: Parameter, stride: Pair, padding: Pair, *, keep_patches: bool) -> None:
        self.weight, self.stride, self.padding = weight, stride, padding
        self.kernel: Pair = weight.value.shape[:2]
        self.keep_patches = keep_patches

    def forward(self, x: Array, y: Array) -> list[Any]:
        """Write the convolution of x [N, H, W, I] into y [N, OH, OW, O].

        Returns what backward needs besides x.
        """
        raise NotImplementedError

    def backward(self, x: Array, saved: list[Any], dy: Array, dx: Array | None) -> None:
        """Add dL/dweight to the weight's gradient, and write dL/dx into dx, unless that is None."""
        raise NotImplementedError
