"""Draw the figures of docs/numpy_engine.md: python docs/draw_convolution.py

Every number in them is computed by numpy_ref.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from experiment.report.style import (
    AMBER,
    BLUE,
    DOCUMENT_WIDTH,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    save_document,
    style,
    tint,
)
from numpy_ref.layers import im2col
from numpy_ref.layers.convolution import pad2d

FOLDER = Path(__file__).parent
IMAGE, WINDOW, KERNEL, OUTPUT = tint(BLUE, 0.2), tint(ORANGE, 0.5), tint(GREEN, 0.3), tint(FAINT, 0.15)
Color = Callable[[int, int], str]


def canvas(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of `width` x `height` square units, with the origin at the upper left."""
    figure = Figure(figsize=(DOCUMENT_WIDTH, DOCUMENT_WIDTH * height / width))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def grid(axes: Any, numbers: Any, x: float, y: float, color: Color) -> None:
    """Draw a matrix of numbers as cells of one unit, with the upper left corner at (x, y)."""
    for (row, col), number in np.ndenumerate(numbers):
        cell = Rectangle((x + col, y + row), 1, 1, fc=color(row, col), ec=FAINT, lw=0.7)
        axes.add_patch(cell)
        gray = number == 0 and color(row, col) == "white"
        minus = f"{number:.0f}".replace("-", "\N{MINUS SIGN}")
        label(axes, x + col + 0.5, y + row + 0.5, minus, color=FAINT if gray else INK)


def label(axes: Any, x: float, y: float, text: str, **options: Any) -> None:
    """Write a text, centered by default."""
    axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 9, **options})


def outline(axes: Any, x: float, y: float, width: float, height: float) -> None:
    """Draw a thick frame around cells."""
    axes.add_patch(Rectangle((x, y), width, height, fill=False, ec=ORANGE, lw=2.4, zorder=3))


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK, zorder=4))


def convolve(image: Any, kernel: Any, stride: int, padding: int) -> Any:
    """Return the outputs [OH, OW] of one image [H, W] and one kernel [KH, KW]."""
    pairs = kernel.shape, (stride, stride), (padding, padding)
    return (im2col(image[None, :, :, None], *pairs) @ kernel.reshape(-1, 1))[0, :, :, 0]


def draw_case(
    axes: Any, image: Any, kernel: Any, stride: int, padding: int, at: tuple[int, int], corner: float
) -> None:
    """Draw a padded image and its output at x = `corner`, with the window of output `at` in orange."""
    padded = pad2d(image[None, :, :, None], (padding, padding))[0, :, :, 0]
    output = convolve(image, kernel, stride, padding)
    (size, out), (top, left) = (len(padded), len(output)), (at[0] * stride, at[1] * stride)
    y = 9.6 + (7 - size) / 2

    def color(row: int, col: int) -> str:
        if top <= row < top + len(kernel) and left <= col < left + len(kernel):
            return WINDOW
        inside = all(padding <= k < size - padding for k in (row, col))
        return IMAGE if inside else "white"

    grid(axes, padded, corner, y, color)
    outline(axes, corner + left, y + top, len(kernel), len(kernel))
    x, y_out = corner + size + 1.6, y + (size - out) / 2
    grid(axes, output, x, y_out, lambda row, col: WINDOW if (row, col) == at else OUTPUT)
    outline(axes, x + at[1], y_out + at[0], 1, 1)
    arrow(axes, (corner + size + 0.2, y + size / 2), (x - 0.2, y + size / 2))
    words = f"stride {stride}, padding {padding}"
    label(axes, corner, 8.7, words, ha="left", fontsize=10, weight="bold")
    label(axes, corner, y + size + 0.6, f"{len(image)} x {len(image)}, padded to {size} x {size}", ha="left")
    label(axes, x + out / 2, y + size + 0.6, f"{out} x {out}")


