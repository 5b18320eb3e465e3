"""Results in a run folder are neither lost nor exchanged, whatever a user or another process does there."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import safetensors

import experiment.data.loading
from experiment.__main__ import main
from experiment.commands import train
from experiment.errors import FolderLostError
from experiment.files import checkpoints as checkpoints_module
from experiment.files.checkpoints import Checkpoints
from experiment.files.results import best_step, last_step, read_summary
from experiment.files.run_folder import lock, write_json
from experiment.report.figures import ReportFigure
from experiment.report.page import render_report, state
from experiment.report.reading import read_run
from tests.helpers.checkpoint_trees import RUN, make_tree

ROOT = Path(__file__).parents[1]
FLAGS = (
    *("--framework", "numpy", "--model", "cnn", "--train-subset", "0.1", "--batch-size", "16", "--no-report"),
    *("--schedule", "constant", "--warmup-steps", "0", "--eval-every", "1", "--checkpoint-every", "5"),
)
END = (
    14  # checkpoints 5, 10, 14; the validation loss is lowest at 10 so far, not at 11, and lower at 12 and 14
)
RESULTS = ("metrics.jsonl", "weights.safetensors", "weights-best.safetensors", "predictions.npz")


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """Keep the NumPy engine in this process: starting workers takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def command(run_dir: Path, *extra: str, resume: bool = True) -> tuple[int, str, str]:
    """Return the exit status of train.py and what it printed on stdout and stderr."""
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        status = train.main([*(["--resume"] if resume else FLAGS), *extra, "--run-dir", str(run_dir)])
    return status, out.getvalue(), error.getvalue()


def succeed(run_dir: Path, *extra: str, resume: bool = True) -> str:
    """Run train.py to its end; return what it printed."""
    status, out, error = command(run_dir, *extra, resume=resume)
    assert (status, error) == (0, "")
    return out


def failed(run_dir: Path, status: int, *extra: str, resume: bool = True) -> str:
    """Return the one line with which train.py ends with `status`."""
    found, _, error = command(run_dir, *extra, resume=resume)
    assert (found, error.count("\n")) == (status, 1), error
    assert error.startswith("train.py: error: ")
    return error


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder; of files what is in them."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(run_dir: Path, *extra: str, resume: bool = True) -> str:
    """Return the one line with which train.py refuses to run, which leaves the folder as it was."""
    before = contents(run_dir)
    line = failed(run_dir, 2, *extra, resume=resume)
    assert contents(run_dir) == before
    return line


def refusal(arguments: list[str]) -> str:
    """Return the one line with which `python -m experiment` refuses arguments."""
    error = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(error):
        assert main(arguments) == 2
    assert error.getvalue().count("\n") == 1
    return error.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Completed runs that differ in their last step alone, to be copied."""
    folder = tmp_path_factory.mktemp("runs")
    for steps in (11, END):
        succeed(folder / str(steps), "--steps", str(steps), resume=False)
    return {steps: folder / str(steps) for steps in (11, END)}


@pytest.fixture
def run(runs: dict[int, Path], tmp_path: Path) -> Path:
    """A copy of the run of 14 steps."""
    return Path(shutil.copytree(runs[END], tmp_path / "run"))


def damage(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / str(step) / "run.json").write_text("{}")


def change_record(run_dir: Path, change: Callable[[Any], None]) -> None:
    path = run_dir / "config.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def change_checkpoint(run_dir: Path, step: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Replace a checkpoint by one with a changed run.json, whole in itself."""
    folder = run_dir / "checkpoints" / str(step)
    run = json.loads((folder / "run.json").read_text())
    change(run)
    write_json(folder / "run.json", run)
    write_json(folder / "manifest.json", {"files": checkpoints_module._sums(folder)})


def step_of(path: Path) -> int:
    with safetensors.safe_open(path, "numpy") as file:
        return int(json.loads(file.metadata()["run"])["step"])


class Interfering(experiment.data.loading.Data):
    """Data that do something when the batch after step `at` is asked for."""

    at: int
    action: Callable[[], Any]

    def train_batches(self, start_step: int = 0) -> Iterator[Any]:
        for step, batch in enumerate(super().train_batches(start_step), start_step):
            if step == self.at:
                type(self).action()
            yield batch


def interfere(monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[], Any]) -> None:
    """Let every run from here on do something in the midst of training."""
    load = experiment.data.loading.load

    def changed(*arguments: Any, **options: Any) -> Any:
        data = load(*arguments, **options)
        values = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
        return type("Data", (Interfering,), {"at": at, "action": staticmethod(action)})(**values)

    monkeypatch.setattr(experiment.data.loading, "load", changed)


