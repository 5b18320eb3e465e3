"""The number of cores that this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")  # the control groups of this process
CGROUPS = Path("/sys/fs/cgroup")  # their settings


def core_count() -> int:
    """Return the number of cores that this process may use.

    It is the number of cores in the process's CPU affinity, or the time that its control groups (cgroups v1
    and v2) allow it, in cores and rounded up, if that is less. Containers are limited by either.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min([cores, *_cgroup_limits()])))


def thread_count() -> int:
    """Return the first number in OMP_NUM_THREADS (it may be a list, "4,2"), else `core_count()`."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else core_count()


def _cgroup_limits() -> Iterator[float]:
    """Yield the limits on CPU time, in cores, of this process's control groups and of their ancestors.

    Inside a container a group's own folder may be out of sight; then its settings lie at the top.
    """
    lines: list[str] = []
    with suppress(OSError):  # not on Linux
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            top, names = CGROUPS, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            top, names = CGROUPS / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        folder = top / group.lstrip("/")
        while folder.is_relative_to(top):
            with suppress(OSError, ValueError):  # no such file; "max"
                quota, period = (int(n) for name in names for n in (folder / name).read_text().split())
                if quota > 0 and period > 0:  # -1: no limit
                    yield quota / period
            folder = folder.parent
