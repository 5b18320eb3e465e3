"""A labeled set: correct ports of small PyTorch models to JAX, and faulty ones with what is wrong in them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from tests.ports.case import Fault, Port

MODELS = (
    "cnn",
    "resnet_cifar",
    "bottleneck",
    "preact",
    "squeeze",
    "group_norm",
    "depthwise",
    "unet",
    "mixer",
    "transformer",
    "lstm",
    "gru",
)


def all_ports() -> Iterator[Port]:
    """The correct ports."""
    for model in MODELS:
        yield from importlib.import_module(f"tests.ports.{model}").PORTS


def all_faults() -> Iterator[Fault]:
    """The faults, each with its label."""
    for model in MODELS:
        yield from importlib.import_module(f"tests.ports.{model}").FAULTS
