"""A U-Net in evaluation: resizing by three conventions, a transposed convolution, concatenation, in JAX."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import nn

from tests.ports.case import Case, Port, arrays_of, fault, nested, nhwc, normal, seeded, to_flax


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.down = nn.Upsample(size=(3, 3), mode="bilinear")
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1)
        self.nearest = nn.Upsample(size=(5, 5), mode="nearest")
        self.corners = nn.Upsample(size=(6, 6), mode="bilinear", align_corners=True)
        self.deconv = nn.ConvTranspose2d(6, 6, 3, stride=2, padding=1, output_padding=1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.act = nn.Softplus()
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.act(self.conv1(x))
        middle = self.act(self.conv2(self.pool(skip)))
        x = self.act(self.conv3(self.down(middle)))
        x = self.corners(self.nearest(x)) + middle
        x = self.deconv(x) + self.up(middle)
        return self.head(torch.cat([skip, x], 1))


Tree = Mapping[str, Any]
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv(p: Tree, x: jax.Array) -> jax.Array:
    padding = [((size - 1) // 2,) * 2 for size in p["kernel"].shape[:2]]
    return lax.conv_general_dilated(x, p["kernel"], (1, 1), padding, dimension_numbers=DIMENSIONS) + p["bias"]


def resize(x: jax.Array, size: int, method: str, antialias: bool = False) -> jax.Array:
    return jax.image.resize(x, (x.shape[0], size, size, x.shape[-1]), method, antialias=antialias)


def resize_corners(x: jax.Array, size: int) -> jax.Array:
    """Linear interpolation with the corners of both grids in one place, as two matrix products."""
    old = x.shape[1]
    position = np.arange(size) * (old - 1) / (size - 1)
    weights = jnp.asarray(np.maximum(1 - np.abs(position[:, None] - np.arange(old)), 0), x.dtype)
    return jnp.einsum("ph,qw,nhwc->npqc", weights, weights, x)


def unet(fault: str, p: Tree, x: jax.Array) -> jax.Array:
    skip = jax.nn.softplus(conv(p["conv1"], x))
    x = lax.reduce_window(skip, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    middle = jax.nn.softplus(conv(p["conv2"], x))
    if fault == "resize-antialias":
        x = resize(middle, 3, "bilinear", antialias=True)  # fault: resize-antialias
    else:
        x = resize(middle, 3, "bilinear")
    x = jax.nn.softplus(conv(p["conv3"], x))
    if fault == "resize-half-pixel":
        x = resize(x, 5, "nearest")  # fault: resize-half-pixel
    else:
        index = np.arange(5) * 3 // 5
        x = x[:, index][:, :, index]
    if fault == "resize-align-corners":
        x = resize(x, 6, "bilinear") + middle  # fault: resize-align-corners
    else:
        x = resize_corners(x, 6) + middle
    # A stride of 2 with padding 1 and output padding 1 in PyTorch: 3 - 1 - 1 before, one more behind.
    kernel, padding = p["deconv"]["kernel"], ((1, 2), (1, 2))
    if fault == "output-padding":
        padding = ((2, 1), (2, 1))
        x = lax.conv_transpose(x, kernel, (2, 2), padding, transpose_kernel=True)  # fault: output-padding
    elif fault == "kernel-flipped":
        x = lax.conv_transpose(x, kernel.swapaxes(2, 3), (2, 2), padding)  # fault: kernel-flipped
    else:
        x = lax.conv_transpose(x, kernel, (2, 2), padding, transpose_kernel=True)
    x = x + p["deconv"]["bias"]
    if fault == "corners-at-the-end":
        x = x + resize_corners(middle, 12)  # fault: corners-at-the-end
    elif fault == "stop-gradient":
        x = x + lax.stop_gradient(resize(middle, 12, "bilinear"))  # fault: stop-gradient
    else:
        x = x + resize(middle, 12, "bilinear")
    if fault == "concat-order":
        x = jnp.concatenate([x, skip], -1)  # fault: concat-order
    else:
        x = jnp.concatenate([skip, x], -1)
    return conv(p["head"], x)


def build(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    # A transposed convolution's kernel is [in, out, H, W] in PyTorch: HWOI here, as `transpose_kernel` needs.
    convert = functools.partial(to_flax, reference)
    images = normal(seed, (2, 2, 12, 12), dtype)
    model = functools.partial(unet, fault)
    params = nested(convert(arrays_of(reference)))
    return Case("jax", reference, model, images, nhwc(images), convert, params, nhwc=True)


JAX = Port("unet-jax", build)
PORTS = (JAX,)
FAULTS = (
    fault(JAX, "resize-antialias", "down"),
    fault(JAX, "resize-half-pixel", "nearest"),
    fault(JAX, "resize-align-corners", "corners"),
    fault(JAX, "output-padding", "deconv"),
    fault(JAX, "kernel-flipped", "deconv"),
    fault(JAX, "corners-at-the-end", "up", cause="resize-align-corners"),
    fault(JAX, "stop-gradient", "up", "input gradient"),
    fault(JAX, "concat-order", "cat", accept=("head",)),
)
