"""The layers of the NumPy engine, plain and fast, against numerical gradients; what they refuse and save.
Against JAX, PyTorch and each other: `test_parity.py`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import numpy_ref
from numpy_ref import fast, layers
from numpy_ref.fast import blocks, convolution
from numpy_ref.layers import Layer, cross_entropy, no_grad
from numpy_ref.state_dict import load_state_dict, state_dict
from tests.helpers.comparing import assert_close, random_state
from tests.parity.case import Case
from tests.parity.compare import check
from tests.tolerances import FLOAT64_LAYER

# Central differences with a step of 1e-6 in float64 lose 1e-10 to rounding and as much to curvature.
NUMERICAL = 1e-7

Make = Callable[..., Layer]
CONVOLUTIONS: dict[str, Make] = {
    "plain": layers.Conv2d,
    "loops": layers.LoopConv2d,
    "fast": fast.Conv2d,
}
NORMS: dict[str, Make] = {
    "plain": layers.BatchNorm,
    "fast": fast.BatchNorm,
    "fused": fast.BatchNormAddRelu,
}
MAX_POOLS: dict[str, Make] = {"plain": layers.MaxPool2d, "fast": fast.MaxPool2d}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return rng(seed).normal(size=shape)


def apart(*shape: int, seed: int = 0) -> np.ndarray:
    """Numbers that are all different, by 0.01 or more, none of them within 0.005 of 0: no ties, no kinks."""
    count = int(np.prod(shape))
    return (rng(seed).permutation(count).reshape(shape) - count // 2 + 0.5) / 100


def check_gradients(layer: Layer, x: np.ndarray, train: bool = True) -> None:
    """The public check, with the tests' tolerance."""
    numpy_ref.check_gradients(layer, x, train, tolerance=NUMERICAL)


class WithShortcut(Layer):
    """A fused norm of x[0] with x[1] as the shortcut."""

    def __init__(self, norm: Layer) -> None:
        self.norm: Any = norm

    def forward(self, x: np.ndarray, train: bool = False) -> np.ndarray:
        return self.norm.forward(x[0], train, x[1].copy())

    def backward(self, dy: np.ndarray) -> np.ndarray:
        return np.stack([self.norm.backward(dy), self.norm.dshortcut])


class Loss(Layer):
    """The cross-entropy of logits, as a layer whose output is one number."""

    def __init__(self, label: np.ndarray) -> None:
        self.label = label

    def forward(self, x: np.ndarray, train: bool = False) -> np.ndarray:
        loss, dlogits = cross_entropy(x, self.label)
        self.save_for_backward(dlogits)
        return np.array([loss])

    def backward(self, dy: np.ndarray) -> np.ndarray:
        (dlogits,) = self.saved
        return dy * dlogits


def fill(layer: Layer, seed: int = 0) -> Layer:
    """Numbers in place of the zeros and ones a layer begins with."""
    shapes = {name: array.shape for name, array in state_dict(layer).items()}
    load_state_dict(layer, random_state(shapes, seed))
    return layer


sizes = st.integers(1, 3)


@st.composite
def windows(draw: Any) -> dict[str, Any]:
    """A kernel, stride and padding, and an image that it fits."""
    kernel = (draw(sizes), draw(sizes))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    size = tuple(draw(st.integers(max(1, k - 2 * p), 5)) for k, p in zip(kernel, padding, strict=True))
    return {"kernel": kernel, "stride": (draw(sizes), draw(sizes)), "padding": padding, "size": size}


@pytest.mark.parametrize("form", CONVOLUTIONS)
@settings(max_examples=15)
@given(window=windows(), n=sizes, channels=st.tuples(sizes, sizes), bias=st.booleans())
def test_conv2d_numerically(form, window, n, channels, bias):
    layer = CONVOLUTIONS[form](
        *channels,
        window["kernel"],
        stride=window["stride"],
        padding=window["padding"],
        bias=bias,
        rng=rng(),
        dtype=np.float64,
    )
    check_gradients(layer, numbers(n, *window["size"], channels[0], seed=1))


