"""A residual network with batch normalization: in training in NNX and plain JAX, in evaluation merged."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax import lax
from torch import nn

from tests.ports.case import (
    Array,
    Arrays,
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

NARROW, WIDE, CLASSES = 8, 16, 5
EPSILON, MOMENTUM = 1e-5, 0.1


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.down_conv: nn.Module = nn.Identity()
        self.down_bn: nn.Module = nn.Identity()
        if stride > 1:
            self.down_conv = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.down_bn = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act2(y + self.down_bn(self.down_conv(x)))


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, NARROW, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(NARROW)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = Block(NARROW, NARROW, 1)
        self.layer2 = Block(NARROW, WIDE, 2)
        self.avg = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDE, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.act(self.bn(self.conv(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(self.avg(x).flatten(1))


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


def relu_backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (gradient,)  # fault: wrong-custom-derivative


relu.defvjp(lambda x: (relu(x), None), relu_backward)


class BatchNorm(nnx.Module):
    """Batch normalization whose running variance is unbiased, unlike that of Flax."""

    def __init__(self, width: int, fault: str, epsilon: float = EPSILON) -> None:
        self.fault = fault
        self.epsilon = epsilon
        self.use_running_average = False
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean = nnx.BatchStat(jnp.zeros(width))
        self.var = nnx.BatchStat(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            axes: tuple[int, ...] = (0, 1, 2)
            if self.fault == "layer-norm-axes":
                axes = (1, 2)  # fault: layer-norm-axes
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
            self.update(mean.mean((0, 1, 2)), var.mean((0, 1, 2)), x.size // x.shape[-1])
            if self.fault == "batch-statistics-constant":
                mean, var = lax.stop_gradient((mean, var))  # fault: batch-statistics-constant
            if self.fault == "unbiased-variance":
                var = x.var(axes, keepdims=True, ddof=1)  # fault: unbiased-variance
        return (x - mean) / jnp.sqrt(var + self.epsilon) * self.scale[...] + self.bias[...]

    def update(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        if self.fault == "statistics-not-updated":
            return  # fault: statistics-not-updated
        momentum = 1 - MOMENTUM
        if self.fault == "momentum-convention":
            momentum = MOMENTUM  # fault: momentum-convention
        if self.fault == "default-momentum":
            momentum = 0.99  # fault: default-momentum
        if self.fault != "biased-running-variance":  # fault: biased-running-variance
            var = var * (count / (count - 1))
        self.mean[...] = momentum * self.mean[...] + (1 - momentum) * lax.stop_gradient(mean)
        self.var[...] = momentum * self.var[...] + (1 - momentum) * lax.stop_gradient(var)


class FlaxBlock(nnx.Module):
    def __init__(self, width_in: int, width: int, stride: int, fault: str, rngs: nnx.Rngs) -> None:
        conv = functools.partial(nnx.Conv, padding=1, use_bias=False, rngs=rngs)
        self.fault = fault
        first, second = stride, 1
        if fault == "stride-placement":
            first, second = 1, stride  # fault: stride-placement
        self.conv1 = conv(width_in, width, (3, 3), strides=first)
        if fault == "same-padding":
            self.conv1 = conv(width_in, width, (3, 3), strides=first, padding="SAME")  # fault: same-padding
        self.bn1 = BatchNorm(width, fault if fault != "batch-statistics-constant" else "")
        self.conv2 = conv(width, width, (3, 3), strides=second)
        self.bn2 = BatchNorm(width, fault if fault != "layer-norm-axes" else "")
        self.downsample = stride > 1
        if self.downsample:
            self.down_conv = conv(width_in, width, (1, 1), strides=stride, padding=0)
            epsilon = 1e-3 if fault == "epsilon" else EPSILON
            self.down_bn = BatchNorm(width, fault if fault != "layer-norm-axes" else "", epsilon)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x
        if self.downsample:
            shortcut = self.down_bn(self.down_conv(x))  # fault: epsilon
        y = self.conv1(x)
        if self.fault == "norm-activation-order":
            y = self.bn1(nnx.relu(y))  # fault: norm-activation-order
        else:
            y = nnx.relu(self.bn1(y))
        if self.fault == "shortcut-source":
            shortcut = y  # fault: shortcut-source
        y = self.bn2(self.conv2(y))  # fault: batch-statistics-vs-running
        if self.fault == "wrong-custom-derivative":
            return relu(y + shortcut)
        if self.fault == "missing-activation":
            return y + shortcut  # fault: missing-activation
        return nnx.relu(y + shortcut)


EVERYWHERE = ("momentum-convention", "default-momentum", "biased-running-variance", "unbiased-variance")
IN_LAYER1 = (
    "norm-activation-order",
    "shortcut-source",
    "missing-activation",
    "batch-statistics-constant",
    *EVERYWHERE,
)
IN_LAYER2 = (
    "stride-placement",
    "same-padding",
    "epsilon",
    "layer-norm-axes",
    "statistics-not-updated",
    "wrong-custom-derivative",
    *EVERYWHERE,
)


class Net(nnx.Module):
    def __init__(self, fault: str, rngs: nnx.Rngs) -> None:
        self.fault = fault
        self.conv = nnx.Conv(3, NARROW, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn = BatchNorm(NARROW, fault if fault in EVERYWHERE else "")
        self.layer1 = FlaxBlock(NARROW, NARROW, 1, fault if fault in IN_LAYER1 else "", rngs)
        self.layer2 = FlaxBlock(NARROW, WIDE, 2, fault if fault in IN_LAYER2 else "", rngs)
        self.fc = nnx.Linear(WIDE, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn(self.conv(x)))
        if self.fault == "same-pool":
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")  # fault: same-pool
        else:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        x = self.layer2(self.layer1(x))
        if self.fault == "pool-kind":
            x = x.max((1, 2))  # fault: pool-kind
        else:
            x = x.mean((1, 2))
        return self.fc(x)


def build_nnx(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=True)
    convert = functools.partial(to_flax, reference)
    arrays = convert(arrays_of(reference))
    match fault:
        case "weights-swapped":
            first, second = "layer2.bn2.scale", "layer2.down_bn.scale"
            arrays[first], arrays[second] = arrays[second], arrays[first]
        case "weight-of-lower-precision":
            arrays["fc.kernel"] = arrays["fc.kernel"].astype(np.float16).astype(dtype)
        case "kernel-transposed":
            arrays["layer1.conv2.kernel"] = arrays["layer1.conv2.kernel"].swapaxes(2, 3)
    model = Net(fault, nnx.Rngs(seed))
    load_nnx(model, arrays)
    model.train()
    if fault == "batch-statistics-vs-running":
        model.layer1.bn2.eval()
    images = normal(seed, (4, 3, 12, 12), dtype)
    return Case("nnx", reference, model, images, nhwc(images), convert, nhwc=True, train=True)


Tree = Mapping[str, Any]


def conv3(x: jax.Array, kernel: jax.Array, stride: int = 1, dilation: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(dilation, dilation)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def conv1(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A 1x1 convolution as a product of what it sees."""
    return jnp.einsum("nhwc,co->nhwo", x[:, ::stride, ::stride], kernel[0, 0])


