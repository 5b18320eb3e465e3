"""The figures of a search: performance profiles, and the validation accuracy over the search spaces.

They show whether a method needs tuning. `sensitivity`: the accuracy of each trial against each option that is
searched. `quantiles`: the accuracies of a method's trials from the best to the worst, so the fraction of the
search space that is at least as good. Panels are those of `curves.py`, a method each, all others in gray.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from experiment.report.style import BLUE, DOCUMENT_WIDTH, INK, ORANGE, save_document, style
from experiment.study.curves import Curves, height_of, panels_of
from experiment.study.scores import TAU, profile

Json = dict[str, Any]
Blocks = list[tuple[str, Curves]]  # titles, and the curves of the methods by their labels
TAUS = np.geomspace(1, TAU, 200)


def draw(study: Json, folder: Path, prefix: str = "") -> list[Path]:
    """Draw PREFIXprofiles.png, PREFIXquantiles.png and PREFIXsensitivity-WORKLOAD.png of a search.

    Args:
        study: the results, as study.json holds them; of another study nothing is drawn.
        folder: where.
        prefix: begins the names.

    Returns:
        The PNG files.
    """
    if not study.get("searches"):
        return []
    paths = []
    with style():
        for name, drawing in (("profiles", _draw_profiles), ("quantiles", _draw_quantiles)):
            figure = drawing(study)
            if figure is not None:
                paths.append(folder / f"{prefix}{name}.png")
                save_document(figure, paths[-1])
        for workload in study["workloads"]:
            figure = _draw_sensitivity(study, workload["name"])
            if figure is not None:
                name = f"sensitivity-{workload['name']}" if workload["name"] else "sensitivity"
                paths.append(folder / f"{prefix}{name}.png")
                save_document(figure, paths[-1])
    return paths


def _draw_profiles(study: Json) -> Any:
    """Draw the fraction of workloads on which a method's steps are within a ratio of the best method's."""
    of_all = {
        workload: {label: math.inf if ratio is None else ratio for label, ratio in ratios.items()}
        for workload, ratios in study["ratios"].items()
    }
    if not of_all:
        return None
    curves = {
        label: (TAUS, np.array([[100 * profile(label, of_all, tau) for tau in TAUS]]))
        for label in study["profiles"]
    }
    words = f"{len(of_all)} workload{'s' if len(of_all) > 1 else ''}"
    title = f"{words}: % whose steps to the target are within a ratio of the best method's; gray: others"
    figure, (panels,) = _blocks([(title, curves)])
    for (taus, values), axes in zip(curves.values(), panels, strict=True):
        axes.plot(taus, values[0], color=BLUE, lw=1.5, clip_on=False)
    panels[0].set_xscale("log", base=2)
    panels[0].set_xticks([1, 2, 4], ["1", "2", "4"])
    panels[0].set_ylim(-3, 103)
    return figure


def _draw_quantiles(study: Json) -> Any:
    """Draw the trials of each method from the best to the worst."""
    blocks: Blocks = []
    for workload in study["workloads"]:
        curves: Curves = {}
        for method in _methods_on(study, workload["name"]).values():
            accuracies = sorted((a for a in _accuracies(method) if not math.isnan(a)), reverse=True)
            if accuracies:
                fractions = 100 * (np.arange(len(accuracies)) + 0.5) / len(method["trials"])
                curves[method["optimizer"]] = fractions, np.array([accuracies])
        if curves:
            title = "validation accuracy, %, of the trials from the best to the worst, in % of the trials"
            blocks.append((f"{workload['name']}: {title}" if workload["name"] else title, curves))
    if not blocks:
        return None
    figure, of_blocks = _blocks(blocks)
    for (_, curves), panels in zip(blocks, of_blocks, strict=True):
        for (fractions, values), axes in zip(curves.values(), panels, strict=True):
            axes.plot(fractions, values[0], "o-", color=BLUE, ms=3, lw=1.3)
        panels[0].set_xlim(0, 100)
    return figure


def _draw_sensitivity(study: Json, workload: str) -> Any:
    """Draw the accuracy of each trial against each option; a cross where the trial diverged."""
    methods = _methods_on(study, workload)
    blocks: Blocks = []
    searched = dict.fromkeys(name for method in methods.values() for name in method["ranges"])
    options = []
    for option in searched:
        curves: Curves = {}
        for label, method in methods.items():
            if option in method["ranges"] and method["trials"]:
                values = np.array([trial["point"][option] for trial in method["trials"]], float)
                curves[label] = values, np.array([_accuracies(method)])
        if curves:
            options.append(option)
            blocks.append((f"validation accuracy, %, against {option}; square: chosen; gray: others", curves))
    if not blocks:
        return None
    figure, of_blocks = _blocks(blocks, mark=".")
    figure.suptitle(": ".join(filter(None, [study["name"], workload])), fontsize=10)
    for option, (_, curves), panels in zip(options, blocks, of_blocks, strict=True):
        for (label, (values, accuracies)), axes in zip(curves.items(), panels, strict=True):
            _draw_points(axes, values, accuracies[0], (methods[label]["setting"] or {}).get(option))
        panels[0].set_xscale("log")
        panels[0].margins(y=0.12)
    return figure


def _draw_points(axes: Any, values: Any, accuracies: Any, chosen: float | None) -> None:
    """Draw the trials of one method against one option."""
    axes.plot(values, accuracies, "o", color=BLUE, ms=4)
    lost = values[np.isnan(accuracies)]
    axes.plot(lost, [0.06] * len(lost), "x", color=INK, ms=5, transform=axes.get_xaxis_transform())
    if chosen is not None:
        (index,) = np.flatnonzero(values == chosen)[:1]
        axes.plot(chosen, accuracies[index], "s", mfc="none", color=ORANGE, ms=9, mew=1.6, clip_on=False)


def _blocks(blocks: Blocks, mark: str = "-") -> tuple[Any, list[list[Any]]]:
    """Make a figure of blocks of panels; return it, and the panels of each block."""
    from matplotlib.figure import Figure

    heights = [height_of(len(curves)) for _, curves in blocks]
    figure = Figure(figsize=(DOCUMENT_WIDTH, 0.4 + sum(heights)), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    return figure, [
        panels_of(part, curves, title, mark=mark) for part, (title, curves) in zip(parts, blocks, strict=True)
    ]


def _methods_on(study: Json, workload: str) -> dict[str, Json]:
    """Return the methods on a workload by their labels."""
    methods = study["contestants"].values()
    return {method["optimizer"]: method for method in methods if method["variant"] == workload}


def _accuracies(method: Json) -> list[float]:
    """Return the validation accuracy of each trial in percent; NaN of one that diverged."""
    accuracies = (trial["val_accuracy"] for trial in method["trials"])
    return [math.nan if accuracy is None else 100 * accuracy for accuracy in accuracies]
