"""The published algorithm of AdaBound in plain NumPy, and a problem on which every part of it matters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

STEPS, WARMUP, PEAK, FINAL_LR = 2000, 100, 1e-3, 0.1
SHAPES = {"conv1.weight": (6, 4), "fc.bias": (10,)}


def published(
    params: np.ndarray,
    grads: Sequence[np.ndarray] | np.ndarray,
    lrs: Sequence[float] | np.ndarray,
    base_lr: float,
    *,
    amsbound: bool,
    l2: float = 0.0,
    decoupled: float = 0.0,
    unscaled: float = 0.0,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Luo et al.'s code, line by line, for one tensor; `decoupled` and `unscaled`: two readings of AdaBoundW.

    Returns the final tensors, and how many coordinates were at the lower bound, inside, at the upper bound.
    """
    p, m, v, v_max = params.copy(), np.zeros_like(params), np.zeros_like(params), np.zeros_like(params)
    beta1, beta2, gamma, eps = 0.9, 0.999, 1e-3, 1e-8
    hits = np.zeros(3, int)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        g = g + l2 * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        v_max = np.maximum(v_max, v)
        denom = np.sqrt(v_max if amsbound else v) + eps
        step_size = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        final_lr = FINAL_LR * lr / base_lr
        lower_bound = final_lr * (1 - 1 / (gamma * t + 1))
        upper_bound = final_lr * (1 + 1 / (gamma * t))
        eta = step_size / denom
        if lr > 0:
            hits += (
                (eta < lower_bound).sum(),
                ((lower_bound < eta) & (eta < upper_bound)).sum(),
                (eta > upper_bound).sum(),
            )
        decay = lr * decoupled * p + unscaled * p
        p = p - np.clip(eta, lower_bound, upper_bound) * m - decay
    return {"params": p, "mu": m, "nu": v} | ({"nu_max": v_max} if amsbound else {}), hits


def problem(seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameters, and gradients over seven decades that fade, so that the maximum of nu matters."""
    rng = np.random.default_rng(seed)
    params, grads = {}, {}
    fading = 0.05 + np.exp(-np.arange(STEPS) / 150)
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        scales = np.logspace(-5.5, 1.5, size).reshape(shape)
        params[name] = rng.normal(size=shape)
        noise = rng.normal(size=(STEPS, *shape)) + 0.5
        grads[name] = scales * noise * fading.reshape(-1, *[1] * len(shape))
    return params, grads


def warmup_cosine() -> np.ndarray:
    """Linear from 0 to PEAK over WARMUP steps, then half a cosine to (nearly) 0."""
    steps = np.arange(STEPS)
    cosine = 0.5 * PEAK * (1 + np.cos(np.pi * (steps - WARMUP) / (STEPS - WARMUP)))
    return np.where(steps < WARMUP, PEAK * steps / WARMUP, cosine)
