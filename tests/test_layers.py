"""The layers of the JAX engine by themselves: what they refuse, keep and begin with. Their numbers are held
against NumPy's and PyTorch's in `test_parity.py`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jax_resnet import layers
from jax_resnet.layers import BatchNorm, Conv2d, Linear, OptionA, conv2d, draw, relu
from jax_resnet.state_dict import (
    apply,
    split,
    state_dict,
)
from tests.helpers.comparing import assert_all_close, assert_close, quick_jit
from tests.tolerances import BFLOAT16_LAYER, FLOAT32_LAYER


@pytest.fixture(params=["matmul", "lax.conv"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the convolution, whatever the back end would choose."""
    monkeypatch.setattr(layers, "on_cpu", lambda: request.param == "matmul")
    return request.param


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# Convolution


def test_the_form_of_the_convolution_follows_the_back_end() -> None:
    assert layers.on_cpu() == (jax.default_backend() == "cpu")


def test_conv2d_takes_the_form_chosen(form: str) -> None:
    """For a shape whose form on a CPU is a matrix product; `test_convolution.py` has the others."""
    jaxpr = str(
        jax.make_jaxpr(lambda x, w: conv2d(x, w, (1, 1), (1, 1)))(numbers(1, 4, 4, 2), numbers(3, 3, 2, 2))
    )
    assert ("conv_general_dilated" in jaxpr) == (form != "matmul")
    assert ("dot_general" in jaxpr) == (form == "matmul")


