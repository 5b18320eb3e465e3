"""A vision transformer (arXiv:2010.11929) with class token and patch embedding in evaluation, in Linen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import linen
from jax import lax
from torch import nn

from tests.ports.case import (
    Array,
    Arrays,
    Case,
    Port,
    arrays_of,
    fault,
    linen_variables,
    nhwc,
    normal,
    seeded,
    to_flax,
)

PATCH, DIM, HEADS, DEPTH, CLASSES = 4, 16, 2, 2, 5
HEIGHT, WIDTH = 12, 8
TOKENS = HEIGHT * WIDTH // PATCH**2 + 1


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = (DIM // HEADS) ** -0.5
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(b, n, c)
        return self.proj(x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, 2 * DIM)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(DIM)
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, TOKENS, DIM))
        self.blocks = nn.Sequential(*[Block() for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat((cls, x), dim=1)
        x = x + self.pos_embed
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0])


@jax.custom_vjp
def softmax(scores: jax.Array) -> jax.Array:
    return jax.nn.softmax(scores)


def softmax_forward(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights = jax.nn.softmax(scores)
    return weights, weights


def softmax_backward(weights: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (weights * (1 - weights) * gradient,)  # fault: wrong-custom-derivative


softmax.defvjp(softmax_forward, softmax_backward)


class FlaxAttention(linen.Module):
    fault: str

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, n, c = x.shape
        qkv = linen.Dense(3 * DIM, use_bias=self.fault != "missing-bias", name="qkv")(
            x
        )  # fault: missing-bias
        if self.fault == "qkv-order":
            qkv = qkv.reshape(b, n, HEADS, 3, c // HEADS).transpose(0, 1, 3, 2, 4)  # fault: qkv-order
        else:
            qkv = qkv.reshape(b, n, 3, HEADS, c // HEADS)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        if self.fault == "attention-scale":
            scores = scores / jnp.sqrt(c).astype(x.dtype)  # fault: attention-scale
        else:
            scores = scores * (c // HEADS) ** -0.5
        match self.fault:
            case "softmax-axis":
                weights = linen.softmax(scores, axis=-2)  # fault: softmax-axis
            case "bfloat16-cast":
                weights = linen.softmax(scores.astype(jnp.bfloat16)).astype(x.dtype)  # fault: bfloat16-cast
            case "wrong-custom-derivative":
                weights = softmax(scores)
            case _:
                weights = linen.softmax(scores)
        x = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, n, c)
        return linen.Dense(DIM, name="proj")(x)


class FlaxMlp(linen.Module):
    fault: str

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Dense(2 * DIM, name="fc1")(x)
        x = linen.gelu(x, approximate=self.fault == "gelu-tanh")  # fault: gelu-tanh
        x = linen.Dense(DIM, name="fc2")(x)
        if self.fault == "second-gelu":
            x = linen.gelu(x, approximate=False)  # fault: second-gelu
        return x


class FlaxBlock(linen.Module):
    fault: str

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        epsilon = 1e-6 if self.fault == "epsilon" else 1e-5
        y = linen.LayerNorm(epsilon=epsilon, name="norm1")(x)  # fault: epsilon
        if self.fault == "shortcut-source":
            x = y  # fault: shortcut-source
        x = x + FlaxAttention(self.fault, name="attn")(y)
        y = linen.LayerNorm(epsilon=epsilon, name="norm2")(x)
        y = FlaxMlp(self.fault, name="mlp")(y)
        if self.fault == "missing-shortcut":
            return y  # fault: missing-shortcut
        return x + y


IN_LAST_BLOCK = ("attention-scale", "bfloat16-cast", "second-gelu", "missing-shortcut")


class ViT(linen.Module):
    fault: str = ""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(DIM, (PATCH, PATCH), strides=PATCH, padding="VALID", name="patch")(x)
        if self.fault == "frozen-patches":
            x = lax.stop_gradient(x)  # fault: frozen-patches
        if self.fault == "flatten-order":
            x = x.swapaxes(1, 2)  # fault: flatten-order
        x = x.reshape(len(x), -1, DIM)
        cls = self.param("cls_token", linen.initializers.zeros, (1, 1, DIM))
        cls = jnp.broadcast_to(cls, (len(x), 1, DIM))
        pos = self.param("pos_embed", linen.initializers.normal(0.02), (1, TOKENS, DIM))
        if self.fault == "stop-gradient":
            pos = lax.stop_gradient(pos)  # fault: stop-gradient
        if self.fault == "position-offset":
            pos = jnp.roll(pos, -1, 1)  # fault: position-offset
        if self.fault == "concat-order":
            x = jnp.concatenate([x, cls], 1) + pos  # fault: concat-order
        else:
            x = jnp.concatenate([cls, x], 1) + pos
        for index in range(DEPTH):
            last = index == DEPTH - 1
            x = FlaxBlock(
                self.fault if last or self.fault not in IN_LAST_BLOCK else "", name=f"blocks_{index}"
            )(x)
        x = linen.LayerNorm(epsilon=1e-6 if self.fault == "epsilon" else 1e-5, name="norm")(x)
        half = jnp.float16 if self.fault == "float16-cast" else None
        return linen.Dense(CLASSES, dtype=half, name="head")(x[:, 0]).astype(x.dtype)  # fault: float16-cast


def build(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)

    def convert(arrays: Arrays) -> dict[str, Array]:
        converted = to_flax(reference, arrays)
        return {name.replace("blocks.", "blocks_"): array for name, array in converted.items()}

    arrays = convert(arrays_of(reference))
    match fault:
        case "kernel-transposed":
            arrays["blocks_0.attn.proj.kernel"] = arrays["blocks_0.attn.proj.kernel"].T
        case "weights-swapped":
            first, second = "blocks_1.norm1.scale", "blocks_1.norm2.scale"
            arrays[first], arrays[second] = arrays[second], arrays[first]
        case "weight-not-loaded":
            arrays["cls_token"] = 0 * arrays["cls_token"]
    images = normal(seed, (2, 3, HEIGHT, WIDTH), dtype)
    variables: Any = linen_variables(arrays)
    return Case("linen", reference, ViT(fault), images, nhwc(images), convert, variables, nhwc=True)


LINEN = Port("vit-linen", build)
PORTS = (LINEN,)
ATTENTION = "blocks.0.attn"
FAULTS = (
    fault(
        LINEN,
        "qkv-order",
        f"{ATTENTION}.reshape",
        cause="flatten-order",
        accept=(
            f"{ATTENTION}.permute",
            f"{ATTENTION}.unbind",
            f"{ATTENTION}.transpose",
            f"{ATTENTION}.matmul",
        ),
    ),
    fault(LINEN, "attention-scale", "blocks.1.attn.mul", accept=("blocks.1.attn.matmul",)),
    fault(LINEN, "softmax-axis", f"{ATTENTION}.softmax"),
    fault(LINEN, "bfloat16-cast", "blocks.1.attn.softmax", accept=("blocks.1.attn.mul",)),
    fault(LINEN, "wrong-custom-derivative", f"{ATTENTION}.softmax", "input gradient"),
    fault(LINEN, "missing-bias", f"{ATTENTION}.qkv"),
    fault(LINEN, "gelu-tanh", "blocks.0.mlp.act"),
    fault(LINEN, "second-gelu", "blocks.1.mlp.fc2", cause="activation", accept=("blocks.1.mlp",)),
    fault(LINEN, "epsilon", "blocks.0.norm1"),
    fault(LINEN, "shortcut-source", "blocks.0.add"),
    fault(LINEN, "missing-shortcut", "blocks.1.add"),
    fault(LINEN, "flatten-order", "flatten", accept=("transpose",)),
    fault(LINEN, "concat-order", "cat"),
    fault(LINEN, "position-offset", "add"),
    fault(LINEN, "stop-gradient", "add", "parameter gradient", parameter="pos_embed"),
    fault(
        LINEN,
        "frozen-patches",
        "patch",
        "input gradient",
        cause="stop-gradient",
        accept=("flatten", "transpose"),
    ),
    fault(LINEN, "float16-cast", "head"),
    fault(LINEN, "kernel-transposed", f"{ATTENTION}.proj", "parameter", parameter=f"{ATTENTION}.proj.weight"),
    fault(LINEN, "weights-swapped", "blocks.1.norm1", "parameter", parameter="blocks.1.norm1.weight"),
    fault(LINEN, "weight-not-loaded", "expand", "parameter", parameter="cls_token", accept=("cat",)),
)
