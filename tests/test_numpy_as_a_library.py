"""The NumPy package as a stranger uses it: any array, threads, forks, spawned processes, groups, state dicts.

No part of the project beside `numpy_ref` is imported here.
"""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numpy_ref as R
from numpy_ref import fast, memory, optimizer_base

ROOT = Path(__file__).parents[1]
# The same products, added up in another order where BLAS packs another layout: 1e-7. A float16 result: 2^-11.
SAME = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 1e-3}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """float32 numbers that float16 has, too."""
    return rng(seed).normal(size=shape).astype(np.float16).astype(np.float32)


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.setflags(write=False)
    return a


def every_other(a: np.ndarray) -> np.ndarray:
    """A view in which no axis is contiguous."""
    wide = np.full([2 * n for n in a.shape], np.nan, a.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in a.shape)]
    view[...] = a
    return view


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Fortran": np.asfortranarray,
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "last axis first": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, -1, 0)), 0, -1),
    "negative strides": lambda a: np.flip(np.flip(a).copy()),
    "view": every_other,
    "read-only": read_only,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
}
ARRAYS = {**LAYOUTS, "float16": lambda a: a.astype(np.float16)}

IMAGE, ROWS = (4, 6, 6, 3), (6, 5)
LAYERS: dict[str, tuple[Callable[[], R.Layer], tuple[int, ...]]] = {
    "conv": (lambda: R.Conv2d(3, 4, 3, padding=1, bias=True, rng=rng()), IMAGE),
    "loops": (lambda: R.LoopConv2d(3, 4, 3, stride=2, bias=True, rng=rng()), (2, 5, 5, 3)),
    "fast columns": (lambda: fast.Conv2d(3, 4, 3, bias=True, rng=rng()), IMAGE),
    "fast columns, padded": (lambda: fast.Conv2d(3, 4, 3, padding=1, bias=True, rng=rng()), IMAGE),
    "fast columns, strided": (lambda: fast.Conv2d(3, 4, (2, 3), stride=2, rng=rng()), IMAGE),
    "fast pointwise": (lambda: fast.Conv2d(3, 4, 1, rng=rng()), IMAGE),
    "fast pointwise, strided": (lambda: fast.Conv2d(3, 4, 1, stride=2, bias=True, rng=rng()), IMAGE),
    "fast taps": (lambda: fast.Conv2d(3, 4, 3, padding=1, rng=rng()), (4, 2, 2, 3)),
    "fast Winograd": (lambda: fast.Conv2d(64, 64, 3, padding=1, rng=rng()), (4, 8, 8, 64)),
    "batch norm": (lambda: R.BatchNorm(3), IMAGE),
    "fast batch norm": (lambda: fast.BatchNorm(3), IMAGE),
    "fused batch norm": (lambda: fast.BatchNormAddRelu(3), IMAGE),
    "batch norm over groups": (lambda: R.BatchNorm(3, group=2), IMAGE),
    "fast batch norm over groups": (lambda: fast.BatchNorm(3, group=2), IMAGE),
    "fused batch norm over groups": (lambda: fast.BatchNormAddRelu(3, group=2), IMAGE),
    "max pool": (lambda: R.MaxPool2d(2), IMAGE),
    "fast max pool": (lambda: fast.MaxPool2d(3, stride=2, padding=1), IMAGE),
    "mean pool": (lambda: R.AvgPool2d(2), IMAGE),
    "global mean": (R.GlobalAvgPool2d, IMAGE),
    "option A": (lambda: R.OptionA(3, 6, stride=2), IMAGE),
    "flatten": (R.Flatten, IMAGE),
    "linear": (lambda: R.Linear(5, 4, rng=rng()), ROWS),
    "relu": (R.ReLU, ROWS),
    "sigmoid": (R.Sigmoid, ROWS),
    "no norm": (R.NoNorm, IMAGE),
    "sequential": (
        lambda: R.Sequential([R.Conv2d(3, 4, 3, rng=rng()), R.BatchNorm(4), R.ReLU(), R.Flatten()]),
        IMAGE,
    ),
    "network": (lambda: R.resnet8(10, width=4, rng=rng()), IMAGE),
}


