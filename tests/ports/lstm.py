"""An LSTM over a sequence: by scan and unrolled in plain JAX, and with nnx.RNN, whose cell has one bias."""

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

from tests.ports.case import Arrays, Case, Port, arrays_of, fault, load_nnx, nested, normal, seeded

INPUTS, HIDDEN = 5, 6


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(INPUTS, HIDDEN, batch_first=True)
        self.fc = nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(x)
        return self.fc(states)


Tree = Mapping[str, Mapping[str, jax.Array]]
Carry = tuple[jax.Array, jax.Array]


def step(fault: str, p: Mapping[str, jax.Array], carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
    h, c = carry
    if fault == "stop-gradient":
        h = lax.stop_gradient(h)  # fault: stop-gradient
    gates = x @ p["weight_ih_l0"].T + p["bias_ih_l0"] + h @ p["weight_hh_l0"].T
    if fault != "missing-bias":
        gates = gates + p["bias_hh_l0"]
    if fault == "gate-order":
        i, g, f, o = jnp.split(gates, 4, axis=-1)  # fault: gate-order
    else:
        i, f, g, o = jnp.split(gates, 4, axis=-1)
    if fault == "hard-sigmoid":
        c = jax.nn.hard_sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)  # fault: hard-sigmoid
    else:
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)  # fault: missing-bias
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def scanned(fault: str, p: Tree, x: jax.Array) -> jax.Array:
    zero = jnp.zeros((len(x), HIDDEN), x.dtype)
    cell = functools.partial(step, fault, p["lstm"])
    if fault == "sequence-reversed":
        _, states = lax.scan(cell, (zero, zero), x.swapaxes(0, 1), reverse=True)  # fault: sequence-reversed
    else:
        _, states = lax.scan(cell, (zero, zero), x.swapaxes(0, 1))
    return states.swapaxes(0, 1) @ p["fc"]["weight"].T + p["fc"]["bias"]


def unrolled(fault: str, p: Tree, x: jax.Array) -> jax.Array:
    h = c = jnp.zeros((len(x), HIDDEN), x.dtype)
    states = []
    for time in range(x.shape[1]):
        (h, c), _ = step(fault, p["lstm"], (h, c), x[:, time])
        states.append(h)
    return jnp.stack(states, 1) @ p["fc"]["weight"].T + p["fc"]["bias"]


def build_jax(seed: int, fault: str = "", dtype: str = "float32", *, scan: bool = True) -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    sequence = normal(seed, (3, 5, INPUTS), dtype)
    model = functools.partial(scanned if scan else unrolled, fault)
    return Case("jax", reference, model, sequence, sequence, dict, nested(arrays_of(reference)))


class NNX(nnx.Module):
    def __init__(self, dtype: str, rngs: nnx.Rngs) -> None:
        # The first state has the type of the parameters, which `load_nnx` cannot change.
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(INPUTS, HIDDEN, param_dtype=jnp.dtype(dtype), rngs=rngs))
        self.fc = nnx.Linear(HIDDEN, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(self.lstm(x))


def convert_nnx(arrays: Arrays) -> dict[str, np.ndarray]:
    """Kernels transposed; the sum of both biases."""
    return {
        "lstm.cell.dense_i.kernel": arrays["lstm.weight_ih_l0"].T,
        "lstm.cell.dense_h.kernel": arrays["lstm.weight_hh_l0"].T,
        "lstm.cell.dense_h.bias": arrays["lstm.bias_ih_l0"] + arrays["lstm.bias_hh_l0"],
        "fc.kernel": arrays["fc.weight"].T,
        "fc.bias": arrays["fc.bias"],
    }


def build_nnx(seed: int, fault: str = "", dtype: str = "float32") -> Case:
    reference = seeded(Reference, seed, dtype, train=False)
    sequence = normal(seed, (3, 5, INPUTS), dtype)
    model = NNX(dtype, nnx.Rngs(seed))
    load_nnx(model, convert_nnx(arrays_of(reference)))
    model.eval()
    return Case("nnx", reference, model, sequence, sequence, convert_nnx, same_gradients=False)


SCAN = Port("lstm-jax-scan", build_jax)
UNROLLED = Port("lstm-jax-unrolled", functools.partial(build_jax, scan=False))
PORTS = (SCAN, UNROLLED, Port("lstm-nnx-one-bias", build_nnx))
FAULTS = (
    fault(SCAN, "stop-gradient", "lstm", "input gradient"),
    fault(SCAN, "gate-order", "lstm"),
    fault(SCAN, "sequence-reversed", "lstm"),
    fault(UNROLLED, "missing-bias", "lstm"),
    fault(UNROLLED, "hard-sigmoid", "lstm", cause="activation"),
)
