"""Draw ResNet-101: its stages, and a bottleneck with its shortcut.

    python docs/draw_resnet101.py docs/resnet101.png

The NumPy network supplies the counts and channels of the stages.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from numpy_ref import resnet101
from numpy_ref.layers import Conv2d, Layer

SIZE, CLASSES = 224, 1000
INK, STEM, CONV, ADD = "#333333", "#d9d9d9", "#9ecae1", "#fdd0a2"


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, color: str, size: float = 9) -> None:
    """Draw a rounded box around a centered text."""
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, fc=color, ec=INK, lw=0.9))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color="black")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0) -> None:
    """Draw an arrow, bent to the right by `bend`."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, connectionstyle=style, color=INK)
    )


def parameters(layer: Layer) -> str:
    """Return the number of a layer's parameters, in millions."""
    return f"{sum(p.value.size for p in layer.parameters()) / 1e6:.1f} M"


def channels(block: Layer, convolution: str) -> int:
    """Return the number of output channels of a block's convolution."""
    layer = dict(block.parts())[convolution]
    assert isinstance(layer, Conv2d)
    return int(layer.weight.value.shape[-1])


def stages(axes: Axes) -> None:
    """Draw the network from image to logits, with the shape after each stage."""
    network = resnet101(CLASSES, rng=np.random.default_rng(0))
    parts = dict(network.parts())
    x, gap, width, side = 0.0, 0.55, 1.55, SIZE // 4
    boxes = [
        (f"image\n\n{SIZE} x {SIZE} x 3", STEM),
        (f"7x7, 64, /2\nmax pool, /2\n\n{side} x {side} x 64", CONV),
    ]
    for number in range(1, 5):
        stage = parts[f"layer{number}"]
        blocks = [block for _, block in stage.parts()]
        inner, outer = (channels(blocks[-1], name) for name in ("conv1", "conv3"))
        side = side if number == 1 else side // 2
        text = f"stage {number}\n{len(blocks)} bottlenecks\n1x1, {inner}\n3x3, {inner}\n1x1, {outer}\n\n"
        boxes.append((text + f"{side} x {side} x {outer}\n{parameters(stage)}", CONV))
    boxes.append((f"mean over\npixels\n\n{outer}", STEM))
    boxes.append((f"linear\n\n{CLASSES}\n{parameters(parts['fc'])}", STEM))
    for index, (text, color) in enumerate(boxes):
        height = 2.5 if color == CONV and index > 1 else 1.7
        box(axes, x, -height / 2, width, height, text, color)
        if index + 1 < len(boxes):
            arrow(axes, (x + width, 0), (x + width + gap, 0))
        x += width + gap
    axes.set(xlim=(-0.1, x - gap + 0.1), ylim=(-1.4, 1.4), aspect="equal")


def bottleneck(axes: Axes) -> None:
    """Draw a block of stage 3: y = relu(x + F(x))."""
    chain = [
        "1x1, 1024 to 256",
        "batch norm, ReLU",
        "3x3, 256 to 256",
        "batch norm, ReLU",
        "1x1, 256 to 1024",
    ]
    x, width, gap = 1.0, 2.0, 0.35
    axes.text(0.35, 0, "x", ha="center", va="center", fontsize=12, style="italic")
    arrow(axes, (0.55, 0), (x, 0))
    for text in [*chain, "batch norm"]:
        box(axes, x, -0.3, width, 0.6, text, CONV if text[0].isdigit() else STEM)
        arrow(axes, (x + width, 0), (x + width + gap, 0))
        x += width + gap
    box(axes, x, -0.3, 0.6, 0.6, "+", ADD, 13)
    arrow(axes, (x + 0.6, 0), (x + 0.95, 0))
    box(axes, x + 0.95, -0.3, 0.9, 0.6, "ReLU", STEM)
    arrow(axes, (x + 1.85, 0), (x + 2.3, 0))
    axes.text(x + 2.45, 0, "y", ha="center", va="center", fontsize=12, style="italic")
    axes.plot([0.75, 0.75, x + 0.3], [0, 0.75, 0.75], color=INK, lw=1.2, solid_capstyle="round")
    arrow(axes, (x + 0.3, 0.77), (x + 0.3, 0.3))
    axes.text((x + 1) / 2, 0.86, "shortcut", ha="center", va="bottom", fontsize=9, color=INK)
    axes.set(xlim=(0.1, x + 2.7), ylim=(-0.5, 1.15), aspect="equal")


def main() -> None:
    """Draw both, one above the other."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(11, 3.9), height_ratios=(2.6, 1.1), layout="constrained", facecolor="white"
    )
    stages(top)
    bottleneck(bottom)
    for axes in (top, bottom):
        axes.axis("off")
    figure.savefig(Path(sys.argv[1]), dpi=110)


if __name__ == "__main__":
    main()
