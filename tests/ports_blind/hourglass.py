"""An encoder and decoder with a skip, resizing and a transposed convolution, in Linen and plain JAX."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen
from jax import lax
from torch import nn

from tests.ports.case import (
    Case,
    Port,
    arrays_of,
    fault,
    linen_variables,
    nested,
    nhwc,
    normal,
    seeded,
    to_flax,
)

WIDTH = 8
SLOPE = 0.1
HALF, QUARTER = (10, 14), (5, 7)


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shrink = nn.Upsample(size=HALF, mode="bilinear")
        self.enc1 = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.act1 = nn.LeakyReLU(SLOPE)
        self.pool1 = nn.AvgPool2d(3, 2, padding=1)
        self.enc2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2)
        self.act2 = nn.LeakyReLU(SLOPE)
        self.pool2 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.mid = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.act3 = nn.LeakyReLU(SLOPE)
        self.up1 = nn.Upsample(size=QUARTER, mode="nearest")
        self.dec1 = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1)
        self.act4 = nn.LeakyReLU(SLOPE)
        self.up2 = nn.ConvTranspose2d(WIDTH, WIDTH, 3, 2, padding=1, output_padding=1)
        self.act5 = nn.LeakyReLU(SLOPE)
        self.grow = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.out = nn.Conv2d(WIDTH, 3, 3, padding=1)
        self.sigmoid = nn.Sigmoid()
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, SLOPE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool1(self.act1(self.enc1(self.shrink(x))))
        skip = self.act2(self.enc2(x))
        x = self.up1(self.act3(self.mid(self.pool2(skip))))
        x = self.act4(self.dec1(torch.cat([x, skip], dim=1)))
        x = self.act5(self.up2(x))
        return self.sigmoid(self.out(self.grow(x)))


def resize(x: jax.Array, shape: tuple[int, int], method: str, antialias: bool = False) -> jax.Array:
    return jax.image.resize(x, (x.shape[0], *shape, x.shape[3]), method, antialias=antialias)


def nearest(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Nearest neighbors as PyTorch takes them: the index is rounded down."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(shape, x.shape[1:3], strict=True))
    return x[:, rows][:, :, columns]


def grow(x: jax.Array) -> jax.Array:
    """Twice the height and width, between corners that are aligned."""
    height, width = x.shape[1:3]
    old, new = np.array([height, width]), np.array([2 * height, 2 * width])
    scale = jnp.asarray((new - 1) / (old - 1), x.dtype)
    return jax.image.scale_and_translate(
        x, (len(x), *map(int, new), x.shape[3]), (1, 2), scale, (1 - scale) / 2, "linear", antialias=False
    )


class Hourglass(linen.Module):
    fault: str = ""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act = functools.partial(linen.leaky_relu, negative_slope=SLOPE)
        x = resize(x, HALF, "linear", antialias=self.fault == "resize-antialias")  # fault: resize-antialias
        x = linen.Conv(WIDTH, (3, 3), padding=1, name="enc1")(x)
        if self.fault == "activation-slope":
            x = linen.leaky_relu(x)  # fault: activation-slope
        else:
            x = act(x)
        include = self.fault != "count-include-pad"
        padding = ((1, 1), (1, 1))
        x = linen.avg_pool(x, (3, 3), (2, 2), padding, count_include_pad=include)  # fault: count-include-pad
        dilation = 1 if self.fault == "dilation" else 2
        x = linen.Conv(WIDTH, (3, 3), kernel_dilation=dilation, name="enc2")(x)  # fault: dilation
        skip = x = act(x)
        if self.fault == "ceil-mode":
            x = linen.max_pool(x, (2, 2), (2, 2))  # fault: ceil-mode
        else:
            x = linen.max_pool(x, (2, 2), (2, 2), "SAME")
        if self.fault == "groups":
            x = x.reshape(*x.shape[:3], -1, 2).swapaxes(3, 4).reshape(x.shape)  # fault: groups
        x = act(linen.Conv(WIDTH, (3, 3), feature_group_count=2, name="mid")(x))
        if self.fault == "resize-half-pixel":
            x = resize(x, QUARTER, "nearest")  # fault: resize-half-pixel
        else:
            x = nearest(x, QUARTER)
        if self.fault == "concat-order":
            x = jnp.concatenate([skip, x], -1)  # fault: concat-order
        else:
            x = jnp.concatenate([x, skip], -1)
        x = linen.Conv(WIDTH, (3, 3), name="dec1")(x)
        if self.fault != "missing-activation":  # fault: missing-activation
            x = act(x)
        # Zeros between the pixels; then 3 - 1 - 1 pixels before, and as many and one more behind.
        padding = ((1, 2), (1, 2))
        if self.fault == "output-padding":
            padding = ((2, 1), (2, 1))  # fault: output-padding
        x = linen.ConvTranspose(WIDTH, (3, 3), (2, 2), padding, transpose_kernel=True, name="up2")(x)
        x = act(x)
        if self.fault == "stop-gradient":
            x = lax.stop_gradient(x)  # fault: stop-gradient
        if self.fault == "resize-align-corners":
            x = resize(x, (2 * HALF[0], 2 * HALF[1]), "linear")  # fault: resize-align-corners
        else:
            x = grow(x)
        x = linen.Conv(3, (3, 3), name="out")(x)
        if self.fault == "tanh":
            return linen.tanh(x)  # fault: tanh
        return linen.sigmoid(x)


def arrays_for(reference: nn.Module, fault: str) -> dict[str, np.ndarray]:
    """The weights in Flax's layouts, as they are copied with one of the faults in that."""
    arrays = to_flax(reference, arrays_of(reference))
    match fault:
        case "kernel-transposed":
            arrays["up2.kernel"] = arrays["up2.kernel"].swapaxes(2, 3)
        case "weights-swapped":
            first, second = "enc1.bias", "enc2.bias"
            arrays[first], arrays[second] = arrays[second], arrays[first]
        case "kernel-flipped":
            arrays["out.kernel"] = arrays["out.kernel"][::-1, ::-1].copy()
    return arrays


