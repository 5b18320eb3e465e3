"""Memory of the JAX engine: accumulation and rematerialization need less, and freed memory is reused."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import torch_oracle
from experiment.commands import train as command
from experiment.run.completed_run import open_run
from jax_resnet.strategies.accumulate import Accumulated
from tests.helpers.comparing import assert_all_close, assert_close, nchw, quick_jit
from tests.helpers.jax_engine import THIN, flat, learning_rate, make_batches, make_engine, oracle, train
from tests.helpers.runs import highest_precision
from tests.tolerances import FLOAT64_NETWORK

__all__ = ["highest_precision"]  # the fixture, for every test here

WITHOUT = {"model_options": {**THIN["resnet18"], "batch_norm": False}}


def quick_engine(model: str = "resnet18", **options: Any) -> Any:
    """An engine whose step is compiled in half the time."""
    engine: Any = make_engine(model, **options)
    engine._strategy = engine.whole()
    shardings = engine._placement.replicated
    engine._strategy.compiled = quick_jit(engine._step, donate_argnums=0, out_shardings=shardings)
    return engine


def temporary_bytes(engine: Any, batch: dict[str, np.ndarray]) -> int:
    """What the compiled training step needs beside its arguments and results."""
    with engine._precision():
        placed = engine._placement.shard_batch(batch)
        step = engine._strategy.compiled.lower(engine.init(), placed, np.float64(0.1)).compile()
    analysis = step.memory_analysis()
    assert analysis is not None
    return int(analysis.temp_size_in_bytes)


@pytest.mark.parametrize(("model", "accumulate"), [("resnet18", 2), ("cnn", 8)])
def test_without_batch_norm_micro_batches_are_the_whole_batch(model, accumulate):
    options: dict[str, Any] = WITHOUT if model == "resnet18" else {}
    batches = make_batches(4)
    whole, parts = quick_engine(model, **options), quick_engine(model, accumulate=accumulate, **options)
    (state, metrics), (other, found) = (train(engine, engine.init(), batches) for engine in (whole, parts))
    for step, wanted in zip(found, metrics, strict=True):
        assert_all_close("metrics", step, wanted, FLOAT64_NETWORK)  # the logits in the order of the batch
    assert_all_close("tree", flat(parts.to_tree(other)), flat(whole.to_tree(state)), FLOAT64_NETWORK)


def test_the_update_of_128_images_is_that_of_4_times_32():
    """Of plain gradient descent: Adam's first step is nearly the gradient's sign, and would hide a factor."""
    options: dict[str, Any] = {**WITHOUT, "optimizer": "sgd"}
    trees = []
    for accumulate in (1, 4):
        engine = quick_engine(**options, accumulate=accumulate)
        state, _ = train(engine, engine.init(), make_batches(1, size=128))
        trees.append(engine.to_tree(state)["optimizer"]["trace"])
    assert_all_close("update", trees[1], trees[0], 1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"freeze_backbone": True}, {"log_gradients": True, "ema_decay": 0.9}]
)
def test_micro_batches_one_by_one_are_those_of_the_loop(options: dict[str, Any]) -> None:
    """On a CPU each is a call of a compiled function; elsewhere they are a loop in one."""
    batches = make_batches(2)
    engines = [
        make_engine("resnet8", accumulate=4, **options),
        quick_engine("resnet8", accumulate=4, **options),
    ]
    assert isinstance(engines[0]._strategy, Accumulated)
    (state, metrics), (other, wanted) = (train(engine, engine.init(), batches) for engine in engines)
    for step, expected in zip(metrics, wanted, strict=True):
        assert_all_close("metrics", step, expected, FLOAT64_NETWORK)
    assert_all_close(
        "tree", flat(engines[0].to_tree(state)), flat(engines[1].to_tree(other)), FLOAT64_NETWORK
    )


def test_batch_norm_sees_micro_batches_as_in_a_loop_of_pytorchs():
    """The tutorials' loop: backward of each part's loss / k, then one step."""
    engine = quick_engine(accumulate=4)
    state, batches = engine.init(), make_batches(3)
    network = oracle("resnet18", engine.to_tree(state))
    optimizer = torch.optim.Adam(network.parameters())
    state, metrics = train(engine, state, batches)
    for step, (batch, found) in enumerate(zip(batches, metrics, strict=True)):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.zero_grad()
        losses = []
        for part in range(4):
            logits = network(torch.from_numpy(nchw(batch["image"][part::4])))
            loss = F.cross_entropy(logits, torch.from_numpy(batch["label"][part::4]).long())
            (loss / 4).backward()
            losses.append(loss.item())
            assert_close("logits", found["logits"][part::4], logits.detach(), FLOAT64_NETWORK)
        assert_close("loss", found["loss"], np.mean(losses), FLOAT64_NETWORK)
        optimizer.step()
    tree = engine.to_tree(state)
    after = {**tree["params"], **tree["batch_stats"]}
    assert_all_close("after 3 steps", after, torch_oracle.state_dict(network), FLOAT64_NETWORK)


def test_remat_changes_no_number():
    """In the loop over micro-batches too, whose program has all that the other has."""
    batches = make_batches(3)
    engines = [quick_engine(accumulate=4, remat=remat) for remat in (False, True)]
    (state, metrics), (other, found) = (train(engine, engine.init(), batches) for engine in engines)
    for step, wanted in zip(found, metrics, strict=True):
        assert_all_close("metrics", step, wanted, FLOAT64_NETWORK)
    assert_all_close(
        "tree", flat(engines[1].to_tree(other)), flat(engines[0].to_tree(state)), FLOAT64_NETWORK
    )


def test_the_compiled_step_needs_less_memory():
    """Five blocks of one shape: of them remat keeps the inputs, and accumulation an eighth."""
    options: dict[str, Any] = {"model_options": {"width": 4, "stage_sizes": (5,), "small_images": True}}
    (batch,) = make_batches(1, size=32)
    plain = temporary_bytes(quick_engine(**options), batch)
    assert temporary_bytes(quick_engine(remat=True, **options), batch) < 0.6 * plain
    assert temporary_bytes(quick_engine(accumulate=8, **options), batch) < 0.4 * plain


def test_a_run_in_micro_batches_is_opened_in_the_other_engine(tmp_path, monkeypatch):
    """Which has none, and refuses to go on with it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = ["--model", "cnn", "--train-subset", "0.1", "--steps", "1", "--accumulate", "2"]
    argv += ["--no-report"]
    assert command.main([*argv, "--run-dir", str(tmp_path / "run")]) == 0
    resume = ["--resume", "--run-dir", str(tmp_path / "run"), "--framework", "numpy"]
    assert command.main(resume) == 2
    (logits,) = open_run(tmp_path / "run", framework="numpy").logits([np.zeros((3, 32, 32, 1), np.uint8)])
    assert logits.shape == (3, 10)


PAGES = """
import itertools, resource
import numpy as np
from jax_resnet import Engine
engine = Engine(model="resnet8", model_options={}, num_classes=10, image_shape=(32, 32, 3),
                mean=(0,) * 3, std=(1,) * 3, optimizer="adam", optimizer_options={},
                learning_rate=lambda step: 1e-3)
batch = {"image": np.zeros((64, 32, 32, 3), np.float32), "label": np.arange(64) % 10}
steps = engine.train(engine.init(), itertools.repeat(batch))
pages = []
for _ in range(10):
    float(next(steps)[1]["grad_norm"])
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(np.diff(pages)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_step_with_large_maps_gets_no_new_memory():
    """The fewest page faults of ten steps. With malloc set up by the user, XLA's arrays are new ones."""
    without = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PAGES],
            env={**without, "JAX_PLATFORMS": "cpu", **chosen},
            stdout=subprocess.PIPE,
            text=True,
        )
        for chosen in ({}, {"MALLOC_TOP_PAD_": "131072"})
    ]
    reused, new = (int(process.communicate()[0]) for process in processes)
    assert reused < 1000 < 10_000 < new
