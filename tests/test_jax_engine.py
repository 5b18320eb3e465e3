"""The JAX engine by itself, on thin networks: its step against PyTorch's, its state, what it compiles."""

from __future__ import annotations

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
import torch.nn.functional as F

import torch_oracle
from jax_resnet import make_optimizer
from jax_resnet.state_dict import apply
from tests.helpers.comparing import assert_all_close, assert_close, nchw
from tests.helpers.jax_engine import (
    FIELDS,
    FLOAT64_DEVICES,
    MEAN,
    SHAPE,
    STD,
    THIN,
    assert_same_bits,
    flat,
    learning_rate,
    make_batches,
    make_engine,
    nested,
    oracle,
    shared,
    train,
    train_on_devices,
)
from tests.tolerances import BFLOAT16_NETWORK, FLOAT64_LAYER, FLOAT64_NETWORK

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("model", "weight_decay"), [("resnet18", 0.0), ("cnn", 0.01)])
def test_steps_equal_those_written_by_hand_in_pytorch(model, weight_decay):
    engine = (
        make_engine(model, optimizer_options={"weight_decay": weight_decay}) if weight_decay else shared()
    )
    state = engine.init()
    network = oracle(model, engine.to_tree(state))
    optimizer = torch.optim.Adam(network.parameters(), weight_decay=weight_decay)
    batches = make_batches(5)
    state, metrics = train(engine, state, batches)
    for step, (batch, found) in enumerate(zip(batches, metrics, strict=True)):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.zero_grad()
        logits = network(torch.from_numpy(nchw(batch["image"])))
        loss = F.cross_entropy(logits, torch.from_numpy(batch["label"]).long())
        loss.backward()
        before = {name: value.detach().clone() for name, value in network.named_parameters()}
        optimizer.step()
        grads = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        updates = [(p.detach() - before[name]).flatten() for name, p in network.named_parameters()]
        expected = {"loss": loss, "logits": logits, "grad_norm": torch.linalg.vector_norm(grads)}
        expected["update_norm"] = torch.linalg.vector_norm(torch.cat(updates))
        for name, value in expected.items():
            assert_close(f"step {step}, {name}", found[name], value.detach(), FLOAT64_NETWORK)
        assert (found["label"] == batch["label"]).all()
    tree = engine.to_tree(state)
    assert_all_close(
        "after 5 steps",
        {**tree["params"], **tree["batch_stats"]},
        torch_oracle.state_dict(network),
        FLOAT64_NETWORK,
    )
    for field, theirs in (("mu", "exp_avg"), ("nu", "exp_avg_sq")):
        moments = {name: optimizer.state[p][theirs] for name, p in network.named_parameters()}
        assert_all_close(field, tree["optimizer"][field], moments, FLOAT64_NETWORK)
    assert tree["optimizer"]["count"] == tree["step"] == 5


def flat_state(state: Any) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def test_the_state_that_went_in_is_donated():
    engine: Any = make_engine()
    engine._strategy = engine.whole()  # the blockwise strategy keeps the counters: tests/test_blockwise.py
    old = engine.init()
    for new, _ in engine.train(old, make_batches(3)):
        kept = [name for name, leaf in flat_state(old).items() if not leaf.is_deleted()]
        assert not kept, f"not donated: {kept}"
        assert not any(leaf.is_deleted() for leaf in flat_state(new).values())
        old = new


def test_a_tree_is_a_copy_that_outlives_the_state():
    engine = shared()
    state, _ = train(engine, engine.init(), make_batches(1))
    tree = engine.to_tree(state)
    before = {name: np.array(value) for name, value in flat(tree).items()}
    assert all(value.flags.owndata and value.flags.writeable for value in flat(tree).values())
    addresses = {leaf.unsafe_buffer_pointer() for leaf in flat_state(state).values()}
    assert addresses.isdisjoint(value.ctypes.data for value in flat(tree).values())
    train(engine, state, make_batches(3, seed=1))
    assert_same_bits(flat(tree), before)


