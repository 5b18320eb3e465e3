"""Runs of a study side by side, each in a process of its own on its share of the cores.

The steps of a small network gain little from a second core: two runs with one core each may end before two
runs one after the other on both. The processes do not hear Ctrl-C. This one does, and sends SIGTERM: each
saves its run and ends. After a second Ctrl-C it kills them, and the newest checkpoints count.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

from experiment.errors import UserError
from experiment.run import signals
from experiment.study.running import Run, StudyStoppedError, carry_out, check_signal

POLL_SECONDS = 0.1


class Job(NamedTuple):
    """A run under way: its process, where its reason to fail arrives, and when it began."""

    run: Run
    process: SpawnProcess
    reason: Connection
    began: float


def carry_out_side_by_side(
    runs: Sequence[Run], jobs: int, request: signals.StopRequest, report: Callable[[Run, float], None]
) -> None:
    """Make or continue runs, in order, at most `jobs` at a time.

    Args:
        runs: those that have not ended.
        jobs: how many run at once; each gets as many cores, at least one.
        request: a signal that came; all runs then save and stop.
        report: called with a run that has ended, and its seconds.

    Raises:
        StudyStoppedError: a signal came, or a run failed in another way than by diverging; the others are
            stopped as by a signal first.
        UserError: a run was refused, likewise.
    """
    waiting, under_way = deque(runs), dict[int, Job]()
    asked_to_stop = False
    try:
        while under_way or (waiting and request.signal is None):
            for slot in range(jobs):
                if slot not in under_way and waiting and request.signal is None:
                    under_way[slot] = _start(waiting.popleft(), slot, jobs)
            if request.signal is not None and not asked_to_stop:
                asked_to_stop = True
                _stop(under_way.values())
            for slot, job in list(under_way.items()):
                if job.process.exitcode is not None:
                    del under_way[slot]
                    _end(job, stopping=asked_to_stop, report=report)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        for job in under_way.values():
            job.process.kill()
        _wait(under_way.values())
        message = "interrupted; each run continues from its newest checkpoint"
        raise StudyStoppedError(message, 130) from None
    except BaseException:
        _stop(under_way.values())
        _wait(under_way.values())
        raise
    check_signal(request)


def _start(run: Run, slot: int, jobs: int) -> Job:
    """Start a run in a process that may use its share of the cores, and does not hear Ctrl-C."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_carry_out, args=(run, sender))
    with _inherited(slot, jobs):
        process.start()
    sender.close()
    return Job(run, process, receiver, time.monotonic())


@contextmanager
def _inherited(slot: int, jobs: int) -> Iterator[None]:
    """Context in which a process that is started inherits cores, and a mask without SIGINT."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        if cores is not None:
            os.sched_setaffinity(0, share(sorted(cores), slot, jobs))
        yield
    finally:
        if cores is not None:
            os.sched_setaffinity(0, cores)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def share(cores: Sequence[int], slot: int, jobs: int) -> Sequence[int]:
    """Return the cores of one of `jobs` slots; with fewer cores than slots some share one.

    Examples:
        >>> share([0, 1, 2, 3], 1, 2), share([0, 1], 2, 3)
        ([2, 3], [0])
    """
    each = len(cores) // jobs
    return cores[slot * each : (slot + 1) * each] if each else [cores[slot % len(cores)]]


def _carry_out(run: Run, reason: Connection) -> None:
    """Make or continue a run, in the process of its own; send (status, line) if it did not end."""
    try:
        carry_out(run)
    except StudyStoppedError as stopped:
        reason.send((stopped.status, str(stopped)))
        sys.exit(stopped.status)
    except UserError as error:
        reason.send((2, str(error)))
        sys.exit(2)


def _end(job: Job, *, stopping: bool, report: Callable[[Run, float], None]) -> None:
    """Report a run whose process has ended. Raises if it failed, and not because all are stopping."""
    job.process.join()
    if job.process.exitcode == 0:
        report(job.run, time.monotonic() - job.began)
        return
    status, line = 1, f"{job.run.label}: its process ended with status {job.process.exitcode}"
    with suppress(EOFError):
        status, line = job.reason.recv()
    if status == 2:
        raise UserError(line)
    if not stopping:
        raise StudyStoppedError(line, status)


def _stop(jobs: Iterable[Job]) -> None:
    """Ask processes to save their runs and to end."""
    for job in jobs:
        job.process.terminate()


def _wait(jobs: Iterable[Job]) -> None:
    for job in jobs:
        job.process.join()
