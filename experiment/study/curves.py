"""The figures of a study: test results, accuracy against the learning rate, and curves of its runs.

Each method has a panel with the same axes: the method in color, all others in gray behind it. Bands and bars
are the 95 % interval of the mean. Where it reaches beyond possible values, such as an accuracy above 100 %,
they end there. On a log axis, mean and interval are those of the logarithm, so no band reaches below 0.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
from experiment.study.running import lines
from experiment.study.statistics import half_width

Json = dict[str, Any]
Curve = tuple[np.ndarray, np.ndarray]  # steps [T], values [seeds, T]
Curves = dict[str, Curve]  # by the method's label

COLUMNS = 4
GRAY = tint(FAINT, 0.45)
BLOCK_HEIGHT = (0.45, 1.35)  # inches of its title and axis, and of each row of panels


def draw(study: Json, folder: Path) -> list[Path]:
    """Draw every figure for which there are numbers; the curves for each variant, even without any.

    Returns the PNG files, in `folder`, which is that of the study.
    """
    variants = dict.fromkeys(method.get("variant", "") for method in _methods(study).values())
    return [*draw_numbers(study, folder), *(_draw_curves(study, folder, variant) for variant in variants)]


def _methods(study: Json) -> Json:
    """Return the methods by name; study.json keeps the first version's key for them."""
    methods: Json = study["contestants"]
    return methods


def draw_numbers(study: Json, folder: Path, prefix: str = "") -> list[Path]:
    """Draw what study.json suffices for: PREFIXresults.png, and PREFIXrates.png if rates were tuned."""
    paths = []
    for name, drawing in (("results", _draw_results), ("rates", _draw_rates)):
        with style():
            figure = drawing(study)
            if figure is not None:
                save_document(figure, folder / f"{prefix}{name}.png")
                paths.append(folder / f"{prefix}{name}.png")
    return paths


