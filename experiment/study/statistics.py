"""Means over seeds with their uncertainty."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """A sample: its size, mean, standard deviation, and half the width of the mean's 95 % interval.

    With fewer than two values neither deviation nor interval is known: NaN.
    """

    n: int
    mean: float
    sd: float
    half_width: float


def summarize(values: Sequence[float]) -> Summary:
    """Student's interval of the mean: mean +- t_(0.975, n-1) sd / sqrt(n)."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return Summary(n, mean, math.nan, math.nan)
    sd = float(np.std(values, ddof=1))
    return Summary(n, mean, sd, float(half_width(n) * sd))


def half_width(n: int) -> float:
    """Half the width of the 95 % interval of a mean of `n` values, in units of their standard deviation."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, n - 1) / math.sqrt(n))


def paired(first: Sequence[float], second: Sequence[float]) -> Summary:
    """The differences first - second of values that belong together, such as those of one seed."""
    return summarize([a - b for a, b in zip(first, second, strict=True)])
