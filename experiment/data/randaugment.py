"""RandAugment: operations drawn from a list, all at one strength, on uint8 images.

Cubuk et al. 2019, "RandAugment: Practical automated data augmentation with a reduced search space", arXiv
1909.13719. The list and the ranges are those of torchvision (`transforms.RandAugment`, 31 magnitudes), the
operations Pillow's, as for AutoAugment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiment.data.autoaugment import Color, apply

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color"),
    *("Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
ENHANCEMENTS = ("Brightness", "Color", "Contrast", "Sharpness")
MOST = 30
"""The largest magnitude: shear by 0.3, shift by 150/331 of the side, turn by 30 degrees, enhance by the
factor 0.1 or 1.9, posterize to 4 bits, solarize from 0."""

TRANSLATION = 150 / 331


def randaugment(image: Image, count: int, magnitude: int, fill: Color, rng: np.random.Generator) -> Image:
    """Apply `count` operations, each drawn from all with equal probability, at one magnitude.

    Shear, shift, turn and enhancement go either way with probability 1/2.

    Args:
        image: of mode `L` or `RGB`.
        count: N in the paper.
        magnitude: M, 0 to 30.
        fill: the color of what comes from outside of the image. torchvision's default is black.
        rng: gives two numbers for each operation.
    """
    for _ in range(count):
        name = OPERATIONS[int(rng.random() * len(OPERATIONS))]
        image = operate(name, image, magnitude, bool(rng.random() < 0.5), fill)
    return image


def operate(name: str, image: Image, magnitude: int, backwards: bool, fill: Color) -> Image:
    """Apply one operation at a magnitude of 0 to 30, the other way if `backwards`.

    An enhancement at magnitude M is by the factor 1 + 0.9 M / 30 or 1 - 0.9 M / 30. Solarizing inverts pixels
    from 255 (1 - M / 30) up, posterizing leaves 8 - 4 M / 30 bits, rounded.
    """
    from PIL import ImageOps

    strength = magnitude / MOST
    if name == "Identity":
        return image
    if name == "Solarize":
        return ImageOps.solarize(image, round(255 * (1 - strength)))
    if name in ENHANCEMENTS:  # whose range in AutoAugment begins at 0.1, and has 1 in its middle
        strength = 0.5 - strength / 2 if backwards else 0.5 + strength / 2
    return apply(name, image, strength, backwards, TRANSLATION, fill)
