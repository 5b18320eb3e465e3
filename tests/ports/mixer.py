"""An MLP-Mixer in evaluation: patches, layer norm, GELU, in Linen and with einsum in plain JAX."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from jax.scipy.special import erf
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


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.tokens = MLP(tokens, tokens)
        self.norm2 = nn.LayerNorm(width)
        self.channels = MLP(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.block1 = Block(9, 8)
        self.block2 = Block(9, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.block2(self.block1(x))).mean(1))


class LinenMLP(linen.Module):
    hidden: int
    fault: str = ""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = linen.Dense(self.hidden, name="fc1")(x)
        if self.fault == "gelu-tanh":
            x = linen.gelu(x)  # fault: gelu-tanh
        else:
            x = linen.gelu(x, approximate=False)
        return linen.Dense(width, name="fc2")(x)


class LinenBlock(linen.Module):
    fault: str = ""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(linen.LayerNorm, epsilon=1e-5)
        y = norm(name="norm1")(x).swapaxes(1, 2)
        y = LinenMLP(9, name="tokens")(y).swapaxes(1, 2)
        if self.fault == "missing-shortcut":
            x = y  # fault: missing-shortcut
        else:
            x = x + y
        if self.fault == "epsilon":
            y = linen.LayerNorm(name="norm2")(x)  # fault: epsilon
        elif self.fault == "layer-norm-axes":
            y = norm(name="norm2", reduction_axes=(1, 2))(x)  # fault: layer-norm-axes
        else:
            y = norm(name="norm2")(x)
        return x + LinenMLP(16, self.fault, name="channels")(y)


class Mixer(linen.Module):
    fault: str = ""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(8, (4, 4), 4, name="patches")(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        x = LinenBlock(self.fault, name="block1")(x)
        x = LinenBlock(name="block2")(x)
        x = linen.LayerNorm(epsilon=1e-5, name="norm")(x)
        return linen.Dense(5, name="head")(x.mean(1))


def build_linen(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(to_flax, reference)
    arrays = convert(arrays_of(reference))
    if fault == "kernel-transposed":
        arrays["block1.tokens.fc1.kernel"] = arrays["block1.tokens.fc1.kernel"].T
    if fault == "weights-swapped":
        one, two = "block1.tokens.fc1.kernel", "block2.tokens.fc1.kernel"
        arrays[one], arrays[two] = arrays[two], arrays[one]
    if fault == "weight-not-loaded":
        arrays["norm.scale"] = np.ones_like(arrays["norm.scale"])
    images = normal(seed, (2, 3, 12, 12), dtype)
    variables = linen_variables(arrays)
    return Case("linen", reference, Mixer(fault), images, nhwc(images), convert, variables, nhwc=True)


Tree = Mapping[str, Any]


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, with a derivative that leaves out the density's term."""
    return x * (1 + erf(x / np.sqrt(2))) / 2  # fault: wrong-custom-derivative


def gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (gradient * (1 + erf(x / np.sqrt(2))) / 2,)


gelu.defvjp(gelu_forward, gelu_backward)


def linear(p: Tree, x: jax.Array) -> jax.Array:
    return jnp.einsum("...i,io->...o", x, p["kernel"]) + p["bias"]


def layer_norm(fault: str, p: Tree, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    centered = x - mean
    var = jnp.square(centered).mean(-1, keepdims=True)
    if fault == "stop-gradient-statistics":
        centered = x - lax.stop_gradient(mean)  # fault: stop-gradient-statistics
    if fault == "unbiased-variance":
        var = x.var(-1, keepdims=True, ddof=1)  # fault: unbiased-variance
    return centered * lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]


def mlp(fault: str, p: Tree, x: jax.Array) -> jax.Array:
    x = linear(p["fc1"], x)
    if fault == "wrong-custom-derivative":
        x = gelu(x)
    else:
        x = x * (1 + erf(x / np.sqrt(2))) / 2
    return linear(p["fc2"], x)


def block(fault: str, p: Tree, x: jax.Array) -> jax.Array:
    y = layer_norm(fault, p["norm1"], x).transpose(0, 2, 1)
    x = x + mlp(fault, p["tokens"], y).transpose(0, 2, 1)
    return x + mlp("", p["channels"], layer_norm("", p["norm2"], x))


def mixer(fault: str, p: Tree, x: jax.Array) -> jax.Array:
    n = len(x)
    x = x.reshape(n, 3, 4, 3, 4, 3)
    if fault == "flatten-order":
        x = jnp.einsum("nhiwjc,ijco->nwho", x, p["patches"]["kernel"])  # fault: flatten-order
    else:
        x = jnp.einsum("nhiwjc,ijco->nhwo", x, p["patches"]["kernel"])
    x = x + p["patches"]["bias"]
    x = block(fault, p["block1"], x.reshape(n, 9, 8))
    x = block("", p["block2"], x)
    return linear(p["head"], layer_norm("", p["norm"], x).mean(1))


def build_jax(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(to_flax, reference)
    images = normal(seed, (2, 3, 12, 12), dtype)
    params = nested(convert(arrays_of(reference)))
    model = functools.partial(mixer, fault)
    return Case("jax", reference, model, images, nhwc(images), convert, params, nhwc=True)


LINEN = Port("mixer-linen", build_linen)
JAX = Port("mixer-jax-einsum", build_jax)
PORTS = (LINEN, JAX)
FAULTS = (
    fault(LINEN, "gelu-tanh", "block1.channels.gelu"),
    fault(LINEN, "missing-shortcut", "block1.add", accept=("block1",)),
    fault(LINEN, "epsilon", "block1.norm2"),
    fault(LINEN, "layer-norm-axes", "block1.norm2"),
    fault(
        LINEN,
        "kernel-transposed",
        "block1.tokens.fc1",
        "parameter",
        parameter="block1.tokens.fc1.weight",
    ),
    fault(LINEN, "weights-swapped", "block1.tokens.fc1", "parameter", parameter="block1.tokens.fc1.weight"),
    fault(LINEN, "weight-not-loaded", "norm", "parameter", parameter="norm.weight"),
    fault(JAX, "wrong-custom-derivative", "block1.tokens.gelu", "input gradient"),
    fault(JAX, "stop-gradient-statistics", "block1.norm1", "input gradient", "batch-statistics-constant"),
    fault(JAX, "unbiased-variance", "block1.norm1"),
    fault(JAX, "flatten-order", "transpose", accept=("flatten",)),
)
