"""Mixup and CutMix: each training image is mixed with another one, and its label with that one's.

Zhang et al. 2017, arXiv 1710.09412 (mixup); Yun et al. 2019, arXiv 1905.04899 (CutMix).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experiment.data.augmentation import generators
from experiment.data.types import Batch, Pixels, Size

STREAM = 2  # of `generators`: augmentation has 0, stochastic depth 1


@dataclass(frozen=True)
class Mixing:
    """Mixes every image of a batch with a partner from the whole training part.

    The partner, the share and the place are functions of (seed, epoch, example). They do not depend on the
    batch, on micro-batches or on the number of processes. torchvision and timm draw one share a batch, and
    mix each image with another of its batch.

        mixup:   image = lam * image + (1 - lam) * partner, rounded to uint8;    lam from Beta(alpha, alpha)
        CutMix:  a box of the partner in the image; lam is what is left of the image: 1 - the box' area / HW

    Attributes:
        mixup_alpha, cutmix_alpha: alpha of each; 0 is off. With both on, each image takes one of them with
            probability 1/2, as torchvision's recipe and timm do for a batch.
        seed: the run's.
    """

    mixup_alpha: float
    cutmix_alpha: float
    seed: int

    def batch(
        self,
        read: Callable[[npt.NDArray[np.int64]], Batch],
        part: npt.NDArray[np.int64],
        examples: npt.NDArray[np.int64],
        epoch: int,
    ) -> Batch:
        """Read the examples [N] and their partners, and mix them.

        Args:
            read: returns the augmented examples at indices [N]: {"image", "label"}.
            part: the indices of the training part, from which partners are drawn.
            examples: of the batch.
            epoch: from 0.

        Returns:
            {"image": uint8 [N, H, W, C], "label", "label2": int32 [N], "lam": float64 [N]}, where "label" has
            the share "lam" and "label2" the rest.
        """
        mates = np.empty_like(examples)
        drawn = []
        for i, rng in enumerate(generators(self.seed, epoch, examples, STREAM)):
            mates[i] = part[int(rng.random() * len(part))]
            drawn.append(self._draw(rng))
        batch, others = read(examples), read(mates)
        mixed = [
            mixup(image, other, lam) if place is None else cutmix(image, other, lam, place)
            for image, other, (lam, place) in zip(batch["image"], others["image"], drawn, strict=True)
        ]
        return {
            **batch,
            "image": np.stack([image for image, _ in mixed]),
            "label2": others["label"],
            "lam": np.array([lam for _, lam in mixed]),
        }

    def _draw(self, rng: np.random.Generator) -> tuple[float, tuple[float, float] | None]:
        """Draw the share, and for CutMix the center of the box on the scale 0..1."""
        chance = rng.random()
        if not self.cutmix_alpha or (self.mixup_alpha and chance < 0.5):
            return rng.beta(self.mixup_alpha, self.mixup_alpha), None
        lam = rng.beta(self.cutmix_alpha, self.cutmix_alpha)
        return lam, (rng.random(), rng.random())


def mixup(image: Pixels, other: Pixels, lam: float) -> tuple[Pixels, float]:
    """Return lam * image + (1 - lam) * other, rounded to uint8 (at most half a level off), and lam."""
    mixed: Pixels = np.rint(lam * image + (1 - lam) * other).astype(np.uint8)
    return mixed, lam


def cutmix(image: Pixels, other: Pixels, lam: float, center: tuple[float, float]) -> tuple[Pixels, float]:
    """Return the image with a box of the other in it, and the share of the image that is left.

    The box has the image's shape and 1 - lam of its area, and is cut where it reaches beyond the edge: so the
    share is at least lam.
    """
    top, left, bottom, right = box(image.shape[:2], lam, center)
    mixed = image.copy()
    mixed[top:bottom, left:right] = other[top:bottom, left:right]
    height, width = image.shape[:2]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def box(size: Size, lam: float, center: tuple[float, float]) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of CutMix' box: torchvision's rounding."""
    height, width = size
    row, column = int(center[0] * height), int(center[1] * width)
    half = 0.5 * np.sqrt(1 - lam)
    down, across = int(half * height), int(half * width)
    return max(row - down, 0), max(column - across, 0), min(row + down, height), min(column + across, width)
