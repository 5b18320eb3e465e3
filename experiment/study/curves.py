"""A study's curves: means over seeds, with the 95 % interval of the mean as a band."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiment.study.running import lines
from experiment.study.statistics import half_width

Json = dict[str, Any]
Curve = tuple[np.ndarray, np.ndarray]  # steps [T], values [seeds, T]


def draw(study: Json, folder: Path) -> list[Path]:
    """Draw a PNG for each variant: training loss, validation accuracy, and coordinates clipped by AdaBound.

    Returns the files, in `folder`, which is that of the study.
    """
    return [
        _draw_variant(study, folder, variant)
        for variant in dict.fromkeys(method["variant"] for method in study["contestants"].values())
    ]


def _draw_variant(study: Json, folder: Path, variant: str) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = {name: method for name, method in study["contestants"].items() if method["variant"] == variant}
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, accuracy), (lower, upper) = figure.subplots(2, 2)
    for index, (name, method) in enumerate(methods.items()):
        runs = [folder / "runs" / name / f"seed-{seed}" for seed in method["runs"]]
        if not runs:
            continue
        color, style = f"C{index % 10}", "-" if index < 10 else "--"
        label, planned = method["optimizer"], len(study["seeds"])
        label += f" ({len(runs)} of {planned} seeds)" if len(runs) < planned else ""
        _band(loss, smooth(curve(runs, "train", "step", "loss")), color, style, label)
        _band(accuracy, curve(runs, "val", "epoch", "accuracy"), color, style, label)
        for axes, key in ((lower, "at_lower"), (upper, "at_upper")):
            if next(lines(runs[0], "train", "step"), {}).get(key) is not None:
                _band(axes, smooth(curve(runs, "train", "step", key)), color, style, label)
    means = [y for line in loss.lines for y in line.get_ydata() if y > 0]
    if means:  # an interval may reach below 0
        loss.set(yscale="log", ylim=(min(means) / 1.5, max(means) * 1.5))
    loss.set(title="training loss (running mean)", xlabel="step")
    accuracy.set(title="validation accuracy", xlabel="step")
    accuracy.set_ylim(max(-0.02, accuracy.get_ylim()[0]), min(1.02, accuracy.get_ylim()[1]))
    lower.set(title="fraction of coordinates at the lower bound", xlabel="step", ylim=(-0.02, 1.02))
    upper.set(title="fraction of coordinates at the upper bound", xlabel="step", ylim=(-0.02, 1.02))
    for axes in (loss, accuracy, lower, upper):
        axes.grid(alpha=0.3)
    handles, labels = loss.get_legend_handles_labels()
    if handles:  # one for all, where it hides no curve
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    what = f"{study['name']}{', ' + variant if variant else ''}"
    count = len(study["seeds"])
    figure.suptitle(f"{what}: {f'mean of {count} seeds and its 95 % interval' if count > 1 else 'one seed'}")
    path = folder / f"curves{'-' + variant if variant else ''}.png"
    figure.savefig(path, dpi=100)
    return path


def curve(runs: Sequence[Path], split: str, scope: str, key: str) -> Curve:
    """One number of all runs, as far as all of them have it; NaN where it is not finite."""
    of_runs = [[(line["step"], line[key]) for line in lines(run, split, scope)] for run in runs]
    length = min(map(len, of_runs))
    steps = np.array([step for step, _ in of_runs[0][:length]])
    values = [[np.nan if value is None else value for _, value in pairs[:length]] for pairs in of_runs]
    return steps, np.array(values, float).reshape(len(runs), length)


def smooth(curve: Curve) -> Curve:
    """Running mean over a fiftieth of the curve."""
    steps, values = curve
    width = max(1, len(steps) // 50)
    kernel = np.ones(width) / width
    return steps[width - 1 :], np.array([np.convolve(row, kernel, "valid") for row in values])


def _band(axes: Any, curve: Curve, color: str, style: str, label: str) -> None:
    steps, values = curve
    if not len(steps):
        return
    mean = values.mean(0)
    axes.plot(steps, mean, color=color, linestyle=style, label=label, linewidth=1.2)
    if len(values) > 1:
        half = half_width(len(values)) * values.std(0, ddof=1)
        axes.fill_between(steps, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
