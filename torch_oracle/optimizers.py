"""The optimizer table: PyTorch's own optimizers, and AdaBound and its variants from `adabound.py`.

The names, and the meaning of each argument, are those of `jax_resnet/optimizers.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import Optimizer, ParamsT

from torch_oracle.adabound import AdaBound, AdaBoundW, AMSBound, SGDBound, check_hyperparameters

OPTIMIZERS = ("adam", "adabound", "amsbound", "adaboundw", "sgdbound", "amsgrad", "adamw", "sgd")
_BOUNDED = {"adabound": AdaBound, "amsbound": AMSBound, "adaboundw": AdaBoundW, "sgdbound": SGDBound}


def make_optimizer(
    name: str,
    parameters: ParamsT,
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
    """Return the optimizer of a name; arguments that it does not use are ignored, in range or not.

    The arguments are those of `jax_resnet.optimizers.make_optimizer`, and `parameters`: what to train, as in
    `torch.optim`. A schedule sets `param_groups[i]["lr"]`. Raises ValueError if the name is unknown or an
    argument is out of its range.
    """
    if weight_decay is None:
        weight_decay = 0.01 if name == "adamw" else 0.0
    check_hyperparameters(lr=learning_rate, weight_decay=weight_decay)
    if name == "sgd":
        check_hyperparameters(momentum=momentum)
        return torch.optim.SGD(parameters, learning_rate, momentum, weight_decay=weight_decay)
    check_hyperparameters(b1=b1, b2=b2, eps=eps)
    adam: dict[str, Any] = {"betas": (b1, b2), "eps": eps, "weight_decay": weight_decay}
    bound: dict[str, Any] = {"final_lr": final_lr, "base_lr": base_lr, "gamma": gamma}
    bound |= {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    if name in _BOUNDED:
        return _BOUNDED[name](parameters, learning_rate, **bound)
    if name == "adamw":
        return torch.optim.AdamW(parameters, learning_rate, **adam)
    if name in ("adam", "amsgrad"):
        return torch.optim.Adam(parameters, learning_rate, **adam, amsgrad=name == "amsgrad")
    raise ValueError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")
