"""The layers of the JAX engine: each against PyTorch's, forward and backward, and what types they keep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from jax import lax

import torch_oracle
from jax_resnet import layers
from jax_resnet.layers import BatchNorm, Conv2d, Linear, OptionA, conv2d, conv2d_matmul, draw, max_pool2d
from jax_resnet.state_dict import (
    apply,
    from_torch_layout,
    load_state_dict,
    split,
    state_dict,
    to_torch_layout,
)
from tests.comparing import assert_all_close, assert_close, nchw, nhwc, quick_jit, random_state
from tests.tolerances import BFLOAT16_LAYER, FLOAT32_LAYER, FLOAT64_LAYER


@pytest.fixture
def x64() -> Iterator[None]:
    """JAX keeps float64 as float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["matmul", "lax.conv"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the convolution, whatever the back end would choose."""
    monkeypatch.setattr(layers, "use_matmul", lambda: request.param == "matmul")
    return request.param


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def check_function(function: Any, judge: Any, x: np.ndarray, tolerance: float = FLOAT64_LAYER) -> None:
    """The output for x [N, H, W, C] and the gradient of a random weighting of it, against PyTorch."""
    x_torch = torch.tensor(nchw(x), requires_grad=True)
    y_torch = judge(x_torch)
    dy = numbers(*nhwc(y_torch.detach()).shape, seed=1)
    y_torch.backward(torch.from_numpy(nchw(dy)))
    assert x_torch.grad is not None

    @quick_jit
    def run(x: jax.Array, dy: jax.Array) -> Any:
        y, pull_back = jax.vjp(function, x)
        return y, pull_back(dy)[0]

    y, dx = run(x, dy)
    assert y.dtype == dx.dtype == x.dtype
    assert_close("y", y, nhwc(y_torch.detach()), tolerance)
    assert_close("dx", dx, nhwc(x_torch.grad), tolerance)


def check_layer(layer: nnx.Module, judge: torch.nn.Module, x: np.ndarray, *, train: bool = True) -> None:
    """`check_function` with the judge's parameters; every parameter's gradient and every statistic too."""
    load_state_dict(layer, torch_oracle.state_dict(judge))
    graph_train, graph_eval, params, stats = split(layer)
    graph = graph_train if train else graph_eval
    x_torch = torch.tensor(nchw(x), requires_grad=True)
    y_torch = judge.train(train)(x_torch)
    dy = numbers(*nhwc(y_torch.detach()).shape, seed=1)
    y_torch.backward(torch.from_numpy(nchw(dy)))
    assert x_torch.grad is not None

    @quick_jit
    def run(params: dict[str, jax.Array], x: jax.Array, dy: jax.Array) -> Any:
        y, pull_back, after = jax.vjp(lambda p, x: apply(graph, p, stats, x), params, x, has_aux=True)
        return y, pull_back(dy), after

    y, (dparams, dx), after = run(params, x, dy)
    assert_close("y", y, nhwc(y_torch.detach()), FLOAT64_LAYER)
    assert_close("dx", dx, nhwc(x_torch.grad), FLOAT64_LAYER)
    gradients = {name: to_torch_layout(value) for name, value in dparams.items()}
    assert_all_close(
        "gradient of",
        gradients,
        {name: parameter.grad for name, parameter in judge.named_parameters()},
        FLOAT64_LAYER,
    )
    running = {name: value for name, value in torch_oracle.state_dict(judge).items() if "running" in name}
    assert_all_close("after", after, running, FLOAT64_LAYER)


def judged(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64, nothing in it 0 or 1."""
    shapes = {name: value.shape for name, value in torch_oracle.state_dict(module).items()}
    torch_oracle.load_state_dict(module.double(), random_state(shapes))
    return module


# Convolution

CONVOLUTIONS = [
    # (picture, kernel, stride, padding): those of the networks but for the stem, then what none of them uses
    pytest.param((12, 12), (3, 3), (1, 1), (1, 1), id="3x3"),
    pytest.param((12, 12), (3, 3), (2, 2), (1, 1), id="3x3-stride-2-even"),
    pytest.param((9, 11), (3, 3), (2, 2), (1, 1), id="3x3-stride-2-odd"),
    pytest.param((5, 6), (1, 1), (1, 1), (0, 0), id="1x1"),
    pytest.param((8, 9), (1, 1), (2, 2), (0, 0), id="1x1-stride-2"),
    pytest.param((10, 7), (2, 4), (3, 1), (0, 2), id="2x4-uneven"),
    pytest.param((1, 1), (3, 3), (1, 1), (1, 1), id="3x3-on-one-pixel"),
    pytest.param((11, 5), (5, 3), (4, 2), (2, 0), id="5x3-leftover-rows"),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), CONVOLUTIONS)
