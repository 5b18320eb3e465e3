"""One of several processes is killed with SIGKILL; the others end; fewer go on.

Each trial starts `python train.py --distributed` in four processes on this machine and kills one of them at a
random moment. The others must end within a minute, each with exit status 1 and one line that names the lost
process and the newest whole checkpoint. Then one, two or three processes go on. Their metrics must be those
of a run that nothing disturbed, to rounding in float64: the same examples in the same order.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiment.files.checkpoints import Checkpoints
from tests.helpers.jax_engine import FLOAT64_DEVICES

ROOT = Path(__file__).resolve().parents[2]
COUNT = 4
LIMIT_SECONDS = 60.0  # for the others to end
RUN_SECONDS = 600.0  # for a run to its last step: a hang becomes a failure
STEPS, SAVE_EVERY = 40, 10
# The batch is a multiple of 1, 2, 3 and 4 devices.
FLAGS = (
    *("--model", "cnn", "--dataset", "synthetic", "--train-subset", "0.1", "--batch-size", "12"),
    *("--precision", "float64", "--steps", str(STEPS), "--checkpoint-every", str(SAVE_EVERY)),
    *("--eval-every", "20", "--log-every", "2", "--no-report"),
)
MOMENTS = ("while starting", "before the first step", "at a step", "during a save", "at the end")


@dataclass
class Group:
    """Processes of one run, which find each other.

    Attributes:
        processes: in the order of their index.
        logs: by index, the files with what each prints on stderr.
    """

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]

    def stderr(self, index: int) -> list[str]:
        """The lines that a process has printed on stderr."""
        return self.logs[index].read_text(errors="replace").splitlines()

    def wait(self, indices: Sequence[int], seconds: float) -> float | None:
        """Wait until some processes have ended; return after how many seconds, or None if one has not."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            if all(self.processes[index].poll() is not None for index in indices):
                return time.monotonic() - begun
            time.sleep(0.02)
        return None

    def left_over(self) -> list[int]:
        """The process ids of those whose own children still run some seconds after they ended."""
        deadline = time.monotonic() + 5
        groups = [process.pid for process in self.processes]
        while (groups := [pid for pid in groups if _exists(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return groups

    def kill(self) -> None:
        """End all that is left."""
        for process in self.processes:
            if _exists(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _exists(group: int) -> bool:
    """True if a process of a process group runs; one that has ended and was not waited for does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state not in "ZX":
            return True
    return False


def start(arguments: Sequence[str], count: int, logs: Path, name: str, **variables: str) -> Group:
    """Start `train.py` in `count` processes of one CPU device each; one alone is not distributed.

    Args:
        arguments: its flags.
        count: the number of processes.
        logs: the folder for what they print.
        name: begins the names of those files.
        variables: further environment variables.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | variables
    shared = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    command = [sys.executable, "train.py", *(["--distributed"] if count > 1 else []), *arguments]
    group = Group([], [])
    for index in range(count):
        log = logs / f"{name}-{index}.err"
        own = shared | {"JAX_PROCESS_ID": str(index)} if count > 1 else {}
        with open(log, "wb") as err, open(logs / f"{name}-{index}.out", "wb") as out:
            group.processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment | own, stdout=out, stderr=err, start_new_session=True
                )
            )
        group.logs.append(log)
    return group


def faults_at_the_end(group: Group, lost: int, run_dir: Path) -> list[str]:
    """Return what is wrong with how the others ended after one process was lost; empty if nothing is."""
    newest = Checkpoints(run_dir / "checkpoints", 1, writes=False).newest_verified()
    faults = []
    for index, process in enumerate(group.processes):
        if index == lost:
            continue
        errors = [line for line in group.stderr(index) if line.startswith("train.py: ")]
        if process.returncode != 1:
            last = "; ".join(group.stderr(index)[-3:])
            faults.append(f"process {index} ended with status {process.returncode}: {last}")
        elif len(errors) != 1:
            faults.append(f"process {index} printed {len(errors)} lines: {errors}")
        elif f"process {lost} of {len(group.processes)}" not in errors[0]:
            faults.append(f"process {index} names another one: {errors[0]}")
        elif f"newest whole checkpoint: {newest};" not in errors[0] and newest is not None:
            faults.append(f"process {index} does not name checkpoint {newest}: {errors[0]}")
    return faults


def differences(run_dir: Path, reference: Path) -> list[str]:
    """Return how metrics.jsonl of a run differs from that of a reference, beyond rounding in float64."""
    lines, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run_dir, reference)
    )
    if len(lines) != len(expected):
        return [f"{len(lines)} lines in metrics.jsonl, not {len(expected)}"]
    found = []
    for line, wanted in zip(lines, expected, strict=True):
        where = f"{wanted['split']} {wanted['scope']} {wanted['step']}"
        if line.keys() != wanted.keys():
            found.append(f"{where}: other entries")
        else:
            found += [
                f"{where}: {name} is {line[name]}, not {value}"
                for name, value in wanted.items()
                if not _close(line[name], value)
            ]
    return found


def _close(value: Any, expected: Any) -> bool:
    if isinstance(value, float) and isinstance(expected, float):
        return math.isclose(value, expected, rel_tol=FLOAT64_DEVICES, abs_tol=FLOAT64_DEVICES)
    return bool(value == expected)


def last_step(run_dir: Path) -> int:
    """Return the step of the last whole line of metrics.jsonl, or 0."""
    path = run_dir / "metrics.jsonl"
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines(keepends=True)[-2:]
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)


