"""Batch norm by blocks, each pass over memory doing all that it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Self

import numpy as np

from numpy_ref import layers
from numpy_ref.fast.blocks import slices
from numpy_ref.fast.memory_order import NHWC, order_of
from numpy_ref.layers import Array, check_channels, check_count, group_count, promote
from numpy_ref.memory import empty_like


class BatchNorm(layers.BatchNorm):
    """`layers.BatchNorm` by blocks.

    Forward takes three passes: one for the mean; one for x - mean, which is saved in place of x, and its
    squares; one for y. Backward takes two: one for both sums, and one for dx, which is linear in dy and
    x - mean with one coefficient per channel for each.

    With a `group`, each group of a batch passes through a norm of its own, `_norm_of_group`. In the memory
    order HCWN a group is copied first, since its examples are not neighbors there.

    Attributes:
        all_reduce: adds up sums over all parts of a batch that processes share; see `parallel.py`. With a
            `group` each part has whole groups, and the sums are those of the running statistics alone.
        keeps_running: True if this process updates the running statistics.
    """

    all_reduce: Callable[[Array], Array] = staticmethod(lambda sums: sums)
    keeps_running = True

    def forward(self, x: Array, train: bool = False, *, out: Array | None = None) -> Array:
        """Map x [..., C] to its own shape; written to `out`, if given, which lies in memory as x does."""
        if train and self.group is not None:
            return self._forward_groups(x)
        order, centered, inverse_std, n = self._center(x, train)
        scale, offset = self._scale_and_offset(inverse_std, order)
        y = empty_like(centered) if out is None else order.view(out)
        for part in order.blocks(centered):
            block = np.multiply(centered[part], scale, out=y[part])
            block += offset
        self.save_for_backward(order, centered, inverse_std, n)
        return order.restore(y)

    def backward(self, dy: Array) -> Array:
        """Return dL/dx."""
        if isinstance(self.saved[0], list):
            return self._backward_groups(dy)
        order: NHWC
        order, centered, inverse_std, n = self.saved
        d = order.view(promote(dy, centered))
        sums = np.zeros((2, order.width), np.float64)
        for part in order.blocks(d):
            sums[0] += order.sum(d[part])
            sums[1] += order.dot(d[part], centered[part])
        return order.restore(self._input_gradient(order, d, sums, centered, inverse_std, n))

    def _center(self, x: Array, train: bool) -> tuple[NHWC, Array, Array, int]:
        """Return the order of x in memory, a view of x - mean, 1 / sqrt(var + eps), and the number of values
        per channel in training, else 0."""
        check_channels(x, len(self.weight.value))
        order = order_of(x)(x.shape)
        rows = order.view(promote(x, self.weight.value))
        centered = empty_like(rows)
        if not train:
            np.subtract(rows, order.spread(self.running_mean), out=centered)
            return order, centered, 1 / np.sqrt(self.running_var + self.eps), 0
        sums, squares = np.zeros((2, order.width), np.float64)
        for part in order.blocks(rows):
            sums += order.sum(rows[part])
        totals = self.all_reduce(np.append(order.total(sums), x.size // x.shape[-1]))
        n = int(totals[-1])
        check_count(n)
        mean = (totals[:-1] / n).astype(rows.dtype)
        wide_mean = order.spread(mean)
        for part in order.blocks(rows):
            block = np.subtract(rows[part], wide_mean, out=centered[part])
            squares += order.dot(block, block)
        var = (self.all_reduce(order.total(squares)) / n).astype(rows.dtype)
        if self.keeps_running:
            self._update_running(mean, var, n)
        return order, centered, 1 / np.sqrt(var + self.eps), n

    def _scale_and_offset(self, inverse_std: Array, order: NHWC) -> tuple[Array, Array]:
        """y = (x - mean) * scale + offset, for views."""
        return order.spread(self.weight.value * inverse_std), order.spread(self.bias.value)

    def _input_gradient(
        self, order: NHWC, d: Array, sums: Array, centered: Array, inverse_std: Array, n: int
    ) -> Array:
        """Add the gradients of weight and bias, and return dL/dx, from d = dL/dy; all views.

        `sums` are those of d and of d (x - mean). Derived in `layers.BatchNorm.backward`.
        """
        dbias, dscale = sums = order.total(sums)
        self.weight.add_grad(dscale * inverse_std)
        self.bias.add_grad(dbias)
        scale, dx = self.weight.value * inverse_std, empty_like(d)
        a = order.spread(scale)
        if n:
            # w s (dy - dbias / n - z dweight / n) with z = s (x - mean), as a dy + b (x - mean) + c
            dbias, dscale = self.all_reduce(sums)
            b, c = -scale * inverse_std**2 * dscale / n, -scale * dbias / n
            b, c = order.spread(b.astype(d.dtype)), order.spread(c.astype(d.dtype))
        for part in order.blocks(d):
            out = np.multiply(d[part], a, out=dx[part])
            if n:
                linear = centered[part] * b
                linear += c
                out += linear
        return dx

    def _forward_groups(self, x: Array, **inputs: Array | None) -> Array:
        """Forward in training, group by group.

        Args:
            x: [B, ..., C].
            inputs: further arguments of `forward`, [B, ...] each.
        """
        check_channels(x, len(self.weight.value))
        parts = self._groups(x)
        norms: list[BatchNorm] = []
        order, x = order_of(x), promote(x, self.weight.value)
        y = order.empty(x.shape, x.dtype)
        for part in parts:
            norm = self._norm_of_group()
            given = {name: array[part] for name, array in inputs.items() if array is not None}
            out = y[part] if order is NHWC else None
            of_group = norm.forward(order.ordered(x[part]), True, out=out, **given)
            if out is None:
                y[part] = of_group
            norms.append(norm)
        self._average(norms)
        self.save_for_backward(norms, order)
        return y

    def _backward_groups(self, dy: Array) -> Array:
        """Return dL/dx, group by group."""
        norms, order = self.saved
        dx: Array = order.empty(dy.shape, np.result_type(dy, self.weight.value))
        for part, norm in zip(self._groups(dy), norms, strict=True):
            dx[part] = norm.backward(dy[part])
        return dx

    def _groups(self, x: Array) -> Iterator[slice]:
        """The examples of each group of a batch."""
        return slices(len(x), len(x) // group_count(len(x), self.group))

    def _norm_of_group(self) -> Self:
        """Return a norm with these parameters, whose running statistics become those of its own batch."""
        norm = type(self)(len(self.weight.value), eps=self.eps, momentum=1.0, dtype=self.weight.value.dtype)
        norm.weight, norm.bias = self.weight, self.bias
        return norm

    def _average(self, norms: Sequence[layers.BatchNorm]) -> None:
        """Move the running statistics toward the mean over the groups, those of other processes included."""
        statistics = np.array([(norm.running_mean, norm.running_var) for norm in norms])  # [G, 2, C]
        sums = statistics.sum(0, np.float64)
        totals = self.all_reduce(np.append(sums, len(norms)))
        if self.keeps_running:
            mean, unbiased_var = (totals[:-1] / totals[-1]).reshape(sums.shape)
            self._move_running(mean, unbiased_var)
