"""Draw figures from the files of runs: loss and accuracy against the epoch, or of one run against the step.

    python docs/draw_overview.py docs/overview.png "JAX, Adam=docs/runs/digits-adam" \\
        "JAX, AdaBound=docs/runs/digits-adabound" "NumPy, Adam=docs/runs/digits-adam-numpy"
    python docs/draw_overview.py docs/mnist_numpy.png runs/RUN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def draw(output: Path, runs: dict[str, Path]) -> None:
    """Draw the loss of every step in one panel, the accuracy of every epoch in another; training is solid."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for color, (label, run) in zip(("tab:blue", "tab:orange", "tab:green"), runs.items(), strict=False):
        lines = read_lines(run)
        summary = json.loads((run / "summary.json").read_text())
        per_epoch = summary["steps"] / summary["epochs"]
        steps = [line for line in lines if line["scope"] == "step"]
        x = [line["step"] / per_epoch for line in steps]
        left.plot(x, [line["loss"] for line in steps], color=color, lw=0.5, alpha=0.25)
        for split, style in (("train", "-"), ("val", "--")):
            epochs = [line for line in lines if line["scope"] == "epoch" and line["split"] == split]
            x = [line["step"] / per_epoch for line in epochs]
            left.plot(x, [line["loss"] for line in epochs], style, color=color, lw=1.6)
            right.plot(x, [line["accuracy"] for line in epochs], style, color=color, lw=1.6)
        test = summary["test"]["accuracy"]
        right.plot([summary["epochs"]], [test], "o", color=color, ms=7, label=f"{label}; test: {test:.3f}")
    left.set(title="Cross-entropy (thin: every step)", xlabel="epoch", yscale="log")
    right.set(title="Accuracy", xlabel="epoch", ylim=(0.4, 1.02))
    styles = [Line2D([], [], color="gray", ls=style) for style in ("-", "--")]
    left.legend(styles, ["training", "validation"], frameon=False, loc="lower left", fontsize=9)
    right.legend(frameon=False, loc="lower right", fontsize=9)
    save(figure, output)


def draw_steps(output: Path, run: Path, window: int = 50) -> None:
    """Draw loss and accuracy of every step of one run, and their means over the last `window` steps."""
    steps = [line for line in read_lines(run) if line["scope"] == "step"]
    summary = json.loads((run / "summary.json").read_text())
    figure, both = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for axes, metric, title in zip(both, ("loss", "accuracy"), ("Cross-entropy", "Accuracy"), strict=True):
        values = np.array([line[metric] for line in steps])
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(1, len(values) + 1), values, lw=0.5, alpha=0.35, color="tab:green")
        axes.plot(
            np.arange(window, len(values) + 1), mean, color="tab:green", label=f"mean of {window} steps"
        )
        test = summary["test"][metric]
        axes.plot(summary["steps"], test, "o", color="black", ms=6, label=f"test: {test:.4f}")
        axes.set(title=title, xlabel="training step")
        axes.legend(frameon=False, loc="best", fontsize=9)
    both[0].set_yscale("log")
    both[1].set_ylim(0.4, 1.02)
    save(figure, output)


def save(figure: Figure, output: Path) -> None:
    """Save with a light grid and without a box."""
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=130)


if __name__ == "__main__":
    if "=" in sys.argv[2]:
        named = (text.split("=", 1) for text in sys.argv[2:])
        draw(Path(sys.argv[1]), {label: Path(run) for label, run in named})
    else:
        draw_steps(Path(sys.argv[1]), Path(sys.argv[2]))
