"""A ResNet of the CIFAR family in training: basic blocks and batch norm, in NNX and in plain JAX."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import torch
import torch.nn.functional as F
from flax import nnx
from jax import lax
from torch import nn

from tests.ports.case import (
    Case,
    Port,
    arrays_of,
    fault,
    load_nnx,
    nested,
    nhwc,
    normal,
    parameters_of,
    seeded,
    statistics_of,
    to_flax,
)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.projects = inputs != outputs
        if self.projects:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.bn_shortcut = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.bn_shortcut(self.conv_shortcut(x)) if self.projects else x
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = BasicBlock(8, 8, 1)
        self.layer2 = BasicBlock(8, 16, 2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(x.mean((2, 3)))


class BatchNorm(nnx.BatchNorm):
    """Batch norm whose running variance is unbiased, as PyTorch's."""

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        before = self.var[...]
        result = super().__call__(x, *args, **kwargs)  # fault: epsilon
        if not self.use_running_average:
            n = x.size // x.shape[-1]
            self.var[...] = n / (n - 1) * self.var[...] - self.momentum / (n - 1) * before
        return result


class Block(nnx.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, fault: str, rngs: nnx.Rngs) -> None:
        self.fault = fault
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = functools.partial(BatchNorm, momentum=0.9, use_fast_variance=False, rngs=rngs)
        padding = "SAME" if fault == "same-padding" else 1
        self.conv1 = conv(inputs, outputs, (3, 3), strides=stride, padding=padding)
        self.bn1 = (nnx.BatchNorm if fault == "biased-running-variance" else norm)(
            outputs, momentum=0.9, use_fast_variance=False, rngs=rngs
        )
        self.conv2 = conv(outputs, outputs, (3, 3), padding=1)
        self.bn2 = norm(outputs)
        self.projects = inputs != outputs
        if self.projects:
            self.conv_shortcut = conv(inputs, outputs, (1, 1), strides=stride, padding=0)
            self.bn_shortcut = norm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x
        if self.projects:
            projected = self.conv_shortcut(x)
            if self.fault == "stop-gradient-projection":
                projected = self.conv_shortcut(lax.stop_gradient(x))  # fault: stop-gradient-projection
            shortcut = self.bn_shortcut(projected)
        elif self.fault == "stop-gradient-identity":
            shortcut = lax.stop_gradient(x)  # fault: stop-gradient-identity
        x = self.conv1(x)  # fault: same-padding
        x = self.bn1(x)  # fault: biased-running-variance, batch-statistics-vs-running
        x = self.conv2(nnx.relu(x))
        if self.fault == "norm-activation-order":
            return nnx.relu(self.bn2(x)) + shortcut  # fault: norm-activation-order
        return nnx.relu(self.bn2(x) + shortcut)


class ResNet(nnx.Module):
    def __init__(self, fault: str, rngs: nnx.Rngs) -> None:
        first, second = {
            "biased-running-variance": (fault, ""),
            "stop-gradient-identity": (fault, ""),
            "norm-activation-order": (fault, ""),
        }.get(fault, ("", fault))
        momentum = 0.1 if fault == "momentum-convention" else 0.9
        epsilon = 1e-3 if fault == "epsilon" else 1e-5
        self.conv1 = nnx.Conv(3, 8, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn1 = BatchNorm(8, momentum=momentum, epsilon=epsilon, rngs=rngs)
        self.layer1 = Block(8, 8, 1, first, rngs)
        self.layer2 = Block(8, 16, 2, second, rngs)
        self.fc = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(x)))  # fault: momentum-convention
        x = self.layer2(self.layer1(x))
        return self.fc(x.mean((1, 2)))


def build_nnx(seed: int, fault: str = "", dtype: str = "float32", *, fast_variance: bool = False) -> Case:
    reference = seeded(Reference, seed, dtype, train=True)
    convert = functools.partial(to_flax, reference)
    arrays = convert(arrays_of(reference))
    if fault == "weights-swapped":
        one, two = "layer1.bn1.scale", "layer1.bn2.scale"
        arrays[one], arrays[two] = arrays[two], arrays[one]
    model = ResNet(fault, nnx.Rngs(seed))
    load_nnx(model, arrays)
    model.train()
    if fault == "batch-statistics-vs-running":
        model.layer2.bn1.eval()
    for norm in (model.bn1, model.layer1.bn1, model.layer2.bn1):
        norm.use_fast_variance = fast_variance
    images = normal(seed, (4, 3, 8, 8), dtype)
    return Case("nnx", reference, model, images, nhwc(images), convert, nhwc=True, train=True)


Tree = Mapping[str, Any]
Result = tuple[jax.Array, dict[str, Any]]


