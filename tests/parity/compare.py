"""Each pair of engines, tensor by tensor; and who is wrong where they disagree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tests import tolerances
from tests.comparing import assert_close, largest_error
from tests.parity import dump
from tests.parity.case import Case, Inputs, Results, make_inputs
from tests.parity.engines import engines_for, run_all


class Comparison(NamedTuple):
    """One tensor of two engines."""

    tensor: str
    left: str
    right: str
    error: float  # relative to the tensor's largest magnitude; infinite if a side lacks it or is not finite
    allowed: float
    fault: str  # empty if the two agree


def reduction_length(tensor: str, inputs: Inputs) -> int:
    """How many products are summed into each element, at most: of a convolution or a linear layer."""
    weight, output = inputs["state/weight"].shape, inputs["target"].shape
    if tensor == "y":
        return math.prod(weight[1:])
    return math.prod(weight) // weight[1] if tensor == "dx" else math.prod(output[:-1])


def tolerance(case: Case, tensor: str, inputs: Inputs) -> float:
    """How far two engines may be apart in one tensor of a case."""
    if case.kind == "optimizer":
        return tolerances.FLOAT64_OPTIMIZER
    if case.kind == "trajectory":
        first = tensor in ("loss", "logits")
        return tolerances.FLOAT64_TRAJECTORY[case.options["optimizer"]] if first else tolerances.FLOAT64_TRAINED
    if case.kind in ("stage", "network"):
        if case.name in tolerances.DEEP:
            gradient = tensor == "dx" or tensor.startswith("grad.")
            return tolerances.FLOAT64_DEEP_GRADIENT if gradient else tolerances.FLOAT64_DEEP
        return tolerances.FLOAT64_NETWORK
    if case.precision == "float64":
        return tolerances.FLOAT64_LAYER
    if case.kind in ("conv", "linear"):
        return tolerances.float32_sum(reduction_length(tensor, inputs))
    return tolerances.FLOAT32_ELEMENTWISE


def compare(case: Case, inputs: Inputs, results: Mapping[str, Results]) -> list[Comparison]:
    """Every tensor, in the last engine's order, of each pair of engines."""
    *_, reference = results.values()
    names = dict.fromkeys((*reference, *itertools.chain.from_iterable(results.values())))
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
    try:
        assert_close(what, *pair, allowed)
        fault = ""
    except AssertionError as error:
        fault = str(error)
    return Comparison(tensor, left, right, largest_error(*pair), allowed, fault)


def verdict(comparisons: list[Comparison]) -> str:
    """Which engines agree in everything, and so who is wrong if only one does not."""
    engines = list(dict.fromkeys(name for each in comparisons for name in (each.left, each.right)))
    apart = {frozenset((each.left, each.right)) for each in comparisons if each.fault}
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
    largest = max(groups, key=len)
    if len(largest) == 1:
        return f"no two of {', '.join(engines)} agree"
    others = [engine for members in groups if members is not largest for engine in members]
    return f"{', '.join(largest)} agree; {', '.join(others)} {'depart' if others[1:] else 'departs'}"


def check(case: Case, inputs: Inputs | None = None) -> dict[str, Results]:
    """Compute a case in all its engines and return what they found.

    Raises:
        AssertionError: two of them disagree. It says in which tensors, at which index, by how much, and how to
            replay the case from the dump that is left.
    """
    inputs = make_inputs(case) if inputs is None else inputs
    results = run_all(case, inputs)
    comparisons = compare(case, inputs, results)
    faults = [each.fault for each in comparisons if each.fault]
    if faults:
        path = dump.write(case, inputs, results, faults)
        shown = [*faults[:8], *([f"... and {len(faults) - 8} more"] if faults[8:] else [])]
        lines = [f"{case.name}, {case.precision}: {verdict(comparisons)}", *shown]
        raise AssertionError("\n".join([*lines, f"replay it: {dump.command(path)}"]))
    return results


def errors(found: Results, truth: Results) -> dict[str, float]:
    """The largest difference in each tensor, relative to its largest magnitude."""
    assert found.keys() == truth.keys()
    return {name: largest_error(array, truth[name]) for name, array in found.items()}


