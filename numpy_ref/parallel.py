"""Data parallelism: a batch split between processes that compute as one.

NumPy runs on one core but for its matrix products, and Python's lock makes threads wait for each other at
every array operation. Processes do not wait. Each takes a part of the batch through the same network;
together they compute the same as one, but for rounding:

- batch norm's sums are added up over all parts (`all_reduce`), so its statistics are those of the batch; with
  groups each part has whole ones, and the sums are those of the running statistics alone;
- the gradient of a parameter is the sum of the parts' gradients; each process adds up and updates its share
  of the parameters, which lie in shared memory.

`jax_resnet` leaves this to XLA by sharding its batches over a mesh.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Semaphore
from typing import Any

import numpy as np

from numpy_ref.layers import Array

MAX_SUMS = 1 << 16  # numbers that one `all_reduce` can add up
_SPINS = 20_000  # tries before a wait goes to sleep: a few milliseconds
_spawn = multiprocessing.get_context("spawn")
# Signals that a terminal or batch system sends to a whole group of processes. The parent handles them.
_FOR_THE_PARENT = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]
NOT_STARTED = (
    "a process of the NumPy engine could not start. Each imports the script again: it must be a file, not "
    'standard input, and what it runs must stand under `if __name__ == "__main__":`; or use one process '
    "(processes=1, OMP_NUM_THREADS=1)"
)


class SharedMemory:
    """Zeroed memory that processes share. Each of them takes the same arrays from it in the same order."""

    def __init__(self, size: int) -> None:
        self._raw = _spawn.RawArray(ctypes.c_byte, size)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Take the next array."""
        array = np.ndarray(shape, dtype, memoryview(self._raw).cast("B"), self._used)
        self._used += aligned(array.nbytes)
        return array

    def __getstate__(self) -> dict[str, Any]:
        return {"_raw": self._raw, "_used": 0}