def max_pool(x: jax.Array) -> jax.Array:
    """Windows of 3 x 3, stride 2, as the maximum of rows and then of columns."""
    for axis in (1, 2):
        pad = [(1, 1) if index == axis else (0, 0) for index in range(4)]
        padded = jnp.pad(x, pad, constant_values=-jnp.inf)
        x = jnp.stack(
            [lax.slice_in_dim(padded, start, start + x.shape[axis] - 1, 2, axis) for start in range(3)]
        ).max(0)
    return x


def train_norm(fault: str, x: jax.Array, p: Tree, state: Tree) -> tuple[jax.Array, Tree]:
    """Batch normalization of rows of pixels, and its next running statistics."""
    rows = x.reshape(-1, x.shape[-1])
    mean = jnp.ones(len(rows), x.dtype) @ rows / len(rows)
    centered = rows - mean
    if fault == "bfloat16-cast":
        centered_half = centered.astype(jnp.bfloat16)  # fault: bfloat16-cast
        var = jnp.mean(centered_half * centered_half, 0).astype(x.dtype)
    else:
        var = jnp.einsum("nc,nc->c", centered, centered) / len(rows)
    unbiased = var * len(rows) / (len(rows) - 1)
    changed = {
        "mean": state["mean"] + MOMENTUM * (mean - state["mean"]),
        "var": state["var"] + MOMENTUM * (unbiased - state["var"]),
    }
    rows = centered * lax.rsqrt(var + EPSILON)
    return (rows * p["scale"] + p["bias"]).reshape(x.shape), changed


