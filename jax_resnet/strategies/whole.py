"""One training step as one compiled function.

The plain strategy. It is chosen on several CPU devices, on a single one for what `Blockwise` lacks
(`freeze_backbone`, the CNN), and on a GPU with `chunk=1`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jax_resnet.placement import Placement
from jax_resnet.state import TrainState
from jax_resnet.step import Batch, Metrics, StepOutput


class Whole:
    """See the module.

    Attributes:
        compiled: the jitted step; its state is donated.
    """

    max_steps = 1

    def __init__(self, step: Callable[..., StepOutput], placement: Placement) -> None:
        self.placement = placement
        self.compiled = jax.jit(step, donate_argnums=0, out_shardings=placement.replicated)

    def run(
        self, state: TrainState, batches: Sequence[Batch], lrs: np.ndarray
    ) -> tuple[TrainState, list[Metrics]]:
        """As `Strategy.run`."""
        output = self.compiled(state, self.placement.shard_batch(batches[0]), lrs[0])
        return output.state, [output.log()]
