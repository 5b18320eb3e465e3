"""Transforms of images before an engine normalizes them: resize, crop, and for training random changes.

Everything here works on uint8, with NumPy and Pillow alone, and is the same for both engines. A function
that draws takes a generator from `generators`, whose numbers depend on (seed, epoch, example) and on nothing
else: not on the batch, the thread, or where the run resumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiment.data.autoaugment import CIFAR10, IMAGENET, autoaugment
from experiment.data.randaugment import randaugment
from experiment.data.types import Batch, Color, Pixels, Size, Source

if TYPE_CHECKING:
    from PIL.Image import Image


LUMA = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in a gray pixel (ITU-R 601), as in Pillow's conversion to `L`."""

# The principal components of ImageNet's RGB pixels on the scale 0..1: eigenvalues, eigenvectors in columns.
# Not in AlexNet's paper; these numbers are facebookarchive/fb.resnet.torch's (datasets/imagenet.lua).
PCA_VALUES = np.array([0.2175, 0.0188, 0.0045])
PCA_VECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
PCA_DEVIATION = 0.1

POLICIES = {"autoaugment": IMAGENET, "autoaugment-cifar10": CIFAR10}


def to_gray(statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> tuple[tuple[float], tuple[float]]:
    """Mean and deviation of gray images from those of the three channels.

    The mean is exact. The deviation assumes perfectly correlated channels; that of CIFAR-10's gray images is
    3 % smaller.
    """
    mean, std = (sum(w * x for w, x in zip(LUMA, values, strict=True)) for values in statistics)
    return (mean,), (std,)


def fill_color(mean: Sequence[float], *, drawn_on_black: bool = False) -> Color:
    """Return the color around an image that does not fill its frame: the mean, on the scale 0..1, as uint8.

    It normalizes to (nearly) zero, which is what He et al. pad with. Black for images drawn on black.
    """
    return (0,) if drawn_on_black else tuple(round(255 * value) for value in mean)


def pixels_of(image: Image) -> Pixels:
    """The pixels [H, W, C] of an image; C is 1 for mode `L` and 3 for `RGB`."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def image_of(pixels: Pixels) -> Image:
    """The inverse of `pixels_of`."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def fit_image(image: Image, size: Size, shorter_side: int | None = None, fill: Color | None = None) -> Pixels:
    """Bring an image to `size`: the one transform of validation, test, and training that is not augmented.

    The image is resized (bilinear, antialiased) to cover the target, or with `shorter_side` so that its
    shorter side has that many pixels; aspect is kept, and the target cut from the center. With `fill`, and no
    `shorter_side`, nothing is cut: the image is made to fit inside, and `fill` surrounds it. MNIST's 28x28
    is padded with zeros to 32x32, so that its pixels stay as they are.

    Args:
        image: of mode `L` or `RGB`.
        size: height and width.
        shorter_side: at least the larger of them.
        fill: a color, one number a channel.

    Returns:
        uint8 [H, W, C].
    """
    from PIL import Image, ImageOps

    height, width = size
    if shorter_side is not None:
        whole = resized_size(image, shorter_side)
        return cut_resized(image, whole, (whole[0] - height) // 2, (whole[1] - width) // 2, size)
    if image.size == (28, 28) and size == (32, 32):
        image = ImageOps.expand(image, border=2)
    elif fill is not None:
        color = fill if len(fill) > 1 else fill[0]
        image = ImageOps.pad(image, (width, height), Image.Resampling.BILINEAR, color)
    elif image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return pixels_of(image)


def crop_to_box(image: Image, box: Iterable[float]) -> Image:
    """The part of an image inside a box (ymin, xmin, ymax, xmax) on the scale 0..1, in whole pixels.

    Raises:
        ValueError: the box is empty, or not inside the image.
    """
    top, left, bottom, right = (float(edge) for edge in box)
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(f"no box inside the image: {top:g} {left:g} {bottom:g} {right:g}")
    width, height = image.size
    # Boxes are stored as float32: the edge of a pixel may come out a millionth beyond it
    near, far = 1e-4, 1 - 1e-4
    start = int(left * width + near), int(top * height + near)
    end = int(right * width + far), int(bottom * height + far)
    return image.crop((*start, *end))


def resized_size(image: Image, shorter_side: int) -> Size:
    """The height and width of an image whose shorter side is resized to `shorter_side`, aspect kept."""
    width, height = image.size
    scale = shorter_side / min(width, height)
    return max(shorter_side, round(height * scale)), max(shorter_side, round(width * scale))


def cut_resized(image: Image, whole: Size, top: int, left: int, size: Size) -> Pixels:
    """The part of `size` at (top, left) of an image resized to `whole`; no more than that is computed."""
    from PIL import Image

    down, across = image.height / whole[0], image.width / whole[1]
    box = (left * across, top * down, (left + size[1]) * across, (top + size[0]) * down)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))  # rounding
    return pixels_of(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box))


