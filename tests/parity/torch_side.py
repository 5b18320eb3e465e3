"""A case in PyTorch, the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_oracle
from tests.helpers.comparing import nchw, nhwc
from tests.parity.case import CLASSES, Case, Inputs, Results, group
from torch_oracle.layers import GroupedBatchNorm2d

MOMENTS = {  # by the names of the checkpoint tree
    "exp_avg": "mu",
    "exp_avg_sq": "nu",
    "max_exp_avg_sq": "nu_max",
    "momentum_buffer": "trace",
}


class Function(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


def build(case: Case) -> nn.Module:
    """The module, in float32, with whatever weights it begins with."""
    options, channels = dict(case.options), case.shape[-1]
    match case.kind:
        case "conv":
            return nn.Conv2d(channels, **options)
        case "linear":
            return nn.Linear(channels, **options)
        case "batch_norm" if "group" in options:
            return GroupedBatchNorm2d(channels, **options)
        case "batch_norm":
            return (nn.BatchNorm2d if len(case.shape) == 4 else nn.BatchNorm1d)(channels, **options)
        case "max_pool":
            return nn.MaxPool2d(**options)
        case "avg_pool":
            return nn.AvgPool2d(**options)
        case "option_a":
            return torch_oracle.OptionA(channels, **options)
        case "stage" | "network" | "trajectory":
            network = getattr(torch_oracle, options.pop("model"))
            stage = options.pop("stage", None)
            for other in ("optimizer", "optimizer_options", "learning_rate", "steps", "engine_options"):
                options.pop(other, None)
            module = network(num_classes=CLASSES, in_channels=options.pop("in_channels", channels), **options)
            return module if stage is None else getattr(module, stage)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "global_avg_pool": lambda x: x.mean((2, 3)),
        "relu": F.relu,
        "sigmoid": torch.sigmoid,
        "flatten": lambda x: x.flatten(start_dim=1),
        "loss": lambda x: x,
    }
    return Function(functions[case.kind])


def shapes(case: Case) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Those of the state dict and of the (last) output, NHWC; nothing is computed."""
    with torch.device("meta"):
        module = build(case).eval()
        x = torch.empty(case.shape)
        *_, last = outputs_of(module, x.permute(0, 3, 1, 2) if x.ndim == 4 else x).values()
    state = {name: tuple(t.shape) for name, t in module.state_dict().items() if "num_batches" not in name}
    return state, tuple((last.permute(0, 2, 3, 1) if last.ndim == 4 else last).shape)


def outputs_of(module: nn.Module, x: Tensor, keep: np.ndarray | None = None) -> dict[str, Tensor]:
    """A network's stages, with the factors of its branches, or what a layer makes of x."""
    stages: Any = getattr(module, "stages", None)
    factors = [] if keep is None else [torch.from_numpy(keep)]
    return {"y": module(x)} if stages is None else stages(x, *factors)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Where other processes have the cores, threads that wait for each other at every small tensor take 50
    times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def run(case: Case, inputs: Inputs, *, precision: str | None = None, channels_last: bool = False) -> Results:
    """Forward, backward and what they leave; `precision` in place of the case's."""
    if case.kind == "optimizer":
        return run_optimizer(case, inputs)
    if case.kind == "trajectory":
        return run_trajectory(case, inputs)
    dtype = getattr(torch, precision or case.precision)
    layout: Any = torch.channels_last if channels_last else torch.contiguous_format
    module: Any = build(case).train(case.train)
    module.to(dtype=dtype, memory_format=layout)
    torch_oracle.load_state_dict(module, group(inputs, "state"))
    x = torch.from_numpy(nchw(inputs["x"])).to(dtype)
    x = x.contiguous(memory_format=layout).requires_grad_() if x.ndim == 4 else x.requires_grad_()
    outputs = outputs_of(module, x, inputs.get("keep"))
    *_, last = outputs.values()
    target = torch.from_numpy(nchw(inputs["target"]))
    label = not target.is_floating_point()
    loss = F.cross_entropy(last, target.long()) if label else (last * target.to(dtype)).sum()
    loss.backward()
    results = {name: nhwc(array.detach()) for name, array in outputs.items()}
    if label:
        results["loss"] = loss.detach().numpy()
    assert x.grad is not None
    results["dx"] = nhwc(x.grad)
    results |= {f"grad.{name}": np.asarray(parameter.grad) for name, parameter in module.named_parameters()}
    return results | statistics(torch_oracle.state_dict(module))


def statistics(state: Mapping[str, np.ndarray]) -> Results:
    """The running statistics of a state dict, as they are afterwards."""
    return {f"after.{name}": array for name, array in state.items() if "running" in name}


def run_optimizer(case: Case, inputs: Inputs) -> Results:
    """The parameters and every moment after all gradients."""
    parameters = {
        name: nn.Parameter(torch.from_numpy(array.copy())) for name, array in group(inputs, "state").items()
    }
    optimizer = torch_oracle.make_optimizer(
        case.options["optimizer"],
        parameters,
        case.options["learning_rate"],
        **case.options["optimizer_options"],
    )
    gradients = {name: torch.from_numpy(array) for name, array in group(inputs, "gradients").items()}
    for step, rate in enumerate(inputs["rates"]):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step]
        for param_group in optimizer.param_groups:
            param_group["lr"] = float(rate)
        optimizer.step()
    return after_training(parameters, optimizer)


def after_training(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Results:
    """`value.NAME`, and `mu.NAME` and the like."""
    results = {f"value.{name}": parameter.detach().numpy() for name, parameter in parameters.items()}
    for key, moment in MOMENTS.items():
        for name, parameter in parameters.items():
            if key in optimizer.state[parameter]:
                results[f"{moment}.{name}"] = np.asarray(optimizer.state[parameter][key])
    return results


def run_trajectory(case: Case, inputs: Inputs) -> Results:
    """The plain loop of every PyTorch tutorial."""
    module = build(case).double().train()
    torch_oracle.load_state_dict(module, group(inputs, "state"))
    parameters = dict(module.named_parameters())
    optimizer = torch_oracle.make_optimizer(
        case.options["optimizer"],
        parameters,
        case.options["learning_rate"],
        **case.options["optimizer_options"],
    )
    pieces = case.options.get("engine_options", {})
    decay = pieces.get("ema_decay")
    average = decay and AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    losses, logits = [], []
    for step, rate in enumerate(inputs["rates"]):
        batch = step % len(inputs["images"])
        for param_group in optimizer.param_groups:
            param_group["lr"] = float(rate)
        optimizer.zero_grad()
        keep = [torch.from_numpy(inputs["keep"][step])] if "keep" in inputs else []
        output = module(torch.from_numpy(nchw(inputs["images"][batch])), *keep)
        loss = F.cross_entropy(output, torch.from_numpy(inputs["labels"][batch]).long())
        loss.backward()
        if "clip_grad_norm" in pieces:
            nn.utils.clip_grad_norm_(module.parameters(), pieces["clip_grad_norm"])
        optimizer.step()
        if average:
            average.update_parameters(module)
        losses.append(loss.item())
        logits.append(output.detach().numpy())
    results = {"loss": np.array(losses), "logits": np.stack(logits)}
    if average:
        averages = torch_oracle.state_dict(average.module)
        results |= {f"average.{name}": array for name, array in averages.items()}
    return results | after_training(parameters, optimizer) | statistics(torch_oracle.state_dict(module))
