"""The figures of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from experiment.files.predictions import Predictions
from experiment.report.reading import Floats, RunFiles
from experiment.report.style import BLUE, GREEN, INK, ORANGE, PINK, legend, panel, png, style, svg
from experiment.report.tables import confusion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = {"loss": "Loss", "accuracy": "Accuracy", "f1": "Macro F1"}
LINES = {  # title, label of each number, whether a logarithmic scale may be used
    "lr": ("Learning rate", {"lr": "learning rate"}, False),
    "norms": ("Norms", {"grad_norm": "gradient", "update_norm": "update"}, True),
    "bounds": ("AdaBound's bounds of the step size", {"lower_bound": "lower", "upper_bound": "upper"}, True),
    "clipped": (
        "Coordinates clipped to a bound",
        {"at_lower": "at the lower", "at_upper": "at the upper"},
        False,
    ),
}
ALT = {  # each figure in words, for those who cannot see it
    **{key: f"{title} against the step" for key, title in METRICS.items()},
    "lr": "learning rate against the step",
    "norms": "norms of gradient and update against the step",
    "bounds": "lower and upper bound of AdaBound against the step",
    "clipped": "fraction of coordinates at each bound against the step",
    "gradients": "norm of each layer's gradient, at the first, the middle and the last step",
    "filters": "filters of the first convolution",
    "confusion": "confusion matrix of the test set",
    "samples": "images of the test set with true and predicted class",
    "mistakes": "the most confident mistakes on the test set",
}
SHEETS = ("samples", "mistakes")
"""Figures that the page shows as single images."""
MOST_POINTS = 500
"""Points of a curve; one with more is drawn as means of equal parts."""
MOST_NAMED = 40
"""Classes up to which a confusion matrix has their names at its sides."""
MOST_COUNTED = 20
"""Classes up to which it has the counts in its cells."""


MOST_FILTERS = 64
"""Filters of the first convolution that are drawn."""


class ReportFigure(NamedTuple):
    """A figure of a report, drawn."""

    name: str  # of its PNG file, without the suffix
    alt: str  # what it shows, for those who cannot see it
    svg: bytes  # empty for one of `SHEETS`
    png: bytes


def draw(run: RunFiles) -> dict[str, ReportFigure]:
    """Every figure for which the run has numbers, by name."""
    with style():
        figures = {
            **{key: _metric(run, key) for key in METRICS},
            **{name: _lines(run, *curves) for name, curves in LINES.items()},
        }
        figures["gradients"] = _gradients(run)
        if run.kernel is not None:
            figures["filters"] = filters(*run.kernel)
        if run.predictions is not None:
            figures["confusion"] = _confusion(run.predictions)
            samples, mistakes = chosen(run.predictions)
            figures["samples"] = _sheet(run.predictions, samples, "Samples")
            figures["mistakes"] = _sheet(run.predictions, mistakes, "The most confident mistakes")
        drawn = {}
        for name, figure in figures.items():
            if figure is not None:
                vectors = b"" if name in SHEETS else svg(figure)
                drawn[name] = ReportFigure(name, f"{run.title}: {ALT[name]}", vectors, png(figure))
        return drawn


def chosen(predictions: Predictions) -> tuple[range, range]:
    """Return which of the stored images are samples, and which mistakes."""
    return range(predictions.samples), range(predictions.samples, len(predictions.shown))


def caption(predictions: Predictions, k: int) -> tuple[str, str, float]:
    """Return the true class, the predicted class and the confidence of stored image `k`."""
    i = predictions.shown[k]
    true, predicted = (predictions.class_names[of[i]] for of in (predictions.labels, predictions.predictions))
    return true, predicted, float(predictions.confidences[i])


def thin(steps: Floats, values: Floats, most: int = MOST_POINTS) -> tuple[Floats, Floats]:
    """At most `most` points: the means of equal parts of a curve, whose parts may hold NaN."""
    if len(steps) <= most:
        return steps, values
    parts = np.array_split(np.stack([steps, values]), most, axis=1)
    means = np.array([part.mean(1) for part in parts])
    return means[:, 0], means[:, 1]


def smooth(values: Floats, window: int) -> Floats:
    """The mean of `window` values around each, of fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + (window + 1) // 2, len(values))
    smoothed: Floats = (total[high] - total[low]) / (high - low)
    return smoothed


