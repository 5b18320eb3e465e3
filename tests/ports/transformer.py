"""A transformer encoder with a padding mask: tokens in, a pooled output, in plain JAX and in NNX."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax import lax
from torch import nn

from tests.ports.case import Arrays, Case, Port, arrays_of, fault, load_nnx, nested, seeded, to_flax

WIDTH, HEADS, LENGTH, VOCABULARY = 12, 3, 7, 20


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, WIDTH)
        self.v = nn.Linear(WIDTH, WIDTH)
        self.softmax = nn.Softmax(-1)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.reshape(len(y), -1, HEADS, WIDTH // HEADS).transpose(1, 2)

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        scores = q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
        return self.out((self.softmax(scores) @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 16)
        self.act = nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(0.1)
        self.fc2 = nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.fc2(self.dropout(self.act(self.fc1(self.norm2(x)))))


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(LENGTH + 1, WIDTH)
        self.layer1 = Layer()
        self.layer2 = Layer()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1])
        x = self.embedding(tokens) * math.sqrt(WIDTH) + self.position(positions)
        x = self.norm(self.layer2(self.layer1(x, mask), mask))
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


Tree = Mapping[str, Any]


def linear(p: Tree, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def layer_norm(p: Tree, x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x, epsilon=1e-5) * p["scale"] + p["bias"]


def attention(fault: str, p: Tree, x: jax.Array, mask: jax.Array) -> jax.Array:
    n, length, width = x.shape

    def heads(y: jax.Array) -> jax.Array:
        return y.reshape(n, length, HEADS, -1).transpose(0, 2, 1, 3)

    q, k, v = heads(linear(p["q"], x)), heads(linear(p["k"], x)), heads(linear(p["v"], x))
    visible = mask[:, None, None, :]
    scores = q @ k.swapaxes(2, 3)
    if fault == "attention-scale":
        scores = scores / math.sqrt(width)  # fault: attention-scale
    else:
        scores = scores / math.sqrt(width // HEADS)
    if fault == "mask-after-softmax":
        weights = jax.nn.softmax(scores) * visible  # fault: mask-after-softmax
    elif fault == "softmax-axis":
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-2)  # fault: softmax-axis
    else:
        if fault == "mask-inverted":
            scores = jnp.where(visible, -1e30, scores)  # fault: mask-inverted
        elif fault == "mask-value":
            scores = jnp.where(visible, scores, -9.0)  # fault: mask-value
        else:
            scores = jnp.where(visible, scores, -jnp.inf)
        weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
        weights = weights / weights.sum(-1, keepdims=True)
    if fault == "stop-gradient":
        weights = lax.stop_gradient(weights)  # fault: stop-gradient
    y = weights @ v
    if fault == "flatten-order":
        y = y.reshape(n, length, width)  # fault: flatten-order
    else:
        y = y.transpose(0, 2, 1, 3).reshape(n, length, width)
    return linear(p["out"], y)


def layer(fault: str, p: Tree, x: jax.Array, mask: jax.Array) -> jax.Array:
    if fault == "shortcut-source":
        x = layer_norm(p["norm1"], x)
        x = x + attention(fault, p["attention"], x, mask)  # fault: shortcut-source
    else:
        x = x + attention(fault, p["attention"], layer_norm(p["norm1"], x), mask)
    y = jax.nn.gelu(linear(p["fc1"], layer_norm(p["norm2"], x)))
    if fault == "dropout-active":
        kept = jax.random.bernoulli(jax.random.key(0), 0.9, y.shape)
        y = jnp.where(kept, y / 0.9, 0)  # fault: dropout-active
    return x + linear(p["fc2"], y)


def encoder(fault: str, p: Tree, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    x = p["embedding"]["embedding"][tokens]
    if fault != "embedding-scale":
        x = x * math.sqrt(WIDTH)
    if fault == "position-offset":
        x = x + p["position"]["embedding"][1 : tokens.shape[1] + 1]  # fault: position-offset
    else:
        x = x + p["position"]["embedding"][: tokens.shape[1]]  # fault: embedding-scale
    x = layer(fault, p["layer1"], x, mask)
    x = layer_norm(p["norm"], layer("", p["layer2"], x, mask))
    return linear(p["head"], jnp.einsum("nlc,nl->nc", x, mask / mask.sum(1, keepdims=True, dtype=x.dtype)))


def example(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and a mask that is true where there is one; sequences end at 7, 4 and 5 tokens."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (3, LENGTH))
    return tokens, np.arange(LENGTH) < np.array([[7], [4], [5]])


def build_jax(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(to_flax, reference)
    arrays = convert(arrays_of(reference))
    if fault == "weights-swapped":
        one, two = "layer1.attention.q.kernel", "layer1.attention.k.kernel"
        arrays[one], arrays[two] = arrays[two], arrays[one]
    tokens, mask = example(seed)
    inputs, candidate_inputs = (tokens, mask), (tokens.astype(np.int32), mask)
    model = functools.partial(encoder, fault)
    return Case("jax", reference, model, inputs, candidate_inputs, convert, nested(arrays))


class NNXAttention(nnx.Module):
    library = False  # by jax.nn.dot_product_attention, which computes the softmax in float32 even in float64

    def __init__(self, fault: str, rngs: nnx.Rngs) -> None:
        self.fault = fault
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        n, length, width = x.shape
        qkv = self.qkv(x)
        if self.fault == "qkv-order":
            q, k, v = jnp.moveaxis(qkv.reshape(n, length, HEADS, -1, 3), -1, 0)  # fault: qkv-order
        else:
            q, k, v = jnp.moveaxis(qkv.reshape(n, length, 3, HEADS, -1), 2, 0)
        visible = mask[:, None, None, :]
        if self.library:
            y = jax.nn.dot_product_attention(q, k, v, mask=visible)
            return self.out(y.reshape(n, length, width))
        if self.fault == "missing-scale":
            scores = jnp.einsum("nqhd,nkhd->nhqk", q, k)  # fault: missing-scale
        else:
            scores = jnp.einsum("nqhd,nkhd->nhqk", q / math.sqrt(q.shape[-1]), k)
        weights = jax.nn.softmax(scores, where=visible)
        y = jnp.einsum("nhqk,nkhd->nqhd", weights, v)
        return self.out(y.reshape(n, length, width))


class NNXLayer(nnx.Module):
    def __init__(self, fault: str, rngs: nnx.Rngs) -> None:
        self.fault = fault
        epsilon = 1e-3 if fault == "epsilon" else 1e-5
        self.norm1 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.attention = NNXAttention(fault, rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, epsilon=epsilon, rngs=rngs)
        self.fc1 = nnx.Linear(WIDTH, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.fc2 = nnx.Linear(16, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask)
        y = self.fc1(self.norm2(x))  # fault: epsilon
        if self.fault == "exact-gelu":
            y = nnx.gelu(y, approximate=False)  # fault: exact-gelu
        else:
            y = nnx.gelu(y)
        return x + self.fc2(self.dropout(y))


class NNXEncoder(nnx.Module):
    def __init__(self, fault: str, dtype: str, rngs: nnx.Rngs) -> None:
        # nnx.Embed computes in the type that its parameter has here, whatever is loaded later.
        embed = functools.partial(nnx.Embed, param_dtype=jnp.dtype(dtype), rngs=rngs)
        self.embedding = embed(VOCABULARY, WIDTH)
        self.position = embed(LENGTH + 1, WIDTH)
        self.layer1 = NNXLayer(fault, rngs)
        self.layer2 = NNXLayer("", rngs)
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 4, rngs=rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.embedding(tokens) * math.sqrt(WIDTH) + self.position(jnp.arange(tokens.shape[1]))
        x = self.norm(self.layer2(self.layer1(x, mask), mask))
        return self.head(jnp.mean(x, 1, where=mask[..., None]))


def convert_fused(reference: nn.Module, arrays: Arrays) -> dict[str, np.ndarray]:
    """Flax's names, with q, k and v in one kernel and one bias."""
    result = to_flax(reference, arrays)
    for path in ("layer1.attention", "layer2.attention"):
        for leaf in ("kernel", "bias"):
            parts = [result.pop(f"{path}.{name}.{leaf}") for name in "qkv"]
            result[f"{path}.qkv.{leaf}"] = np.concatenate(parts, -1)
    return result


