"""A pre-activation ResNet in training: norm and activation before each convolution, in plain JAX."""

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

from tests.ports.case import (
    Case,
    Port,
    arrays_of,
    fault,
    nested,
    nhwc,
    normal,
    parameters_of,
    seeded,
    statistics_of,
    to_flax,
)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs, momentum=0.2)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs, momentum=0.2)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.projects = inputs != outputs
        if self.projects:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.relu1(self.norm1(x))
        shortcut = self.shortcut(active) if self.projects else x
        return self.conv2(self.relu2(self.norm2(self.conv1(active)))) + shortcut


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.block1 = Block(8, 8, 1)
        self.block2 = Block(8, 12, 2)
        self.norm = nn.BatchNorm2d(12, momentum=0.2)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block2(self.block1(self.conv(x)))
        return self.fc(self.relu(self.norm(x)).mean((2, 3)))


Tree = Mapping[str, Any]
Result = tuple[jax.Array, dict[str, Any]]
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolution(p: Tree, x: jax.Array, stride: int = 1) -> jax.Array:
    """A convolution without a bias; kernels of 3x3 are padded by 1."""
    pad = p["kernel"].shape[0] // 2
    padding = ((pad, pad), (pad, pad))
    return lax.conv_general_dilated(x, p["kernel"], (stride, stride), padding, dimension_numbers=DIMENSIONS)


def norm(fault: str, p: Tree, s: Tree, x: jax.Array) -> Result:
    """Batch norm in training by E[x^2] - E[x]^2, folded into one product and one sum."""
    n = x.size // x.shape[-1]
    mean = jnp.mean(x, (0, 1, 2))
    var = jnp.mean(jnp.square(x), (0, 1, 2)) - jnp.square(mean)
    rate = 0.1 if fault == "default-momentum" else 0.2  # fault: default-momentum
    new = {
        "mean": (1 - rate) * s["mean"] + rate * mean,
        "var": (1 - rate) * s["var"] + rate * var * (n / (n - 1)),
    }
    scale = p["scale"] * lax.rsqrt(var + 1e-5)
    return x * scale + (p["bias"] - mean * scale), new


def block(fault: str, p: Tree, s: Tree, x: jax.Array, stride: int) -> Result:
    new = {}
    if fault == "norm-activation-order":
        active = jax.nn.relu(x)  # fault: norm-activation-order
        active, new["norm1"] = norm("", p["norm1"], s["norm1"], active)
    else:
        active, new["norm1"] = norm("", p["norm1"], s["norm1"], x)
        active = jax.nn.relu(active)
    shortcut = x
    if fault == "identity-after-activation":
        shortcut = active  # fault: identity-after-activation
    elif "shortcut" in p and fault == "shortcut-source":
        shortcut = convolution(p["shortcut"], x, stride)  # fault: shortcut-source
    elif "shortcut" in p:
        shortcut = convolution(p["shortcut"], active, stride)
    x = convolution(p["conv1"], active, stride)
    x, new["norm2"] = norm(fault, p["norm2"], s["norm2"], x)
    x = jax.nn.relu(x)
    if fault == "tf32":
        x = lax.reduce_precision(x, 8, 10)  # fault: tf32
    return convolution(p["conv2"], x) + shortcut, new


def resnet(fault: str, p: Tree, s: Tree, x: jax.Array) -> Result:
    new = {}
    first = fault in ("identity-after-activation", "tf32")
    x = convolution(p["conv"], x)
    x, new["block1"] = block(fault if first else "", p["block1"], s["block1"], x, 1)
    x, new["block2"] = block("" if first else fault, p["block2"], s["block2"], x, 2)
    x, new["norm"] = norm("", p["norm"], s["norm"], x)
    return jax.nn.relu(x).mean((1, 2)) @ p["fc"]["kernel"] + p["fc"]["bias"], new


def build(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=True)
    convert = functools.partial(to_flax, reference)
    arrays = convert(arrays_of(reference))
    if fault == "kernel-in-bfloat16":
        kernel = jnp.asarray(arrays["block2.conv1.kernel"])
        arrays["block2.conv1.kernel"] = np.asarray(kernel.astype(jnp.bfloat16).astype(dtype))
    params, state = nested(parameters_of(arrays)), nested(statistics_of(arrays))
    images = normal(seed, (4, 3, 8, 8), dtype)
    model = functools.partial(resnet, fault)
    return Case("jax", reference, model, images, nhwc(images), convert, params, state, nhwc=True, train=True)


JAX = Port("preact-jax", build)
PORTS = (JAX,)
FAULTS = (
    fault(JAX, "norm-activation-order", "block2.norm1"),
    fault(JAX, "identity-after-activation", "block1.add", cause="shortcut-source", accept=("block1",)),
    fault(JAX, "shortcut-source", "block2.shortcut"),
    fault(
        JAX,
        "default-momentum",
        "block2.norm2",
        "statistics",
        "momentum-convention",
        parameter="block2.norm2.running_mean",
    ),
    fault(JAX, "tf32", "block1.relu2", accept=("block1.conv2",)),
    fault(
        JAX,
        "kernel-in-bfloat16",
        "block2.conv1",
        "parameter",
        "weight-of-lower-precision",
        parameter="block2.conv1.weight",
    ),
)