def test_a_state_is_a_copy_of_its_tree():
    """Donating the state must not write into the arrays of whoever holds the tree."""
    engine = shared()
    tree = engine.to_tree(engine.init())
    before = {name: np.array(value) for name, value in flat(tree).items()}
    train(engine, engine.from_tree(tree), make_batches(2))
    assert_same_bits(flat(tree), before)


@pytest.mark.gpu
def test_metrics_stay_on_the_device(accelerator):
    """On a GPU the guard also raises at any copy to the host that the loop would make."""
    engine = make_engine("cnn", precision="float32")
    steps = engine.train(engine.init(), make_batches(3))
    next(steps)
    with jax.transfer_guard_device_to_host("disallow"):
        for _, metrics in steps:
            label = metrics.pop("label")
            assert isinstance(label, np.ndarray)  # the batch's own: it was never anywhere else
            assert set(metrics) == {"loss", "logits", "grad_norm", "update_norm"}
            for name, value in metrics.items():
                assert isinstance(value, jax.Array), name
                assert value.devices() == {accelerator}, name


@pytest.mark.parametrize(("model", "optimizer"), [("resnet18", "adam"), ("cnn", "adabound")])
def test_one_program_serves_every_step(caplog, model, optimizer):
    engine = shared(model, optimizer)
    batches = make_batches(4)
    state, _ = train(engine, engine.init(), batches[:1])
    tree = engine.to_tree(state)
    with jax.log_compiles():
        train(engine, state, batches[1:])
        assert not compiled(caplog), "the second step compiled something"
        state = engine.from_tree(tree)
        caplog.clear()
        train(engine, state, batches[1:])
        assert not compiled(caplog), "a resumed run compiles another program than a fresh one"


def compiled(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if text.startswith("Compiling")]


def test_log_compiles_tells_of_compilations(caplog):
    """The test above sees what it looks for."""
    with jax.log_compiles():
        train(make_engine("cnn"), make_engine("cnn").init(), make_batches(1))
    assert any("train_step" in text for text in compiled(caplog)), caplog.messages


def test_the_step_is_traced_once(monkeypatch):
    traces = []

    def counted(*args):
        traces.append(args)
        return apply(*args)

    monkeypatch.setattr("jax_resnet.step.apply", counted)
    engine = make_engine("cnn")
    state, _ = train(engine, engine.init(), make_batches(3))
    assert len(traces) == 1
    batches = [*make_batches(2), *make_batches(1, size=3)]
    assert [len(logits) for logits in engine.evaluate(state, batches)] == [8, 8, 3]
    assert len(traces) == 2  # the last batch is filled up
    train(engine, engine.from_tree(engine.to_tree(state)), make_batches(2))
    assert len(traces) == 2


@pytest.mark.parametrize("model", sorted(THIN))
def test_a_tree_has_the_names_and_layout_of_the_state_dict(model):
    engine = shared(model)
    tree = engine.to_tree(engine.init())
    expected = torch_oracle.state_dict(oracle(model, tree))
    statistics = {name for name in expected if name.endswith(("running_mean", "running_var"))}
    assert set(tree) == {"params", "batch_stats", "optimizer", "step"}
    assert set(tree["params"]) == set(expected) - statistics
    assert set(tree["batch_stats"]) == statistics
    for name, array in {**tree["params"], **tree["batch_stats"]}.items():
        assert (array.shape, array.dtype) == (expected[name].shape, np.float64), name
    for moment in ("mu", "nu"):
        shapes = {name: array.shape for name, array in tree["optimizer"][moment].items()}
        assert shapes == {name: array.shape for name, array in tree["params"].items()}
    assert all(type(value) is np.ndarray for value in flat(tree).values())