@settings(max_examples=10)
@given(shape=st.tuples(sizes, sizes, sizes))
def test_linear_numerically(shape):
    n, inputs, outputs = shape
    check_gradients(layers.Linear(inputs, outputs, rng=rng(), dtype=np.float64), numbers(n, inputs, seed=1))


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("train", [True, False])
@settings(max_examples=15)
@given(shape=st.lists(sizes, min_size=2, max_size=4), shortcut=st.booleans())
def test_batch_norm_numerically(form, train, shape, shortcut):
    """Of any rank; the fused form with and without a shortcut."""
    assume(np.prod(shape[:-1]) >= 4)
    layer = fill(NORMS[form](shape[-1], dtype=np.float64))
    x = numbers(*shape, seed=3)
    if form == "fused":
        plain = layers.BatchNorm(shape[-1], dtype=np.float64)
        load_state_dict(plain, state_dict(layer))
        added = numbers(*shape, seed=4) if shortcut else np.zeros(shape)
        assume(np.abs(plain.forward(x, train) + added).min() > 1e-4)  # no kink within the step
        if shortcut:
            layer, x = WithShortcut(layer), np.stack([x, added])
    check_gradients(layer, x, train)


@pytest.mark.parametrize("form", NORMS)
@settings(max_examples=10)
@given(count=st.integers(1, 3), group=st.integers(2, 3), size=st.tuples(sizes, sizes), shortcut=st.booleans())
def test_batch_norm_over_groups_numerically(form, count, group, size, shortcut):
    layer = fill(NORMS[form](2, group=group, dtype=np.float64))
    assume(group * np.prod(size) >= 4)
    x = numbers(count * group, *size, 2, seed=3)
    if form == "fused":
        plain = layers.BatchNorm(2, group=group, dtype=np.float64)
        load_state_dict(plain, state_dict(layer))
        added = numbers(*x.shape, seed=4) if shortcut else np.zeros(x.shape)
        assume(np.abs(plain.forward(x, True) + added).min() > 1e-4)  # no kink within the step
        if shortcut:
            layer, x = WithShortcut(layer), np.stack([x, added])
    check_gradients(layer, x)


@pytest.mark.parametrize("make", [*MAX_POOLS.values(), layers.AvgPool2d])
@settings(max_examples=15)
@given(window=windows(), n=sizes, channels=sizes)
def test_pooling_numerically(make, window, n, channels):
    layer = make(window["kernel"], stride=window["stride"], padding=window["padding"])
    check_gradients(layer, apart(n, *window["size"], channels))


@pytest.mark.parametrize(
    "layer",
    [
        layers.ReLU(),
        layers.Sigmoid(),
        layers.Flatten(),
        layers.GlobalAvgPool2d(),
        layers.OptionA(2, 5, stride=2),
        layers.NoNorm(),
        layers.Sequential(
            layers.Conv2d(2, 3, 3, padding=1, rng=rng(), dtype=np.float64),
            fast.BatchNorm(3, dtype=np.float64),
            layers.Sigmoid(),
        ),
    ],
    ids=lambda layer: type(layer).__name__,
)
@settings(max_examples=8)
@given(n=st.integers(2, 3), size=st.tuples(sizes, sizes))
def test_others_numerically(layer, n, size):
    check_gradients(layer, apart(n, *size, 2))


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("name", ["resnet8", "resnet50"])
def test_a_residual_block_numerically(name, batch_norm, fast):
    """With each kind of block and shortcut; the fast block with batch norm is the fused one."""
    options = {"batch_norm": batch_norm, "rng": rng(), "dtype": np.float64, "fast": fast}
    options |= {"width": 2} if name == "resnet8" else {"width": 2, "stage_sizes": (1, 1)}
    network: Any = numpy_ref.MODELS[name](5, 3, **options)
    channels = 2 if name == "resnet8" else 8
    check_gradients(fill(network.layer2), numbers(3, 4, 4, channels, seed=1))


@settings(max_examples=10)
@given(n=sizes, classes=st.integers(2, 4))
def test_cross_entropy_numerically(n, classes):
    logits, label = 5 * numbers(n, classes), rng().integers(classes, size=n)
    check_gradients(Loss(label), logits)


