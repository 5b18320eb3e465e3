"""The linear layer."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from numpy_ref.layers.module import Array, Layer, Parameter, check_channels, draw, promote, sum_type


class Linear(Layer):
    """y = x @ weight + bias. `weight` [in, out] and `bias` [out] from PyTorch's uniform(+-1 / sqrt(in))."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rng: np.random.Generator | None,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        bound = 1.0 / math.sqrt(in_features)
        self.weight = Parameter(draw(rng, "uniform", (in_features, out_features), bound, dtype))
        self.bias = Parameter(draw(rng, "uniform", (out_features,), bound, dtype))

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [N, in] to [N, out]."""
        check_channels(x, len(self.weight.value), 2)
        x = promote(x, self.weight.value)
        self.save_for_backward(x)
        return x @ self.weight.value + self.bias.value

    def backward(self, dy: Array) -> Array:
        r"""y_nj = sum_i x_ni w_ij + b_j. So, summing over whatever each variable enters:

        dL/dx_ni = sum_j dy_nj w_ij      dx = dy @ weight.T        [N, in]
        dL/dw_ij = sum_n x_ni dy_nj      dweight = x.T @ dy        [in, out]
        dL/db_j  = sum_n dy_nj           dbias = dy summed over n  [out]
        """
        (x,) = self.saved
        self.weight.add_grad_product(x.T, dy)
        self.bias.add_grad(dy.sum(0, sum_type(dy.dtype, len(dy))))
        return dy @ self.weight.value.T
