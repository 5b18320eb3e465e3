"""`python train.py` as a user mistypes it: status 2, one line that names the flag, no file touched."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import experiment.data.loading
import torch_oracle
from experiment.commands import train
from experiment.files.checkpoints import Checkpoints

ROOT = Path(__file__).parents[1]
TINY = ["--model", "cnn", "--dataset", "digits", "--steps", "3", "--no-report"]
RESUME = ["--resume", "--run-dir", "run"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of three steps, to be copied."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert train.main([*TINY, "--checkpoint-every", "2", "--run-dir", str(run_dir)]) == 0
    return run_dir


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory: empty, but for a home."""
    directory = tmp_path / "work"
    (directory / "home").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(directory / "home"))
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def run_dir(finished, here) -> Path:
    """A copy of the finished run, at `run` in the working directory."""
    return Path(shutil.copytree(finished, here / "run"))


def listing(directory):
    """Everything below a directory, with what would change if it were written to."""
    found = {}
    for path in [directory, *sorted(directory.rglob("*"))]:
        status = path.stat()
        content = path.read_bytes() if path.is_file() else None
        # A lock is taken by opening its file, which may touch it, never by what is in it.
        time = None if path.name == ".lock" else status.st_mtime_ns
        found[path.relative_to(directory).as_posix()] = (status.st_ino, time, content)
    return found


def refused(argv, capfd):
    """The line that refuses a command line, which leaves the working directory as it was."""
    before = listing(Path.cwd())
    capfd.readouterr()
    assert train.main(argv) == 2
    assert listing(Path.cwd()) == before
    _, error = capfd.readouterr()
    assert_one_line(error)
    return error


def assert_one_line(error):
    assert error.endswith("\n"), error
    assert error.count("\n") == 1, error
    assert error.startswith("train.py: error: "), error
    assert "Traceback" not in error


# Each mistake at a fresh start, and what the line says of it.
FRESH = {
    "unknown flag": (["--depth", "101"], ["--depth"]),
    "unknown model": (["--model", "resnet99"], ["--model", "resnet99", "resnet101"]),
    "unknown data set": (["--dataset", "nonesuch"], ["--dataset", "nonesuch"]),
    "misspelt data set": (["--dataset", "fashion_mnits"], ["--dataset", "did you mean fashion_mnist"]),
    "data set by path": (["--dataset", "../mnist"], ["--dataset", "is not a TFDS name"]),
    "data set by version": (
        ["--dataset", "mnist:3.0.1", "--data-dir", "my data"],
        ["--dataset", "python -m experiment prepare mnist:3.0.1 --data-dir 'my data'"],
    ),
    "missing data set": (
        ["--dataset", "mnist", "--data-dir", "my data"],
        ["--dataset", "--data-dir", "python -m experiment prepare mnist --data-dir 'my data'"],
    ),
    "rate of zero": (["--lr", "0"], ["--lr"]),
    "negative steps": (["--steps", "-1"], ["--steps"]),
    "a warm-up as long as a cosine": (
        ["--steps", "9", "--warmup-steps", "9"],
        ["--warmup-steps: 9", "fewer"],
    ),
    "a rate of another optimizer": (["--momentum", "0.5"], ["--momentum", "--optimizer sgd"]),
    "small images": (["--image-size", "31"], ["--image-size", "32"]),
    "batch over the training part": (["--batch-size", "1294"], ["--batch-size", "1294", "1293"]),
    "batch norm over one value": (
        ["--model", "resnet18", "--batch-size", "1"],
        ["--batch-size", "resnet18", "2 or more"],
    ),
    "nothing left to train on": (["--train-subset", "0.0001"], ["--train-subset", "--val-fraction"]),
    "run folder is a file": (["--run-dir", "file"], ["--run-dir", "file"]),
    "run folder in a file": (["--run-dir", "file/run"], ["--run-dir", "file/run"]),
    "run folder with other files": (["--run-dir", "used"], ["--run-dir", "used holds thesis.txt", "empty"]),
    "resume of nothing": (["--resume"], ["--resume", "--run-dir"]),
    "resume of no run": (["--resume", "--run-dir", "used"], ["--run-dir", "used", "config.json"]),
    "resume of no folder": (["--resume", "--run-dir", "absent"], ["--run-dir", "absent"]),
    "resume of a file": (["--resume", "--run-dir", "file"], ["--run-dir", "file"]),
    "empty run folder": (["--resume", "--run-dir", ""], ["--run-dir"]),
}


