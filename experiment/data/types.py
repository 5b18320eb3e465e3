"""The types of data sets: images, batches, and the interface of a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]
"""Height and width in pixels."""

Color = tuple[int, ...]
"""A number of uint8 for each channel."""

Batch = dict[str, npt.NDArray[Any]]
"""`{"image": uint8 [N, H, W, C], "label": int32 [N]}`.

For mixed images also `"label2"`, int32 [N], and `"lam"`, float64 [N], the share of `"label"`. With stochastic
depth also `"drop_path"`, float64 [N, blocks], the factors of the residual branches."""

Labels = npt.NDArray[np.int32]

Fit = Callable[["Image"], Pixels]
"""Brings an image of any size to the one shape of a source: `fit_image`, its other arguments given."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation a channel, on the scale 0..1."""

IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Those of ImageNet, by torchvision."""


class Source(Protocol):
    """Images by index. `read` may be called from several threads at once."""

    def __len__(self) -> int: ...

    def read(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Return the examples at `indices` [N], in that order, brought to one shape, as a new batch."""
        ...

    def labels(self, indices: npt.NDArray[np.int64]) -> Labels:
        """Return the labels [N] of the examples at `indices`; no image is decoded."""
        ...

    def images(self, indices: npt.NDArray[np.int64]) -> tuple[list[Image], Labels]:
        """Return the images at `indices` [N] in sizes of their own, mode `L` or `RGB`, and labels [N]."""
        ...


Identity = Mapping[str, str | None]
"""Identity of a data set: version, configuration, test split (None if it has none) and a SHA-256 sum."""


@dataclass(frozen=True)
class Dataset:
    """Sources of a data set, and what is known of them.

    Attributes:
        train: what is trained on; validation, and the test part where there is no other, are taken from it.
        test: None if the set has no test part.
        class_names: the label `i` is that of `class_names[i]`.
        image_shape: height, width, channels.
        mean: of each channel, on the scale 0..1; empty where `measure` is given.
        std: likewise the standard deviation.
        identity: which data these are.
        val: a validation part of the set's own.
        measure: returns mean and deviation of examples of `train`, where they are not known beforehand.
        notes: lines for the user.
    """

    train: Source
    test: Source | None
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    identity: Identity
    val: Source | None = None
    measure: Callable[[npt.NDArray[np.int64]], Statistics] | None = None
    notes: tuple[str, ...] = ()
