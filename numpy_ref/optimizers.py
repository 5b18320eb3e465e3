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

    With Nesterov's momentum, in the form of Sutskever et al. 2013 ("On the importance of initialization and
    momentum in deep learning") that PyTorch has: value -= lr * (grad + momentum * trace).

    Args:
        momentum: the factor, per step, of the sum of past gradients.
        nesterov: take the step of the trace after the next one, as far as it is known.

    Raises:
        ValueError: as `Optimizer`, and for `nesterov` without momentum.
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
        nesterov: bool = False,
    ) -> None:
        super().__init__(parameters, lr, momentum=momentum, weight_decay=weight_decay)
        self.nesterov = nesterov
        if nesterov and not all(group["momentum"] for group in self.param_groups):
            raise ValueError("nesterov needs a momentum above 0")

    def update(self, grad: Array, moments: Sequence[Array], delta: Array, h: SimpleNamespace) -> None:
        """See the class."""
        (trace,) = moments
        trace *= h.momentum
        trace += grad
        if self.nesterov:
            np.multiply(trace, h.momentum, out=delta)
            delta += grad
            delta *= h.lr
        else:
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
    parameters: Iterable[Parameter] | Iterable[Mapping[str, Any]] | Mapping[str, Parameter],
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
    norm_weight_decay: float | None = None,
    bias_weight_decay: float | None = None,
    nesterov: bool = False,
) -> Optimizer:
    """Return the optimizer of that name; arguments that it does not have are ignored, even out of range.

    The arguments are those of `jax_resnet.optimizers.make_optimizer`, but for `parameters`, which are
    parameters, groups of them, or parameters by their names, as `Layer.named_parameters` returns them. Groups
    replace JAX's `mask`: a group of parameters that shall not decay has "weight_decay": 0.
    `norm_weight_decay` and `bias_weight_decay` need the names, and make such groups. Raises ValueError if the
    name is unknown, or for `nesterov` with sgd without momentum; TypeError and ValueError as `Optimizer`.
    """
    if weight_decay is None:
        weight_decay = 0.01 if name == "adamw" else 0.0
    if norm_weight_decay is not None or bias_weight_decay is not None:
        if not isinstance(parameters, Mapping):
            raise TypeError("norm_weight_decay and bias_weight_decay need parameters by their names")
        parameters = decay_groups(parameters, weight_decay, norm_weight_decay, bias_weight_decay)
    elif isinstance(parameters, Mapping):
        parameters = parameters.values()
    decay = {"weight_decay": weight_decay}
    adam = {"b1": b1, "b2": b2, "eps": eps, **decay}
    if name == "sgd":
        return SGD(parameters, learning_rate, momentum=momentum, nesterov=nesterov, **decay)
    if name in _ADAM:
        return _ADAM[name](parameters, learning_rate, **adam)
    if name in _BOUNDED:
        bounds = {"final_lr": final_lr, "base_lr": base_lr, "gamma": gamma}
        return _BOUNDED[name](parameters, learning_rate, **bounds, **adam)  # type: ignore[arg-type]
    raise ValueError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")


def parameter_kind(name: str) -> str:
    """Return the kind of a parameter, from its torchvision name: what its weight decay depends on.

    Batch norms are called bn1, bn2, bn3 and downsample.1.

    Examples:
        >>> [parameter_kind(name) for name in ("layer1.0.bn2.weight", "layer2.0.downsample.1.bias")]
        ['norm.weight', 'norm.bias']
        >>> [parameter_kind(name) for name in ("conv1.weight", "fc.bias")]
        ['weight', 'bias']
    """
    *modules, last = name.split(".")
    of_norm = modules[-2:] == ["downsample", "1"] or (modules and modules[-1].startswith(("bn", "norm")))
    return f"norm.{last}" if of_norm else last


def weight_decay_of(
    name: str,
    weight_decay: float,
    norm_weight_decay: float | None = None,
    bias_weight_decay: float | None = None,
) -> float:
    """Return the weight decay of a parameter of that name.

    As torchvision's `set_weight_decay`, called as its training script does: `bias_weight_decay` is that of
    all biases, batch norm's too; `norm_weight_decay` that of batch norm's other parameters. Where one is
    None, the next rule applies, and at last `weight_decay`.

    Examples:
        >>> [weight_decay_of(name, 1e-4, 0.0) for name in ("conv1.weight", "bn1.weight", "bn1.bias")]
        [0.0001, 0.0, 0.0]
        >>> weight_decay_of("bn1.bias", 1e-4, 0.0, 1e-5)
        1e-05

    Source: torchvision, references/classification/utils.py
    """
    kind = parameter_kind(name)
    if kind.endswith("bias") and bias_weight_decay is not None:
        return bias_weight_decay
    if kind.startswith("norm.") and norm_weight_decay is not None:
        return norm_weight_decay
    return weight_decay


def decay_groups(parameters: Mapping[str, Any], *decays: float | None) -> list[dict[str, Any]]:
    """Group parameters by their weight decay: [{"params": [...], "weight_decay": ...}].

    Args:
        parameters: by their torchvision names.
        decays: the other arguments of `weight_decay_of`.
    """
    groups: dict[Any, list[Any]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(weight_decay_of(name, *decays), []).append(parameter)  # type: ignore[arg-type]
    return [{"params": group, "weight_decay": decay} for decay, group in groups.items()]


def clip_scale(grad_norm: float, max_norm: float) -> float:
    """The factor of all gradients that brings their common L2 norm down to `max_norm`:

        min(1, max_norm / (grad_norm + 1e-6))

    NaN for a norm that is NaN, and 0 for an infinite one, which leaves NaN of the infinite gradients.

    Args:
        grad_norm: the L2 norm of all gradients as one vector.
        max_norm: positive.

    Source: Pascanu et al. 2013, arXiv 1211.5063, as in `torch.nn.utils.clip_grad_norm_`.
    """
    return float(np.minimum(max_norm / (grad_norm + 1e-6), 1.0))
