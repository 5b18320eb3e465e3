"""The search space of a method, and its points: a quasi-random sequence that is a function of the file alone.

    space = { lr = [1e-4, 1e-1], weight_decay = [1e-5, 1e-2], gamma = 0.1 }

A list of two numbers is a range, drawn uniformly in the logarithm; any other value is fixed. Points are those
of a scrambled Halton sequence (Owen 2017, arXiv 1706.02808), which fills the space more evenly than
independent draws. Its first points stay the same when more are asked for.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from experiment.errors import UserError
from experiment.options.config import HYPERPARAMETERS, Config, is_external

Options = dict[str, Any]
Range = tuple[float, float]
DIGITS = 4  # of a drawn number, so that it can be read and typed


def split(space: Any, label: str) -> tuple[Options, dict[str, Range]]:
    """Return the fixed options of the space of method `label`, and its ranges. Raises UserError."""
    if not isinstance(space, dict):
        raise UserError(f"{label}: space must be a table, such as {{ lr = [1e-4, 1e-1] }}")
    ranges: dict[str, Range] = {}
    for name, value in space.items():
        if isinstance(value, list):
            numbers = all(type(end) in (int, float) and math.isfinite(end) for end in value)
            if len(value) != 2 or not numbers or not 0 < value[0] < value[1]:
                raise UserError(f"{label}: space: {name} must be [low, high], 0 < low < high, not {value!r}")
            ranges[name] = (float(value[0]), float(value[1]))
    return {name: value for name, value in space.items() if name not in ranges}, ranges


def draw(ranges: Mapping[str, Range], count: int, seed: int) -> list[Options]:
    """Return the first `count` points of a space: {name: value} each.

    Equal spaces have equal points, and the K-th ranges of different spaces have points at the same places. So
    the luck of a draw is the same for all methods, as far as their spaces are alike.

    Args:
        ranges: the ends of each option's range.
        count: how many.
        seed: `space_seed` of the file; it decides on the scrambling.

    Examples:
        >>> ranges = {"lr": (1e-4, 1e-1)}
        >>> draw(ranges, 2, seed=0) == draw(ranges, 3, seed=0)[:2]
        True
    """
    from scipy.stats import qmc

    sequence = qmc.Halton(len(ranges), scramble=True, rng=seed)
    return [
        {name: _scaled(name, float(u), *ends) for u, (name, ends) in zip(row, ranges.items(), strict=True)}
        for row in sequence.random(count)
    ]


def _scaled(name: str, u: float, low: float, high: float) -> float | int:
    """A number of [0, 1) in a range, uniform in the logarithm; whole for an option that is a whole number."""
    value = float(low * (high / low) ** u)
    hint = typing.get_type_hints(Config).get(name, float)
    kinds = typing.get_args(hint) or (hint,)
    if int in kinds and float not in kinds:
        return round(value)
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)


def place(point: Mapping[str, Any], range_: Range, name: str) -> float:
    """Return where a point is in the range of an option, from 0 to 1 in the logarithm."""
    low, high = range_
    return math.log(point[name] / low) / math.log(high / low)


def as_options(options: Options, optimizer: Any) -> Options:
    """Return options of a method for train.py.

    For a transformation beside the table, everything but lr and the options that do not belong to an
    optimizer is an argument of its function.
    """
    if not isinstance(optimizer, str) or not is_external(optimizer):
        return options
    ours = {field.name for field in dataclasses.fields(Config)} - set(HYPERPARAMETERS)
    own = {name: value for name, value in options.items() if name not in ours}
    table = options.get("optimizer_arguments", {})
    if not isinstance(table, dict):
        raise UserError("optimizer_arguments must be a table, such as { b1 = 0.9 }")
    rest = {name: value for name, value in options.items() if name in ours}
    return {**rest, "optimizer_arguments": {**table, **own}}
