"""Several steps in one call of a compiled function, images held on the device: the same bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import experiment.data.loading
from experiment.commands import train
from experiment.data.augmentation import Augmentation, fit_image
from experiment.data.builtin import ArraySource
from jax_resnet import Engine, engine
from jax_resnet.strategies.chunked import gather_images
from tests.helpers.comparing import assert_all_close, assert_close
from tests.helpers.jax_engine import assert_same_bits, learning_rate, make_batches, make_engine
from tests.helpers.runs import Run
from tests.tolerances import FLOAT64_NETWORK


def steps(engine, batches, needs_state):
    """Losses, whether there was a state after each step, and the tree at the end."""
    losses, states = [], []
    for state, metrics in engine.train(engine.init(), batches, needs_state):
        losses.append(float(metrics["loss"]))
        assert np.asarray(metrics["logits"]).shape == (8, 5)
        states.append(state)
    return losses, [state is not None for state in states], engine.to_tree(states[-1])


def test_chunks_end_where_the_caller_pauses_and_change_no_bit():
    batches = make_batches(7)
    one, each, tree = steps(make_engine("cnn", chunk=1), batches, lambda step: True)
    engine: Any = make_engine("cnn", chunk=3)
    losses, states, found = steps(engine, batches, lambda step: step == 4)
    assert each == [True] * 7
    assert states == [False, False, True, True, False, False, True]
    assert_close("losses", losses, one, FLOAT64_NETWORK)
    assert_all_close("parameters", found["params"], tree["params"], FLOAT64_NETWORK)
    others, states, same = steps(engine, batches, lambda step: step in (1, 6))
    assert states == [True, False, False, True, False, True, True]
    assert others == losses
    assert_same_bits(same, found)
    assert engine._strategy.compiled._cache_size() == 1  # chunks of 1, 2 and 3


@pytest.mark.parametrize("name", ["none", "crop-flip"])
@pytest.mark.parametrize("shape", [(32, 32, 3), (33, 40, 1)])
def test_images_made_on_the_device_are_those_of_the_host(name, shape):
    pixels = np.random.default_rng(0).integers(256, size=(20, *shape), dtype=np.uint8)
    source = ArraySource(pixels, np.arange(20, dtype=np.int32), partial(fit_image, size=shape[:2]))
    fill = (7, 8, 9)[: shape[2]]
    augmentation = Augmentation(name, 3, shape[:2], None, fill)
    examples = np.random.default_rng(1).permutation(20)
    expected = augmentation.batch(source, examples, 5)["image"]
    draws = augmentation.draws(examples, 5)
    assert (len(np.unique(draws["shift"])) > 3) == (name != "none")
    found = gather_images(pixels, np.array(fill, np.uint8), {"index": examples, **draws})
    assert np.asarray(found).dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_what_is_drawn_is_what_the_batches_are_made_of():
    data = experiment.data.loading.load("digits", data_dir=None, batch_size=32, seed=1, augment="crop-flip")
    held = data.held()
    assert held is not None
    for step, (drawn, batch) in enumerate(
        zip(data.train_draws(held["label"], 38), data.train_batches(38), strict=False)
    ):
        image = gather_images(held["image"], np.array(data.augmentation.fill, np.uint8), drawn)
        np.testing.assert_array_equal(image, batch["image"])
        np.testing.assert_array_equal(drawn["label"], batch["label"])
        if step == 4:  # into the next epoch
            break


def test_what_a_device_does_not_do_is_left_to_the_host():
    options: dict[str, Any] = {"data_dir": None, "batch_size": 32, "seed": 1}
    assert experiment.data.loading.load("synthetic", augment="autoaugment", **options).held() is None
    ranged = experiment.data.loading.load("synthetic", augment="crop-flip", resize=(40, 50), **options)
    assert ranged.held() is None


def test_a_run_with_images_on_the_device_is_the_run_without(tmp_path, monkeypatch):
    flags = ["--model", "cnn", "--train-subset", "0.1", "--batch-size", "16", "--augment", "crop-flip"]
    flags += ["--precision", "float64", "--eval-every", "5", "--checkpoint-every", "6", "--log-every", "4"]
    flags += ["--no-report"]
    assert train.main([*flags, "--steps", "20", "--run-dir", str(tmp_path / "host")]) == 0
    monkeypatch.setattr(engine, "best_chunk", lambda: 10)
    monkeypatch.setattr(Engine, "holds_images", True)
    for folder, steps in (("device", "20"), ("stopped", "7")):
        more = ["--schedule-steps", "20", "--steps", steps, "--run-dir", str(tmp_path / folder)]
        assert train.main([*flags, *more]) == 0
    assert train.main(["--resume", "--steps", "20", "--run-dir", str(tmp_path / "stopped")]) == 0
    host, device, stopped = (Run(tmp_path / name) for name in ("host", "device", "stopped"))
    losses = [[line["loss"] for line in run.lines("train", "step")] for run in (host, device)]
    assert_close("losses", losses[1], losses[0], FLOAT64_NETWORK)
    assert device.checkpoints == host.checkpoints
    assert stopped.content("weights.safetensors") == device.content("weights.safetensors")


def test_the_rates_of_a_chunk_are_those_of_its_steps():
    asked: list[int] = []

    def rate(step: int) -> float:
        asked.append(step)
        return learning_rate(step)

    engine = make_engine("cnn", chunk=4, learning_rate=rate)
    asked.clear()
    steps(engine, make_batches(6), lambda step: False)
    assert sorted(set(asked)) == list(range(6))
