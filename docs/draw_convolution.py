"""Draw the figures of docs/numpy_engine.md: python docs/draw_convolution.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

from numpy_ref.layers import im2col, output_size, taps

FOLDER = Path(__file__).parent
IMAGE, PADDING, FIELD, OUTPUT = "#dbe7f5", "#f2f2f2", "#e8743b", "#3b6fb5"
EDGE = "#5a6675"


def grid(
    axes: Any, rows: int, cols: int, color: Any, numbers: Any = None, at: tuple[float, float] = (0, 0)
) -> None:
    """A grid of cells, its upper left corner at `at`; `color` and `numbers` take (row, col)."""
    for row in range(rows):
        for col in range(cols):
            x, y = at[0] + col, at[1] + row
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=color(row, col), edgecolor=EDGE, linewidth=0.8))
            if numbers is not None:
                axes.text(x + 0.5, y + 0.52, numbers(row, col), ha="center", va="center", fontsize=8)


def clean(axes: Any, width: float, height: float, title: str) -> None:
    """No ticks, square cells, origin in the upper left corner."""
    axes.set(xlim=(-0.3, width + 0.3), ylim=(height + 0.3, -0.3), aspect="equal")
    axes.axis("off")
    axes.set_title(title, fontsize=10)


def draw_windows() -> None:
    """A 3x3 kernel on 5x5 images: plain, padded, and with stride 2."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for axes, stride, padding in zip(panels, (1, 1, 2), (0, 1, 1), strict=True):
        size = 5 + 2 * padding
        out, _ = output_size((5, 5), (3, 3), (stride, stride), (padding, padding))
        at = (1, 1) if stride == 1 else (1, 2)  # the output that is shown

        def color(row: int, col: int, p: int = padding, s: int = stride, a: tuple[int, int] = at) -> str:
            if a[0] * s <= row < a[0] * s + 3 and a[1] * s <= col < a[1] * s + 3:
                return FIELD
            return IMAGE if p <= row < p + 5 and p <= col < p + 5 else PADDING

        grid(axes, size, size, color)
        left = size + 1.6
        grid(
            axes,
            out,
            out,
            lambda row, col, a=at: FIELD if (row, col) == a else OUTPUT,
            at=(left, (size - out) / 2),
        )
        arrow = FancyArrowPatch(
            (at[1] * stride + 3, at[0] * stride + 1.5),
            (left + at[1], (size - out) / 2 + at[0] + 0.5),
            arrowstyle="-|>",
            mutation_scale=12,
            color="#333333",
        )
        axes.add_patch(arrow)
        clean(axes, left + out, size, f"stride {stride}, padding {padding}: {out} x {out} outputs")
    figure.savefig(FOLDER / "convolution.png", dpi=130)


def draw_patches() -> None:
    """im2col of a 3x3 image with a 2x2 kernel: each row a receptive field, each column a tap."""
    x = np.arange(1, 10, dtype=np.float64).reshape(1, 3, 3, 1)
    patches = im2col(x, (2, 2), (1, 1), (0, 0)).reshape(4, 4)
    shades = ["#f7c6a8", "#bfe3c6", "#c5d8f3", "#e6cdee"]  # one for each output
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    grid(axes, 3, 3, lambda row, col: IMAGE, lambda row, col: f"{x[0, row, col, 0]:.0f}", at=(0, 0.5))
    grid(axes, 4, 4, lambda row, col: shades[row], lambda row, col: f"{patches[row, col]:.0f}", at=(5, 0))
    grid(axes, 4, 1, lambda row, col: "#ffffff", lambda row, col: f"w{row}", at=(10.6, 0))
    grid(axes, 4, 1, lambda row, col: shades[row], lambda row, col: f"y{row}", at=(13.2, 0))
    for x_at, text in ((4, "im2col"), (9.8, "@"), (12.4, "=")):
        axes.text(x_at, 2, text, ha="center", va="center", fontsize=12)
    axes.text(1.5, 4, "image", ha="center", fontsize=9)
    axes.text(
        7, 4.5, "a row: what one output sees\na column: what one tap meets", ha="center", va="top", fontsize=9
    )
    axes.text(11.1, 4.5, "kernel", ha="center", va="top", fontsize=9)
    axes.text(13.7, 4.5, "output", ha="center", va="top", fontsize=9)
    clean(axes, 14.4, 5.6, "")
    figure.savefig(FOLDER / "im2col.png", dpi=130)
    assert len(list(taps((2, 2), (1, 1), (2, 2)))) == patches.shape[1]


if __name__ == "__main__":
    draw_windows()
    draw_patches()