def build_linen(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    variables = linen_variables(arrays_for(reference, fault))
    convert = functools.partial(to_flax, reference)
    images = normal(seed, (2, 3, 20, 28), dtype)
    return Case("linen", reference, Hourglass(fault), images, nhwc(images), convert, variables, nhwc=True)


Tree = Mapping[str, Any]


def interpolation(new: int, old: int, align_corners: bool, dtype: Any) -> jax.Array:
    """The matrix [new, old] of linear interpolation along one axis."""
    index = np.arange(new)
    place = index * (old - 1) / (new - 1) if align_corners else (index + 0.5) * old / new - 0.5
    place = np.clip(place, 0, old - 1)
    return jnp.asarray(np.maximum(0, 1 - np.abs(place[:, None] - np.arange(old))), dtype)


def interpolate(x: jax.Array, shape: tuple[int, int], align_corners: bool) -> jax.Array:
    rows = interpolation(shape[0], x.shape[1], align_corners, x.dtype)
    columns = interpolation(shape[1], x.shape[2], align_corners, x.dtype)
    return jnp.einsum("ih,jw,nhwc->nijc", rows, columns, x)


def conv(x: jax.Array, p: Tree, dilation: int = 1) -> jax.Array:
    """A sum of matrix products, one for each tap of the kernel."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (dilation, dilation), (dilation, dilation), (0, 0)))
    total = 0
    for i in range(3):
        for j in range(3):
            row, column = i * dilation, j * dilation
            total = total + padded[:, row : row + height, column : column + width] @ p["kernel"][i, j]
    return total + p["bias"]


def conv_transpose(fault: str, x: jax.Array, p: Tree) -> jax.Array:
    """Zeros between the pixels and a convolution with the mirrored kernel, its axes exchanged."""
    n, height, width, channels = x.shape
    dilated = jnp.zeros((n, 2 * height, 2 * width, channels), x.dtype).at[:, ::2, ::2].set(x)
    kernel = p["kernel"].swapaxes(2, 3)
    if fault != "kernel-not-flipped":  # fault: kernel-not-flipped
        kernel = kernel[::-1, ::-1]
    return conv(dilated, {"kernel": kernel, "bias": p["bias"]})


def hourglass(fault: str, p: Tree, x: jax.Array) -> jax.Array:
    def act(x: jax.Array) -> jax.Array:
        return jnp.maximum(x, SLOPE * x)

    x = interpolate(x, HALF, align_corners=False)
    x = act(conv(x, p["enc1"]))
    if fault == "pool-kind":
        x = lax.reduce_window(
            x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
        )  # fault: pool-kind
    else:
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [padded[:, i : i + 9 : 2, j : j + 13 : 2] for i in range(3) for j in range(3)]
        x = jnp.mean(jnp.stack(taps), 0)
    skip = act(conv(x, p["enc2"], dilation=2))
    padded = jnp.pad(skip, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=-jnp.inf)
    x = padded.reshape(len(x), 3, 2, 4, 2, WIDTH).max((2, 4))
    half = WIDTH // 2
    low, high = (
        conv(part, {"kernel": kernel, "bias": bias})
        for part, kernel, bias in zip(
            (x[..., :half], x[..., half:]),
            jnp.split(p["mid"]["kernel"], 2, -1),
            jnp.split(p["mid"]["bias"], 2),
            strict=True,
        )
    )
    if fault == "group-order":
        low, high = high, low  # fault: group-order
    x = nearest(act(jnp.concatenate([low, high], -1)), QUARTER)
    kernel = p["dec1"]["kernel"]
    bias = p["dec1"]["bias"]
    if fault == "float16-cast":
        kernel = kernel.astype(jnp.float16).astype(x.dtype)  # fault: float16-cast
    # The kernel is split instead of concatenating what it sees.
    x = conv(x, {"kernel": kernel[:, :, :WIDTH], "bias": bias}) + conv(
        skip, {"kernel": kernel[:, :, WIDTH:], "bias": 0}
    )
    x = act(conv_transpose(fault, act(x), p["up2"]))
    x = interpolate(x, (2 * HALF[0], 2 * HALF[1]), align_corners=True)
    if fault == "missing-bias":
        return jax.nn.sigmoid(conv(x, {"kernel": p["out"]["kernel"], "bias": 0}))  # fault: missing-bias
    return 1 / (1 + jnp.exp(-conv(x, p["out"])))


def build_jax(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    params = nested(arrays_for(reference, fault))
    convert = functools.partial(to_flax, reference)
    images = normal(seed, (2, 3, 20, 28), dtype)
    model = functools.partial(hourglass, fault)
    return Case("jax", reference, model, images, nhwc(images), convert, params, nhwc=True)


LINEN = Port("hourglass-linen", build_linen)
JAX = Port("hourglass-jax", build_jax)
PORTS = (LINEN, JAX)
FAULTS = (
    fault(LINEN, "resize-antialias", "shrink"),
    fault(LINEN, "activation-slope", "act1"),
    fault(LINEN, "count-include-pad", "pool1"),
    fault(LINEN, "dilation", "enc2"),
    fault(LINEN, "ceil-mode", "pool2"),
    fault(LINEN, "groups", "mid"),
    fault(LINEN, "resize-half-pixel", "up1"),
    fault(LINEN, "concat-order", "cat"),
    fault(LINEN, "missing-activation", "act4", cause="activation"),
    fault(LINEN, "output-padding", "up2"),
    fault(LINEN, "stop-gradient", "act5", "input gradient", accept=("grow",)),
    fault(LINEN, "resize-align-corners", "grow"),
    fault(LINEN, "tanh", "sigmoid", cause="activation"),
    fault(LINEN, "kernel-transposed", "up2", "parameter", parameter="up2.weight"),
    fault(LINEN, "weights-swapped", "enc1", "parameter", parameter="enc1.bias"),
    fault(LINEN, "kernel-flipped", "out", "parameter", parameter="out.weight"),
    fault(JAX, "pool-kind", "pool1"),
    fault(JAX, "group-order", "mid", cause="groups"),
    fault(JAX, "float16-cast", "dec1"),
    fault(JAX, "kernel-not-flipped", "up2", cause="kernel-flipped"),
    fault(JAX, "missing-bias", "out"),
)
