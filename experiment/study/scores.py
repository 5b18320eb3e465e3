"""How trials are scored: steps to a target, medians over studies, performance profiles, and the choice.

    steps to the target   the first validated step with the target's accuracy; infinite if there is none
    of a study            its best trial: the least steps, as a user who stops there would have needed
    of a method           the median over its studies, on one workload
    ratio                 to the best method on that workload; 1 for the best one, infinite for a miss
    profile               rho(tau): the fraction of all workloads with a ratio of at most tau

Two methods with the same steps are tied: both have the ratio 1. A workload whose target no method reaches
counts against all of them. A run that diverges has reached the target if it did so before. The rules follow
MLCommons' AlgoPerf (Dahl et al. 2023, arXiv 2306.07179); profiles are by Dolan & More 2002
(arXiv cs/0102001).
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

TAU = 4.0
"""The largest ratio that counts in `area`, as in AlgoPerf."""

Scores = Mapping[str, Mapping[str, float]]  # {workload: {method: steps}}


def steps_to_target(steps: Sequence[int], accuracies: Sequence[float | None], target: float) -> float:
    """Return the first of the steps with an accuracy of at least `target`, or infinity.

    Examples:
        >>> steps_to_target([100, 200, 300], [0.5, 0.7, 0.6], 0.7)
        200.0
        >>> steps_to_target([100, 200], [0.5, None], 0.7)
        inf
    """
    reached = (step for step, a in zip(steps, accuracies, strict=True) if a is not None and a >= target)
    return float(next(reached, math.inf))


def median_of_best(studies: Iterable[Sequence[float]]) -> float:
    """Return the median over the studies of the least steps of their trials; NaN without studies.

    With an even number of studies it is the mean of both middle ones, so infinite if one of these is.

    Examples:
        >>> median_of_best([[300.0, math.inf], [200.0, 500.0], [math.inf, math.inf]])
        300.0
    """
    best = [min(trials) for trials in studies]
    return statistics.median(best) if best else math.nan


def ratios(scores: Scores) -> dict[str, dict[str, float]]:
    """Return each method's steps over those of the best method on the workload: {workload: {method: ratio}}.

    All are infinite where no method reached the target.
    """
    result = {}
    for workload, steps in scores.items():
        best = min(steps.values(), default=math.inf)
        result[workload] = {
            method: value / best if math.isfinite(value) else math.inf for method, value in steps.items()
        }
    return result


def profile(method: str, of_all: Scores, tau: float) -> float:
    """Return rho(tau): the fraction of workloads on which a method's ratio is at most tau.

    Args:
        method: a method; a workload that has none of it counts as a miss.
        of_all: the result of `ratios`.
        tau: at least 1.
    """
    return sum(of_method.get(method, math.inf) <= tau for of_method in of_all.values()) / len(of_all)


def area(method: str, of_all: Scores, most: float = TAU) -> float:
    """Return the mean of rho(tau) over tau from 1 to `most`: 1 for a method that is the best everywhere.

    Each workload adds (most - ratio) / (most - 1), or 0 if the ratio is above `most`.
    """
    of_method = (ratio.get(method, math.inf) for ratio in of_all.values())
    return sum(max(most - ratio, 0.0) / (most - 1) for ratio in of_method) / len(of_all)


def best_point(trials: Sequence[tuple[int, float, float]]) -> int | None:
    """Return the point with the highest mean validation accuracy, or None without trials.

    Ties are broken by the loss, then by the order of the points.

    Args:
        trials: (point, accuracy, loss) after the last step; a diverged run has accuracy 0 and loss infinity.
    """
    by_point: dict[int, list[tuple[float, float]]] = {}
    for point, accuracy, loss in trials:
        by_point.setdefault(point, []).append((accuracy, loss))

    def score(point: int) -> tuple[float, float]:
        results = by_point[point]
        return (
            math.fsum(accuracy for accuracy, _ in results) / len(results),
            -math.fsum(loss for _, loss in results) / len(results),
        )

    return max(sorted(by_point), key=score, default=None)