def draw_windows() -> None:
    """Draw a 3x3 kernel on a 5x5 image: plain with its sum written out, padded, and with stride 2."""
    image = np.array(
        [[3, 0, 1, 2, 1], [1, 2, 0, 3, 1], [0, 3, 2, 1, 0], [2, 1, 3, 0, 2], [1, 0, 2, 1, 3]], float
    )
    kernel = np.array([[0, 1, 0], [1, 2, 1], [0, 1, 0]], float)
    output = convolve(image, kernel, 1, 0)
    with style():
        figure, axes = canvas(29.6, 18.2)
        label(axes, 0.4, 0.7, "stride 1, padding 0", ha="left", fontsize=10, weight="bold")
        inside = [(row, col) for row in (1, 2, 3) for col in (1, 2, 3)]
        grid(axes, image, 0.4, 1.5, lambda row, col: WINDOW if (row, col) in inside else IMAGE)
        outline(axes, 1.4, 2.5, 3, 3)
        label(axes, 6.3, 4, "*", fontsize=14)
        grid(axes, kernel, 7.2, 2.5, lambda row, col: KERNEL)
        label(axes, 11.1, 4, "=", fontsize=14)
        grid(axes, output, 12, 2.5, lambda row, col: WINDOW if (row, col) == (1, 1) else OUTPUT)
        outline(axes, 13, 3.5, 1, 1)
        for x, text in ((2.9, "image, 5 x 5"), (8.7, "kernel, 3 x 3"), (13.5, "output, 3 x 3")):
            label(axes, x, 7.1, text)
        rows = zip(image[1:4, 1:4], kernel, strict=True)
        sums = [" + ".join(f"{w:.0f}·{v:.0f}" for v, w in zip(*row, strict=True)) for row in rows]
        text = "The orange output is the sum of\nwindow times kernel, cell by cell:\n\n"
        text += " +\n".join(sums) + f"\n= {output[1, 1]:.0f}"
        label(axes, 17, 4, text, ha="left", linespacing=1.5)
        draw_case(axes, image, kernel, 1, 1, (1, 1), 0.4)
        draw_case(axes, image, kernel, 2, 1, (1, 2), 17)
        save_document(figure, FOLDER / "convolution.png")


def draw_patches() -> None:
    """Draw im2col of a 3x3 image with a 2x2 kernel: a pixel keeps its color, one window is framed."""
    image, kernel = np.arange(1.0, 10).reshape(3, 3), np.array([[2, 1], [0, -1]], float)
    patches = im2col(image[None, :, :, None], (2, 2), (1, 1), (0, 0)).reshape(4, 4)
    output = (patches @ kernel.reshape(4, 1)).reshape(2, 2)
    hues, shares = (BLUE, AMBER, GREEN), (0.15, 0.35, 0.6)  # rows of the image by hue, columns by lightness
    pixel = [tint(hue, share) for hue in hues for share in shares]
    framed = 1  # the output, and its row of the patches

    with style():
        figure, axes = canvas(21.2, 7.9)
        grid(axes, image, 0.4, 2.3, lambda row, col: pixel[3 * row + col])
        outline(axes, 1.4, 2.3, 2, 2)
        arrow(axes, (3.7, 3.8), (5.3, 3.8))
        label(axes, 4.5, 3.3, "im2col")
        grid(axes, patches, 6.6, 1.8, lambda row, col: pixel[int(patches[row, col]) - 1])
        outline(axes, 6.6, 1.8 + framed, 4, 1)
        for k in range(4):
            label(axes, 6.4, 2.3 + k, f"y{divmod(k, 2)[0]}{k % 2}", ha="right", color=INK)
            label(axes, 7.1 + k, 1.4, f"w{k // 2}{k % 2}")
        label(axes, 11.3, 3.8, "@", fontsize=13)
        grid(axes, kernel.reshape(4, 1), 12, 1.8, lambda row, col: tint(FAINT, 0.2))
        label(axes, 14.3, 3.8, "=", fontsize=13)
        grid(axes, output.reshape(4, 1), 14.8, 1.8, lambda row, col: "white")
        outline(axes, 14.8, 1.8 + framed, 1, 1)
        for k in range(4):
            label(axes, 13.1, 2.3 + k, f"w{k // 2}{k % 2}", ha="left")
            label(axes, 15.9, 2.3 + k, f"y{k // 2}{k % 2}", ha="left")
        arrow(axes, (17, 3.8), (18.3, 3.8))
        label(axes, 17.65, 3.3, "reshape")
        grid(axes, output, 18.6, 2.8, lambda row, col: "white")
        outline(axes, 19.6, 2.8, 1, 1)
        captions = (
            (1.9, "image\n3 x 3"),
            (8.6, "patches, 4 x 4\na row for each output,\na column for each weight"),
        )
        for x, text in (
            *captions,
            (12.5, "kernel, 2 x 2,\nas a column"),
            (15.3, "output"),
            (19.6, "output\n2 x 2"),
        ):
            label(axes, x, 6.05, text, va="top", linespacing=1.4)
        products = zip(patches[framed], kernel.flat, strict=True)
        text = " + ".join(f"{a:.0f}·{b:.0f}" if b >= 0 else f"{a:.0f}·({b:.0f})" for a, b in products)
        text = f"framed:  y01  =  {text}  =  {output.flat[framed]:.0f}".replace("-", "\N{MINUS SIGN}")
        label(axes, 15.2, 0.6, text, color=ORANGE, weight="bold")
        save_document(figure, FOLDER / "im2col.png")


if __name__ == "__main__":
    draw_windows()
    draw_patches()