def resnet(fault: str, p: Tree, state: Tree, x: jax.Array) -> tuple[jax.Array, Tree]:
    changed: dict[str, Any] = {"layer1": {}, "layer2": {}}
    x, changed["bn"] = train_norm("", conv3(x, p["conv"]["kernel"]), p["bn"], state["bn"])
    x = max_pool(jax.nn.relu(x))
    for name, stride in (("layer1", 1), ("layer2", 2)):
        q, s, t = p[name], state[name], changed[name]
        here = fault if name == "layer2" else ""
        shortcut = x
        if stride > 1:
            shortcut = conv1(x, q["down_conv"]["kernel"], stride)
            shortcut, t["down_bn"] = train_norm("", shortcut, q["down_bn"], s["down_bn"])
        y = conv3(x, q["conv1"]["kernel"], stride)
        y, t["bn1"] = train_norm(here, y, q["bn1"], s["bn1"])
        if here == "leaky-relu":
            y = jax.nn.leaky_relu(y)  # fault: leaky-relu
        else:
            y = jax.nn.relu(y)
        dilation = 2 if fault == "dilation" and name == "layer1" else 1
        y = conv3(y, q["conv2"]["kernel"], dilation=dilation)  # fault: dilation
        y, t["bn2"] = train_norm("", y, q["bn2"], s["bn2"])
        x = jax.nn.relu(shortcut + y)
    x = x.reshape(len(x), -1, WIDE).sum(1) / (x.shape[1] * x.shape[2])
    x = x @ p["fc"]["kernel"]
    if fault == "missing-bias":
        return x, changed  # fault: missing-bias
    return x + p["fc"]["bias"], changed


def build_jax(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=True)
    convert = functools.partial(to_flax, reference)
    arrays = convert(arrays_of(reference))
    params, state = nested(parameters_of(arrays)), nested(statistics_of(arrays))
    images = normal(seed, (4, 3, 12, 12), dtype)
    return Case(
        "jax",
        reference,
        functools.partial(resnet, fault),
        images,
        nhwc(images),
        convert,
        params,
        state,
        nhwc=True,
        train=True,
    )


NORM_OF = {"conv": "bn", "conv1": "bn1", "conv2": "bn2", "down_conv": "down_bn"}


def merge(reference: nn.Module, arrays: Arrays) -> dict[str, Array]:
    """Kernels multiplied by the scale of the batch normalization behind them, and what it shifts by."""
    arrays = to_flax(reference, arrays)
    merged = {name: arrays[name] for name in ("fc.kernel", "fc.bias")}
    for name, array in arrays.items():
        path, _, leaf = name.rpartition(".")
        parent, _, conv = path.rpartition(".")
        if leaf == "kernel" and conv in NORM_OF:
            bn = f"{parent}.{NORM_OF[conv]}" if parent else NORM_OF[conv]
            factor = arrays[f"{bn}.scale"] / np.sqrt(arrays[f"{bn}.var"] + EPSILON)
            merged[name] = array * factor
            merged[f"{path}.bias"] = arrays[f"{bn}.bias"] - arrays[f"{bn}.mean"] * factor
    return merged