def run(layer: R.Layer, x: np.ndarray, dy: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The output, dL/dx and every parameter's gradient; of dy numbers of the output's shape by default."""
    y = layer.forward(x, True)
    dx = layer.backward(numbers(*y.shape, seed=1) if dy is None else dy)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters().items()}
    return {"y": y, "dx": dx, **gradients}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_any_array(name: str) -> None:
    """For input and gradient alike: the numbers are those of a C-contiguous float32 array, which stays."""
    make, shape = LAYERS[name]
    x = numbers(*shape)
    expected = run(make(), x)
    dy = numbers(*expected["y"].shape, seed=1)
    for layout, change in ARRAYS.items():
        given, dgiven = change(x), change(dy)
        before = given.copy(), dgiven.copy()
        found = run(make(), given, dgiven)
        np.testing.assert_array_equal(given, before[0])
        np.testing.assert_array_equal(dgiven, before[1])
        for what, array in found.items():
            scale = np.abs(expected[what]).max()
            tolerance = SAME[array.dtype.newbyteorder("=")] * scale
            np.testing.assert_allclose(
                array, expected[what], rtol=0, atol=tolerance, err_msg=f"{layout}: {what}"
            )


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_may_be_empty(name: str) -> None:
    """In evaluation, as in PyTorch; the parameters' gradients are 0. Training batch norm refuses it."""
    make, (_, *shape) = LAYERS[name]
    layer = make()
    y = layer.forward(np.zeros((1, *shape), np.float32))
    empty = layer.forward(np.zeros((0, *shape), np.float32))
    assert empty.shape == (0, *y.shape[1:])
    assert layer.backward(empty).shape == (0, *shape)
    assert all(not parameter.grad.any() for parameter in layer.parameters())
    if any(isinstance(part, R.BatchNorm) for part in layer.walk()):
        with pytest.raises(ValueError, match="more than 1 value per channel in training, got 0"):
            layer.forward(np.zeros((0, *shape), np.float32), train=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_parameter_of_any_layout_moves(layout: str) -> None:
    """As at construction, so when assigned; its gradient is a product, or is added."""
    value, a, b = numbers(3, 4), numbers(3, 5, seed=1), numbers(5, 4, seed=2)
    results = []
    for change in (np.array, LAYOUTS[layout]):
        parameters = [R.Parameter(change(value)), R.Parameter(value.copy())]
        parameters[1].value = change(value)
        optimizer = R.Adam(parameters, 0.1)
        for parameter in parameters:
            parameter.add_grad_product(a, b)
            parameter.add_grad(change(value))
            np.testing.assert_allclose(parameter.grad, a @ b + value, rtol=1e-6)
        optimizer.step()
        results += [parameter.value for parameter in parameters]
    for result in results:
        np.testing.assert_array_equal(result, results[0])
        assert np.abs(result - value).min() > 0.01


@pytest.mark.parametrize("make", [R.Conv2d, R.LoopConv2d, fast.Conv2d])
def test_a_transposed_kernel_is_trained(make: Any) -> None:
    """A kernel of PyTorch's layout, OIHW, turned to HWIO as a view."""
    kernel, x = numbers(4, 3, 3, 3).transpose(2, 3, 1, 0), numbers(*IMAGE)
    layers = [make(3, 4, 3, rng=None) for _ in range(2)]
    for layer, value in zip(layers, (kernel.copy("C"), kernel), strict=True):
        layer.weight.value = value
        optimizer = R.SGD(layer.parameters(), 0.1)
        layer.backward(np.ones_like(layer.forward(x)))
        optimizer.step()
    np.testing.assert_array_equal(layers[1].weight.value, layers[0].weight.value)
    assert not np.array_equal(layers[1].weight.value, kernel)


def test_an_array_that_fits_is_not_copied() -> None:
    array = np.ones((2, 3), np.float32)
    parameter = R.Parameter(array)
    parameter.add_grad(np.ones((2, 3), np.float32))
    R.SGD([parameter], 0.5).step()
    np.testing.assert_array_equal(array, np.full((2, 3), 0.5))


def test_a_float16_parameter_has_moments_of_float32() -> None:
    """In float16 Adam's eps is 0, and the square of a gradient of 1e-4, too."""
    parameter = R.Parameter(np.ones(3, np.float16))
    optimizer = R.Adam([parameter], 0.1)
    parameter.add_grad(np.array([0, 1e-4, -1e-4]))
    optimizer.step()
    assert parameter.value.dtype == np.float16
    np.testing.assert_allclose(parameter.value, [1, 0.9, 1.1], atol=1e-3)


@pytest.mark.parametrize("dtype", [np.complex64, np.int64, np.bool_])
def test_a_parameter_of_another_type_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"of a floating type, got {np.dtype(dtype)}"):
        R.Parameter(np.ones(3, dtype))
    parameter = R.Parameter(np.ones(3))
    with pytest.raises(ValueError, match="floating type"):
        parameter.value = np.ones(3, dtype)


def test_shapes_that_do_not_fit_a_parameter_are_refused() -> None:
    """NumPy would broadcast a gradient; an optimizer's moments are of the old shape."""
    parameter = R.Parameter(np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"gradient of shape \(4,\) for a parameter of shape \(3, 4\)"):
        parameter.add_grad(np.ones(4))
    for place in (np.ones((3, 5)), np.asfortranarray(np.ones((3, 4)))):
        with pytest.raises(ValueError, match="C-contiguous array of shape"):
            parameter.store_grad_in(place)
    optimizer = R.Adam([parameter])
    parameter.value = np.ones((3, 1))
    parameter.add_grad(np.ones((3, 1)))
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(3, 1\), and had \(3, 4\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([0, -1, 2], "label 1 is -1, where classes are 0 to 3"),
        ([0, 1, 4], "label 2 is 4, where classes are 0 to 3"),
        ([[0], [1], [2]], r"shape \(3,\), one class each, got \(3, 1\)"),
        (np.eye(4)[:3], r"got \(3, 4\); of one-hot rows take label.argmax\(1\)"),
        ([0, 1], r"got \(2,\)"),
        (1, r"got \(\)"),
        ([0.0, 1.0, 2.0], "must be integers, got float64"),
        ([True, False, True], "must be integers, got bool"),
    ],
)
def test_wrong_labels_are_named(label: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        R.cross_entropy(numbers(3, 4), np.asarray(label))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint64, ">i2"])
def test_labels_of_any_integer_type_are_taken(dtype: Any) -> None:
    expected, dexpected = R.cross_entropy(numbers(3, 4), np.array([3, 0, 1]))
    loss, dlogits = R.cross_entropy(numbers(3, 4).astype(">f4"), np.array([3, 0, 1], dtype))
    assert loss == expected
    np.testing.assert_array_equal(dlogits, dexpected)


