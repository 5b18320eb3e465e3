"""Compare each pair of engines, tensor by tensor; where they disagree, say which one is wrong.

A whole network in float32 is compared with PyTorch's float64, and its error with PyTorch's float32 error.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import parity
from tests import tolerances
from tests.helpers.comparing import largest_error
from tests.parity import dump
from tests.parity.case import Case, Inputs, Results, make_inputs
from tests.parity.engines import engines_for, run_all

REFERENCES = ("torch", "torch-channels-last")
ROUNDING = 2.0**-24  # of float32: the error of storing a correct result


class Comparison(NamedTuple):
    """The comparison of one tensor of two engines."""

    tensor: str
    left: str
    right: str
    error: float  # relative to the tensor's largest magnitude, or a ratio; infinite if a side lacks it
    allowed: float
    fault: str  # empty if the two agree


def reduction_length(tensor: str, inputs: Inputs) -> int:
    """Return the largest number of products summed into an element of a convolution or a linear layer."""
    weight, output = inputs["state/weight"].shape, inputs["target"].shape
    if tensor == "y":
        return math.prod(weight[1:])
    return math.prod(weight) // weight[1] if tensor == "dx" else math.prod(output[:-1])


def tolerance(case: Case, tensor: str, inputs: Inputs) -> float:
    """Return the tolerance for one tensor of a case."""
    if case.kind == "optimizer":
        return tolerances.FLOAT64_OPTIMIZER
    if case.kind == "trajectory":
        first = tensor in ("loss", "logits")
        return (
            tolerances.FLOAT64_TRAJECTORY[case.options["optimizer"]] if first else tolerances.FLOAT64_TRAINED
        )
    if case.kind == "network":
        if case.precision == "float32":
            return tolerances.FLOAT32_RATIO_WORST
        gradient = tensor == "dx" or tensor.startswith("grad.")
        deep = case.options["model"] == "resnet101" and "width" not in case.options
        return tolerances.FLOAT64_DEEP_GRADIENT if deep and gradient else tolerances.FLOAT64_NETWORK
    if case.precision == "float64":
        return tolerances.FLOAT64_LAYER
    if case.kind in ("conv", "linear"):
        return tolerances.float32_sum(reduction_length(tensor, inputs))
    return tolerances.FLOAT32_ELEMENTWISE


def compare(case: Case, inputs: Inputs, results: Mapping[str, Results]) -> list[Comparison]:
    """Compare every tensor of each pair of engines, in the last engine's order."""
    *_, reference = results.values()
    names = dict.fromkeys((*reference, *itertools.chain.from_iterable(results.values())))
    if case.kind == "network" and case.precision == "float32":
        return _compare_with_float64(results, tolerances.FLOAT32_RATIO_WORST)
    return [
        _compare(tensor, left, right, results, tolerance(case, tensor, inputs))
        for tensor in names
        for left, right in itertools.combinations(results, 2)
    ]


def _compare(
    tensor: str, left: str, right: str, results: Mapping[str, Results], allowed: float
) -> Comparison:
    what = f"{tensor} of {left} against {right}: "
    for engine in (left, right):
        if tensor not in results[engine]:
            return Comparison(tensor, left, right, math.inf, allowed, f"{what}{engine} has none")
    pair = results[left][tensor], results[right][tensor]
    types = [str(array.dtype) for array in pair]
    if right != "truth" and types[0] != types[1]:
        fault = f"{what}{types[0]}, not {types[1]}"
        return Comparison(tensor, left, right, math.inf, allowed, fault)
    report = parity.compare_tensors({tensor: pair[1]}, {tensor: pair[0]}, allowed)
    first = report.first_difference
    fault = f"{what}{first.distance}; {first.cause}" if first else ""
    return Comparison(tensor, left, right, report.tensors[0].error, allowed, fault)


def _compare_with_float64(results: Mapping[str, Results], allowed: float) -> list[Comparison]:
    """Compare one seed, for a replay; the tests take several, see `check_in_float32`."""
    return [
        Comparison(
            tensor,
            engine,
            "truth",
            ratio,
            allowed,
            f"{tensor} of {engine}: {ratio:.1f} times PyTorch's own error" if ratio > allowed else "",
        )
        for engine in ("numpy", "jax")
        for tensor, ratio in ratios(results, engine).items()
    ]


