"""Stochastic depth: which residual branches of which examples a training step drops.

Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv 1603.09382. The networks take the result.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experiment.data.augmentation import generators

STREAM = 1  # of `generators`: the augmentation has stream 0


@dataclass(frozen=True)
class DropPath:
    """Drops branches at rates that increase linearly from the first block, of 0, to the last, of `rate`.

        p_l = rate * l / (L - 1),    l = 0, ..., L - 1

    timm's rule (`drop_path_rate`), and torchvision's StochasticDepth in mode "row": each example drops its
    own branches. A branch that is kept is multiplied by 1 / (1 - p_l), so that its mean is that of
    evaluation, in which nothing is dropped.

    Attributes:
        rate: of the last block, in [0, 1).
        blocks: L, the number of residual blocks.
        seed: the run's.
    """

    rate: float
    blocks: int
    seed: int

    def factors(self, examples: npt.NDArray[np.int64], epoch: int) -> npt.NDArray[np.float64]:
        """The factor of each branch, [N, L]: 0, or 1 / (1 - p_l).

        Each is a function of (seed, epoch, example, block) alone.
        """
        rates = np.linspace(0, self.rate, self.blocks)
        draws = [rng.random(self.blocks) for rng in generators(self.seed, epoch, examples, STREAM)]
        return np.where(np.stack(draws) < rates, 0, 1 / (1 - rates))
