"""1x1 convolution: a linear layer over pixels, so one matrix product on a view."""

from __future__ import annotations

import numpy as np

from numpy_ref.fast.algorithm import Algorithm
from numpy_ref.layers import Array


class Pointwise(Algorithm):
    """y = x @ matrix for every pixel that the stride reads; no padding."""

    def forward(self, x: Array, y: Array) -> list[Array]:
        """Save the pixels that are read, as rows."""
        (sh, sw) = self.stride
        rows = x[:, ::sh, ::sw].reshape(-1, x.shape[-1])  # a view, unless strided
        np.matmul(rows, self.weight.value[0, 0], out=y.reshape(-1, y.shape[-1]))
        return [rows]

    def backward(self, x: Array, saved: list[Array], dy: Array, dx: Array | None) -> None:
        """dmatrix = rows.T @ dy, dx = dy @ matrix.T; pixels that were not read get 0."""
        (rows,), (sh, sw) = saved, self.stride
        dy = dy.reshape(-1, dy.shape[-1])
        self.weight.add_grad_product(rows.T, dy)
        matrix = self.weight.value[0, 0]
        if dx is None:
            return
        if (sh, sw) == (1, 1):
            np.matmul(dy, matrix.T, out=dx.reshape(rows.shape))
        else:
            dx.fill(0)
            read = dx[:, ::sh, ::sw]
            read[...] = (dy @ matrix.T).reshape(read.shape)
