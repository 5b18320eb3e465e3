"""The optimizers of the NumPy engine: how the work is split, and what they refuse.

Their numbers are compared with JAX's and PyTorch's in `test_parity_optimizers.py`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest

import jax_resnet
import numpy_ref
from numpy_ref import OPTIMIZERS, Parameter, make_optimizer, optimizer_base
from tests.helpers.comparing import assert_close

STEPS = 300
SHAPES = {"weight": (7, 5), "bias": (5,), "kernel": (3, 3, 2, 4)}


def learning_rate(step: int) -> float:
    """Warm-up, then a cosine, that ends above 0."""
    return 1e-3 * min(1, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))


def initial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


@cache
def gradients() -> list[dict[str, np.ndarray]]:
    """One common sequence; sizes of gradients that differ by orders, and some that are 0."""
    rng = np.random.default_rng(1)
    scale = {name: 10.0 ** rng.integers(-4, 2, size=shape) for name, shape in SHAPES.items()}
    return [
        {
            name: scale[name] * rng.normal(size=shape) * (rng.random(shape) > 0.1)
            for name, shape in SHAPES.items()
        }
        for _ in range(STEPS)
    ]


def run(name: str, **options: Any) -> dict[str, np.ndarray]:
    parameters = {key: Parameter(value) for key, value in initial().items()}
    optimizer = make_optimizer(name, parameters.values(), 1e-3, **options)
    for step, grads in enumerate(gradients()):
        optimizer.zero_grad()
        for key, parameter in parameters.items():
            parameter.add_grad(grads[key])
        optimizer.lr = learning_rate(step)
        optimizer.step()
    return {key: p.value for key, p in parameters.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_blocks_parts_and_shares_change_nothing(name, monkeypatch):
    """Small blocks, gradients in two parts, the work shared by three."""
    plain = run(name, base_lr=1e-3)
    monkeypatch.setattr(optimizer_base, "BLOCK", 8)
    parameters = {key: Parameter(value) for key, value in initial().items()}
    optimizer = make_optimizer(name, parameters.values(), 1e-3, base_lr=1e-3)
    for step, grads in enumerate(gradients()):
        halves = [[grads[key] / 2 for key in SHAPES]] * 2
        optimizer.lr, norms = learning_rate(step), np.zeros(4)
        before = {key: p.value.copy() for key, p in parameters.items()}
        for share in range(3):
            optimizer.count = step
            optimizer.begin_step()
            for indices in ([2, 0], [1]):
                norms += optimizer.update_parameters(indices, halves, (share, 3))
        if step % 100 == 0:
            changes = sum(np.square(p.value - before[key]).sum() for key, p in parameters.items())
            assert_close("norms", norms[:2], [sum(np.square(g).sum() for g in grads.values()), changes], 1e-9)
    for key, parameter in parameters.items():
        np.testing.assert_array_equal(parameter.value, plain[key])


def test_frozen_parameters_stay():
    parameters = [Parameter(value) for value in initial().values()]
    parameters[0].trainable = False
    before = [p.value.copy() for p in parameters]
    for parameter in parameters:
        parameter.add_grad(np.ones_like(parameter.value))
    numpy_ref.Adam(parameters, weight_decay=0.1).step()
    np.testing.assert_array_equal(parameters[0].value, before[0])
    assert not np.array_equal(parameters[1].value, before[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_stays_float32(name):
    parameter = Parameter(np.ones((3, 2), np.float32))
    optimizer = make_optimizer(name, [parameter], 1e-3, weight_decay=0.1)
    parameter.add_grad(np.ones((3, 2), np.float32))
    optimizer.step()
    arrays = [parameter.value, parameter.grad, *(a for each in optimizer.moments.values() for a in each)]
    assert {str(array.dtype) for array in arrays} == {"float32"}


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("adam", {"b1": 1.0}),
        ("adam", {"b2": -0.1}),
        ("adamw", {"eps": -1.0}),
        ("sgd", {"momentum": math.inf}),
        ("sgd", {"weight_decay": -1.0}),
        ("adabound", {"gamma": 0.0}),
        ("adabound", {"final_lr": 0.0}),
        ("amsbound", {"base_lr": math.nan}),
    ],
)
def test_bad_argument_is_named(name, bad):
    (argument,) = bad
    with pytest.raises(ValueError, match=f"{argument} must be"):
        make_optimizer(name, [], 1e-3, **bad)


def test_bad_learning_rate_and_name_are_refused():
    with pytest.raises(ValueError, match="lr must be"):
        make_optimizer("sgd", [], -1.0)
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; choose one of adam, adabound"):
        make_optimizer("lion", [], 1e-3)


def test_the_tables_are_the_same():
    assert set(OPTIMIZERS) == set(jax_resnet.optimizers.OPTIMIZERS)
