"""Draw the figure of docs/adabound.md, AdaBound's bounds and step sizes: python docs/draw_adabound.py

At a constant rate, and under train.py's schedule, of the paper's length and of a run in docs/runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from experiment.report.style import (
    BLUE,
    DOCUMENT_WIDTH,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    save_document,
    style,
    tint,
)
from experiment.run.schedules import make_schedule
from numpy_ref import adabound_bounds

FOLDER = Path(__file__).parent
RUN = FOLDER / "runs" / "digits-adabound"
LR, FINAL_LR, GAMMA, B1, B2, EPS = 1e-3, 0.1, 1e-3, 0.9, 0.999, 1e-8
PAPER_EPOCHS, PAPER_EPOCH = 200, 391  # CIFAR-10 at batch size 128

Floats = npt.NDArray[np.float64]


def scheduled(length: int, warmup_steps: int) -> Floats:
    """Return the rates [length] of steps 1 to `length`, as train.py schedules them by default."""
    rate = make_schedule("cosine", LR, length=length, warmup_steps=warmup_steps)
    return np.array([rate(step) for step in range(length)])


def bounds(rates: Floats, steps: Floats, gamma: float = GAMMA) -> tuple[Floats, Floats]:
    """Return both bounds of the step size at `steps`, counted from 1, with their rates."""
    pairs = np.array([adabound_bounds(int(t), FINAL_LR / LR, gamma) for t in steps])
    return rates * pairs[:, 0], rates * pairs[:, 1]


def adam_size(rates: Floats, steps: Floats, gradient: float) -> Floats:
    """Return Adam's unclipped step sizes for a coordinate with gradients of this magnitude at every step."""
    nu = gradient**2 * (1 - B2**steps)
    return np.asarray(rates * np.sqrt(1 - B2**steps) / (1 - B1**steps) / (np.sqrt(nu) + EPS))


def sizes(rates: Floats, steps: Floats, gradient: float) -> Floats:
    """Return AdaBound's step sizes for such a coordinate."""
    return np.clip(adam_size(rates, steps, gradient), *bounds(rates, steps))


def draw_gammas(axes: Any, steps: Floats) -> None:
    """Draw the interval at a constant rate, for three values of gamma."""
    for gamma, color in ((1e-2, BLUE), (GAMMA, ORANGE), (1e-4, GREEN)):
        lower, upper = bounds(np.full(len(steps), LR), steps, gamma)
        axes.plot(steps, lower, color=color, label=f"gamma {gamma:g}")
        axes.plot(steps, upper, color=color)
        axes.plot([1 / gamma] * 2, [FINAL_LR / 2, FINAL_LR * 2], "o", color=color, ms=4)
    axes.legend(loc="upper right")
    axes.set_title("constant rate: the interval")


def draw_sizes(axes: Any, rates: Floats, steps: Floats) -> None:
    """Draw the interval, Adam's step sizes before and after the clip, and the control's rate."""
    lower, upper = bounds(rates, steps)
    axes.fill_between(steps, lower, upper, color=tint(FAINT, 0.25), lw=0)
    for gradient, color in ((1e-4, BLUE), (1e-2, ORANGE), (1.0, GREEN)):
        axes.plot(steps, adam_size(rates, steps, gradient), color=color, ls=(0, (3, 2)), lw=1)
        axes.plot(steps, sizes(rates, steps, gradient), color=color, label=f"gradients of {gradient:g}")
    axes.plot(steps, np.clip(rates, lower, upper), color=INK, ls=":", lw=2, label="SGDBound")


def draw_run(axes: Any) -> None:
    """Draw the bounds and step sizes of a run, and the bounds that it logged."""
    lines = map(json.loads, (RUN / "metrics.jsonl").read_text().splitlines())
    logged = [line for line in lines if line["scope"] == "step"]
    names = ("step", "lr", "lower_bound", "upper_bound")
    steps, rates, lower, upper = (np.array([line[name] for line in logged], float) for name in names)
    draw_sizes(axes, rates, steps)
    for values in (lower, upper):
        axes.plot(steps[::10], values[::10], "o", color=INK, ms=2.5)
    axes.plot([], [], "o", color=INK, ms=2.5, label="bounds in the run's log")
    axes.set_title(f"a run of {len(steps)} steps, scheduled")


def draw() -> None:
    """Draw the constant rate above, the schedule below."""
    constant = np.unique(np.logspace(0, 6, 300).astype(int)).astype(float)
    paper = scheduled(PAPER_EPOCHS * PAPER_EPOCH, PAPER_EPOCH)
    shown = np.unique(np.logspace(0, np.log10(len(paper)), 600).astype(int))
    with style():
        figure = Figure(figsize=(DOCUMENT_WIDTH, 6.4), layout="constrained")
        (interval, clipped), (long, short) = figure.subplots(2, 2, sharey=True)
        draw_gammas(interval, constant)
        draw_sizes(clipped, np.full(len(constant), LR), constant)
        clipped.set_title("constant rate: step sizes")
        draw_sizes(long, paper[shown - 1], shown.astype(float))
        long.set_title(f"{len(paper):,} steps, {PAPER_EPOCH} of warm-up, then cosine")
        draw_run(short)
        for axes in (interval, clipped, long):
            axes.set_xscale("log")
        for axes in (interval, clipped, long, short):
            axes.set(yscale="log", ylim=(1e-6, 300), xlabel="step")
        for axes in (interval, long):
            axes.set_ylabel("step size")
        handles, labels = short.get_legend_handles_labels()
        adam = interval.plot([], [], color=FAINT, ls=(0, (3, 2)), lw=1)[0]
        band = interval.fill_between([], [], [], color=tint(FAINT, 0.25), lw=0)
        figure.legend(
            [*handles[:3], adam, handles[3], handles[4], band],
            [*labels[:3], "Adam's, not clipped", labels[3], labels[4], "between the bounds"],
            loc="outside lower center",
            ncols=4,
        )
        save_document(figure, FOLDER / "adabound_bounds.png")


if __name__ == "__main__":
    draw()