def stop(run_dir: Path, at: int, *extra: str) -> None:
    """Resume a run and stop it by a signal in the step after `at`."""
    with pytest.MonkeyPatch.context() as patch:
        interfere(patch, at, lambda: signal.raise_signal(signal.SIGTERM))
        assert command(run_dir, *extra)[0] == 128 + signal.SIGTERM
    assert last_step(run_dir) == at + 1


# --- A run without checkpoints


def keep_only(run_dir: Path, *names: str) -> None:
    """Delete the checkpoints of a run, its lock, and all its results but some."""
    shutil.rmtree(run_dir / "checkpoints")
    for name in {".lock", "summary.json", *RESULTS} - set(names):
        (run_dir / name).unlink(missing_ok=True)


def resumed_once(record: Any) -> None:
    record["sessions"].append({**record["sessions"][0], "step": 10})


@pytest.mark.parametrize("name", ["summary.json", *RESULTS, "config.json"])
def test_a_run_with_results_but_no_checkpoint_is_refused(run: Path, name: str) -> None:
    keep_only(run, name)
    if name == "config.json":
        change_record(run, resumed_once)
    line = refused(run)
    assert f"({name})" in line
    assert "--resume" in line
    assert f"step {10 if name == 'config.json' else END}" in line


def test_results_that_cannot_be_read_are_not_overwritten_either(run: Path) -> None:
    keep_only(run, "summary.json")
    (run / "summary.json").write_text("{")
    assert "(summary.json)" in refused(run)


def test_a_published_run_is_not_overwritten(tmp_path: Path) -> None:
    run = Path(shutil.copytree(ROOT / "docs" / "runs" / "digits-adam-numpy", tmp_path / "run"))
    refused(run, "--steps", "300", "--schedule-steps", "280")


def test_a_run_killed_before_its_first_checkpoint_starts_again(runs: dict[int, Path], run: Path) -> None:
    """It has recorded ten steps while the first checkpoint, of step 5, was being saved."""
    keep_only(run, "metrics.jsonl", "weights-best.safetensors")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(line for line in lines if json.loads(line)["step"] <= 10))
    shutil.copy(runs[END] / "checkpoints" / "weights-best-10.safetensors", run / "weights-best.safetensors")
    assert "starting at step 0" in succeed(run)
    for name in RESULTS:
        assert (run / name).read_bytes() == (runs[END] / name).read_bytes(), name


def test_a_completed_run_of_no_steps_can_be_resumed(tmp_path: Path) -> None:
    succeed(tmp_path / "run", "--steps", "0", resume=False)
    succeed(tmp_path / "run", "--steps", "1")
    assert last_step(tmp_path / "run") == 1


# --- Another process in the same folder


