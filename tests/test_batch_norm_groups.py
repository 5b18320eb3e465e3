"""Batch norm over groups: the same numbers from any number of devices and processes, in both engines.

Against PyTorch: the cases with a group in `tests/parity/cases.py`.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jax_resnet
import numpy_ref
import torch_oracle
from jax_resnet.layers import BatchNorm
from jax_resnet.strategies.blockwise import Blockwise
from numpy_ref import fast, layers
from numpy_ref.state_dict import state_dict
from tests.helpers.comparing import assert_all_close, assert_close, nchw
from tests.helpers.jax_engine import (
    GROUPED,
    GROUPS,
    flat,
    learning_rate,
    make_batches,
    make_engine,
    train,
    train_in_groups,
)
from tests.helpers.numpy_engine import make_engine as make_numpy_engine
from tests.tolerances import FLOAT64_LAYER, FLOAT64_NETWORK
from torch_oracle.layers import GroupedBatchNorm2d

ROOT = Path(__file__).parents[1]

# Other devices add up in another order: 1e-16 a step, of which there are four, with small rates.
DEVICES = 1e-12

NUMPY_NORMS: dict[str, Any] = {
    "plain": layers.BatchNorm,
    "fast": fast.BatchNorm,
    "fused": fast.BatchNormAddRelu,
}


@pytest.fixture(scope="module", autouse=True)
def _no_processes_left() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def one_device() -> dict[str, np.ndarray]:
    """The JAX engine's numbers on one device."""
    return train_in_groups(make_engine)


# The layers

# Groups [1, 2, 6] and [4, 4, 7]: means 3 and 5, biased variances 14 / 3 and 2, unbiased 7 and 3
X = np.array([1.0, 2, 6, 4, 4, 7])
Y = (X - np.repeat([3, 5], 3)) / np.sqrt(np.repeat([14 / 3, 2], 3) + 1e-5)
RUNNING = {"running_mean": [0.1 * 4], "running_var": [0.9 + 0.1 * 5]}


