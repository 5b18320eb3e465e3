"""Batch norm, the sum with a shortcut, and ReLU, fused into the passes of batch norm."""

from __future__ import annotations

from typing import Any

import numpy as np

from numpy_ref.fast.blocks import blocks
from numpy_ref.fast.normalization import BatchNorm
from numpy_ref.layers import Array, promote
from numpy_ref.memory import empty_like


class BatchNormAddRelu(BatchNorm):
    """relu(batch_norm(x) [+ shortcut]), in as few passes over memory as batch norm alone.

    The names in the state dict are those of the batch norm.

    Attributes:
        dshortcut: dL/dshortcut, after backward.
    """

    dshortcut: Array | None = None

    def forward(self, x: Array, train: bool = False, shortcut: Array | None = None) -> Array:
        """Map x [..., C], and a shortcut of its shape, to that shape."""
        rows, centered, inverse_std, n = self._center(x, train)
        scale, offset = self._scale_and_offset(inverse_std, rows.shape[1])
        y = empty_like(rows)
        added = None if shortcut is None else shortcut.reshape(y.shape)
        zeros = np.zeros(y.shape[1], y.dtype)  # NumPy's maximum with a number is three times slower

        for part in blocks(rows):
            out = np.multiply(centered[part], scale, out=y[part])
            out += offset
            if added is not None:
                out += added[part]
            np.maximum(out, zeros, out=out)
        self.save_for_backward(centered, inverse_std, y, n)
        return y.reshape(x.shape)

    def backward(self, dy: Array) -> Array:
        """Return dL/dx; dL/dshortcut is then in `dshortcut`.

        ReLU passes the gradient where y > 0; the sum passes it to both of its terms.
        """
        centered, inverse_std, y, n = self.saved
        d = promote(dy.reshape(centered.shape), centered)
        dsum = empty_like(d)
        ones = np.ones(len(d), d.dtype)
        sums = np.zeros((2, d.shape[1]), np.float64)

        for part in blocks(d):
            block = np.multiply(d[part], y[part] > 0, out=dsum[part])
            sums[0] += ones[part] @ block
            sums[1] += np.einsum("nc,nc->c", block, centered[part])

        self.dshortcut = dsum.reshape(dy.shape)
        return self._input_gradient(dsum, sums, centered, inverse_std, n).reshape(dy.shape)

    def free_saved(self) -> None:
        """Free the values that forward and backward saved."""
        super().free_saved()
        self.dshortcut = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "dshortcut"}
