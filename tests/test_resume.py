"""Stopping and going on, as a user meets it: `python train.py`, a signal, `python train.py --resume`.

The promise: whatever stops a run, and however often, its numbers end up as if nothing had, to the last bit. Each
test here starts real processes and compares what they leave on the disk with a run that was never stopped.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiment.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
STEPS = 200
LIMIT_SECONDS = 600  # of one process: a hang becomes a failure

# train.py, but its resnet20 has three blocks, one a stage, and a quarter of the width.
THIN = (
    "import functools, sys, train\n"
    "from jax_resnet import resnet\n"
    "resnet.MODELS['resnet20'] = functools.partial(resnet.resnet_cifar, 1, width=4)\n"
    "sys.exit(train.main())\n"
)
SMALL = ("--train-subset", "0.2", "--batch-size", "8", "--checkpoint-every", "7")
ADAM = ("--model", "cnn", "--optimizer", "adam", "--steps", str(STEPS), "--eval-every", "50", *SMALL)
ADABOUND = ("--model", "resnet20", "--optimizer", "adabound", "--steps", "60", "--eval-every", "15", *SMALL)


class Run:
    """One run folder, and the command that is started on it again and again.

    Args:
        run_dir: the folder; what the processes print is collected beside it.
        flags: of the first start; a resumed run finds them in config.json.
        cache: where the compiled programs are kept.
        thin: whether resnet20 is the thin one.
    """

    def __init__(self, run_dir: Path, flags: tuple[str, ...], cache: Path, *, thin: bool = True) -> None:
        self.run_dir, self.flags, self.cache = run_dir, flags, cache
        self.command = [sys.executable, *(("-c", THIN) if thin else ("train.py",))]

    def start(self, *extra: str, file_size: int | None = None) -> subprocess.Popen[str]:
        """Start as a user would: with --resume once there is a config.json. `file_size` stands for a full disk."""
        resumes = (self.run_dir / "config.json").exists()
        flags = ("--resume", *extra) if resumes else (*self.flags, *extra)
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_size, file_size))
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return subprocess.Popen(
            [*self.command, *flags, "--run-dir", str(self.run_dir)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=None if file_size is None else limit,
        )

    def go(self, *extra: str, status: int = 0, file_size: int | None = None) -> subprocess.CompletedProcess[str]:
        """Start, wait for the end, and check the exit status."""
        return ended(self.start(*extra, file_size=file_size), status)

    def copy(self, run_dir: Path, *, newest: int | None = None) -> Run:
        """A copy of the folder, and of the moment at which `newest` was its newest checkpoint."""
        shutil.copytree(self.run_dir, run_dir)
        for step in self.steps():
            if newest is not None and step > newest:
                shutil.rmtree(run_dir / "checkpoints" / str(step))
                (run_dir / "summary.json").unlink(missing_ok=True)
        copy = Run(run_dir, self.flags, self.cache)
        copy.command = self.command
        return copy

    def steps(self) -> list[int]:
        """The complete checkpoints."""
        return Checkpoints(self.run_dir / "checkpoints", 1).steps()

    def lines(self) -> list[dict]:
        """The whole lines of metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        content = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]

    def trained(self) -> int:
        """The last step in metrics.jsonl."""
        return max((line["step"] for line in self.lines()), default=0)

    def saving(self) -> bool:
        """Whether a checkpoint lies half written: newer ones only, as old ones are renamed to be deleted."""
        partial = [int(path.name.split(".")[0]) for path in self.run_dir.glob("checkpoints/*.incomplete")]
        return max(partial, default=0) > max(self.steps(), default=0)


