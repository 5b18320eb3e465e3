"""The CIFAR-10 recipe in both engines and in PyTorch: the same weights, the same batches, step by step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import experiment.data.loading
import jax_resnet
import numpy_ref
import torch_oracle
from benchmarks import recipe_parity
from experiment.engines import Batch
from experiment.options.command_line import parse
from experiment.options.config import Config
from experiment.options.recipes import with_recipe
from experiment.options.resolving import resolve
from experiment.run.session import make_engine
from tests.helpers.comparing import assert_all_close, assert_close
from tests.helpers.jax_engine import train as take_steps
from tests.parity.recipe import Oracle
from tests.tolerances import FLOAT64_RECIPE, RECIPE_EPOCH

STEPS, THIN_STEPS = 50, 20


def recipe(*argv: str) -> Config:
    return resolve(with_recipe(parse(["--recipe", "cifar10-resnet20", "--precision", "float64", *argv])))


def check_engines(config: Config, data: Any, batches: Sequence[Batch], network: torch.nn.Module) -> None:
    """Train all three and compare."""
    first: Any = None
    resolved = {"optimizer_options": config.optimizer_options(), "schedule_steps": 64000, "warmup_steps": 0}
    found = {}
    for framework in ("jax", "numpy"):
        each = dataclasses.replace(config, framework=framework)
        engine = make_engine(each, data, resolved)
        state = engine.init()
        first = engine.to_tree(state)
        state, metrics = take_steps(engine, state, batches)
        tree = engine.to_tree(state)
        losses = np.array([step["loss"] for step in metrics])
        found[framework] = losses, {**tree["params"], **tree["batch_stats"]}
    oracle = Oracle(network, data.mean, data.std)
    _, metrics = take_steps(oracle, oracle.from_tree(first), batches)
    expected = np.array([step["loss"] for step in metrics])
    assert len(expected) == len(batches)
    assert expected[-5:].mean() < 0.95 * expected[:5].mean()  # it learns
    for framework, (losses, after) in found.items():
        for step in range(len(batches)):
            assert_close(f"{framework}, loss of step {step}", losses[step], expected[step], FLOAT64_RECIPE)
        what = f"{framework}, after {len(batches)} steps"
        assert_all_close(what, after, torch_oracle.state_dict(network), FLOAT64_RECIPE)


class MadeData:
    """Images of ten classes: a pattern for each class, and noise."""

    num_classes, image_shape = 10, (16, 16, 3)
    mean, std = (0.5, 0.45, 0.4), (1.0, 1.0, 1.0)

    def batches(self, size: int) -> list[Batch]:
        rng = np.random.default_rng(0)
        patterns = rng.integers(256, size=(10, *self.image_shape))
        labels = rng.integers(10, size=(THIN_STEPS, size)).astype(np.int32)
        noise = rng.integers(256, size=(THIN_STEPS, size, *self.image_shape))
        images = ((patterns[labels] + 2 * noise) // 3).astype(np.uint8)
        return [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]


@pytest.mark.slow
def test_steps_of_the_recipe_in_a_thin_network(monkeypatch):
    """Its optimizer, batch and network, but three blocks of a quarter of the width, and smaller images."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for module in (jax_resnet.resnet, numpy_ref.resnet):
        monkeypatch.setitem(module.MODELS, "resnet20", partial(module.resnet_cifar, 1, width=4))
    config, data = recipe(), MadeData()
    assert (config.batch_size, config.augment) == (128, "crop-flip")
    network = torch_oracle.resnet_cifar(1, 10, 3, width=4).double()
    check_engines(config, data, data.batches(config.batch_size), network)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "numpy"])
def test_each_of_fifty_steps_of_the_recipe(data_dir, monkeypatch, framework):
    """ResNet-20 itself, on the first batches of CIFAR-10 as the recipe changes them.

    Each step begins where PyTorch stands. Left alone for 50 steps at a rate of 0.1 no two runs stay together:
    with the last bit of one weight changed, the losses of PyTorch itself are apart by 2e-15 after 5 steps,
    5e-10 after 11 and 1e-3 after 20.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of NumPy's processes: each step begins again
    config = recipe("--data-dir", str(data_dir), "--framework", framework)
    data = experiment.data.loading.load(config.dataset, **config.data_options())
    resolved = {"optimizer_options": config.optimizer_options(), "schedule_steps": 64000, "warmup_steps": 0}
    engine: Any = make_engine(config, data, resolved)
    oracle = Oracle(torch_oracle.resnet20(10, 3).double(), data.mean, data.std)
    reached = oracle.from_tree(engine.to_tree(engine.init()))
    for step, batch in enumerate(itertools.islice(data.train_batches(0), STEPS)):
        state, (metrics,) = take_steps(engine, engine.from_tree(oracle.to_tree(reached)), [batch])
        reached, (wanted,) = take_steps(oracle, reached, [batch])
        assert_close(f"loss of step {step}", metrics["loss"], wanted["loss"], FLOAT64_RECIPE)
        found, expected = engine.to_tree(state), oracle.to_tree(reached)
        for part in ("params", "batch_stats"):
            assert_all_close(f"{part} after step {step}", found[part], expected[part], FLOAT64_RECIPE)
        trace = found["optimizer"]["trace"], expected["optimizer"]["trace"]
        assert_all_close(f"momentum after step {step}", *trace, FLOAT64_RECIPE)
    assert step == STEPS - 1


def test_an_epoch_begins_with_the_checkpoint_of_the_one_before(tmp_path: Path) -> None:
    """Two epochs at once end as one epoch and then, in a second call, the other."""
    flags = ["--dataset", "digits", "--train-subset", "0.1", "--model", "resnet8", "--batch-size", "32"]
    config = recipe_parity.recipe("", 0, *flags)
    for name in ("at-once", "in-turn"):
        (tmp_path / name).mkdir()
    at_once = recipe_parity.compare([config], 2, tmp_path / "at-once", ["numpy"])
    for epochs in (1, 2):
        in_turn = recipe_parity.compare([config], epochs, tmp_path / "in-turn", ["numpy"])
    assert [line["step"] for line in at_once] == [4, 8]
    assert [{**line, "seconds": 0} for line in in_turn] == [{**line, "seconds": 0} for line in at_once]


@pytest.mark.slow
def test_two_epochs_of_the_recipe(data_dir, tmp_path):
    """In float32, as users train: the mean loss and accuracy of each epoch, of 351 batches by the recipe."""
    configs = [recipe_parity.recipe(str(data_dir), seed=0)]
    lines = recipe_parity.compare(configs, 2, tmp_path, ("jax", "numpy", recipe_parity.REFERENCE))
    for framework, epoch, measure in itertools.product(("jax", "numpy"), (1, 2), ("loss", "accuracy")):
        (apart,) = recipe_parity.differences(lines, framework, epoch, measure)
        assert abs(apart) <= RECIPE_EPOCH, f"{framework}, {measure} of epoch {epoch}: {apart:+.2%}"
