"""The figures of a study: test results, accuracy against the learning rate, and curves of its runs.

Each method has a panel with the same axes: the method in color, all others in gray behind it. Bands and bars
are the 95 % interval of the mean. Where it reaches beyond possible values, such as an accuracy above 100 %,
they end there. On a log axis, mean and interval are those of the logarithm, so no band reaches below 0.
"""

from collections.abc import Mapping, Sequence
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
from experiment.study.logs import Record
from experiment.study.statistics import half_width

Json = dict[str, Any]
Curve = tuple[np.ndarray, np.ndarray]  # steps [T], values [seeds, T]
Curves = dict[str, Curve]  # by the method's label

COLUMNS = 4
GRAY = tint(FAINT, 0.45)
BLOCK_HEIGHT = (0.45, 1.35)  # inches of its title and axis, and of each row of panels


def draw(study: Json, records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw results, rates, and the curves of the final runs for each variant, even where there are none.

    Returns the PNG files, in `folder`.
    """
    variants = dict.fromkeys(method.get("variant", "") for method in _methods(study).values())
    curves = [_draw_curves(study, records, folder, variant) for variant in variants]
    return [*draw_numbers(study, folder), *curves]


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
    """Draw the test accuracy of each seed, with the mean and its interval; each workload has its own axis."""
    from matplotlib.figure import Figure

    groups: dict[str, Json] = {}
    for name, method in _methods(study).items():
        group, label = (method["variant"], method["optimizer"]) if study.get("searches") else ("", name)
        if method["runs"]:
            groups.setdefault(group, {})[label] = method
    if not groups:
        return None
    rows = [len(methods) for methods in groups.values()]
    size = (DOCUMENT_WIDTH, 0.4 + 0.5 * len(groups) + 0.32 * sum(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(groups), 1, height_ratios=rows, squeeze=False)
    for (workload, methods), axes in zip(groups.items(), grid[:, 0], strict=True):
        _draw_accuracies(axes, methods)
        axes.set_title(workload)
    grid[-1, 0].set_xlabel("test accuracy, %")
    seeds = "a dot is a seed; line and band: the mean and its 95 % interval"
    title = f"{study['name']}: {seeds if len(study['seeds']) > 1 else 'one seed'}"
    if any(groups):
        figure.suptitle(title, fontsize=10)
    else:
        grid[0, 0].set_title(title)
    return figure


def _draw_accuracies(axes: Any, methods: Json) -> None:
    """Draw a row for each method."""
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
    axes.set_ylim(len(methods) - 0.5, -0.5)


def _draw_rates(study: Json) -> Any:
    """Draw validation accuracy in tuning against the learning rate; a cross where every run diverged."""
    from matplotlib.figure import Figure

    tuned: Curves = {}
    for name, method in _methods(study).items():
        trials = sorted((trial["setting"].get("lr", np.nan), _accuracy(trial)) for trial in method["tuning"])
        rates, accuracies = np.array(trials).reshape(-1, 2).T
        if len(set(rates)) > 1 and np.isfinite(rates).all():
            tuned[name] = rates, accuracies[None]
    if not tuned or study.get("searches"):  # `search_figures.py` has more options than the rate
        return None
    figure = Figure(figsize=(DOCUMENT_WIDTH, height_of(len(tuned))), layout="constrained")
    diverged = any(np.isnan(accuracies).any() for _, accuracies in tuned.values())
    title = "validation accuracy in tuning, %, against the learning rate; square: chosen; gray: others"
    panels = panels_of(figure, tuned, title + ("; cross: diverged" if diverged else ""))
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


def _draw_curves(study: Json, records: Sequence[Record], folder: Path, variant: str) -> Path:
    """Draw training loss, validation accuracy and coordinates clipped by AdaBound, of every method."""
    from matplotlib.figure import Figure

    seeds = len(study["seeds"])
    loss, accuracy, lower, upper = (Curves() for _ in range(4))
    for name, method in _methods(study).items():
        runs = [run for run in records if run["method"] == name and run["trial"] is None]
        runs = [run for run in runs if run["outcome"] == "completed"]
        if method["variant"] != variant or not runs:
            continue
        label = method["optimizer"] + (f" ({len(runs)} of {seeds} seeds)" if len(runs) < seeds else "")
        loss[label] = smooth(curve([run["train"] for run in runs], "loss"))
        accuracy[label] = curve([run["validation"] for run in runs], "accuracy")
        for curves, key in ((lower, "at_lower"), (upper, "at_upper")):
            if all(key in run["train"] for run in runs):
                curves[label] = smooth(curve([run["train"] for run in runs], key))
    blocks = [curves for curves in (loss, accuracy, upper) if curves]
    title = f"{study['name']}{', ' + variant if variant else ''}: "
    title += f"mean of {seeds} seeds and its 95 % interval" if seeds > 1 else "one seed"
    path = folder / f"curves{'-' + variant if variant else ''}.png"
    with style():
        heights = [height_of(len(curves)) for curves in blocks]
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
    panels = panels_of(figure, scaled, title, log=log)
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


def height_of(panels: int) -> float:
    """Inches of a block of panels."""
    return BLOCK_HEIGHT[0] + BLOCK_HEIGHT[1] * -(-panels // COLUMNS)


def panels_of(figure: Any, curves: Curves, title: str, *, log: bool = False, mark: str = "-") -> list[Any]:
    """Make a panel for each curve, all with the same axes; draw the others' means in gray, by `mark`."""
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
                axes.plot(steps, _mean(values, log=log), mark, color=GRAY, lw=0.8, ms=3)
    return panels[:count]


def curve(runs: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """One number of all runs {"step": [T], key: [T]}, as far as all have it; NaN where it is not finite."""
    length = min(len(run["step"]) for run in runs)
    values = [[np.nan if value is None else value for value in run[key][:length]] for run in runs]
    return np.array(runs[0]["step"][:length]), np.array(values, float).reshape(len(runs), length)


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
