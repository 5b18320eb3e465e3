"""Depthwise-separable convolutions in evaluation, with dilation and a channel multiplier, in plain JAX."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax
from torch import nn

from tests.ports.case import Case, Port, arrays_of, fault, nested, nhwc, normal, seeded, to_flax


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.act1 = nn.Hardswish()
        self.depthwise1 = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.act2 = nn.ReLU6()
        self.pointwise1 = nn.Conv2d(12, 8, 1)
        self.depthwise2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.act3 = nn.LeakyReLU(0.2)
        self.pointwise2 = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.stem(x) * 3)
        x = self.pointwise1(self.act2(self.depthwise1(x) * 3))
        return self.pointwise2(self.act3(self.depthwise2(x)))


Tree = Mapping[str, Any]
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv(
    p: Tree, x: jax.Array, stride: int = 1, groups: int = 1, dilation: int = 1, pad: int = 0
) -> jax.Array:
    padding = ((pad, pad), (pad, pad))
    y = lax.conv_general_dilated(
        x, p["kernel"], (stride, stride), padding, (1, 1), (dilation, dilation), DIMENSIONS, groups
    )
    return y + p["bias"]


def net(fault: str, p: Tree, x: jax.Array) -> jax.Array:
    x = conv(p["stem"], x, 2, pad=1) * 3
    if fault == "swish":
        x = jax.nn.silu(x)  # fault: swish
    else:
        x = x * jnp.clip(x + 3, 0, 6) / 6
    if fault == "channel-order":
        x = conv(p["depthwise1"], x, groups=6, pad=1)
        x = x.reshape(*x.shape[:3], 6, 2).swapaxes(3, 4).reshape(x.shape) * 3  # fault: channel-order
    else:
        x = conv(p["depthwise1"], x, groups=6, pad=1) * 3
    if fault == "relu":
        x = jax.nn.relu(x)  # fault: relu
    else:
        x = jnp.clip(x, 0, 6)
    if fault == "bfloat16-cast":
        x = x.astype(jnp.bfloat16).astype(x.dtype)  # fault: bfloat16-cast
    x = jnp.einsum("nhwi,io->nhwo", x, p["pointwise1"]["kernel"][0, 0]) + p["pointwise1"]["bias"]
    if fault == "dilation":
        x = conv(p["depthwise2"], x, groups=8, pad=1)  # fault: dilation
    else:
        x = conv(p["depthwise2"], x, groups=8, dilation=2, pad=2)
    if fault == "stop-gradient":
        x = jnp.where(x > 0, x, 0.2 * lax.stop_gradient(x))  # fault: stop-gradient
    elif fault == "activation-slope":
        x = jnp.where(x > 0, x, 0.01 * x)  # fault: activation-slope
    else:
        x = jnp.where(x > 0, x, 0.2 * x)
    return conv(p["pointwise2"], x)


def build(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(to_flax, reference)
    arrays = convert(arrays_of(reference))
    if fault == "kernel-transposed":
        arrays["depthwise2.kernel"] = arrays["depthwise2.kernel"].transpose(1, 0, 2, 3)
    images = normal(seed, (2, 3, 12, 12), dtype)
    model = functools.partial(net, fault)
    return Case("jax", reference, model, images, nhwc(images), convert, nested(arrays), nhwc=True)


def shifted(p: Tree, x: jax.Array, multiplier: int, dilation: int) -> jax.Array:
    """A depthwise convolution as nine products of shifted images and one row of the kernel each."""
    height, width = x.shape[1:3]
    d = dilation
    x = jnp.repeat(x, multiplier, axis=-1)
    x = jnp.pad(x, ((0, 0), (d, d), (d, d), (0, 0)))
    rows = [(i, j) for i in range(3) for j in range(3)]
    patches = jnp.stack([x[:, d * i : d * i + height, d * j : d * j + width] for i, j in rows])
    return jnp.einsum("knhwc,kc->nhwc", patches, p["kernel"].reshape(9, -1)) + p["bias"]


def net_by_shifts(p: Tree, x: jax.Array) -> jax.Array:
    x = jax.nn.hard_swish(conv(p["stem"], x, 2, pad=1) * 3)
    x = jax.nn.relu6(shifted(p["depthwise1"], x, 2, 1) * 3)
    x = x @ p["pointwise1"]["kernel"][0, 0] + p["pointwise1"]["bias"]
    x = jax.nn.leaky_relu(shifted(p["depthwise2"], x, 1, 2), 0.2)
    return x @ p["pointwise2"]["kernel"][0, 0] + p["pointwise2"]["bias"]


def build_by_shifts(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(to_flax, reference)
    images = normal(seed, (2, 3, 12, 12), dtype)
    params = nested(convert(arrays_of(reference)))
    return Case("jax", reference, net_by_shifts, images, nhwc(images), convert, params, nhwc=True)


JAX = Port("depthwise-jax", build)
PORTS = (JAX, Port("depthwise-jax-by-shifts", build_by_shifts))
FAULTS = (
    fault(JAX, "swish", "act1", cause="activation"),
    # The convolution is right, its channels are put in another order behind it: "mul" is as right.
    fault(JAX, "channel-order", "depthwise1", cause="groups", accept=("mul",)),
    fault(JAX, "relu", "act2", cause="activation"),
    fault(JAX, "bfloat16-cast", "act2", accept=("pointwise1",)),
    fault(JAX, "dilation", "depthwise2"),
    fault(JAX, "stop-gradient", "act3", "input gradient"),
    fault(JAX, "activation-slope", "act3"),
    fault(JAX, "kernel-transposed", "depthwise2", "parameter", parameter="depthwise2.weight"),
)
