"""Means over seeds with their uncertainty, and tests of their differences."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
ROUNDING = 1e-9  # of accuracies that differ by the same number: no spread


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


@functools.cache
def half_width(n: int) -> float:
    """Half the width of the 95 % interval of a mean of `n` values, in units of their standard deviation."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, n - 1) / math.sqrt(n))


def paired(first: Sequence[float], second: Sequence[float]) -> Summary:
    """The differences first - second of values that belong together, such as those of one seed."""
    return summarize([a - b for a, b in zip(first, second, strict=True)])


def p_value(differences: Sequence[float]) -> float:
    """Return the p-value of Student's two-sided test that the mean of paired differences is 0.

    Without spread, or with fewer than two differences, no test can be made: 1.

    Examples:
        >>> round(p_value([1.0, 2.0, 3.0]), 4)
        0.0742
        >>> p_value([0.5, 0.5])
        1.0
    """
    summary = summarize(differences)
    if not summary.sd > ROUNDING * abs(summary.mean):
        return 1.0
    from scipy.special import stdtr

    return float(2 * stdtr(summary.n - 1, -abs(summary.mean) / (summary.sd / math.sqrt(summary.n))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the order in which they were given.

    The least of m is multiplied by m, the next by m - 1, and so on; none is less than the one before, or more
    than 1. Rejecting those of at most alpha makes any false claim with a probability of at most alpha,
    however the tests depend on each other.

    Examples:
        >>> holm([0.04, 0.01, 0.03])
        [0.06, 0.03, 0.06]
    """
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
