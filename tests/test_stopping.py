"""What stops a run from inside its process: signals at every moment, and failures in the middle of it.

A stopped run must end, after `--resume`, with the bits of one that was never stopped; a failed one says in
one line, on stderr and in log.txt, what failed and which checkpoints are verified.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import experiment.data.loading
from experiment.commands import train
from experiment.errors import UserError
from experiment.files import checkpoints
from experiment.files.arrays import save_arrays
from experiment.files.checkpoints import Checkpoints
from experiment.run.output import MetricsWriter
from experiment.run.trainer import Trainer
from tests.helpers import made_tfds
from tests.helpers.runs import SMALL, Run
from tests.helpers.stopping import Hook, hook_data, send

# 14 validation images in batches of 5.
FLAGS = [*SMALL, "--framework", "numpy", "--steps", "6", "--checkpoint-every", "3", "--eval-batch-size", "5"]
FLAGS += ["--eval-every", "2", "--warmup-steps", "0"]
PLATEAU = ["--schedule", "plateau", "--patience", "0", "--lr", "3"]  # the second validation lowers the rate


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """SIGINT as in a terminal: a background job of a shell ignores it, and so would the runs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the NumPy engine: the network is too small to start others for."""
    monkeypatch.setattr("numpy_ref.engine.thread_count", lambda: 1)


def run_in(folder: Path, *argv: str, status: int = 0) -> Run:
    assert train.main([*FLAGS, *argv, "--run-dir", str(folder)]) == status
    return Run(folder)


def resume(run: Run, *argv: str, status: int = 0) -> None:
    assert train.main(["--resume", "--run-dir", str(run.folder), *argv]) == status


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing stops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numpy_ref.engine.thread_count", lambda: 1)
        run = run_in(tmp_path_factory.mktemp("whole") / "run", *PLATEAU)
    rates = [line["lr"] for line in run.lines("train", "step")]
    assert len(set(rates)) > 1  # the validations matter
    return run


def expect_same(run: Run, whole: Run) -> None:
    """Fail unless a run ended with the bits of another."""
    for name in ("metrics.jsonl", "weights.safetensors", "weights-best.safetensors"):
        assert run.content(name) == whole.content(name), name
    one, other = (each.summary for each in (run, whole))
    assert [one[name] for name in ("steps", "test", "best")] == [
        other[name] for name in ("steps", "test", "best")
    ]
    assert run.checkpoints[-1] == whole.checkpoints[-1]
    trees = (
        Checkpoints(each.folder / "checkpoints", 1).load(each.checkpoints[-1])[0] for each in (run, whole)
    )
    for arrays in zip(*(tree["params"].items() for tree in trees), strict=True):
        np.testing.assert_array_equal(arrays[0][1], arrays[1][1], strict=True)


"""Called with the part of the data, how often it was begun before (training: 0), and the batch's number."""


