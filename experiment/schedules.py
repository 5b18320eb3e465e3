"""Learning-rate schedules: pure functions of the step, in Python floats, the same for every engine."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

Schedule = Callable[[int], float]


def constant(lr: float) -> Schedule:
    """lr at every step."""
    return lambda step: lr


def cosine(lr: float, length: int) -> Schedule:
    """Half a cosine from lr at step 0 to 0 at step `length`, and 0 after.

    Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5.
    """
    return lambda step: lr * 0.5 * (1.0 + math.cos(math.pi * min(step / max(length, 1), 1.0)))


def multistep(lr: float, milestones: Sequence[int], factor: float) -> Schedule:
    """lr times factor for each milestone reached (He et al. 2015, section 4.2)."""
    return lambda step: lr * factor ** bisect.bisect_right(milestones, step)


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """The first `steps` steps rise linearly to the schedule's value there; step s takes (s + 1) / (steps +
    1) of it.

    Goyal et al. 2017, arXiv 1706.02677, section 2.2. The schedule's own clock does not wait for the warm-up.
    """
    return lambda step: schedule(step) if step >= steps else schedule(steps) * (step + 1) / (steps + 1)


def make_schedule(
    name: str,
    lr: float,
    *,
    length: int,
    milestones: Sequence[int] = (),
    factor: float = 0.1,
    warmup_steps: int = 0,
) -> Schedule:
    """The schedule of a run: the learning rate as a function of the step, which counts from 0."""
    schedules = {
        "constant": lambda: constant(lr),
        "cosine": lambda: cosine(lr, length),
        "multistep": lambda: multistep(lr, milestones, factor),
    }
    return warmup(schedules[name](), warmup_steps)
