"""How figures look: one style, colors that the color-blind can distinguish, SVG for light and dark, PNG."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# On light and on dark ground. The six of the curves are Okabe and Ito's (2008), brighter in the dark.
COLORS = {
    "ink": ("#24292f", "#d4dae1"),
    "faint": ("#818b98", "#7d8590"),
    "grid": ("#dfe4e9", "#2f353d"),
    "blue": ("#0072b2", "#4fb0ec"),
    "orange": ("#d55e00", "#ff8d4f"),
    "green": ("#009e73", "#33cfa2"),
    "pink": ("#cc79a7", "#eba6cb"),
    "amber": ("#e69f00", "#ffc247"),
    "sky": ("#56b4e9", "#b0def9"),
}
INK, FAINT = COLORS["ink"][0], COLORS["faint"][0]
CYCLE = [COLORS[name][0] for name in ("blue", "orange", "green", "pink", "amber", "sky")]
BLUE, ORANGE, GREEN, PINK, AMBER = CYCLE[:5]

STYLE = Path(__file__).with_name("report.mplstyle")
PNG_DPI = 120
DOCUMENT_WIDTH, DOCUMENT_DPI = 8.3, 180
"""Inches and dots per inch of a figure in docs/. GitHub shows it 830 pixels wide: 9 points are 12 pixels."""
_drawing = threading.Lock()


@contextmanager
def style() -> Iterator[None]:
    """Apply the style; everything is drawn and saved inside of this context."""
    import matplotlib.style

    # Style and warnings are global to the process, so that only one run may draw at a time
    with _drawing, matplotlib.style.context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class name in another script
        yield


def panel(
    title: str, width: float = 5.2, height: float = 2.9, *, fitted: bool = False
) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` inches with one pair of axes.

    Margins are fixed, which draws twice as fast, unless they are `fitted` to what stands in them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained" if fitted else None)
    left, right, bottom, top = 0.55 / width, 1 - 0.12 / width, 0.45 / height, 1 - 0.3 / height
    if not fitted:
        figure.subplots_adjust(left=left, right=right, bottom=bottom, top=top)
    axes = figure.subplots()
    axes.set_title(title, parse_math=False)
    return figure, axes


def legend(axes: Axes, columns: int = 3) -> None:
    """Name the curves that have points, in rows between title and axes, where they hide nothing."""
    curves = [
        line for line in axes.get_lines() if np.size(line.get_xdata()) and str(line.get_label())[:1] != "_"
    ]
    if not curves:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    rows = 0.19 * -(-len(curves) // columns)  # inches
    figure.subplots_adjust(top=1 - (0.3 + rows) / figure.get_figheight())
    axes.set_title(axes.get_title("left"), pad=6 + 72 * rows, parse_math=False)
    axes.legend(handles=curves, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def svg(figure: Figure) -> bytes:
    """The figure as SVG whose colors follow the reader's light or dark."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().decode()
    for name, (light, _) in COLORS.items():
        text = text.replace(light, f"var(--{name})")
    light, dark = ("".join(f"--{name}:{both[i]};" for name, both in COLORS.items()) for i in (0, 1))
    rules = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    start = text.index(">", text.index("<svg")) + 1
    return f"{text[:start]}<style>{rules}</style>{text[start:]}".encode()


def png(figure: Figure, dpi: int = PNG_DPI) -> bytes:
    """The figure as PNG on white ground."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def save_document(figure: Figure, path: Path) -> None:
    """Write a figure of docs/ as PNG."""
    save_reduced(png(figure, DOCUMENT_DPI), path)


def save_reduced(content: bytes, path: Path) -> None:
    """Write a PNG with a palette of 256 colors: a third of its size."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        rgb = image.convert("RGB")
    reduced = rgb.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)


def tint(color: str, share: float) -> str:
    """`color` on white, of which `share` (0 to 1) is the color."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = (1 - share * (1 - part) for part in to_rgb(color))
    return to_hex((red, green, blue))