@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 8), (8, 8, 3), (1, 8, 8, 4)], ids=["NCHW", "no batch", "channels"]
)
def test_a_convolution_says_what_shape_it_expects(shape: tuple[int, ...]) -> None:
    layer = Conv2d(3, 4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^expected channels last, \[N, H, W, 3\], got \[") as caught:
        layer(jnp.zeros(shape))
    assert str(caught.value).endswith(str(list(shape)))


# ReLU


def test_relu_in_both_modes_and_their_orders() -> None:
    """All derivatives are 0 where x <= 0, even if the tangent is infinite."""
    x = jnp.array([-2.0, -0.0, 0.0, 3.0])
    tangent = jnp.array([jnp.inf, jnp.nan, jnp.inf, 5.0])
    cubed = jax.grad(lambda x: (relu(x) ** 3).sum())

    @quick_jit
    def run(x: jax.Array, dx: jax.Array) -> dict[str, Any]:
        return {
            "jvp": jax.jvp(relu, (x,), (dx,))[1],
            "vjp": jax.vjp(relu, x)[1](dx)[0],
            "linearize": jax.linearize(relu, x)[1](dx),
            "vmap": jax.vmap(lambda x, dx: jax.jvp(relu, (x,), (dx,))[1])(x, dx),
        } | {
            "forward over reverse": jax.jvp(cubed, (x,), (jnp.ones(4),))[1] / 18 * 5,
            "reverse over reverse": jax.grad(lambda x: cubed(x).sum())(x) / 18 * 5,
        }

    for how, actual in run(x, tangent).items():
        np.testing.assert_allclose(actual, [0, 0, 0, 5], rtol=1e-6, err_msg=how)


def test_backward_of_relu_saves_a_mask_alone() -> None:
    """Saved arrays between two compiled functions, as in `blockwise`."""
    pullback = quick_jit(lambda x: jax.vjp(relu, x)[1])(jnp.ones((3, 4)))
    inner = quick_jit(lambda x: jax.vjp(jax.jit(relu), x)[1])(jnp.ones((3, 4)))
    for function in (pullback, inner):
        assert [(saved.dtype, saved.shape) for saved in jax.tree.leaves(function)] == [(jnp.bool, (3, 4))]


# Batch norm


@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_takes_its_mode_from_a_view(train: bool) -> None:
    layer = BatchNorm(3)
    layer.use_running_average = train  # the other mode
    view = nnx.view(layer, use_running_average=not train)
    assert (layer.use_running_average, view.use_running_average) == (train, not train)
    assert view.running_mean is layer.running_mean
    assert "use_running_average" in nnx.view_info(layer)


def test_batch_norm_updates_by_the_unbiased_variance_in_training_only() -> None:
    layer = BatchNorm(1)
    x = jnp.array([[1.0], [2.0], [6.0]])  # mean 3, squared deviations 4, 1, 9: biased 14/3, unbiased 7
    y = layer(x)
    np.testing.assert_allclose(y, (x - 3) / math.sqrt(14 / 3 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(layer.running_mean[...], [0.1 * 3], rtol=1e-6)
    np.testing.assert_allclose(layer.running_var[...], [0.9 + 0.1 * 7], rtol=1e-6)
    layer(x)
    np.testing.assert_allclose(layer.running_var[...], [0.9 * (0.9 + 0.1 * 7) + 0.1 * 7], rtol=1e-6)
    layer.eval()
    before = state_dict(layer)
    y = layer(x)
    np.testing.assert_allclose(
        y, (x - before["running_mean"]) / np.sqrt(before["running_var"] + 1e-5), rtol=1e-5
    )
    assert_all_close("after", state_dict(layer), before, 0)


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 3), (0, 4, 4, 3)])
def test_batch_norm_refuses_a_single_value_in_training_as_torch_does(shape: tuple[int, ...]) -> None:
    layer = BatchNorm(3)
    with pytest.raises(ValueError, match=r"more than 1 value per channel in training, got input \("):
        layer(jnp.zeros(shape))
    assert_all_close("after", state_dict(layer), state_dict(BatchNorm(3)), 0)
    layer.eval()
    assert layer(jnp.zeros(shape)).shape == shape
    if shape[0]:
        reference = torch.nn.BatchNorm1d(3) if len(shape) == 2 else torch.nn.BatchNorm2d(3)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            reference(torch.zeros(shape).movedim(-1, 1))


def test_batch_norm_keeps_its_digits_far_from_zero() -> None:
    # E[x^2] - E[x]^2 in float32 would lose 1e6 * 6e-8 of a variance of 1
    x = (1000 + numbers(64, 4)).astype(np.float32)
    exact = x.astype(np.float64)
    layer = BatchNorm(4)
    y = layer(jnp.asarray(x))
    assert_close("running_var", layer.running_var[...], 0.9 + 0.1 * exact.var(0, ddof=1), FLOAT32_LAYER)
    # the mean itself is rounded to 1000 * 6e-8
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    assert_close("y", y, expected, 1000 * FLOAT32_LAYER)


# Shortcut


def test_option_a_cannot_drop_channels() -> None:
    with pytest.raises(ValueError, match="8 channels to 4"):
        OptionA(8, 4, stride=1)


# Types


def make_layer(kind: str, dtype: Any) -> tuple[nnx.Module, tuple[int, ...]]:
    """A layer, and the shape of an image for it."""
    rngs = nnx.Rngs(0)
    if kind == "conv":
        return Conv2d(3, 4, 3, padding=1, bias=True, rngs=rngs, dtype=dtype), (2, 5, 5, 3)
    if kind == "norm":
        return BatchNorm(3, dtype=dtype), (2, 5, 5, 3)
    return Linear(3, 4, rngs=rngs, dtype=dtype), (2, 3)


@pytest.mark.parametrize("kind", ["conv", "norm", "linear"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_layers_compute_in_their_type_and_keep_parameters_in_at_least_float32(kind: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        layer, shape = make_layer(kind, jnp.dtype(dtype))
        kept = "float64" if dtype == "float64" else "float32"
        graph, _, params, stats = split(layer)
        assert {value.dtype for value in [*params.values(), *stats.values()]} == {jnp.dtype(kept)}

        def loss(params: dict[str, jax.Array], x: jax.Array) -> Any:
            y, after = apply(graph, params, stats, x)
            return jnp.square(y.astype(jnp.float32)).sum(), (y, after)

        x = jnp.asarray(numbers(*shape), kept)  # wider than the compute type: the layer casts
        gradients, (y, after) = jax.jit(jax.grad(loss, has_aux=True))(params, x)
        assert y.dtype == jnp.dtype(dtype)
        assert {value.dtype for value in [*gradients.values(), *after.values()]} == {jnp.dtype(kept)}


@pytest.mark.parametrize("kind", ["conv", "norm", "linear"])
def test_bfloat16_is_close_to_float32(kind: str) -> None:
    results = {}
    for dtype in ("bfloat16", "float32"):
        layer, shape = make_layer(kind, jnp.dtype(dtype))
        parts = split(layer)
        y, after = jax.jit(apply, static_argnums=0)(
            parts.train, parts.params, parts.batch_stats, 3 + numbers(*shape)
        )
        results[dtype] = {"y": y, **after}
    assert_all_close(kind, results["bfloat16"], results["float32"], BFLOAT16_LAYER)


def test_batch_statistics_of_bfloat16_are_summed_in_float32() -> None:
    x = jnp.asarray(
        1 + numbers(2, 64, 64, 3), jnp.bfloat16
    )  # bfloat16 sums of 4,096 of them would stop at 512
    exact = np.asarray(x, np.float64)
    layer = BatchNorm(3, dtype=jnp.bfloat16)
    layer(x)
    assert_close("running_mean", layer.running_mean[...], 0.1 * exact.mean((0, 1, 2)), FLOAT32_LAYER)
    variance = exact.var((0, 1, 2), ddof=1)
    assert_close("running_var", layer.running_var[...], 0.9 + 0.1 * variance, FLOAT32_LAYER)
    pooled = layers.global_average_pool(x)
    assert pooled.dtype == jnp.bfloat16
    assert_close("pool", pooled, exact.mean((1, 2)), BFLOAT16_LAYER)


# Random weights


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_draw_is_the_same_inside_and_outside_of_transformations(distribution: str) -> None:
    def sample(key: jax.Array) -> jax.Array:
        return draw(nnx.Rngs(key), distribution, (3, 4), 0.5, jnp.float32)

    keys = jax.random.split(jax.random.key(7), 3)
    outside = np.stack([sample(key) for key in keys])
    assert len(np.unique(outside)) == outside.size
    np.testing.assert_array_equal(jax.jit(sample)(keys[0]), outside[0])
    np.testing.assert_array_equal(jax.vmap(sample)(keys), outside)
    abstract = jax.eval_shape(sample, keys[0])
    assert (abstract.shape, abstract.dtype) == ((3, 4), np.float32)


def test_draw_takes_the_next_key_of_its_stream() -> None:
    rngs = nnx.Rngs(7)
    first, second = (draw(rngs, "normal", (50,), 1.0, jnp.float32) for _ in range(2))
    assert len(np.unique([first, second])) == 100
    np.testing.assert_array_equal(draw(nnx.Rngs(params=7), "normal", (50,), 1.0, jnp.float32), first)


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg", "threefry2x32"])
def test_draw_takes_every_type_of_key(kind: str) -> None:
    def sample(seed: int) -> np.ndarray:
        return np.asarray(draw(nnx.Rngs(jax.random.key(seed, impl=kind)), "normal", (50,), 1.0, jnp.float32))

    first, second, again = sample(7), sample(8), sample(7)
    assert len(np.unique([first, second])) == 100
    np.testing.assert_array_equal(first, again)
    inside = jax.jit(lambda key: draw(nnx.Rngs(key), "normal", (50,), 1.0, jnp.float32))(
        jax.random.key(7, impl=kind)
    )
    np.testing.assert_array_equal(inside, first)
    if kind == "threefry2x32":
        np.testing.assert_array_equal(
            np.random.default_rng(7).spawn(1)[0].standard_normal(50, np.float32), first
        )


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_draw_gives_every_precision_the_same_numbers(distribution: str) -> None:
    float32 = draw(nnx.Rngs(7), distribution, (3, 4), 0.3, jnp.float32)
    with jax.enable_x64(True):
        float64 = draw(nnx.Rngs(7), distribution, (3, 4), 0.3, jnp.float64)
        inside = jax.jit(lambda: draw(nnx.Rngs(7), distribution, (3, 4), 0.3, jnp.float64))()
    assert [str(a.dtype) for a in (float32, float64, inside)] == ["float32", "float64", "float64"]
    np.testing.assert_array_equal(float64, float32)
    np.testing.assert_array_equal(inside, float32)


def test_draw_has_the_distributions_it_says() -> None:
    normal = np.asarray(draw(nnx.Rngs(0), "normal", (100_000,), 0.5, jnp.float32), np.float64)
    uniform = np.asarray(draw(nnx.Rngs(0), "uniform", (100_000,), 0.5, jnp.float32), np.float64)
    # six standard errors of 100,000 samples
    assert abs(normal.mean()) < 6 * 0.5 / math.sqrt(1e5)
    assert normal.std() == pytest.approx(0.5, rel=6 / math.sqrt(2e5))
    assert (np.abs(normal) < 0.5).mean() == pytest.approx(
        math.erf(1 / math.sqrt(2)), abs=6 * 0.47 / math.sqrt(1e5)
    )
    assert abs(uniform.mean()) < 6 * 0.29 / math.sqrt(1e5)
    assert uniform.std() == pytest.approx(0.5 / math.sqrt(3), rel=0.01)
    assert -0.5 <= uniform.min() < -0.499
    assert 0.499 < uniform.max() < 0.5


def test_weights_begin_as_torchvisions() -> None:
    conv = state_dict(Conv2d(16, 64, 3, bias=True, rngs=nnx.Rngs(0)))
    # He's fan-out: 64 * 3 * 3; the deviation of 9,216 samples is known to 1 / sqrt(2 * 9216)
    assert conv["weight"].std() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=6 / math.sqrt(2 * 9216))
    assert not conv["bias"].any()
    linear = state_dict(Linear(64, 100, rngs=nnx.Rngs(0)))
    for name in ("weight", "bias"):
        assert 0.9 / 8 < np.abs(linear[name]).max() <= 1 / 8, name
    norm = state_dict(BatchNorm(3))
    expected = {"weight": [1] * 3, "bias": [0] * 3, "running_mean": [0] * 3, "running_var": [1] * 3}
    assert_all_close("norm", norm, expected, 0)
