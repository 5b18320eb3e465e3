"""How long a run takes: all of it, its training steps, and the compilation before them."""

import dataclasses
import threading
import time
from collections.abc import Mapping
from typing import Any

from experiment.processes import processor_seconds


@dataclasses.dataclass
class Clock:
    """Seconds of all sessions. Training counts neither compilation nor evaluation nor checkpoints.

    `processor_seconds` is None where it is not known: runs that train together share a process, and older
    checkpoints do not record it.
    """

    wall_seconds: float = 0.0
    processor_seconds: float | None = 0.0
    compile_seconds: float = 0.0
    train_seconds: float = 0.0
    train_steps: int = 0


class Timer:
    """The clock of a run while it goes on.

    Steps are timed in intervals: `resume` begins one, `count_step` counts a step, `pause` ends the interval.

    Args:
        saved: the clock of the checkpoint that the run continues from; empty for a fresh run.
    """

    def __init__(self, saved: Mapping[str, Any]) -> None:
        self._clock = Clock(**{"processor_seconds": None, **saved} if saved else {})
        if threading.current_thread() is not threading.main_thread():  # other runs share this process
            self._clock.processor_seconds = None
        self._begun = time.monotonic() - self._clock.wall_seconds
        self._processor_begun = processor_seconds() - (self._clock.processor_seconds or 0.0)
        self._interval_begun = time.monotonic()
        self._interval_steps = 0
        self._first_seconds: float | None = None
        self._compiling = True

    @property
    def awaits_first_step(self) -> bool:
        """True until `first_step` is called."""
        return self._first_seconds is None

    def first_step(self) -> float:
        """Return the seconds that the first step of this session took, compilation included."""
        self._first_seconds = time.monotonic() - self._interval_begun
        return self._first_seconds

    def resume(self) -> None:
        """Begin an interval."""
        self._interval_begun, self._interval_steps = time.monotonic(), 0

    def count_step(self) -> None:
        """Count a step, unless it is of the engine's first call, which compiles."""
        if not self._compiling:
            self._interval_steps += 1

    def end_call(self) -> None:
        """Note that a call of the compiled step has returned: all later steps are measured."""
        self._compiling = False

    def pause(self) -> None:
        """End the interval."""
        seconds = time.monotonic() - self._interval_begun
        self._clock.train_seconds += seconds
        self._clock.train_steps += self._interval_steps
        if self._interval_steps and self._first_seconds:
            self._clock.compile_seconds += max(self._first_seconds - seconds / self._interval_steps, 0.0)
            self._first_seconds = 0.0

    def images_per_second(self, batch_size: int) -> float:
        """Training images a second, without compilation, evaluation and checkpoints; 0 if unknown."""
        clock = self._clock
        return clock.train_steps * batch_size / clock.train_seconds if clock.train_seconds else 0.0

    def now(self) -> Clock:
        """Return the clock as it stands."""
        known = self._clock.processor_seconds is not None
        return dataclasses.replace(
            self._clock,
            wall_seconds=time.monotonic() - self._begun,
            processor_seconds=processor_seconds() - self._processor_begun if known else None,
        )
