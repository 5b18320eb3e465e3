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


def oracle_step(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, mean: Any, std: Any
) -> float:
    """A step as in any tutorial of PyTorch's; its loss."""
    image = nchw((batch["image"] / 255 - np.array(mean)) / np.array(std))
    loss = F.cross_entropy(network(torch.from_numpy(image)), torch.from_numpy(batch["label"]).long())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def oracle_steps(
    network: torch.nn.Module, batches: Sequence[Batch], mean: Any, std: Any
) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
    """He et al.'s recipe: the losses, and the state dict after."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    losses = np.array([oracle_step(network, optimizer, batch, mean, std) for batch in batches])
    return losses, torch_oracle.state_dict(network)


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


def oracle_tree(network: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """Where PyTorch stands, as a checkpoint tree."""
    state = {name: np.array(array) for name, array in torch_oracle.state_dict(network).items()}
    parameters = dict(network.named_parameters())
    trace = {
        name: optimizer.state[p]["momentum_buffer"].numpy().copy() if step else np.zeros_like(state[name])
        for name, p in parameters.items()
    }
    return {
        "params": {name: state[name] for name in parameters},
        "batch_stats": {name: array for name, array in state.items() if name not in parameters},
        "optimizer": {"trace": trace},
        "step": np.array(step, np.int32),
    }


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "numpy"])
def test_each_of_fifty_steps_of_the_recipe(data_dir, monkeypatch, framework):
    """ResNet-20 itself, on the first batches of CIFAR-10 as the recipe changes them.

    Each step begins where PyTorch stands. Left alone for 50 steps at a rate of 0.1 no two runs stay together:
    with the last bit of one weight changed, the losses of PyTorch itself are apart by 2e-15 after 5 steps,
    5e-10 after 11 and 1e-3 after 20.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of NumPy's processes: each step begins anew
    config = recipe("--data-dir", str(data_dir), "--framework", framework)
    data = experiment.data.load(config.dataset, **config.data_options())
    resolved = {"optimizer_options": config.optimizer_options(), "schedule_steps": 64000, "warmup_steps": 0}
    engine: Any = train.make_engine(config, data, resolved)
    first = engine.to_tree(engine.init())
    network = torch_oracle.resnet20(10, 3).double().train()
    torch_oracle.load_state_dict(network, {**first["params"], **first["batch_stats"]})
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for step, batch in enumerate(islice(data.train_batches(0), STEPS)):
        before = oracle_tree(network, optimizer, step)
        state, (metrics,) = take_steps(engine, engine.from_tree(before), [batch])
        loss = oracle_step(network, optimizer, batch, data.mean, data.std)
        assert_close(f"loss of step {step}", metrics["loss"], loss, FLOAT64_RECIPE)
        found, expected = engine.to_tree(state), oracle_tree(network, optimizer, step + 1)
        for part in ("params", "batch_stats"):
            assert_all_close(f"{part} after step {step}", found[part], expected[part], FLOAT64_RECIPE)
        trace = found["optimizer"]["trace"], expected["optimizer"]["trace"]
        assert_all_close(f"momentum after step {step}", *trace, FLOAT64_RECIPE)
    assert step == STEPS - 1
