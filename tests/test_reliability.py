"""The campaigns of `benchmarks.reliability`: what they compare, and that their shim strikes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import __main__ as reliability
from benchmarks.reliability import crashes, elastic, races, soak
from benchmarks.reliability.forked import Command

# Five operations on a folder: open, write, fsync, close, rename.
PROGRAM = """
import ctypes, os, sys
folder, number, mode = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
shim = ctypes.CDLL(None)
shim.crash_shim_arm(os.fsencode(folder), ctypes.c_long(number), mode)
try:
    with open(folder + "/a", "wb", buffering=0) as file:
        file.write(b"0123456789")
        os.fsync(file.fileno())
    os.rename(folder + "/a", folder + "/b")
except OSError as error:
    print(error.strerror)
open(folder + "-elsewhere", "w").close()
print(shim.crash_shim_count())
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    if sys.platform != "linux" or not shutil.which("cc"):
        pytest.skip("the shim needs Linux and a C compiler")
    return crashes.compile_shim(tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize(
    ("mode", "number", "status", "printed", "files"),
    [
        (None, 1, 0, "5", {"b": 10}),
        ("kill", 1, -9, "", {}),
        ("kill", 5, -9, "", {"a": 10}),
        ("kill in a write", 2, -9, "", {"a": 5}),
        ("ENOSPC", 2, 0, "No space left on device 3", {"a": 0}),
        ("EIO", 3, 0, "Input/output error 4", {"a": 10}),
        ("EACCES", 5, 0, "Permission denied 5", {"a": 10}),
        ("EACCES", 6, 0, "5", {"b": 10}),
    ],
)
def test_the_shim_strikes_at_the_operation(shim, tmp_path, mode, number, status, printed, files):
    folder = tmp_path / "run"
    folder.mkdir()
    arguments = [str(folder), str(number), str(crashes.MODES.get(mode, 0))]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ | {"LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, " ".join(done.stdout.split())) == (status, printed), done.stderr
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == files


def write_metrics(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    lines = [
        {"split": "train", "scope": "step", "step": step, "loss": loss}
        for step, loss in enumerate(losses, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_metrics_are_compared_beyond_rounding(tmp_path):
    reference = write_metrics(tmp_path / "reference", [2.0, 1.0])
    assert elastic.differences(write_metrics(tmp_path / "same", [2.0 + 1e-14, 1.0]), reference) == []
    other = write_metrics(tmp_path / "other", [2.0, 1.0 + 1e-9])
    assert elastic.differences(other, reference) == ["train step 2: loss is 1.000000001, not 1.0"]
    shorter = write_metrics(tmp_path / "shorter", [2.0])
    assert elastic.differences(shorter, reference) == ["1 lines in metrics.jsonl, not 2"]
    assert elastic.last_step(reference) == 2
    assert elastic.last_step(tmp_path) == 0


def test_tables_count_what_was_lost():
    good = elastic.Trial("at a step", 1, 2, seconds=1.5)
    late = elastic.Trial("at the end", 0, 3, end_faults=["not all have ended"])
    text = elastic.table([good, late])
    assert "| at a step | 1 | 1 | 1.5 s | 1 |" in text
    assert text.endswith("Elastic: 1 of 2.")
    assert "| all | 2 | 1 |" in races.table([("two starts", []), ("readers beside a writer", ["a hang"])])
    tally = crashes.Tally(9, trials=3, struck=3, stopped=2, equal=2, told=0, lost=["differs"])
    assert crashes.table({("a fresh run", "kill"): tally}).endswith("| kill | 9 | 3 | 3 | 2 | 2 | 0 | 1 |")


@pytest.mark.parametrize(
    ("status", "error", "fault"),
    [
        (0, "a warning\n", False),
        (2, "train.py: error: --lr: too large\n", False),
        (2, "Traceback (most recent call last):\nValueError: x\n", True),
        (2, "", True),
        (1, "train.py: error: the disk is full\n", True),
        (-11, "", True),
    ],
)
def test_a_command_ends_with_one_line(tmp_path, status, error, fault):
    log = tmp_path / "log"
    log.write_text(error)
    assert bool(Command(["--resume"], 1, log, status).faults(0, 2)) == fault


def samples_of(steps: int, **per_step: float) -> list[soak.Sample]:
    """A sample every 10 steps; memory, files or threads grow by these numbers a step."""
    base = {"megabytes": 100.0, "files": 10.0, "threads": 4.0}
    samples = []
    for step in range(10, steps + 1, 10):
        held: dict[str, Any] = {name: base[name] + step * per_step.get(name, 0) for name in base}
        samples.append(soak.Sample(step / 100, step, **held))
    return samples


def test_a_long_run_that_grows_is_told():
    assert soak.growth(samples_of(1000), 1000) == []
    assert soak.growth(samples_of(1000, megabytes=0.001), 1000) == []
    assert soak.growth(samples_of(1000, megabytes=0.05), 1000) == ["megabytes from 118 to 144"]
    assert soak.growth(samples_of(1000, files=0.01), 1000) == ["files from 12 to 18"]
    assert soak.growth(samples_of(1000, threads=0.002), 1000)
    assert soak.growth([], 1000) == ["too few samples"]
    assert soak.step_times(samples_of(300)) == ([110, 210], [10.0, 10.0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_is_watched_from_outside(tmp_path):
    samples = soak.watch("numpy", 200, tmp_path / "run")
    assert samples[-1].step < 200
    assert all(s.files > 3 and s.threads >= 1 and s.megabytes > 10 for s in samples)
    assert (tmp_path / "run" / "report" / "index.html").exists()
    soak.draw({"numpy": samples}, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["races", "--times", "100"],
        ["crashes", "--modes", "kill", "ENOSPC", "EIO", "EACCES", "--stride", "10"],
    ],
)
def test_campaigns_lose_nothing(tmp_path, arguments):
    command = [sys.executable, "-m", "benchmarks.reliability", *arguments, "--folder", str(tmp_path)]
    subprocess.run(command, cwd=Path(reliability.__file__).parents[2], timeout=3600, check=True)