def test_the_loss_of_no_examples_is_refused_but_as_a_part() -> None:
    nothing = np.zeros((0, 4)), np.zeros(0, np.int32)
    with pytest.raises(ValueError, match="batch of 0 examples"):
        R.cross_entropy(*nothing)
    loss, dlogits = R.cross_entropy(*nothing, batch_size=3)
    assert loss == 0
    assert dlogits.shape == (0, 4)


# Long sums


@pytest.mark.parametrize("shape", [(16, 224, 224, 3), (3000, 2)])
def test_plain_batch_norm_keeps_float32s_digits(shape: tuple[int, ...]) -> None:
    """Against float64; one float32 number after the other, the variance of the first was off by 4e-4."""
    x, dy = (scale * rng(seed).normal(size=shape) + 3 for seed, scale in ((0, 2), (1, 1)))
    layer, exact = (
        R.BatchNorm(shape[-1], momentum=1.0),
        R.BatchNorm(shape[-1], momentum=1.0, dtype=np.float64),
    )
    x, dy = x.astype(np.float32), dy.astype(np.float32)
    for norm, dtype in ((layer, np.float32), (exact, np.float64)):
        norm.forward(x.astype(dtype, copy=False), train=True)
        norm.backward(dy.astype(dtype, copy=False))
    for mine, other in (
        (layer.running_mean, exact.running_mean),
        (layer.running_var, exact.running_var),
        (layer.bias.grad, exact.bias.grad),
    ):
        np.testing.assert_allclose(mine, other, rtol=5e-7)
    terms = math.prod(shape[:-1])
    # z is off by 1e-7 in every term, since the mean is; the terms have both signs, and nearly cancel
    np.testing.assert_allclose(layer.weight.grad, exact.weight.grad, rtol=0, atol=2e-7 * terms)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (R.Linear(2, 2, rng=None), (200_000, 2)),
        (R.Conv2d(2, 2, 1, bias=True, rng=None), (3, 200, 300, 2)),
        (R.LoopConv2d(2, 2, 1, bias=True, rng=None), (1, 50, 50, 2)),
        (fast.Conv2d(2, 2, 1, bias=True, rng=None), (3, 200, 300, 2)),
        (fast.Conv2d(2, 2, 3, padding=1, bias=True, rng=None), (1, 301, 301, 2)),
    ],
    ids=["linear", "conv", "loops", "fast", "fast, odd"],
)
def test_a_bias_gradient_of_many_terms_keeps_its_digits(layer: Any, shape: tuple[int, ...]) -> None:
    dy = np.full(shape, 0.1, np.float32)
    layer.forward(np.zeros(shape, np.float32))
    layer.backward(dy)
    # The fast form adds up 128 rows in float32: 3e-7 of the whole
    assert layer.bias.grad[0] == pytest.approx(float(np.float32(0.1)) * dy.size / 2, rel=1e-6)


