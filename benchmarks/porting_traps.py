"""Errors that common mistakes in porting a ResNet cause, in float64: the table of docs/parity.md.

python -m benchmarks.porting_traps
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_oracle
from tests.helpers.comparing import largest_error, nchw
from tests.parity import cases, torch_side
from tests.parity.case import group, make_inputs

NETWORK = next(case for case in cases.NETWORKS if case.name == "resnet-basic-eval")
NORM = next(case for case in cases.BATCH_NORMS if case.name == "batch-norm-train")
STEPS, RATE = 1000, 1e-3


def tell(trap: str, what: str, wrong: np.ndarray, right: np.ndarray) -> None:
    """Print a table row: the largest difference, relative to the tensor's largest magnitude."""
    print(f"| {trap} | {what} | {largest_error(wrong, right):.0e} |")


def logits(change: Callable[[nn.Module], None]) -> np.ndarray:
    """Return a thin ResNet's evaluation logits for 46x66 images, after `change` of each layer."""
    inputs = make_inputs(NETWORK)
    model = torch_side.build(NETWORK).double().eval()
    torch_oracle.load_state_dict(model, group(inputs, "state"))
    with torch.no_grad():
        model.apply(change)
        return np.asarray(model(torch.from_numpy(nchw(inputs["x"][:, :46]))))


def pad_same(layer: nn.Module) -> None:
    """Pad as TensorFlow's and JAX's `SAME`: at stride 2 an even image is padded at its end only."""

    def pad(layer: nn.Conv2d, inputs: tuple[Tensor]) -> Tensor:
        (x,) = inputs
        sides: list[int] = []
        for n, k, s in zip(x.shape[:1:-1], layer.kernel_size, layer.stride, strict=True):
            total = max((math.ceil(n / s) - 1) * s + k - n, 0)
            sides += [total // 2, total - total // 2]
        return F.pad(x, sides)

    if isinstance(layer, nn.Conv2d):
        layer.padding = (0, 0)
        layer.register_forward_pre_hook(pad)


def round_as_tf32(layer: nn.Module) -> None:
    """Round the operands of convolutions and linear layers to ten fraction bits."""

    def rounded(x: Tensor) -> Tensor:
        bits = x.float().contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & -(1 << 13)).view(torch.float32).to(x.dtype)

    if isinstance(layer, nn.Conv2d | nn.Linear):
        layer.weight.copy_(rounded(layer.weight))
        layer.register_forward_pre_hook(lambda layer, inputs: rounded(inputs[0]))


def set_eps(layer: nn.Module) -> None:
    """Set Keras' epsilon."""
    if isinstance(layer, nn.BatchNorm2d):
        layer.eps = 1e-3


def forward() -> None:
    """Print mistakes that the logits show."""
    right = logits(lambda layer: None)
    tell('`padding="SAME"` at stride 2', "logits", logits(pad_same), right)
    tell("batch norm's epsilon 1e-3 (Keras), not 1e-5", "logits", logits(set_eps), right)
    tell("TF32 (rounding emulated)", "logits", logits(round_as_tf32), right)


def statistics() -> None:
    """Print mistakes in batch norm's running statistics, which only evaluation shows."""
    inputs = make_inputs(NORM)
    right = torch_side.run(NORM, inputs)
    before, x = group(inputs, "state"), inputs["x"]
    mean, n = x.mean((0, 1, 2)), x.size // x.shape[-1]
    for keep, where in (
        (0.1, "PyTorch's 0.1 given to Flax, or Flax's 0.9 to PyTorch"),
        (0.99, "Flax's 0.99"),
    ):
        wrong = keep * before["running_mean"] + (1 - keep) * mean
        tell(f"momentum: {where}", "running mean, 1 step", wrong, right["after.running_mean"])
    wrong = 0.9 * before["running_var"] + 0.1 * x.var((0, 1, 2))
    tell(
        f"the biased variance kept ({n} values)",
        "running variance, 1 step",
        wrong,
        right["after.running_var"],
    )
    many = x.var((0, 1, 2), ddof=1)  # where the averages end
    tell(f"the biased variance kept ({n} values)", "running variance, in the end", x.var((0, 1, 2)), many)


def train(step: Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Return parameters after gradients of many sizes: p -= step(t, p, m, v, g), with Adam's m, v."""
    inputs = make_inputs(next(case for case in cases.OPTIMIZERS if case.name == "adam-constant-default"))
    p = np.concatenate([array.ravel() for array in group(inputs, "state").values()])
    grads = np.concatenate([g.reshape(STEPS, -1) for g in group(inputs, "gradients").values()], axis=1)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - step(t, p, m, v, g)
    return p


def corrections(t: int) -> tuple[float, float]:
    """Return Adam's bias corrections of m and of v."""
    return 1 - 0.9**t, 1 - 0.999**t


def amsgrad(form: str) -> np.ndarray:
    """AMSGrad with the maximum before the correction (PyTorch), after it (optax), or without correction."""
    top = np.zeros(1)

    def step(t, p, m, v, g):
        nonlocal top
        c1, c2 = corrections(t) if form != "published" else (1.0, 1.0)
        top = np.maximum(top, v / c2 if form == "optax" else v)
        return RATE * m / c1 / (np.sqrt(top / (c2 if form == "torch" else 1.0)) + 1e-8)

    return train(step)


def adabound(*, corrected: bool) -> np.ndarray:
    """AdaBound with eps added to the uncorrected root, as published, or to Adam's corrected root."""

    def step(t, p, m, v, g):
        c1, c2 = corrections(t)
        root = np.sqrt(v / c2) + 1e-8 if corrected else (np.sqrt(v) + 1e-8) / math.sqrt(c2)
        bounds = 0.1 * (1 - 1 / (1e-3 * t + 1)), 0.1 * (1 + 1 / (1e-3 * t))
        return np.clip(RATE / c1 / root, *bounds) * m

    return train(step)


def decayed(form: str, decay: float = 0.01) -> np.ndarray:
    """Adam with AdamW's decay, with decay not scaled by the learning rate, or with L2 in the gradient."""
    m2, v2 = np.zeros(1), np.zeros(1)

    def step(t, p, m, v, g):
        nonlocal m2, v2
        c1, c2 = corrections(t)
        g = g + decay * p if form == "L2" else g
        m2, v2 = 0.9 * m2 + 0.1 * g, 0.999 * v2 + 0.001 * g * g
        apart = {"AdamW": RATE * decay * p, "unscaled": decay * p, "L2": 0.0}[form]
        return RATE * m2 / c1 / (np.sqrt(v2 / c2) + 1e-8) + apart

    return train(step)


def optimizers() -> None:
    """Print common misreadings of the equations."""
    what = f"parameters, {STEPS} steps"
    for form in ("optax", "published"):
        tell(f"AMSGrad: the {form} form for PyTorch's", what, amsgrad(form), amsgrad("torch"))
    right = adabound(corrected=False)
    tell("AdaBound: eps beside the corrected root", what, adabound(corrected=True), right)
    right = decayed("AdamW")
    tell("decay 0.01 in the gradient, not decoupled", what, decayed("L2"), right)
    tell("decoupled decay without the learning rate", what, decayed("unscaled"), right)


if __name__ == "__main__":
    print("| trap | what it moves | by |\n| --- | --- | --- |")
    forward()
    statistics()
    optimizers()