def run_numpy(form: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    layer = NUMPY_NORMS[form](1, group=3, dtype=np.float64)
    return layer.forward(X.reshape(6, 1, 1, 1), True), state_dict(layer)


def run_jax() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    with jax.enable_x64(True):
        layer = BatchNorm(1, group=3, dtype=jnp.float64)
        return np.asarray(layer(jnp.asarray(X.reshape(6, 1, 1, 1)))), jax_resnet.state_dict(layer)


def run_torch() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    layer = GroupedBatchNorm2d(1, 3).double()
    return layer(torch.from_numpy(X.reshape(6, 1, 1, 1))).detach().numpy(), torch_oracle.state_dict(layer)


@pytest.mark.parametrize(
    "run",
    [*(partial(run_numpy, form) for form in NUMPY_NORMS), run_jax, run_torch],
    ids=[*NUMPY_NORMS, "jax", "torch"],
)
def test_two_groups_by_hand(run: Any) -> None:
    y, state = run()
    expected = np.maximum(Y, 0) if "fused" in getattr(run, "args", ()) else Y
    assert_close("y", y.ravel(), expected, FLOAT64_LAYER)
    assert_all_close("statistics", {name: state[name] for name in RUNNING}, RUNNING, FLOAT64_LAYER)


def call(layer: Any, x: np.ndarray) -> Any:
    """The output in training for x [B, H, W, C]."""
    if isinstance(layer, torch.nn.Module):
        return layer(torch.from_numpy(nchw(x)))
    return layer.forward(x, True) if isinstance(layer, layers.BatchNorm) else layer(jnp.asarray(x))


MAKERS: dict[str, Any] = {
    **{name: partial(norm, 2) for name, norm in NUMPY_NORMS.items()},
    "jax": partial(BatchNorm, 2),
    "torch": partial(GroupedBatchNorm2d, 2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_groups_without_examples_or_that_do_not_divide_the_batch_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must have 1 or more examples, got 0"):
        MAKERS[name](group=0)
    layer = MAKERS[name](group=4)
    with pytest.raises(ValueError, match=r"groups of 4 examples needs a multiple of them, got 6$"):
        call(layer, np.ones((6, 3, 3, 2), np.float32))
    with pytest.raises(ValueError, match=r"got 0$"):
        call(layer, np.ones((0, 3, 3, 2), np.float32))
    assert not np.asarray(layer.running_mean[...]).any()  # as it began
    layer = MAKERS[name](group=1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        call(layer, np.ones((4, 1, 1, 2), np.float32))


@pytest.mark.parametrize(
    "package", [jax_resnet, numpy_ref, torch_oracle], ids=lambda package: package.__name__
)
def test_groups_need_batch_norm(package: Any) -> None:
    rngs: dict[str, dict[str, Any]] = {"jax_resnet": {"rngs": nnx.Rngs(0)}, "numpy_ref": {"rng": None}}
    with pytest.raises(ValueError, match="batch_norm_group needs batch_norm"):
        package.resnet8(5, batch_norm=False, batch_norm_group=2, **rngs.get(package.__name__, {}))


def test_one_group_is_the_whole_batch() -> None:
    results = {}
    for group in (None, 8):
        options = {**GROUPED, **({} if group is None else {"batch_norm_group": group})}
        for make in (make_engine, make_numpy_engine):
            engine: Any = make(optimizer="sgd", model_options=options)
            state, metrics = train(engine, engine.init(), make_batches(2))
            results[group, make] = {**flat(engine.to_tree(state)), "logits": metrics[-1]["logits"]}
    for (group, make), found in results.items():
        assert_all_close(f"{group} {make.__module__}", found, results[None, make_engine], FLOAT64_NETWORK)


# Strategies and engines


@pytest.mark.parametrize("form", ["whole", pytest.param("chunk", marks=pytest.mark.slow), "remat"])
def test_strategies_of_the_jax_engine_agree(form: str, one_device: dict[str, np.ndarray]) -> None:
    """The blockwise one, which a CPU takes, with the others."""

    more: dict[str, dict[str, Any]] = {"whole": {}, "chunk": {"chunk": 3}, "remat": {"remat": True}}

    def make(**options: Any) -> Any:
        engine = make_engine(**options, **more[form])
        assert isinstance(engine._strategy, Blockwise) == (form != "chunk")
        if form == "whole":
            engine._strategy = engine.whole()
        return engine

    found = train_in_groups(make, cases=GROUPS[:1])
    expected = {name: array for name, array in one_device.items() if name in found}
    assert_all_close(form, found, expected, FLOAT64_NETWORK)


@pytest.fixture(scope="module")
def one_process() -> dict[str, np.ndarray]:
    """The NumPy engine's numbers in one process; it has no micro-batches."""
    return train_in_groups(make_numpy_engine, cases=GROUPS[:2])


def test_the_engines_agree(one_process: dict[str, np.ndarray], one_device: dict[str, np.ndarray]) -> None:
    expected = {name: array for name, array in one_device.items() if name in one_process}
    assert_all_close("NumPy", one_process, expected, FLOAT64_NETWORK)


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_computes_the_same(
    processes: int, one_process: dict[str, np.ndarray]
) -> None:
    found = train_in_groups(partial(make_numpy_engine, processes=processes), cases=GROUPS[:2])
    assert_all_close(f"{processes} processes", found, one_process, DEVICES)


def test_processes_get_whole_groups() -> None:
    options = {**GROUPED, "batch_norm_group": 2}
    engine = make_numpy_engine(processes=3, model_options=options)
    assert engine._parts(8) == [slice(0, 4), slice(4, 6), slice(6, 8)]
    assert engine._parts(4) == [slice(0, 2), slice(2, 4)]
    assert engine._parts(2) == [slice(0, 2)]
    assert "3 processes, each with whole batch-norm groups of 2" in engine.device
    with pytest.raises(ValueError, match=r"groups of 2 examples needs a multiple of them, got 5"):
        next(engine.train(engine.init(), make_batches(1, size=5)))


def test_micro_batches_are_split_into_groups_as_in_pytorch() -> None:
    """Images i, i + K, ... are micro-batch i of K, and each two of these a group."""
    options = {**GROUPED, "batch_norm_group": 2}
    engine: Any = make_engine(optimizer="sgd", model_options=options, accumulate=2)
    state = engine.init()
    network: Any = torch_oracle.resnet18(5, 3, **options).double()
    tree = engine.to_tree(state)
    torch_oracle.load_state_dict(network, {**tree["params"], **tree["batch_stats"]})
    optimizer = torch.optim.SGD(network.train().parameters(), momentum=0.9)
    batches = make_batches(3)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.zero_grad()
        for part in range(2):
            image = torch.from_numpy(nchw(batch["image"][part::2]))
            label = torch.from_numpy(batch["label"][part::2]).long()
            (torch.nn.functional.cross_entropy(network(image), label) / 2).backward()
        optimizer.step()
    tree = engine.to_tree(train(engine, state, batches)[0])
    found = {**tree["params"], **tree["batch_stats"]}
    assert_all_close("weights", found, torch_oracle.state_dict(network), FLOAT64_NETWORK)


# Devices

ON_DEVICES = """
import sys, jax, numpy
from tests.helpers.jax_engine import make_engine, train_in_groups
path, devices = sys.argv[1:]
assert jax.device_count() == int(devices), jax.devices()
numpy.savez(path, **train_in_groups(make_engine))
"""


def start(program: str, devices: int, *arguments: str) -> subprocess.Popen[str]:
    """A program in a process of so many virtual CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8])
def test_any_number_of_devices_computes_the_same(
    devices: int, tmp_path: Path, one_device: dict[str, np.ndarray]
) -> None:
    path = str(tmp_path / "results.npz")
    process = start(ON_DEVICES, devices, path, str(devices))
    process.communicate(timeout=600)
    assert process.returncode == 0
    assert_all_close(f"{devices} devices", dict(np.load(path)), one_device, DEVICES)


COLLECTIVES = """
import re, jax, jax.numpy as jnp
from jax_resnet.layers import BatchNorm
from jax_resnet.placement import Placement
from jax_resnet.state_dict import apply, split

sharded = Placement().sharded
for group, size in ((None, 16), (2, 16), (1, 8), (4, 16), (16, 16)):
    parts = split(BatchNorm(3, group=group))

    def run(x, dy):  # without the gradients of the parameters, which are sums over the batch
        y, pull_back = jax.vjp(lambda x: apply(parts.train, parts.params, parts.batch_stats, x)[0], x)
        return y, pull_back(dy)[0]

    x = jax.ShapeDtypeStruct((size, 4, 4, 3), jnp.float32, sharding=sharded)
    text = jax.jit(run, out_shardings=sharded).lower(x, x).compile().as_text()
    print(group, *sorted(set(re.findall(r" (all-[a-z-]+|collective-[a-z-]+|reduce-scatter)\\(", text))))
"""


def test_whole_groups_on_a_device_need_no_communication() -> None:
    """Groups over several devices need sums alone: no image is moved."""
    out, _ = (process := start(COLLECTIVES, 8)).communicate(timeout=600)
    assert process.returncode == 0
    expected = ["None all-reduce", "2", "1", "4 all-reduce", "16 all-reduce"]
    assert out.splitlines() == expected
