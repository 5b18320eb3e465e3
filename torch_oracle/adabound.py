"""AdaBound, AMSBound and AdaBoundW: Adam whose step sizes are clipped to an interval that closes on SGD's.

And their control, SGDBound: a momentum SGD whose one rate is clipped to the same interval.

Luo, Xiong, Liu, Sun 2019, "Adaptive Gradient Methods with Dynamic Bound of Learning Rate", arXiv 1902.09843,
algorithms 1 and 2, and the authors' code, whose operations are kept in their order: whole tensors, no
arithmetic shared between parameters, nothing in place but the results. `jax_resnet/adabound.py` explains each
argument, and what a schedule does to the bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

RANGES: dict[str, tuple[str, float, float]] = {  # requirement, minimum, exclusive limit
    **dict.fromkeys(("b1", "b2"), ("in [0, 1)", 0, 1)),
    **dict.fromkeys(("lr", "eps", "momentum", "weight_decay"), ("finite and not negative", 0, math.inf)),
    **dict.fromkeys(("final_lr", "base_lr", "gamma"), ("finite and positive", math.ulp(0), math.inf)),
}


def check_hyperparameters(**values: float) -> None:
    """Raise a ValueError that names the first value out of its range."""
    for name, value in values.items():
        requirement, minimum, limit = RANGES[name]
        if not minimum <= value < limit:
            raise ValueError(f"{name} must be {requirement}, got {value}")


class AdaBound(Optimizer):
    """AdaBound: starts as Adam and ends as SGD with momentum and step size `final_lr`.

    With t from 1, alpha_t the learning rate of the parameter group at step t:

        g_t     = g_t + weight_decay * p
        m_t     = b1 m_(t-1) + (1 - b1) g_t
        v_t     = b2 v_(t-1) + (1 - b2) g_t^2
        final_t = final_lr * alpha_t / base_lr
        lower_t = final_t * (1 - 1 / (gamma t + 1)),   upper_t = final_t * (1 + 1 / (gamma t))
        size_t  = clip(alpha_t * sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v_t) + eps), lower_t, upper_t)
        p       = p - size_t * m_t

    A schedule moves the bounds too. eps is added to the *uncorrected* root, unlike Adam with a clip.

    Args:
        parameters: tensors, or groups of them as in `torch.optim`; a group may have its own value of every
            argument.
        lr: Adam's step size; read from `param_groups` at every step, where PyTorch's schedulers set it.
        final_lr: SGD's step size, which the bounds converge to when the learning rate is `base_lr`.
        base_lr: the rate to which `final_lr` belongs; by default the group's `lr` when the group is added. A
            scheduler that warms up changes `lr` only later, even an `lr` that is a tensor.
        gamma: how fast the bounds converge, per step.
        b1, b2: decay rates, per step, of the exponential averages of the gradients and of their squares.
        eps: added to the root of the second moment; in units of the gradient. 0, as in the authors'
            code, gives 0 / 0 where the learning rate and all gradients so far are 0.
        weight_decay: the L2 penalty, added to the gradient.

    Raises:
        ValueError: if an argument is out of its range, or a parameter is complex.

    State of each parameter: `step`, `exp_avg` (m), `exp_avg_sq` (v) and, in AMSBound, `max_exp_avg_sq`.
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    decoupled: ClassVar[bool] = False

    def __init__(
        self,
        parameters: ParamsT,
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
        rates = {"lr": lr, "final_lr": final_lr, "base_lr": base_lr}
        others = {"b1": b1, "b2": b2, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, {**rates, **others})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; `__init__` calls it too. Raises as the class does, and then adds nothing."""
        group = {**self.defaults, **param_group}
        if group["base_lr"] is None:
            group["base_lr"] = float(group["lr"])  # a scheduler changes a tensor in place
        check_hyperparameters(**{name: group[name] for name in self.defaults})
        super().add_param_group(group)
        for parameter in group["params"]:
            if parameter.is_complex():
                self.param_groups.pop()
                raise ValueError(
                    f"parameters must be real, one of shape {list(parameter.shape)} is {parameter.dtype}; "
                    "use torch.view_as_real"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return what `closure`, called first, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        """Update one tensor, of any shape; see the class."""
        assert p.grad is not None
        lr, b1, gamma = group["lr"], group["b1"], group["gamma"]
        state = self.state[p]
        if not state:
            state.update({"step": 0, **{name: torch.zeros_like(p) for name in self.moments}})
        state["step"] += 1
        t = state["step"]

        g = p.grad if self.decoupled else p.grad + group["weight_decay"] * p
        m = state["exp_avg"] = b1 * state["exp_avg"] + (1 - b1) * g

        final_lr = group["final_lr"] * lr / group["base_lr"]
        lower = final_lr * (1 - 1 / (gamma * t + 1))
        upper = final_lr * (1 + 1 / (gamma * t))
        size = self._size(g, state, group, lower, upper)
        decay = lr * group["weight_decay"] * p if self.decoupled else 0
        p.copy_(p - size * m - decay)

    def _size(self, g: Tensor, state: dict[str, Any], group: dict[str, Any], lower: Any, upper: Any) -> Any:
        """Update the second moment by the gradient g; return size_t, see the class."""
        lr, b1, b2, t = group["lr"], group["b1"], group["b2"], state["step"]
        v = state["exp_avg_sq"] = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
        if "max_exp_avg_sq" in self.moments:
            v = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
        step_size = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
        return torch.clamp(step_size / (v.sqrt() + group["eps"]), lower, upper)


class AMSBound(AdaBound):
    """AMSBound: AdaBound with the maximum of all v so far, before any bias correction, in v's place."""

    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class AdaBoundW(AdaBound):
    """AdaBoundW: AdaBound with decoupled weight decay, scaled by the learning rate as in AdamW.

        p = p - size_t * m_t - alpha_t * weight_decay * p

    The authors' `AdaBoundW` subtracts weight_decay * p without alpha_t, so that no schedule affects it.
    """

    decoupled = True


class SGDBound(AdaBound):
    """SGDBound: AdaBound without the second moment, the control that shows what adaptivity adds.

        p = p - clip(alpha_t, lower_t, upper_t) * m_t

    After Savarese 2019, arXiv 1908.04457. Arguments are those of AdaBound; b2 and eps are not used.
    """

    moments = ("exp_avg",)

    def _size(self, g: Tensor, state: dict[str, Any], group: dict[str, Any], lower: Any, upper: Any) -> Any:
        """Return clip(alpha_t, lower_t, upper_t)."""
        return min(max(group["lr"], lower), upper)