def generators(
    seed: int, epoch: int, examples: npt.NDArray[np.int64], stream: int = 0
) -> Iterator[np.random.Generator]:
    """Yield a generator for each of the examples [N]: its k-th number depends on seed, epoch, example and k.

    Other numbers come from another `stream`, so that one kind of draws does not depend on another.

    Philox hashes a counter: here epoch and example, and a word that counts the draws (Salmon et al. 2011,
    "Parallel random numbers: as easy as 1, 2, 3"). The same object is yielded each time, reset for the next
    example: draw all numbers of an example before asking for the next.
    """
    bits = np.random.Philox(key=[seed, stream])
    state, generator = bits.state, np.random.Generator(bits)
    for example in examples:
        state["state"]["counter"][:] = (0, example, epoch, 0)
        bits.state = state
        yield generator


def draw_shift(size: Size, rng: np.random.Generator) -> Size:
    """Draw a crop's offset down and right of the padded image's center: up to an eighth of a side."""
    height, width = size
    down = int(rng.random() * (2 * (height // 8) + 1)) - height // 8
    right = int(rng.random() * (2 * (width // 8) + 1)) - width // 8
    return down, right


def draw_flip(rng: np.random.Generator) -> bool:
    """True with probability 1/2."""
    return bool(rng.random() < 0.5)


def pad_crop(image: Pixels, fill: Color, rng: np.random.Generator) -> Pixels:
    """Pad an image [H, W, C] with `fill` by an eighth of its sides all round, and cut its size at random.

    At 32x32 these are the four pixels of He et al. 2015 (arXiv 1512.03385, section 4.2).
    """
    height, width, _ = image.shape
    down, right = draw_shift((height, width), rng)
    moved = np.full_like(image, fill)
    moved[max(-down, 0) : height - down, max(-right, 0) : width - right] = image[
        max(down, 0) : height + down, max(right, 0) : width + right
    ]
    return moved


def random_crop(image: Image, size: Size, shorter_side: Size, rng: np.random.Generator) -> Pixels:
    """Resize an image's shorter side to a length from the range `shorter_side`; cut `size` at random.

    Aspect is kept, and both ends of the range are included. The scale augmentation of Simonyan & Zisserman
    2014, arXiv 1409.1556.
    """
    least, most = shorter_side
    whole = resized_size(image, least + int(rng.random() * (most - least + 1)))
    top, left = (int(rng.random() * (whole[axis] - size[axis] + 1)) for axis in (0, 1))
    return cut_resized(image, whole, top, left, size)


def flip(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Mirror an image [H, W, C] left to right with probability 1/2."""
    return image[:, ::-1] if draw_flip(rng) else image


def pca_color(image: Pixels, rng: np.random.Generator) -> Pixels:
    """AlexNet's color augmentation (Krizhevsky et al. 2012, section 4.1) of an image [H, W, 3].

    To every pixel is added [p1 p2 p3] [a1 l1, a2 l2, a3 l3], where p and l are the principal components of
    ImageNet's pixels and each a is normal with deviation 0.1, drawn once an image.
    """
    shift = PCA_VECTORS @ (rng.normal(scale=PCA_DEVIATION, size=3) * PCA_VALUES)
    changed: Pixels = np.clip(np.rint(image + 255 * shift), 0, 255).astype(np.uint8)
    return changed


def random_erase(image: Pixels, probability: float, color: Color, rng: np.random.Generator) -> Pixels:
    """Fill a rectangle of an image [H, W, C] with a color, with a probability.

    Zhong et al. 2017, "Random Erasing Data Augmentation", arXiv 1708.04896, with the ranges of torchvision's
    `RandomErasing`: 2 to 33 % of the area, height / width from 0.3 to 3.3, ten tries to fit inside.
    """
    if rng.random() >= probability:
        return image
    height, width, _ = image.shape
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 0.33)
        ratio = np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
        down, across = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if down < height and across < width:
            top, left = int(rng.integers(height - down + 1)), int(rng.integers(width - across + 1))
            erased = image.copy()
            erased[top : top + down, left : left + across] = color
            return erased
    return image


@dataclass(frozen=True)
class Augmentation:
    """The transform of a training batch by `--augment`, then `--randaugment`, then `--random-erase`.

    Attributes:
        name: one of `config.AUGMENTATIONS`.
        seed: the run's.
        size: height and width of the results.
        shorter_side: the range that is drawn from; None for images that are padded and cropped instead.
        fill: what surrounds an image that is padded, shifted or turned.
        randaugment: number and magnitude of RandAugment's operations; empty is none.
        erase_probability: of `random_erase`.
        erase_color: the mean color, which is (nearly) 0 after normalization.
    """

    name: str
    seed: int
    size: Size
    shorter_side: Size | None
    fill: Color
    randaugment: tuple[int, ...] = ()
    erase_probability: float = 0.0
    erase_color: Color = ()

    def batch(self, source: Source, examples: npt.NDArray[np.int64], epoch: int) -> Batch:
        """Read the examples [N] of a source and augment them with their random numbers for this epoch."""
        if self.name == "none" and not self._recolors:
            return source.read(examples)
        images: Any
        if self.shorter_side is None or self.name == "none":
            batch = source.read(examples)
            images, labels = batch["image"], batch["label"]
        else:
            images, labels = source.images(examples)
        rngs = generators(self.seed, epoch, examples)
        images = [self._change(image, rng) for image, rng in zip(images, rngs, strict=True)]
        return {"image": np.stack(images), "label": labels}

    @property
    def moves_only(self) -> bool:
        """True if `draws` describes the whole transform."""
        return self.shorter_side is None and self.name in ("none", "crop-flip") and not self._recolors

    @property
    def _recolors(self) -> bool:
        return bool(self.randaugment or self.erase_probability)

    def draws(self, examples: npt.NDArray[np.int64], epoch: int) -> dict[str, npt.NDArray[Any]]:
        """Return what `batch` draws for the examples [N]: {"shift": int32 [N, 2], "flip": bool [N]}."""
        shift, flip = np.zeros((len(examples), 2), np.int32), np.zeros(len(examples), np.bool_)
        if self.name != "none":
            for i, rng in enumerate(generators(self.seed, epoch, examples)):
                shift[i], flip[i] = draw_shift(self.size, rng), draw_flip(rng)
        return {"shift": shift, "flip": flip}

    def _change(self, image: Any, rng: np.random.Generator) -> Pixels:
        """Change one image: pixels of the final size, or a Pillow image of any size."""
        changed = image if self.name == "none" else self._crop_flip(image, rng)
        if self.name == "crop-flip-pca":
            changed = pca_color(changed, rng)
        elif self.name in POLICIES:
            changed = pixels_of(autoaugment(image_of(changed), POLICIES[self.name], self.fill, rng))
        if self.randaugment:
            count, magnitude = self.randaugment
            changed = pixels_of(randaugment(image_of(changed), count, magnitude, self.fill, rng))
        if self.erase_probability:
            changed = random_erase(changed, self.erase_probability, self.erase_color, rng)
        return changed

    def _crop_flip(self, image: Any, rng: np.random.Generator) -> Pixels:
        if self.shorter_side is None:
            return flip(pad_crop(image, self.fill, rng), rng)
        return flip(random_crop(image, self.size, self.shorter_side, rng), rng)


def ten_crops(image: Image, size: Size, shorter_side: int) -> Pixels:
    """The four corners and the center of a resized image, and their mirror images: uint8 [10, H, W, C].

    Krizhevsky et al. 2012, section 4.1.

    Args:
        image: of mode `L` or `RGB`.
        size: height and width of a crop.
        shorter_side: of the image before it is cut, at least the larger of them.
    """
    return _corners_and_center(whole_image(image, shorter_side), size)


def ten_shifts(image: Pixels, fill: Color) -> Pixels:
    """The corners and the center of an image [H, W, C] padded by an eighth of its sides, as `pad_crop` pads
    it, and their mirror images: uint8 [10, H, W, C].

    For networks that saw whole images: they are as large in the crops as they were in training.
    """
    height, width, _ = image.shape
    padded = np.full((height + 2 * (height // 8), width + 2 * (width // 8), len(fill)), fill, np.uint8)
    padded[height // 8 : height // 8 + height, width // 8 : width // 8 + width] = image
    return _corners_and_center(padded, (height, width))


def _corners_and_center(whole: Pixels, size: Size) -> Pixels:
    height, width = size
    down, right = whole.shape[0] - height, whole.shape[1] - width
    places = ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2))
    crops = np.stack([whole[top : top + height, left : left + width] for top, left in places])
    return np.concatenate([crops, crops[:, :, ::-1]])


def whole_image(image: Image, shorter_side: int, multiple: int = 1) -> Pixels:
    """All of an image, resized to `shorter_side`, aspect kept: uint8 [H, W, C].

    The longer side becomes a multiple of `multiple`, so that many images share a shape; squares stay so.
    """
    height, width = resized_size(image, shorter_side)
    if height == width:
        multiple = 1
    longer = max(shorter_side, round(max(height, width) / multiple) * multiple)
    size = (shorter_side, longer) if height <= width else (longer, shorter_side)
    return cut_resized(image, size, 0, 0, size)