def test_means_of_many_pixels_keep_their_digits() -> None:
    x = np.full((2, 224, 224, 3), 0.1, np.float32)
    for layer in (R.GlobalAvgPool2d(), R.AvgPool2d(64)):
        y = layer.forward(x)
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, 0.1, rtol=1e-6)


# Threads, forks, processes


def test_no_grad_is_the_threads_own() -> None:
    """One thread inside it, or two that overlap: others train, and nothing stays off."""
    x, inside, trained = numbers(2, 5), threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def evaluate() -> None:
        try:
            with R.no_grad():
                inside.set()
                assert trained.wait(10)
                layer = R.Linear(5, 2, rng=rng())
                layer.forward(x)
                with pytest.raises(RuntimeError, match="needs a forward"):
                    layer.backward(numbers(2, 2))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=evaluate)
    thread.start()
    assert inside.wait(10)
    layer = R.Linear(5, 2, rng=rng())
    with R.no_grad():
        trained.set()
        thread.join(10)  # it leaves while this one is inside
    layer.forward(x)
    layer.backward(numbers(2, 2))
    assert not failures, failures


def test_networks_train_in_threads() -> None:
    """Four at once, each as if it were alone."""

    def train(seed: int) -> None:
        network = R.resnet8(10, width=4, rng=rng(seed))
        optimizer = R.AdaBound(network.parameters())
        for step in range(3):
            optimizer.zero_grad()
            logits = network.forward(numbers(4, 8, 8, 3, seed=step), train=True)
            network.backward(R.cross_entropy(logits, np.arange(4))[1])
            optimizer.step()
        results[seed].append(R.state_dict(network))

    results: dict[int, list[dict[str, np.ndarray]]] = {seed: [] for seed in range(4)}
    for seed in results:
        train(seed)
    threads = [threading.Thread(target=train, args=(seed,)) for seed in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for alone, beside in results.values():
        for name, array in alone.items():
            np.testing.assert_array_equal(beside[name], array)


ENGINE = """
import gc, os, signal
import numpy as np
import numpy_ref as R

engine = R.Engine(
    model="cnn", model_options={}, num_classes=3, image_shape=(4, 4, 1), mean=[0.0], std=[1.0],
    optimizer="adam", optimizer_options={}, learning_rate=lambda step: 1e-3, processes=2,
)
batch = {"image": np.ones((4, 4, 4, 1), np.float32), "label": np.array([0, 1, 2, 0], np.int32)}
state, _ = next(engine.train(engine.init(), [batch]))
"""
FORK = """
parameter = R.Parameter(np.ones(1000))
optimizer = R.Adam([parameter], 0.1)
parameter.add_grad(np.ones(1000))
optimizer.step()
child = os.fork()
if child == 0:
    signal.alarm(20)  # ends a child that hangs
    optimizer.step()
    try:
        next(engine.train(state, [batch]))
    except RuntimeError as error:
        print(error, flush=True)
    del state
    gc.collect()
    os._exit(int(not np.allclose(parameter.value, 0.8)))
print(os.waitpid(child, 0)[1], next(engine.train(state, [batch]))[0].step)
"""
# The second process is still ending when the first one's failure makes the parent kill it.
ENDS_LATE = """
import multiprocessing, sys, time
if multiprocessing.current_process().name == "SpawnProcess-2":
    sys.excepthook = lambda *_: time.sleep(3)
"""


def python(*arguments: str, program: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program of two threads, from standard input if there is one, and wait for it."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "PATH": ""}
    command = [sys.executable, *arguments]
    return subprocess.run(command, input=program, capture_output=True, text=True, timeout=60, env=environment)


def test_a_fork_takes_steps_and_leaves_its_parents_processes_alone() -> None:
    done = python("-c", ENGINE + FORK)
    message, *last = done.stdout.splitlines()
    assert "after a fork make a new state" in message, done.stderr
    assert last == ["0 2"]


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_a_script_without_a_guard_gets_a_reason(source: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    program = ENDS_LATE + ENGINE.replace("processes=2", "processes=3")
    path.write_text(program)
    done = python(str(path)) if source == "file" else python("-", program=program)
    assert done.returncode == 1
    assert "leaked" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: a process of the NumPy engine could not start")
    assert 'if __name__ == "__main__":' in last
    assert "processes=1" in last


def test_memory_for_many_sizes_is_bounded() -> None:
    """Each size asked for once: kept are at most twice the largest, and 128 MB, not all 4 GB."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for megabytes in range(33, 97):
            array = memory.empty((megabytes, 1 << 20), np.uint8)
            del array
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert kept < 360 << 20


def test_memory_in_use_is_never_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing to spare, of many sizes every other one stays in use; and memory is reused."""
    monkeypatch.setattr(memory, "SPARE", 0)
    monkeypatch.setattr(memory, "SLAB", 1 << 12)
    monkeypatch.setattr(memory, "_peak", 0)
    in_use = {}
    for size in range(3000, 5000, 50):
        array = memory.empty((size,), np.uint8)
        array.fill(size % 251)
        if size % 100:
            in_use[size] = array
        del array
    for size, array in in_use.items():
        assert (array == size % 251).all()
    address = memory.empty((4900,), np.uint8).ctypes.data
    assert memory.empty((4900,), np.uint8).ctypes.data == address


# Optimizers


def parameters(dtype: Any = np.float32) -> list[R.Parameter]:
    return [R.Parameter(numbers(*shape).astype(dtype)) for shape in ((4, 3), (3,), (2, 2, 3))]


def take_steps(optimizer: R.Optimizer, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for index, parameter in enumerate(optimizer.parameters):
            parameter.add_grad(numbers(*parameter.value.shape, seed=100 * step + index))
        optimizer.step()


def make(name: str, given: list[R.Parameter]) -> R.Optimizer:
    """With two groups: weights, which decay, and vectors, which do not and have a rate of their own."""
    decayed, others = ([p for p in given if (p.value.ndim > 1) is many] for many in (True, False))
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0, "lr": 0.02}]
    return R.make_optimizer(name, groups, 0.01, weight_decay=0.1)


@pytest.mark.parametrize("name", R.OPTIMIZERS)
def test_a_state_dict_continues_bit_for_bit(name: str) -> None:
    """With groups, into an optimizer that was made with other values."""
    whole, half = parameters(), parameters()
    take_steps(make(name, whole), 0, 6)
    optimizer = make(name, half)
    optimizer.param_groups[1]["lr"] = 0.02
    take_steps(optimizer, 0, 3)
    saved = optimizer.state_dict()
    copies = [R.Parameter(parameter.value.copy()) for parameter in optimizer.parameters]
    take_steps(optimizer, 3, 3)  # what is saved is a copy
    groups: list[dict[str, Any]] = [{"params": copies[:2]}, {"params": copies[2]}]
    second = R.make_optimizer(name, groups, 0.5)
    second.load_state_dict(saved)
    assert second.count == 3
    take_steps(second, 3, 3)
    expected = [whole[0], whole[2], whole[1]]
    for found in (copies, optimizer.parameters):
        for parameter, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(parameter.value, wanted.value)


def test_groups_are_as_several_optimizers() -> None:
    given = parameters()
    take_steps(make("adamw", given), 0, 4)
    alone = parameters()
    # the gradients are those of the indices in `take_steps`: weights first
    for index, (parameter, options) in enumerate(
        [(alone[0], {}), (alone[2], {}), (alone[1], {"weight_decay": 0.0, "lr": 0.02})]
    ):
        optimizer = R.AdamW([parameter], **{"lr": 0.01, "weight_decay": 0.1, **options})
        for step in range(4):
            optimizer.zero_grad()
            parameter.add_grad(numbers(*parameter.value.shape, seed=100 * step + index))
            optimizer.step()
    for parameter, wanted in zip(given, alone, strict=True):
        np.testing.assert_array_equal(parameter.value, wanted.value)


def test_a_rate_is_set_in_all_groups_or_in_one() -> None:
    optimizer = make("adabound", parameters())
    assert [group["base_lr"] for group in optimizer.param_groups] == [0.01, 0.02]
    optimizer.param_groups[1]["lr"] = 0.5
    assert optimizer.lr == 0.01
    optimizer.lr = np.float32(0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    optimizer.weight_decay = -1.0
    with pytest.raises(ValueError, match="weight_decay must be"):
        optimizer.step()
    assert optimizer.count == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("count"), "missing count"),
        (lambda state: state["state"].pop(2), "parameter 2 has no state, not mu, nu"),
        (lambda state: state["state"][0].pop("nu"), "parameter 0 has mu, not mu, nu"),
        (lambda state: state["state"][0].update(nu=np.ones(3)), r"nu of parameter 0 has shape \(3,\)"),
        (lambda state: state["param_groups"].pop(), r"groups of \[2\] parameters, not \[2, 1\]"),
        (lambda state: state["param_groups"][0].pop("b1"), "its groups have params, lr"),
        (lambda state: state["param_groups"][1].update(lr=-1), "lr must be"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change: Any, message: str) -> None:
    optimizer = make("adam", parameters())
    take_steps(optimizer, 0, 2)
    before, changed = pickle.dumps(optimizer.state_dict()), optimizer.state_dict()
    changed["state"][1]["mu"] += 1
    change(changed)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(changed)
    assert pickle.dumps(optimizer.state_dict()) == before
    with pytest.raises(ValueError, match="its groups have params, lr, momentum"):
        optimizer.load_state_dict(make("sgd", parameters()).state_dict())


def test_what_is_no_parameter_is_refused() -> None:
    layer = R.Linear(3, 2, rng=rng())
    for wrong in (layer, R.Sequential(layer), [np.ones(3)], [layer.weight, {"params": [layer.bias]}]):
        with pytest.raises(TypeError, match=r"expected parameters, such as layer.parameters\(\)"):
            R.Adam(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match='a mapping that has "params"'):
        R.Adam([{"parameters": layer.parameters()}])
    with pytest.raises(ValueError, match="given twice"):
        R.Adam([layer.weight, layer.weight])
    with pytest.raises(ValueError, match="given twice"):
        R.Adam([{"params": layer.parameters()}, {"params": [layer.bias]}])
    with pytest.raises(ValueError, match="has momentum, and may have params, lr, b1"):
        R.Adam([{"params": layer.parameters(), "momentum": 0.9}])
    assert len(R.Sequential(layer, layer).parameters()) == 2  # weights that are shared are no mistake


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"b2": np.float32(1)}, ValueError, "b2 must be in"),
        ({"b2": np.float32(0.99999999)}, ValueError, "b2 must be in"),
        ({"b1": np.array(-0.1)}, ValueError, "b1 must be in"),
        ({"eps": np.float16("inf")}, ValueError, "eps must be"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, got '0.1'"),
        ({"lr": np.ones(2)}, TypeError, "lr must be a number"),
        ({"lr": 1j}, TypeError, "lr must be a number"),
        ({"lr": lambda step: 0.1}, TypeError, "for a schedule set it before each step"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a number"),
    ],
)
def test_a_hyperparameter_out_of_range_is_named(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        R.AdaBound([], **options)
    with pytest.raises(error, match=message):
        R.AdaBound([{"params": [R.Parameter(np.ones(3))], **options}])


@pytest.mark.parametrize("name", R.OPTIMIZERS)
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array])
def test_numpys_numbers_compute_as_pythons(name: str, kind: Any) -> None:
    """1 - b2**t in float32 has four digits."""
    values = {"b1": 0.75, "b2": float(np.float32(0.999)), "eps": 2.0**-20, "gamma": 2.0**-10}
    results = []
    for convert in (float, kind):
        given = parameters()
        options: dict[str, Any] = {k: convert(v) for k, v in values.items()}
        optimizer = R.make_optimizer(name, given, 0.5, **options)
        take_steps(optimizer, 0, 2)
        optimizer.lr = convert(0.25)
        take_steps(optimizer, 2, 2)
        results.append([parameter.value for parameter in given])
    for mine, wanted in zip(*results, strict=True):
        np.testing.assert_array_equal(mine, wanted)


