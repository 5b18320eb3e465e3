"""A process beside the training one that computes one thing at a time, with low priority."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from experiment.errors import named_line
from experiment.files.arrays import end_with_parent
from experiment.run.signals import STOP_SIGNALS

# One thread, on a CPU: it must not take the cores, or the accelerator, of training.
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PJRT_NPROC"), "1"),
    "JAX_PLATFORMS": "cpu",
}
LOWEST_PRIORITY = 19

_spawn = multiprocessing.get_context("spawn")


class SecondProcessError(Exception):
    """The process has ended, or its function has failed; the message says how."""


class SecondProcess:
    """A process that answers one request at a time.

    Requests and answers go through a thread, so that the caller waits for neither.

    Args:
        make: called once in the process, with low priority; returns the function from a request to its
            answer. It must be picklable, as requests and answers must.
    """

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._end, theirs = _spawn.Pipe()
        self._process = _spawn.Process(target=_serve, args=(theirs, make), daemon=True)
        resource_tracker.ensure_running()  # its start unblocks signals
        with _environment(), _signals_blocked():
            self._process.start()
        theirs.close()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="second-process")
        self._answer: Future[Any] | None = None

    @property
    def is_idle(self) -> bool:
        """True if no request is without its answer, or has an answer that nobody took."""
        return self._answer is None

    def ask(self, request: Any) -> None:
        """Send a request; only while `is_idle`. Nobody may change its arrays afterwards."""
        assert self._answer is None
        self._answer = self._executor.submit(self._exchange, request)

    def take(self) -> Any:
        """Return the answer to the last request, once; None if there is none, or not yet.

        Raises SecondProcessError if the process has ended or its function failed.
        """
        if self._answer is None or not self._answer.done():
            return None
        answer, self._answer = self._answer, None
        return answer.result()

    def close(self) -> None:
        """End the process; a request that is without an answer is lost."""
        self._process.kill()
        self._executor.shutdown()
        self._process.join()
        self._end.close()

    def _exchange(self, request: Any) -> Any:
        try:
            _send(self._end, request)
            fault, answer = self._end.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise SecondProcessError(f"it has ended with status {self._process.exitcode}") from None
        if fault:
            raise SecondProcessError(fault)
        return answer


def _serve(end: Connection, make: Callable[[], Callable[[Any], Any]]) -> None:
    """Answer requests until the other end is closed."""
    for number in STOP_SIGNALS:  # a terminal sends them to the whole group; the training process handles them
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(LOWEST_PRIORITY)
    answer = None
    with suppress(EOFError, BrokenPipeError):
        while True:
            request = _receive(end)
            try:
                answer = answer or make()
                reply = "", answer(request)
            except Exception as error:
                reply = named_line(error), None
            end.send(reply)


def _send(end: Connection, request: Any) -> None:
    """Send a request. Fields of a dataclass that map names to arrays follow it, from memory into the pipe: no
    copy of them is made in between."""
    values = vars(request) if dataclasses.is_dataclass(request) else {}
    named = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    arrays = {name: _contiguous(part) for name, part in named.items()}
    kinds = {name: {key: (x.shape, x.dtype) for key, x in part.items()} for name, part in arrays.items()}
    if kinds:
        request = dataclasses.replace(request, **kinds)
    end.send((request, list(kinds)))
    for array in (array for part in arrays.values() for array in part.values() if array.nbytes):
        end.send_bytes(array.reshape(-1).view(np.uint8).data)


def _contiguous(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(array, order="C") for name, array in arrays.items()}


def _receive(end: Connection) -> Any:
    """Return what `_send` sent."""
    request, names = end.recv()
    kinds = {name: getattr(request, name) for name in names}
    arrays = {name: {key: np.empty(*kind) for key, kind in part.items()} for name, part in kinds.items()}
    for array in (array for part in arrays.values() for array in part.values() if array.nbytes):
        end.recv_bytes_into(array.reshape(-1).view(np.uint8).data)
    return dataclasses.replace(request, **arrays) if arrays else request


@contextmanager
def _environment() -> Iterator[None]:
    """Context in which a new process starts with `ENVIRONMENT`."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Context in which a new process starts with the stop signals blocked, until it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
