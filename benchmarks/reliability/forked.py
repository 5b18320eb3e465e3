"""Commands in forked processes of one that has imported everything: a trial takes a second, not five.

The NumPy engine with one thread starts no threads before the fork, and none of the imports does.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

LIMIT_SECONDS = 120.0  # for one command: a hang becomes a failure
MODULES = (
    *("experiment.run.session", "experiment.commands.train", "experiment.__main__", "numpy_ref.engine"),
    *("orbax.checkpoint", "sklearn.datasets", "filelock", "safetensors.numpy", "tqdm"),
)
FLAGS = (
    *("--framework", "numpy", "--model", "cnn", "--train-subset", "0.1", "--batch-size", "16"),
    *("--schedule", "constant", "--warmup-steps", "0", "--no-report"),
)
RESULTS = ("weights.safetensors", "weights-best.safetensors")


def preload(*more: str) -> None:
    """Import what the commands import. One thread: so that a fork has all of the process."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    for name in (*MODULES, *more):
        importlib.import_module(name)
    importlib.import_module("orbax.checkpoint").v1  # noqa: B018 - imports it


@dataclass
class Command:
    """A command in a process of its own.

    Attributes:
        arguments: as after `python train.py`, or after `python -m experiment`.
        pid: of its process, which leads a process group.
        log: the file with what it prints on stderr.
        status: its exit status, or minus the number of a signal; None while it runs.
    """

    arguments: Sequence[str]
    pid: int
    log: Path
    status: int | None = None

    def runs(self) -> bool:
        """True until it has ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is None

    def wait(self) -> int | None:
        """Wait for its end; return the status, or None if it had to be killed."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while self.runs():
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.status = -signal.SIGALRM
                return None
            time.sleep(0.002)
        return self.status

    def faults(self, *statuses: int) -> list[str]:
        """Return what is wrong with its end, once it has ended: another status, a traceback, many lines."""
        error = self.log.read_text(errors="replace")
        lines = [line for line in error.splitlines() if line.strip()]
        what = " ".join(self.arguments)
        if self.status == -signal.SIGALRM:
            return [f"{what}: did not end within {LIMIT_SECONDS:.0f} s"]
        if self.status not in statuses:
            return [f"{what}: status {self.status}: {' | '.join(lines[-3:])}"]
        if self.status and (len(lines) != 1 or "error: " not in lines[0]):
            return [f"{what}: {len(lines)} lines with status {self.status}: {' | '.join(lines[-3:])}"]
        return []


def launch(
    arguments: Sequence[str],
    log: Path,
    *,
    module: str = "experiment.commands.train",
    setup: Callable[[], Any] = lambda: None,
) -> Command:
    """Start a command in a fork of this process.

    Args:
        arguments: its flags.
        log: the file for what it prints on stderr; stdout goes to a file beside it.
        module: has its `main`.
        setup: called in the new process before it.
    """
    pid = os.fork()
    if pid:
        return Command(arguments, pid, log)
    status = 1
    try:
        os.setsid()
        for number, path in ((1, log.with_suffix(".out")), (2, log)):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
            os.close(file)
        sys.argv = ["train.py" if module.endswith(".train") else "experiment/__main__.py"]
        main = importlib.import_module(module).main
        setup()
        status = main(list(arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def same_results(run_dir: Path, reference: Path) -> list[str]:
    """Return the files in which a run differs from a reference by a bit."""
    wrong = []
    if not (run_dir / "summary.json").exists():
        wrong.append("summary.json is missing")
    for name in ("metrics.jsonl", *RESULTS):
        try:
            if name.endswith(".jsonl"):
                same = (run_dir / name).read_bytes() == (reference / name).read_bytes()
            else:
                found, wanted = load_file(run_dir / name), load_file(reference / name)
                same = found.keys() == wanted.keys() and all(
                    found[key].dtype == wanted[key].dtype and found[key].tobytes() == wanted[key].tobytes()
                    for key in wanted
                )
        except Exception as error:
            wrong.append(f"{name}: {error}")
        else:
            if not same:
                wrong.append(f"{name} differs")
    summaries = [run_dir / "summary.json", reference / "summary.json"]
    if all(path.exists() for path in summaries):
        one, other = (json.loads(path.read_text()) for path in summaries)
        wrong += [f"summary.json: {name}" for name in ("steps", "test", "best") if one[name] != other[name]]
    return wrong
