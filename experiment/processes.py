"""Several processes that train one network, each with the devices of its host: JAX's own runtime joins them.

    JAX_COORDINATOR_ADDRESS=host0:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 python train.py --distributed ...

Each process runs the same command. All take the same steps in the same order and make the same decisions (on
a non-finite step, a better validation, a signal). Only the first one writes files.
"""

import multiprocessing
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.errors import UserError, one_line

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


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


def connect() -> ProcessInfo:
    """Wait for the other processes; they are found by `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, or by the variables of Slurm, Open MPI or Kubernetes.

    Must come before anything that asks JAX for its devices.

    Raises:
        UserError: the variables are incomplete or no numbers, or the processes cannot be joined.
    """
    given = {name: os.environ.get(name, "") for name in (COORDINATOR, COUNT, INDEX)}
    known: dict[str, Any] = {}
    if any(given.values()):
        if missing := [name for name, value in given.items() if not value]:
            raise UserError(f"--distributed: {' and '.join(missing)} must be set too, or none of the three")
        address, count, index = given.values()
        try:
            known = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
        except ValueError:
            raise UserError(
                f"--distributed: {COUNT} {count} and {INDEX} {index} must be whole numbers"
            ) from None
        if ":" not in address:
            raise UserError(f"--distributed: {COORDINATOR} {address} has no port; write HOST:PORT")
        if not 0 <= int(index) < int(count):
            fault = f"{INDEX} {index} is out of range"
            raise UserError(f"--distributed: {fault}; count the {count} processes from 0")
    import jax

    # On a CPU, two compiled functions at once would mix up their messages: they have no name.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(**known)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--distributed: the processes were not joined ({one_line(error)}); "
            f"set {COORDINATOR}, {COUNT} and {INDEX}"
        ) from None
    return ProcessInfo(jax.process_index(), jax.process_count())


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
