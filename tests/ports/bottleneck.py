"""A ResNet of the ImageNet family in training: 7x7 stem, max pooling, bottleneck blocks, in Linen."""

from __future__ import annotations

import functools

import flax.linen as linen
import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
from jax import lax
from torch import nn

from tests.ports.case import Case, Port, arrays_of, fault, linen_variables, nhwc, normal, seeded, to_flax


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.projects = inputs != outputs
        if self.projects:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.bn_shortcut = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.bn_shortcut(self.conv_shortcut(x)) if self.projects else x
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = Bottleneck(8, 4, 1)
        self.layer2 = Bottleneck(16, 4, 1)
        self.layer3 = Bottleneck(16, 8, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class BatchNorm(linen.Module):
    """Batch norm with PyTorch's conventions, written out."""

    fault: str = ""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1:]
        scale = self.param("scale", linen.initializers.ones, channels)
        bias = self.param("bias", linen.initializers.zeros, channels)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        n = x.size // x.shape[-1]
        mean = jnp.mean(x, (0, 1, 2))
        centered = x - mean
        if self.fault == "batch-mean-constant":
            centered = x - lax.stop_gradient(mean)  # fault: batch-mean-constant
        var = jnp.mean(centered**2, (0, 1, 2))
        running_mean.value += 0.1 * (mean - running_mean.value)
        if self.fault == "biased-running-variance":
            running_var.value += 0.1 * (var - running_var.value)  # fault: biased-running-variance
        else:
            running_var.value += 0.1 * (var * n / (n - 1) - running_var.value)
        if self.fault == "epsilon":
            return centered / (jnp.sqrt(var) + 1e-5) * scale + bias  # fault: epsilon
        return centered / jnp.sqrt(var + 1e-5) * scale + bias


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """ReLU with a derivative of its own, which lets negative gradients through only as absolute values."""
    return jnp.maximum(x, 0)


def relu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return relu(x), x


def relu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(x > 0, jnp.maximum(gradient, 0), 0),)  # guided backpropagation, left in by mistake


relu.defvjp(relu_forward, relu_backward)


class Block(linen.Module):
    width: int
    stride: int
    projects: bool
    fault: str = ""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(linen.Conv, use_bias=False)
        first, second = (self.stride, 1) if self.fault == "stride-placement" else (1, self.stride)
        shortcut = x
        if self.projects:
            shortcut = conv(4 * self.width, (1, 1), self.stride, name="conv_shortcut")(x)
            shortcut = BatchNorm(name="bn_shortcut")(shortcut)
        x = conv(self.width, (1, 1), first, name="conv1")(x)  # fault: stride-placement
        x = linen.relu(BatchNorm(name="bn1", fault=self.fault)(x))
        if self.fault == "float16-cast":
            half, dtype = jnp.float16, x.dtype
            x = conv(self.width, (3, 3), second, 1, dtype=half, name="conv2")(x)  # fault: float16-cast
            x = x.astype(dtype)
        else:
            x = conv(self.width, (3, 3), second, 1, name="conv2")(x)
        x = linen.relu(BatchNorm(name="bn2")(x))
        x = conv(4 * self.width, (1, 1), name="conv3")(x)
        x = BatchNorm(name="bn3")(x) + shortcut
        if self.fault == "missing-relu":
            return x  # fault: missing-relu
        if self.fault == "wrong-custom-derivative":
            return relu(x)  # fault: wrong-custom-derivative
        return linen.relu(x)


IN_LAYER1 = ("missing-relu", "float16-cast")
IN_LAYER2 = ("wrong-custom-derivative", "biased-running-variance", "batch-mean-constant")


class ResNet(linen.Module):
    fault: str = ""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fault = self.fault
        padding = "SAME" if fault == "same-padding" else 3
        x = linen.Conv(8, (7, 7), 2, padding, use_bias=False, name="conv1")(x)  # fault: same-padding
        x = linen.relu(BatchNorm(name="bn1", fault=fault if fault == "epsilon" else "")(x))
        if fault == "same-pooling":
            x = linen.max_pool(x, (3, 3), (2, 2), "SAME")  # fault: same-pooling
        else:
            x = linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        x = Block(4, 1, True, fault if fault in IN_LAYER1 else "", name="layer1")(x)
        x = Block(4, 1, False, fault if fault in IN_LAYER2 else "", name="layer2")(x)
        x = Block(8, 2, True, fault if fault == "stride-placement" else "", name="layer3")(x)
        return linen.Dense(5, name="fc")(jnp.mean(x, (1, 2)))


def build(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=True)
    convert = functools.partial(to_flax, reference)
    variables = linen_variables(convert(arrays_of(reference)))
    images = normal(seed, (4, 3, 16, 16), dtype)
    model = ResNet(fault)
    return Case("linen", reference, model, images, nhwc(images), convert, variables, nhwc=True, train=True)


LINEN = Port("bottleneck-linen", build)
PORTS = (LINEN,)
FAULTS = (
    fault(LINEN, "same-padding", "conv1"),
    fault(LINEN, "epsilon", "bn1"),
    fault(LINEN, "same-pooling", "maxpool", cause="same-padding"),
    fault(LINEN, "missing-relu", "layer1.relu", cause="activation", accept=("layer1",)),
    fault(LINEN, "float16-cast", "layer1.conv2"),
    fault(LINEN, "stride-placement", "layer3.conv1"),
    fault(LINEN, "biased-running-variance", "layer2.bn1", "statistics", parameter="layer2.bn1.running_var"),
    fault(LINEN, "batch-mean-constant", "layer2.bn1", "input gradient", "batch-statistics-constant"),
    fault(LINEN, "wrong-custom-derivative", "layer2.relu", "input gradient", accept=("layer2",)),
)
