"""The three implementations side by side: the same modules, public names and signatures.

A public name is one that a package exports, or that at least two of the packages define in the same module.
Where a name is not in all three, or a signature differs, the reason is listed here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

PACKAGES = ("jax_resnet", "numpy_ref", "torch_oracle")
MODULES = ("layers", "losses", "resnet", "adabound", "optimizers", "state_dict", "stages")

OPTAX = "an optimizer is a function that returns optax's transformation"
CLASSES = "an optimizer is an object that changes its parameters; in JAX see the function of the same name"
IN_TORCH = "PyTorch has it"
LAYOUT = "PyTorch's layout is that of the state dict already"
STATEFUL = "a layer that saves arrays for its backward; in JAX a function, in PyTorch PyTorch's own"
# {module: {name that is not in all three: why}}
NAMES: dict[str, dict[str, str]] = {
    "layers": {
        **dict.fromkeys(("BatchNorm", "Conv2d", "Linear"), IN_TORCH),
        **dict.fromkeys(
            ("AvgPool2d", "GlobalAvgPool2d", "MaxPool2d", "Flatten", "ReLU", "Sigmoid"), STATEFUL
        ),
        "LoopConv2d": "the convolution as loops, which the faster ones are held equal to",
        "NoNorm": "stands in for batch norm; the others leave it out",
        "Layer": "the base class, which Flax and PyTorch have",
        "Parameter": "a value and its gradient, which Flax and PyTorch have",
        "Sequential": "which Flax and PyTorch have",
        "cross_entropy": "with its gradient; in the others in losses.py",
        "no_grad": "nothing is saved for backward; in JAX there is no such state, and PyTorch has it",
        "draw": "initial weights that both engines share; PyTorch's are its own",
    },
    "losses": {
        "cross_entropy": "in NumPy in layers/loss.py",
        "PLAIN": "the engines' default, and the reference has no engine",
    },
    "resnet": {},
    "adabound": {
        **dict.fromkeys(("AMSBound", "AdaBound", "AdaBoundW", "SGDBound"), CLASSES),
        **dict.fromkeys(("adabound", "adaboundw", "amsbound", "sgdbound"), OPTAX),
        **dict.fromkeys(("scale_by_adabound", "scale_by_amsbound", "scale_by_sgdbound"), OPTAX),
        "adabound_bounds": "PyTorch's form has the authors' operations in their order, bounds among them",
        "check_hyperparameters": "in NumPy each attribute checks its own range: see Hyperparameter",
    },
    "optimizers": {
        **dict.fromkeys(("AMSGrad", "Adam", "AdamW", "SGD"), "in JAX they are optax's, in PyTorch PyTorch's"),
        **dict.fromkeys(("amsgrad", "scale_by_amsgrad"), OPTAX),
        "clip_scale": IN_TORCH,
        "decay_groups": "an optimizer of optax has no groups of parameters",
    },
    "state_dict": dict.fromkeys(("from_torch_layout", "to_torch_layout"), LAYOUT),
    "stages": {},
}
# {package: {a parameter that no other package has: why}}
PARAMETERS = {
    "jax_resnet": {
        "rngs": "source of the initial weights",
        "dtype": "in PyTorch a model is converted: model.double()",
        "remat": "a choice that only the JAX engine offers",
    },
    "numpy_ref": {
        "rng": "source of the initial weights",
        "dtype": "in PyTorch a model is converted: model.double()",
        "fast": "the readable layers or the fast ones",
        "keep_patches": "memory for speed",
        "batch_size": "of a part of a batch: a process's share",
    },
    "torch_oracle": {},
}
# {name: {parameter that some package lacks: why}}
OMITTED = {
    "make_optimizer": {"parameters": "an optimizer of optax is given its parameters at each update"},
    "parameter_count": {"frozen": "in NumPy and PyTorch each parameter has a flag"},
}


@cache
def module(package: str, name: str) -> ModuleType:
    return import_module(f"{package}.{name}")


def defined(package: str, name: str) -> dict[str, Any]:
    """What a module defines itself: classes and functions, and what it makes of them."""
    values = vars(module(package, name)).items()
    start = f"{package}.{name}"
    return {
        key: value
        for key, value in values
        if not key.startswith("_")
        and (callable(value) or isinstance(value, Mapping) or key.isupper())
        and f"{getattr(value, '__module__', start)}.".startswith((f"{start}.", "functools."))
        and not inspect.ismodule(value)
    }


def exports(package: str) -> set[str]:
    """The names that a package re-exports: `from package.module import name as name`."""
    values = vars(import_module(package)).items()
    return {key for key, value in values if not key.startswith("_") and not inspect.ismodule(value)}


def public_names(name: str) -> dict[str, list[str]]:
    """{public name of a module: the packages that have it}."""
    holders: dict[str, list[str]] = {}
    for package in PACKAGES:
        for key in defined(package, name):
            holders.setdefault(key, []).append(package)
    exported = {key for package in PACKAGES for key in exports(package)}
    return {key: packages for key, packages in holders.items() if key in exported or len(packages) > 1}


@pytest.mark.parametrize("name", MODULES)
def test_the_packages_have_the_same_public_names(name: str) -> None:
    incomplete = {key for key, packages in public_names(name).items() if len(packages) < len(PACKAGES)}
    assert incomplete == set(NAMES[name])


def parameters(package: str, value: Any) -> dict[str, tuple[Any, Any]]:
    """{parameter: (kind, default)}, without those that are a package's alone."""
    function = value.__init__ if inspect.isclass(value) and not issubclass(value, tuple) else value
    signature = inspect.signature(function).parameters
    return {
        key: (parameter.kind, parameter.default)
        for key, parameter in signature.items()
        if key != "self" and key not in PARAMETERS[package]
    }


@pytest.mark.parametrize("name", MODULES)
def test_the_same_name_has_the_same_signature(name: str) -> None:
    for key, packages in public_names(name).items():
        values = {package: defined(package, name)[key] for package in packages}
        if not callable(values[packages[0]]):
            continue
        signatures = {package: parameters(package, value) for package, value in values.items()}
        names = list(dict.fromkeys(p for signature in signatures.values() for p in signature))
        for package, signature in signatures.items():
            passes_on = any(kind is inspect.Parameter.VAR_KEYWORD for kind, _ in signature.values())
            for parameter in names:
                expected = {other[parameter] for other in signatures.values() if parameter in other}
                assert len(expected) == 1, f"{name}.{key}: {parameter} differs: {expected}"
                ((kind, _),) = expected
                lacks = parameter not in signature and kind is not inspect.Parameter.VAR_KEYWORD
                by_name = passes_on and kind is inspect.Parameter.KEYWORD_ONLY
                assert not lacks or by_name or parameter in OMITTED.get(key, {}), (
                    f"{package}.{name}.{key} has no parameter {parameter}"
                )


def test_the_packages_have_the_same_models_and_optimizers() -> None:
    for table, name in (("MODELS", "resnet"), ("OPTIMIZERS", "optimizers")):
        first, *others = (set(getattr(module(package, name), table)) for package in PACKAGES)
        assert others == [first, first], table


@pytest.mark.parametrize("package", ["jax_resnet", "torch_oracle"])
def test_a_block_shows_its_sum(package: str) -> None:
    resnet = module(package, "resnet")
    assert "relu(self.branch(x) + self.shortcut(x))" in inspect.getsource(resnet.ResidualBlock)
    for block in (resnet.BasicBlock, resnet.Bottleneck):
        assert issubclass(block, resnet.ResidualBlock)
        assert not {"__call__", "forward"} & set(vars(block))