def convolution(x: jax.Array, weight: jax.Array, stride: int = 1) -> jax.Array:
    """An OIHW kernel on NCHW images, padded as a kernel of odd size needs."""
    pad = weight.shape[-1] // 2
    return lax.conv_general_dilated(x, weight, (stride, stride), ((pad, pad), (pad, pad)))


def batch_norm(fault: str, p: Tree, s: Tree, x: jax.Array) -> Result:
    """Batch norm in training and the statistics after it."""
    n = x.size // x.shape[1]
    mean = x.mean((0, 2, 3))
    if fault == "unbiased-variance":
        var = x.var((0, 2, 3), ddof=1)  # fault: unbiased-variance
    else:
        var = x.var((0, 2, 3))
    new = {
        "running_mean": 0.9 * s["running_mean"] + 0.1 * mean,
        "running_var": 0.9 * s["running_var"] + 0.1 * var * (n / (n - 1)),
    }
    if fault == "unbiased-variance":
        new["running_var"] = 0.9 * s["running_var"] + 0.1 * var
    if fault == "statistics-not-updated":
        new = dict(s)  # fault: statistics-not-updated
    if fault == "batch-statistics-constant":
        mean, var = lax.stop_gradient((mean, var))  # fault: batch-statistics-constant
    mean, var, weight, bias = (a[:, None, None] for a in (mean, var, p["weight"], p["bias"]))
    return (x - mean) * lax.rsqrt(var + 1e-5) * weight + bias, new


def block(fault: str, p: Tree, s: Tree, x: jax.Array, stride: int) -> Result:
    new = {}
    shortcut = x
    if "conv_shortcut" in p:
        shortcut = convolution(x, p["conv_shortcut"]["weight"], stride)
        shortcut, new["bn_shortcut"] = batch_norm("", p["bn_shortcut"], s["bn_shortcut"], shortcut)
    x = convolution(x, p["conv1"]["weight"], stride)
    x, new["bn1"] = batch_norm(fault, p["bn1"], s["bn1"], x)
    x = convolution(jax.nn.relu(x), p["conv2"]["weight"])
    x, new["bn2"] = batch_norm("", p["bn2"], s["bn2"], x)
    return jax.nn.relu(x + shortcut), new


def resnet(fault: str, p: Tree, s: Tree, x: jax.Array) -> Result:
    new = {}
    x = convolution(x, p["conv1"]["weight"])
    x, new["bn1"] = batch_norm("", p["bn1"], s["bn1"], x)
    x, new["layer1"] = block(fault, p["layer1"], s["layer1"], jax.nn.relu(x), 1)
    x, new["layer2"] = block("", p["layer2"], s["layer2"], x, 2)
    return x.mean((2, 3)) @ p["fc"]["weight"].T + p["fc"]["bias"], new


def unchanged(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """PyTorch's names and layouts, without the counter of batches."""
    return {name: array for name, array in arrays.items() if not name.endswith("num_batches_tracked")}


def build_jax(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=True)
    arrays = unchanged(arrays_of(reference))
    images = normal(seed, (4, 3, 8, 8), dtype)
    return Case(
        "jax",
        reference,
        functools.partial(resnet, fault),
        images,
        images,
        unchanged,
        nested(parameters_of(arrays)),
        nested(statistics_of(arrays)),
        train=True,
    )


NNX = Port("resnet_cifar-nnx", build_nnx)
FAST = Port("resnet_cifar-nnx-fast-variance", functools.partial(build_nnx, fast_variance=True))
JAX = Port("resnet_cifar-jax-nchw", build_jax)
PORTS = (NNX, FAST, JAX)
FAULTS = (
    fault(NNX, "epsilon", "bn1"),
    fault(NNX, "same-padding", "layer2.conv1"),
    fault(NNX, "momentum-convention", "bn1", "statistics", parameter="bn1.running_mean"),
    fault(NNX, "biased-running-variance", "layer1.bn1", "statistics", parameter="layer1.bn1.running_var"),
    fault(NNX, "batch-statistics-vs-running", "layer2.bn1"),
    fault(NNX, "norm-activation-order", "layer1.add", accept=("layer1",)),
    fault(NNX, "weights-swapped", "layer1.bn1", "parameter", parameter="layer1.bn1.weight"),
    fault(
        NNX,
        "stop-gradient-projection",
        "layer2.conv_shortcut",
        "input gradient",
        "stop-gradient",
        accept=("layer2",),
    ),
    fault(
        NNX,
        "stop-gradient-identity",
        "layer1.add",
        "input gradient",
        "stop-gradient",
        accept=("layer1",),
    ),
    fault(JAX, "unbiased-variance", "layer1.bn1"),
    fault(JAX, "statistics-not-updated", "layer1.bn1", "statistics", parameter="layer1.bn1.running_var"),
    fault(JAX, "batch-statistics-constant", "layer1.bn1", "input gradient"),
)