@pytest.mark.parametrize("mistake", FRESH)
def test_mistake_at_the_start(here, capfd, mistake):
    (here / "used").mkdir()
    (here / "used" / "thesis.txt").write_text("mine")
    (here / "file").write_text("mine")
    argv, words = FRESH[mistake]
    line = refused([*TINY, *argv], capfd)
    for word in words:
        assert word in line


# Each mistake at a resume, and what the line says of it.
RESUMED = {
    "another rate": (["--lr", "0.5"], ["--lr", "0.001", "0.5"]),
    "another model": (["--model", "resnet20"], ["--model", "cnn", "resnet20"]),
    "another seed": (["--seed", "1"], ["--seed"]),
    "another batch": (["--batch-size", "16"], ["--batch-size", "32", "16"]),
    "another data set": (["--dataset", "synthetic"], ["--dataset", "digits"]),
    "another length under cosine": (["--steps", "9"], ["--steps", "--schedule-steps 3", "9"]),
    "more epochs under cosine": (["--epochs", "2"], ["--epochs", "--schedule-steps 3", "80"]),
    "another schedule": (["--schedule-steps", "9"], ["--schedule-steps", "3", "9"]),
    "fewer steps than taken": (["--steps", "2", "--schedule-steps", "3"], ["--steps", "3"]),
    "out of range": (["--log-every", "0"], ["--log-every"]),
}


@pytest.mark.parametrize("mistake", RESUMED)
def test_mistake_at_a_resume(run_dir, capfd, mistake):
    argv, words = RESUMED[mistake]
    line = refused([*RESUME, *argv], capfd)
    assert line.startswith(f"train.py: error: {words[0]}: ")
    for word in words:
        assert word in line


def test_a_run_folder_in_use_is_refused(run_dir, capfd):
    line = refused([*TINY, "--run-dir", "run"], capfd)
    assert "--run-dir" in line
    assert "--resume" in line


def test_other_data_are_refused(run_dir, capfd, monkeypatch):
    load = experiment.data.loading.load
    monkeypatch.setattr(
        experiment.data.loading,
        "load",
        lambda *args, **kw: dataclasses.replace(load(*args, **kw), test_size=359),
    )
    line = refused(RESUME, capfd)
    for words in ("--data-dir", "test_size 359", "had 360"):
        assert words in line


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


CORRUPT = {
    "empty": lambda record: b"",
    "torn": lambda record: json.dumps(record).encode()[:-40],
    "no text": lambda record: b"\xff\xfe\x00",
    "null": lambda record: b"null",
    "list": lambda record: b"[]",
    "nothing": lambda record: b"{}",
    "no options": lambda record: without(record, "config"),
    "no lengths": lambda record: without(record, "resolved"),
    "no sessions": lambda record: without(record, "sessions"),
    "no schedule": lambda record: {**record, "resolved": {}},
    "options of another kind": lambda record: {**record, "config": ["cnn"]},
    "a word for a number": lambda record: {**record, "config": {**record["config"], "steps": "three"}},
    "an unknown model": lambda record: {**record, "config": {**record["config"], "model": "resnet99"}},
}


@pytest.mark.parametrize("corruption", CORRUPT)
def test_corrupt_config_is_one_line(run_dir, capfd, corruption):
    path = run_dir / "config.json"
    content = CORRUPT[corruption](json.loads(path.read_text()))
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    line = refused(RESUME, capfd)
    assert "config.json" in line or "--model" in line