def verdict(comparisons: list[Comparison]) -> str:
    """Say which engines agree in everything, and so which is wrong. All forms of an engine have one vote."""
    engines = list(
        dict.fromkeys(name for comparison in comparisons for name in (comparison.left, comparison.right))
    )
    apart = {frozenset((comparison.left, comparison.right)) for comparison in comparisons if comparison.fault}
    groups: list[list[str]] = []
    for engine in engines:
        for members in groups:
            if all(frozenset((engine, member)) not in apart for member in members):
                members.append(engine)
                break
        else:
            groups.append([engine])
    if len(groups) == 1:
        return "all agree"

    def votes(members: list[str]) -> int:
        return len({name.partition("-")[0] for name in members})

    largest = max(groups, key=votes)
    if votes(largest) == 1:
        return f"no two of {', '.join(engines)} agree"
    others = [engine for members in groups if members is not largest for engine in members]
    return f"{', '.join(largest)} agree; {', '.join(others)} {'depart' if others[1:] else 'departs'}"


def check(case: Case, inputs: Inputs | None = None, engines: list[str] | None = None) -> dict[str, Results]:
    """Compute a case in all its engines, or in `engines`; return {engine: results}.

    Raises:
        AssertionError: two engines disagree. The message names tensors, indices, errors, and the command that
            replays the case from its dump. An exception in an engine leaves a dump, too.
    """
    inputs = make_inputs(case) if inputs is None else inputs
    engines = engines_for(case) if engines is None else engines
    try:
        results = run_all(case, inputs, engines)
    except Exception as error:
        path = dump.write(case, inputs, {name: {} for name in engines}, [repr(error)])
        error.add_note(f"{case.name}, {case.precision}; replay it: {dump.command(path)}")
        raise
    comparisons = compare(case, inputs, results)
    faults = [comparison.fault for comparison in comparisons if comparison.fault]
    if faults:
        path = dump.write(case, inputs, results, faults)
        shown = [*faults[:8], *([f"... and {len(faults) - 8} more"] if faults[8:] else [])]
        lines = [f"{case.name}, {case.precision}: {verdict(comparisons)}", *shown]
        raise AssertionError("\n".join([*lines, f"replay it: {dump.command(path)}"]))
    return results


def errors(actual: Results, truth: Results) -> dict[str, float]:
    """Return the largest difference in each tensor, relative to its largest magnitude."""
    assert actual.keys() == truth.keys()
    return {name: largest_error(actual[name], array) for name, array in truth.items()}


def ratios(results: Mapping[str, Results], engine: str) -> dict[str, float]:
    """Return for each tensor an engine's float32 error over that of PyTorch's worse layout.

    A stored result is rounded: no error counts as less than that.
    """
    engine_errors, *reference_errors = (
        errors(results[name], results["truth"]) for name in (engine, *REFERENCES)
    )
    return {
        name: max(ROUNDING, error) / max(ROUNDING, *(layout[name] for layout in reference_errors))
        for name, error in engine_errors.items()
    }


def mean_ratios(by_seed: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the geometric mean over seeds of each tensor's ratio.

    One seed is not enough: an input of a ReLU near 0 may change its sign in float32. That moves single
    gradients by a tenth, in some seeds for one engine or layout alone.
    """
    return {name: statistics.geometric_mean(seed[name] for seed in by_seed) for name in by_seed[0]}


def check_in_float32(case: Case, seeds: range = range(5)) -> None:
    """Compare a whole network's float32 errors with PyTorch's own, over several seeds.

    Raises:
        AssertionError: an engine is worse in the geometric mean over all tensors, or much worse in one.
    """
    by_engine: dict[str, list[dict[str, float]]] = {"numpy": [], "jax": []}
    for seed in seeds:
        seeded = replace(case, precision="float32", seed=seed)
        results = run_all(seeded, make_inputs(seeded), engines_for(seeded))
        for engine, ratio in by_engine.items():
            ratio.append(ratios(results, engine))
    for engine, by_seed in by_engine.items():
        means = mean_ratios(by_seed)
        mean, tensor = statistics.geometric_mean(means.values()), max(means, key=lambda name: means[name])
        if not (mean <= tolerances.FLOAT32_RATIO and means[tensor] <= tolerances.FLOAT32_RATIO_WORST):
            worst = max(range(len(seeds)), key=lambda index: by_seed[index][tensor])
            seeded = replace(case, precision="float32", seed=seeds[worst])
            inputs = make_inputs(seeded)
            fault = f"{tensor} of {engine} is off by {means[tensor]:.1f} times PyTorch's own error"
            fault += f", all tensors by {mean:.2f} times in the geometric mean"
            path = dump.write(seeded, inputs, run_all(seeded, inputs, engines_for(seeded)), [fault])
            raise AssertionError(f"{case.name}, float32: {fault}\nreplay it: {dump.command(path)}")
