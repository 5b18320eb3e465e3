"""The CIFAR-10 recipe in both engines and in PyTorch: 50 steps from the same weights, on the same batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import experiment.data
import jax_resnet
import numpy_ref
import torch_oracle
import train
from experiment.config import Config, parse, resolve
from experiment.engines import Batch
from experiment.recipes import with_recipe
from tests.comparing import assert_all_close, assert_close, nchw
from tests.test_loop import train as take_steps
from tests.tolerances import FLOAT64_RECIPE

STEPS = 50


def recipe(*argv: str) -> Config:
    return resolve(with_recipe(parse(["--recipe", "cifar10-resnet20", "--precision", "float64", *argv])))


def oracle_steps(
    network: torch.nn.Module, batches: Sequence[Batch], mean: Any, std: Any
) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
    """He et al.'s recipe as in any tutorial of PyTorch's: the losses, and the state dict after."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    losses = []
    for batch in batches:
        image = nchw((batch["image"] / 255 - np.array(mean)) / np.array(std))
        loss = F.cross_entropy(network(torch.from_numpy(image)), torch.from_numpy(batch["label"]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), torch_oracle.state_dict(network)


def check_engines(config: Config, data: Any, batches: Sequence[Batch], network: torch.nn.Module) -> None:
    """Train all three and compare."""
    weights: Any = None
    resolved = {"optimizer_options": config.optimizer_options(), "schedule_steps": 64000, "warmup_steps": 0}
    found = {}
    for framework in ("jax", "numpy"):
        each = dataclasses.replace(config, framework=framework)
        engine = train.make_engine(each, data, resolved)
        state = engine.init()
        tree = engine.to_tree(state)
        weights = {**tree["params"], **tree["batch_stats"]}
        state, metrics = take_steps(engine, state, batches)
        tree = engine.to_tree(state)
        losses = np.array([step["loss"] for step in metrics])
        found[framework] = losses, {**tree["params"], **tree["batch_stats"]}
    torch_oracle.load_state_dict(network, weights)
    expected, state_dict = oracle_steps(network, batches, data.mean, data.std)
    assert len(expected) == STEPS
    assert expected[-10:].mean() < 0.95 * expected[:10].mean()  # it learns
    for framework, (losses, after) in found.items():
        for step in range(STEPS):
            assert_close(f"{framework}, loss of step {step}", losses[step], expected[step], FLOAT64_RECIPE)
        assert_all_close(f"{framework}, after {STEPS} steps", after, state_dict, FLOAT64_RECIPE)


class MadeData:
    """Pictures of ten classes, each a pattern of its own under noise."""

    num_classes, image_shape = 10, (16, 16, 3)
    mean, std = (0.5, 0.45, 0.4), (1.0, 1.0, 1.0)

    def batches(self, size: int) -> list[Batch]:
        rng = np.random.default_rng(0)
        patterns = rng.integers(256, size=(10, *self.image_shape))
        labels = rng.integers(10, size=(STEPS, size)).astype(np.int32)
        noise = rng.integers(256, size=(STEPS, size, *self.image_shape))
        images = ((patterns[labels] + 2 * noise) // 3).astype(np.uint8)
        return [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]


def test_fifty_steps_of_the_recipe_thin(monkeypatch):
    """Its optimizer, batch and network, but three blocks of a quarter of the width, and smaller pictures."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for module in (jax_resnet.resnet, numpy_ref.resnet):
        monkeypatch.setitem(module.MODELS, "resnet20", partial(module.resnet_cifar, 1, width=4))
    config, data = recipe(), MadeData()
    assert (config.batch_size, config.augment) == (128, "crop-flip")
    network = torch_oracle.resnet_cifar(1, 10, 3, width=4).double()
    check_engines(config, data, data.batches(config.batch_size), network)


@pytest.mark.slow
def test_fifty_steps_of_the_recipe(data_dir):
    """ResNet-20 itself, on the first 50 batches of CIFAR-10 as the recipe changes them."""
    config = recipe("--data-dir", str(data_dir))
    data = experiment.data.load(config.dataset, **config.data_options())
    batches = list(islice(data.train_batches(0), STEPS))
    check_engines(config, data, batches, torch_oracle.resnet20(10, 3).double())
