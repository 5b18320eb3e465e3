"""A squeeze-and-excitation block in evaluation: channels scaled by a gate, in NNX and in plain JAX."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from jax import lax
from torch import nn

from tests.ports.case import Case, Port, arrays_of, fault, load_nnx, nested, nhwc, normal, seeded, to_flax


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.silu = nn.SiLU()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(12, 4, 1)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv2d(4, 12, 1)
        self.gate = nn.Sigmoid()
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.silu(self.bn(self.conv(x)))
        x = x * self.gate(self.fc2(self.relu(self.fc1(self.squeeze(x)))))
        return self.head(self.pool(x).flatten(1))


class Net(nnx.Module):
    def __init__(self, fault: str, rngs: nnx.Rngs) -> None:
        self.fault = fault
        self.conv = nnx.Conv(3, 12, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(12, epsilon=1e-3 if fault == "epsilon" else 1e-5, rngs=rngs)
        self.fc1 = nnx.Conv(12, 4, (1, 1), rngs=rngs)
        self.fc2 = nnx.Conv(4, 12, (1, 1), rngs=rngs)
        self.head = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.silu(self.bn(self.conv(x)))  # faults: epsilon, batch-statistics-vs-running
        if self.fault == "pool-kind":
            s = x.max((1, 2), keepdims=True)  # fault: pool-kind
        else:
            s = x.mean((1, 2), keepdims=True)
        s = self.fc2(nnx.relu(self.fc1(s)))
        if self.fault == "hard-sigmoid":
            gate = nnx.hard_sigmoid(s)  # fault: hard-sigmoid
        else:
            gate = nnx.sigmoid(s)
        if self.fault == "stop-gradient":
            gate = lax.stop_gradient(gate)  # fault: stop-gradient
        return self.head(jnp.max(x * gate, (1, 2)))


def build_nnx(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(to_flax, reference)
    arrays = convert(arrays_of(reference))
    if fault == "weights-swapped":
        arrays["bn.scale"], arrays["bn.bias"] = arrays["bn.bias"], arrays["bn.scale"]
    model = Net(fault, nnx.Rngs(seed))
    load_nnx(model, arrays)
    model.eval()
    if fault == "batch-statistics-vs-running":
        model.bn.train()
    images = normal(seed, (3, 3, 8, 8), dtype)
    return Case("nnx", reference, model, images, nhwc(images), convert, nhwc=True)


def net(fault: str, p: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """The same with 1x1 convolutions as matrix products, written by hand."""
    x = lax.conv_general_dilated(
        x, p["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    bn = p["bn"]
    x = (x - bn["mean"]) * (bn["scale"] / jnp.sqrt(bn["var"] + 1e-5)) + bn["bias"]
    if fault == "gelu":
        x = jax.nn.gelu(x)  # fault: gelu
    else:
        x = x / (1 + jnp.exp(-x))
    s = x.reshape(len(x), -1, x.shape[-1]).mean(1)
    s = jnp.maximum(s @ p["fc1"]["kernel"][0, 0] + p["fc1"]["bias"], 0)
    if fault == "missing-bias":
        s = s @ p["fc2"]["kernel"][0, 0]  # fault: missing-bias
    else:
        s = s @ p["fc2"]["kernel"][0, 0] + p["fc2"]["bias"]
    if fault == "softmax-gate":
        gate = jax.nn.softmax(s)  # fault: softmax-gate
    else:
        gate = 1 / (1 + jnp.exp(-s))
    x = (x * gate[:, None, None]).max((1, 2))
    return jnp.einsum("nc,co->no", x, p["head"]["kernel"]) + p["head"]["bias"]


def build_jax(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(to_flax, reference)
    params = nested(convert(arrays_of(reference)))
    images = normal(seed, (3, 3, 8, 8), dtype)
    model = functools.partial(net, fault)
    constant = {"bn": {name: params["bn"].pop(name) for name in ("mean", "var")}}

    def evaluate(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        return model({**params, "bn": {**params["bn"], **constant["bn"]}}, x)

    return Case("jax", reference, evaluate, images, nhwc(images), convert, params, nhwc=True)


NNX = Port("squeeze-nnx", build_nnx)
JAX = Port("squeeze-jax", build_jax)
PORTS = (NNX, JAX)
FAULTS = (
    fault(NNX, "epsilon", "bn"),
    fault(NNX, "batch-statistics-vs-running", "bn"),
    fault(NNX, "pool-kind", "squeeze"),
    fault(NNX, "hard-sigmoid", "gate", cause="activation"),
    fault(NNX, "stop-gradient", "gate", "input gradient", accept=("mul",)),
    fault(NNX, "weights-swapped", "bn", "parameter", parameter="bn.weight"),
    fault(JAX, "gelu", "silu", cause="activation"),
    fault(JAX, "missing-bias", "fc2"),
    fault(JAX, "softmax-gate", "gate", cause="activation"),
)