def build_nnx(seed: int, fault: str = "", dtype: str = "float32", *, library: bool = False) -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(convert_fused, reference)
    model = NNXEncoder(fault, dtype, nnx.Rngs(seed))
    model.layer1.attention.library = model.layer2.attention.library = library
    load_nnx(model, convert(arrays_of(reference)))
    model.eval()
    tokens, mask = example(seed)
    inputs = {"tokens": tokens, "mask": mask}
    candidate_inputs = {"tokens": tokens.astype(np.int32), "mask": mask}
    return Case("nnx", reference, model, inputs, candidate_inputs, convert)


JAX = Port("transformer-jax", build_jax)
NNX = Port("transformer-nnx-fused-qkv", build_nnx)
LIBRARY = Port(
    "transformer-nnx-dot-product-attention", functools.partial(build_nnx, library=True), float32_inside=True
)
PORTS = (JAX, NNX, LIBRARY)
FAULTS = (
    fault(JAX, "attention-scale", "layer1.attention.div", accept=("layer1.attention.softmax",)),
    fault(JAX, "mask-after-softmax", "layer1.attention.softmax"),
    fault(JAX, "softmax-axis", "layer1.attention.softmax"),
    fault(JAX, "mask-inverted", "layer1.attention.masked_fill", accept=("layer1.attention.softmax",)),
    fault(JAX, "mask-value", "layer1.attention.masked_fill", accept=("layer1.attention.softmax",)),
    fault(JAX, "flatten-order", "layer1.attention.transpose", accept=("layer1.attention.flatten",)),
    fault(
        JAX,
        "stop-gradient",
        "layer1.attention.softmax",
        "input gradient",
        accept=("layer1.attention.matmul",),
    ),
    fault(JAX, "shortcut-source", "layer1.add", accept=("layer1",)),
    fault(JAX, "dropout-active", "layer1.dropout", accept=("layer1.act",)),
    fault(JAX, "embedding-scale", "mul", accept=("embedding", "add")),
    fault(JAX, "position-offset", "position"),
    fault(JAX, "weights-swapped", "layer1.attention.q", "parameter", parameter="layer1.attention.q.weight"),
    fault(NNX, "qkv-order", "layer1.attention.reshape", cause="flatten-order", accept=("layer1.attention",)),
    fault(
        NNX,
        "missing-scale",
        "layer1.attention.div",
        cause="attention-scale",
        accept=("layer1.attention.softmax",),
    ),
    fault(NNX, "epsilon", "layer1.norm2"),
    fault(NNX, "exact-gelu", "layer1.act", cause="gelu-tanh"),
)