@pytest.mark.parametrize("name", R.OPTIMIZERS)
def test_bounds_may_be_asked_for_before_the_first_step(name: str) -> None:
    optimizer = R.make_optimizer(name, parameters(), 0.01)
    bounded = isinstance(optimizer, R.AdaBound)
    assert optimizer.bounds == ((0.0, math.inf) if bounded else None)
    assert R.adabound_bounds(0) == (0.0, math.inf)
    take_steps(optimizer, 0, 1)
    if bounded:
        lower, upper = R.adabound_bounds(1, 0.1 / 0.01)
        assert optimizer.bounds == (0.01 * lower, 0.01 * upper)


@pytest.mark.parametrize("name", R.OPTIMIZERS)
def test_mixed_types_do_not_depend_on_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 beside float32, and half of each in the other's thread: as each type by itself."""
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(optimizer_base, "_threads", threads)
        given = [*parameters(np.float32), *parameters(np.float64), *parameters(np.float32)]
        optimizer = R.make_optimizer(name, given, 0.1)
        take_steps(optimizer, 0, 2)
        results.append(given)
    monkeypatch.setattr(optimizer_base, "_threads", 1)
    alone = parameters(np.float64)
    optimizer = R.make_optimizer(name, alone, 0.1)
    for step in range(2):
        optimizer.zero_grad()
        for index, parameter in enumerate(alone):
            parameter.add_grad(numbers(*parameter.value.shape, seed=100 * step + 3 + index))
        optimizer.step()
    for given in results:
        for parameter, wanted in zip(given, results[0], strict=True):
            np.testing.assert_array_equal(parameter.value, wanted.value)
        for parameter, wanted in zip(given[3:6], alone, strict=True):
            np.testing.assert_array_equal(parameter.value, wanted.value)


