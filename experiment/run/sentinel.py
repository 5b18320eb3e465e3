"""The sentinel: every N steps, is the step that a device computed the right one? `--verify-every N`.

Such a step is checked in three ways:

1. The step is taken once more in this process, from the same state and batch: bit for bit the same?
2. The other engine takes it in a process of its own, while training goes on: the same but for rounding? Where
   it is not, float64 decides; see `verifier.py`.
3. The checksums of the state after the step and before the next one: has memory changed meanwhile?

A difference stops the run. What the sentinel does changes no number of the run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np

from experiment.engines import Batch, Engine
from experiment.errors import UserError, WrongStepError
from experiment.files.checkpoints import Checkpoints
from experiment.run.outcome import resume_command
from experiment.run.second_process import SecondProcessError
from experiment.run.step_tensors import Arrays, checksums, place, step_tensors
from experiment.run.verifier import Request, Verdict, is_compared

POLL_SECONDS = 0.05


class Second(Protocol):
    """What computes steps beside training, one at a time: `SecondProcess`."""

    @property
    def is_idle(self) -> bool:
        """True if it can be asked."""

    def ask(self, request: Request) -> None:
        """Begin to compare a step."""

    def take(self) -> Verdict | None:
        """Return the verdict on the last request, once; None if there is none, or not yet."""

    def close(self) -> None:
        """End it."""


@dataclass
class _Taken:
    """One computation of a step.

    Attributes:
        state: after it.
        metrics: of it.
        sums: checksums of both.
    """

    state: Any
    metrics: Mapping[str, Any]
    sums: Mapping[str, int]


@dataclass
class _Asked:
    """The step that the second engine compares: what recomputing it here needs."""

    request: Request
    batch: Batch
    sums: Mapping[str, int]


@dataclass
class Counts:
    """How many steps were verified, and how."""

    here: int = 0
    by_second: int = 0
    by_float64: int = 0
    busy: int = 0


class Sentinel:
    """Verifies the steps of a run whose number is a multiple of `every`.

    Args:
        engine: the run's.
        every: N.
        start_step: the step at which this session begins. What it found is taken to be right.
        second: compares steps with the other engine's; None for none.
        second_name: of the other engine.
        checkpoints: those of the run; the last one that is verified is protected.
        report: gets lines for the user.
        read: returns the batch of a step with its images; for an engine that holds the images.
    """

    def __init__(
        self,
        engine: Engine,
        every: int,
        *,
        start_step: int = 0,
        second: Second | None,
        second_name: str,
        checkpoints: Checkpoints,
        report: Callable[[str], None],
        read: Callable[[int], Batch] | None = None,
    ) -> None:
        self._engine, self._every, self._start_step = engine, every, start_step
        self._second, self._second_name = second, second_name
        self._checkpoints, self._report, self._read = checkpoints, report, read
        self._batches: dict[int, Batch] = {}
        self._before: Arrays | None = None  # the state before the next step, if that is to be verified
        self._resting: tuple[int, Mapping[str, int]] | None = None
        self._asked: _Asked | None = None
        self._passed: int | None = None
        self.counts = Counts()
        checkpoints.verified_step = start_step or -1

    def is_due(self, step: int) -> bool:
        """True if a step is to be verified; steps count from 1."""
        return step % self._every == 0

    def needs_state(self, step: int) -> bool:
        """True if the sentinel needs the state after a step: of one to be verified, and of the one before."""
        return self.is_due(step) or self.is_due(step + 1)

    def watch(self, batches: Iterator[Batch], start_step: int) -> Iterator[Batch]:
        """Yield the batches of the steps after `start_step`, and remember those of steps to be verified."""
        for step, batch in enumerate(batches, start_step + 1):
            if self.is_due(step):
                self._batches[step] = batch
            yield batch

    def before_next(self, step: int, state: Any) -> None:
        """Look at the state between `step` and the next step.

        Raises WrongStepError if it has changed since `step`.
        """
        if self._resting is not None:
            verified, sums = self._resting
            self._resting = None
            now = checksums(self._engine.arrays(state))
            if changed := [name for name in now if sums[name] != now[name]]:
                self._passed = None
                self._fail(
                    f"{_first(changed)} changed in memory after step {verified}, when nothing writes it"
                )
        if self._passed is not None:
            self._checkpoints.verified_step = self._passed
        self._before = _copies(self._engine.arrays(state)) if self.is_due(step + 1) else None

    def after(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """Verify a step, if it is due, after which the engine has yielded `state` and `metrics`.

        Raises WrongStepError if this or an earlier step was computed wrongly.
        """
        self._collect(state)
        if not self.is_due(step):
            return
        batch, before = self._batches.pop(step), self._before
        assert before is not None  # `needs_state`
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        arrays, sums = _copies(self._engine.arrays(state)), self._sums(state, metrics)
        rate = self._engine.learning_rate(step - 1)
        request = Request(step, rate, before, arrays, loss, grad_norm, batch)
        again = self._take_again(before, batch, state)
        if again.sums != sums:
            self._explain_difference(request, batch, sums, again)
        self._resting = step, sums
        self.counts.here += 1
        if self._second is None:
            self._passed = step
        elif self._second.is_idle:
            self._ask(request, sums)
        else:
            self.counts.busy += 1

    def _ask(self, request: Request, sums: Mapping[str, int]) -> None:
        """Let the second engine compare a step."""
        images = request.batch
        try:
            if self._read is not None:
                images = self._read(request.step)
        except (OSError, UserError) as error:
            self._go_on_alone(f"the images of step {request.step} could not be read again ({error})")
            return
        assert self._second is not None
        self._asked = _Asked(request, request.batch, sums)
        self._second.ask(dataclasses.replace(request, batch=images))

    def _go_on_alone(self, why: str) -> None:
        """Report why, and verify without the second process from here on."""
        self._report(f"{why}: from here on, steps are verified in this process alone")
        self.close()
        self._second = None

    def finish(self, state: Any, stopped: Callable[[], bool]) -> None:
        """Wait for the last verdict, or until `stopped`; report how many steps were verified, and by what.

        Raises WrongStepError if that step was computed wrongly.
        """
        self._collect(state)
        if self._second is not None and not self._second.is_idle:
            self._report(f"waiting for the {self._second_name} engine to compare the last verified step")
        while self._second is not None and not self._second.is_idle and not stopped():
            time.sleep(POLL_SECONDS)
            self._collect(state)
        if self.counts.here:
            self._report(self._summary())

    def _summary(self) -> str:
        counts = self.counts
        line = f"verified {counts.here} steps: each computed again in this process"
        if counts.by_second or counts.busy:
            line += f", {counts.by_second} by the {self._second_name} engine ({counts.by_float64} in float64)"
        if counts.busy:
            line += f", which was busy at {counts.busy}"
        return line

    def close(self) -> None:
        """End the second process."""
        if self._second is not None:
            self._second.close()

    def _collect(self, state: Any) -> None:
        """Take the verdict on the step that the second engine compares, if there is one."""
        if self._second is None:
            return
        try:
            verdict = self._second.take()
        except SecondProcessError as error:
            self._go_on_alone(f"the process of the {self._second_name} engine failed ({error})")
            return
        if verdict is None:
            return
        self.counts.by_second += 1
        self.counts.by_float64 += verdict.by_float64
        if verdict.wrong:
            self._explain_verdict(verdict, state)
        self._passed = self._checkpoints.verified_step = verdict.step

    def _take_again(self, before: Arrays, batch: Batch, state: Any) -> _Taken:
        """Take a step from given arrays; the memory of `state` may be used for it."""
        start = self._engine.from_arrays(before, reuse=state)
        after, metrics = next(iter(self._engine.train(start, [batch])))
        return _Taken(after, metrics, self._sums(after, metrics))

    def _sums(self, state: Any, metrics: Mapping[str, Any]) -> dict[str, int]:
        """Checksums of a state and of the numbers of the step before it."""
        numbers = {name: np.asarray(metrics[name]) for name in ("logits", "loss", "grad_norm")}
        return {**checksums(numbers), **checksums(self._engine.arrays(state))}

    def _explain_difference(
        self, first: Request, batch: Batch, sums: Mapping[str, int], again: _Taken
    ) -> NoReturn:
        """Raise WrongStepError: a step and its repetition differ. A third one shows which is right."""
        numbers = float(again.metrics["loss"]), float(again.metrics["grad_norm"])
        second = step_tensors(_copies(self._engine.arrays(again.state)), *numbers)
        third = self._take_again(first.before, batch, again.state)
        if third.sums == again.sums:
            kind = "transient: twice more, the step has the same other result"
        elif third.sums == sums:
            kind = "transient, in the repetition: a third time, the result is that of training"
        else:
            kind = "permanent: three times, the step has three results"
        others = step_tensors(first.after, first.loss, first.grad_norm)
        name, error, _ = name_first(second, others, dict.fromkeys(second, 0.0))
        changed = [key for key in sums if sums[key] != again.sums[key]]
        if name not in changed:  # one that is not compared, or bits alone such as those of 0 and -0
            name, error = next((key for key in second if key in changed), changed[0]), 0.0
        by = f"by {error:.1e} of its largest magnitude" if error else "in some bits"
        what = f"{_words(name)} has another result when computed again, {by}"
        self._fail(f"step {first.step} was computed wrongly: {what}; the fault is {kind}")

    def _explain_verdict(self, verdict: Verdict, state: Any) -> NoReturn:
        """Raise WrongStepError: float64 agrees with the other engine."""
        assert self._asked is not None
        asked = self._asked
        third = self._take_again(asked.request.before, asked.batch, state)
        kind = "permanent: computed again, the step has the same wrong result"
        if third.sums != asked.sums:
            kind = "transient: computed now, the step has another result"
        distance = f"off by {verdict.error:.1e} of its largest magnitude, where {verdict.noise:.1e} is noise"
        right = "the optimizer's rule in float64 gives another"
        if is_compared(verdict.wrong):
            right = f"float64 agrees with the {self._second_name} engine"
        what = f"{_words(verdict.wrong)} is {distance}; {right}"
        self._fail(f"step {verdict.step} was computed wrongly: {what}; the fault is {kind}")

    def _fail(self, what: str) -> NoReturn:
        """Raise WrongStepError, which names the last verified checkpoint and how to go on from it."""
        checkpoints = self._checkpoints
        with suppress(OSError):  # reported when the run ends
            checkpoints.wait()
        limit = checkpoints.verified_step
        good = [saved for saved in checkpoints.verified() if limit is not None and saved <= limit]
        later = ", ".join(str(saved) for saved in checkpoints.steps() if not good or saved > good[-1])
        which = "last verified checkpoint"
        if good and good[-1] <= self._start_step:
            which = "newest checkpoint from before this session"
        how = f"the {which} is {good[-1]}" if good else "no checkpoint was verified"
        if good:
            removing = f"remove the later ones ({later}) from {checkpoints.directory}, then " if later else ""
            resume = resume_command(checkpoints.directory.parent)
            how += f": {removing}continue on another device with {resume}"
        else:
            how += ": start the run again, on another device"
        raise WrongStepError(f"{what}; {how}")


def name_first(right: Arrays, others: Arrays, allowed: Mapping[str, float]) -> tuple[str, float, float]:
    """Return the first of `right` from which `others` departs, its error, and what was allowed.

    Errors are relative to the largest magnitude of the right tensor; `right` is in the order of computation.
    """
    import parity

    first = parity.compare_tensors(right, {name: others[name] for name in right}, allowed).first_difference
    if first is None:  # bits alone differ, such as those of 0 and -0
        return next(iter(right)), 0.0, 0.0
    return first.reference, first.error, first.noise


def _copies(arrays: Arrays) -> dict[str, Any]:
    return {name: np.array(array) for name, array in arrays.items()}


def _first(changed: list[str]) -> str:
    others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return f"{changed[0]}{others}"


def _words(name: str) -> str:
    """A tensor and where in a step it is computed."""
    return f"{name} ({place(name)})"
