"""Grouped convolutions and group norm in evaluation, in Linen."""

from __future__ import annotations

import functools

import flax.linen as linen
import jax
import jax.numpy as jnp
import torch
from torch import nn

from tests.ports.case import Case, Port, arrays_of, fault, linen_variables, nhwc, normal, seeded, to_flax


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 16, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, 16)
        self.silu = nn.SiLU()
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=4)
        self.norm2 = nn.GroupNorm(8, 16)
        self.elu = nn.ELU()
        self.conv3 = nn.Conv2d(16, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.silu(self.norm1(self.conv1(x)))
        return self.conv3(self.elu(self.norm2(self.conv2(x))))


class GroupNorm(linen.Module):
    """Group norm by hand."""

    groups: int
    fault: str = ""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", linen.initializers.ones, x.shape[-1:])
        bias = self.param("bias", linen.initializers.zeros, x.shape[-1:])
        n, h, w, _ = x.shape
        if self.fault == "interleaved-groups":
            groups = jnp.moveaxis(x.reshape(n, h, w, -1, self.groups), -1, -2)  # fault: interleaved-groups
            norm = self.normalize(groups)
            return jnp.moveaxis(norm, -1, -2).reshape(x.shape) * scale + bias
        return self.normalize(x.reshape(n, h, w, self.groups, -1)).reshape(x.shape) * scale + bias

    def normalize(self, groups: jax.Array) -> jax.Array:
        axes: tuple[int, ...] = (1, 2, 4)
        if self.fault == "layer-norm-axes":
            axes = (4,)
        mean = groups.mean(axes, keepdims=True)  # fault: layer-norm-axes
        var = groups.var(axes, keepdims=True)
        return (groups - mean) / jnp.sqrt(var + 1e-5)


class Net(linen.Module):
    fault: str = ""
    by_hand: bool = False

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fault = self.fault
        x = linen.Conv(16, (3, 3), padding=1, name="conv1")(x)
        if fault == "epsilon":
            x = linen.GroupNorm(4, name="norm1")(x)  # fault: epsilon
        elif fault == "groups":
            x = linen.GroupNorm(2, epsilon=1e-5, name="norm1")(x)  # fault: groups
        elif fault == "norm-activation-order":
            x = linen.GroupNorm(4, epsilon=1e-5, name="norm1")(linen.silu(x))  # fault: norm-activation-order
        elif self.by_hand:
            x = GroupNorm(4, fault, name="norm1")(x)
        else:
            x = linen.GroupNorm(4, epsilon=1e-5, name="norm1")(x)
        if fault != "norm-activation-order":
            x = linen.silu(x)
        padding = "SAME" if fault == "same-padding" else 1
        x = linen.Conv(16, (3, 3), 2, padding, feature_group_count=4, name="conv2")(x)  # fault: same-padding
        x = (
            GroupNorm(8, name="norm2")(x)
            if self.by_hand
            else linen.GroupNorm(8, epsilon=1e-5, name="norm2")(x)
        )
        if fault == "celu":
            x = linen.celu(x, 0.5)  # fault: celu
        else:
            x = linen.elu(x)
        return linen.Conv(3, (1, 1), name="conv3")(x)


def build(seed: int, fault: str = "", dtype: str = "float32", *, by_hand: bool = False) -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    convert = functools.partial(to_flax, reference)
    arrays = convert(arrays_of(reference))
    if fault == "kernel-transposed":
        arrays["conv2.kernel"] = arrays["conv2.kernel"].transpose(1, 0, 2, 3)
    images = normal(seed, (2, 4, 8, 8), dtype)
    model = Net(fault, by_hand)
    return Case("linen", reference, model, images, nhwc(images), convert, linen_variables(arrays), nhwc=True)


LINEN = Port("group_norm-linen", build)
BY_HAND = Port("group_norm-linen-by-hand", functools.partial(build, by_hand=True))
PORTS = (LINEN, BY_HAND)
FAULTS = (
    fault(LINEN, "epsilon", "norm1"),
    fault(LINEN, "groups", "norm1"),
    fault(LINEN, "norm-activation-order", "norm1"),
    fault(LINEN, "same-padding", "conv2"),
    fault(LINEN, "celu", "elu", cause="activation"),
    fault(LINEN, "kernel-transposed", "conv2", "parameter", parameter="conv2.weight"),
    fault(BY_HAND, "interleaved-groups", "norm1", cause="groups"),
    fault(BY_HAND, "layer-norm-axes", "norm1"),
)
