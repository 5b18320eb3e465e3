"""Batch norm, the sum with a shortcut, and ReLU, fused into the passes of batch norm."""

from __future__ import annotations

from typing import Any

import numpy as np

from numpy_ref.fast.blocks import blocks
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
    ) -> Array:
        """Map x [N, ..., C], a shortcut of its shape, and a factor of each example, [N], to that shape."""
        rows, centered, inverse_std, n = self._center(x, train)
        scale, offset = self._scale_and_offset(inverse_std, rows.shape[1])
        y = empty_like(rows)
        added = None if shortcut is None else shortcut.reshape(y.shape)
        zeros = np.zeros(y.shape[1], y.dtype)  # NumPy's maximum with a number is three times slower
        factors = None if keep is None else pixel_factors(keep, y, x.shape[-1])

        for part in blocks(rows):
            out = np.multiply(centered[part], scale, out=y[part])
            out += offset
            if factors is not None:
                scale_pixels(out, factors[part], out)
            if added is not None:
                out += added[part]
            np.maximum(out, zeros, out=out)
        self.save_for_backward(centered, inverse_std, y, n, factors)
        return y.reshape(x.shape)

    def backward(self, dy: Array) -> Array:
        """Return dL/dx; dL/dshortcut is then in `dshortcut`.

        ReLU passes the gradient where y > 0; the sum passes it to both of its terms. The batch norm's is then
        multiplied by the factor of the example.
        """
        centered, inverse_std, y, n, factors = self.saved
        d = promote(dy.reshape(centered.shape), centered)
        dsum = empty_like(d)
        dnorm = dsum if factors is None else empty_like(d)
        ones = np.ones(len(d), d.dtype)
        sums = np.zeros((2, d.shape[1]), np.float64)

        for part in blocks(d):
            block = np.multiply(d[part], y[part] > 0, out=dsum[part])
            if factors is not None:
                block = scale_pixels(block, factors[part], dnorm[part])
            sums[0] += ones[part] @ block
            sums[1] += np.einsum("nc,nc->c", block, centered[part])

        self.dshortcut = dsum.reshape(dy.shape)
        return self._input_gradient(dnorm, sums, centered, inverse_std, n).reshape(dy.shape)

    def free_saved(self) -> None:
        """Free the values that forward and backward saved."""
        super().free_saved()
        self.dshortcut = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "dshortcut"}


def pixel_factors(keep: Array, rows: Array, channels: int) -> Array:
    """The factor of every pixel, from those of the examples [N]: [M, F] for wide rows [M, F * C]."""
    pixels = rows.size // channels
    return np.repeat(keep.astype(rows.dtype), pixels // len(keep)).reshape(len(rows), -1)


def scale_pixels(rows: Array, factors: Array, out: Array) -> Array:
    """Multiply wide rows [M, F * C] by factors [M, F]; return `out`, which may be `rows`."""
    shape = (*factors.shape, -1)
    np.multiply(rows.reshape(shape), factors[..., None], out=out.reshape(shape))
    return out
