"""Draw a figure from the files of runs: loss and accuracy against the epoch.

    python docs/draw_overview.py docs/overview.png "JAX, Adam=docs/runs/digits-adam" \\
        "JAX, AdaBound=docs/runs/digits-adabound" "NumPy, Adam=docs/runs/digits-adam-numpy"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiment.report.style import BLUE, DOCUMENT_WIDTH, FAINT, INK, ORANGE, save_document, style, tint

THIN = tint(FAINT, 0.5)


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def draw(output: Path, runs: dict[str, Path]) -> None:
    """Draw a column for each run, with the same axes: loss above, accuracy below."""
    with style():
        figure = Figure(figsize=(DOCUMENT_WIDTH, 4.3), layout="constrained")
        panels = figure.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False)
        for (loss, accuracy), (label, run) in zip(panels.T, runs.items(), strict=True):
            draw_run(loss, accuracy, run)
            loss.set(title=label, yscale="log")
            accuracy.set(xlabel="epoch", ylim=(0.4, 1.02))
        panels[0, 0].set_ylabel("cross-entropy")
        panels[1, 0].set_ylabel("accuracy")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        save_document(figure, output)


def draw_run(loss: Any, accuracy: Any, run: Path) -> None:
    """Draw every step thin in gray, both parts in color, and the test accuracy as a number."""
    lines = read_lines(run)
    summary = json.loads((run / "summary.json").read_text())
    per_epoch = summary["steps"] / summary["epochs"]
    for axes, metric in ((loss, "loss"), (accuracy, "accuracy")):
        steps = [line for line in lines if line["scope"] == "step"]
        x = [line["step"] / per_epoch for line in steps]
        axes.plot(x, [line[metric] for line in steps], color=THIN, lw=0.6, label="training, a step")
        for split, words, color, form in (
            ("train", "training, an epoch", BLUE, "o-"),
            ("val", "validation", ORANGE, "s--"),
        ):
            epochs = [line for line in lines if line["scope"] == "epoch" and line["split"] == split]
            x = [line["step"] / per_epoch for line in epochs]
            axes.plot(x, [line[metric] for line in epochs], form, color=color, ms=3.5, label=words)
        axes.plot(
            summary["epochs"], summary["test"][metric], "D", color=INK, ms=5, clip_on=False, label="test"
        )
    text = f"test accuracy {summary['test']['accuracy']:.3f}"
    accuracy.text(0.96, 0.08, text, transform=accuracy.transAxes, ha="right", weight="bold")


if __name__ == "__main__":
    named = (text.split("=", 1) for text in sys.argv[2:])
    draw(Path(sys.argv[1]), {label: Path(run) for label, run in named})
