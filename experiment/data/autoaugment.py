"""AutoAugment: the policies that were found for CIFAR-10 and ImageNet, on uint8 images.

Cubuk et al. 2019, "AutoAugment: Learning Augmentation Strategies from Data", arXiv 1805.09501: Table 7
(CIFAR-10), Table 9 (ImageNet), Table 6 (operations and the ranges of their magnitudes). The operations are
Pillow's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Color = tuple[int, ...]

Step = tuple[str, float, int | None]
"""An operation, its probability, and its magnitude, 0 to 9, where it has one."""


@dataclass(frozen=True)
class Policy:
    """Sub-policies of two steps, of which each image gets one at random.

    Attributes:
        sub_policies: the table.
        translation: the largest shift, as a part of the side.
    """

    sub_policies: tuple[tuple[Step, Step], ...]
    translation: float


CIFAR10 = Policy(
    (
        (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
        (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
        (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
        (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
        (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
        (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
        (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
        (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
        (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
        (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
        (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
        (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
        (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
        (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
        (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
        (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
        (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
        (("Color", 0.9, 9), ("Equalize", 0.6, None)),
        (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
        (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
        (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
        (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
        (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
        (("Equalize", 0.8, None), ("Invert", 0.1, None)),
        (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
    ),
    translation=10 / 32,  # the authors' code for CIFAR-10: 10 pixels at most
)

IMAGENET = Policy(
    (
        (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
        (("Solarize", 0.6, 5), ("AutoContrast", 0.6, None)),
        (("Equalize", 0.8, None), ("Equalize", 0.6, None)),
        (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
        (("Equalize", 0.4, None), ("Solarize", 0.2, 4)),
        (("Equalize", 0.4, None), ("Rotate", 0.8, 8)),
        (("Solarize", 0.6, 3), ("Equalize", 0.6, None)),
        (("Posterize", 0.8, 5), ("Equalize", 1.0, None)),
        (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
        (("Equalize", 0.6, None), ("Posterize", 0.4, 6)),
        (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
        (("Rotate", 0.4, 9), ("Equalize", 0.6, None)),
        (("Equalize", 0.0, None), ("Equalize", 0.8, None)),
        (("Invert", 0.6, None), ("Equalize", 1.0, None)),
        (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
        (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
        (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
        (("Sharpness", 0.4, 7), ("Invert", 0.6, None)),
        (("ShearX", 0.6, 5), ("Equalize", 1.0, None)),
        (("Color", 0.4, 0), ("Equalize", 0.6, None)),
        (("Equalize", 0.4, None), ("Solarize", 0.2, 4)),
        (("Solarize", 0.6, 5), ("AutoContrast", 0.6, None)),
        (("Invert", 0.6, None), ("Equalize", 1.0, None)),
        (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
        (("Equalize", 0.8, None), ("Equalize", 0.6, None)),
    ),
    translation=150 / 331,  # Table 6: 150 pixels, of the 331 a side that the authors' networks took
)


def autoaugment(image: Image, policy: Policy, fill: Color, rng: np.random.Generator) -> Image:
    """Apply one sub-policy, drawn from the policy's, to an image of mode `L` or `RGB`.

    Each of its steps is done with its probability. A shear, shift or turn goes either way, at random, and
    leaves `fill` behind: the mean color in the authors' code for CIFAR-10, a gray close to it for ImageNet.
    """
    for name, probability, magnitude in policy.sub_policies[int(rng.random() * len(policy.sub_policies))]:
        done, backwards = rng.random(2) < (probability, 0.5)
        if done:
            strength = 0.0 if magnitude is None else magnitude / 9
            image = apply(name, image, strength, bool(backwards), policy.translation, fill)
    return image


def apply(
    name: str, image: Image, strength: float, backwards: bool, translation: float, fill: Color
) -> Image:
    """One operation, at `strength` 0 (the start of Table 6's range) to 1 (its end).

    Two ranges are read as later codes do, so that the effect grows: posterizing leaves 8 to 4 bits, and
    solarizing inverts from a threshold of 256 down to 0. Equal pixels are left (nearest neighbour).

    Args:
        name: as in Table 6.
        image: of mode `L` or `RGB`.
        strength: 0 to 1.
        backwards: shear, shift or turn the other way.
        translation: the largest shift, as a part of the side.
        fill: the color of what comes from outside of the image.
    """
    from PIL import Image, ImageEnhance, ImageOps

    sign = -1 if backwards else 1

    def affine(*coefficients: float) -> Image.Image:
        """The image whose pixel (x, y) is this one's at (a x + b y + c, d x + e y + f)."""
        return image.transform(image.size, Image.Transform.AFFINE, coefficients, fillcolor=fill)

    match name:
        case "ShearX":
            return affine(1, sign * 0.3 * strength, 0, 0, 1, 0)
        case "ShearY":
            return affine(1, 0, 0, sign * 0.3 * strength, 1, 0)
        case "TranslateX":
            return affine(1, 0, sign * int(translation * strength * image.width), 0, 1, 0)
        case "TranslateY":
            return affine(1, 0, 0, 0, 1, sign * int(translation * strength * image.height))
        case "Rotate":
            return image.rotate(sign * 30 * strength, fillcolor=fill)
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Solarize":
            return ImageOps.solarize(image, round(256 * (1 - strength)))
        case "Posterize":
            return ImageOps.posterize(image, 8 - round(4 * strength))
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            enhanced: Image.Image = getattr(ImageEnhance, name)(image).enhance(0.1 + 1.8 * strength)
            return enhanced
    raise ValueError(f"no operation of AutoAugment: {name}")
