"""Batch normalization."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from numpy_ref.layers.module import Array, Layer, Parameter, check_channels, promote


def check_count(n: int) -> None:
    """Raise ValueError unless batch norm has the values per channel that training needs."""
    if n <= 1:
        raise ValueError(f"batch norm needs more than 1 value per channel in training, got {n}")


def group_count(examples: int, group: int | None) -> int:
    """The number of groups in a batch: 1 if `group` is None.

    Raises ValueError for an empty batch, and for one that is not a multiple of the group.
    """
    if group is None:
        return 1
    if not examples:
        check_count(0)
    if examples % group:
        raise ValueError(
            f"batch norm over groups of {group} examples needs a multiple of them, got {examples}"
        )
    return examples // group


class BatchNorm(Layer):
    """Batch normalization over every axis but the last (Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1).

    y = (x - mean) / sqrt(var + eps) * weight + bias. In training, mean and (biased) var are those of the
    batch, and the running statistics move by PyTorch's rule, with the *unbiased* variance:
    running = (1 - momentum) * running + momentum * batch. In evaluation the running statistics are used.

    With a `group`, mean and var are those of each `group` consecutive examples, and gradients pass through
    these. The running statistics still move once: `batch` is the mean over the groups of their means, and of
    their unbiased variances.

    Args:
        num_features: C, the number of channels.
        eps, momentum: as above.
        group: examples in a group, 1 or more; None is the whole batch.
        dtype: of every array.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        group: int | None = None,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        if group is not None and group < 1:
            raise ValueError(f"a group of batch norm must have 1 or more examples, got {group}")
        self.weight = Parameter(np.ones(num_features, dtype))
        self.bias = Parameter(np.zeros(num_features, dtype))
        self.running_mean = np.zeros(num_features, dtype)
        self.running_var = np.ones(num_features, dtype)
        self.eps, self.momentum, self.group = eps, momentum, group

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [..., C] to its own shape.

        Raises ValueError in training when a channel has a single value, as PyTorch does, or none; or when the
        batch is not a multiple of the group.
        """
        check_channels(x, len(self.weight.value))
        rows = promote(x.reshape(-1, x.shape[-1]), self.weight.value)
        count = group_count(len(x), self.group) if train else 1
        groups = rows.reshape(count, len(rows) // count, rows.shape[1])  # [G, n, C]; the whole batch: G = 1
        mean, inverse_std = self._statistics(groups, train)
        normalized = (groups - mean) * inverse_std
        self.save_for_backward(normalized, inverse_std, train)
        return (normalized * self.weight.value + self.bias.value).reshape(x.shape)

    def _statistics(self, groups: Array, train: bool) -> tuple[Array, Array]:
        """Mean and 1 / sqrt(var + eps): those of each group in training, [G, 1, C], else the running ones."""
        if train:
            n = groups.shape[1]
            check_count(n)
            mean = groups.mean(1, np.float64, keepdims=True).astype(groups.dtype)
            var = np.square(groups - mean).mean(1, np.float64, keepdims=True).astype(groups.dtype)
            self._update_running(mean.mean((0, 1)), var.mean((0, 1)), n)
        else:
            mean, var = self.running_mean, self.running_var
        return mean, 1 / np.sqrt(var + self.eps)

    def _update_running(self, mean: Array, var: Array, n: int) -> None:
        """Move the running statistics toward those of n values per channel, of which var is biased."""
        self._move_running(mean, var * (n / (n - 1)))

    def _move_running(self, mean: Array, unbiased_var: Array) -> None:
        """running = (1 - momentum) * running + momentum * batch."""
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased_var)):
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

        In evaluation mean and var are constants, and dL/dx_i = w s dy_i. The groups of a batch share w and b
        alone: the last equation holds in each, with its own sums, and those sums add up to dL/dw and dL/db.
        """
        z, inverse_std, train = self.saved  # z is [G, n, C]
        d = dy.reshape(z.shape)
        sums = [terms.sum(1, np.float64, keepdims=True) for terms in (d * z, d)]  # of each group
        for parameter, of_groups in zip((self.weight, self.bias), sums, strict=True):
            parameter.add_grad(of_groups.sum((0, 1)).astype(z.dtype))
        scale = self.weight.value * inverse_std
        if train:
            dweight, dbias = (of_groups.astype(z.dtype) for of_groups in sums)
            d = d - (dbias + z * dweight) / z.shape[1]
        return np.asarray((scale * d).reshape(dy.shape))


class NoNorm(Layer):
    """y = x, in place of batch norm in a network without it."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """Return x."""
        return x

    def backward(self, dy: Array) -> Array:
        """dy/dx = 1."""
        return dy
