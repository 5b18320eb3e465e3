"""AdaBound, AMSBound and AdaBoundW: Adam whose step sizes are clipped to an interval that closes on SGD's.

And their control, SGDBound: SGD with momentum whose single rate is clipped to the same interval.

Luo, Xiong, Liu, Sun 2019, "Adaptive Gradient Methods with Dynamic Bound of Learning Rate", arXiv 1902.09843,
algorithms 1 and 2, and the authors' code. The same names stand in `jax_resnet/adabound.py`, which explains
each argument, and the effect of a schedule on the bounds, at length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from numpy_ref.layers import Array, Parameter
from numpy_ref.optimizer_base import Hyperparameter, Optimizer, second_moment, update_moments


def adabound_bounds(count: int, ratio: float = 100.0, gamma: float = 1e-3) -> tuple[float, float]:
    """The bounds of AdaBound's step sizes, divided by the learning rate; `count` is the step, from 1.

        lower = ratio * (1 - 1 / (gamma t + 1)),   upper = ratio * (1 + 1 / (gamma t))

    Both converge to `ratio` = final_lr / base_lr; after 1 / gamma steps they are ratio / 2 and 2 ratio. At 0,
    before the first step, they are 0 and infinity.
    """
    x = gamma * count
    if x == 0:
        return 0.0, math.inf
    return ratio * (x / (x + 1)), ratio * (1 + 1 / x)


class AdaBound(Optimizer):
    """AdaBound: starts as Adam and ends as SGD with momentum and step size `final_lr`.

    With mu and nu as in `update_moments`, and t from 1:

        size = clip(sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(nu_t) + eps), lower_t, upper_t)
        value -= lr * size * mu_t

    The learning rate multiplies the clipped size, so a schedule moves the bounds too. eps is added to the
    *uncorrected* root, so this is not Adam with a clip.

    Args:
        parameters: the parameters to train, or groups of them, as in `Optimizer`.
        lr: Adam's step size; set it before each step to follow a schedule.
        final_lr: SGD's step size, which the bounds converge to when the learning rate is `base_lr`.
        base_lr: the rate at which the bounds converge to `final_lr`; by default `lr`, or that of the group.
        gamma: how fast the bounds converge, per step.
        b1, b2: decay rates, per step, of the exponential averages of the gradients and of their squares.
        eps: added to the root of the second moment; in units of the gradient.
        weight_decay: the L2 penalty, added to the gradient.

    Raises:
        TypeError, ValueError: see `Optimizer`.
    """

    final_lr, base_lr, gamma = Hyperparameter(), Hyperparameter(), Hyperparameter()
    b1, b2, eps = Hyperparameter(), Hyperparameter(), Hyperparameter()

    def __init__(
        self,
        parameters: Iterable[Parameter] | Iterable[Mapping[str, Any]],
        lr: float = 1e-3,
        final_lr: float = 0.1,
        *,
        base_lr: float | None = None,
        b1: float = 0.9,
        b2: float = 0.999,
        gamma: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        bounds = {"final_lr": final_lr, "base_lr": base_lr, "gamma": gamma}
        super().__init__(parameters, lr, **bounds, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)

    def precompute(self, h: SimpleNamespace) -> None:
        """Compute the bias correction and the bounds."""
        h.correction = math.sqrt(1 - h.b2**self.count) / (1 - h.b1**self.count)
        h.lower, h.upper = adabound_bounds(self.count, h.final_lr / h.base_lr, h.gamma)

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval of the first group's step sizes; before the first step (0, inf)."""
        if self.count == 0:
            return 0.0, math.inf
        lower, upper = adabound_bounds(self.count, self.final_lr / self.base_lr, self.gamma)
        return self.lr * lower, self.lr * upper

    def update(
        self, grad: Array, moments: Sequence[Array], delta: Array, h: SimpleNamespace
    ) -> tuple[int, int]:
        """See the class."""
        update_moments(grad, moments[0], moments[1], h.b1, h.b2, delta)
        size = np.sqrt(second_moment(moments), out=delta)
        size += h.eps
        np.divide(h.correction, size, out=size)
        clipped = int(np.count_nonzero(size < h.lower)), int(np.count_nonzero(size > h.upper))
        np.clip(size, h.lower, h.upper, out=size)
        size *= moments[0]
        size *= h.lr
        return clipped


class AMSBound(AdaBound):
    """AMSBound: AdaBound with the maximum of all nu so far, before any bias correction, in nu's place."""

    fields = ("mu", "nu", "nu_max")


class AdaBoundW(AdaBound):
    """AdaBoundW: AdaBound with decoupled weight decay, scaled by the learning rate as in AdamW."""

    decoupled = True


class SGDBound(AdaBound):
    """SGDBound: AdaBound without the second moment, the control that shows what adaptivity adds.

    One step size for all numbers, after Savarese 2019, arXiv 1908.04457:

        value -= lr * clip(1, lower_t, upper_t) * mu_t

    Arguments are those of AdaBound; b2 and eps have no effect.
    """

    fields = ("mu",)

    def update(
        self, grad: Array, moments: Sequence[Array], delta: Array, h: SimpleNamespace
    ) -> tuple[int, int]:
        """See the class."""
        (mu,) = moments
        mu *= h.b1
        mu += np.multiply(grad, 1 - h.b1, out=delta)
        np.multiply(mu, min(max(1.0, h.lower), h.upper) * h.lr, out=delta)
        return mu.size * (h.lower > 1), mu.size * (h.upper < 1)