def _draw_results(study: Json) -> Any:
    """Draw the test accuracy of each seed, with the mean and its interval."""
    from matplotlib.figure import Figure

    methods = {name: method for name, method in _methods(study).items() if method["runs"]}
    if not methods:
        return None
    figure = Figure(figsize=(DOCUMENT_WIDTH, 0.9 + 0.32 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for row, method in enumerate(methods.values()):
        values = [100 * run["accuracy"] for run in method["runs"].values()]
        mean, low, high = (method["accuracy"][key] for key in ("mean", "low", "high"))
        text = f"{100 * mean:.2f}"
        if low is not None:
            text += f"  ({100 * low:.2f} to {100 * high:.2f})"
            axes.plot(
                np.clip([100 * low, 100 * high], 0, 100),
                [row] * 2,
                color=tint(BLUE, 0.3),
                lw=6,
                solid_capstyle="butt",
            )
        axes.plot([100 * mean] * 2, [row - 0.3, row + 0.3], color=BLUE, lw=2)
        axes.plot(values, [row] * len(values), "o", color=INK, ms=3.5)
        axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(range(len(methods)), methods)
    axes.set(ylim=(len(methods) - 0.5, -0.5), xlabel="test accuracy, %")
    seeds = "a dot is a seed; line and band: the mean and its 95 % interval"
    axes.set_title(f"{study['name']}: {seeds if len(study['seeds']) > 1 else 'one seed'}")
    return figure


def _draw_rates(study: Json) -> Any:
    """Draw validation accuracy in tuning against the learning rate; a cross where every run diverged."""
    from matplotlib.figure import Figure

    tuned: Curves = {}
    for name, method in _methods(study).items():
        trials = sorted((trial["setting"].get("lr", np.nan), _accuracy(trial)) for trial in method["tuning"])
        rates, accuracies = np.array(trials).reshape(-1, 2).T
        if len(set(rates)) > 1 and np.isfinite(rates).all():
            tuned[name] = rates, accuracies[None]
    if not tuned:
        return None
    figure = Figure(figsize=(DOCUMENT_WIDTH, _height(len(tuned))), layout="constrained")
    diverged = any(np.isnan(accuracies).any() for _, accuracies in tuned.values())
    title = "validation accuracy in tuning, %, against the learning rate; square: chosen; gray: others"
    panels = _panels(figure, tuned, title + ("; cross: diverged" if diverged else ""))
    for (name, (rates, accuracies)), axes in zip(tuned.items(), panels, strict=True):
        axes.plot(rates, accuracies[0], "o-", color=BLUE, ms=4)
        lost = rates[np.isnan(accuracies[0])]
        axes.plot(lost, [0.06] * len(lost), "x", color=INK, ms=5, transform=axes.get_xaxis_transform())
        chosen = _methods(study)[name]["chosen"]
        if chosen is not None:
            trial = _methods(study)[name]["tuning"][chosen]
            point = trial["setting"]["lr"], _accuracy(trial)
            axes.plot(*point, "s", mfc="none", color=ORANGE, ms=9, mew=1.6, clip_on=False)
    panels[0].set_xscale("log")
    panels[0].margins(y=0.12)
    return figure


def _accuracy(trial: Json) -> float:
    """Return the mean validation accuracy of a configuration over the tuning seeds, in percent.

    A diverged run counts as 0, as in the choice. Return NaN if every run diverged.
    """
    accuracies = trial["val_accuracy"]
    if all(accuracy is None for accuracy in accuracies):
        return np.nan
    return 100 * sum(accuracy or 0 for accuracy in accuracies) / len(accuracies)


def _draw_curves(study: Json, folder: Path, variant: str) -> Path:
    """Draw training loss, validation accuracy and coordinates clipped by AdaBound, of every method."""
    from matplotlib.figure import Figure

    seeds = len(study["seeds"])
    loss, accuracy, lower, upper = (Curves() for _ in range(4))
    for name, method in _methods(study).items():
        runs = [folder / "runs" / name / f"seed-{seed}" for seed in method["runs"]]
        if method["variant"] != variant or not runs:
            continue
        label = method["optimizer"] + (f" ({len(runs)} of {seeds} seeds)" if len(runs) < seeds else "")
        loss[label] = smooth(curve(runs, "train", "step", "loss"))
        accuracy[label] = curve(runs, "val", "epoch", "accuracy")
        for curves, key in ((lower, "at_lower"), (upper, "at_upper")):
            if next(lines(runs[0], "train", "step"), {}).get(key) is not None:
                curves[label] = smooth(curve(runs, "train", "step", key))
    blocks = [curves for curves in (loss, accuracy, upper) if curves]
    title = f"{study['name']}{', ' + variant if variant else ''}: "
    title += f"mean of {seeds} seeds and its 95 % interval" if seeds > 1 else "one seed"
    path = folder / f"curves{'-' + variant if variant else ''}.png"
    with style():
        heights = [_height(len(curves)) for curves in blocks]
        figure = Figure(figsize=(DOCUMENT_WIDTH, 0.4 + sum(heights)), layout="constrained")
        figure.suptitle(title, fontsize=10)
        if blocks:
            parts = iter(figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0])
            words = "training loss (running mean) against the step; gray: the other methods"
            _draw_block(next(parts), loss, words, 1, np.inf)
            _draw_block(next(parts), accuracy, "validation accuracy, %, against the step", 100, 100)
            if upper:
                words = "coordinates clipped, %: at the upper bound (blue), at the lower (orange, dashed)"
                panels = _draw_block(next(parts), upper, words, 100, 100)
                panels[0].set_ylim(-3, 103)
                for axes, lower_curve in zip(panels, lower.values(), strict=True):
                    _band(axes, lower_curve, ORANGE, "--", 100, 100)
        save_document(figure, path)
    return path


def _draw_block(figure: Any, curves: Curves, title: str, scale: float, top: float) -> list[Any]:
    """Draw curves as panels; positive values without a largest one, `top`, on a log axis."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    scaled = {label: (steps, scale * values) for label, (steps, values) in curves.items()}
    every = np.concatenate([np.ravel(values) for _, values in scaled.values()])
    every = every[np.isfinite(every)]
    log = bool(np.isinf(top) and len(every) and every.min() > 0)
    panels = _panels(figure, scaled, title, log=log)
    if log:  # the axis shows the means; a band of few seeds may leave it
        means = np.concatenate([_mean(values, log=True) for _, values in scaled.values()])
        means = means[np.isfinite(means)]
        panels[0].set(yscale="log", ylim=(means.min() / 2, means.max() * 2) if len(means) else None)
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # the panels share their axes
        panels[0].yaxis.set_major_formatter(FormatStrFormatter("%g"))
        panels[0].yaxis.set_minor_formatter(NullFormatter())
    for single, axes in zip(curves.values(), panels, strict=True):
        _band(axes, single, BLUE, "-", scale, top, log=log)
    return panels


def _height(panels: int) -> float:
    """Inches of a block of panels."""
    return BLOCK_HEIGHT[0] + BLOCK_HEIGHT[1] * -(-panels // COLUMNS)


def _panels(figure: Any, curves: Curves, title: str, *, log: bool = False) -> list[Any]:
    """Make a panel for each curve, all with the same axes, and draw the means of the others in gray."""
    count = len(curves)
    columns = min(COLUMNS, count)
    grid = figure.subplots(-(-count // columns), columns, sharex=True, sharey=True, squeeze=False)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left", fontweight="bold")
    panels = list(grid.flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    for axes in panels[count - columns : count]:
        axes.tick_params(labelbottom=True)  # also above an empty place
    for axes, label in zip(panels, curves, strict=False):
        axes.set_title(label, fontsize=8, fontweight="normal")
        axes.tick_params(labelsize=7)
        for other, (steps, values) in curves.items():
            if other != label:
                axes.plot(steps, _mean(values, log=log), color=GRAY, lw=0.8)
    return panels[:count]


def curve(runs: Sequence[Path], split: str, scope: str, key: str) -> Curve:
    """One number of all runs, as far as all of them have it; NaN where it is not finite."""
    of_runs = [[(line["step"], line[key]) for line in lines(run, split, scope)] for run in runs]
    length = min(map(len, of_runs))
    steps = np.array([step for step, _ in of_runs[0][:length]])
    values = [[np.nan if value is None else value for _, value in pairs[:length]] for pairs in of_runs]
    return steps, np.array(values, float).reshape(len(runs), length)


def smooth(curve: Curve) -> Curve:
    """Running mean over a 25th of the curve, at least five values."""
    steps, values = curve
    width = min(max(5, len(steps) // 25), len(steps)) or 1
    kernel = np.ones(width) / width
    return steps[width - 1 :], np.array([np.convolve(row, kernel, "valid") for row in values])


def _mean(values: np.ndarray, *, log: bool = False) -> np.ndarray:
    """Return the mean [T] of values [seeds, T]; with `log`, the geometric mean."""
    return np.asarray(np.exp(np.log(values).mean(0)) if log else values.mean(0))


def interval(values: np.ndarray, top: float, *, log: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends of the mean's 95 % interval [T] of values [seeds, T], cut to 0 and `top`.

    With `log`, return those of the geometric mean: the interval of the logarithm's mean, as powers.
    """
    values = np.log(values) if log else values
    half = half_width(len(values)) * values.std(0, ddof=1)
    low, high = _mean(values) - half, _mean(values) + half
    low, high = (np.exp(low), np.exp(high)) if log else (low, high)
    return np.clip(low, 0, top), np.clip(high, 0, top)


def _band(
    axes: Any, curve: Curve, color: str, line: str, scale: float, top: float, *, log: bool = False
) -> None:
    steps, values = curve[0], scale * curve[1]
    if not len(steps):
        return
    marker = "o" if len(steps) < 15 else ""
    axes.plot(steps, _mean(values, log=log), color=color, linestyle=line, lw=1.3, marker=marker, ms=3)
    if len(values) > 1:
        axes.fill_between(steps, *interval(values, top, log=log), color=color, alpha=0.2, linewidth=0)
