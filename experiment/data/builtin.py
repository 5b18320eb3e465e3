"""The data sets that need no files, and what every source of images by index shares.

A source (`types.Source`) hands out uint8 images of one fixed shape and knows nothing of splits by seed,
shuffling or batches, which are in `experiment.data.loading`: `open_dataset` there opens a data set by name.
The data sets of TFDS are in `experiment.data.tfds`.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiment.data.augmentation import fit_image, image_of, to_gray
from experiment.data.splitting import stratified_split
from experiment.data.types import Batch, Dataset, Fit, Identity, Labels, Pixels, Size, Source, Statistics
from experiment.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# The training part at 32x32, by:
#   python -c "from experiment.data.builtin import digits; d = digits(None).train;
#              x = d.read(range(len(d)))['image'] / 255; print(x.mean(), x.std())"
DIGITS_STATISTICS: Statistics = ((0.3057,), (0.3235,))
SYNTHETIC_STATISTICS: Statistics = ((0.5, 0.5, 0.5), (0.15, 0.15, 0.15))

CACHE_BYTES = 2**29
"""A split whose images fit into so many bytes is decoded only once."""


def identity(
    sha256: str, *, version: str | None = None, config: str | None = None, test_split: str | None = None
) -> Identity:
    """Return an `Identity` under the names that config.json has for it."""
    return {
        "data_version": version,
        "data_config": config,
        "data_test_split": test_split,
        "data_sha256": sha256,
    }


def fit_to(size: Size, resize: int | None, fill: tuple[int, ...] | None = None) -> Fit:
    """`fit_image` with these arguments.

    Raises:
        UserError: the crop is larger than the resized image.
    """
    if resize is not None and resize < max(size):
        raise UserError(
            f"--resize: {resize} is smaller than the crop of {size[0]}x{size[1]}; give {max(size)} or more"
        )
    return partial(fit_image, size=size, shorter_side=resize, fill=fill)


def no_boxes(name: str) -> str:
    """The line that refuses `--crop-to-bbox`."""
    return f"--crop-to-bbox: {name} has no bounding boxes; leave the flag out, or use a set like cars196"


def gray_already(name: str) -> str:
    """The line that refuses `--grayscale`."""
    return f"--grayscale: {name} is gray already; leave the flag out"


def sha256_of(*arrays: npt.NDArray[Any]) -> str:
    """Return the SHA-256 sum of the bytes of arrays in C order, as hexadecimal digits."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


class ArraySource:
    """Images that are in memory, uint8 [N, h, w, C], and brought to size once."""

    def __init__(self, images: Pixels, labels: Labels, fit: Fit) -> None:
        self._images, self._labels = images, labels
        self._fitted = np.stack([fit(image_of(image)) for image in images])

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: npt.NDArray[np.int64]) -> Batch:
        return {"image": self._fitted[indices], "label": self._labels[indices]}

    def labels(self, indices: npt.NDArray[np.int64]) -> Labels:
        return self._labels[indices]

    def images(self, indices: npt.NDArray[np.int64]) -> tuple[list["Image"], Labels]:
        return [image_of(image) for image in self._images[indices]], self._labels[indices]


class CachedSource:
    """Keeps each example of another source in memory from its first reading on.

    A small image comes ten times faster from memory than out of a TFDS file.
    """

    def __init__(self, source: Source, image_shape: tuple[int, int, int]) -> None:
        self._source = source
        # Zeros take no memory until they are written to, so that a small subset of a large set stays small.
        self._images = np.zeros((len(source), *image_shape), np.uint8)
        self._labels = np.zeros(len(source), np.int32)
        self._present = np.zeros(len(source), np.bool_)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: npt.NDArray[np.int64]) -> Batch:
        missing = indices[~self._present[indices]]
        if missing.size:
            batch = self._source.read(missing)
            self._images[missing] = batch["image"]
            self._labels[missing] = batch["label"]
            # Last, so that another thread that sees the mark finds the example behind it. Two threads may
            # read the same example; both write the same bytes.
            self._present[missing] = True
        return {"image": self._images[indices], "label": self._labels[indices]}

    def labels(self, indices: npt.NDArray[np.int64]) -> Labels:
        return self._source.labels(indices)

    def images(self, indices: npt.NDArray[np.int64]) -> tuple[list["Image"], Labels]:
        return self._source.images(indices)


def cached(source: Source, image_shape: tuple[int, int, int]) -> Source:
    """Return the source with a cache in front, or as it is when its images would not fit into one."""
    fits = len(source) * int(np.prod(image_shape)) <= CACHE_BYTES
    return CachedSource(source, image_shape) if fits else source


