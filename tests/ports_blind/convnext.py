"""ConvNeXt blocks (arXiv:2201.03545) in evaluation, in NNX and in plain JAX."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from jax import lax
from torch import nn

from tests.ports.case import Case, Port, arrays_of, fault, load_nnx, nested, nhwc, normal, seeded, to_flax

NARROW, WIDE, CLASSES = 8, 16, 5
EPSILON = 1e-6


class LayerNorm2d(nn.LayerNorm):
    """Layer normalization over the channels of NCHW."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPSILON)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.empty(dim).uniform_(0.3, 1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        x = self.gamma * x
        return shortcut + x.permute(0, 3, 1, 2)


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, NARROW, 2, stride=2)
        self.stem_norm = LayerNorm2d(NARROW, eps=EPSILON)
        self.stage1 = nn.Sequential(Block(NARROW), Block(NARROW))
        self.down_norm = LayerNorm2d(NARROW, eps=EPSILON)
        self.down = nn.Conv2d(NARROW, WIDE, 2, stride=2)
        self.stage2 = nn.Sequential(Block(WIDE))
        self.norm = nn.LayerNorm(WIDE, eps=EPSILON)
        self.head = nn.Linear(WIDE, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage1(self.stem_norm(self.stem(x)))
        x = self.stage2(self.down(self.down_norm(x)))
        return self.head(self.norm(x.mean((-2, -1))))


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


@gelu.defjvp
def gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return gelu(x), jax.scipy.stats.norm.cdf(x) * dx  # fault: wrong-custom-derivative


class FlaxBlock(nnx.Module):
    def __init__(self, dim: int, fault: str, rngs: nnx.Rngs) -> None:
        self.fault = fault
        self.dwconv = nnx.Conv(dim, dim, (7, 7), padding="SAME", feature_group_count=dim, rngs=rngs)
        self.norm = nnx.LayerNorm(dim, epsilon=EPSILON, rngs=rngs)
        self.pwconv1 = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.pwconv2 = nnx.Linear(4 * dim, dim, rngs=rngs)
        self.gamma = nnx.Param(jnp.full(dim, 1e-6))

    def act(self, x: jax.Array) -> jax.Array:
        match self.fault:
            case "gelu-tanh":
                return nnx.gelu(x)  # fault: gelu-tanh
            case "relu":
                return nnx.relu(x)  # fault: relu
            case "wrong-custom-derivative":
                return gelu(x)
        return nnx.gelu(x, approximate=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x
        x = self.dwconv(x)
        if self.fault == "shortcut-source":
            shortcut = x  # fault: shortcut-source
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        gamma = self.gamma[...]
        if self.fault == "stop-gradient":
            gamma = lax.stop_gradient(gamma)  # fault: stop-gradient
        if self.fault == "missing-shortcut":
            return gamma * x  # fault: missing-shortcut
        return shortcut + gamma * x


class Net(nnx.Module):
    def __init__(self, fault: str, rngs: nnx.Rngs) -> None:
        self.fault = fault
        first, second, third = (
            fault if fault in flags else ""
            for flags in (
                ("gelu-tanh",),
                ("gelu-tanh", "relu", "shortcut-source", "stop-gradient"),
                ("gelu-tanh", "missing-shortcut", "wrong-custom-derivative"),
            )
        )
        half = jnp.bfloat16 if fault == "bfloat16-cast" else None
        axes = (-3, -2, -1) if fault == "layer-norm-axes" else -1
        self.stem = nnx.Conv(3, NARROW, (2, 2), strides=2, dtype=half, rngs=rngs)
        self.stem_norm = nnx.LayerNorm(NARROW, epsilon=EPSILON, reduction_axes=axes, rngs=rngs)
        self.stage1 = nnx.List([FlaxBlock(NARROW, first, rngs), FlaxBlock(NARROW, second, rngs)])
        self.down_norm = nnx.LayerNorm(NARROW, epsilon=EPSILON, rngs=rngs)
        self.down = nnx.Conv(NARROW, WIDE, (2, 2), strides=2, rngs=rngs)
        self.stage2 = nnx.List([FlaxBlock(WIDE, third, rngs)])
        self.norm = nnx.LayerNorm(WIDE, epsilon=1e-5 if fault == "epsilon" else EPSILON, rngs=rngs)
        self.head = nnx.Linear(WIDE, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x).astype(x.dtype)  # fault: bfloat16-cast
        x = self.stem_norm(x)  # fault: layer-norm-axes
        blocks = list(self.stage1)
        if self.fault == "block-order":
            blocks = blocks[::-1]  # fault: block-order
        for block in blocks:
            x = block(x)
        x = self.down(self.down_norm(x))
        for block in self.stage2:
            x = block(x)
        if self.fault == "pool-kind":
            x = x.max((1, 2))  # fault: pool-kind
        else:
            x = x.mean((1, 2))
        return self.head(self.norm(x))  # fault: epsilon


def build_nnx(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(to_flax, reference)
    arrays = convert(arrays_of(reference))
    missing: tuple[str, ...] = ()
    match fault:
        case "kernel-transposed":
            arrays["stage1.0.dwconv.kernel"] = arrays["stage1.0.dwconv.kernel"].swapaxes(0, 1)
        case "weights-swapped":
            first, second = "stage1.0.gamma", "stage1.1.gamma"
            arrays[first], arrays[second] = arrays[second], arrays[first]
        case "weight-of-lower-precision":
            arrays["down.kernel"] = arrays["down.kernel"].astype(jnp.bfloat16).astype(dtype)
        case "weight-not-loaded":
            missing = ("stage2.0.gamma",)
            del arrays["stage2.0.gamma"]
    model = Net(fault, nnx.Rngs(seed))
    load_nnx(model, arrays, missing)
    model.eval()
    images = normal(seed, (2, 3, 16, 16), dtype)
    return Case("nnx", reference, model, images, nhwc(images), convert, nhwc=True)


Tree = Mapping[str, Any]


def layer_norm(x: jax.Array, p: Tree, ddof: int = 0) -> jax.Array:
    centered = x - x.sum(-1, keepdims=True) / x.shape[-1]
    variance = (centered * centered).sum(-1, keepdims=True) / (x.shape[-1] - ddof)
    return centered * (p["scale"] / jnp.sqrt(variance + EPSILON)) + p["bias"]


def patches(x: jax.Array, fault: str = "") -> jax.Array:
    """Patches of 2 x 2 pixels, flat, in the order of HWIO."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    if fault == "flatten-order":
        x = x.transpose(0, 1, 3, 4, 2, 5)  # fault: flatten-order
    else:
        x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, height // 2, width // 2, 4 * channels)


def depthwise(x: jax.Array, p: Tree, fault: str) -> jax.Array:
    """One sum over the pixels of each window."""
    kernel = p["kernel"][:, :, 0]
    if fault == "kernel-flipped":
        kernel = kernel[::-1, ::-1]  # fault: kernel-flipped
    rows, columns = (np.arange(size)[:, None] + np.arange(7) for size in x.shape[1:3])
    windows = jnp.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))[:, rows][:, :, :, columns]
    return jnp.einsum("nhiwjc,ijc->nhwc", windows, kernel) + p["bias"]


def block(x: jax.Array, p: Tree, fault: str) -> jax.Array:
    y = layer_norm(depthwise(x, p["dwconv"], fault), p["norm"])
    if fault == "missing-bias":
        y = y @ p["pwconv1"]["kernel"]  # fault: missing-bias
    else:
        y = y @ p["pwconv1"]["kernel"] + p["pwconv1"]["bias"]
    if fault == "quick-gelu":
        y = y * jax.nn.sigmoid(1.702 * y)  # fault: quick-gelu
    else:
        y = 0.5 * y * (1 + lax.erf(y * 0.5**0.5))
    # The layer scale is merged into the matrix: (y W + b) gamma = y (W gamma) + b gamma.
    return x + (y @ (p["pwconv2"]["kernel"] * p["gamma"]) + p["pwconv2"]["bias"] * p["gamma"])


def convnext(fault: str, p: Tree, x: jax.Array) -> jax.Array:
    x = patches(x, fault) @ p["stem"]["kernel"].reshape(-1, NARROW) + p["stem"]["bias"]
    x = layer_norm(x, p["stem_norm"])
    everywhere = "" if fault == "missing-bias" else fault
    x = block(x, p["stage1"]["0"], everywhere)
    x = block(x, p["stage1"]["1"], everywhere)
    if fault == "frozen-stage":
        x = lax.stop_gradient(x)  # fault: frozen-stage
    x = layer_norm(x, p["down_norm"])
    x = patches(x) @ p["down"]["kernel"].reshape(-1, WIDE) + p["down"]["bias"]
    x = block(x, p["stage2"]["0"], fault)
    x = jnp.einsum("nhwc->nc", x) / (x.shape[1] * x.shape[2])
    x = layer_norm(x, p["norm"], ddof=1 if fault == "unbiased-variance" else 0)  # fault: unbiased-variance
    kernel = p["head"]["kernel"]
    if fault == "tf32":
        x, kernel = lax.reduce_precision(x, 8, 10), lax.reduce_precision(kernel, 8, 10)  # fault: tf32
    return x @ kernel + p["head"]["bias"]


def build_jax(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(to_flax, reference)
    params = nested(convert(arrays_of(reference)))
    images = normal(seed, (2, 3, 16, 16), dtype)
    model = functools.partial(convnext, fault)
    return Case("jax", reference, model, images, nhwc(images), convert, params, nhwc=True)


NNX = Port("convnext-nnx", build_nnx)
JAX = Port("convnext-jax", build_jax)
PORTS = (NNX, JAX)
FAULTS = (
    fault(NNX, "gelu-tanh", "stage1.0.act"),
    fault(NNX, "relu", "stage1.1.act", cause="activation"),
    fault(NNX, "epsilon", "norm"),
    fault(NNX, "layer-norm-axes", "stem_norm"),
    fault(NNX, "shortcut-source", "stage1.1.add"),
    fault(NNX, "missing-shortcut", "stage2.0.add"),
    fault(NNX, "stop-gradient", "stage1.1.mul", "parameter gradient", parameter="stage1.1.gamma"),
    fault(NNX, "wrong-custom-derivative", "stage2.0.act", "input gradient"),
    fault(NNX, "bfloat16-cast", "stem"),
    # Outside the list: the two blocks run in the other order. The nearest cause is exchanged parameters.
    fault(NNX, "block-order", "stage1.0.dwconv", cause="weights-swapped"),
    fault(NNX, "pool-kind", "mean"),
    fault(NNX, "kernel-transposed", "stage1.0.dwconv", "parameter", parameter="stage1.0.dwconv.weight"),
    fault(
        NNX,
        "weights-swapped",
        "stage1.0.mul",
        "parameter",
        parameter="stage1.0.gamma",
        accept=("stage1.0",),
    ),
    fault(NNX, "weight-of-lower-precision", "down", "parameter", parameter="down.weight"),
    fault(
        NNX,
        "weight-not-loaded",
        "stage2.0.mul",
        "parameter",
        parameter="stage2.0.gamma",
        accept=("stage2.0",),
    ),
    fault(JAX, "flatten-order", "stem"),
    fault(JAX, "kernel-flipped", "stage1.0.dwconv"),
    fault(JAX, "missing-bias", "stage2.0.pwconv1"),
    fault(JAX, "quick-gelu", "stage1.0.act", cause="activation"),
    fault(
        JAX,
        "frozen-stage",
        "down_norm",
        "input gradient",
        cause="stop-gradient",
        accept=("down_norm.permute", "stage1.1", "stage1.1.add"),
    ),
    fault(JAX, "unbiased-variance", "norm"),
    fault(JAX, "tf32", "head"),
)
