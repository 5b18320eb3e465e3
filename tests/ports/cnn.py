"""A plain CNN: strided convolution, pooling of odd sizes with and without padding, flatten, linear layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax import lax
from torch import nn

from tests.ports.case import Case, Port, arrays_of, fault, load_nnx, nested, nhwc, normal, seeded, to_flax

SLOPE = 0.1


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.act1 = nn.LeakyReLU(SLOPE)
        self.pool1 = nn.MaxPool2d(2, ceil_mode=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.act2 = nn.LeakyReLU(SLOPE)
        self.pool2 = nn.AvgPool2d(3, stride=2, padding=1)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(32, 16)
        self.act3 = nn.ReLU()
        self.fc2 = nn.Linear(16, 16)
        self.act4 = nn.Tanh()
        self.fc3 = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool1(self.act1(self.conv1(x)))
        x = self.pool2(self.act2(self.conv2(x)))
        x = self.act3(self.fc1(self.flatten(x)))
        return self.fc3(self.act4(self.fc2(x)))


class CNN(nnx.Module):
    def __init__(self, fault: str, rngs: nnx.Rngs) -> None:
        self.fault = fault
        same = fault == "same-padding"
        self.conv1 = nnx.Conv(3, 8, (3, 3), strides=2, padding="SAME" if same else 1, rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), padding=1, use_bias=fault != "missing-bias", rngs=rngs)
        self.fc1 = nnx.Linear(32, 16, dtype=jnp.bfloat16 if fault == "bfloat16-cast" else None, rngs=rngs)
        self.fc2 = nnx.Linear(16, 16, rngs=rngs)
        self.fc3 = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv1(x)  # fault: same-padding
        if self.fault == "activation-slope":
            x = nnx.leaky_relu(x)  # fault: activation-slope
        else:
            x = nnx.leaky_relu(x, SLOPE)
        if self.fault == "ceil-mode":
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))  # fault: ceil-mode
        else:
            x = nnx.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")  # 7 to 4: nothing before, 1 behind
        x = self.conv2(x)
        if self.fault == "relu":
            x = nnx.relu(x)  # fault: relu
        else:
            x = nnx.leaky_relu(x, SLOPE)
        padding = ((1, 1), (1, 1))
        if self.fault == "count-include-pad":
            x = nnx.avg_pool(x, (3, 3), (2, 2), padding, count_include_pad=False)  # fault: count-include-pad
        else:
            x = nnx.avg_pool(x, (3, 3), (2, 2), padding)
        if self.fault == "flatten-order":
            x = x.reshape(len(x), -1)  # fault: flatten-order
        else:
            x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        x = nnx.relu(self.fc1(x).astype(x.dtype))  # fault: bfloat16-cast
        return self.fc3(nnx.tanh(self.fc2(x)))


def build_nnx(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(to_flax, reference)
    arrays = convert(arrays_of(reference))
    if fault == "kernel-transposed":
        arrays["fc2.kernel"] = arrays["fc2.kernel"].T
    if fault == "kernel-flipped":
        arrays["conv2.kernel"] = arrays["conv2.kernel"][::-1, ::-1]
    if fault == "missing-bias":
        del arrays["conv2.bias"]
    if fault == "weight-not-loaded":
        del arrays["fc2.kernel"]
    model = CNN(fault, nnx.Rngs(seed))
    load_nnx(model, arrays, missing=("fc2.kernel",) if fault == "weight-not-loaded" else ())
    model.eval()
    images = normal(seed, (3, 3, 14, 14), dtype)
    return Case("nnx", reference, model, images, nhwc(images), convert, nhwc=True)


Params = Mapping[str, Mapping[str, jax.Array]]


def conv_by_shifts(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A 3x3 convolution with padding 1 as a sum of nine matrix products."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    result: jax.Array | float = 0.0
    for i in range(3):
        for j in range(3):
            shifted = x[:, i : i + height : stride, j : j + width : stride]
            result = result + jnp.einsum("nhwi,io->nhwo", shifted, kernel[i, j])
    return jnp.asarray(result)


@jax.custom_vjp
def leaky_relu(x: jax.Array) -> jax.Array:
    """Leaky ReLU with a derivative of its own, which forgets the slope."""
    return jnp.where(x >= 0, x, SLOPE * x)  # fault: wrong-custom-derivative


def leaky_relu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return leaky_relu(x), x >= 0


def leaky_relu_backward(positive: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(positive, gradient, 0),)


leaky_relu.defvjp(leaky_relu_forward, leaky_relu_backward)


def cnn(fault: str, p: Params, x: jax.Array) -> jax.Array:
    kernel1, bias1 = p["conv1"]["kernel"], p["conv1"]["bias"]
    if fault == "stop-gradient-bias":
        bias1 = lax.stop_gradient(bias1)  # fault: stop-gradient-bias
    x = conv_by_shifts(x, kernel1, 2) + bias1
    x = jnp.where(x >= 0, x, SLOPE * x)
    window, padding = (1, 2, 2, 1), ((0, 0), (0, 1), (0, 1), (0, 0))
    if fault == "pool-padding-value":
        x = jnp.pad(x, padding)
        x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")  # fault: pool-padding-value
    else:
        x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, padding)
    kernel2 = p["conv2"]["kernel"]
    if fault == "kernel-flipped-conv2":
        x = conv_by_shifts(x, kernel2[::-1, ::-1], 1) + p["conv2"]["bias"]  # fault: kernel-flipped-conv2
    elif fault == "tf32":
        x, kernel2 = lax.reduce_precision(x, 8, 10), lax.reduce_precision(kernel2, 8, 10)
        x = conv_by_shifts(x, kernel2, 1) + p["conv2"]["bias"]  # fault: tf32
    else:
        x = conv_by_shifts(x, kernel2, 1) + p["conv2"]["bias"]
    if fault == "wrong-custom-derivative":
        x = leaky_relu(x)
    else:
        x = jnp.where(x >= 0, x, SLOPE * x)
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 2, 1), padding) / 9
    # NHWC is flattened as it is: `convert_jax` reorders the rows of fc1's kernel instead.
    x = jnp.einsum("nhwc,hwco->no", x, p["fc1"]["kernel"]) + p["fc1"]["bias"]
    x = jnp.maximum(x, 0)
    if fault == "kernel-transposed-fc2":
        x = jnp.einsum("ni,oi->no", x, p["fc2"]["kernel"])  # fault: kernel-transposed-fc2
    else:
        x = jnp.einsum("ni,io->no", x, p["fc2"]["kernel"])
    x = jnp.tanh(x + p["fc2"]["bias"])
    return x @ p["fc3"]["kernel"] + p["fc3"]["bias"]


def convert_jax(reference: nn.Module, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    result = to_flax(reference, arrays)
    result["fc1.kernel"] = result["fc1.kernel"].reshape(8, 2, 2, 16).transpose(1, 2, 0, 3)
    return result


def build_jax(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(convert_jax, reference)
    arrays = convert(arrays_of(reference))
    if fault == "weight-of-lower-precision":
        arrays["fc1.kernel"] = arrays["fc1.kernel"].astype(np.float16).astype(dtype)
    images = normal(seed, (3, 3, 14, 14), dtype)
    model = functools.partial(cnn, fault)
    return Case("jax", reference, model, images, nhwc(images), convert, nested(arrays), nhwc=True)


NNX = Port("cnn-nnx", build_nnx)
JAX = Port("cnn-jax", build_jax)
PORTS = (NNX, JAX)
FAULTS = (
    fault(NNX, "same-padding", "conv1"),
    fault(NNX, "activation-slope", "act1"),
    fault(NNX, "ceil-mode", "pool1"),
    fault(NNX, "relu", "act2", cause="activation"),
    fault(NNX, "count-include-pad", "pool2"),
    fault(NNX, "flatten-order", "flatten"),
    fault(NNX, "bfloat16-cast", "fc1"),
    fault(NNX, "missing-bias", "conv2", "parameter", parameter="conv2.bias"),
    fault(NNX, "kernel-transposed", "fc2", "parameter", parameter="fc2.weight"),
    fault(NNX, "kernel-flipped", "conv2", "parameter", parameter="conv2.weight"),
    fault(NNX, "weight-not-loaded", "fc2", "parameter", parameter="fc2.weight"),
    fault(JAX, "stop-gradient-bias", "conv1", "parameter gradient", "stop-gradient", "conv1.bias"),
    fault(JAX, "pool-padding-value", "pool1"),
    fault(JAX, "kernel-flipped-conv2", "conv2", cause="kernel-flipped"),
    fault(JAX, "tf32", "conv2"),
    fault(JAX, "wrong-custom-derivative", "act2", "input gradient"),
    fault(JAX, "kernel-transposed-fc2", "fc2", cause="kernel-transposed"),
    fault(JAX, "weight-of-lower-precision", "fc1", "parameter", parameter="fc1.weight"),
)
