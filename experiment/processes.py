"""Several processes that train one network, each with the devices of its host: JAX's own runtime joins them.

    JAX_COORDINATOR_ADDRESS=host0:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 python train.py --distributed ...

Each process runs the same command. All take the same steps in the same order and make the same decisions (on
a non-finite step, a better validation, a signal). Only the first one writes files. They watch each other, and
end together if one is lost: see `peers`.
"""

import atexit
import ctypes
import multiprocessing
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from experiment.connections import Address
from experiment.errors import UserError, one_line
from experiment.peers import JOIN_SECONDS, PATIENCE_SECONDS, Peers, end_process

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BIND, JOIN = "JAX_COORDINATOR_BIND_ADDRESS", "THREEWAY_JOIN_SECONDS"


@dataclass(frozen=True)
class ProcessInfo:
    """This process, `index` of `count`."""

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """True for the process that writes the files and talks to the user."""
        return self.index == 0

    def rows(self, size: int) -> slice:
        """The part of a batch of `size`, a multiple of `count`, that this process reads."""
        share = size // self.count
        return slice(self.index * share, (self.index + 1) * share)


SINGLE_PROCESS = ProcessInfo()

_peers: Peers | None = None  # the other processes, of a process that has some


def meet() -> Peers:
    """Begin to watch the other processes, found by `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, or by the variables of Slurm, Open MPI or Kubernetes.

    Returns at once: the others may start later, by 40 s or `THREEWAY_JOIN_SECONDS`.

    Raises:
        UserError: the variables are incomplete or no numbers, or process 0 cannot listen at its port.
    """
    global _peers
    address, count, index = _given() or _detected()
    bind = os.environ.get(BIND)
    seconds = os.environ.get(JOIN, "")
    if seconds and not seconds.isdecimal():
        raise UserError(f"--distributed: {JOIN} {seconds} is no whole number of seconds; correct it")
    _peers = Peers(
        address,
        index,
        count,
        bind=None if bind is None else _split(BIND, bind),
        join_seconds=int(seconds or JOIN_SECONDS),
    )
    return _peers


def connect(peers: Peers | None = None) -> ProcessInfo:
    """Wait until JAX has joined all processes.

    Must come before anything that asks JAX for its devices.

    Args:
        peers: the other processes, which are met here if they have not been before.

    Raises:
        UserError: as `meet`, or the processes cannot be joined.
    """
    peers = peers or meet()
    import jax

    delay_abort()
    atexit.register(_leave_after_failure)  # handlers run in reverse order: this one before JAX's
    # On a CPU, two compiled functions at once would mix up their messages: they have no name.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            peers.service, peers.count, peers.index, coordinator_bind_address=peers.service
        )
    except (RuntimeError, ValueError) as error:
        peers.fail(PATIENCE_SECONDS)
        raise UserError(
            f"--distributed: the processes were not joined ({one_line(error)}); "
            f"set {COORDINATOR}, {COUNT} and {INDEX}"
        ) from None
    process = ProcessInfo(jax.process_index(), jax.process_count())
    peers.joined()
    return process


def delay_abort() -> None:
    """Have an abort of this process wait for six seconds, in which `peers` reports what came before it.

    When a process is lost, a thread of C++ may abort another one: gloo, XLA's collective operations on a CPU,
    gets a message that it does not expect. The signal's handler is the C library's own `sleep`, which may be
    called there. Its argument is the number of the signal, 6.
    """
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def fail(patience: float = 0.0) -> None:
    """Announce to the other processes, if there are any, that this one fails: see `Peers.fail`."""
    if _peers is not None:
        _peers.fail(patience)


def done() -> None:
    """Announce to the other processes, if there are any, that this one has come to the end of the run."""
    if _peers is not None:
        _peers.done()


def leave(status: int) -> None:
    """End this process at once with an exit status, if it is one of several and has failed; else return.

    At the usual exit JAX waits, for minutes, until all processes leave.
    """
    if _peers is not None and _peers.ended != "done":
        _peers.fail()
        end_process(status)


def _leave_after_failure() -> None:  # an exception that nobody caught
    if _peers is not None and _peers.ended == "failed":
        end_process(1)


@atexit.register  # before JAX is imported and registers its handler, so that it runs after that
def _part() -> None:
    if _peers is not None:
        _peers.part()


def _given() -> tuple[Address, int, int] | None:
    """The address of process 0, the number of processes and the index of this one, by JAX's variables."""
    given = {name: os.environ.get(name, "") for name in (COORDINATOR, COUNT, INDEX)}
    if not any(given.values()):
        return None
    if missing := [name for name, value in given.items() if not value]:
        raise UserError(f"--distributed: {' and '.join(missing)} must be set too, or none of the three")
    address, count, index = given.values()
    if not count.isdecimal() or not index.isdecimal():
        raise UserError(f"--distributed: {COUNT} {count} and {INDEX} {index} must be whole numbers")
    if not int(index) < int(count):
        fault = f"{INDEX} {index} is out of range"
        raise UserError(f"--distributed: {fault}; count the {count} processes from 0")
    return _split(COORDINATOR, address), int(count), int(index)


def _detected() -> tuple[Address, int, int]:
    """The same, as JAX finds them under Slurm, Open MPI or Kubernetes."""
    from jax._src.clusters import ClusterEnv  # jax.distributed.initialize calls it, and shows no result

    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 300)
    address, count, index, _ = found
    if address is None or count is None or index is None:
        raise UserError(f"--distributed: found no other processes; set {COORDINATOR}, {COUNT} and {INDEX}")
    return _split("the coordinator's address", address), count, index


def _split(name: str, address: str) -> Address:
    """Host and port of HOST:PORT or [HOST]:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--distributed: {name} {address} has no port; write HOST:PORT")
    return host.strip("[]"), int(port)


def processor_seconds() -> float:
    """Processor time of this process and of those that it started: all threads, user and system.

    A process that still runs is read from /proc; on a system without /proc it counts once it has ended.
    """
    running = 0.0
    for process in multiprocessing.active_children():  # joins those that have ended: then os.times has them
        with suppress(OSError):
            fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            ticks = int(fields[11]) + int(fields[12])  # proc(5): utime, stime
            running += ticks / os.sysconf("SC_CLK_TCK")
    return sum(os.times()[:4]) + running