MOMENTS = {  # signal, the batch before which it comes, the step at which the run then stops
    "in the step before a validation": (signal.SIGTERM, ("train", 0, 3), 4),
    "in a validation": (signal.SIGUSR1, ("val", 1, 1), 4),
    "in a validation at a checkpoint": (signal.SIGHUP, ("val", 2, 0), 6),
    "in the test": (signal.SIGINT, ("test", 0, 2), 6),
    "in a step without either": (signal.SIGHUP, ("train", 0, 0), 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_is_heard_at_every_moment_and_moves_no_bit(
    whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], moment: str
) -> None:
    number, at, step = MOMENTS[moment]
    with pytest.MonkeyPatch.context() as patch:
        hook_data(patch, send(number, at))
        run = run_in(tmp_path / "my run", *PLATEAU, status=128 + number)
    out, err = capfd.readouterr()
    assert err == ""
    command = f"continue with python train.py --resume --run-dir '{run.folder}'"
    assert out.splitlines()[-1] == f"stopped by {number.name} at step {step}; everything is saved: {command}"
    assert run.checkpoints[-1] == step
    assert len(run.lines("train", "step")) == step  # no further one
    if "validation" in moment:
        assert step not in [line["step"] for line in run.lines("val")]
    assert not run.lines("test")
    assert not (run.folder / "summary.json").exists()
    resume(run)
    expect_same(run, whole)


def test_a_validation_that_is_interrupted_again_is_still_due(whole: Run, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        hook_data(patch, send(signal.SIGTERM, ("val", 1, 1)))
        run = run_in(tmp_path / "run", *PLATEAU, status=128 + signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        hook_data(patch, send(signal.SIGTERM, ("val", 0, 2)))
        resume(run, status=128 + signal.SIGTERM)
    assert run.checkpoints[-1] == 4
    resume(run)
    expect_same(run, whole)


def test_an_interrupted_validation_can_end_the_run_early(tmp_path: Path) -> None:
    flags = ["--lr", "0.3", "--steps", "30", "--early-stopping-patience", "2", "--schedule", "constant"]
    whole = run_in(tmp_path / "whole", *flags)
    validations = len(whole.lines("val"))
    assert whole.summary["steps"] == 2 * validations < 30
    with pytest.MonkeyPatch.context() as patch:
        hook_data(patch, send(signal.SIGTERM, ("val", validations - 1, 1)))
        run = run_in(tmp_path / "run", *flags, status=128 + signal.SIGTERM)
    assert run.checkpoints[-1] == whole.summary["steps"]
    resume(run)
    expect_same(run, whole)


def test_a_signal_while_a_save_is_waited_for_stops_at_that_step(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, save = [], Checkpoints.save

    def interrupted(self: Checkpoints, step: int, *rest: Any) -> None:
        saved.append(step)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        save(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupted)
        run = run_in(tmp_path / "run", *PLATEAU, status=128 + signal.SIGTERM)
    assert saved == run.checkpoints == [3]
    assert len(run.lines("train", "step")) == 3
    resume(run)
    expect_same(run, whole)


@contextlib.contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """As `nohup` has it for SIGHUP, and `&` in a script for SIGINT."""
    hook_data(monkeypatch, send(number, ("train", 0, 0)))
    with handled(number, signal.SIG_IGN):
        run = run_in(tmp_path / "run", "--steps", "1")
        assert signal.getsignal(number) is signal.SIG_IGN
    assert run.summary["steps"] == 1


def test_handlers_are_as_before_after_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook_data(monkeypatch, send(signal.SIGUSR1, ("train", 0, 0)))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    run_in(tmp_path / "run", "--steps", "2", status=128 + signal.SIGUSR1)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_ctrl_c_that_python_drops_still_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raised in the callback of a weak reference, KeyboardInterrupt is printed and forgotten."""
    load = experiment.data.loading.load
    dropped: list[Any] = []

    class Thing:
        pass

    def interrupted_load(*args: Any, **options: Any) -> Any:
        thing = Thing()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing
        assert reference() is None
        return load(*args, **options)

    monkeypatch.setattr(experiment.data.loading, "load", interrupted_load)
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    run_in(tmp_path / "run", status=130)
    assert [entry.exc_type for entry in dropped] == [KeyboardInterrupt]
    assert "interrupted at once" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_more_signals_of_a_closing_terminal_do_not_end_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGHUP comes from the terminal and from the shell, SIGTERM from whoever ends the session."""

    def hook(part: str, time: int, number: int) -> None:
        if (part, number) == ("train", 1):
            for each in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
                signal.raise_signal(each)

    hook_data(monkeypatch, hook)
    assert run_in(tmp_path / "run", status=128 + signal.SIGHUP).checkpoints == [2]


def flip(run: Run, step: int) -> None:
    """Change a bit of a checkpoint."""
    path = run.folder / "checkpoints" / str(step) / "run.json"
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)


def failure_of(run: Run, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, which log.txt ends with, without its label."""
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("train.py: ")
    words = line.removeprefix("train.py: ").removeprefix("error: ")
    assert (run.folder / "log.txt").read_text().splitlines()[-1].endswith(words)
    assert not (run.folder / "summary.json").exists()
    return words


def test_a_second_ctrl_c_names_verified_checkpoints(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def hook(part: str, time: int, number: int) -> None:
        if (part, number) == ("train", 5):
            flip(run, 3)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    run = Run(tmp_path / "run")
    with monkeypatch.context() as patch:
        hook_data(patch, hook)
        run_in(run.folder, *PLATEAU, "--checkpoint-every", "1", status=128 + signal.SIGINT)
    words = failure_of(run, capfd)
    assert words.startswith("interrupted at once; verified checkpoints: 4, 5; continue with python train.py")
    resume(run)
    for name in ("metrics.jsonl", "weights.safetensors"):
        assert run.content(name) == whole.content(name), name


def raising(error: BaseException, at: tuple[str, int, int]) -> Hook:
    def hook(*place: Any) -> None:
        if place == at:
            raise error

    return hook


def wrapped(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


IMAGE = UserError("record 7 of mnist cannot be read")
FAILURES = {  # what is raised, before which batch, and the words for it
    "an image": (IMAGE, ("train", 0, 4), "record 7 of mnist cannot be read"),
    "an image, wrapped": (wrapped(ValueError("in a worker"), IMAGE), ("train", 0, 4), str(IMAGE)),
    "an image of validation": (IMAGE, ("val", 1, 1), "record 7 of mnist cannot be read"),
    "an image of the test": (IMAGE, ("test", 0, 1), "record 7 of mnist cannot be read"),
    "a reader": (
        OSError(errno.EIO, "I/O\nerror"),
        ("train", 0, 4),
        "the data (train) cannot be read: OSError: ",
    ),
    "memory": (MemoryError(), ("train", 0, 4), "out of memory"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_data_that_cannot_be_read_fails_the_run_in_one_line(
    whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    error, at, expected = FAILURES[what]
    with pytest.MonkeyPatch.context() as patch:
        hook_data(patch, raising(error, at))
        run = run_in(tmp_path / "run", *PLATEAU, status=1)
    words = failure_of(run, capfd)
    assert words.startswith(f"the run failed: {expected}")
    steps = "3, 6" if at[0] == "test" else "3"
    assert f"; verified checkpoints: {steps}; continue with python train.py --resume --run-dir" in words
    resume(run)
    expect_same(run, whole)


def test_an_unreadable_image_in_the_midst_of_a_tfds_set_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    examples = made_tfds.images(64, (32, 32))
    directory = made_tfds.write(
        tmp_path, "made", {"train": examples, "test": examples[:8]}, shape=(32, 32, 1)
    )
    examples[37] = (examples[37][0][:40], 1)  # a PNG that ends in its head
    broken = made_tfds.write(
        tmp_path / "b", "made", {"train": examples, "test": examples[:8]}, shape=(32, 32, 1)
    )
    for path in broken.glob("*train*"):
        os.replace(path, directory / path.name)
    flags = ["--dataset", "made", "--data-dir", str(tmp_path), "--val-fraction", "0", "--train-subset", "1"]
    run = run_in(tmp_path / "run", *flags, "--checkpoint-every", "1", status=1)
    words = failure_of(run, capfd)
    assert "--data-dir: record 37 of made (train) in " in words
    assert "; verified checkpoints: " in words


def test_a_killed_process_of_the_numpy_engine_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    killed = []
    before = set(multiprocessing.active_children())  # of an engine of an earlier test

    def hook(part: str, time: int, number: int) -> None:
        if (part, number) == ("train", 4):
            process = next(child for child in multiprocessing.active_children() if child not in before)
            killed.append(process.pid)
            os.kill(process.pid or 0, signal.SIGKILL)

    monkeypatch.setattr("numpy_ref.engine.thread_count", lambda: 2)
    hook_data(monkeypatch, hook)
    run = run_in(tmp_path / "run", status=1)
    words = failure_of(run, capfd)
    assert f" of 2 of the NumPy engine (pid {killed[0]}) was killed by SIGKILL (out of memory?); " in words
    assert "; verified checkpoints: 3; continue with" in words


def test_an_error_that_nobody_expected_is_one_line_and_its_traceback_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def show(self: Trainer, metrics: Any) -> None:
        if self.step == 4:
            raise ZeroDivisionError("of\nmany lines")

    monkeypatch.setattr(Trainer, "_show", show)
    run = run_in(tmp_path / "run", status=1)
    words = failure_of(run, capfd)
    assert (
        "failed: ZeroDivisionError: of many lines; the traceback is in log.txt; verified checkpoints: 3"
        in words
    )
    assert "Traceback (most recent call last)" in (run.folder / "log.txt").read_text()


def test_after_nan_only_a_verified_checkpoint_is_called_good(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that resume has just called damaged is no good one."""
    run = run_in(tmp_path / "run")
    flip(run, 6)
    (run.folder / "summary.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numpy_ref.engine.Engine.first_nonfinite_step", lambda *_: 4)
        capfd.readouterr()
        resume(run, status=1)
    assert "the last good checkpoint is 3 in" in failure_of(run, capfd)


DISK = {
    errno.ENOSPC: "free disk space, then continue with",
    errno.EDQUOT: "free disk space, then continue with",
    errno.EIO: "3; continue with",
    errno.EROFS: "3; continue with",
}


@pytest.mark.parametrize("code", DISK)
@pytest.mark.parametrize("inside", [True, False], ids=["of a checkpoint", "of a line"])
def test_the_advice_to_free_space_is_for_a_full_disk_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    code: int,
    inside: bool,
) -> None:
    """And a checkpoint that is damaged is not among those that are called verified."""
    append, save = MetricsWriter.append, save_arrays

    def fail(*_: Any) -> None:
        flip(run, 2)
        raise OSError(code, os.strerror(code))

    def fail_in_line(self: MetricsWriter, line: Any) -> None:
        fail() if line["step"] == 4 else append(self, line)

    def fail_in_save(path: Path, tree: Any) -> None:
        fail() if tree["step"] == 4 else save(path, tree)

    run = Run(tmp_path / "run")
    if inside:
        monkeypatch.setattr(checkpoints, "save_arrays", fail_in_save)
    else:
        monkeypatch.setattr(MetricsWriter, "append", fail_in_line)
    run_in(run.folder, "--checkpoint-every", "1", status=1)
    words = failure_of(run, capfd)
    assert words.startswith(f"the run failed: cannot write in {run.folder}: ")
    assert os.strerror(code) in words
    assert "; verified checkpoints: 1, 3; " in words
    assert DISK[code] in words


def test_a_disk_that_is_full_from_the_start_does_not_name_a_run_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("experiment.files.run_folder.write_json", fail)
    run = run_in(tmp_path / "run", status=1)
    words = failure_of(run, capfd)
    assert words.endswith("verified checkpoints: none; free disk space, then start the run again")