@pytest.mark.parametrize(("model", "optimizer"), [("resnet18", "adam"), *(("cnn", name) for name in FIELDS)])
def test_from_tree_undoes_to_tree(model, optimizer):
    engine = shared(model, optimizer)
    batches = make_batches(4)
    state, _ = train(engine, engine.init(), batches[:2])
    tree = engine.to_tree(state)
    assert set(tree["optimizer"]) == FIELDS[optimizer]
    for field in FIELDS[optimizer] - {"count"}:
        assert any(np.abs(array).max() > 0 for array in tree["optimizer"][field].values()), field
    restored = engine.from_tree(tree)
    assert flat_state(restored).keys() == flat_state(state).keys()
    assert_same_bits(engine.to_tree(restored), tree)

    end, metrics = train(engine, state, batches[2:])
    other, others = train(engine, restored, batches[2:])
    assert_same_bits(engine.to_tree(other), engine.to_tree(end))
    for one, two in zip(metrics, others, strict=True):
        assert_same_bits(two, one)


@pytest.mark.parametrize("optimizer", FIELDS)
def test_an_optimizer_begins_as_optax_begins_it(optimizer):
    engine = shared("cnn", optimizer)
    state = engine.init()
    with jax.enable_x64(True):
        made = make_optimizer(optimizer, 1e-3, base_lr=1e-3).init(state.params)
    # Raises where the two are not of the same structure
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), state.opt_state, made)


def test_to_begin_compiles_nothing_of_the_size_of_the_network(caplog):
    with jax.log_compiles():
        make_engine("resnet20").init()
    assert len(compiled(caplog)) <= 3, compiled(caplog)


def test_the_seed_alone_decides_how_a_run_begins():
    first, again, other = (
        engine.to_tree(engine.init())
        for engine in (make_engine(seed=3), make_engine(seed=3), make_engine(seed=4))
    )
    assert_same_bits(again, first)
    engine = make_engine(seed=3)
    engine.init()
    assert_same_bits(engine.to_tree(engine.init()), first)
    assert (other["params"]["conv1.weight"] != first["params"]["conv1.weight"]).all()


def split(batch: dict[str, np.ndarray], size: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(batch["image"]), size):
        yield {name: value[start : start + size] for name, value in batch.items()}


@pytest.mark.parametrize("model", ["resnet18", "cnn"])
def test_evaluation_gives_every_image_its_logits_whatever_the_batch(model):
    engine = shared(model)
    state, _ = train(engine, engine.init(), make_batches(3))
    (images,) = make_batches(1, size=11, seed=1)
    network = oracle(model, engine.to_tree(state)).eval()
    with torch.no_grad():
        expected = network(torch.from_numpy(nchw(images["image"]))).numpy()
    for size in (11, 4, 1) if model == "cnn" else (11, 4):
        logits = list(engine.evaluate(state, split(images, size)))
        assert [len(part) for part in logits] == [len(part["image"]) for part in split(images, size)]
        assert_close(f"batches of {size}", np.concatenate(logits), expected, FLOAT64_LAYER)
    first, *_ = split(images, 4)
    _, larger = engine.evaluate(state, [first, images])
    assert_close("a batch larger than the first", larger, expected, FLOAT64_LAYER)
    assert not any(leaf.is_deleted() for leaf in flat_state(state).values())


def test_evaluation_changes_nothing():
    engine = shared()
    state, _ = train(engine, engine.init(), make_batches(1))
    tree = engine.to_tree(state)
    list(engine.evaluate(state, make_batches(2)))
    assert_same_bits(engine.to_tree(state), tree)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_nonfinite_step_is_noticed_and_kept(value):
    engine = shared()
    batches = make_batches(5)
    batches[2]["image"][3, 5, 5, 1] = value
    found = []
    for state, _ in engine.train(engine.init(), batches):
        found.append(engine.first_nonfinite_step(state))
    assert found == [None, None, 3, 3, 3]


def test_steps_of_a_resumed_run_that_are_bad_have_the_number_of_the_whole_run():
    engine = make_engine("cnn")
    state, _ = train(engine, engine.init(), make_batches(2))
    bad = make_batches(2)
    bad[1]["image"][:] = np.nan
    state, _ = train(engine, engine.from_tree(engine.to_tree(state)), bad)
    assert engine.first_nonfinite_step(state) == 4


