"""The layers of a ResNet in Flax NNX: NHWC arrays, explicit PyTorch padding, PyTorch's batch-norm convention.

Every layer keeps its parameters in `promote_types(dtype, float32)` and computes in `dtype`. Attribute names
are those of the PyTorch state dict (`weight`, `bias`, `running_mean`, `running_var`), so that the path of a
variable in the module tree *is* its name there.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jax_resnet.convolution import Pair, conv2d_cpu, conv2d_lax


def draw(
    rngs: nnx.Rngs, distribution: str, shape: tuple[int, ...], scale: float, dtype: DTypeLike
) -> jax.Array:
    """Draw `scale` times random numbers, "normal" or "uniform" in [-1, 1), from NumPy's generator.

    The n-th call draws from the n-th child of `np.random.default_rng(seed)`, in float32. So `nnx.Rngs(seed)`
    gives the weights that `default_rng(seed)` gives in the NumPy engine, bit for bit, on every back end and
    in every precision. Nothing is compiled: JAX's own generator would compile a function for each shape,
    which takes seconds for a ResNet-101. Works under jit, vmap and eval_shape.
    """

    def sample(key: jax.Array, count: jax.Array) -> np.ndarray:
        # A key as one integer, most significant word first. "threefry2x32", the default generator, has two
        # words, "rbg" four
        seed = int.from_bytes(np.asarray(key, ">u4").tobytes(), "big")
        child = np.random.SeedSequence(seed, spawn_key=(int(count),))
        generator = np.random.default_rng(child)
        if distribution == "normal":
            values = generator.standard_normal(shape, np.float32)
        else:
            values = 2 * generator.random(shape, np.float32) - 1
        values *= np.float32(scale)
        return values.astype(dtype, copy=False)

    stream = rngs.params  # its next key would be fold_in(key, count)
    key, count = jax.random.key_data(stream.key[...]), stream.count[...]
    stream.count[...] = count + 1
    if isinstance(key, jax.core.Tracer) or isinstance(count, jax.core.Tracer):
        result = jax.ShapeDtypeStruct(shape, dtype)
        return jax.pure_callback(sample, result, key, count, vmap_method="sequential")
    return jax.device_put(sample(key, count))


def constant(value: float, shape: tuple[int, ...] | int, dtype: DTypeLike) -> jax.Array:
    """An array of one value, made by NumPy.

    `jnp.full` and `jnp.asarray` compile a function for each shape, and a ResNet-101 with its optimizer has
    dozens of shapes. `jax.device_put` compiles nothing.
    """
    return jax.device_put(np.full(shape, value, dtype))


def parameter_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The type of parameters, batch statistics and logits: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def on_cpu() -> bool:
    """True on a CPU, which has its own forms of the convolution and may compile a step block by block."""
    return jax.default_backend() == "cpu"


def conv2d(x: jax.Array, weight: jax.Array, stride: Pair, padding: Pair) -> jax.Array:
    """Cross-correlation of x [N, H, W, I] with weight [KH, KW, I, O]: [N, OH, OW, O]; PyTorch's conv2d."""
    conv = conv2d_cpu if on_cpu() else conv2d_lax
    return conv(x, weight, stride, padding)


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), whose derivative at 0 is 0, as in PyTorch; forward and reverse mode, of any order."""
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return relu(x), _where(x > 0, dx)


@partial(jax.checkpoint, prevent_cse=False)
def _where(mask: jax.Array, x: jax.Array) -> jax.Array:
    """x where the mask is true, else 0.

    Backward of `relu` needs the mask only. Without `checkpoint` JAX would save the array of zeros as well.
    """
    return lax.select(mask, x, lax.full_like(x, 0))


def max_pool2d(x: jax.Array, kernel_size: int, stride: int, padding: int) -> jax.Array:
    """Maximum over windows of x [N, H, W, C]. Padding is -inf; the gradient goes to the first of equals."""
    return lax.reduce_window(
        x,
        -jnp.inf,
        lax.max,
        (1, kernel_size, kernel_size, 1),
        (1, stride, stride, 1),
        ((0, 0), (padding, padding), (padding, padding), (0, 0)),
    )


class Conv2d(nnx.Module):
    """2-d convolution. `weight` [KH, KW, I, O] from He's normal distribution (fan-out, as torchvision),
    `bias` 0.

    He et al. 2015, arXiv 1502.01852, equation 14: std = sqrt(2 / (KH * KW * O)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        param_dtype = parameter_dtype(dtype)
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        std = math.sqrt(2.0 / (kernel_size * kernel_size * out_channels))
        self.weight = nnx.Param(draw(rngs, "normal", shape, std, param_dtype))
        self.bias = nnx.Param(constant(0, out_channels, param_dtype)) if bias else None
        self.stride, self.padding, self.dtype = stride, padding, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [N, H, W, I] to [N, OH, OW, O]. Raises ValueError if x has another rank or other channels."""
        in_channels = self.weight.shape[2]
        if x.ndim != 4 or x.shape[-1] != in_channels:
            raise ValueError(f"expected channels last, [N, H, W, {in_channels}], got {list(x.shape)}")
        weight = self.weight[...].astype(self.dtype)
        y = conv2d(x.astype(self.dtype), weight, (self.stride, self.stride), (self.padding, self.padding))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def split_groups(x: jax.Array, group: int) -> jax.Array:
    """x [B, ..., C] as [G, N, ..., C], groups of N = `group` consecutive examples.

    Raises ValueError unless B is a multiple of N.
    """
    if not len(x) or len(x) % group:
        raise ValueError(f"batch norm over groups of {group} examples needs a multiple of them, got {len(x)}")
    return x.reshape(-1, group, *x.shape[1:])


class BatchNorm(nnx.Module):
    """Batch normalization over every axis but the last (Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1).

    y = (x - mean) / sqrt(var + eps) * weight + bias. In training, mean and (biased) var are those of the
    batch, and the running statistics follow PyTorch's rule, with the *unbiased* variance:
    running = (1 - momentum) * running + momentum * batch. In evaluation the running statistics are used.
    Statistics are computed in at least float32.

    With a `group`, mean and var are those of each `group` consecutive examples, and gradients pass through
    these. The running statistics still move once: `batch` is the mean over the groups of their means, and of
    their unbiased variances. A device that has whole groups of a batch needs no other for its output.

    Args:
        num_features: C, the number of channels.
        eps, momentum: as above.
        group: examples in a group, 1 or more; None is the whole batch.
        dtype: compute type.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        group: int | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        if group is not None and group < 1:
            raise ValueError(f"a group of batch norm must have 1 or more examples, got {group}")
        param_dtype = parameter_dtype(dtype)
        self.weight = nnx.Param(constant(1, num_features, param_dtype))
        self.bias = nnx.Param(constant(0, num_features, param_dtype))
        self.running_mean = nnx.BatchStat(constant(0, num_features, param_dtype))
        self.running_var = nnx.BatchStat(constant(1, num_features, param_dtype))
        self.eps, self.momentum, self.group, self.dtype = eps, momentum, group, dtype
        self.use_running_average = False  # set by model.train() and model.eval()

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode; `nnx.view` calls this, and `nnx.view_info` reads arguments indented by two spaces.

        Args:
          use_running_average: if True, use the running statistics instead of the batch's.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., C] to the same shape.

        Raises ValueError in training when a channel has a single value, or when the batch is not a multiple
        of the group.
        """
        x32 = x.astype(parameter_dtype(self.dtype))
        if self.use_running_average:
            mean, var = self.running_mean[...], self.running_var[...]
            centered = x32 - mean
        else:
            grouped = self.group is not None
            if self.group is not None:
                x32 = split_groups(x32, self.group)
            axes = tuple(range(x32.ndim - x.ndim, x32.ndim - 1))
            n = math.prod(x32.shape[axis] for axis in axes)
            if n <= 1:
                raise ValueError(
                    f"batch norm needs more than 1 value per channel in training, got input {x.shape}"
                )
            mean = x32.mean(axes, keepdims=grouped)
            centered = x32 - mean
            var = (centered * centered).mean(axes, keepdims=grouped)
            self._update("running_mean", mean)
            self._update("running_var", var * (n / (n - 1)))
        scale = self.weight[...] * lax.rsqrt(var + self.eps)
        return (centered * scale + self.bias[...]).astype(self.dtype).reshape(x.shape)

    def _update(self, name: str, batch: jax.Array) -> None:
        """Move a running statistic toward that of the batch, [C], or the mean of the groups', [G, ..., C]."""
        running = getattr(self, name)
        if batch.ndim > 1:
            batch = batch.mean(tuple(range(batch.ndim - 1)))
        # not running[...] =, which asks a traced array for its sharding: JAX takes long to build the error
        running.set_value((1 - self.momentum) * running[...] + self.momentum * lax.stop_gradient(batch))


class Linear(nnx.Module):
    """x @ weight + bias. `weight` [in, out] and `bias` [out] from PyTorch's uniform(+-1 / sqrt(in))."""

    def __init__(
        self, in_features: int, out_features: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ) -> None:
        param_dtype = parameter_dtype(dtype)
        bound = 1.0 / math.sqrt(in_features)
        shape = (in_features, out_features)
        self.weight = nnx.Param(draw(rngs, "uniform", shape, bound, param_dtype))
        self.bias = nnx.Param(draw(rngs, "uniform", (out_features,), bound, param_dtype))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [N, in] to [N, out]."""
        return x.astype(self.dtype) @ self.weight[...].astype(self.dtype) + self.bias[...].astype(self.dtype)


class OptionA(nnx.Module):
    """The parameter-free shortcut of the CIFAR family (He et al. 2015, arXiv 1512.03385, section 3.3, option
    A).

    Takes every `stride`-th row and column, and pads the channels with zeros, half before and half after.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        if out_channels < in_channels:
            raise ValueError(f"option A cannot reduce {in_channels} channels to {out_channels}")
        extra = out_channels - in_channels
        self.pad, self.stride = (extra // 2, extra - extra // 2), stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [N, H, W, I] to [N, ceil(H / stride), ceil(W / stride), O]."""
        x = x[:, :: self.stride, :: self.stride, :]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), self.pad))


def global_average_pool(x: jax.Array) -> jax.Array:
    """Mean over height and width: [N, H, W, C] to [N, C], summed in at least float32."""
    return x.astype(parameter_dtype(x.dtype)).mean((1, 2)).astype(x.dtype)