def test_an_unknown_optimizer_or_model_is_named() -> None:
    options: dict[str, Any] = {
        "model": "cnn",
        "model_options": {},
        "num_classes": 3,
        "image_shape": (4, 4, 1),
        "mean": [0.0],
        "std": [1.0],
        "optimizer": "adam",
        "optimizer_options": {},
        "learning_rate": lambda step: 1e-3,
    }
    for wrong, message in (
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; choose one of adam, adabound"),
        ({"model": "resnet9"}, "unknown model 'resnet9'; choose one of resnet101"),
        ({"processes": 0}, "processes must be 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            R.Engine(**{**options, **wrong})
    adam, sgd = (R.Engine(**{**options, "optimizer": name, "processes": 1}) for name in ("adam", "sgd"))
    with pytest.raises(ValueError, match="of another model or optimizer: it does not fit optimizer/trace"):
        sgd.from_tree(adam.to_tree(adam.init()))


# Words that help


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (
            R.Conv2d(3, 4, 3, rng=None),
            (2, 3, 8, 9),
            r"channels last, \[N, H, W, 3\], got shape .*transpose",
        ),
        (R.LoopConv2d(3, 4, 3, rng=None), (2, 8, 9), r"expected channels last, \[N, H, W, 3\], got shape"),
        (fast.Conv2d(3, 4, 3, rng=None), (2, 3, 8, 9), r"expected channels last, \[N, H, W, 3\], got shape"),
        (R.BatchNorm(3), (2, 3, 8, 9), r"expected channels last, \[\.\.\., 3\], got shape"),
        (fast.BatchNorm(1), (2, 1, 8, 9), r"expected channels last, \[\.\.\., 1\], got shape"),
        (R.Linear(3, 2, rng=None), (2, 4), r"expected channels last, \[N, 3\], got shape"),
        (R.resnet8(10, rng=None), (2, 3, 8, 9), r"x\.transpose\(0, 2, 3, 1\)"),
    ],
    ids=["conv", "loops", "fast", "norm", "fast norm", "linear", "network"],
)
def test_channels_first_are_named(layer: R.Layer, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer.forward(np.zeros(shape, np.float32), train=True)


@pytest.mark.parametrize("make", [R.Conv2d, R.LoopConv2d, fast.Conv2d])
def test_sizes_that_are_none_are_named(make: Any) -> None:
    with pytest.raises(ValueError, match=r"padding must be an integer .*got 'same'; kernel_size // 2 keeps"):
        make(3, 4, 3, padding="same", rng=None)
    for options, name in (
        ({"padding": -1}, "padding"),
        ({"stride": 0}, "stride"),
        ({"stride": (1, 2, 3)}, "stride"),
        ({"kernel_size": 2.5}, "kernel_size"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be an integer"):
            make(3, 4, **{"kernel_size": 3, "rng": None, **options})
    with pytest.raises(ValueError, match="kernel_size must be"):
        R.MaxPool2d("2")  # type: ignore[arg-type]
    layer = make(3, 4, np.int64(3), stride=[1, np.int32(2)], rng=None)
    assert (layer.kernel, layer.stride) == ((3, 3), (1, 2))


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: R.Conv2d(3, 4, 3, rng=seed),
        lambda seed: R.Linear(3, 4, rng=seed),
        lambda seed: R.resnet8(10, rng=seed),
    ],
)
def test_a_seed_is_no_generator(make: Any) -> None:
    """Taken for one it would give every layer the same numbers."""
    with pytest.raises(TypeError, match=r"such as np.random.default_rng\(0\), or None for zeros, got 0"):
        make(0)


def test_a_sequence_of_layers() -> None:
    layers = [R.Linear(3, 4, rng=rng()), R.ReLU()]
    for sequence in (R.Sequential(layers), R.Sequential(*layers), R.Sequential(tuple(layers))):
        assert list(sequence) == layers
        assert list(sequence.named_parameters()) == ["0.weight", "0.bias"]
    for wrong in ([np.ones(3)], ["relu"], [[R.Linear]]):
        with pytest.raises(TypeError, match="Sequential takes layers, got"):
            R.Sequential(*wrong)


def test_every_layer_is_exported() -> None:
    layers = {
        name
        for name, value in vars(R.layers).items()
        if isinstance(value, type)
        and issubclass(value, R.Layer)
        and value.__module__.startswith("numpy_ref.layers.")
    }
    assert layers - {"Pool2d"} <= set(vars(R))
    assert R.Conv2d is R.layers.Conv2d
