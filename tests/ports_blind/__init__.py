"""A second labeled set, of the same types, written without knowledge of the comparison that it scores."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from tests.ports.case import Fault, Port

MODELS = ("convnext", "vit", "residual", "encoder", "hourglass")


def all_ports() -> Iterator[Port]:
    """The correct ports."""
    for model in MODELS:
        yield from importlib.import_module(f"tests.ports_blind.{model}").PORTS


def all_faults() -> Iterator[Fault]:
    """The faults, each with its label."""
    for model in MODELS:
        yield from importlib.import_module(f"tests.ports_blind.{model}").FAULTS
