"""The validations of a run, which its schedule and early stopping read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from experiment.run.schedules import has_converged


class ValidationHistory:
    """(step, loss) of the validations at multiples of `eval_every`, in order. The trainer adds to it.

    The validation after the last step of a run that was given more steps later is not at a multiple of
    eval_every. It is ignored: it must not change the rest.
    """

    def __init__(self, eval_every: int) -> None:
        self._eval_every = eval_every
        self._losses: list[tuple[int, float]] = []

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(self._losses)

    def add(self, step: int, loss: float) -> None:
        """Add the validation after `step`."""
        if step % self._eval_every == 0:
            self._losses.append((step, loss))

    def restore(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add the validations among the lines of metrics.jsonl."""
        for line in lines:
            if line["split"] == "val":
                self.add(line["step"], math.nan if line["loss"] is None else line["loss"])

    def has_converged(self, patience: int | None) -> bool:
        """True if early stopping with this patience ends the run; never without a patience."""
        return patience is not None and has_converged(list(self), patience)
