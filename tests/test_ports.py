"""The labeled sets: a correct port agrees with its reference, and a fault changes what its label says.

Everything is computed in float64 by the frameworks alone, without the package `parity`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx, traverse_util

from tests import ports, ports_blind
from tests.ports.case import Array, Case, Fault, Port, arrays_of, parameters_of, statistics_of
from tests.ports.causes import CAUSES

AGREES = 1e-10  # relative to the largest number of a tensor; float64 rounds at 1e-16
ROUNDED = 1e-6  # where a library computes in float32 on the way
DIFFERS = 1e-6

SETS = (ports, ports_blind)
PORTS = [port for labeled_set in SETS for port in labeled_set.all_ports()]
FAULTS = [fault for labeled_set in SETS for fault in labeled_set.all_faults()]
QUICK = ("squeeze-jax", "gru-jax", "residual-merged")  # the others take minutes, most of them to compile


def marked(entries: Iterable[Port | Fault]) -> list[Any]:
    """The entries by name; those that are not quick are marked slow."""
    return [
        pytest.param(entry, id=entry.name, marks=() if entry.name.startswith(QUICK) else pytest.mark.slow)
        for entry in entries
    ]


@dataclass(frozen=True)
class Run:
    """What one model computes, in the candidate's names and layouts."""

    outputs: dict[str, Array]
    input_gradients: dict[str, Array]
    parameter_gradients: dict[str, Array]
    statistics: dict[str, Array]
    parameters: dict[str, Array]

    def gradients(self) -> dict[str, Array]:
        return {**self.input_gradients, **self.parameter_gradients}


def named(inputs: Any) -> dict[str, Any]:
    """Inputs by name: "input", "input.0", "input.mask"."""
    match inputs:
        case dict():
            return {f"input.{name}": array for name, array in inputs.items()}
        case tuple():
            return {f"input.{index}": array for index, array in enumerate(inputs)}
    return {"input": inputs}


def call(function: Any, inputs: Any, values: Mapping[str, Any]) -> Any:
    """The function of its inputs, given by name."""
    match inputs:
        case dict():
            return function(**{name.removeprefix("input."): value for name, value in values.items()})
        case _:
            return function(*values.values())


def cotangent(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(7).standard_normal(shape)


def run_reference(case: Case) -> Run:
    """The reference's numbers; its random state and statistics are its own."""
    values = {name: torch.from_numpy(array.copy()) for name, array in named(case.inputs).items()}
    floating = {name: value.requires_grad_() for name, value in values.items() if value.is_floating_point()}
    weights = arrays_of(case.reference)
    output = call(case.reference, case.inputs, values)
    output.backward(torch.from_numpy(cotangent(tuple(output.shape))))

    def layout(tensor: torch.Tensor | None) -> Array:
        assert tensor is not None
        array = tensor.detach().numpy()
        return np.moveaxis(array, 1, -1) if case.nhwc and array.ndim == 4 else array

    gradients = {}
    for name, parameter in case.reference.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.numpy()
    return Run(
        {"output": layout(output)},
        {name: layout(value.grad) for name, value in floating.items()},
        case.convert(gradients) if case.same_gradients else {},
        statistics_of(case.convert(arrays_of(case.reference))),
        parameters_of(case.convert(weights)),
    )


def flat(tree: Any) -> dict[str, Array]:
    """A nested dictionary of arrays by dotted name."""
    return {
        ".".join(map(str, path)): np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree).items()
    }


def pure(case: Case) -> tuple[Any, Any, Any]:
    """The candidate as a function f(params, *inputs) -> (output, statistics), params, and names of both."""
    model = case.candidate
    match case.adapter:
        case "nnx":
            graph, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]

            def run_nnx(params: Any, *args: Any, **kwargs: Any) -> Any:
                module = nnx.merge(graph, params, rest, copy=True)
                output = module(*args, **kwargs)
                return output, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

            return run_nnx, params, nnx.to_pure_dict
        case "linen":
            statistics = {name: tree for name, tree in case.variables.items() if name != "params"}

            def run_linen(params: Any, *args: Any, **kwargs: Any) -> Any:
                variables = {"params": params, **statistics}
                output, changed = model.apply(variables, *args, **kwargs, mutable=["batch_stats"])
                return output, changed.get("batch_stats", {})

            return run_linen, case.variables["params"], lambda tree: tree
        case "jax":

            def run_jax(params: Any, *args: Any, **kwargs: Any) -> Any:
                if case.state is None:
                    return model(params, *args, **kwargs), {}
                return model(params, case.state, *args, **kwargs)

            return run_jax, case.variables, lambda tree: tree


