"""A transformer encoder layer, normalized after the sums, with a padding mask, in NNX and plain JAX."""

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

from tests.ports.case import Case, Port, arrays_of, fault, load_nnx, nested, normal, seeded, to_flax

FEATURES, DIM, HEADS, HIDDEN, CLASSES, STEPS = 6, 16, 4, 32, 5, 7
EPSILON = 1e-5
LENGTHS = (7, 5, 3)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(DIM, DIM)
        self.k = nn.Linear(DIM, DIM)
        self.v = nn.Linear(DIM, DIM)
        self.softmax = nn.Softmax(dim=-1)
        self.o = nn.Linear(DIM, DIM)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = q @ k.transpose(-2, -1) / (DIM // HEADS) ** 0.5
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        x = self.softmax(scores) @ v
        return self.o(x.transpose(1, 2).flatten(2))


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, DIM)
        self.attention = Attention()
        self.norm1 = nn.LayerNorm(DIM)
        self.fc1 = nn.Linear(DIM, HIDDEN)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(HIDDEN, DIM)
        self.norm2 = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) * DIM**0.5
        position = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        angle = position * 0.1 ** torch.arange(DIM // 2, dtype=x.dtype)
        x = x + torch.cat([angle.sin(), angle.cos()], dim=-1)
        x = self.norm1(x + self.attention(x, mask))
        x = self.norm2(x + self.fc2(self.act(self.fc1(x))))
        return self.head(x)


def positions(x: jax.Array, first: int = 0) -> jax.Array:
    position = first + jnp.arange(x.shape[1], dtype=x.dtype)[:, None]
    angle = position * 0.1 ** jnp.arange(DIM // 2, dtype=x.dtype)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


class FlaxAttention(nnx.Module):
    def __init__(self, fault: str, rngs: nnx.Rngs) -> None:
        self.fault = fault
        self.q = nnx.Linear(DIM, DIM, rngs=rngs)
        self.k = nnx.Linear(DIM, DIM, rngs=rngs)
        self.v = nnx.Linear(DIM, DIM, rngs=rngs)
        self.o = nnx.Linear(DIM, DIM, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        b, t, _ = x.shape
        q, k, v = (layer(x).reshape(b, t, HEADS, -1) for layer in (self.q, self.k, self.v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        if self.fault == "attention-scale":
            scores = scores / (DIM // HEADS)  # fault: attention-scale
        else:
            scores = scores / (DIM // HEADS) ** 0.5
        keys = mask[:, None, None, :]
        match self.fault:
            case "mask-inverted":
                weights = nnx.softmax(jnp.where(keys, -1e9, scores))  # fault: mask-inverted
            case "mask-value":
                weights = nnx.softmax(scores + (keys - 1.0))  # fault: mask-value
            case "mask-after-softmax":
                weights = nnx.softmax(scores) * keys  # fault: mask-after-softmax
            case _:
                weights = nnx.softmax(jnp.where(keys, scores, -jnp.inf))
        if self.fault == "stop-gradient":
            weights = lax.stop_gradient(weights)  # fault: stop-gradient
        if self.fault == "heads-order":
            x = jnp.einsum("bhqk,bkhd->bhqd", weights, v)
            return self.o(x.reshape(b, t, DIM))  # fault: heads-order
        return self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, DIM))


class Encoder(nnx.Module):
    def __init__(self, fault: str, rngs: nnx.Rngs) -> None:
        self.fault = fault
        self.embed = nnx.Linear(FEATURES, DIM, rngs=rngs)
        self.attention = FlaxAttention(fault, rngs)
        self.norm1 = nnx.LayerNorm(DIM, epsilon=EPSILON, rngs=rngs)
        self.fc1 = nnx.Linear(DIM, HIDDEN, rngs=rngs)
        self.fc2 = nnx.Linear(HIDDEN, DIM, rngs=rngs)
        axes = (-2, -1) if fault == "layer-norm-axes" else -1
        self.norm2 = nnx.LayerNorm(DIM, epsilon=EPSILON, reduction_axes=axes, rngs=rngs)
        self.head = nnx.Linear(DIM, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.embed(x)
        if self.fault == "embedding-scale":
            x = x * DIM**-0.5  # fault: embedding-scale
        else:
            x = x * DIM**0.5
        x = x + positions(x, first=1 if self.fault == "position-offset" else 0)  # fault: position-offset
        if self.fault == "norm-before":
            x = x + self.attention(self.norm1(x), mask)  # fault: norm-before
        else:
            x = self.norm1(x + self.attention(x, mask))
        # nnx.gelu is the tanh approximation, as in the reference.
        y = nnx.gelu(self.fc1(x), approximate=self.fault != "gelu-exact")  # fault: gelu-exact
        return self.head(self.norm2(x + self.fc2(y)))  # fault: layer-norm-axes


def inputs_of(seed: int, dtype: str) -> dict[str, np.ndarray]:
    mask = np.arange(STEPS) < np.array(LENGTHS)[:, None]
    return {"x": normal(seed, (len(LENGTHS), STEPS, FEATURES), dtype), "mask": mask}


def build_nnx(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(to_flax, reference)
    arrays = convert(arrays_of(reference))
    match fault:
        case "weights-swapped":
            first, second = "attention.q.kernel", "attention.v.kernel"
            arrays[first], arrays[second] = arrays[second], arrays[first]
        case "weight-not-loaded":
            arrays["fc1.bias"] = 0 * arrays["fc1.bias"]
    model = Encoder(fault, nnx.Rngs(seed))
    load_nnx(model, arrays)
    model.eval()
    inputs = inputs_of(seed, dtype)
    return Case("nnx", reference, model, inputs, inputs, convert)


Tree = Mapping[str, Any]


def dense(x: jax.Array, p: Tree) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


@jax.custom_vjp
def normalized(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPSILON)


def normalized_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = normalized(x)
    return y, (y, jnp.sqrt(x.var(-1, keepdims=True) + EPSILON))


def normalized_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array]:
    y, deviation = saved
    gradient = gradient - gradient.mean(-1, keepdims=True)
    return ((gradient - y * gradient.mean(-1, keepdims=True)) / deviation,)  # fault: wrong-custom-derivative


normalized.defvjp(normalized_forward, normalized_backward)


def layer_norm(x: jax.Array, p: Tree, fault: str = "") -> jax.Array:
    """With the variance as the mean square less the square of the mean."""
    if fault == "wrong-custom-derivative":
        return normalized(x) * p["scale"] + p["bias"]
    mean = x.mean(-1, keepdims=True)
    factor = lax.rsqrt((x * x).mean(-1, keepdims=True) - mean * mean + EPSILON) * p["scale"]
    return x * factor + (p["bias"] - mean * factor)


def attention(fault: str, p: Tree, x: jax.Array, mask: jax.Array) -> jax.Array:
    """A head at a time, the softmax by hand, the outputs summed instead of concatenated."""
    size = DIM // HEADS
    q, k, v = dense(x, p["q"]) / size**0.5, dense(x, p["k"]), dense(x, p["v"])
    output = p["o"]["bias"]
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].swapaxes(1, 2)
        if fault == "float16-cast":
            scores = scores.astype(jnp.float16).astype(x.dtype)  # fault: float16-cast
        if fault == "mask-queries":
            scores = jnp.where(mask[:, :, None], scores, -1e30)  # fault: mask-queries
        else:
            scores = jnp.where(mask[:, None, :], scores, -1e30)
        axis = -2 if fault == "softmax-axis" else -1  # fault: softmax-axis
        weights = jnp.exp(scores - scores.max(axis, keepdims=True))
        weights = weights / weights.sum(axis, keepdims=True)
        output = output + weights @ (v[..., part] @ p["o"]["kernel"][part])
    return output


def encoder(fault: str, p: Tree, x: jax.Array, mask: jax.Array) -> jax.Array:
    x = dense(x, p["embed"]) * 4
    x = x + positions(x)
    x = layer_norm(x + attention(fault, p["attention"], x, mask), p["norm1"], fault)
    y = dense(x, p["fc1"])
    if fault == "silu":
        y = jax.nn.silu(y)  # fault: silu
    else:
        y = y * jax.nn.sigmoid(2 * (2 / jnp.pi) ** 0.5 * (y + 0.044715 * y**3))
    if fault == "missing-bias":
        y = y @ p["fc2"]["kernel"]  # fault: missing-bias
    else:
        y = dense(y, p["fc2"])
    x = layer_norm(x + y, p["norm2"])
    if fault == "bfloat16-cast":
        x = x.astype(jnp.bfloat16).astype(x.dtype)  # fault: bfloat16-cast
    return dense(x, p["head"])


def build_jax(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(to_flax, reference)
    arrays = convert(arrays_of(reference))
    if fault == "kernel-transposed":
        arrays["attention.k.kernel"] = arrays["attention.k.kernel"].T
    inputs = inputs_of(seed, dtype)
    model = functools.partial(encoder, fault)
    return Case("jax", reference, model, inputs, inputs, convert, nested(arrays))


NNX = Port("encoder-nnx", build_nnx)
JAX = Port("encoder-jax", build_jax)
PORTS = (NNX, JAX)
FAULTS = (
    fault(NNX, "attention-scale", "attention.truediv", accept=("attention.div", "attention.matmul")),
    fault(NNX, "mask-inverted", "attention.masked_fill", accept=("attention.softmax",)),
    fault(NNX, "mask-value", "attention.masked_fill", accept=("attention.softmax",)),
    fault(NNX, "mask-after-softmax", "attention.softmax", accept=("attention.masked_fill",)),
    fault(NNX, "stop-gradient", "attention.softmax", "input gradient", accept=("attention.matmul",)),
    fault(
        NNX,
        "heads-order",
        "attention.transpose",
        cause="flatten-order",
        accept=("attention.flatten",),
    ),
    fault(NNX, "layer-norm-axes", "norm2"),
    fault(NNX, "embedding-scale", "mul"),
    fault(NNX, "position-offset", "add", accept=("cat", "sin", "cos", "mul", "arange")),
    # Outside the list: normalization before the attention instead of after the sum.
    fault(
        NNX,
        "norm-before",
        "attention.q",
        cause="norm-activation-order",
        accept=("attention.k", "attention.v", "norm1", "attention"),
    ),
    fault(NNX, "gelu-exact", "act", cause="gelu-tanh"),
    fault(
        NNX,
        "weights-swapped",
        "attention.q",
        "parameter",
        parameter="attention.q.weight",
        accept=("attention.v",),
    ),
    fault(NNX, "weight-not-loaded", "fc1", "parameter", parameter="fc1.bias"),
    fault(JAX, "float16-cast", "attention.truediv", accept=("attention.div", "attention.matmul")),
    # Outside the list: the mask hides queries instead of keys.
    fault(
        JAX,
        "mask-queries",
        "attention.masked_fill",
        cause="mask-inverted",
        accept=("attention.softmax",),
    ),
    fault(JAX, "softmax-axis", "attention.softmax"),
    fault(JAX, "silu", "act", cause="activation"),
    fault(JAX, "missing-bias", "fc2"),
    fault(JAX, "wrong-custom-derivative", "norm1", "input gradient"),
    fault(JAX, "bfloat16-cast", "norm2", accept=("head",)),
    fault(JAX, "kernel-transposed", "attention.k", "parameter", parameter="attention.k.weight"),
)
