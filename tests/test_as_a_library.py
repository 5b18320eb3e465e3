"""`jax_resnet` as used by people who know JAX, Flax and optax, but not this project's training loop.

Each test is a situation in which a library of networks or optimizers is expected to work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import jax_resnet
from tests.helpers.comparing import assert_all_close, assert_close, quick_jit, random_state
from tests.tolerances import FLOAT32_NETWORK

CLASSES = 5


def make_model(stem: str = "small", *, train: bool = False, **options: Any) -> Any:
    """One block: no more than it takes to call a network. Its weights are random numbers, its biases too."""
    options = {"rngs": nnx.Rngs(0), **options}
    model = jax_resnet.ResNet(jax_resnet.BasicBlock, (1,), CLASSES, width=2, stem=stem, **options)
    shapes = {name: value.shape for name, value in jax_resnet.state_dict(model).items()}
    jax_resnet.load_state_dict(model, random_state(shapes))
    if train:
        model.train()
    else:
        model.eval()
    return model


@cache
def model() -> Any:
    """A network in eval mode, shared: no test changes it."""
    return make_model()


@cache
def images(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, 8, 8, 3)), jnp.float32)


@cache
def logits() -> np.ndarray:
    """Logits of `images()`, from a pure function of the split state."""
    graph, state = nnx.split(model())
    return np.asarray(quick_jit(lambda state, x: nnx.merge(graph, state)(x))(state, images()))


# A network in eval mode, closed over by a transformation

APPLIED: dict[str, Callable[[jax.Array], Any]] = {
    "as it is": lambda x: model()(x),
    "jit": lambda x: jax.jit(lambda x: model()(x))(x),
    "nnx.jit": lambda x: nnx.jit(lambda model, x: model(x))(model(), x),
    "vmap": quick_jit(jax.vmap(lambda image: model()(image[None])[0])),
    "lax.map": quick_jit(lambda x: jax.lax.map(lambda image: model()(image[None])[0], x)),
    "scan": quick_jit(lambda x: jax.lax.scan(lambda carry, image: (carry, model()(image[None])[0]), 0, x)[1]),
    "cond": quick_jit(lambda x: jax.lax.cond(x[0, 0, 0, 0] < 9, lambda: model()(x), lambda: model()(2 * x))),
    "checkpoint": quick_jit(jax.checkpoint(lambda x: model()(x))),
    "nnx.view": lambda x: nnx.view(make_model(train=True), use_running_average=True)(x),
}


@pytest.mark.parametrize("how", APPLIED)
def test_a_network_in_eval_mode_under_a_transformation(how: str) -> None:
    assert_close(how, APPLIED[how](images()), logits(), FLOAT32_NETWORK)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_a_network_on_a_mesh(kind: AxisType) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
    data = PartitionSpec("data")
    x = jax.device_put(images(), NamedSharding(mesh, data))
    with jax.set_mesh(mesh):
        assert_close("jit", quick_jit(lambda x: model()(x))(x), logits(), FLOAT32_NETWORK)
        mapped = jax.shard_map(lambda x: model()(x), mesh=mesh, in_specs=data, out_specs=data)
        assert_close("shard_map", quick_jit(mapped)(x), logits(), FLOAT32_NETWORK)


def loss(x: jax.Array) -> jax.Array:
    return jnp.square(model()(x)).sum()


def test_gradients_by_the_image_in_both_modes() -> None:
    """A saliency map. Rows of the Jacobian and directional derivatives know nothing of each other."""
    x, direction = images(), images(1)
    jacobian = quick_jit(jax.jacrev(lambda x: model()(x)))(x)
    expected = np.einsum("nc,ncmhwi->mhwi", 2 * logits(), jacobian)
    assert np.abs(expected).max() > 0.1
    single = jax.vmap(jax.grad(lambda image: loss(image[None])))
    for how, gradient in {
        "jit": jax.grad(loss),
        "checkpoint": jax.grad(jax.checkpoint(loss)),
        "vmap": single,
        "lax.map": lambda x: jax.lax.map(jax.grad(lambda image: loss(image[None])), x),
    }.items():
        assert_close(how, quick_jit(gradient)(x), expected, FLOAT32_NETWORK)
    derivative = np.vdot(expected, direction)
    jvp = quick_jit(lambda x, v: jax.jvp(loss, (x,), (v,))[1])
    linearized = quick_jit(lambda x, v: jax.linearize(loss, x)[1](v))
    forward = quick_jit(lambda x, v: jax.jacfwd(lambda t: loss(x + t * v))(0.0))
    for how, function in {"jvp": jvp, "linearize": linearized, "jacfwd": forward}.items():
        assert_close(how, function(x, direction), derivative, FLOAT32_NETWORK)


@pytest.mark.parametrize(("stem", "train"), [("small", False), ("imagenet", True)])
def test_hessian_vector_products_by_the_parameters(stem: str, train: bool) -> None:
    """Forward over reverse, reverse over forward and reverse over reverse agree."""
    graph, params, rest = nnx.split(  # type: ignore[misc]
        make_model(stem, train=train), nnx.Param, ...
    )
    x = images()
    noise = np.random.default_rng(3)
    direction = jax.tree.map(lambda p: jnp.asarray(noise.normal(size=p.shape), p.dtype), params)

    def loss(params: Any) -> jax.Array:
        return jnp.square(nnx.merge(graph, params, rest, copy=True)(x)).sum()

    def dot(a: Any, b: Any) -> Any:
        return optax.tree.vdot(a, b)

    @quick_jit
    def products(params: Any, v: Any) -> Any:
        gradient, product = jax.jvp(jax.grad(loss), (params,), (v,))
        tangent, other = jax.value_and_grad(lambda p: jax.jvp(loss, (p,), (v,))[1])(params)
        third = jax.grad(lambda p: dot(jax.grad(loss)(p), v))(params)
        return tangent, dot(gradient, v), {"fr": product, "rf": other, "rr": third}

    tangent, derivative, hessian_products = products(params, direction)
    assert_close("jvp", tangent, derivative, FLOAT32_NETWORK)
    flat = {
        how: np.concatenate([np.ravel(a) for a in jax.tree.leaves(v)]) for how, v in hessian_products.items()
    }
    assert np.abs(flat["fr"]).max() > 0.1
    assert_close("reverse over forward", flat["rf"], flat["fr"], FLOAT32_NETWORK)
    assert_close("reverse over reverse", flat["rr"], flat["fr"], FLOAT32_NETWORK)


def test_a_network_that_computes_its_blocks_twice_has_no_forward_mode() -> None:
    twice = make_model(remat=True)
    x, direction = images(), images(1)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: twice(x), (x,), (direction,))

    def product(network: Any) -> Any:
        gradient = jax.grad(lambda x: jnp.square(network(x)).sum())
        return quick_jit(lambda x, v: jax.jvp(gradient, (x,), (v,)))(x, direction)

    for actual, expected in zip(product(twice), product(model()), strict=True):
        assert_close("gradient, then Hessian-vector product", actual, expected, FLOAT32_NETWORK)


def test_a_network_from_another_type_of_key() -> None:
    other, again = (make_model(rngs=nnx.Rngs(jax.random.key(7, impl="rbg"))) for _ in range(2))
    assert_close("logits", other(images()), again(images()), 0)


def test_training_by_split_and_merge_in_a_scan() -> None:
    """A training step written with optax alone: a scan of two steps equals a loop of two steps."""
    graph, params, rest = nnx.split(  # type: ignore[misc]
        make_model(train=True), nnx.Param, ...
    )
    optimizer = jax_resnet.adabound(1e-3)

    def step(carry: Any, x: jax.Array) -> Any:
        params, rest, state = carry

        def loss(params: Any) -> Any:
            network = nnx.merge(graph, params, rest, copy=True)
            value = jnp.square(network(x)).sum()
            return value, nnx.state(network, nnx.Not(nnx.Param))

        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), rest, state), value

    start = params, rest, optimizer.init(params)
    batches = jnp.stack([images(), images(1)])
    end, values = quick_jit(lambda start, batches: jax.lax.scan(step, start, batches))(start, batches)
    looped, one = start, quick_jit(step)
    for x, value in zip(batches, values, strict=True):
        looped, expected = one(looped, x)
        assert_close("loss", value, expected, FLOAT32_NETWORK)
    statistics = [nnx.to_pure_dict(carry[1])["bn1"]["running_mean"] for carry in (end, looped, start)]
    assert_close("statistics", statistics[0], statistics[1], FLOAT32_NETWORK)
    assert (statistics[0] != statistics[2]).any()


def test_training_with_a_new_head_by_nnx_optimizer() -> None:
    network = make_model(train=True)
    network.fc = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(1)), nnx.Linear(2, 3, rngs=nnx.Rngs(2)))
    optimizer = nnx.Optimizer(network, jax_resnet.adabound(1e-2), wrt=nnx.Param)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(network, nnx.Param)))

    @nnx.jit
    def step(network: Any, optimizer: Any, x: jax.Array) -> jax.Array:
        value, gradient = nnx.value_and_grad(lambda network: jnp.square(network(x) - 1).sum())(network)
        optimizer.update(network, gradient)
        return value

    first, second = (float(step(network, optimizer, images())) for _ in range(2))
    assert np.isfinite([first, second]).all()
    assert first != second
    after = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, after)))


# AdaBound inside optax's wrappers

PARAMS = {"w": jnp.linspace(-1, 1, 4), "b": jnp.ones(2)}
MASK = {"w": True, "b": False}
Update = Callable[[Any, Any], Any]


def gradients(step: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    return {name: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for name, p in PARAMS.items()}


def after(optimizer: Any, steps: int = 6) -> dict[str, Any]:
    """The parameters after some steps, whose gradients are a function of the step alone."""
    params, state = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def bounded(**options: Any) -> Any:
    return jax_resnet.adabound(1e-2, base_lr=1e-2, weight_decay=1e-2, **options)


WRAPPED: dict[str, Callable[[], Any]] = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1e6), bounded()),
    "masked": lambda: optax.chain(
        optax.masked(bounded(), MASK), optax.masked(optax.set_to_zero(), {"w": False, "b": True})
    ),
    "multi_transform": lambda: optax.multi_transform(
        {"bound": bounded(), "frozen": optax.set_to_zero()}, {"w": "bound", "b": "frozen"}
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(jax_resnet.adabound)(
        1e-2, base_lr=1e-2, weight_decay=1e-2
    ),
    "inject_hyperparams with a mask": lambda: optax.inject_hyperparams(
        jax_resnet.adabound, static_args=("mask", "mu_dtype")
    )(1e-2, base_lr=1e-2, weight_decay=1e-2, mask=lambda params: dict.fromkeys(params, True)),
    "apply_if_finite": lambda: optax.apply_if_finite(bounded(), 3),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_adabound_in_a_wrapper_is_adabound(wrapper: str) -> None:
    expected = after(bounded())
    actual = after(WRAPPED[wrapper]())
    if wrapper in ("masked", "multi_transform"):
        expected["b"] = PARAMS["b"]
    assert_all_close(wrapper, actual, expected, 1e-6)


def test_adabound_under_multi_steps_takes_the_mean_of_gradients() -> None:
    actual = after(optax.MultiSteps(bounded(), 2), steps=2)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, gradients(0), gradients(1))
    optimizer = bounded()
    updates, _ = optimizer.update(mean, optimizer.init(PARAMS), PARAMS)
    assert_all_close("MultiSteps", actual, optax.apply_updates(PARAMS, updates), 1e-6)


def test_adabound_under_apply_if_finite_passes_over_a_nan() -> None:
    optimizer = optax.apply_if_finite(bounded(), 3)
    state = optimizer.init(PARAMS)
    bad = {**gradients(0), "b": jnp.full(2, jnp.nan)}
    updates, state = optimizer.update(bad, state, PARAMS)
    assert_all_close("updates", updates, jax.tree.map(jnp.zeros_like, PARAMS), 0)
    updates, state = optimizer.update(gradients(0), state, PARAMS)
    assert_all_close("the next", optax.apply_updates(PARAMS, updates), after(bounded(), 1), 1e-6)


def test_adabound_under_lookahead() -> None:
    """Slow parameters go half the way of two fast steps."""
    optimizer = optax.lookahead(bounded(), sync_period=2, slow_step_size=0.5)
    both = optax.LookaheadParams.init_synced(PARAMS)
    state = optimizer.init(both)
    for step in range(2):
        updates, state = optimizer.update(gradients(step), state, both)
        both = optax.apply_updates(both, updates)
    fast = after(bounded(), 2)
    expected = jax.tree.map(lambda start, end: (start + end) / 2, PARAMS, fast)
    assert_all_close("slow", both.slow, expected, 1e-6)


def test_adabound_in_a_train_state_and_through_orbax(tmp_path: Path) -> None:
    def make() -> TrainState:
        return TrainState.create(
            apply_fn=lambda params, x: x, params=PARAMS, tx=bounded(mu_dtype=jnp.bfloat16)
        )

    state = make()
    for step in range(3):
        state = state.apply_gradients(grads=gradients(step))
    ocp.save(tmp_path / "saved", {"params": state.params, "opt_state": state.opt_state})
    fresh = make()
    target = {"params": fresh.params, "opt_state": fresh.opt_state}
    restored = fresh.replace(step=3, **ocp.load(tmp_path / "saved", target))
    for step in range(3, 6):
        state, restored = (s.apply_gradients(grads=gradients(step)) for s in (state, restored))
    assert_all_close("resumed", restored.params, state.params, 0)
    assert_all_close("the same", state.params, after(bounded(mu_dtype=jnp.bfloat16)), 1e-6)
