"""Every optimizer of the table: its defaults, what it refuses, its state as plain data and back.

Their numbers are held against NumPy's and PyTorch's in `test_parity_optimizers.py`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jax_resnet
from jax_resnet.adabound import adabound, adaboundw, amsbound, sgdbound
from jax_resnet.optimizers import (
    BOUNDED,
    OPTIMIZERS,
    make_optimizer,
    scale_by_amsgrad,
    state_from_dict,
    state_to_dict,
)

MOMENTS = {"count", "mu", "nu"}
# What each keeps, and so what a checkpoint of it holds.
FIELDS = {
    "adam": MOMENTS,
    "adabound": MOMENTS,
    "amsbound": MOMENTS | {"nu_max"},
    "adaboundw": MOMENTS,
    "amsgrad": MOMENTS | {"nu_max"},
    "adamw": MOMENTS,
    "sgdbound": {"count", "mu"},
    "sgd": {"trace"},
}
PARAMETERS = {"conv1.weight": (4, 3), "fc.bias": (7,)}


def make_params(dtype):
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in PARAMETERS.items()}


def make_grads(steps, dtype):
    """Gradients of scales 1e-6 to 10 that fade, so that a maximum of the second moment differs from it."""
    rng = np.random.default_rng(2)
    fading = 0.05 + np.exp(-np.arange(steps) / 100)
    grads = {}
    for name, shape in PARAMETERS.items():
        scales = np.logspace(-6, 1, math.prod(shape)).reshape(shape)
        noise = rng.normal(size=(steps, *shape)) + 0.3
        grads[name] = (scales * noise * fading.reshape(-1, *[1] * len(shape))).astype(dtype)
    return grads


def jitted_step(name, **kwargs):
    """One update as the training step makes it: the optimizer is built inside, of a traced learning rate."""

    @jax.jit
    def step(params, state, grads, lr):
        tx = make_optimizer(name, lr, base_lr=1e-2, **kwargs)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def test_table_is_complete():
    assert set(FIELDS) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_converges_compiles_once_and_keeps_its_state_structure(name):
    target = {"a": jnp.array([1.0, -1.0]), "b": jnp.array([[0.5]])}
    params = {"a": jnp.array([-1.0, 3.0]), "b": jnp.array([[0.0]])}
    traces = 0

    @jax.jit
    def step(params, state, lr):
        nonlocal traces
        traces += 1
        tx = make_optimizer(name, lr, base_lr=0.2, weight_decay=0.0)
        grads = jax.tree.map(lambda p, q: 2 * (p - q), params, target)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = make_optimizer(name, 0.2).init(params)
    structure: Any = jax.tree.structure(state)
    types = jax.tree.map(jnp.result_type, state)
    for t in range(300):
        params, state = step(params, state, 0.2 * (1 - t / 300))
    assert traces == 1
    assert jax.tree.structure(state) == structure
    assert jax.tree.map(jnp.result_type, state) == types
    for key in target:
        np.testing.assert_allclose(params[key], target[key], atol=1e-2, err_msg=key)


# --- PyTorch ------------------------------------------------------------------------------------------------

TORCH: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}


def test_default_weight_decay_is_torchs():
    for name, (make, arguments) in TORCH.items():
        params = {"w": torch.nn.Parameter(torch.ones(1))}
        decay = make(params.values(), lr=0.1, **arguments).defaults["weight_decay"]
        jax_params = {"w": jnp.ones(1)}
        by_default, given = (make_optimizer(name, 0.1, **kw) for kw in ({}, {"weight_decay": decay}))
        steps = [tx.update(jax_params, tx.init(jax_params), jax_params)[0]["w"] for tx in (by_default, given)]
        np.testing.assert_array_equal(steps[0], steps[1], err_msg=name)


@pytest.mark.parametrize("make", [adabound, amsbound, adaboundw, sgdbound])
def test_bounded_optimizers_get_every_argument(make):
    params, grads = make_params(np.float32), make_grads(1, np.float32)
    grads = {key: g[0] for key, g in grads.items()}
    step_sizes = {} if make is sgdbound else {"b2": 0.999, "eps": 1e-8}
    default: dict[str, Any] = {"final_lr": 0.1, "base_lr": 1e-3, "gamma": 1e-3, "b1": 0.9, **step_sizes}
    given: dict[str, Any] = {"final_lr": 0.02, "base_lr": 2e-3, "gamma": 0.5, "b1": 0.8, "weight_decay": 0.1}
    given |= {"b2": 0.99, "eps": 1e-3} if step_sizes else {}

    def update(tx):
        return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)

    expected, updates = update(make(1e-3, **given)), update(make_optimizer(make.__name__, 1e-3, **given))
    for key in params:
        np.testing.assert_array_equal(updates[key], expected[key])
    for argument, value in default.items():
        changed = update(make_optimizer(make.__name__, 1e-3, **{**given, argument: value}))
        assert any((changed[key] != expected[key]).any() for key in params), f"{argument} has no effect"


def test_amsgrad_keeps_float32_moments_of_bfloat16():
    params = jnp.ones(3, jnp.bfloat16)
    tx = scale_by_amsgrad()
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    assert updates.dtype == jnp.bfloat16
    assert {m.dtype for m in (state.mu, state.nu, state.nu_max)} == {jnp.dtype(jnp.float32)}


def test_the_optimizers_that_optax_has_not_are_exported():
    assert {*BOUNDED, "amsgrad", "scale_by_amsgrad"} <= set(vars(jax_resnet))
    assert jax_resnet.scale_by_amsgrad is scale_by_amsgrad
    params, grads = make_params(np.float32), {key: g[0] for key, g in make_grads(1, np.float32).items()}
    options: dict[str, Any] = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1}
    exported, table = jax_resnet.amsgrad(0.1, **options), make_optimizer("amsgrad", 0.1, **options)
    actual, expected = (tx.update(grads, tx.init(params), params)[0] for tx in (exported, table))
    for key in params:
        np.testing.assert_array_equal(actual[key], expected[key])


def test_unknown_name_is_refused_with_the_names_known():
    with pytest.raises(ValueError, match=r"unknown optimizer 'adm'; choose one of adam, .*sgd$"):
        make_optimizer("adm", 1e-3)


@pytest.mark.parametrize("name", BOUNDED)
def test_bounded_optimizers_need_base_lr_under_a_traced_rate(name):
    with pytest.raises(ValueError, match="base_lr is required"):
        jax.jit(lambda lr: make_optimizer(name, lr).init({"w": jnp.ones(1)}))(1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "bad", [{"b1": 1.0}, {"b2": -0.1}, {"eps": -1.0}, {"momentum": -0.9}, {"weight_decay": math.nan}]
)
def test_bad_argument_is_named(name, bad):
    ((argument, value),) = bad.items()
    with pytest.raises(ValueError, match=rf"^{argument} must be .*, got {value}$"):
        make_optimizer(name, 1e-3, **bad)


# --- the state as plain data --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_a_flat_dict_and_continues_bit_for_bit(name):
    params, grads = make_params(np.float32), make_grads(6, np.float32)
    step = jitted_step(name, weight_decay=1e-3)
    tx = make_optimizer(name, 1e-2)
    state = tx.init(params)
    for t in range(3):
        params, state = step(params, state, {key: g[t] for key, g in grads.items()}, 1e-2)

    saved = jax.tree.map(np.asarray, state_to_dict(state))
    assert set(saved) == FIELDS[name]
    assert all(
        type(value) is dict and set(value) == set(PARAMETERS)
        for key, value in saved.items()
        if key != "count"
    )

    restored = state_from_dict(jax.eval_shape(tx.init, params), saved)
    structure: Any = jax.tree.structure(restored)
    assert structure == jax.tree.structure(state)
    resumed = params
    for t in range(3, 6):
        now = {key: g[t] for key, g in grads.items()}
        params, state = step(params, state, now, 1e-3)
        resumed, restored = step(resumed, restored, now, 1e-3)
    for actual, expected in zip(
        jax.tree.leaves((resumed, restored)), jax.tree.leaves((params, state)), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


def test_restored_state_has_the_templates_types_and_its_own_memory():
    tx = make_optimizer("amsgrad", 1e-3)
    template = tx.init(make_params(np.float32))
    saved = jax.tree.map(np.float16, state_to_dict(template)) | {"count": 7}
    memory = np.zeros(64, np.float32)
    ours = memory[-memory.ctypes.data % 64 // 4 :][:7]  # aligned: JAX would rather alias it than copy
    saved["nu"]["fc.bias"] = ours
    restored = state_from_dict(template, saved)
    ours[:] = 5
    fields = state_to_dict(restored)
    assert fields["count"] == 7
    assert jax.tree.map(jnp.result_type, restored) == jax.tree.map(jnp.result_type, template)
    np.testing.assert_array_equal(fields["nu"]["fc.bias"], 0)


def test_state_that_does_not_fit_is_refused_with_every_difference_named():
    template = make_optimizer("adam", 1e-3).init(make_params(np.float32))
    other = make_optimizer("amsgrad", 1e-3).init({"conv1.weight": np.zeros((4, 2)), "head.bias": np.zeros(7)})
    saved = state_to_dict(other)
    del saved["count"]
    with pytest.raises(ValueError, match="does not fit") as error:
        state_from_dict(template, saved)
    message = str(error.value)
    for part in (
        "count is missing",
        "mu.fc.bias is missing",
        "nu.fc.bias is missing",
        "nu.head.bias is unexpected",
        "nu_max.conv1.weight is unexpected",
        "mu.conv1.weight has shape (4, 2), not (4, 3)",
    ):
        assert part in message, message
    assert "\n" not in message


def test_two_states_of_one_name_have_their_positions():
    """A chain in which two count, a wrapper whose state lies inside of another, and a state of one array."""
    params = make_params(np.float32)
    scheduled = optax.adam(optax.constant_schedule(1e-3)).init(params)
    saved = jax.tree.map(np.asarray, state_to_dict(scheduled))
    assert saved.keys() == {"0", "1"}
    assert saved["0"].keys() == MOMENTS
    assert saved["1"].keys() == {"count"}
    wrapped = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3).init(params)
    assert state_to_dict(wrapped)["inner_state"].keys() == MOMENTS
    alone = optax.GradientTransformation(lambda params: jnp.ones(3), lambda g, state, params=None: (g, state))
    assert state_to_dict(alone.init(params)).keys() == {"state"}
    for state in (scheduled, wrapped, alone.init(params), optax.sgd(0.1).init(params)):
        restored = state_from_dict(state, jax.tree.map(np.asarray, state_to_dict(state)))
        structure: Any = jax.tree.structure(restored)
        assert structure == jax.tree.structure(state)
        for actual, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(actual, expected)
