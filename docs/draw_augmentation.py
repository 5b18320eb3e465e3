"""Draw a sheet of training images: as evaluation sees them, and after each transform, in two epochs.

    python docs/draw_augmentation.py docs/augmentation.png --dataset fashion_mnist --data-dir DIR
    python docs/draw_augmentation.py sheet.png --dataset cars196 --data-dir DIR --crop-to-bbox

The data flags of train.py apply. PCA color is left out for gray images.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

from experiment.data.loading import Data, load
from experiment.options.command_line import parse
from experiment.options.config import AUGMENTATIONS
from experiment.options.resolving import resolve

COLUMNS = 10


def rows(data: Data) -> dict[str, npt.NDArray[np.uint8]]:
    """Return rows of the same images [COLUMNS, H, W, C]: as in evaluation, then under each `--augment`."""
    source, indices = data.parts["train"]
    chosen = indices[:: len(indices) // COLUMNS][:COLUMNS]
    height, width, channels = data.image_shape
    larger = round(max(height, width) * 256 / 224)
    sheet = {"evaluation": source.read(chosen)["image"]}
    for name in AUGMENTATIONS[1:]:
        if name == "crop-flip-pca" and channels == 1:
            continue
        for epoch in (0, 1):
            augmentation = dataclasses.replace(data.augmentation, name=name)
            sheet[f"{name}\nepoch {epoch}"] = augmentation.batch(source, chosen, epoch)["image"]
    scaled = dataclasses.replace(data.augmentation, name="crop-flip", shorter_side=(larger, 2 * larger))
    sheet[f"crop-flip\n--resize {larger} {2 * larger}"] = scaled.batch(source, chosen, 0)["image"]
    return sheet


def draw(output: Path, data: Data, title: str) -> None:
    """Draw a row of images for each transform, with its name."""
    sheet = rows(data)
    height, width, channels = data.image_shape
    inches = 0.9 * height / width
    figure = plt.figure(figsize=(1.5 + 0.9 * COLUMNS, 0.4 + inches * len(sheet)), layout="constrained")
    axes = figure.subplots(len(sheet), COLUMNS)
    style: dict[str, Any] = {"cmap": "gray"} if channels == 1 else {}
    for row, (name, images) in zip(axes, sheet.items(), strict=True):
        for cell, image in zip(row, images, strict=True):
            cell.imshow(image, vmin=0, vmax=255, interpolation="nearest", **style)
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(output, dpi=90)


if __name__ == "__main__":
    config = resolve(parse(sys.argv[2:]))
    data = load(config.dataset, **config.data_options())
    flags = ["--crop-to-bbox"] * config.crop_to_bbox + ["--grayscale"] * config.grayscale
    draw(Path(sys.argv[1]), data, " ".join([data.name, "x".join(map(str, data.image_shape)), *flags]))
