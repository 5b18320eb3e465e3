"""How training steps are compiled and called. `Engine` holds one strategy, which it chooses.

whole.py        one step, one compiled function: the plain form, and the fallback
chunked.py      several steps in one call of a compiled function: GPUs
blockwise.py    one step as per-block compiled functions: a single CPU device
accumulate.py   the gradient of a batch from micro-batches: a CPU's own, or inside other steps
vmapped.py      the steps of several engines in one compiled function: the seeds of a study
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jax_resnet.state import TrainState
from jax_resnet.step import Batch, Metrics


class Strategy(Protocol):
    """Takes training steps.

    Attributes:
        max_steps: the most steps that one call takes.
    """

    max_steps: int

    def run(
        self, state: TrainState, batches: Sequence[Batch], lrs: np.ndarray
    ) -> tuple[TrainState, list[Metrics]]:
        """Take a step for each of up to `max_steps` batches, with learning rates `lrs`.

        Returns the state after the last step, and {"loss", "logits", "label", ...} of every step. The
        parameters and moments of the state that went in are gone (donated).
        """
