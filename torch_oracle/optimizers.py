"""The optimizer table: PyTorch's own optimizers, and AdaBound and its variants from `adabound.py`.

The names, and the meaning of each argument, are those of `jax_resnet/optimizers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from torch_oracle.adabound import AdaBound, AdaBoundW, AMSBound, SGDBound, check_hyperparameters

OPTIMIZERS = ("adam", "adabound", "amsbound", "adaboundw", "sgdbound", "amsgrad", "adamw", "sgd")
_BOUNDED = {"adabound": AdaBound, "amsbound": AMSBound, "adaboundw": AdaBoundW, "sgdbound": SGDBound}


def make_optimizer(
    name: str,
    parameters: ParamsT | Mapping[str, Tensor],
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
    """Return the optimizer of a name; arguments that it does not use are ignored, in range or not.

    The arguments are those of `jax_resnet.optimizers.make_optimizer`, and `parameters`: what to train, as in
    `torch.optim`, or {torchvision name: parameter}, which `norm_weight_decay` and `bias_weight_decay` need. A
    schedule sets `param_groups[i]["lr"]`. Raises ValueError if the name is unknown or an argument is out of
    its range; TypeError where names are needed.
    """
    if weight_decay is None:
        weight_decay = 0.01 if name == "adamw" else 0.0
    if norm_weight_decay is not None or bias_weight_decay is not None:
        if not isinstance(parameters, Mapping):
            raise TypeError("norm_weight_decay and bias_weight_decay need parameters by their names")
        parameters = decay_groups(parameters, weight_decay, norm_weight_decay, bias_weight_decay)
        for group in parameters:
            check_hyperparameters(weight_decay=group["weight_decay"])
    elif isinstance(parameters, Mapping):
        parameters = list(parameters.values())
    check_hyperparameters(lr=learning_rate, weight_decay=weight_decay)
    if name == "sgd":
        check_hyperparameters(momentum=momentum)
        return torch.optim.SGD(
            parameters, learning_rate, momentum, weight_decay=weight_decay, nesterov=nesterov
        )
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