def due(moment: str, run_dir: Path, rng: random.Random) -> tuple[Callable[[], bool], float]:
    """Return when a kill is due, and how many seconds later it strikes."""
    begun, log, step = time.monotonic(), run_dir / "log.txt", rng.randint(2, STEPS - 2)
    save = SAVE_EVERY * rng.randint(1, STEPS // SAVE_EVERY)
    match moment:
        case "while starting":
            wait = rng.uniform(0, 8)
            return (lambda: time.monotonic() - begun >= wait), 0.0
        case "before the first step":
            return (lambda: log.exists() and "compiling" in log.read_text()), rng.uniform(0, 0.5)
        case "at a step":
            return (lambda: last_step(run_dir) >= step), rng.uniform(0, 0.2)
        case "during a save":
            partial = run_dir / "checkpoints" / f"{save}.incomplete"
            return partial.exists, rng.uniform(0, 2)
        case "at the end":
            return (lambda: last_step(run_dir) >= STEPS), rng.uniform(0, 2)
    raise ValueError(moment)


def strike(group: Group, lost: int, moment: str, run_dir: Path, rng: random.Random) -> bool:
    """Kill a process at a moment; return False if one of them had ended before."""
    is_due, delay = due(moment, run_dir, rng)
    deadline = time.monotonic() + RUN_SECONDS
    while not is_due() and time.monotonic() < deadline:
        if any(process.poll() is not None for process in group.processes):
            return False
        time.sleep(0.005)
    time.sleep(delay)
    running = all(process.poll() is None for process in group.processes)
    group.processes[lost].kill()
    return running


@dataclass
class Trial:
    """What came of one kill.

    Attributes:
        moment: of the kill.
        lost: the index of the process that was killed.
        left: how many processes went on.
        seconds: until the others had ended; None if one had not.
        line: the last line that one of them printed.
        end_faults: what was wrong with their end.
        faults: what was wrong with the run that went on.
    """

    moment: str
    lost: int
    left: int
    seconds: float | None = None
    line: str = ""
    end_faults: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def attempt(trial: Trial, folder: Path, reference: Path, rng: random.Random, **variables: str) -> bool:
    """Make one trial in an empty folder; return False if the kill came too late."""
    run_dir = folder / "run"
    group = start([*FLAGS, "--run-dir", str(run_dir)], COUNT, folder, "first", **variables)
    others = [index for index in range(COUNT) if index != trial.lost]
    try:
        if not strike(group, trial.lost, trial.moment, run_dir, rng):
            return False
        trial.seconds = group.wait(others, LIMIT_SECONDS)
        if trial.seconds is None:
            trial.end_faults.append(f"not all have ended within {LIMIT_SECONDS:.0f} s")
        else:
            if all(group.processes[index].returncode == 0 for index in others):
                return False  # the run was done
            trial.end_faults += faults_at_the_end(group, trial.lost, run_dir)
            if group.left_over():
                trial.end_faults.append("processes that they had started still run")
        trial.line = next((line for line in group.stderr(others[0]) if "train.py: " in line), "")
    finally:
        group.kill()
    begun = (run_dir / "config.json").exists()
    arguments = [*(["--resume"] if begun else FLAGS), "--run-dir", str(run_dir)]
    group = start(arguments, trial.left, folder, "second", **variables)
    try:
        group.wait(range(trial.left), RUN_SECONDS)
        for index, process in enumerate(group.processes):
            if process.poll() != 0:
                last = "; ".join(group.stderr(index)[-3:])
                trial.faults.append(f"resumed process {index} ended with {process.poll()}: {last}")
    finally:
        group.kill()
    if not trial.faults:
        trial.faults += differences(run_dir, reference)[:3]
    return True


def table(trials: Sequence[Trial]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| killed | trials | ended right | slowest end | went on right |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in (*MOMENTS, "all"):
        some = [trial for trial in trials if name in (trial.moment, "all")]
        ended = sum(not trial.end_faults for trial in some)
        right = sum(not trial.faults for trial in some)
        slowest = max((trial.seconds or math.inf for trial in some), default=0.0)
        lines.append(f"| {name} | {len(some)} | {ended} | {slowest:.1f} s | {right} |")
    good = sum(not trial.end_faults and not trial.faults for trial in trials)
    return "\n".join([*lines, "", f"Elastic: {good} of {len(trials)}."])


def run(times: int, seed: int, folder: Path) -> bool:
    """Make trials in a folder and print them; return True if nothing was lost."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    reference = folder / "reference"
    group = start([*FLAGS, "--run-dir", str(reference)], COUNT, folder, "reference", **cache)
    group.wait(range(COUNT), RUN_SECONDS)
    if any(process.poll() != 0 for process in group.processes):
        group.kill()
        raise RuntimeError(f"the undisturbed run failed: {group.stderr(0)[-3:]}")
    trials: list[Trial] = []
    for number in range(times):
        rng = random.Random(f"{seed} {number}")
        moment = MOMENTS[number % len(MOMENTS)]
        for _ in range(10):
            trial = Trial(moment, rng.randrange(COUNT), rng.randint(1, COUNT - 1))
            place = folder / str(number)
            place.mkdir()
            struck = attempt(trial, place, reference, rng, **cache)
            if struck:
                break
            shutil.rmtree(place)
        else:
            raise RuntimeError(f"no kill struck {moment}")
        trials.append(trial)
        words = re.sub(r"^train.py: error: the run failed: |; continue with.*", "", trial.line)
        faults = "; ".join([*trial.end_faults, *trial.faults]) or "nothing lost"
        ended = "not ended" if trial.seconds is None else f"ended after {trial.seconds:.1f} s"
        print(f"{number}, {moment}, {trial.left} go on: {ended}: {words}: {faults}", flush=True)
        if not (trial.end_faults or trial.faults):
            shutil.rmtree(place)
    print(f"\n{table(trials)}", flush=True)
    return not any(trial.end_faults or trial.faults for trial in trials)
