"""Signals that ask a run to save and stop: Ctrl-C, SIGTERM, SIGHUP (lost connection), SIGUSR1 (Slurm)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
STOP_SIGNALS = tuple(number for number in signal.Signals if number.name in NAMES)


@dataclass
class StopRequest:
    """The first stop signal since `listen` began, or None."""

    signal: signal.Signals | None = None


_request = StopRequest()  # one for the process: the main thread receives signals, other threads read it


_early = StopRequest()  # a Ctrl-C under `interruptible` and before `listen`


@contextmanager
def interruptible() -> Iterator[None]:
    """Context in which no Ctrl-C is lost before `listen`, which raises it again.

    Python prints a KeyboardInterrupt that comes during a callback of the garbage collector, and goes on.
    """
    _early.signal = None
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _early.signal = None


def _interrupt(number: int, frame: Any) -> None:
    _early.signal = signal.Signals(number)
    raise KeyboardInterrupt


@contextmanager
def listen() -> Iterator[StopRequest]:
    """Turn stop signals into a request. Calls may be nested; only the main thread's installs handlers.

    A second Ctrl-C raises KeyboardInterrupt. The other signals only repeat the request: a terminal that
    closes sends SIGHUP more than once, and batch systems send SIGTERM after SIGUSR1. A signal that is ignored
    (`nohup`, `&` in a script) stays ignored.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if threading.current_thread() is not threading.main_thread() or _ask_to_stop in before.values():
        yield _request
        return
    _request.signal = None
    heard = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in heard:
        signal.signal(number, _ask_to_stop)
    try:
        if _early.signal is not None:
            raise KeyboardInterrupt
        yield _request
    finally:
        for number, old in heard.items():
            signal.signal(number, old)


def _ask_to_stop(number: int, frame: Any) -> None:
    if _request.signal is None:
        _request.signal = signal.Signals(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)


class StopSignal:
    """The stop signal of a run, and of those that train in lockstep with it: all must stop at the same step.

    Args:
        all_reduce_max: the engine's method; it returns the largest signal number of all runs. All of them
            must call it at the same step, and each call takes a moment.
        every: the number of steps between calls.
    """

    def __init__(self, all_reduce_max: Callable[[int], int], every: int) -> None:
        self.signal: signal.Signals | None = None
        self._all_reduce_max, self._every = all_reduce_max, every
        self._request = StopRequest()

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Receive signals, as the function `listen`."""
        with listen() as self._request:
            yield

    def requested(self) -> bool:
        """True if any of the runs received a stop signal."""
        if self.signal is None:
            number = self._all_reduce_max(self._request.signal or 0)
            self.signal = signal.Signals(number) if number else None
        return self.signal is not None

    def requested_at(self, step: int) -> bool:
        """True if `step` is a multiple of `every`, and any of the runs received a stop signal."""
        return step % self._every == 0 and self.requested()