def run_candidate(case: Case) -> Run:
    """The candidate's numbers."""
    function, params, as_tree = pure(case)
    values = {name: jnp.asarray(array) for name, array in named(case.candidate_inputs).items()}
    floating = {name: value for name, value in values.items() if jnp.issubdtype(value.dtype, jnp.floating)}

    def of_floating(params: Any, floating: Mapping[str, Any]) -> Any:
        return call(functools.partial(function, params), case.candidate_inputs, {**values, **floating})

    @jax.jit
    def run(params: Any, floating: Mapping[str, Any]) -> Any:
        output, pullback, statistics = jax.vjp(of_floating, params, floating, has_aux=True)
        weight = cotangent(run_shape(case, output.shape))
        if case.nhwc and output.ndim == 4:
            weight = np.moveaxis(weight, 1, -1)
        return output, statistics, *pullback(jnp.asarray(weight, output.dtype))

    output, statistics, parameter_gradients, input_gradients = run(params, floating)
    return Run(
        {"output": np.asarray(output)},
        flat(input_gradients),
        flat(as_tree(parameter_gradients)),
        flat(statistics),
        flat(as_tree(params)),
    )


def run_shape(case: Case, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The reference's shape of an output."""
    return (shape[0], shape[3], *shape[1:3]) if case.nhwc and len(shape) == 4 else shape


def error(expected: Array, actual: Array) -> float:
    """The largest difference over the largest number."""
    assert expected.shape == actual.shape
    assert np.isfinite(actual).all()
    return float(np.max(np.abs(actual - expected)) / max(float(np.max(np.abs(expected))), 1e-3))


def errors(expected: Mapping[str, Array], actual: Mapping[str, Array]) -> dict[str, float]:
    assert set(expected) == set(actual)
    return {name: error(array, actual[name]) for name, array in expected.items()}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@functools.cache
def correct_run(build: Any) -> Run:
    return run_candidate(build(0, dtype="float64"))


@functools.cache
def reference_of(build: Any) -> torch.nn.Module:
    return build(0).reference


def worst(expected: Mapping[str, Array], actual: Mapping[str, Array]) -> float:
    return max(errors(expected, actual).values(), default=0.0)


@pytest.mark.parametrize("port", marked(PORTS))
def test_a_correct_port_agrees(port: Port) -> None:
    case = port.build(0, dtype="float64")
    reference, candidate = run_reference(case), correct_run(port.build)
    for expected, actual in (
        (reference.outputs, candidate.outputs),
        (reference.input_gradients, candidate.input_gradients),
        (reference.parameters, candidate.parameters),
        (reference.parameter_gradients, candidate.parameter_gradients if case.same_gradients else {}),
        (reference.statistics if case.train else {}, candidate.statistics if case.train else {}),
    ):
        bound = ROUNDED if port.float32_inside else AGREES
        departing = {name: value for name, value in errors(expected, actual).items() if value > bound}
        assert not departing, departing


@pytest.mark.parametrize("fault", marked(FAULTS))
def test_a_fault_changes_what_its_label_says(fault: Fault) -> None:
    right = correct_run(fault.port.build)
    wrong = run_candidate(fault.build(0, dtype="float64"))
    output = worst(right.outputs, wrong.outputs)
    if fault.what in ("output", "parameter"):
        assert output > DIFFERS
    else:
        assert output < AGREES
    if fault.what == "output":
        assert wrong.parameters.keys() == right.parameters.keys()
        assert worst(right.parameters, wrong.parameters) == 0
    if fault.what == "parameter":
        changed = {
            name
            for name, array in right.parameters.items()
            if name not in wrong.parameters or not np.array_equal(array, wrong.parameters[name])
        }
        assert 1 <= len(changed) <= 2
    if fault.what in ("input gradient", "parameter gradient"):
        assert worst(right.gradients(), wrong.gradients()) > DIFFERS
        assert worst(right.statistics, wrong.statistics) < AGREES
    if fault.what == "statistics":
        assert worst(right.gradients(), wrong.gradients()) < AGREES
        assert worst(right.statistics, wrong.statistics) > DIFFERS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_label_names_what_exists(fault: Fault) -> None:
    reference = reference_of(fault.port.build)
    modules = dict(reference.named_modules())
    for stage in (fault.stage, *fault.accept):
        assert stage in modules or stage.rpartition(".")[0] in modules, stage
    assert fault.cause in CAUSES
    if fault.what in ("parameter", "parameter gradient"):
        assert fault.parameter in dict(reference.named_parameters())
    assert fault.where or fault.what == "parameter", "no line ends in # fault: NAME"


@pytest.mark.parametrize(("labeled_set", "models"), [(ports, 10), (ports_blind, 5)])
def test_a_set_is_as_large_as_it_claims(labeled_set: ModuleType, models: int) -> None:
    assert len(labeled_set.MODELS) >= models
    assert len(list(labeled_set.all_faults())) >= 40


def test_names_are_unique() -> None:
    names = Counter(entry.name for entry in (*PORTS, *FAULTS))
    assert max(names.values()) == 1
