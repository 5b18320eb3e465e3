"""Draw ResNet-101: its stages, and a bottleneck with its residual sum: python docs/draw_resnet101.py

The NumPy network supplies the counts, channels and parameters of the stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from experiment.report.style import (
    BLUE,
    DOCUMENT_WIDTH,
    FAINT,
    INK,
    ORANGE,
    save_document,
    style,
    tint,
)
from numpy_ref import resnet101
from numpy_ref.layers import Conv2d, Layer

FOLDER = Path(__file__).parent
SIZE, CLASSES = 224, 1000
GRAY, CONVOLUTION, SUM = tint(FAINT, 0.18), tint(BLUE, 0.3), tint(ORANGE, 0.45)
WIDTH, HEIGHT = 830, 540  # pixels on the page, the unit of all positions


def box(axes: Any, x: float, y: float, w: float, h: float, text: str, color: str, **options: Any) -> None:
    """Draw a rounded box around a centered text."""
    shape = "round,pad=0,rounding_size=6"
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=shape, fc=color, ec=INK, lw=0.8))
    axes.text(x + w / 2, y + h / 2, text, **{"ha": "center", "va": "center", "fontsize": 9, **options})


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow that touches both points."""
    ends: dict[str, Any] = {"shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=INK, **ends))


def parameters(*layers: Layer) -> str:
    """Return the number of the layers' parameters, in millions."""
    return f"{sum(p.value.size for layer in layers for p in layer.parameters()) / 1e6:.2f} M"


def channels(block: Layer, convolution: str) -> int:
    """Return the number of output channels of a block's convolution."""
    layer = dict(block.parts())[convolution]
    assert isinstance(layer, Conv2d)
    return int(layer.weight.value.shape[-1])


def stages(axes: Any) -> None:
    """Draw the network from image to logits, with the shape after each stage."""
    network = resnet101(CLASSES, rng=np.random.default_rng(0))
    parts = dict(network.parts())
    side = SIZE // 4
    stem = parameters(parts["conv1"], parts["bn1"])
    rows = [
        ("image", 0, GRAY, f"{SIZE} x {SIZE} x 3", ""),
        ("7x7 convolution, then max pool; stride 2 in both", 0, CONVOLUTION, f"{side} x {side} x 64", stem),
    ]
    for number in range(1, 5):
        stage = parts[f"layer{number}"]
        blocks = [block for _, block in stage.parts()]
        inner, outer = (channels(blocks[-1], name) for name in ("conv1", "conv3"))
        side = side if number == 1 else side // 2
        text = f"stage {number}: {len(blocks)} bottlenecks, channels {inner}, {inner}, {outer}"
        rows.append((text, len(blocks), CONVOLUTION, f"{side} x {side} x {outer}", parameters(stage)))
    rows.append(("mean over pixels", 0, GRAY, f"{outer}", ""))
    rows.append(("linear", 0, GRAY, f"{CLASSES} logits", parameters(parts["fc"])))
    y, x, width = 34.0, 10, 330
    for text, place in (("output", x + width + 65), ("parameters", x + width + 160)):
        axes.text(place, 18, text, ha="center", va="center", fontsize=9, color=INK, weight="bold")
    for index, (text, blocks_here, color, shape, count) in enumerate(rows):
        height = 60 if blocks_here else 36
        box(axes, x, y, width, height, "" if blocks_here else text, color)
        if blocks_here:
            axes.text(x + width / 2, y + 18, text, ha="center", va="center", fontsize=9)
            left = x + width / 2 - 13.5 * blocks_here / 2
            for k in range(blocks_here):
                cell = (left + 13.5 * k + 1.5, y + 34)
                axes.add_patch(Rectangle(cell, 10.5, 16, fc=BLUE if k else ORANGE, ec="none"))
        axes.text(x + width + 65, y + height / 2, shape, ha="center", va="center", fontsize=9)
        axes.text(x + width + 160, y + height / 2, count, ha="center", va="center", fontsize=9)
        y += height
        if index + 1 < len(rows):
            arrow(axes, (x + width / 2, y), (x + width / 2, y + 14))
            y += 14
    axes.add_patch(Rectangle((x, 523), 10.5, 13, fc=ORANGE, ec="none"))
    words = "first block: a 1x1 convolution in the shortcut; stride 2 in stages 2 to 4"
    axes.text(x + 17, 530, words, va="center", fontsize=8)
    axes.text(x + width + 160, 530, f"all: {parameters(network)}", ha="center", va="center", fontsize=9)


def bottleneck(axes: Any) -> None:
    """Draw a block of stage 3: y = relu(x + F(x))."""
    chain = [
        ("1x1, 1024 to 256 channels", CONVOLUTION),
        ("batch norm, ReLU", GRAY),
        ("3x3, 256 to 256", CONVOLUTION),
        ("batch norm, ReLU", GRAY),
        ("1x1, 256 to 1024", CONVOLUTION),
        ("batch norm", GRAY),
    ]
    x, width, y = 575, 185, 62.0
    middle, side = x + width / 2, x + width + 30
    axes.text(middle, 18, "a bottleneck of stage 3", ha="center", va="center", fontsize=9, weight="bold")
    axes.text(middle, 38, "x", ha="center", va="center", fontsize=12, style="italic")
    for text, color in chain:
        arrow(axes, (middle, y - 14), (middle, y))
        box(axes, x, y, width, 34, text, color)
        y += 48
    arrow(axes, (middle, y - 14), (middle, y + 6))
    box(axes, middle - 19, y + 6, 38, 38, "+", SUM, fontsize=15)
    axes.text(middle - 14, y - 5, "F(x)", ha="right", va="center", fontsize=10, style="italic")
    axes.plot([middle + 12, side, side], [38, 38, y + 25], color=ORANGE, lw=2)
    arrow(axes, (side, y + 25), (middle + 19, y + 25))
    axes.text(side + 14, 200, "shortcut: x unchanged", rotation=-90, ha="center", va="center", fontsize=9)
    arrow(axes, (middle, y + 44), (middle, y + 58))
    box(axes, middle - 45, y + 58, 90, 30, "ReLU", GRAY)
    arrow(axes, (middle, y + 88), (middle, y + 102))
    axes.text(middle, y + 116, "y = relu(x + F(x))", ha="center", va="center", fontsize=11, style="italic")


def draw() -> None:
    """Draw the stages, and beside them the bottleneck."""
    with style():
        figure = Figure(figsize=(DOCUMENT_WIDTH, DOCUMENT_WIDTH * HEIGHT / WIDTH))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        axes.axis("off")
        stages(axes)
        bottleneck(axes)
        save_document(figure, FOLDER / "resnet101.png")


if __name__ == "__main__":
    draw()