def digits(image_size: Size | None, resize: int | None = None, *, grayscale: bool = False) -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8x8, resized to 32x32 (or `image_size`), one channel.

    A fifth, stratified by class and the same for every seed, is the test part.

    Raises:
        UserError: `grayscale` is True: the images are gray already.
    """
    if grayscale:
        raise UserError(gray_already("digits"))
    size = image_size or (32, 32)
    fit = fit_to(size, resize)
    rows = _digits_file()
    images = np.rint(rows[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = rows[:, -1].astype(np.int32)
    parts = [(images[part], labels[part]) for part in stratified_split(labels, 0.2)]
    train, test = (ArraySource(*part, fit) for part in parts)
    sha256 = sha256_of(*parts[0], *parts[1])
    return Dataset(train, test, tuple("0123456789"), (*size, 1), *DIGITS_STATISTICS, identity(sha256))


def _digits_file() -> npt.NDArray[np.float64]:
    """Return scikit-learn's file of digits: rows of 64 pixels and the label.

    To import scikit-learn, or a part of it, takes a second.
    """
    package = importlib.util.find_spec("sklearn")  # does not import it
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    return np.loadtxt(path, delimiter=",")


class SyntheticSource:
    """Colored, noisy stripes, made on demand: example `i` is a function of `first + i` and the size alone.

    Class c of 10 has stripes at an angle of 18 c degrees; phase, width, color and noise are random. The
    label is the index modulo 10, so that the classes are balanced.
    """

    def __init__(
        self, first: int, count: int, size: Size, *, grayscale: bool = False, fit: Fit | None = None
    ) -> None:
        self._first, self._count, self._size = first, count, size
        self._grayscale, self._fit = grayscale, fit or partial(fit_image, size=size)

    def __len__(self) -> int:
        return self._count

    def read(self, indices: npt.NDArray[np.int64]) -> Batch:
        images, labels = self.images(indices)
        return {"image": np.stack([self._fit(image) for image in images]), "label": labels}

    def labels(self, indices: npt.NDArray[np.int64]) -> Labels:
        return ((indices + self._first) % 10).astype(np.int32)

    def images(self, indices: npt.NDArray[np.int64]) -> tuple[list["Image"], Labels]:
        numbers = indices + self._first
        images = [image_of(self._image(int(number))) for number in numbers]
        if self._grayscale:
            images = [image.convert("L") for image in images]
        return images, self.labels(indices)

    def _image(self, number: int) -> npt.NDArray[np.uint8]:
        height, width = self._size
        rng = np.random.default_rng(number)
        angle = np.pi / 10 * (number % 10)
        phase, cycles = rng.uniform(0, 2 * np.pi), rng.uniform(3, 5)
        color = rng.uniform(30, 60, size=3)
        rows = np.sin(angle) * np.arange(height)[:, None] / height
        columns = np.cos(angle) * np.arange(width)[None, :] / width
        stripes = np.sin(2 * np.pi * cycles * (rows + columns) + phase)
        noise = rng.integers(0, 64, size=(height, width, 3), dtype=np.uint8)
        image: npt.NDArray[np.uint8] = (96 + stripes[..., None] * color).astype(np.uint8)
        return image + noise  # at most 96 + 60 + 63


def synthetic(image_size: Size | None, resize: int | None = None, *, grayscale: bool = False) -> Dataset:
    """Made images for tests and timings: 2,048 to train on, 512 to test on, 10 classes, RGB, 32x32."""
    size = image_size or (32, 32)
    shape = (*size, 1 if grayscale else 3)
    fit = fit_to(size, resize)
    train, test = (
        cached(SyntheticSource(first, count, size, grayscale=grayscale, fit=fit), shape)
        for first, count in ((0, 2048), (2048, 512))
    )
    names = tuple(f"stripes at {18 * index} degrees" for index in range(10))
    statistics = to_gray(SYNTHETIC_STATISTICS) if grayscale else SYNTHETIC_STATISTICS
    # Four examples identify all: each is a function of its index and NumPy's generator
    sample = SyntheticSource(0, 4, (32, 32)).read(np.arange(4))
    return Dataset(train, test, names, shape, *statistics, identity(sha256_of(*sample.values())))


BUILTIN: dict[str, Callable[..., Dataset]] = {"digits": digits, "synthetic": synthetic}
"""Functions (image_size, resize, grayscale=) that open the sets of this file, which TFDS does not have."""