def test_the_matmul_form_is_the_convolution(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    x, weight = numbers(2, *size, 3), numbers(*kernel, 3, 5, seed=1)

    def reference(x: jax.Array, weight: jax.Array) -> jax.Array:
        pairs = [(p, p) for p in padding]
        return lax.conv_general_dilated(x, weight, stride, pairs, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def run(function: Any, dy: Any) -> Any:
        def both(x: jax.Array, weight: jax.Array) -> Any:
            y, pull_back = jax.vjp(function, x, weight)
            return y, *pull_back(dy)

        return quick_jit(both)(x, weight)

    dy = numbers(*jax.eval_shape(reference, x, weight).shape, seed=2)
    ours = run(lambda x, weight: conv2d_matmul(x, weight, stride, padding), dy)
    theirs = run(reference, dy)
    for name, actual, expected in zip(("y", "dx", "dweight"), ours, theirs, strict=True):
        assert actual.dtype == np.float64
        assert_close(name, actual, expected, FLOAT64_LAYER)


@pytest.mark.usefixtures("x64", "form")
@pytest.mark.parametrize(("stride", "padding"), [((3, 1), (0, 2)), ((1, 2), (1, 0))])
def test_conv2d_is_torchs_with_sides_that_differ(stride: tuple[int, int], padding: tuple[int, int]) -> None:
    weight = numbers(5, 3, 2, 4, seed=1)
    check_function(
        lambda x: conv2d(x, jnp.asarray(from_torch_layout(weight)), stride, padding),
        lambda x: F.conv2d(x, torch.from_numpy(weight), stride=stride, padding=padding),
        numbers(2, 10, 7, 3),
    )


@pytest.mark.usefixtures("x64", "form")
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "bias"), [(7, 2, 3, False), (3, 2, 1, True), (1, 2, 0, True)]
)
def test_conv2d_layer_is_torchs(kernel: int, stride: int, padding: int, bias: bool) -> None:
    options: dict[str, Any] = {"stride": stride, "padding": padding, "bias": bias}
    layer = Conv2d(3, 4, kernel, **options, rngs=nnx.Rngs(0), dtype=jnp.float64)
    check_layer(layer, judged(torch.nn.Conv2d(3, 4, kernel, **options)), numbers(2, 9, 12, 3))


def test_the_form_of_the_convolution_follows_the_back_end() -> None:
    assert layers.use_matmul() == (jax.default_backend() == "cpu")


def test_conv2d_takes_the_form_chosen(form: str) -> None:
    jaxpr = str(
        jax.make_jaxpr(lambda x, w: conv2d(x, w, (1, 1), (1, 1)))(numbers(1, 4, 4, 2), numbers(3, 3, 2, 2))
    )
    assert ("conv_general_dilated" in jaxpr, "dot_general" in jaxpr) == (form != "matmul", form == "matmul")


# Batch norm


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [((3, 4, 5, 6), {}), ((2, 1, 1, 6), {}), ((3, 4, 5, 6), {"eps": 0.1, "momentum": 0.3})],
    ids=["defaults", "two-values", "options"],
)
def test_batch_norm_is_torchs(shape: tuple[int, ...], options: dict[str, Any], train: bool) -> None:
    layer = BatchNorm(6, **options, dtype=jnp.float64)
    check_layer(layer, judged(torch.nn.BatchNorm2d(6, **options)), 3 * numbers(*shape) + 2, train=train)


@pytest.mark.usefixtures("x64")
def test_batch_norm_over_rows_is_torchs() -> None:
    check_layer(BatchNorm(6, dtype=jnp.float64), judged(torch.nn.BatchNorm1d(6)), numbers(7, 6))


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
        judge = torch.nn.BatchNorm1d(3) if len(shape) == 2 else torch.nn.BatchNorm2d(3)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            judge(torch.zeros(shape).movedim(-1, 1))


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


# Pooling, linear layer, shortcut


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (2, 1)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_max_pool2d_is_torchs(size: tuple[int, int], kernel: int, stride: int, padding: int) -> None:
    if min(size) + 2 * padding < kernel:
        size = (size[0], kernel)
    x = -1 - np.abs(numbers(2, *size, 3))  # all below 0: padding with zeros would win
    check_function(
        lambda x: max_pool2d(x, kernel, stride, padding),
        lambda x: F.max_pool2d(x, kernel, stride, padding),
        x,
    )


@pytest.mark.usefixtures("x64")
def test_of_equal_values_the_first_gets_the_gradient_as_in_torch() -> None:
    ties = np.random.default_rng(3).integers(0, 2, size=(2, 9, 10, 3)).astype(np.float64)
    for x in (ties, np.zeros((1, 5, 5, 1))):
        check_function(lambda x: max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1), x)


@pytest.mark.usefixtures("x64")
def test_linear_is_torchs() -> None:
    layer = Linear(6, 4, rngs=nnx.Rngs(0), dtype=jnp.float64)
    check_layer(layer, judged(torch.nn.Linear(6, 4)), numbers(3, 6))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("channels", "out", "stride"), [(2, 4, 2), (2, 5, 2), (3, 3, 2), (3, 4, 1), (2, 7, 3)]
)
def test_option_a_is_torchs(channels: int, out: int, stride: int) -> None:
    shortcut, judge = (
        OptionA(channels, out, stride=stride),
        torch_oracle.OptionA(channels, out, stride=stride),
    )
    check_function(shortcut, judge, numbers(2, 7, 8, channels))


def test_option_a_cannot_drop_channels() -> None:
    with pytest.raises(ValueError, match="8 channels to 4"):
        OptionA(8, 4, stride=1)


@pytest.mark.usefixtures("x64")
def test_global_average_pool_is_torchs() -> None:
    check_function(layers.global_average_pool, lambda x: x.mean((2, 3)), numbers(2, 3, 5, 4))


# Types


def make_layer(kind: str, dtype: Any) -> tuple[nnx.Module, tuple[int, ...]]:
    """A layer, and the shape of a picture for it."""
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
