"""Hooks before each batch that a run reads, and signals sent there."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import experiment.data.loading
from tests.helpers.runs import patch_data

Hook = Callable[[str, int, int], None]


def hook_data(patch: pytest.MonkeyPatch, hook: Hook) -> None:
    """Have `hook` called before each batch that a run reads from here on."""

    class Hooked(experiment.data.loading.Data):
        def train_batches(self, start_step: int = 0) -> Iterator[Any]:
            return self.hooked("train", 0, super().train_batches(start_step), start_step)

        def eval_batches(self, split: Any, batch_size: int) -> Iterator[Any]:
            begun[split] = begun.get(split, -1) + 1
            return self.hooked(split, begun[split], super().eval_batches(split, batch_size), 0)

        def hooked(self, part: str, time: int, batches: Iterator[Any], first: int) -> Iterator[Any]:
            for number, batch in enumerate(batches, first):
                hook(part, time, number)
                yield batch

    begun: dict[str, int] = {}
    fields = dataclasses.fields(experiment.data.loading.Data)
    patch_data(patch, lambda data: Hooked(**{field.name: getattr(data, field.name) for field in fields}))


def send(number: signal.Signals, at: tuple[str, int, int]) -> Hook:
    """A hook that sends this process a signal before one batch."""

    def hook(*place: Any) -> None:
        if place == at:
            signal.raise_signal(number)

    return hook