def merged_resnet(fault: str, p: Tree, x: jax.Array) -> jax.Array:
    """The network in evaluation, its batch normalizations merged into the convolutions."""
    x = max_pool(jax.nn.relu(conv3(x, p["conv"]["kernel"]) + p["conv"]["bias"]))
    for name, stride in (("layer1", 1), ("layer2", 2)):
        q, shortcut = p[name], x
        if stride > 1:
            shortcut = conv1(x, q["down_conv"]["kernel"], stride) + q["down_conv"]["bias"]
        y = jax.nn.relu(conv3(x, q["conv1"]["kernel"], stride) + q["conv1"]["bias"])
        y = conv3(y, q["conv2"]["kernel"]) + q["conv2"]["bias"]
        if fault == "missing-shortcut" and name == "layer1":
            x = jax.nn.relu(y)  # fault: missing-shortcut
        else:
            x = jax.nn.relu(shortcut + y)
    return x.mean((1, 2)) @ p["fc"]["kernel"] + p["fc"]["bias"]


def build_merged(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(merge, reference)
    params = nested(convert(arrays_of(reference)))
    images = normal(seed, (4, 3, 12, 12), dtype)
    model = functools.partial(merged_resnet, fault)
    return Case(
        "jax", reference, model, images, nhwc(images), convert, params, nhwc=True, same_gradients=False
    )


NNX = Port("residual-nnx", build_nnx)
JAX = Port("residual-jax", build_jax)
MERGED = Port("residual-merged", build_merged)
PORTS = (NNX, JAX, MERGED)
FAULTS = (
    fault(NNX, "same-padding", "layer2.conv1"),
    fault(NNX, "same-pool", "pool", cause="same-padding"),
    fault(NNX, "stride-placement", "layer2.conv1"),
    fault(NNX, "norm-activation-order", "layer1.bn1", accept=("layer1.act1",)),
    fault(NNX, "missing-activation", "layer1.act2", cause="activation"),
    fault(NNX, "shortcut-source", "layer1.add"),
    fault(NNX, "pool-kind", "avg"),
    fault(NNX, "epsilon", "layer2.down_bn"),
    fault(NNX, "layer-norm-axes", "layer2.bn1"),
    fault(NNX, "unbiased-variance", "bn"),
    fault(NNX, "batch-statistics-vs-running", "layer1.bn2"),
    fault(NNX, "momentum-convention", "bn", "statistics", parameter="bn.running_mean"),
    # Outside the list: momentum is Flax's default instead of the reference's, in the right convention.
    fault(
        NNX,
        "default-momentum",
        "bn",
        "statistics",
        cause="momentum-convention",
        parameter="bn.running_mean",
    ),
    fault(NNX, "biased-running-variance", "bn", "statistics", parameter="bn.running_var"),
    fault(NNX, "statistics-not-updated", "layer2.bn1", "statistics", parameter="layer2.bn1.running_mean"),
    fault(NNX, "batch-statistics-constant", "layer1.bn2", "input gradient"),
    fault(NNX, "wrong-custom-derivative", "layer2.act2", "input gradient"),
    fault(
        NNX,
        "weights-swapped",
        "layer2.bn2",
        "parameter",
        parameter="layer2.bn2.weight",
        accept=("layer2.down_bn",),
    ),
    fault(NNX, "weight-of-lower-precision", "fc", "parameter", parameter="fc.weight"),
    fault(NNX, "kernel-transposed", "layer1.conv2", "parameter", parameter="layer1.conv2.weight"),
    fault(JAX, "bfloat16-cast", "layer2.bn1"),
    fault(JAX, "leaky-relu", "layer2.act1", cause="activation"),
    fault(JAX, "dilation", "layer1.conv2"),
    fault(JAX, "missing-bias", "fc"),
    fault(MERGED, "missing-shortcut", "layer1.add"),
)
