"""Convolution by rows, and the memory order that it works in: equal to the plain layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numpy_ref
from numpy_ref import fast, layers
from numpy_ref.fast import blocks, convolution
from numpy_ref.fast.memory_order import HCWN, NHWC, order_of
from numpy_ref.fast.row_products import RowProducts
from numpy_ref.layers import Layer
from numpy_ref.state_dict import load_state_dict, state_dict
from tests.helpers.comparing import assert_close, random_state
from tests.tolerances import FLOAT64_LAYER, FLOAT64_NETWORK, float32_sum

ORDERS = {"NHWC": NHWC, "HCWN": HCWN}


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def results(layer: Layer, x: np.ndarray, dy: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    """The output of a layer in training, dL/dx, and the gradients of its parameters."""
    for parameter in layer.parameters():
        parameter.zero_grad()
    y = layer.forward(x, True, **options)
    dx = layer.backward(dy)
    return {"y": y, "dx": dx, **{name: p.grad.copy() for name, p in layer.named_parameters().items()}}


def assert_equal_results(
    mine: dict[str, np.ndarray], others: dict[str, np.ndarray], tolerance: float
) -> None:
    assert mine.keys() == others.keys()
    for name, values in others.items():
        assert_close(name, mine[name], values, tolerance)


@settings(max_examples=60)
@given(
    n=st.integers(1, 3),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    order=st.sampled_from(list(ORDERS)),
)
def test_row_products_of_any_shape(n, size, kernel, stride, padding, order):
    """Kernels, strides and paddings of both axes, also where whole rows and columns are padding."""
    if any(s + 2 * p < k for s, p, k in zip(size, padding, kernel, strict=True)):
        return
    options: Any = {"stride": stride, "padding": padding, "bias": True, "dtype": np.float64}
    plain, rows = (
        form.Conv2d(2, 3, kernel, **options, rng=np.random.default_rng(0)) for form in (layers, fast)
    )
    x = numbers(n, *size, 2)
    dy = numbers(*plain.forward(x).shape, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "choose_algorithm", lambda *_: RowProducts)
        mine = results(rows, ORDERS[order].ordered(x), ORDERS[order].ordered(dy))
    assert_equal_results(mine, results(plain, x, dy), FLOAT64_LAYER)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("stride", [1, 2])
def test_narrow_convolutions_take_rows(stride, dtype, order):
    """Whatever the order of x, y and dx are in the order of rows."""
    options: Any = {"stride": stride, "padding": 1, "dtype": dtype}
    plain, rows = (form.Conv2d(16, 8, 3, **options, rng=np.random.default_rng(0)) for form in (layers, fast))
    x = ORDERS[order].ordered(numbers(8, 6, 5, 16).astype(dtype))
    dy = numbers(*plain.forward(x).shape, seed=1).astype(dtype)
    mine = results(rows, x, dy)
    assert isinstance(rows.saved[0], RowProducts)
    assert order_of(mine["y"]) is order_of(mine["dx"]) is HCWN
    longest_sum = dy.size // 8
    tolerance = FLOAT64_LAYER if dtype is np.float64 else float32_sum(longest_sum)
    assert_equal_results(mine, results(plain, x, dy), tolerance)


@pytest.mark.parametrize("block", [1, 3000, 1 << 18], ids=["rows", "blocks", "whole"])
@pytest.mark.parametrize(
    "name", ["norm", "fused", "shortcut", "drop-path", "option-A", "groups", "norm-groups"]
)
def test_layers_keep_the_memory_order(monkeypatch, name, block):
    """And compute the same in it."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    options: dict[str, np.ndarray] = {}
    layer: Layer = fast.BatchNormAddRelu(4, dtype=np.float64)
    x, dy = numbers(8, 6, 5, 4), numbers(8, 6, 5, 4, seed=1)
    group = 2 if name.endswith("groups") else None
    if group:
        layer = fast.BatchNormAddRelu(4, group=group, dtype=np.float64)
    if name.startswith("norm"):
        layer = fast.BatchNorm(4, group=group, dtype=np.float64)
    if name in ("shortcut", "drop-path", "groups"):
        options["shortcut"] = numbers(8, 6, 5, 4, seed=2)
    if name in ("drop-path", "groups"):
        options["keep"] = np.array([0, 1.25] * 4)
    if name == "option-A":
        layer, dy = fast.OptionA(4, 7, stride=2), numbers(8, 3, 3, 7, seed=1)
    expected = results(layer, x, dy, **options)
    mine = results(layer, HCWN.ordered(x), HCWN.ordered(dy), **options)
    assert_equal_results(mine, expected, FLOAT64_LAYER)
    assert order_of(mine["y"]) is order_of(mine["dx"]) is HCWN
    if name in ("shortcut", "drop-path", "groups"):
        assert order_of(layer.dshortcut) is HCWN  # type: ignore[attr-defined]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_narrow_network_by_rows(batch_norm):
    """All of its 3x3 convolutions take them; outputs and gradients are those of the plain layers."""
    networks: list[Any] = [
        numpy_ref.resnet8(5, 3, width=4, batch_norm=batch_norm, rng=None, dtype=np.float64, fast=fast)
        for fast in (True, False)
    ]
    shapes = {name: array.shape for name, array in state_dict(networks[1]).items()}
    for network in networks:
        load_state_dict(network, random_state(shapes))
    x, dy = numbers(8, 12, 12, 3), numbers(8, 5, seed=1)
    mine, expected = (results(network, x, dy) for network in networks)
    networks[0].forward(x, True)
    convolutions = [layer for layer in networks[0].walk() if isinstance(layer, fast.Conv2d)]
    taken = [isinstance(layer.saved[0], RowProducts) for layer in convolutions if layer.kernel == (3, 3)]
    assert taken == [True] * 7
    mine.pop("dx"), expected.pop("dx")  # the fast network leaves out that of the images
    assert_equal_results(mine, expected, FLOAT64_NETWORK)


def test_flatten_returns_a_gradient_in_the_memory_order_of_its_input() -> None:
    x = np.random.default_rng(0).standard_normal((4, 5, 6, 3))
    layer = layers.Flatten()
    for order in ORDERS.values():
        y = layer.forward(order.ordered(x), train=True)
        dx = layer.backward(y)
        assert order_of(dx) is order
        np.testing.assert_array_equal(dx, x)
