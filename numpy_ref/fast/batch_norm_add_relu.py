"""Batch norm, the sum with a shortcut, and ReLU, fused into the passes of batch norm."""

from __future__ import annotations

from typing import Any

import numpy as np

from numpy_ref.fast.memory_order import NHWC
from numpy_ref.fast.normalization import BatchNorm
from numpy_ref.layers import Array, promote
from numpy_ref.memory import empty_like


class BatchNormAddRelu(BatchNorm):
    """relu([keep *] batch_norm(x) [+ shortcut]), in as few passes over memory as batch norm alone.

    The names in the state dict are those of the batch norm.

    Attributes:
        dshortcut: dL/dshortcut, after backward.
    """

    dshortcut: Array | None = None

    def forward(
        self,
        x: Array,
        train: bool = False,
        shortcut: Array | None = None,
        keep: Array | None = None,
        *,
        out: Array | None = None,
    ) -> Array:
        """Map x [N, ..., C], a shortcut of its shape, and a factor of each example, [N], to that shape.

        The result is written to `out`, if given, which lies in memory as x does.
        """
        if train and self.group is not None:
            return self._forward_groups(x, shortcut=shortcut, keep=keep)
        order, centered, inverse_std, n = self._center(x, train)
        scale, offset = self._scale_and_offset(inverse_std, order)
        y = empty_like(centered) if out is None else order.view(out)
        added = None if shortcut is None else order.view(shortcut)
        zeros = np.zeros(y.shape[-1], y.dtype)  # NumPy's maximum with a number is three times slower
        factors = None if keep is None else order.factors(keep, y)

        for part in order.blocks(y):
            block = np.multiply(centered[part], scale, out=y[part])
            block += offset
            if factors is not None:
                order.scale(block, factors, part, block)
            if added is not None:
                block += added[part]
            np.maximum(block, zeros, out=block)
        self.save_for_backward(order, centered, inverse_std, y, n, factors)
        return order.restore(y)

    def backward(self, dy: Array) -> Array:
        """Return dL/dx; dL/dshortcut is then in `dshortcut`.

        ReLU passes the gradient where y > 0; the sum passes it to both of its terms. The batch norm's is then
        multiplied by the factor of the example.
        """
        if isinstance(self.saved[0], list):
            return self._backward_groups(dy)
        order: NHWC
        order, centered, inverse_std, y, n, factors = self.saved
        d = order.view(promote(dy, centered))
        dsum = empty_like(d)
        dnorm = dsum if factors is None else empty_like(d)
        sums = np.zeros((2, order.width), np.float64)

        for part in order.blocks(d):
            block = np.multiply(d[part], y[part] > 0, out=dsum[part])
            if factors is not None:
                block = order.scale(block, factors, part, dnorm[part])
            sums[0] += order.sum(block)
            sums[1] += order.dot(block, centered[part])

        self.dshortcut = order.restore(dsum)
        return order.restore(self._input_gradient(order, dnorm, sums, centered, inverse_std, n))

    def _backward_groups(self, dy: Array) -> Array:
        """Return dL/dx, group by group, and likewise set `dshortcut`."""
        dx = super()._backward_groups(dy)
        norms, order = self.saved
        self.dshortcut = order.empty(dx.shape, dx.dtype)
        for part, norm in zip(self._groups(dy), norms, strict=True):
            self.dshortcut[part] = norm.dshortcut
        return dx

    def free_saved(self) -> None:
        """Free the values that forward and backward saved."""
        super().free_saved()
        self.dshortcut = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "dshortcut"}
