"""A case in the NumPy engine."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

import numpy_ref
from numpy_ref import fast, layers
from numpy_ref.layers import Layer, Parameter
from numpy_ref.network import Network
from numpy_ref.state_dict import load_state_dict, to_torch_layout
from tests.parity.case import CLASSES, Case, Inputs, Results, group
from tests.parity.trajectory import run_engine

FORMS: dict[str, ModuleType] = {"fast": fast, "plain": layers, "loops": layers}


class Identity(Layer):
    """y = x: what the loss is taken of, where there is nothing else."""

    def forward(self, x, train=False):
        """x."""
        return x

    def backward(self, dy):
        """dy."""
        return dy


def build(case: Case, form: str) -> Layer:
    """The layer or network in one of its forms, with zeros for weights."""
    options, channels, forms = dict(case.options), case.shape[-1], FORMS[form]
    kit: dict[str, Any] = {"rng": None, "dtype": case.precision}
    match case.kind:
        case "conv":
            make = layers.LoopConv2d if form == "loops" else forms.Conv2d
            return make(channels, options.pop("out_channels"), **options, **kit)
        case "linear":
            return layers.Linear(channels, **options, **kit)
        case "batch_norm":
            return forms.BatchNorm(channels, **options, dtype=case.precision)
        case "max_pool":
            return forms.MaxPool2d(**options)
        case "avg_pool":
            return layers.AvgPool2d(**options)
        case "option_a":
            return layers.OptionA(channels, **options)
        case "stage" | "network":
            network, stage = getattr(numpy_ref, options.pop("model")), options.pop("stage", None)
            in_channels = options.pop("in_channels", channels)
            model = network(
                num_classes=CLASSES, in_channels=in_channels, **options, **kit, fast=form == "fast"
            )
            return model if stage is None else getattr(model, stage)
    simple = {
        "global_avg_pool": layers.GlobalAvgPool2d,
        "relu": layers.ReLU,
        "sigmoid": layers.Sigmoid,
        "flatten": layers.Flatten,
        "loss": Identity,
    }
    return simple[case.kind]()


def run(case: Case, inputs: Inputs, *, form: str = "fast") -> Results:
    """Forward, backward and what they leave."""
    if case.kind == "optimizer":
        return run_optimizer(case, inputs)
    if case.kind == "trajectory":
        return run_trajectory(case, inputs)
    layer: Any = build(case, form)
    load_state_dict(layer, group(inputs, "state"))
    x, target = inputs["x"], inputs["target"]
    network = isinstance(layer, Network)
    keep = inputs.get("keep")
    outputs = layer.stages(x, case.train, keep) if network else {"y": layer.forward(x, case.train)}
    results = {name: np.array(array) for name, array in outputs.items()}
    *_, dlast = outputs.values()
    if target.dtype.kind == "i":
        results["loss"], dlast = numpy_ref.cross_entropy(dlast, target)
    else:
        dlast = target
    results["dx"] = np.array(layer.backward(dlast))
    for name, variable in layer.variables().items():
        if isinstance(variable, Parameter):
            results[f"grad.{name}"] = to_torch_layout(variable.grad)
        else:
            results[f"after.{name}"] = variable.copy()
    return results


def run_optimizer(case: Case, inputs: Inputs) -> Results:
    """The parameters and every moment after all gradients."""
    parameters = {name: Parameter(array.copy()) for name, array in group(inputs, "state").items()}
    optimizer = numpy_ref.make_optimizer(
        case.options["optimizer"],
        parameters,
        case.options["learning_rate"],
        **case.options["optimizer_options"],
    )
    gradients = group(inputs, "gradients")
    for step, rate in enumerate(inputs["rates"]):
        optimizer.zero_grad()
        for name, parameter in parameters.items():
            parameter.add_grad(gradients[name][step])
        optimizer.lr = float(rate)
        optimizer.step()
    results = {f"value.{name}": parameter.value for name, parameter in parameters.items()}
    names = {id(parameter): name for name, parameter in parameters.items()}
    order = [names[id(parameter)] for parameter in optimizer.parameters]
    for moment, arrays in optimizer.moments.items():
        results |= {f"{moment}.{name}": array for name, array in zip(order, arrays, strict=True)}
    return results


def run_trajectory(case: Case, inputs: Inputs) -> Results:
    """The engine's own loop, in one process."""
    return run_engine(numpy_ref.Engine, case, inputs, processes=1)