def test_a_gradient_that_is_not_finite_is_bad_though_the_loss_is():
    engine = make_engine("cnn", precision="float32")
    (batch,) = make_batches(1)
    batch["image"] = (batch["image"] * 1e30).astype(np.float32)
    state, (metrics,) = train(engine, engine.init(), [batch])
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert engine.first_nonfinite_step(state) == 1


def test_bfloat16_computes_in_it_and_keeps_its_state_in_float32():
    one_stage = {"width": 4, "stage_sizes": (1,)}
    engines = [make_engine(precision=each, model_options=one_stage) for each in ("bfloat16", "float32")]
    batches = make_batches(3)
    (state, metrics), (_, expected) = (train(engine, engine.init(), batches) for engine in engines)
    counters = {".step", ".first_nonfinite_step"}
    for name, leaf in flat_state(state).items():
        assert leaf.dtype == (jnp.int32 if name in counters or name.endswith("count") else jnp.float32), name
    assert all(found[name].dtype == np.float32 for found in metrics for name in found if name != "label")
    losses, wanted = ([step["loss"] for step in steps] for steps in (metrics, expected))
    assert losses != wanted
    assert_close("losses", losses, wanted, BFLOAT16_NETWORK)
    tree = engines[0].to_tree(state)
    assert_same_bits(engines[1].to_tree(engines[1].from_tree(tree)), tree)


def test_images_of_uint8_are_normalized_as_the_mean_and_deviation_say():
    engine = shared("cnn")
    pixels = np.random.default_rng(0).integers(256, size=(3, 8, *SHAPE), dtype=np.uint8)
    raw = [{**batch, "image": image} for batch, image in zip(make_batches(3), pixels, strict=True)]
    ready = [{**batch, "image": (batch["image"] / 255 - np.array(MEAN)) / np.array(STD)} for batch in raw]
    (state, metrics), (other, expected) = (train(engine, engine.init(), batches) for batches in (raw, ready))
    for found, wanted in zip(metrics, expected, strict=True):
        assert_all_close("metrics", found, wanted, FLOAT64_NETWORK)
    (logits, *_), (wanted_logits, *_) = engine.evaluate(state, raw), engine.evaluate(other, ready)
    assert_close("evaluation", logits, wanted_logits, FLOAT64_NETWORK)


ON_DEVICES = """
import sys, jax, numpy
from tests.helpers.jax_engine import train_on_devices
path, devices = sys.argv[1:]
assert jax.device_count() == int(devices), jax.devices()
numpy.savez(path, **train_on_devices())
"""


def test_any_number_of_devices_trains_alike_and_continues_on_another(tmp_path):
    """Batch norm sees the whole batch or micro-batch, of which each of 8 devices has a single image."""
    processes = {}
    for devices in (2, 8):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        processes[devices] = subprocess.Popen(
            [sys.executable, "-c", ON_DEVICES, str(tmp_path / f"{devices}.npz"), str(devices)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        )
    one = train_on_devices()
    found = {}
    for devices, process in processes.items():
        assert process.wait(timeout=600) == 0
        found[devices] = dict(np.load(tmp_path / f"{devices}.npz"))
        assert_all_close(f"{devices} devices", found[devices], one, FLOAT64_DEVICES)
    assert (found[8]["losses"] != one["losses"]).any()  # they did sum in another order

    engine = shared()
    tree = nested(
        {
            name: value
            for name, value in found[8].items()
            if name not in ("losses", "logits", "parts", "norms", "averages")
        }
    )
    _, metrics = train(engine, engine.from_tree(tree), make_batches(20)[10:])
    losses = [step["loss"] for step in metrics]
    assert_close("begun on 8 devices", losses, one["losses"][10:], FLOAT64_DEVICES)