def ended(process: subprocess.Popen[str], status: int | None) -> subprocess.CompletedProcess[str]:
    """Wait for a process to end, check its status, and give what it printed."""
    try:
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        process.kill()
    if status is not None:
        assert process.returncode == status, f"exit status {process.returncode}, not {status}\n{out}{err}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
    """Wait until `condition` holds; False if the process ended before it did."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the process neither ended nor came to the moment that was waited for"
        time.sleep(0.0005)
    return True


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, np.asarray(value)


def expect_same_arrays(what: str, actual: dict, expected: dict) -> None:
    """Fail unless two trees have the same names, shapes, types and bits."""
    found, wanted = dict(leaves(actual)), dict(leaves(expected))
    assert sorted(found) == sorted(wanted), f"{what}: the names differ"
    for name, array in wanted.items():
        other = found[name]
        assert (other.shape, other.dtype) == (array.shape, array.dtype), f"{what}: {name}"
        if bits(other) != bits(array):
            where = tuple(int(i) for i in np.argwhere(other != array)[0]) if (other != array).any() else "a sign"
            count = (other != array).sum()
            pytest.fail(f"{what}: {name} differs in {count} of {array.size} elements, first at {where}")


def expect_same_lines(actual: list, expected: list) -> None:
    for number, (found, wanted) in enumerate(itertools.zip_longest(actual, expected), start=1):
        assert found == wanted, f"metrics.jsonl, line {number}: {found}\nnot {wanted}"


def expect_same(run: Run, reference: Run) -> None:
    """Fail unless everything a finished run left is, to the last bit, what the reference left."""
    here, there = run.run_dir, reference.run_dir
    expect_same_lines(
        (here / "metrics.jsonl").read_bytes().splitlines(keepends=True),
        (there / "metrics.jsonl").read_bytes().splitlines(keepends=True),
    )
    for name in ("weights.safetensors", "weights-best.safetensors"):
        assert (here / name).exists() == (there / name).exists(), name
        if (there / name).exists():
            expect_same_arrays(name, load_file(here / name), load_file(there / name))
    expect_same_checkpoint(run, reference)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (here, there)]
    for name in ("model", "optimizer", "parameters", "steps", "epochs", "test", "best"):
        assert summaries[0][name] == summaries[1][name], f"summary.json: {name}"
    left = [path.name for path in here.rglob("*") if path.name.endswith((".tmp", ".incomplete"))]
    assert not left, f"left behind: {left}"


def expect_same_checkpoint(run: Run, reference: Run) -> None:
    step = reference.steps()[-1]
    assert run.steps()[-1] == step
    loaded = [Checkpoints(each.run_dir / "checkpoints", 1).load(step) for each in (run, reference)]
    (tree, mine), (expected, theirs) = loaded
    assert set(expected) >= {"params", "batch_stats", "optimizer", "step"}
    expect_same_arrays(f"checkpoint {step}", tree, expected)
    mine.pop("clock")  # seconds
    theirs.pop("clock")
    assert mine == theirs


# The moments of a kill: when it is due, and, looked at afterwards, whether it struck there.
Check = Callable[[Run], bool]
MOMENTS: dict[str, tuple[Check, Check]] = {
    "before config.json": (
        lambda run: (run.run_dir / ".lock").exists(),
        lambda run: not (run.run_dir / "config.json").exists(),
    ),
    "before the first checkpoint": (
        lambda run: (run.run_dir / "config.json").exists(),
        lambda run: not run.steps() and (run.run_dir / "config.json").exists(),
    ),
    "during a save": (Run.saving, Run.saving),
    "after the first step of the rest": (lambda run: False, lambda run: bool(run.steps())),
}


def kill_at(run: Run, moment: str, rng: random.Random) -> bool:
    """Start the run and SIGKILL it at a moment; returns whether it struck there. The run may end first."""
    before, last = run.trained(), int(run.flags[run.flags.index("--steps") + 1])
    newest, size = max(run.steps(), default=0), (run.run_dir / "metrics.jsonl")
    grown = size.stat().st_size if size.exists() else 0
    target = rng.randint(newest + 1, last - 1) if newest < last - 1 else last
    delay = 0.0
    match moment:
        case "before config.json":
            due = lambda: (run.run_dir / ".lock").exists()
            hit = lambda: not (run.run_dir / "config.json").exists()
        case _:
            raise NotImplementedError
    process = run.start()
    if wait_for(process, due):
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    return ended(process, None).returncode == -signal.SIGKILL and hit()