def swap(run_dir, change):
    """Replace the newest checkpoint by one with a changed tree, whole in itself."""
    checkpoints = Checkpoints(run_dir / "checkpoints", 9)
    tree, run = checkpoints.load(3)
    checkpoints.save(3, change(tree), run)
    checkpoints.close()


def of_resnet20(tree):
    state = torch_oracle.state_dict(torch_oracle.resnet20(10, 1))
    stats = {name: array for name, array in state.items() if "running" in name}
    return {**tree, "params": {k: v for k, v in state.items() if k not in stats}, "batch_stats": stats}


def of_sgd(tree):
    return {**tree, "optimizer": {"trace": tree["optimizer"]["mu"]}}


def of_amsgrad(tree):
    return {**tree, "optimizer": {**tree["optimizer"], "nu_max": tree["optimizer"]["nu"]}}


def of_seven_classes(tree):
    def cut(arrays):
        return {name: array[:7] if name.startswith("fc.") else array for name, array in arrays.items()}

    optimizer = {k: cut(v) if isinstance(v, dict) else v for k, v in tree["optimizer"].items()}
    return {**tree, "params": cut(tree["params"]), "optimizer": optimizer}


def of_float64(tree):
    return {**tree, "params": {name: array.astype("float64") for name, array in tree["params"].items()}}


SWAPPED = {
    "model": (of_resnet20, ["batch_stats/bn1.running_mean is unexpected", "more"]),
    "sgd": (of_sgd, ["optimizer/count is missing", "optimizer/mu/", "more"]),
    "amsgrad": (of_amsgrad, ["optimizer/nu_max/conv.bias is unexpected", "more"]),
    "classes": (of_seven_classes, ["fc.bias is float32[7], not float32[10]"]),
    "precision": (of_float64, ["params/conv.bias is float64[8], not float32[8]"]),
}


@pytest.mark.parametrize("what", SWAPPED)
def test_checkpoint_of_another_network_is_refused_with_the_difference(run_dir, capfd, what):
    change, words = SWAPPED[what]
    swap(run_dir, change)
    line = refused(RESUME, capfd)
    assert "checkpoint 3" in line
    for word in words:
        assert word in line


def test_a_changed_history_is_refused(run_dir, capfd):
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 1,', '"step": 7,'))
    assert "metrics.jsonl" in refused(RESUME, capfd)


def test_damaged_checkpoints_alone_are_refused(run_dir, capfd):
    for path in (run_dir / "checkpoints").rglob("run.json"):
        path.write_text("{}")
    before = without(listing(run_dir), "log.txt")  # tells of each damaged one
    assert train.main(RESUME) == 2
    out, error = capfd.readouterr()
    assert_one_line(error)
    assert "--resume" in error
    assert [line for line in out.splitlines() if "damaged" in line and "run.json" in line]
    assert without(listing(run_dir), "log.txt") == before


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "resnet99"],  # seen in the flags
        ["--dataset", "mnist", "--data-dir", "absent"],  # by TFDS
        [*RESUME],  # by Orbax and the engine
    ],
    ids=" ".join,
)
def test_a_process_of_its_own_says_one_line_too(run_dir, here, argv):
    """There, libraries write to stderr as they please."""
    swap(run_dir, of_seven_classes)
    before = listing(here)
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert_one_line(done.stderr)
    assert listing(here) == before


HOLD = """
import filelock, sys
lock = filelock.FileLock(sys.argv[1]).acquire()
print("held", flush=True)
input()
"""


def test_a_run_locked_by_another_process_is_refused(run_dir, capfd):
    command = [sys.executable, "-c", HOLD, str(run_dir / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        line = refused(RESUME, capfd)
        holder.communicate("done\n")
    assert "--run-dir" in line
    assert "another process" in line
    assert train.main([*RESUME, "--eval-batch-size", "64"]) == 2  # let go of: refused for its flag instead
    assert "--eval-batch-size" in capfd.readouterr().err
