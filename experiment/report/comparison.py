"""Runs side by side: their curves over one another, results, speeds, and where their options differ."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiment.report.figures import METRICS, ReportFigure, is_wide, smooth, thin
from experiment.report.page import duration, ratio, render, state, value_words
from experiment.report.reading import Floats, RunFiles
from experiment.report.style import CYCLE, legend, panel, png, style, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":", "-.")
SPLITS = {"train": "training", "val": "validation"}
NAMES = tuple(f"{key}-{split}" for split, key in itertools.product(SPLITS, METRICS))
"""The figures that a comparison may have."""


class Column(NamedTuple):
    """One number of the table of results."""

    title: str
    values: list[float | None]
    words: list[str]
    better: Any = None  # max or min, where one is better

    @property
    def winner(self) -> float | None:
        """The best of the values, if there is something to choose from."""
        known = [value for value in self.values if value is not None and math.isfinite(value)]
        return self.better(known) if self.better and len(set(known)) > 1 else None


def render_comparison(runs: Sequence[RunFiles]) -> tuple[str, dict[str, ReportFigure]]:
    """The page, and the figures in it."""
    names = labels(runs)
    figures = draw(runs, names)
    page = render(
        "compare.html",
        title=f"{len(runs)} runs compared",
        runs=list(zip(names, runs, strict=True)),
        state=state,
        names=names,
        figures=list(figures.values()),
        columns=results(runs),
        differences=differences(runs),
    )
    return page, figures


def labels(runs: Sequence[RunFiles]) -> list[str]:
    """Return a name for each run: its folder's, with as much of its path as no other run has."""
    parts = [run.folder.resolve().parts for run in runs]
    depth = 1
    while depth < max(map(len, parts)) and len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    names = ["/".join(part[-depth:]) for part in parts]
    return [  # the same run more than once: by number
        f"{name} ({names[: place + 1].count(name)})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def draw(runs: Sequence[RunFiles], names: Sequence[str]) -> dict[str, ReportFigure]:
    """Loss, accuracy and F1 in training and validation, a curve for each run."""
    figures = {}
    with style():
        for (split, words), (key, title) in itertools.product(SPLITS.items(), METRICS.items()):
            figure, name = _curves(runs, names, key, split, f"{title}, {words}"), f"{key}-{split}"
            if figure is not None:
                alt = f"{title} in {words} of {', '.join(names)}"
                figures[name] = ReportFigure(name, alt, svg(figure), png(figure))
    return figures


def _curves(
    runs: Sequence[RunFiles], names: Sequence[str], key: str, split: str, title: str
) -> Figure | None:
    curves = [_curve(run, key, split) for run in runs]
    if not any(len(x) for x, _ in curves):
        return None
    in_steps = len({run.steps_per_epoch for run in runs}) == 1
    figure, axes = panel(title)
    looks = itertools.cycle(itertools.product(DASHES, CYCLE))
    for run, name, (steps, values), (dash, color) in zip(runs, names, curves, looks, strict=False):
        x = steps if in_steps else steps / (run.steps_per_epoch or 1)
        marker = "o" if len(x) < 25 and split == "val" else None
        axes.plot(x, values, dash, color=color, marker=marker, ms=3.5, label=_short(name))
    if key == "loss" and is_wide(np.concatenate([values for _, values in curves])):
        axes.set_yscale("log")
    axes.set_xlabel("step" if in_steps else "epoch")
    legend(axes, columns=2)
    return figure


def _curve(run: RunFiles, key: str, split: str) -> tuple[Floats, Floats]:
    """Validation as it is, training as a running mean."""
    if split == "val":
        return run.curve("val", "epoch", key)
    steps, values = run.curve("train", "step", key)
    return thin(steps, smooth(values, max(len(values) // 25, 5)))


def _short(name: str, most: int = 34) -> str:
    """Return the end of a name as the label of a curve, escaped for Matplotlib.

    Text between dollars would be typeset as mathematics, and a label with a leading underscore be hidden.
    """
    name = name if len(name) <= most else "…" + name[1 - most :]
    return name.replace("$", r"\$").replace("_", "\u200a_", 1) if name[0] == "_" else name.replace("$", r"\$")


def results(runs: Sequence[RunFiles]) -> list[Column]:
    """The table of results, column by column; what a run does not have is None."""
    tests, bests = [run.last("test") for run in runs], [run.best for run in runs]
    summaries = [run.summary or {} for run in runs]

    def column(title: str, lines: Sequence[Any], key: str, words: Any, better: Any) -> Column:
        found = [(line or {}).get(key) for line in lines]
        values = [float(value) if isinstance(value, int | float) else None for value in found]
        return Column(title, values, ["–" if value is None else words(value) for value in values], better)

    def whole(value: float) -> str:
        return f"{value:,.0f}"

    return [
        column("test accuracy", tests, "accuracy", ratio, max),
        column("test F1", tests, "f1", ratio, max),
        column("test top-5", tests, "top5", ratio, max),
        column("test loss", tests, "loss", ratio, min),
        column("best validation accuracy", bests, "accuracy", ratio, max),
        column("its loss", bests, "loss", ratio, min),
        column("its step", bests, "step", whole, None),
        column("steps", [{"step": run.step} for run in runs], "step", whole, None),
        column("images/s", summaries, "images_per_second", whole, max),
        column("compiling", summaries, "compile_seconds", duration, min),
        column("time", summaries, "wall_seconds", duration, min),
        column("parameters", summaries, "parameters", whole, None),
    ]


def differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """The options, the facts of the data, versions and devices in which the runs differ: name, each value."""
    tables = [_facts(run) for run in runs]
    names = dict.fromkeys(itertools.chain.from_iterable(tables))
    rows = [(name, [value_words(table.get(name)) for table in tables]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _facts(run: RunFiles) -> dict[str, Any]:
    newest, options = run.newest_session, dataclasses.asdict(run.config)
    resolved = {name: value for name, value in run.resolved.items() if name != "optimizer_options"}
    facts = {name: newest.get(name) for name in ("device", "cpu_count", "python", "platform", "git_commit")}
    versions = newest.get("versions")
    return {**options, **resolved, **facts, **(versions if isinstance(versions, dict) else {})}


def is_comparison(folder: Path) -> bool:
    """True if a folder holds nothing but files that a comparison writes."""
    written = {"index.html", *(f"{name}.png" for name in NAMES)}
    return all(path.name in written for path in folder.iterdir())
