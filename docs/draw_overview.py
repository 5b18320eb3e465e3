"""Draw docs/overview.png from the files of runs: loss and accuracy against the epoch.

python docs/draw_overview.py docs/overview.png Adam=docs/runs/digits-adam
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def draw(output: Path, runs: dict[str, Path]) -> None:
    """One panel for the loss of every step, one for the accuracy of every epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for color, (label, run) in zip(("tab:blue", "tab:orange", "tab:green"), runs.items(), strict=False):
        lines = read_lines(run)
        summary = json.loads((run / "summary.json").read_text())
        per_epoch = summary["steps"] / summary["epochs"]
        steps = [line for line in lines if line["scope"] == "step"]
        x = [line["step"] / per_epoch for line in steps]
        left.plot(x, [line["loss"] for line in steps], color=color, lw=0.5, alpha=0.35)
        for split, style in (("train", "-"), ("val", "--")):
            epochs = [line for line in lines if line["scope"] == "epoch" and line["split"] == split]
            x = [line["step"] / per_epoch for line in epochs]
            words = f"{label}, {'training' if split == 'train' else 'validation'}"
            left.plot(x, [line["loss"] for line in epochs], style, color=color, lw=1.8, label=words)
            right.plot(x, [line["accuracy"] for line in epochs], style, color=color, lw=1.8, label=words)
        test = summary["test"]["accuracy"]
        right.plot([summary["epochs"]], [test], "o", color=color, ms=7, label=f"{label}, test: {test:.3f}")
    left.set(title="Cross-entropy (thin: every step)", xlabel="epoch", yscale="log")
    right.set(title="Accuracy", xlabel="epoch", ylim=(0, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, loc="lower right", fontsize=9)
    figure.savefig(output, dpi=130)


if __name__ == "__main__":
    named = (text.split("=", 1) for text in sys.argv[2:])
    draw(Path(sys.argv[1]), {label: Path(run) for label, run in named})
