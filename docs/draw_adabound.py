"""Draw the figure of docs/adabound.md, at a constant learning rate: python docs/draw_adabound.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np

from numpy_ref import adabound_bounds

FOLDER = Path(__file__).parent
LR, FINAL_LR, B1, B2, EPS = 1e-3, 0.1, 0.9, 0.999, 1e-8
STEPS = np.unique(np.logspace(0, 6, 400).astype(int))


def bounds(gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return both bounds of the step size at `STEPS`, at a constant learning rate."""
    pairs = np.array([adabound_bounds(int(t), FINAL_LR / LR, gamma) for t in STEPS])
    return LR * pairs[:, 0], LR * pairs[:, 1]


def adam_size(gradient: float) -> np.ndarray:
    """Return Adam's unclipped step sizes for a coordinate with gradients of this magnitude at every step."""
    nu = gradient**2 * (1 - B2**STEPS)
    return np.asarray(LR * np.sqrt(1 - B2**STEPS) / (1 - B1**STEPS) / (np.sqrt(nu) + EPS))


def draw_interval(axes: Any) -> None:
    """Draw the interval for three values of gamma."""
    for gamma, color in ((1e-2, "C0"), (1e-3, "C1"), (1e-4, "C2")):
        lower, upper = bounds(gamma)
        axes.fill_between(STEPS, lower, upper, color=color, alpha=0.18, linewidth=0)
        axes.plot(STEPS, lower, color=color, label=f"gamma {gamma:g}")
        axes.plot(STEPS, upper, color=color)
        axes.plot([1 / gamma] * 2, [FINAL_LR / 2, FINAL_LR * 2], "o", color=color, markersize=4)
    axes.axhline(FINAL_LR, color="black", linewidth=0.8, linestyle=":")
    axes.text(1.2, FINAL_LR * 1.15, "final_lr 0.1", fontsize=9)
    axes.set_title("the interval: final_lr / 2 to 2 final_lr after 1 / gamma steps (dots)", fontsize=10)


def draw_sizes(axes: Any) -> None:
    """Draw Adam's step sizes before and after the clip, and the control's rate, at the published gamma."""
    lower, upper = bounds(1e-3)
    axes.fill_between(STEPS, lower, upper, color="C1", alpha=0.18, linewidth=0)
    for gradient, color in ((1e-4, "C0"), (1e-2, "C3"), (1.0, "C2")):
        size = adam_size(gradient)
        axes.plot(
            STEPS, np.clip(size, lower, upper), color=color, label=f"AdaBound, gradients of {gradient:g}"
        )
        axes.plot(STEPS, size, color=color, linestyle="--", linewidth=0.9)
    axes.plot(STEPS, np.clip(LR, lower, upper), color="black", linestyle=":", linewidth=2.4, label="SGDBound")
    axes.set_title("step sizes: Adam's (dashed) and clipped, gamma 0.001, lr 0.001", fontsize=10)


def draw() -> None:
    """Draw both panels, side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    figure.suptitle("at a constant learning rate; a schedule scales both bounds", fontsize=11)
    draw_interval(left)
    draw_sizes(right)
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", ylim=(3e-5, 300), xlabel="step", ylabel="step size")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, loc="upper right")
    figure.savefig(FOLDER / "adabound_bounds.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw()
