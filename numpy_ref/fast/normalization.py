"""Batch norm by blocks, each pass over memory doing all that it can."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from numpy_ref import layers
from numpy_ref.fast.blocks import blocks, fold_sums, repeat, sum_rows, widen
from numpy_ref.layers import Array, check_channels, check_count, promote
from numpy_ref.memory import empty_like


class BatchNorm(layers.BatchNorm):
    """`layers.BatchNorm` by blocks.

    Forward takes three passes: one for the mean; one for x - mean, which is saved in place of x, and its
    squares; one for y. Backward takes two: one for both sums, and one for dx, which is linear in dy and
    x - mean with one coefficient per channel for each.

    Attributes:
        all_reduce: adds up sums over all parts of a batch that processes share; see `parallel.py`.
        keeps_running: True if this process updates the running statistics.
    """

    all_reduce: Callable[[Array], Array] = staticmethod(lambda sums: sums)
    keeps_running = True

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [..., C] to its own shape."""
        rows, centered, inverse_std, n = self._center(x, train)
        scale, offset = self._scale_and_offset(inverse_std, rows.shape[1])
        y = empty_like(rows)
        for part in blocks(rows):
            out = np.multiply(centered[part], scale, out=y[part])
            out += offset
        self.save_for_backward(centered, inverse_std, n)
        return y.reshape(x.shape)

    def backward(self, dy: Array) -> Array:
        """Return dL/dx."""
        centered, inverse_std, n = self.saved
        d = promote(dy.reshape(centered.shape), centered)
        ones = np.ones(len(d), d.dtype)
        sums = np.zeros((2, d.shape[1]), np.float64)
        for part in blocks(d):
            sums[0] += ones[part] @ d[part]
            sums[1] += np.einsum("nc,nc->c", d[part], centered[part])
        return self._input_gradient(d, sums, centered, inverse_std, n).reshape(dy.shape)

    def _center(self, x: Array, train: bool) -> tuple[Array, Array, Array, int]:
        """Return x as wide rows, x - mean, 1 / sqrt(var + eps), and in training the number of values per
        channel, else 0."""
        check_channels(x, len(self.weight.value))
        rows, fold = widen(promote(x, self.weight.value))
        centered = empty_like(rows)
        if not train:
            np.subtract(rows, repeat(self.running_mean, fold), out=centered)
            return rows, centered, 1 / np.sqrt(self.running_var + self.eps), 0
        totals = self.all_reduce(np.append(fold_sums(sum_rows(rows, blocks(rows)), fold), len(rows) * fold))
        n = int(totals[-1])
        check_count(n)
        mean = (totals[:-1] / n).astype(rows.dtype)
        wide_mean, squares = repeat(mean, fold), np.zeros(rows.shape[1], np.float64)
        for part in blocks(rows):
            block = np.subtract(rows[part], wide_mean, out=centered[part])
            squares += np.einsum("nc,nc->c", block, block)
        var = (self.all_reduce(fold_sums(squares, fold)) / n).astype(rows.dtype)
        if self.keeps_running:
            self._update_running(mean, var, n)
        return rows, centered, 1 / np.sqrt(var + self.eps), n

    def _scale_and_offset(self, inverse_std: Array, width: int) -> tuple[Array, Array]:
        """y = (x - mean) * scale + offset; one of each for every column of wide rows."""
        fold = width // len(inverse_std)
        return repeat(self.weight.value * inverse_std, fold), repeat(self.bias.value, fold)

    def _input_gradient(self, d: Array, sums: Array, centered: Array, inverse_std: Array, n: int) -> Array:
        """Add the gradients of weight and bias, and return dL/dx, from d = dL/dy.

        `sums` are those of d and of d (x - mean) over the rows. Derived in `layers.BatchNorm.backward`.
        """
        fold = d.shape[1] // len(inverse_std)
        dbias, dscale = sums = fold_sums(sums, fold)
        self.weight.add_grad(dscale * inverse_std)
        self.bias.add_grad(dbias)
        scale, dx = self.weight.value * inverse_std, empty_like(d)
        a = repeat(scale, fold)
        if n:
            # w s (dy - dbias / n - z dweight / n) with z = s (x - mean), as a dy + b (x - mean) + c
            dbias, dscale = self.all_reduce(sums)
            b, c = -scale * inverse_std**2 * dscale / n, -scale * dbias / n
            b, c = repeat(b.astype(d.dtype), fold), repeat(c.astype(d.dtype), fold)
        for part in blocks(d):
            out = np.multiply(d[part], a, out=dx[part])
            if n:
                linear = centered[part] * b
                linear += c
                out += linear
        return dx
