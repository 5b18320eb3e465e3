"""Runs of the training loop: what they leave in their folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy

import experiment.data.loading
from experiment.files.checkpoints import Checkpoints

# 130 images to train on, 14 to validate: eight steps an epoch. An evaluation batch that divides nothing.
SMALL = ["--model", "cnn", "--train-subset", "0.1", "--batch-size", "16", "--eval-batch-size", "77"]
SMALL += ["--no-report"]


@pytest.fixture(scope="module", autouse=True)
def highest_precision() -> Iterator[None]:
    """A GPU would multiply matrices in TF32."""
    with jax.default_matmul_precision("highest"):
        yield


class Run(NamedTuple):
    """What a run left in its folder."""

    folder: Path

    @property
    def config(self) -> Any:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def summary(self) -> Any:
        return json.loads((self.folder / "summary.json").read_text(), parse_constant=pytest.fail)

    def lines(self, split=None, scope=None) -> list[Any]:
        """The objects of metrics.jsonl."""
        text = (self.folder / "metrics.jsonl").read_text()
        lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
        return [line for line in lines if split in (None, line["split"]) and scope in (None, line["scope"])]

    def weights(self, name="weights") -> dict[str, np.ndarray]:
        return safetensors.numpy.load_file(self.folder / f"{name}.safetensors")

    def content(self, name) -> bytes:
        return (self.folder / name).read_bytes()

    @property
    def checkpoints(self) -> list[int]:
        return Checkpoints(self.folder / "checkpoints", 1).steps()


def patch_data(monkeypatch, change):
    """Every run from here on reads changed data."""
    load = experiment.data.loading.load
    monkeypatch.setattr(
        experiment.data.loading, "load", lambda *args, **kwargs: change(load(*args, **kwargs))
    )
