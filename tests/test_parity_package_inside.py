"""Faults inside a stage, in parameters of two stages at once, and of a line that every block runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import parity
from parity.causes.variants import fused_orders
from parity.trace import Trace, Value

X = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)


class Net(nn.Module):
    """Two normalized products, added; tanh, a third norm, tanh again, and an exponential."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.one(x)) + self.norm2(self.two(x))
        x = torch.exp(torch.tanh(self.norm3(torch.tanh(x))))
        logits: torch.Tensor = self.head(x)
        return logits


@jax.custom_vjp
def tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(x)


tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g / (1 + x * x),))


def port(fault: str) -> Callable[[Any, Any], Any]:
    def linear(p: Any, name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(p: Any, name: str, x: Any) -> Any:
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def act(x: Any) -> Any:
        return tanh(x) if fault == "wrong-custom-derivative" else jnp.tanh(x)

    def f(p: Any, x: Any) -> Any:
        read = norm(p, "norm3", x) if fault == "norm-activation-order" else x
        x = norm(p, "norm1", linear(p, "one", read)) + norm(p, "norm2", linear(p, "two", x))
        x = act(x)
        x = x if fault == "norm-activation-order" else norm(p, "norm3", x)
        if fault == "float16-cast":  # half of the features at a time, so that no value has all of them
            parts = [jnp.tanh(half).astype(jnp.float16).astype(x.dtype) for half in jnp.split(x, 2, -1)]
            weights = jnp.split(p["head.weight"].T, 2)
            return jnp.exp(parts[0]) @ weights[0] + jnp.exp(parts[1]) @ weights[1] + p["head.bias"]
        return linear(p, "head", jnp.exp(act(x)))

    return f


FAULTS = {  # fault: what departs, the reference's stage or tensor
    "weights-swapped": ("parameter", "norm1.weight"),
    "weight-not-loaded": ("parameter", "one.bias"),
    "norm-activation-order": ("output", "one"),
    "wrong-custom-derivative": ("input gradient", "tanh"),
    "float16-cast": ("output", "tanh.2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_placed_and_its_cause_named(fault: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        for parameter in net.parameters():
            nn.init.normal_(parameter, 0.5)
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    if fault == "weights-swapped":
        arrays |= {"norm1.weight": arrays["norm2.weight"], "norm2.weight": arrays["norm1.weight"]}
    if fault == "weight-not-loaded":
        arrays["one.bias"] = 0 * arrays["one.bias"]
    models = parity.torch_model(net), parity.jax_model(port(fault), arrays)
    gradients = "gradient" in FAULTS[fault][0]
    difference = parity.compare(*models, X, gradients=gradients).first_difference
    assert difference is not None
    assert (difference.what, difference.reference) == FAULTS[fault], str(difference)
    assert difference.cause_id == fault, str(difference)


class Residual(nn.Module):
    """NCHW, with a product of NHWC inside; four channels of 4x4 pixels, so that no shape tells the axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        y = self.fc(x.permute(0, 2, 3, 1)).exp()
        x = x + y.permute(0, 3, 1, 2)
        return torch.tanh(x).mean((2, 3))


def test_a_shortcut_of_square_images_is_placed() -> None:
    net = Residual()
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}

    def f(p: Any, x: Any) -> Any:
        shortcut = x  # the reference adds what the convolution gives
        x = x @ p["conv.weight"][..., 0, 0].T + p["conv.bias"]
        y = jnp.exp(x @ p["fc.weight"].T + p["fc.bias"])
        return jnp.tanh(shortcut + y).mean((1, 2))

    x = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    models = parity.torch_model(net), parity.jax_model(f, arrays)
    difference = parity.compare(*models, x, x.transpose(0, 2, 3, 1), gradients=False).first_difference
    assert difference is not None
    assert (difference.reference, difference.cause_id) == ("add", "shortcut-source"), str(difference)


def test_orders_of_one_product_for_queries_keys_and_values() -> None:
    rng = np.random.default_rng(0)
    products = [Value(name, "linear", rng.normal(size=(2, 5, 6)), inputs=("x",)) for name in "qkv"]
    heads = [
        Value(f"{product.name}.heads", "view", product.value.reshape(2, 5, 3, 2), inputs=(product.name,))
        for product in products
    ]
    trace = Trace([*products, *heads], {}, {}, {}, {}, {}, {}, {})
    whole = np.concatenate([product.value for product in products], -1)
    expected = np.moveaxis(whole.reshape(2, 5, 3, 2, 3), -1, 0)  # by head, then feature
    found = [
        variant.sentence
        for replaced, variant in fused_orders(heads[:1], trace)
        if all(np.array_equal(a, b) for a, b in zip(replaced.values(), expected, strict=True))
    ]
    assert len(found) == 1
    assert found[0].startswith("splits the product as (head; feature; query, key, value)")
