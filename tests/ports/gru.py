"""A GRU cell applied step by step from a given state, in plain JAX."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import torch
from jax import lax
from torch import nn

from tests.ports.case import Case, Port, arrays_of, fault, nested, normal, seeded

INPUTS, HIDDEN, STEPS = 4, 6, 4


class Reference(nn.Module):
    """The gates of nn.GRUCell as modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(INPUTS, 3 * HIDDEN)
        self.h = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.reset = nn.Sigmoid()
        self.update = nn.Sigmoid()
        self.new = nn.Tanh()
        self.fc = nn.Linear(HIDDEN, 2)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        for time in range(x.shape[1]):
            x_reset, x_update, x_new = self.x(x[:, time]).chunk(3, -1)
            h_reset, h_update, h_new = self.h(h).chunk(3, -1)
            update = self.update(x_update + h_update)
            new = self.new(x_new + self.reset(x_reset + h_reset) * h_new)
            h = (1 - update) * new + update * h
        return self.fc(h)


Tree = Mapping[str, Mapping[str, jax.Array]]


def gru(fault: str, p: Tree, x: jax.Array, h: jax.Array) -> jax.Array:
    weight, bias = p["h"]["weight"], p["h"]["bias"]
    for time in range(x.shape[1]):
        from_x = x[:, time] @ p["x"]["weight"].T + p["x"]["bias"]
        from_h = h @ weight.T + bias
        if fault == "gate-order":
            x_update, x_reset, x_new = jnp.split(from_x, 3, -1)  # fault: gate-order
            h_update, h_reset, h_new = jnp.split(from_h, 3, -1)
        else:
            x_reset, x_update, x_new = jnp.split(from_x, 3, -1)
            h_reset, h_update, h_new = jnp.split(from_h, 3, -1)
        reset, update = jax.nn.sigmoid(x_reset + h_reset), jax.nn.sigmoid(x_update + h_update)
        if fault == "stop-gradient":
            reset = lax.stop_gradient(reset)  # fault: stop-gradient
        if fault == "reset-gate-placement":
            h_new = (reset * h) @ weight[-HIDDEN:].T + bias[-HIDDEN:]  # fault: reset-gate-placement
            new = jnp.tanh(x_new + h_new)
        else:
            new = jnp.tanh(x_new + reset * h_new)
        if fault == "update-gate-convention":
            h = update * new + (1 - update) * h  # fault: update-gate-convention
        else:
            h = new + update * (h - new)
    return h @ p["fc"]["weight"].T + p["fc"]["bias"]


def build(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    inputs = {"x": normal(seed, (3, STEPS, INPUTS), dtype), "h": normal(seed + 100, (3, HIDDEN), dtype)}
    model = functools.partial(gru, fault)
    return Case("jax", reference, model, inputs, inputs, dict, nested(arrays_of(reference)))


JAX = Port("gru-jax", build)
PORTS = (JAX,)
FAULTS = (
    fault(JAX, "gate-order", "update", accept=("reset",)),
    fault(JAX, "stop-gradient", "reset", "input gradient", accept=("mul",)),
    fault(JAX, "reset-gate-placement", "new", accept=("mul", "add")),
    fault(JAX, "update-gate-convention", "add", accept=("mul",)),
)
