"""AdaBound, AMSBound and AdaBoundW: against the published algorithm, and as optax tests its own."""

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_resnet.adabound import (
    adabound,
    adabound_bounds,
    adaboundw,
    amsbound,
    scale_by_adabound,
    scale_by_amsbound,
    scale_by_sgdbound,
    sgdbound,
)
from jax_resnet.optimizers import amsgrad, scale_by_amsgrad
from tests.helpers.comparing import assert_close
from tests.helpers.published_adabound import FINAL_LR, PEAK, SHAPES, STEPS, problem, published, warmup_cosine

OPTIMIZERS = [adabound, amsbound, adaboundw]
TRANSFORMATIONS = [scale_by_adabound, scale_by_amsbound]

FLOAT64 = 1e-12  # of a tensor's largest magnitude: 2,000 steps that each round a few times
FLOAT32_STEP = 1e-6  # of each coordinate: one step's dozen roundings of 6e-8


def run(tx, params, grads):
    """The parameters and the state after all gradients, by one scan."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g)[0])(params, grads)


def moments(state):
    """The state of AdaBound or AMSBound among those of a chain."""
    (found,) = [s for s in state if hasattr(s, "mu")]
    return found


@pytest.mark.parametrize(
    ("optimizer", "weight_decay", "as_published"),
    [
        (adabound, 0.0, {}),
        (adabound, 5e-4, {"l2": 5e-4}),
        (amsbound, 0.0, {}),
        (amsbound, 5e-4, {"l2": 5e-4}),
        (adaboundw, 0.0, {}),
        (adaboundw, 0.05, {"decoupled": 0.05}),
    ],
)
def test_equals_the_published_algorithm(optimizer, weight_decay, as_published):
    params, grads = problem()
    lrs = warmup_cosine()
    assert lrs[0] == 0
    with jax.enable_x64(True):
        schedule = jnp.asarray(lrs)
        tx = optimizer(lambda count: schedule[count], FINAL_LR, base_lr=PEAK, weight_decay=weight_decay)
        final, state = run(tx, params, grads)
    state = moments(state)
    assert state.count == STEPS
    total = np.zeros(3, int)
    for name in SHAPES:
        expected, hits = published(
            params[name], grads[name], lrs, PEAK, amsbound=optimizer is amsbound, **as_published
        )
        total += hits
        assert_close(name, final[name], expected.pop("params"), FLOAT64)
        for moment, values in expected.items():
            assert_close(f"{moment}.{name}", getattr(state, moment)[name], values, FLOAT64)
        if optimizer is amsbound:
            assert (expected["nu_max"] > 1.5 * expected["nu"]).mean() > 0.5, "the maximum hardly mattered"
    assert (total > 0.1 * total.sum()).all(), f"lower, inside, upper: {total}"


def test_unscaled_decay_of_the_authors_adaboundw_is_ours_divided_by_a_constant_rate():
    params, grads = problem()
    with jax.enable_x64(True):
        final, _ = run(adaboundw(PEAK, weight_decay=2e-4 / PEAK), params, grads)
    for name in SHAPES:
        lrs = np.full(STEPS, PEAK)
        expected, _ = published(params[name], grads[name], lrs, PEAK, amsbound=False, unscaled=2e-4)
        assert_close(name, final[name], expected["params"], FLOAT64)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_first_float32_step_is_right_in_every_coordinate(optimizer):
    _, grads = problem()
    for name in SHAPES:
        expected, _ = published(
            np.zeros(SHAPES[name]), grads[name][:1], [PEAK], PEAK, amsbound=optimizer is amsbound
        )
        zero = jnp.zeros(SHAPES[name], jnp.float32)
        tx = optimizer(PEAK)
        step, _ = jax.jit(tx.update)(jnp.float32(grads[name][0]), tx.init(zero), zero)
        np.testing.assert_allclose(step, expected["params"], rtol=FLOAT32_STEP, err_msg=name)


def test_bounds_in_figures():
    lower, upper = adabound_bounds(np.array([1, 1000, 10**9]), ratio=100.0, gamma=1e-3)
    np.testing.assert_allclose(lower, [100 / 1001, 50, 100], rtol=1e-5)
    np.testing.assert_allclose(upper, [100_100, 200, 100], rtol=1e-5)


@given(st.integers(1, 10**7), st.floats(1e-3, 1e4), st.floats(1e-5, 1e2))
def test_bounds_enclose_the_ratio_and_close_on_it(count, ratio, gamma):
    lower, upper = adabound_bounds(np.array([count, 2 * count]), ratio, gamma)
    assert 0 < lower[0] <= lower[1] <= np.float32(ratio) <= upper[1] <= upper[0] < np.inf


# --- the learning rate and the bounds -----------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [1e-7, 1e3], ids=["upper", "lower"])
def test_schedule_moves_the_bounds(gradient):
    """A clipped coordinate moves by bound * mu, where the bound closes on final_lr * lr / base_lr."""
    lrs = [0.0, 2e-3, 1e-3, 1e-4]
    schedule = jnp.asarray(lrs)
    tx = adabound(lambda count: schedule[count], final_lr=0.5, base_lr=2e-3, gamma=0.01)
    params = jnp.zeros(())
    state = tx.init(params)
    for t, lr in enumerate(lrs, start=1):
        updates, state = tx.update(jnp.asarray(gradient), state, params)
        closing = 1 + 1 / (0.01 * t) if gradient < 1 else 1 - 1 / (0.01 * t + 1)
        expected = -(0.5 * lr / 2e-3) * closing * moments(state).mu
        np.testing.assert_allclose(updates, expected, rtol=1e-5, err_msg=f"step {t}")


def test_base_lr_defaults_to_a_number_learning_rate():
    params, grads = problem()
    with jax.enable_x64(True):
        implicit, _ = run(adabound(PEAK), params, grads)
        explicit, _ = run(adabound(PEAK, base_lr=PEAK), params, grads)
        other, _ = run(adabound(PEAK, base_lr=2 * PEAK), params, grads)
    for name in SHAPES:
        np.testing.assert_array_equal(implicit[name], explicit[name])
        assert (implicit[name] != other[name]).any(), "base_lr makes no difference"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("learning_rate", [optax.constant_schedule(1e-3), jnp.float32(1e-3)])
def test_learning_rate_that_is_no_number_requires_base_lr(optimizer, learning_rate):
    with pytest.raises(ValueError, match="base_lr is required") as error:
        optimizer(learning_rate)
    assert "\n" not in str(error.value)
    optimizer(learning_rate, base_lr=1e-3)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, sgdbound])
@pytest.mark.parametrize("number", [np.float32, np.float64, np.asarray])
def test_learning_rate_may_be_a_number_of_numpys(optimizer, number):
    params, grads = jnp.ones(3), jnp.array([0.1, -1.0, 10.0])
    given, expected = optimizer(number(2e-3)), optimizer(2e-3)
    actual = given.update(grads, given.init(params), params)[0]
    np.testing.assert_allclose(
        actual, expected.update(grads, expected.init(params), params)[0], rtol=FLOAT32_STEP
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_traced_and_injected_learning_rates_require_base_lr(optimizer):
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="base_lr is required"):
        optimizer(jnp.asarray(1e-3))
    with pytest.raises(ValueError, match="base_lr is required"):
        jax.jit(lambda lr: optimizer(lr).init(params))(1e-3)
    with pytest.raises(ValueError, match="base_lr is required"):
        optax.inject_hyperparams(optimizer)(1e-3).init(params)


# --- arguments ----------------------------------------------------------------------------------------------

BAD = {
    "learning_rate": [-1e-3, math.inf, math.nan, np.float32(-1)],
    "final_lr": [0.0, -0.1, math.nan, np.float32(math.inf)],
    "base_lr": [0.0, -1e-3, np.asarray(0)],
    "gamma": [0, -1e-3, math.nan, np.int64(0)],
    "b1": [1.0, -0.1, math.nan, np.asarray(1.5)],
    "b2": [1, -0.1, np.float32(1)],
    "eps": [-1e-8, math.nan, np.float16(-1)],
    "eps_root": [-1e-8, math.nan, np.float32(-1)],
    "weight_decay": [-1e-4, np.float32(math.nan)],
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_argument_is_named_in_one_line(optimizer, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value}$"):
        optimizer(**{"learning_rate": 1e-3, "base_lr": 1e-3, name: value})


def test_zero_learning_rate_without_base_lr_is_refused():
    with pytest.raises(ValueError, match=r"^base_lr must be .*learning_rate.* got 0"):
        adabound(0.0)


@pytest.mark.parametrize("scale_by", TRANSFORMATIONS)
@pytest.mark.parametrize(
    ("name", "value"), [("ratio", 0.0), ("gamma", 0.0), ("b1", 1.0), ("b2", -1), ("eps", -1.0)]
)
def test_bad_argument_of_a_transformation_is_named(scale_by, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value}$"):
        scale_by(**{name: value})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_edges_of_the_ranges_work(optimizer):
    tx = optimizer(1e-3, b1=0.0, b2=0.0, eps=0.0)
    params = jnp.ones(2)
    updates, _ = tx.update(jnp.array([0.0, 1.0]), tx.init(params), params)
    assert updates[0] == 0
    np.testing.assert_allclose(updates[1], -1e-3, rtol=FLOAT32_STEP)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_hyperparameter_may_be_traced(optimizer):
    params = {"w": jnp.linspace(-1, 1, 5)}
    values = {"learning_rate": 1e-3, "final_lr": 0.2, "base_lr": 2e-3, "b1": 0.8, "b2": 0.99, "gamma": 0.01}
    values |= {"eps": 1e-6, "eps_root": 1e-3, "weight_decay": 0.1}

    def step(values):
        tx = optimizer(**values)
        return tx.update(params, tx.init(params), params)[0]

    np.testing.assert_allclose(jax.jit(step)(values)["w"], step(values)["w"], rtol=1e-5)


# --- as optax tests its own ---------------------------------------------------------------------------------


def parabola(dtype=jnp.float32):
    target = jnp.array([1.0, -1.0, 1.0], dtype)
    return jnp.array([-1.0, 10.0, 1.0], dtype), target, lambda x: jnp.sum((x - target) ** 2)


def rosenbrock():
    return jnp.zeros(2), jnp.ones(2), lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def descend(tx, start, loss, steps):
    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(loss)(x), state, x)
        return (optax.apply_updates(x, updates), state), None

    return jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), length=steps)[0][0])(start)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("target", [parabola, rosenbrock])
def test_converges(optimizer, target):
    start, minimum, loss = target()
    end = descend(optimizer(1e-2, final_lr=1e-2), start, loss, 10_000)
    np.testing.assert_allclose(end, minimum, atol=1e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_second_call_does_not_recompile(optimizer):
    start, _, loss = parabola()
    traces = 0

    @jax.jit
    def step(x, state, lr):
        nonlocal traces
        traces += 1
        tx = optimizer(lr, base_lr=1e-2)
        updates, state = tx.update(jax.grad(loss)(x), state, x)
        return optax.apply_updates(x, updates), state

    x, state = start, optimizer(1e-2).init(start)
    for lr in (1e-2, 5e-3, 0.0):
        x, state = step(x, state, lr)
    assert traces == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_can_be_donated(optimizer):
    tx = optimizer(1e-3)
    params = {"w": jnp.ones(3)}
    grads = {"w": jnp.ones(3)}
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(grads, tx.init(params), params)
    _, state = update(grads, state, params)
    assert moments(state).count == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_under_chain(optimizer):
    params = {"w": jnp.linspace(-1, 1, 5)}
    grads = {"w": jnp.linspace(-30, 20, 5)}
    chained = optax.chain(optax.clip_by_global_norm(1.0), optimizer(1e-3), optax.scale(0.5))
    updates, _ = chained.update(grads, chained.init(params), params)
    alone = optimizer(1e-3)
    clipped = {"w": grads["w"] / jnp.linalg.norm(grads["w"])}
    expected, _ = alone.update(clipped, alone.init(params), params)
    np.testing.assert_allclose(updates["w"], 0.5 * expected["w"], rtol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_under_inject_hyperparams(optimizer):
    """An injected schedule gives what the schedule gives, and a rate set by hand moves step and bounds."""
    params, grads = problem()
    lrs = warmup_cosine()
    with jax.enable_x64(True):
        values = jnp.asarray(lrs)
        kwargs = {"base_lr": PEAK, "weight_decay": 1e-3}
        injected = optax.inject_hyperparams(optimizer)(lambda count: values[count], **kwargs)
        final, state = run(injected, params, grads)
        expected, _ = run(optimizer(lambda count: values[count], **kwargs), params, grads)
        for name in SHAPES:
            assert_close(name, final[name], expected[name], FLOAT64)

        by_hand = optax.inject_hyperparams(optimizer)(PEAK, base_lr=PEAK)
        state = by_hand.init(params)
        first = {name: g[0] for name, g in grads.items()}
        update = jax.jit(by_hand.update)
        full, _ = update(first, state, params)
        state.hyperparams["learning_rate"] = jnp.asarray(PEAK / 8)
        eighth, _ = update(first, state, params)
        for name in SHAPES:
            assert_close(name, 8 * eighth[name], full[name], FLOAT64)


@pytest.mark.parametrize("partition", [optax.partition, optax.multi_transform])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_under_partition(optimizer, partition):
    params = {"backbone": jnp.ones(3), "head": jnp.ones(2), "bias": jnp.ones(1)}
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    labels = {"backbone": "frozen", "head": "bound", "bias": "sgd"}
    tx = partition({"frozen": optax.set_to_zero(), "bound": optimizer(1e-3), "sgd": optax.sgd(1.0)}, labels)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    alone = optimizer(1e-3)
    expected, _ = alone.update(grads["head"], alone.init(params["head"]), params["head"])
    np.testing.assert_array_equal(updates["backbone"], 0)
    np.testing.assert_allclose(updates["head"], expected, rtol=FLOAT32_STEP)
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=FLOAT32_STEP)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_scan_equals_a_loop(optimizer):
    params, grads = problem()
    grads = {name: g[:20] for name, g in grads.items()}
    tx = optimizer(PEAK, weight_decay=1e-3)
    with jax.enable_x64(True):
        scanned, _ = run(tx, params, grads)
        looped, state = params, tx.init(params)
        for t in range(20):
            updates, state = tx.update({name: g[t] for name, g in grads.items()}, state, looped)
            looped = optax.apply_updates(looped, updates)
    for name in SHAPES:
        assert_close(name, scanned[name], looped[name], FLOAT64)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bfloat16_parameters(optimizer):
    """Float32 moments, bfloat16 updates, one compilation, and a parabola's minimum to bfloat16's digits."""
    start, minimum, loss = parabola(jnp.bfloat16)
    tx = optimizer(1e-2)
    traces = 0

    @jax.jit
    def update(x, state):
        nonlocal traces
        traces += 1
        return tx.update(jax.grad(loss)(x), state, x)

    state = tx.init(start)
    for _ in range(3):
        updates, state = update(start, state)
        assert updates.dtype == jnp.bfloat16
    assert traces == 1
    dtypes = {name: value.dtype for name, value in moments(state)._asdict().items()}
    assert dtypes.pop("count") == jnp.int32
    assert set(dtypes.values()) == {jnp.dtype(jnp.float32)}, dtypes
    gradient = np.float32(jax.grad(loss)(start))
    np.testing.assert_allclose(moments(state).nu, (1 - 0.999**3) * gradient**2, rtol=1e-4)
    end = descend(tx, start, loss, 2000)
    np.testing.assert_allclose(np.float32(end), np.float32(minimum), atol=2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_strict_promotion_of_types_and_ranks(optimizer, dtype):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        params = {"w": jnp.ones((2, 3), dtype), "b": jnp.ones(3, dtype)}
        tx = optimizer(1e-3, weight_decay=1e-3)
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert {u.dtype for u in updates.values()} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_signature_is_the_documented_one(optimizer):
    parameters = inspect.signature(optimizer).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert list(parameters)[:2] == ["learning_rate", "final_lr"]
    assert parameters["final_lr"].default == 0.1
    assert defaults == {
        "base_lr": None,
        "b1": 0.9,
        "b2": 0.999,
        "gamma": 1e-3,
        "eps": 1e-8,
        "eps_root": 0.0,
        "weight_decay": 0.0,
        "mask": None,
        "mu_dtype": None,
    }


# --- what optax's own optimizers offer ----------------------------------------------------------------------

ALL: list[Any] = [*OPTIMIZERS, sgdbound, amsgrad]
SCALE_BY = [*TRANSFORMATIONS, scale_by_amsgrad]


def first_update(tx, params, grads):
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)


@pytest.mark.parametrize("optimizer", ALL)
@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda params: {"w": True, "b": False}])
def test_mask_says_which_parameters_decay(optimizer, mask):
    params = {"w": jnp.array([3.0, -2.0]), "b": jnp.array([1.0, 5.0])}
    grads = {"w": jnp.array([0.1, 0.2]), "b": jnp.array([-0.3, 1e-3])}
    options = {} if optimizer is sgdbound else {"eps": 0.1}  # so that the size of a gradient matters
    masked = first_update(optimizer(1e-3, weight_decay=0.5, mask=mask, **options), params, grads)
    decayed = first_update(optimizer(1e-3, weight_decay=0.5, **options), params, grads)
    plain = first_update(optimizer(1e-3, **options), params, grads)
    np.testing.assert_array_equal(masked["w"], decayed["w"])
    np.testing.assert_array_equal(masked["b"], plain["b"])
    assert (decayed["w"] != plain["w"]).all()
    assert (decayed["b"] != plain["b"]).any()


@pytest.mark.parametrize("scale_by", SCALE_BY)
def test_an_update_can_be_differentiated_where_a_gradient_is_zero(scale_by):
    def end(grads, eps_root):
        tx = scale_by(eps_root=eps_root)
        return tx.update(grads, tx.init(grads))[0].sum()

    grads = jnp.array([0.0, 1e-3])
    derivative = jax.jit(jax.grad(end), static_argnums=1)
    assert np.isnan(derivative(grads, 0.0)).any()
    assert np.isfinite(derivative(grads, 1e-8)).all()


@pytest.mark.parametrize("scale_by", TRANSFORMATIONS)
def test_eps_root_stands_under_the_root(scale_by):
    with jax.enable_x64(True):
        grads = jnp.array([0.0, 1e-3, -0.3])
        tx = scale_by(ratio=1e3, b1=0.5, b2=0.75, eps=0.01, eps_root=0.0025, gamma=1e-3)
        actual, state = tx.update(grads, tx.init(grads))
    g = np.array(grads)
    lower, upper = 1e3 / 1001, 1e3 * 1001
    size = np.clip(0.5 / 0.5 / (np.sqrt(0.25 * g**2 + 0.0025) + 0.01), lower, upper)
    assert_close("update", actual, size * 0.5 * g, FLOAT64)
    assert_close("nu", state.nu, 0.25 * g**2, FLOAT64)


def test_eps_root_of_amsgrad_is_adams():
    """At the first step AMSGrad is Adam; optax corrects the moment before it adds eps_root."""
    with jax.enable_x64(True):
        grads = jnp.array([0.0, 1e-3, -0.3])
        ours, adam = (make(0.5, 0.75, 0.01, 0.0025) for make in (scale_by_amsgrad, optax.scale_by_adam))
        actual, expected = (tx.update(grads, tx.init(grads))[0] for tx in (ours, adam))
    assert_close("update", actual, expected, FLOAT64)


@pytest.mark.parametrize("scale_by", [*SCALE_BY, scale_by_sgdbound])
def test_mu_dtype_is_how_mu_is_stored_and_nothing_else(scale_by):
    params, grads = jnp.ones(5), jnp.linspace(-1, 1, 5) ** 3
    narrow, wide = scale_by(mu_dtype="bfloat16"), scale_by()
    state = narrow.init(params)
    before = jax.tree.map(jnp.result_type, state._asdict())
    assert before["mu"] == jnp.bfloat16
    assert {before[name] for name in before.keys() & {"nu", "nu_max"}} <= {jnp.dtype(jnp.float32)}
    first, state = jax.jit(narrow.update)(grads, state)
    expected, other = jax.jit(wide.update)(grads, wide.init(params))
    np.testing.assert_array_equal(first, expected)  # of the average before it is rounded
    np.testing.assert_array_equal(state.mu, other.mu.astype(jnp.bfloat16))
    assert jax.tree.map(jnp.result_type, state._asdict()) == before
    second, state = jax.jit(narrow.update)(grads, state)
    expected, _ = jax.jit(wide.update)(grads, other)
    assert (second != expected).any()
    np.testing.assert_allclose(second, expected, rtol=2**-8)
    assert jax.tree.map(jnp.result_type, state._asdict()) == before


@pytest.mark.parametrize("scale_by", [*SCALE_BY, scale_by_sgdbound])
def test_mu_dtype_that_holds_no_fractions_is_refused(scale_by):
    with pytest.raises(ValueError, match=r"^mu_dtype must be a floating-point type, got int8$"):
        scale_by(mu_dtype=jnp.int8)


@pytest.mark.parametrize("optimizer", ALL)
def test_parameters_that_are_no_real_numbers_are_refused(optimizer):
    tx = optimizer(1e-3)
    remedy = r"complex64; use optax\.contrib\.split_real_and_imaginary"
    for bad, reported in {jnp.complex64: remedy, jnp.int32: "int32"}.items():
        with pytest.raises(ValueError, match=rf"^parameters must be real .*, layer\.w is {reported}"):
            tx.init({"layer": {"w": jnp.ones(2, bad)}})
        with pytest.raises(ValueError, match=rf"^parameters must be real .*, a parameter is {reported}"):
            tx.init(jnp.ones(2, bad))
    params = jnp.array([1 + 2j, -3j])
    updates = first_update(optax.contrib.split_real_and_imaginary(tx), params, params)
    parts = first_update(tx, params.real, params.real), first_update(tx, params.imag, params.imag)
    np.testing.assert_array_equal(updates, parts[0] + 1j * parts[1])
