"""Batch normalization."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from numpy_ref.layers.module import Array, Layer, Parameter, check_channels, promote


def check_count(n: int) -> None:
    """Raise ValueError unless batch norm has the values per channel that training needs."""
    if n <= 1:
        raise ValueError(f"batch norm needs more than 1 value per channel in training, got {n}")


class BatchNorm(Layer):
    """Batch normalization over every axis but the last (Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1).

    y = (x - mean) / sqrt(var + eps) * weight + bias. In training, mean and (biased) var are those of the
    batch, and the running statistics move by PyTorch's rule, with the *unbiased* variance:
    running = (1 - momentum) * running + momentum * batch. In evaluation the running statistics are used.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self.weight = Parameter(np.ones(num_features, dtype))
        self.bias = Parameter(np.zeros(num_features, dtype))
        self.running_mean = np.zeros(num_features, dtype)
        self.running_var = np.ones(num_features, dtype)
        self.eps, self.momentum = eps, momentum

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [..., C] to its own shape.

        Raises ValueError in training when a channel has a single value, as PyTorch does, or none.
        """
        check_channels(x, len(self.weight.value))
        rows = promote(x.reshape(-1, x.shape[-1]), self.weight.value)
        mean, inverse_std = self._statistics(rows, train)
        normalized = (rows - mean) * inverse_std
        self.save_for_backward(normalized, inverse_std, train)
        return (normalized * self.weight.value + self.bias.value).reshape(x.shape)

    def _statistics(self, rows: Array, train: bool) -> tuple[Array, Array]:
        """Mean and 1 / sqrt(var + eps), [C] each: those of the batch in training, else the running ones."""
        if train:
            check_count(len(rows))
            mean = rows.mean(0, np.float64).astype(rows.dtype)
            var = np.square(rows - mean).mean(0, np.float64).astype(rows.dtype)
            self._update_running(mean, var, len(rows))
        else:
            mean, var = self.running_mean, self.running_var
        return mean, 1 / np.sqrt(var + self.eps)

    def _update_running(self, mean: Array, var: Array, n: int) -> None:
        """Move the running statistics toward those of a batch of n values per channel."""
        for running, batch in ((self.running_mean, mean), (self.running_var, var * (n / (n - 1)))):
            running *= 1 - self.momentum
            running += self.momentum * batch

    def backward(self, dy: Array) -> Array:
        r"""For one channel with n values x_i: z_i = (x_i - mean) s, s = 1 / sqrt(var + eps), y_i = w z_i + b.

            dL/dw = sum_i dy_i z_i        dL/db = sum_i dy_i        dz_i = w dy_i

        x_i enters z_i itself, and every z_k through mean and var, which are differentiated through:

            dmean/dx_i = 1 / n
            dvar/dx_i  = 2 (x_i - mean) / n           (the terms from mean cancel: sum_k (x_k - mean) = 0)
            ds/dx_i    = -s^3 / 2 * dvar/dx_i = -s^2 z_i / n
            dz_k/dx_i  = s [k = i] - s / n - (x_k - mean) s^2 z_i / n = s ([k = i] - 1 / n - z_k z_i / n)

            dL/dx_i = sum_k dz_k dz_k/dx_i = w s (dy_i - dL/db / n - z_i dL/dw / n)

        In evaluation mean and var are constants, and dL/dx_i = w s dy_i.
        """
        z, inverse_std, train = self.saved
        d = dy.reshape(z.shape)
        dweight, dbias = (terms.sum(0, np.float64).astype(z.dtype) for terms in (d * z, d))
        self.weight.add_grad(dweight)
        self.bias.add_grad(dbias)
        scale = self.weight.value * inverse_std
        if train:
            d = d - (dbias + z * dweight) / len(z)
        return np.asarray((scale * d).reshape(dy.shape))


class NoNorm(Layer):
    """y = x, in place of batch norm in a network without it."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """Return x."""
        return x

    def backward(self, dy: Array) -> Array:
        """dy/dx = 1."""
        return dy