def is_wide(values: Floats) -> bool:
    """True if a logarithmic scale shows positive values better."""
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > 20 * values.min())


def _metric(run: RunFiles, key: str) -> Figure | None:
    """Training by step and by epoch, validation, test, and the best validation."""
    steps, values = thin(*run.curve("train", "step", key))
    epochs = run.curve("train", "epoch", key)
    validation, test = run.curve("val", "epoch", key), run.curve("test", "epoch", key)
    if not any(len(x) for x in (steps, validation[0], test[0])):
        return None
    figure, axes = panel(METRICS[key])
    points = "." if len(steps) < 10 else ""  # a line does not show a point alone or between NaN values
    axes.plot(steps, values, color=BLUE, lw=0.8, alpha=0.4, marker=points, label="training, a step")
    if len(epochs[0]) > 1:
        axes.plot(*epochs, "o-", color=BLUE, ms=3.5, label="training, an epoch")
    elif len(steps) > 10:
        smoothed = smooth(values, max(len(values) // 20, 5))
        axes.plot(steps, smoothed, color=BLUE, label="training, running mean")
    axes.plot(*validation, "s-", color=ORANGE, ms=3.5, label="validation")
    axes.plot(*test, "D", color=GREEN, ms=6, label="test")
    if (best := run.best) and key in best:
        ring: dict[str, Any] = {"color": ORANGE, "mfc": "none", "ms": 9, "mew": 1.2}
        axes.plot(best["step"], best[key], "o", label="lowest validation loss", **ring)
    if key == "loss" and is_wide(np.concatenate([values, validation[1], test[1]])):
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_formatter("{x:g}")
    if key != "loss":
        axes.set_ylim(top=1.02)
    _finish(run, axes)
    return figure


def _lines(run: RunFiles, title: str, labels: dict[str, str], logarithmic: bool) -> Figure | None:
    """Plot numbers from the lines of steps, one curve each."""
    curves = {key: thin(*run.curve("train", "step", key)) for key in labels}
    if not any(len(steps) for steps, _ in curves.values()):
        return None
    figure, axes = panel(title, height=2.5)
    for (key, label), color in zip(labels.items(), (BLUE, ORANGE), strict=False):
        axes.plot(*curves[key], color=color, lw=1.3, label=label if len(labels) > 1 else None)
    if logarithmic and any(is_wide(values) for _, values in curves.values()):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:g}")  # a power of ten above the axis would hide the title
    _finish(run, axes)
    return figure


def _gradients(run: RunFiles) -> Figure | None:
    """Gradient norm of each convolution and the head, in network order; one line per step."""
    if not run.gradient_norms:
        return None
    figure, axes = panel("Gradient norm by layer")
    for (step, norms), color in zip(run.gradient_norms, (BLUE, ORANGE, GREEN), strict=False):
        axes.plot(list(norms.values()), "o-", color=color, ms=2.5, lw=1.2, label=f"step {step:,}")
    layers = list(norms)
    stages = [layer.partition(".")[0] for layer in layers]
    starts = [
        index for index, stage in enumerate(stages) if stages.index(stage) == index and "." in layers[index]
    ]
    axes.set_xticks(starts, [stages[index].removeprefix("layer") for index in starts])
    words = f"; numbers: the start of {stages[starts[0]]} to {stages[starts[-1]]}" if starts else ""
    axes.set_xlabel(f"layer, from {layers[0]} to {layers[-1]}{words}")
    values = np.array([value for _, norms in run.gradient_norms for value in norms.values()])
    if len(positive := values[np.isfinite(values) & (values > 0)]):
        decades = np.log10([positive.min(), positive.max()])
        axes.set_yscale("log")
        axes.set_ylim(10 ** np.floor(decades[0]), 10 ** np.ceil(decades[1] + 0.01))
        axes.yaxis.set_minor_formatter("")
    legend(axes)
    return figure


def _finish(run: RunFiles, axes: Axes) -> None:
    """Resumes, the label of the steps, a legend."""
    for number, step in enumerate(run.resumes):
        label = "resumed" if number == 0 else None
        axes.axvline(step, color=PINK, lw=1.2, ls=(0, (3, 2)), zorder=1.5, label=label)
    per_epoch = f" ({run.steps_per_epoch:,} an epoch)" if run.steps_per_epoch else ""
    axes.set_xlabel(f"step{per_epoch}")
    legend(axes)


def filters(kernel: npt.NDArray[Any], step: int | None = None) -> Figure | None:
    """Draw the kernels [out, in, KH, KW] of a first convolution, with one scale; a weight of 0 is mid-gray.

    None for images that are neither gray nor RGB.
    """
    count, channels, height, width = kernel.shape
    largest = np.abs(kernel).max()
    if channels not in (1, 3) or not np.isfinite(largest):
        return None
    shown = kernel[:MOST_FILTERS]
    columns = 16 if len(shown) > 16 else 8
    rows = -(-len(shown) // columns)
    mosaic = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, 4))  # transparent gaps
    for index, weights in enumerate(shown):
        y, x = index // columns * (height + 1), index % columns * (width + 1)
        gray_or_rgb = 0.5 + 0.5 * weights.transpose(1, 2, 0) / (largest or 1)
        mosaic[y : y + height, x : x + width] = np.ones(4)
        mosaic[y : y + height, x : x + width, :3] = gray_or_rgb
    some = f"{len(shown)} of {count}" if len(shown) < count else f"{count}"
    title = f"Filters of the first convolution ({some})" + ("" if step is None else f", step {step:,}")
    figure, axes = panel(title, 5.2, 0.5 + 5.1 * len(mosaic) / mosaic.shape[1])
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02)
    axes.imshow(mosaic, interpolation="none")
    axes.set_axis_off()
    return figure


