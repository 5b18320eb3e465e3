"""The optimizer table: every optimizer by its name, with PyTorch's meaning of each argument.

An optimizer takes parameters and updates their values in place by their gradients. The names, and the fields
of the state, are those of `jax_resnet/optimizers.py`. AdaBound and its variants are in `adabound.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from numpy_ref.adabound import AdaBound, AdaBoundW, AMSBound, SGDBound
from numpy_ref.layers import Array, Parameter
from numpy_ref.optimizer_base import Hyperparameter, Optimizer, second_moment, update_moments


class SGD(Optimizer):
    """SGD with momentum as in `torch.optim.SGD`: trace = momentum * trace + grad, value -= lr * trace.

    Args:
        momentum: the factor, per step, of the sum of past gradients.
    """

    fields = ("trace",)
    uses_step_count = False
    momentum = Hyperparameter()

    def __init__(
        self,
        parameters: Iterable[Parameter] | Iterable[Mapping[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, lr, momentum=momentum, weight_decay=weight_decay)

    def update(self, grad: Array, moments: Sequence[Array], delta: Array, h: SimpleNamespace) -> None:
        """See the class."""
        (trace,) = moments
        trace *= h.momentum
        trace += grad
        np.multiply(trace, h.lr, out=delta)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2014, arXiv 1412.6980, algorithm 1). With mu and nu as in `update_moments`, t from 1:

        value -= lr * mu_t / (1 - b1^t) / (sqrt(nu_t / (1 - b2^t)) + eps)

    Both averages start at 0, which biases them toward 0. If every g_s has the mean m, then
    E[mu_t] = (1 - b1) sum_s b1^(t-s) m = (1 - b1^t) m. Division by 1 - b1^t removes the bias; that of nu_t is
    removed likewise (`docs/derivations.md`).

    Args:
        b1, b2: decay rates, per step, of the exponential averages of the gradients and of their squares.
        eps: added to the root of the second moment; in units of the gradient.
    """

    b1, b2, eps = Hyperparameter(), Hyperparameter(), Hyperparameter()

    def __init__(
        self,
        parameters: Iterable[Parameter] | Iterable[Mapping[str, Any]],
        lr: float = 1e-3,
        *,
        b1: float = 0.9,
        b2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)

    def precompute(self, h: SimpleNamespace) -> None:
        """Take both bias corrections out of the fraction: rate * mu / (sqrt(nu) + scaled_eps)."""
        root = math.sqrt(1 - h.b2**self.count)
        h.rate, h.scaled_eps = h.lr * root / (1 - h.b1**self.count), h.eps * root

    def update(self, grad: Array, moments: Sequence[Array], delta: Array, h: SimpleNamespace) -> None:
        """See the class."""
        update_moments(grad, moments[0], moments[1], h.b1, h.b2, delta)
        np.sqrt(second_moment(moments), out=delta)
        delta += h.scaled_eps
        np.divide(moments[0], delta, out=delta)
        delta *= h.rate


class AMSGrad(Adam):
    """AMSGrad as `torch.optim.Adam(amsgrad=True)` has it (Reddi et al. 2018, arXiv 1904.09237).

    The maximum of all nu so far in nu's place, taken *before* bias correction. Arguments are those of Adam.
    """

    fields = ("mu", "nu", "nu_max")


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101).

    value -= lr * weight_decay * value, besides Adam's update. Arguments are those of Adam, but for PyTorch's
    default of `weight_decay`.
    """

    decoupled = True

    def __init__(
        self,
        parameters: Iterable[Parameter] | Iterable[Mapping[str, Any]],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.01,
        **options: float,
    ) -> None:
        super().__init__(parameters, lr, weight_decay=weight_decay, **options)


OPTIMIZERS = ("adam", "adabound", "amsbound", "adaboundw", "sgdbound", "amsgrad", "adamw", "sgd")
_ADAM: dict[str, type[Adam]] = {"adam": Adam, "amsgrad": AMSGrad, "adamw": AdamW}
_BOUNDED = {"adabound": AdaBound, "amsbound": AMSBound, "adaboundw": AdaBoundW, "sgdbound": SGDBound}


def make_optimizer(
    name: str,
    parameters: Iterable[Parameter] | Iterable[Mapping[str, Any]],
    learning_rate: float,
    *,
    base_lr: float | None = None,
    final_lr: float = 0.1,
    gamma: float = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum: float = 0.9,
    weight_decay: float | None = None,
) -> Optimizer:
    """Return the optimizer of that name; arguments that it does not have are ignored, even out of range.

    The arguments are those of `jax_resnet.optimizers.make_optimizer`, but for `parameters`, which are
    parameters or groups of them. Groups replace JAX's `mask`: a group of parameters that shall not decay has
    "weight_decay": 0. Raises ValueError if the name is unknown; TypeError and ValueError as `Optimizer` does.
    """
    if weight_decay is None:
        weight_decay = 0.01 if name == "adamw" else 0.0
    decay = {"weight_decay": weight_decay}
    adam = {"b1": b1, "b2": b2, "eps": eps, **decay}
    if name == "sgd":
        return SGD(parameters, learning_rate, momentum=momentum, **decay)
    if name in _ADAM:
        return _ADAM[name](parameters, learning_rate, **adam)
    if name in _BOUNDED:
        bounds = {"final_lr": final_lr, "base_lr": base_lr, "gamma": gamma}
        return _BOUNDED[name](parameters, learning_rate, **bounds, **adam)  # type: ignore[arg-type]
    raise ValueError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")