def aligned(size: int) -> int:
    """The bytes that an array of `size` bytes takes up, in whole cache lines."""
    return -(-size // 64) * 64


def board_size(processes: int) -> int:
    """Bytes of shared memory that the communicators of the processes need."""
    return 2 * processes * MAX_SUMS * 8


class Communicator:
    """One process of several that compute as one.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        active: how many of them, from rank 0, take part in the current step.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, memory: SharedMemory | None = None, posts: Any = None
    ) -> None:
        self.rank, self.size, self.active = rank, size, size
        self._posts: Sequence[Sequence[Semaphore]] = posts  # [from][to]
        self._turn = 0
        if memory is not None:
            self._sums = memory.empty((2, size, MAX_SUMS), np.dtype(np.float64))

    def begin(self, active: int) -> None:
        """Begin a step in which only the first `active` processes take part."""
        self.active, self._turn = active, 0

    def all_reduce(self, values: Array) -> Array:
        """Add up over all active processes, in the order of their ranks: float64, the same bits in each.

        Two buffers alternate, so that no process overwrites one before all have read it.
        """
        values = np.asarray(values, np.float64)
        if self.active == 1:
            return values
        self._turn = 1 - self._turn
        board = self._sums[self._turn, : self.active, : values.size]
        board[self.rank] = values.reshape(-1)
        for other in self._others():
            self._posts[self.rank][other].release()
        for other in self._others():
            post = self._posts[other][self.rank]
            if not any(post.acquire(block=False) for _ in range(_SPINS)):
                while not post.acquire(timeout=1):
                    _end_with_parent()
        return np.asarray(board.sum(0).reshape(values.shape))

    def wait(self) -> None:
        """Return when every active process has called this."""
        self.all_reduce(np.empty(0))

    def _others(self) -> Iterator[int]:
        return (rank for rank in range(self.active) if rank != self.rank)


def _end_with_parent() -> None:
    """End this process if its parent is gone, which may have sent a step to only some of its processes."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)


def split(count: int, parts: int) -> list[slice]:
    """Even slices of range(count), the longer ones first."""
    bounds = [math.ceil(count * part / parts) for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


Worker = Callable[[str, tuple[Any, ...]], Any]
MakeWorker = Callable[[Communicator, SharedMemory], Worker]


class Group:
    """Processes that each run a worker, a function that `make(communicator, memory)` makes in the process.

    A worker takes the name of a step and its arguments; its result is sent back. The processes end with
    `close()`, or when nothing refers to the group any more.
    """

    def __init__(self, size: int, memory: SharedMemory, make: MakeWorker) -> None:
        # A process that still imports the script cannot start others. `multiprocessing` checks this, too,
        # but only after the semaphores below are made, and these would be leaked.
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError(NOT_STARTED)
        # A process opens semaphores by name as it starts, so they must last as long as the group. To create
        # the first one starts multiprocessing's resource tracker, the process that cleans up after all.
        with _signals_blocked():
            self._posts = posts = [[_spawn.Semaphore(0) for _ in range(size)] for _ in range(size)]
        self._ends: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._starting, self._owner = set(range(size)), os.getpid()
        with _one_thread_each(), _signals_blocked():
            for rank in range(size):
                ours, theirs = _spawn.Pipe()
                process = _spawn.Process(
                    target=_serve, args=(theirs, make, rank, size, memory, posts), daemon=True
                )
                process.start()
                theirs.close()
                self._ends.append(ours)
                self._processes.append(process)
        self.close = weakref.finalize(self, _end, self._owner, self._processes, self._ends)

    def call(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call worker r with `name` and arguments[r], all at the same time. Returns the results.

        Raises the exception of a worker, ChildProcessError if a process has died, RuntimeError if one could
        not start; the group cannot be used any more then. Raises RuntimeError, too, in the child of a fork:
        the processes are those of its parent.
        """
        if os.getpid() != self._owner:
            raise RuntimeError("the NumPy engine's processes are the parent's: after a fork make a new state")
        ends = self._ends[: len(arguments)]
        try:
            for end, arguments_of_one in zip(ends, arguments, strict=True):
                end.send((name, len(arguments), arguments_of_one))
            pending, results = dict(enumerate(ends)), {}
            while pending:
                for ready in wait(list(pending.values())):
                    rank = next(r for r, end in pending.items() if end is ready)
                    error, results[rank] = pending[rank].recv()
                    if error is not None:
                        raise error
                    if rank in self._starting:  # the first message: it is ready
                        self._starting.remove(rank)
                    else:
                        del pending[rank]
        except (EOFError, OSError) as error:
            death = self._death()
            self.close()
            if not self._starting.isdisjoint(range(len(arguments))):
                raise RuntimeError(NOT_STARTED) from error
            raise ChildProcessError(death) from error
        except BaseException:
            self.close()
            raise
        return [results[rank] for rank in range(len(arguments))]

    def _death(self) -> str:
        """Describe which process has died, and why."""
        dead = wait([process.sentinel for process in self._processes], timeout=10)
        for rank, process in enumerate(self._processes, 1):
            if process.sentinel in dead:
                process.join(10)
                code = process.exitcode or 0
                cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
                cause += " (out of memory?)" if code == -signal.SIGKILL else ""
                which = f"process {rank} of {len(self._processes)}"
                return f"{which} of the NumPy engine (pid {process.pid}) {cause}"
        return "a process of the NumPy engine does not answer"


def _end(owner: int, processes: Sequence[BaseProcess], ends: Sequence[Connection]) -> None:
    for process in processes if os.getpid() == owner else ():  # not in the child of a fork
        process.kill()  # it has nothing to save
    for end in ends:
        end.close()


def _serve(
    end: Connection,
    make: MakeWorker,
    rank: int,
    size: int,
    memory: SharedMemory,
    posts: Sequence[Sequence[Semaphore]],
) -> None:
    """Run the worker of a process until its parent ends. The first message means that it is ready."""
    for number in _FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    communicator = Communicator(rank, size, memory, posts)
    try:
        worker = make(communicator, memory)
    except Exception as error:
        end.send((error, None))
        return
    end.send((None, None))
    while True:
        try:
            name, active, arguments = end.recv()
        except EOFError:
            return
        communicator.begin(active)
        try:
            end.send((None, worker(name, arguments)))
        except Exception as error:
            end.send((error, None))


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Context in which new processes start with these signals blocked; they then ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Context in which new processes start with one thread for matrix products."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before: Mapping[str, str | None] = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