def during_the_imports(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> None:
    """Let the next run do something after its first checks, before it takes the lock."""
    load = experiment.data.loading.load

    def slow(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(experiment.data.loading, "load", load)
        action()
        return load(*arguments, **options)

    monkeypatch.setattr(experiment.data.loading, "load", slow)


def test_a_slow_starter_does_not_touch_a_run_completed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, after = tmp_path / "run", {}

    def other() -> None:
        succeed(run, "--steps", "2", "--seed", "1", resume=False)
        after.update(contents(run))

    during_the_imports(monkeypatch, other)
    line = failed(run, 2, "--steps", "2", resume=False)
    assert f"--run-dir: {run} is in use" in line
    assert contents(run) == after
    assert read_summary(run)


def test_a_slow_resume_does_not_forget_the_session_of_another(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during_the_imports(monkeypatch, lambda: succeed(run, "--steps", "15"))
    assert "another process has trained in" in failed(run, 2, "--steps", "16")
    record = json.loads((run / "config.json").read_text())
    assert [session["step"] for session in record["sessions"]] == [0, END]
    assert record["resolved"]["total_steps"] == last_step(run) == 15


def test_a_folder_that_is_removed_before_a_resume_begins_is_not_made_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during_the_imports(monkeypatch, lambda: shutil.rmtree(run))
    assert f"--run-dir: {run} was removed" in failed(run, 2, "--steps", "15")
    assert not run.exists()


# --- Files of another step than the run


def test_the_best_weights_go_back_with_the_checkpoint(runs: dict[int, Path], run: Path) -> None:
    """The best step is 10; the run had gone on to better ones, of 12 and 14."""
    damage(run, END)
    succeed(run, "--steps", "11")
    for name in RESULTS:
        assert (run / name).read_bytes() == (runs[11] / name).read_bytes(), name
    assert read_summary(run)["best"]["step"] == step_of(run / "weights-best.safetensors") == 10  # type: ignore[index]
    succeed(run, "--steps", str(END))
    for name in RESULTS:
        assert (run / name).read_bytes() == (runs[END] / name).read_bytes(), name


def test_best_weights_that_were_lost_on_the_way_come_back_too(runs: dict[int, Path], run: Path) -> None:
    """A kill between two writes, or a user's hand."""
    damage(run, END)
    (run / "weights-best.safetensors").unlink()
    succeed(run, "--steps", "11")
    assert (run / "weights-best.safetensors").read_bytes() == (
        runs[11] / "weights-best.safetensors"
    ).read_bytes()


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*arguments: Any) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    best = tmp_path / "weights-best.safetensors"
    for step in (1, 2):
        checkpoints.save(step, make_tree(step), {**RUN, "best": {"step": step, "loss": 0.5}})
        checkpoints.wait()
        write_weights(best, step)
        checkpoints.keep_best(best, step)
        assert not best.exists()
    for step in (1, 2):
        assert checkpoints.restore_best(best, step)
        assert step_of(best) == step
    assert not checkpoints.restore_best(best, 3)
    checkpoints.close()


def write_weights(path: Path, step: int) -> None:
    from experiment.files import weights

    weights.save(path, make_tree(step)["params"], {"step": step})


def test_only_the_best_weights_that_a_checkpoint_refers_to_are_kept(runs: dict[int, Path], run: Path) -> None:
    def kept() -> list[str]:
        return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_file())

    assert kept() == ["weights-best-10.safetensors", "weights-best-5.safetensors"]
    succeed(run, "--steps", "15", "--keep-checkpoints", "1")
    assert kept() == []


def test_a_run_of_an_older_version_names_the_best_weights_that_are_lost(run: Path) -> None:
    """It kept no others than the newest, which stay, and are not taken for those of step 10."""
    damage(run, END)
    for path in (run / "checkpoints").glob("weights-best-*"):
        path.unlink()
    out = succeed(run, "--steps", "11")
    assert "weights-best.safetensors: the best weights so far, of step 10, are lost" in out
    assert step_of(run / "weights-best.safetensors") == END
    line = refusal(["evaluate", str(run), "--weights", "best"])
    assert f"is of step {END}, and the best validation of the run is of step 10" in line
    assert main(["evaluate", str(run)]) == 0


@pytest.mark.parametrize("older", [False, True], ids=["extended", "resumed from an older checkpoint"])
def test_results_of_an_earlier_end_are_not_taken_for_those_of_the_run(run: Path, older: bool) -> None:
    if older:
        damage(run, END)
        stop(run, 11)
    else:
        stop(run, 16, "--steps", "20")
    step = last_step(run)
    assert (run / "weights.safetensors").exists()
    for arguments in (["evaluate", str(run)], ["predict", str(run), str(ROOT / "docs" / "overview.png")]):
        assert f"weights.safetensors: is of step {END}, and the run is at step {step};" in refusal(arguments)
    assert main(["evaluate", str(run), "--weights", "best"]) == 0
    found = read_run(run)
    assert found.summary is None
    assert state(found).startswith(f"not finished: step {step} of ")
    assert f"summary.json is of step {END}, and the run is at step {step}." in found.absent
    assert read_summary(run) is None
    page = render_report(found, {"confusion": ReportFigure("confusion", "not drawn", b"", b"")})
    assert f"the weights of step {END}. The run is at step {step}." in page
    succeed(run)  # to its end
    assert main(["evaluate", str(run)]) == 0
    assert read_summary(run)
    assert read_run(run).finished


def test_the_steps_of_a_history_with_damaged_lines(tmp_path: Path) -> None:
    lines = [
        '{"split": "val", "scope": "epoch", "step": 1, "loss": 0.5}',
        '{"split": "val", "scope": "epoch", "step": 2, "loss": null}',
        '{"split": "val", "scope": "epoch", "step": 3, "loss": 0.25}',
        '{"split": "val", "scope": "epoch", "step": 4, "loss": 0.25}',
        "[]",
        '{"split": "val", "st',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert (last_step(tmp_path), best_step(tmp_path)) == (4, 3)
    (tmp_path / "metrics.jsonl").write_text("")
    assert (last_step(tmp_path), best_step(tmp_path)) == (None, None)


# --- Checkpoints and options that do not belong together


def test_a_checkpoint_under_another_number_is_not_taken_for_that_step(
    runs: dict[int, Path], run: Path
) -> None:
    damage(run, END)
    (run / "checkpoints" / "10").rename(run / "checkpoints" / "12")
    out = succeed(run)
    assert "checkpoint 12 is damaged and is not used: it is of step 10" in out
    assert "resuming at step 5" in out
    for name in RESULTS:
        assert (run / name).read_bytes() == (runs[END] / name).read_bytes(), name


def test_names_that_are_no_step_are_passed_over(run: Path) -> None:
    checkpoints = run / "checkpoints"
    for name in ("014", "٣"):
        shutil.copytree(checkpoints / "10", checkpoints / name)
    (checkpoints / "99").write_text("a file")
    assert Checkpoints(checkpoints, 3).steps() == [5, 10, END]


OTHERS = {
    "seed": 1,
    "batch_size": 8,
    "augment": "crop-flip",
    "momentum": 0.8,
}  # none changes an array's shape


@pytest.mark.parametrize("name", OTHERS)
def test_the_config_of_another_run_is_refused(run: Path, name: str) -> None:
    change_record(run, lambda record: record["config"].update({name: OTHERS[name]}))
    line = refused(run)
    assert "checkpoint 14 in" in line
    assert f"was made with {name} " in line
    assert f"config.json has {OTHERS[name]}" in line


def test_a_checkpoint_of_an_older_version_resumes_and_says_so(runs: dict[int, Path], run: Path) -> None:
    change_checkpoint(run, END, lambda saved: saved.pop("identity"))
    assert "checkpoint 14 is of an older version and holds no options" in succeed(run)
    assert (run / "metrics.jsonl").read_bytes() == (runs[END] / "metrics.jsonl").read_bytes()


def test_a_checkpoint_of_a_newer_version_is_refused(run: Path) -> None:
    change_checkpoint(run, END, lambda saved: saved.update({"squeeze": 1}))
    line = refused(run)
    assert "'squeeze'" in line
    assert "newer version" in line


UNKNOWN: dict[str, Callable[[Any], Any]] = {
    "option": lambda record: record["config"].update({"squeeze": 1}),
    "resolved": lambda record: record["resolved"].update({"squeeze": 1}),
    "optimizer": lambda record: record["resolved"]["optimizer_options"].update({"squeeze": 1}),
    "record": lambda record: record.update({"squeeze": 1}),
}


@pytest.mark.parametrize("place", UNKNOWN)
def test_an_unknown_option_in_config_json_is_refused_by_name(run: Path, place: str) -> None:
    change_record(run, UNKNOWN[place])
    before = contents(run)
    lines = [refused(run)]
    image = str(ROOT / "docs" / "overview.png")
    for arguments in (["evaluate"], ["report"], ["predict", image], ["compare", str(run)]):
        lines.append(refusal([arguments[0], str(run), *arguments[1:]]))
    for line in lines:
        assert f"{run / 'config.json'}: unknown option 'squeeze', of a newer version" in line
    assert contents(run) == before


# --- A folder that is removed while its run goes on


def remove(run_dir: Path) -> None:
    shutil.rmtree(run_dir)


def move(run_dir: Path) -> None:
    run_dir.rename(run_dir.with_name("moved"))


def replace(run_dir: Path) -> None:
    """As by a second run, which has its own lock."""
    move(run_dir)
    run_dir.mkdir()
    (run_dir / ".lock").touch()
    (run_dir / "config.json").write_text("{}")


@pytest.mark.parametrize("what", [remove, move, replace])
@pytest.mark.parametrize("at", [2, 6], ids=["before the first checkpoint", "after it"])
def test_a_run_whose_folder_is_gone_does_not_make_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Callable[[Path], None], at: int
) -> None:
    run = tmp_path / "run"
    after: dict[str, bytes | None] = {}

    def act() -> None:
        deadline = time.monotonic() + 60
        while at > 4 and not (run / "checkpoints" / "4").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        what(run)
        after.update(contents(tmp_path))

    interfere(monkeypatch, at, act)
    flags = ("--steps", "12", "--eval-every", "100", "--checkpoint-every", "4")
    line = failed(run, 1, *flags, resume=False)
    assert f"the run failed: {run} was removed, moved or replaced while the run went on" in line
    after.pop("moved/log.txt", None)  # the run has it open
    after.pop("moved/metrics.jsonl", None)
    found = contents(tmp_path)
    assert {name: found.get(name) for name in after} == after
    assert run.exists() == (what is replace)
    assert found.keys() - after.keys() <= {"moved/log.txt", "moved/metrics.jsonl"}


@pytest.mark.parametrize("moment", ["save_arrays", "_sums"])
def test_a_folder_that_is_removed_during_a_save_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run, function = tmp_path / "run", getattr(checkpoints_module, moment)

    def removed_first(*arguments: Any) -> Any:
        shutil.rmtree(run)
        return function(*arguments)

    run.mkdir()
    monkeypatch.setattr(checkpoints_module, moment, removed_first)
    with lock(run) as check_folder:
        checkpoints = Checkpoints(run / "checkpoints", 3, check_folder=check_folder)
        checkpoints.save(1, make_tree(1), RUN)
        with pytest.raises(OSError, match="checkpoint 1 could not be written"):
            checkpoints.wait()
        assert not run.exists()
        with pytest.raises(FolderLostError):
            checkpoints.save(2, make_tree(2), RUN)
        checkpoints.close()
