"""Draw what a network computes, and how gradients reach its first layers: python docs/draw_features.py

features.png has filters and feature maps of the released weights. gradient_flow.png has the norms of the
gradients of ResNet-56 at initialization, with and without the residual sum. Both are computed by numpy_ref.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from safetensors.numpy import load_file

import numpy_ref
from experiment.data.loading import Data, load
from experiment.data.splitting import Split
from experiment.report.style import BLUE, DOCUMENT_WIDTH, ORANGE, save_document, style
from numpy_ref.layers import Array
from numpy_ref.resnet import BasicBlock, ResidualBlock, ResNet

FOLDER = Path(__file__).parent
RELEASED = FOLDER.parent / "weights" / "digits-resnet8"
COLUMNS = 8
BLOCKS, SEEDS, BATCH = (9, 9, 9), (0, 1, 2, 3, 4), 16

Floats = npt.NDArray[np.float64]


class PlainBlock(BasicBlock):
    """A block without its shortcut: y = relu(branch(x))."""

    def forward(self, x: Array, train: bool = False, keep: Array | None = None) -> Array:
        """y = relu(branch(x))."""
        return self.relu.forward(self.branch().forward(x, train))

    def backward(self, dy: Array) -> Array:
        """x enters y on one path alone."""
        return self.branch().backward(self.relu.backward(dy))


def digits() -> Data:
    """Return the data set of scikit-learn's digits."""
    return load("digits", data_dir=None, batch_size=BATCH, seed=0)


def normalized(data: Data, part: Split, count: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """Return the first images [N, H, W, C] of a part, as a network takes them, and their labels."""
    source, indices = data.parts[part]
    batch = source.read(indices[:count])
    images = (batch["image"] / 255 - np.array(data.mean)) / np.array(data.std)
    return images.astype(np.float32), np.asarray(batch["label"])


def released() -> ResNet:
    """Return the network with the released weights."""
    network = numpy_ref.resnet8(10, 1, rng=None)
    numpy_ref.load_state_dict(network, load_file(RELEASED / "weights.safetensors"))
    return network


def draw_features(data: Data) -> None:
    """Draw an image, the first filters, and the feature maps of the first channels after every stage."""
    image, label = normalized(data, "test", 1)
    network = released()
    stages = network.stages(image)
    predicted = int(stages["logits"].argmax())
    kernel = network.conv1.weight.value[:, :, 0]  # [KH, KW, out]
    largest = float(np.abs(kernel).max())
    gray: dict[str, Any] = {"cmap": "gray", "vmin": -largest, "vmax": largest}
    rows = {"filters of\nthe first\nconvolution": (kernel, gray)}
    for name in ("stem", "layer1", "layer2", "layer3"):
        maps = stages[name][0]
        rows[f"{name}\n{'x'.join(map(str, maps.shape))}"] = (maps, {"cmap": "gray", "vmin": 0})
    with style():
        figure = Figure(figsize=(DOCUMENT_WIDTH, 4.9), layout="constrained")
        left, right = list(figure.subfigures(1, 2, squeeze=False, width_ratios=(1.2, 7.1))[0])
        axes = left.subplots()
        axes.imshow(image[0, :, :, 0], cmap="gray", interpolation="nearest")
        axes.set_title(f"a {label[0]},\ntaken for a {predicted}", fontsize=9)
        axes.set_axis_off()
        panels = right.subplots(len(rows), COLUMNS)
        for row, (name, (maps, options)) in zip(panels, rows.items(), strict=True):
            for index, cell in enumerate(row):
                cell.imshow(maps[:, :, index], interpolation="nearest", **options)
                cell.set(xticks=[], yticks=[])
                cell.grid(False)
            row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        save_document(figure, FOLDER / "features.png")


def gradient_norms(block: type[BasicBlock], seed: int, batch_norm: bool, data: Data) -> Floats:
    """Return the norm of dL/d(output) of each block, first to last, in a network as it is initialized."""
    images, labels = normalized(data, "train", BATCH)
    options: Any = {"width": 16, "stem": "small", "shortcut": "option-A", "batch_norm": batch_norm}
    network = ResNet(block, BLOCKS, 10, 1, **options, rng=np.random.default_rng(seed), fast=False)
    _, gradient = numpy_ref.cross_entropy(network.forward(images, train=True), labels)
    norms = []
    for _, layer in reversed(list(network.body())):
        if isinstance(layer, ResidualBlock):
            norms.append(float(np.linalg.norm(gradient)))
        gradient = layer.backward(gradient)
    return np.array(norms[::-1])


def draw_gradients(data: Data) -> None:
    """Draw the norms against the block, in a panel with and one without batch norm; a line is a seed."""
    with style():
        figure = Figure(figsize=(DOCUMENT_WIDTH, 3.0), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True)
        for axes, batch_norm in zip(panels, (True, False), strict=True):
            for block, color, label in (
                (BasicBlock, BLUE, "y = relu(x + F(x))"),
                (PlainBlock, ORANGE, "y = relu(F(x))"),
            ):
                for seed in SEEDS:
                    norms = gradient_norms(block, seed, batch_norm, data)
                    name = label if seed == SEEDS[0] else None
                    axes.plot(np.arange(1, len(norms) + 1), norms, color=color, lw=1, label=name)
            words = "with batch norm" if batch_norm else "without batch norm"
            axes.set(title=words, xlabel="block, from the image on", yscale="log")
        panels[0].set_ylabel("norm of dL/d(output of the block)")
        panels[0].legend()
        save_document(figure, FOLDER / "gradient_flow.png")


def main() -> None:
    """Draw both figures."""
    data = digits()
    draw_features(data)
    draw_gradients(data)


if __name__ == "__main__":
    main()