def _confusion(predictions: Predictions) -> Figure:
    """Rows are the true classes; the color is the share of the row, errors in another color.

    Classes that occur neither among the labels nor the predictions are left out.
    """
    from matplotlib.colors import to_rgb

    matrix = confusion(predictions)
    present = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    matrix, k = matrix[np.ix_(present, present)], len(present)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # Transparent, so that it lies on light and on dark ground. Errors are few: the root lets them be seen.
    image = np.empty((k, k, 4))
    image[..., :3] = to_rgb(ORANGE)
    image[..., 3] = np.sqrt(share) * 0.9
    diagonal = np.eye(k, dtype=bool)
    image[diagonal, :3] = to_rgb("#2a8fd0")
    image[diagonal, 3] = share[diagonal] * 0.6
    side = 5.2 if k <= MOST_COUNTED else 6.4
    of_all = f" of {len(predictions.class_names)}" if k < len(predictions.class_names) else ""
    figure, axes = panel(f"Confusion of {k}{of_all} classes", side, side, fitted=True)
    axes.imshow(image, interpolation="none")
    axes.grid(False)
    axes.set(xlabel="predicted", ylabel="true")
    if k <= MOST_NAMED:
        size = 8 if k <= MOST_COUNTED else 6
        names = [_short(predictions.class_names[i]) for i in present]
        turn = 0 if max(map(len, names)) <= 2 else 90
        axes.set_xticks(range(k), names, rotation=turn, fontsize=size, parse_math=False)
        axes.set_yticks(range(k), names, fontsize=size, parse_math=False)
    if k <= MOST_COUNTED:
        for i, j in zip(*np.nonzero(matrix), strict=True):
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", fontsize=7, color=INK)
    return figure


def _sheet(predictions: Predictions, which: Sequence[int], title: str) -> Figure | None:
    """Images in rows, true and predicted class above each."""
    if not len(which):
        return None
    columns = 8
    rows = -(-len(which) // columns)
    _, height, width, _ = predictions.images.shape
    gap_x, gap_y = round(width * 0.25) + 1, round(height * 0.6) + 1
    mosaic = np.zeros((rows * (height + gap_y), columns * (width + gap_x), 4), np.uint8)
    figure, axes = panel(title, 10, 10 * len(mosaic) / mosaic.shape[1] + 0.4)
    for place, k in enumerate(which):
        row, column = divmod(place, columns)
        y, x = row * (height + gap_y) + gap_y, column * (width + gap_x)
        mosaic[y : y + height, x : x + width, :3] = predictions.images[k]  # gray goes to all three
        mosaic[y : y + height, x : x + width, 3] = 255
        true, predicted, confidence = caption(predictions, k)
        right = true == predicted
        text = f"{confidence:.2f} {_short(true)}" + ("" if right else f"\nnot {_short(predicted)}")
        axes.text(x, y - gap_y * 0.1, text, color=INK if right else ORANGE, fontsize=6.5, parse_math=False)
    axes.imshow(mosaic, interpolation="none")
    axes.set_axis_off()
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01)
    return figure


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
