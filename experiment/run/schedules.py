"""Learning-rate schedules: pure functions of the step, in Python floats, the same for every engine.

`plateau` and early stopping look at the run's validations too: a list of (step, loss) that grows as the run
goes on. The rate of a step depends on the validations up to it and on nothing else, so that a resumed
run, which reads them back, goes on as if it had never stopped.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Schedule = Callable[[int], float]
Validations = Iterable[tuple[int, float]]
"""The step, and the loss on the validation part after so many steps; in order."""

THRESHOLD = 1e-4  # PyTorch's: for plateau, a loss is better if it is below the best by this fraction of it
SMALLEST_CHANGE = 1e-8  # PyTorch's `eps`: plateau leaves the rate where it is if it would fall by less


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


def plateau(lr: float, validations: Validations, *, patience: int, factor: float, cooldown: int) -> Schedule:
    """lr times factor for each plateau of the validation loss, as PyTorch's ReduceLROnPlateau.

    More than `patience` validations in a row whose loss is not below the best so far times (1 - THRESHOLD)
    are a plateau; the `cooldown` validations after one do not count. The rate of step s, which counts from 0,
    follows from the validations made after s steps and before. `validations` may grow between calls.
    """

    def rate(step: int) -> float:
        value, best, bad, cooling = lr, math.inf, 0, 0
        for after, loss in validations:
            if after > step:
                break
            better = loss < best * (1 - THRESHOLD)  # never so for NaN
            best, bad = (loss, 0) if better else (best, bad + 1)
            if cooling:
                cooling, bad = cooling - 1, 0
            if bad > patience:
                cooling, bad = cooldown, 0
                value = value * factor if value - value * factor > SMALLEST_CHANGE else value
        return value

    return rate


def has_converged(validations: Validations, patience: int | None) -> bool:
    """Early stopping: True if none of the last `patience` validations lowered the best loss.

    False if `patience` is None.
    """
    if patience is None:
        return False
    losses = [loss if math.isfinite(loss) else math.inf for _, loss in validations]
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """Rise linearly: at step s < steps the rate is schedule(steps) * (s + 1) / (steps + 1).

    Goyal et al. 2017, arXiv 1706.02677, section 2.2. The schedule itself counts the warm-up steps, too.
    """
    return lambda step: schedule(step) if step >= steps else schedule(steps) * (step + 1) / (steps + 1)


def make_schedule(
    name: str,
    lr: float,
    *,
    length: int,
    milestones: Sequence[int] = (),
    factor: float = 0.1,
    patience: int = 10,
    cooldown: int = 0,
    validations: Validations = (),
    warmup_steps: int = 0,
) -> Schedule:
    """The schedule of a run: the learning rate as a function of the step, which counts from 0.

    Args:
        name: "constant", "cosine", "multistep" or "plateau".
        lr: the rate it starts from, after the warm-up.
        length: cosine: the steps until it is 0.
        milestones: multistep: the steps at which the rate is multiplied by `factor`.
        factor: multistep, plateau.
        patience, cooldown: plateau: in validations.
        validations: plateau: those of the run; the caller adds to them as they are made.
        warmup_steps: the linear rise before it.

    Raises:
        KeyError: the name is unknown.
    """
    schedules = {
        "constant": lambda: constant(lr),
        "cosine": lambda: cosine(lr, length),
        "multistep": lambda: multistep(lr, milestones, factor),
        "plateau": lambda: plateau(lr, validations, patience=patience, factor=factor, cooldown=cooldown),
    }
    return warmup(schedules[name](), warmup_steps)


class ValidationHistory:
    """(step, loss) of the validations at multiples of `eval_every`, in order. The trainer adds to it.

    If a run is given more steps later, the validation after its former last step may lie between multiples of
    eval_every. It is ignored: it must not change the rest.
    """

    def __init__(self, eval_every: int) -> None:
        self._eval_every = eval_every
        self._losses: list[tuple[int, float]] = []

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(self._losses)

    def add(self, step: int, loss: float) -> None:
        """Add the validation after `step`."""
        if step % self._eval_every == 0:
            self._losses.append((step, loss))

    def restore(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add the validations among the lines of metrics.jsonl."""
        for line in lines:
            if line["split"] == "val":
                self.add(line["step"], math.nan if line["loss"] is None else line["loss"])