class Scale(Layer):
    """y = scale * x, with a gradient of the scale that is wrong by `error` at its second element."""

    def __init__(self, error: float = 0.0, dtype: Any = np.float64) -> None:
        self.scale = layers.Parameter(np.array([2.0, 3.0], dtype))
        self.error = error

    def forward(self, x: np.ndarray, train: bool = False) -> np.ndarray:
        self.save_for_backward(x)
        return x * self.scale.value

    def backward(self, dy: np.ndarray) -> np.ndarray:
        (x,) = self.saved
        self.scale.add_grad((dy * x).sum(0) + np.array([0, self.error]))
        return dy * self.scale.value


def test_check_gradients_names_what_is_wrong() -> None:
    x = numbers(4, 2)
    assert numpy_ref.check_gradients(Scale(), x) < 1e-8
    message = r"^gradient of scale\[1\]: backward gives \S+, central differences \S+; relative error \S+$"
    for error in (0.1, 1e-4, np.nan):
        with pytest.raises(ValueError, match=message.replace(r"\S+$", r"\S+, tolerance 1e-06$")):
            numpy_ref.check_gradients(Scale(error), x)


class Random(Scale):
    def forward(self, x: np.ndarray, train: bool = False) -> np.ndarray:
        self.error += 1
        return super().forward(x) * self.error


class InPlace(Scale):
    def backward(self, dy: np.ndarray) -> np.ndarray:
        dx = super().backward(dy)
        dy *= 2
        return dx


