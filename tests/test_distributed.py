"""Two processes, joined by JAX's runtime on this machine, against one."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reliability import elastic
from experiment.commands import train
from experiment.errors import UserError
from experiment.processes import ProcessInfo, connect
from tests.helpers.comparing import assert_all_close, assert_close
from tests.helpers.jax_engine import FLOAT64_DEVICES, flat, make_batches, make_engine, train_in_groups
from tests.helpers.jax_engine import train as take_steps
from tests.helpers.runs import Run

ROOT = Path(__file__).parents[1]
FLOAT32_FIRST_STEPS = 1e-5  # later float32 steps part by chaos
FLOAT64_GROUPS = 1e-12  # four steps, as on several devices: tests/test_batch_norm_groups.py
CNN = ["--model", "cnn", "--dataset", "synthetic", "--train-subset", "0.1", "--batch-size", "16"]
CNN += ["--precision", "float64"]
STEPS = ["--schedule-steps", "24", "--eval-every", "5", "--checkpoint-every", "6"]


def start(command: list[str], devices: int = 1, count: int = 2) -> list[subprocess.Popen[str]]:
    """The same command in `count` processes of `devices` devices each, which find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    shared = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ
            | shared
            | {"JAX_PROCESS_ID": str(index), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each says on stdout, once all have come to a good end."""
    said = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=600)
            assert process.returncode == 0, f"{out}\n{err}"
            said.append(out)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return said


def test_two_processes_train_as_one_the_first_writes_and_one_goes_on(tmp_path):
    flags = ["--distributed", *CNN, *STEPS, "--steps", "20", "--run-dir"]
    processes = start(["train.py", *flags, str(tmp_path / "two")])
    assert train.main([*CNN, *STEPS, "--steps", "24", "--no-report", "--run-dir", str(tmp_path / "one")]) == 0
    said = finish(processes)
    assert re.search(r"2 x cpu \(cpu\) in 2 processes, \d+ threads? each;", said[0])
    assert not [line for line in said[1].splitlines() if not line.startswith("[Gloo]")]  # XLA's own
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    files = {path.name for path in one.folder.iterdir()}
    assert {path.name for path in two.folder.iterdir()} == files | {"report", "tensorboard"}
    assert two.checkpoints == [12, 18, 20]
    assert train.main(["--resume", "--steps", "24", "--no-report", "--run-dir", str(two.folder)]) == 0
    train_one, train_two = ([line["loss"] for line in run.lines("train", "step")] for run in (one, two))
    assert_close("losses", train_two, train_one, FLOAT64_DEVICES)
    assert_all_close("weights", two.weights(), one.weights(), FLOAT64_DEVICES)


def test_a_killed_process_ends_the_other_which_goes_on_alone(tmp_path):
    """One kill; `python -m benchmarks.reliability elastic` makes thirty, of four processes."""
    flags = [*CNN, "--steps", "24", "--eval-every", "12", "--checkpoint-every", "6", "--log-every", "2"]
    flags += ["--no-report", "--run-dir"]
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    group = elastic.start([*flags, str(run_dir)], 2, tmp_path, "log")
    try:
        while elastic.last_step(run_dir) < 7:
            assert all(process.poll() is None for process in group.processes), group.stderr(0)
            time.sleep(0.01)
        group.processes[1].kill()
        assert group.wait([0], elastic.LIMIT_SECONDS) is not None
        assert elastic.faults_at_the_end(group, 1, run_dir) == []
        assert group.left_over() == []
    finally:
        group.kill()
    (line,) = [line for line in group.stderr(0) if line.startswith("train.py: ")]
    last = (run_dir / "log.txt").read_text().splitlines()[-1]
    assert line.removeprefix("train.py: error: ") in last
    assert re.search(rf"process 1 of 2 \(pid {group.processes[1].pid} on .*\) was lost at step \d+; ", line)
    assert train.main([*flags, str(whole)]) == 0
    assert train.main(["--resume", "--run-dir", str(run_dir)]) == 0
    assert elastic.differences(run_dir, whole) == []


@pytest.mark.slow
def test_thirty_kills_lose_nothing(tmp_path):
    assert elastic.run(times=30, seed=0, folder=tmp_path)


def train_in_processes(place: ProcessInfo, precision: str) -> dict[str, np.ndarray]:
    """20 steps of a thin ResNet from each process's rows, halfway through a tree and back; the losses, the
    tree, the logits of 5 images."""
    engine = make_engine(precision=precision)
    rows = [{k: v[place.rows(8)] for k, v in batch.items()} for batch in make_batches(20)]
    state, metrics = take_steps(engine, engine.init(), rows[:10])
    state, more = take_steps(engine, engine.from_tree(engine.to_tree(state)), rows[10:])
    metrics += more
    (logits,) = engine.evaluate(state, make_batches(1, size=5, seed=1))
    found = np.array([step["loss"] for step in metrics])
    assert all(len(step["label"]) == len(step["logits"]) == 8 for step in metrics)
    return {"losses": found, "logits": logits, **flat(engine.to_tree(state))}


IN_PROCESSES = """
import sys, numpy
from experiment.processes import connect
place = connect()
from tests.test_distributed import train_in_processes
for precision in ("float64", "float32"):
    numpy.savez(f"{sys.argv[1]}/{precision}-{place.index}.npz", **train_in_processes(place, precision))
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_processes_see_the_batch_norm_of_the_whole_batch(tmp_path, devices):
    """Batch norm sees 8 images, of which each process reads 4."""
    processes = start(["-c", IN_PROCESSES, str(tmp_path)], devices)
    one = {precision: train_in_processes(ProcessInfo(), precision) for precision in ("float64", "float32")}
    finish(processes)
    for index in range(2):
        found = dict(np.load(tmp_path / f"float64-{index}.npz"))
        assert_all_close(f"process {index}", found, one["float64"], FLOAT64_DEVICES)
        single = np.load(tmp_path / f"float32-{index}.npz")["losses"]
        assert_close("float32", single[:3], one["float32"]["losses"][:3], FLOAT32_FIRST_STEPS)


IN_GROUPS = """
import sys, numpy
from experiment.processes import connect
place = connect()
from tests.helpers.jax_engine import make_engine, train_in_groups
numpy.savez(f"{sys.argv[1]}/{place.index}.npz", **train_in_groups(make_engine, place.rows))
"""


def test_two_processes_compute_groups_as_one(tmp_path):
    """The last groups have images of both."""
    processes = start(["-c", IN_GROUPS, str(tmp_path)])
    one = train_in_groups(make_engine)
    finish(processes)
    for index in range(2):
        found = dict(np.load(tmp_path / f"{index}.npz"))
        assert_all_close(f"process {index}", found, one, FLOAT64_GROUPS)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES must be set"),
        (("localhost:1", "two", "0"), "whole numbers"),
        (("localhost:1", "2", "2"), "out of range"),
        (("localhost", "2", "0"), "no port"),
    ],
)
def test_processes_that_cannot_find_each_other_are_refused(monkeypatch, variables, words):
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = variables if isinstance(variables, dict) else dict(zip(names, variables, strict=True))
    for name in names:
        monkeypatch.setenv(name, given.get(name, ""))
    with pytest.raises(UserError, match=words):
        connect()


def test_rows_of_the_processes_are_the_batch():
    rows = [list(range(12))[ProcessInfo(index, 3).rows(12)] for index in range(3)]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