class Flat(Scale):
    def backward(self, dy: np.ndarray) -> np.ndarray:
        return super().backward(dy).ravel()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Scale(dtype=np.float32), r"scale is float32, too coarse .*: make the layer with dtype=np\.float64"),
        (Random(), "two forward passes of one x differ"),
        (InPlace(), "backward changed dy"),
        (Flat(), r"backward returned shape \(8,\) for x of shape \(4, 2\)"),
    ],
)
def test_check_gradients_refuses(layer: Layer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numpy_ref.check_gradients(layer, numbers(4, 2))


def test_check_gradients_restores_the_layer() -> None:
    """In train mode forward moves the running statistics; the input and the parameters are the caller's."""
    layer, x = fill(layers.BatchNorm(2, dtype=np.float64)), numbers(5, 2)
    before, given = {k: v.copy() for k, v in state_dict(layer).items()}, x.copy()
    numpy_ref.check_gradients(layer, x)
    for name, array in state_dict(layer).items():
        np.testing.assert_array_equal(array, before[name])
    np.testing.assert_array_equal(x, given)
    assert not layer.weight.grad.any()  # type: ignore[attr-defined]


@pytest.mark.parametrize("keep", [False, True])
def test_fast_conv2d_in_many_blocks(monkeypatch, keep):
    """Patches saved or made again, of one image or of all."""
    monkeypatch.setattr(blocks, "PATCHES_BLOCK", 20_000)
    monkeypatch.setattr(fast.Conv2d, "keep_patches", keep)
    options = {"out_channels": 6, "kernel_size": 3, "padding": 1, "bias": True}
    check(Case("many-blocks", "conv", (7, 8, 8, 4), options), engines=["numpy", "torch"])


@settings(max_examples=20)
@given(n=sizes, height=st.integers(1, 7), width=st.integers(1, 7), keep=st.booleans(), many=st.booleans())
def test_winograd_in_many_blocks(n, height, width, keep, many):
    """Even and odd sides, tiles saved or made again, of one image or of all."""
    options = {"out_channels": 6, "kernel_size": 3, "padding": 1, "bias": True}
    with pytest.MonkeyPatch.context() as patch:
        force_winograd(patch)
        patch.setattr(blocks, "PATCHES_BLOCK", 1 if many else 1 << 22)
        patch.setattr(fast.Conv2d, "keep_patches", keep)
        check(Case("winograd", "conv", (n, height, width, 4), options), engines=["numpy", "torch"])


def force_winograd(patch: pytest.MonkeyPatch) -> None:
    """Whatever the shapes, 3x3 kernels with stride 1 take Winograd's form."""
    patch.setattr(convolution, "WINOGRAD_CHANNELS", 1)
    patch.setattr(convolution, "WINOGRAD_PIXELS", 1)


@pytest.mark.parametrize(("kernel", "size"), [(1, (5, 4)), (3, (2, 2)), (3, (9, 8)), ("winograd", (9, 8))])
def test_a_first_convolution_may_leave_out_dx(monkeypatch, kernel, size):
    """In each of the four forms: the parameters' gradients are the same, and dx is zeros."""
    if kernel == "winograd":
        force_winograd(monkeypatch)
        kernel = 3
    options = {"padding": kernel // 2, "bias": True, "dtype": np.float64}
    whole, first = (fast.Conv2d(3, 4, kernel, **options, rng=rng()) for _ in range(2))
    first.needs_dx = False
    x, dy = numbers(2, *size, 3), numbers(2, *size, 4, seed=1)
    for layer in (whole, first):
        layer.forward(x, True)
    assert np.abs(whole.backward(dy)).min() > 0
    np.testing.assert_array_equal(first.backward(dy), np.zeros_like(x))
    for mine, others in zip(first.parameters(), whole.parameters(), strict=True):
        np.testing.assert_array_equal(mine.grad, others.grad)


def test_batch_norm_in_many_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    check(Case("many-blocks", "batch_norm", (3, 7, 11, 5)), engines=["numpy", "torch"])


def test_cross_entropy_of_parts_adds_up():
    logits, label = 1000 * numbers(6, 4), rng().integers(4, size=6)
    loss, dlogits = cross_entropy(logits, label)
    parts = [cross_entropy(logits[part], label[part], 6) for part in (slice(0, 2), slice(2, 6))]
    assert_close("loss of parts", sum(each[0] for each in parts), loss, FLOAT64_LAYER)
    assert_close("dlogits of parts", np.concatenate([each[1] for each in parts]), dlogits, FLOAT64_LAYER)


@pytest.mark.parametrize("form", MAX_POOLS)
def test_max_pooling_lets_a_nan_through(form):
    x = numbers(1, 4, 4, 1)
    x[0, 2, 2] = np.nan
    assert np.isnan(MAX_POOLS[form](2).forward(x)[0, 1, 1, 0])


def test_a_kernel_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        layers.Conv2d(1, 1, 5, rng=rng()).forward(np.zeros((1, 4, 4, 1), np.float32))
    with pytest.raises(ValueError, match="more than half"):
        layers.MaxPool2d(2, padding=2)


def test_gradients_add_up_in_place_until_zero_grad():
    layer, x = layers.Linear(3, 2, rng=rng(), dtype=np.float64), numbers(4, 3)
    place = layer.weight.grad
    assert not place.any()
    for _ in range(2):
        layer.forward(x)
        layer.backward(np.ones((4, 2)))
    twice = layer.weight.grad.copy()
    assert layer.weight.grad is place
    layer.weight.zero_grad()
    assert not layer.weight.grad.any()
    layer.backward(np.ones((4, 2)))
    np.testing.assert_array_equal(2 * layer.weight.grad, twice)
    layer.weight.trainable = False
    layer.weight.zero_grad()
    layer.backward(np.ones((4, 2)))
    assert not layer.weight.grad.any()


def test_nothing_saved_for_backward_is_pickled():
    """A pickled model of the source project carried every cached input."""
    layer = layers.Sequential(
        fast.Conv2d(2, 2, 3, padding=1, rng=rng()), fast.BatchNormAddRelu(2), layers.ReLU()
    )
    empty = len(pickle.dumps(layer))
    layer.backward(layer.forward(np.ones((8, 32, 32, 2), np.float32), train=True))
    assert len(pickle.dumps(layer)) < empty + 200
    with no_grad():
        layer.forward(np.ones((8, 32, 32, 2), np.float32))
    with pytest.raises(RuntimeError, match="needs a forward"):
        layer.backward(np.ones((8, 32, 32, 2), np.float32))


def test_memory_is_used_again_only_when_nobody_refers_to_it():
    from numpy_ref.memory import empty

    first = empty((5, 1001), np.float32)
    address, part = first.ctypes.data, first[2:]
    second = empty((1001, 5), np.float32)
    assert not np.shares_memory(first, second)
    del first
    third = empty((5005,), np.float32)
    assert not np.shares_memory(part, third)
    del part
    assert empty((5005,), np.float32).ctypes.data == address
    arrays = [empty((3,), np.float64) for _ in range(10)]
    assert len({array.ctypes.data for array in arrays}) == 10
    assert all(array.flags.aligned and array.flags.writeable for array in arrays)
