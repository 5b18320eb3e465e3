"""Studies: their files, that runs of one seed are alike, tuning, resume, and the tables' numbers."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any

import numpy as np
import pytest

from experiment.__main__ import main
from experiment.commands.study import _make
from experiment.files import run_folder, weights
from experiment.files.checkpoints import Checkpoints
from experiment.options.command_line import flags, parse
from experiment.options.config import OPTIMIZERS, is_external
from experiment.options.resolving import resolve
from experiment.processes import processor_seconds
from experiment.run import session, signals
from experiment.run.outcome import End, Outcome
from experiment.study import curves, results, running, tables
from experiment.study.plan import Plan, read
from experiment.study.statistics import paired, summarize
from tests.helpers.stopping import hook_data, send
from tests.helpers.studies import one_process, run_study

__all__ = ["one_process"]  # the fixture, for every test here

FOLDER = Path(__file__).parents[1] / "studies"
STUDY = """
seeds = [1, 2]
tuning_seeds = [9]
compare_with = ["adam", "clipped"]

[base]
framework = "numpy"
model = "cnn"
steps = 3
eval_every = 3
batch_size = 16

[[optimizers]]
name = "adam"
candidates = [{ lr = 0.0001 }, { lr = 0.01 }]

[[optimizers]]
name = "clipped"
optimizer = "sgdbound"
candidates = [{ lr = 1e-6, final_lr = 1e-6 }, { lr = 0.5, final_lr = 0.5 }]
"""


def write(folder: Path, text: str = STUDY) -> Path:
    """A study's file."""
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def evaluated() -> list[str]:
    """The splits that the runs of `made` evaluated, in order."""
    return []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, evaluated: list[str]) -> Path:
    """The folder of a finished study of STUDY, beside its file."""
    folder = tmp_path_factory.mktemp("study")
    evaluated += run_study(write(folder), folder / "out")
    return folder


def test_tuning_runs_never_evaluate_the_test_set(made: Path, evaluated: list[str]) -> None:
    """Four tuning runs and four final runs validate; the final runs alone are tested, once each."""
    assert evaluated == ["val"] * 4 + ["val", "test"] * 4
    for split, kind, expected in (("test", "runs", 1), ("test", "tuning", 0), ("val", "tuning", 1)):
        folders = sorted((made / "out" / kind).glob("**/seed-*"))
        assert len(folders) == 4
        assert [len(list(running.lines(folder, split))) for folder in folders] == [expected] * 4
    for folder in (made / "out" / "tuning").glob("**/seed-*"):
        assert run_folder.read_json(folder / "summary.json")["test"] is None
        assert "the test set was not evaluated (--no-test); " in (folder / "log.txt").read_text()
        assert not (folder / "predictions.npz").exists()
        assert (folder / "weights.safetensors").exists()


def test_a_tuning_run_can_be_tested_later(made: Path, tmp_path: Path) -> None:
    from experiment.commands import train

    folder = tmp_path / "run"
    shutil.copytree(made / "out" / "tuning" / "adam" / "candidate-2" / "seed-9", folder)
    assert train.main(["--run-dir", str(folder), "--resume", "--test"]) == 0
    (line,) = running.lines(folder, "test")
    test = run_folder.read_json(folder / "summary.json")["test"]
    assert test == {name: line[name] for name in test}
    assert (folder / "predictions.npz").exists()


def test_runs_draw_no_report_unless_asked(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [*(made / "out").glob("**/report"), *(made / "out").glob("**/tensorboard")]
    asked: list[bool] = []

    def start(given: dict[str, Any], argv: list[str]) -> Outcome:
        asked.append(given["report"])
        return Outcome(End.FAILED, 1)

    monkeypatch.setattr(session, "start", start)
    for text, flag, expected in (
        (STUDY, [], False),
        (STUDY, ["--report"], True),
        (STUDY.replace("steps = 3\n", "steps = 3\nreport = true\n"), [], True),
        (STUDY.replace("steps = 3\n", "steps = 3\nreport = true\n"), ["--no-report"], False),
    ):
        assert main(["study", str(write(tmp_path, text)), "--run-dir", str(tmp_path / "out"), *flag]) == 1
        assert asked.pop() is expected


def test_the_cost_of_runs(made: Path) -> None:
    study = json.loads((made / "out" / "study.json").read_text())
    for each in study["contestants"].values():
        for run in each["runs"].values():
            assert run["processor_seconds"] > 0
            assert run["wall_seconds"] > 0
            assert run["steps_per_second"] == pytest.approx(run["images_per_second"] / 16)


def test_processor_time_counts_work_and_child_processes() -> None:
    before, own = processor_seconds(), time.process_time()
    while time.process_time() - own < 0.05:
        pass
    assert processor_seconds() - before > 0.03  # os.times counts in ticks of 0.01
    before, own = processor_seconds(), time.process_time()
    child = multiprocessing.get_context("spawn").Process(
        target=sum, args=(range(10**12),)
    )  # works until stopped
    child.start()
    try:
        deadline = time.monotonic() + 60
        while processor_seconds() - before < time.process_time() - own + 0.2:
            assert time.monotonic() < deadline, "the child's processor time is not counted"
            time.sleep(0.01)
        running = processor_seconds()
    finally:
        child.terminate()
        child.join()
    assert processor_seconds() >= running - 0.02  # counted once it has ended, too


def test_runs_of_older_versions_are_read(made: Path, tmp_path: Path) -> None:
    """Their config.json has no option `test`, their tuning runs were tested, no processor time was kept."""
    out = tmp_path / "out"
    shutil.copytree(made / "out", out)
    for folder in out.glob("**/seed-*"):
        record, summary = run_folder.read_record(folder), run_folder.read_json(folder / "summary.json")
        del record["config"]["test"], summary["processor_seconds"]
        summary["test"] = summary["test"] or {"accuracy": 0.5, "loss": 1.0, "f1": 0.5}
        run_folder.write_json(folder / "config.json", record)
        run_folder.write_json(folder / "summary.json", summary)
    assert main(["study", str(made / "tiny.toml"), "--run-dir", str(out)]) == 0
    old, new = (json.loads((folder / "study.json").read_text()) for folder in (out, made / "out"))
    for name, each in new["contestants"].items():
        for seed, run in each["runs"].items():
            assert old["contestants"][name]["runs"][seed] == {**run, "processor_seconds": None}
        assert old["contestants"][name]["tuning"] == each["tuning"]


def test_processor_time_is_not_known_of_a_run_beside_others(tmp_path: Path) -> None:
    """Seeds that train in one program each have a thread of the same process."""
    from experiment.commands import train

    argv = ["--framework", "numpy", "--model", "cnn", "--steps", "1", "--no-report", "--no-test"]
    argv += ["--val-fraction", "0", "--run-dir", str(tmp_path / "run")]
    thread = Thread(target=train.main, args=(argv,))
    thread.start()
    thread.join()
    summary = run_folder.read_json(tmp_path / "run" / "summary.json")
    assert summary["processor_seconds"] is None
    assert summary["wall_seconds"] > 0


def test_runs_of_one_seed_begin_alike_and_see_the_same_batches(made: Path) -> None:
    """The first loss is that of the initial weights on the first batch; seeds differ in it."""
    first = {}
    for folder in (made / "out" / "runs").glob("*/seed-*"):
        first[folder.parent.name, folder.name] = next(running.lines(folder, "train", "step"))["loss"]
    assert len(first) == 4
    assert first["adam", "seed-1"] == first["clipped", "seed-1"]
    assert first["adam", "seed-2"] == first["clipped", "seed-2"]
    assert first["adam", "seed-1"] != first["adam", "seed-2"]


def test_a_run_is_that_of_its_command(made: Path, tmp_path: Path) -> None:
    """What config.json tells as the command of a run makes the same weights again."""
    from experiment.commands import train

    run = made / "out" / "runs" / "clipped" / "seed-2"
    command = run_folder.read_record(run)["sessions"][-1]["command"]
    command[command.index("--run-dir") + 1] = str(tmp_path / "again")
    assert train.main(command) == 0
    again = weights.load(tmp_path / "again" / "weights.safetensors")
    for name, array in weights.load(run / "weights.safetensors").items():
        np.testing.assert_array_equal(again[name], array)


def test_the_setting_is_chosen_on_validation(made: Path) -> None:
    study = json.loads((made / "out" / "study.json").read_text())
    assert study["command"] == [str(made / "tiny.toml")]
    for name, each in study["contestants"].items():
        scores = [tried["val_accuracy"][0] for tried in each["tuning"]]
        assert each["chosen"] == 1, (name, scores)  # the first hardly moves
        assert scores[1] >= scores[0]
        for seed in study["seeds"]:
            config = run_folder.read_record(made / "out" / "runs" / name / f"seed-{seed}")["config"]
            assert {key: config[key] for key in each["setting"]} == each["setting"]


def test_tables_hold_means_intervals_and_paired_differences(made: Path) -> None:
    study = json.loads((made / "out" / "study.json").read_text())
    adam, clipped = (
        [study["contestants"][name]["runs"][seed]["accuracy"] for seed in ("1", "2")]
        for name in ("adam", "clipped")
    )
    assert study["contestants"]["adam"]["accuracy"]["mean"] == pytest.approx(np.mean(adam))
    (compared,) = [each for each in study["comparisons"] if each["of"] == "clipped"]
    assert compared["accuracy"]["mean"] == pytest.approx(np.mean(np.subtract(clipped, adam)))
    text = (made / "out" / "study.md").read_text()
    assert f"{100 * np.mean(adam):.2f} ({100 * np.std(adam, ddof=1):.2f})" in text
    page = (made / "out" / "study.html").read_text()
    assert page.count("data:image/png;base64") == 3  # results, rates, curves
    assert f"<code>python -m experiment study {made / 'tiny.toml'}</code>" in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_same_command_makes_nothing_twice_and_continues_what_was_stopped(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    start = session.start

    def counted(given: dict[str, Any], argv: list[str]) -> Outcome:
        started.append(given)
        return start(given, argv)

    monkeypatch.setattr(session, "start", counted)
    command = ["study", str(made / "tiny.toml"), "--run-dir", str(made / "out")]
    assert main(command) == 0
    assert not started
    before = (made / "out" / "study.json").read_bytes()
    stopped = made / "out" / "runs" / "adam" / "seed-2"
    (stopped / "summary.json").unlink()
    assert main(command) == 0
    assert [(given["run_dir"], given["resume"]) for given in started] == [(str(stopped), True)]
    first, second = json.loads(before), json.loads((made / "out" / "study.json").read_bytes())
    costs = ("wall_seconds", "processor_seconds", "images_per_second", "steps_per_second")
    saved = json.loads((stopped / "checkpoints" / "3" / "run.json").read_text())["clock"]
    for name in costs[:2]:  # what the first session took until its checkpoint counts too
        assert second["contestants"]["adam"]["runs"]["2"][name] > saved[name] > 0
    for study in (first, second):
        for name in costs:
            del study["contestants"]["adam"]["runs"]["2"][name]
        del study["made_with"]
    assert first == second


def test_a_run_of_an_older_checkpoint_does_not_know_its_processor_time(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiment.commands import train

    run = tmp_path / "run"
    shutil.copytree(made / "out" / "runs" / "adam" / "seed-1", run)
    load = Checkpoints.load_newest

    def older(self: Checkpoints, *args: Any) -> Any:
        found = load(self, *args)
        assert found is not None
        del found[2]["clock"]["processor_seconds"]
        return found

    monkeypatch.setattr(Checkpoints, "load_newest", older)
    assert train.main(["--run-dir", str(run), "--resume"]) == 0
    assert run_folder.read_json(run / "summary.json")["processor_seconds"] is None


def test_runs_of_another_study_are_not_mixed_in(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, STUDY.replace("lr = 0.0001", "lr = 0.0002"))
    assert main(["study", str(path), "--run-dir", str(made / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--lr: the run has 0.0001, not 0.0002" in error
    assert main(["study", str(path), "--run-dir", str(made / "out"), "--report-only"]) == 2
    assert "--lr: the run has 0.0001, not 0.0002" in capsys.readouterr().err
    summaries = sorted((made / "out").glob("**/summary.json"))
    for old, new, flag in (
        ("steps = 3\n", "steps = 4\n", "--steps"),
        ("batch_size = 16\n", "", "--batch-size"),
        ("steps = 3\n", "steps = 3\nschedule_steps = 9\n", "--schedule-steps"),
    ):
        path = write(tmp_path, STUDY.replace(old, new))
        assert main(["study", str(path), "--run-dir", str(made / "out")]) == 2
        assert flag in capsys.readouterr().err
    command = ["study", str(made / "tiny.toml"), "--run-dir", str(made / "out"), "--framework", "jax"]
    assert main(command) == 2
    assert "--framework" in capsys.readouterr().err
    assert sorted((made / "out").glob("**/summary.json")) == summaries


def test_a_diverged_run_is_told_and_does_not_stop_the_study(tmp_path: Path) -> None:
    text = STUDY.replace("seeds = [1, 2]", "seeds = [1]").replace("lr = 0.01 }", "lr = 1e38 }")
    text = text[: text.index('[[optimizers]]\nname = "clipped"')].replace(', "clipped"', "")
    text = text.replace("{ lr = 0.0001 }, ", "")
    folder = tmp_path / "out"
    assert main(["study", str(write(tmp_path, text)), "--run-dir", str(folder)]) == 0
    study = json.loads((folder / "study.json").read_text())
    assert study["contestants"]["adam"]["diverged"] == [1]
    assert "| 0 of 1 (diverged: 1) |" in (folder / "study.md").read_text()
    plan = read(tmp_path / "tiny.toml", {})
    (run,) = running.final_runs(plan, folder, plan.methods[0], 0)
    assert running.is_done(run)
    assert running.validation(run.folder) == (0.0, math.inf)


def test_a_run_that_the_last_step_broke_has_diverged(tmp_path: Path) -> None:
    """Every loss was finite, the weights after the last step are not: no mean has it, and nothing is called
    better than it."""
    text = STUDY.replace("steps = 3\n", "steps = 1\n").replace("eval_every = 3", "eval_every = 1")
    text = text.replace("{ lr = 1e-6, final_lr = 1e-6 }", "{ lr = 1e37, final_lr = 1e37 }")
    text = text.replace("{ lr = 0.5, final_lr = 0.5 }", "{ lr = 1e36, final_lr = 1e36 }")
    path, folder = write(tmp_path, text), tmp_path / "out"
    for _ in range(2):
        assert main(["study", str(path), "--run-dir", str(folder)]) == 0
    study = json.loads((folder / "study.json").read_text())
    assert study["contestants"]["clipped"]["diverged"] == [1, 2]
    assert study["contestants"]["adam"]["diverged"] == []
    text = (folder / "study.md").read_text()
    assert "| clipped | adam | 0 of 2 (diverged: 1, 2) | - | - | - |" in text
    assert "final_lr 1e+37: diverged" in text


def test_the_ends_of_a_range_and_a_dirty_tree_are_told(made: Path) -> None:
    study = json.loads((made / "out" / "study.json").read_text())
    each = study["contestants"]["adam"]
    third = {"setting": {"lr": 1.0}, "val_accuracy": [None]}
    wide = {**study, "budget": 3, "contestants": {"adam": {**each, "tuning": [*each["tuning"], third]}}}
    (row,) = list(tables.tables(wide))[-1].rows
    assert row[-2:] == ["lr 1.0: diverged", "2"]
    wide["contestants"]["adam"]["chosen"] = 0
    assert list(tables.tables(wide))[-1].rows[0][-1] == "1, edge of the range"
    made_with = [{**study["made_with"][0], "git_commit": f"{'a' * 40}{end}"} for end in ("", "-dirty")]
    assert "of commit aaaaaaaaaa, aaaaaaaaaa-dirty." in tables.head({**study, "made_with": made_with})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [1, 2]", "seeds = [-1, 2]", "seeds: must be a list of different whole numbers from 0"),
        ("steps = 3", "steps = 0", "adam: a run must have a step"),
        ('name = "adam"', 'name = "adam"\nframework = "jax"', "adam: framework is the same for all"),
        ("seeds = [1, 2]", "", "seeds: must have at least one"),
        ("seeds = [1, 2]", "seeds = [1, 9]", "seeds: must have at least one, and none of tuning_seeds"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds: must be a list of different whole numbers"),
        ("tuning_seeds = [9]", "", "tuning_seeds: needed to choose"),
        ("[base]", "colour = 1\n[base]", "colour is no part of a study"),
        ("steps = 3", "stepz = 3", "base: stepz is no option here (did you mean steps?)"),
        ("steps = 3", "steps = 'x'", "base: steps cannot be 'x'"),
        ("steps = 3", "seed = 3", "base: seed is given by the study"),
        ("steps = 3", "test = false", "base: test is given by the study"),
        ("steps = 3", "val_fraction = 0", "val_fraction: must be above 0"),
        ("lr = 0.01", "lr = -1", "--lr: -1 is out of range"),
        ("lr = 0.01", "lr = 0.01 }, { lr = 0.1", "candidates: must be equally many for each optimizer"),
        ('name = "adam"', 'name = "Adam/1"', "optimizers: name must be of small letters"),
        ('name = "adam"', 'name = "clipped"', "optimizers: two have the same name"),
        ('["adam", "clipped"]', '["adan"]', "compare_with: must be names of optimizers, or pairs"),
        ('["adam", "clipped"]', '[["adam", "adan"]]', "compare_with: must be names of optimizers, or pairs"),
        ('["adam", "clipped"]', '[["adam"]]', "compare_with: must be names of optimizers, or pairs"),
        ('["adam", "clipped"]', '[["adam", "adam"]]', "compare_with: must be names of optimizers, or pairs"),
        ('["adam", "clipped"]', '"adam"', "compare_with: must be names of optimizers, or pairs"),
        ("[[optimizers]]", "[[optimisers]]", "optimisers is no part of a study"),
        ("[base]", "[base", "cannot be read"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(
    tmp_path: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert old in STUDY
    path = write(tmp_path, STUDY.replace(old, new))
    assert main(["study", str(path), "--run-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: {path}: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_files_and_folders_that_are_not_there_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: not found" in capsys.readouterr().err
    path = write(tmp_path)
    assert main(["study", str(path), "--run-dir", str(path)]) == 2
    assert "--run-dir" in capsys.readouterr().err
    assert main(["study", str(path), "--run-dir", str(tmp_path / "out"), "--report-only"]) == 2
    assert "--report-only" in capsys.readouterr().err


def test_tables_and_curves_of_a_study_that_has_hardly_begun(tmp_path: Path) -> None:
    plan: Plan = read(write(tmp_path), {})
    study = json.loads(json.dumps(run_folder.finite(results.make(plan, [], ["tiny.toml"]))))
    text = tables.markdown(study)
    assert "| adam | - | 0 of 2 | - | - |" in text
    (image,) = curves.draw(study, [], tmp_path)
    assert image.name == "curves.png"
    assert image.stat().st_size > 0


def test_the_band_of_a_curve_stays_within_possible_values() -> None:
    accuracies = np.array([[0.0, 90.0, 50.0], [40.0, 100.0, 51.0]])
    low, high = curves.interval(accuracies, 100)
    middle = np.array([20, 95, 50.5])
    half = 12.706 * np.array([40, 10, 1]) / 2  # Student's t of two values, times sd / sqrt(2)
    assert np.allclose(low, np.clip(middle - half, 0, 100), atol=0.01)
    assert np.allclose(high, np.clip(middle + half, 0, 100), atol=0.01)
    assert curves.interval(accuracies, np.inf)[1][0] > 100  # a loss has no largest value


def test_on_a_log_axis_the_band_is_that_of_the_logarithm() -> None:
    losses = np.array([[0.01, 1.0], [1.0, 1.0]])
    low, high = curves.interval(losses, np.inf, log=True)
    factor = np.exp(12.706 * math.log(100) / 2)  # Student's t of two values, times sd / sqrt(2)
    assert np.allclose(low, [0.1 / factor, 1], rtol=1e-3)
    assert np.allclose(high, [0.1 * factor, 1], rtol=1e-3)
    assert curves.interval(losses, np.inf)[0][0] == 0  # a log axis cannot show it


def test_a_diverged_configuration_is_a_cross_and_does_not_stretch_the_axis() -> None:
    study = json.loads((FOLDER.parent / "docs" / "studies" / "mnist-tenth.json").read_text())
    rates = study["contestants"]["sgd"]["tuning"]
    rates[2]["val_accuracy"] = [None]
    figure = curves._draw_rates(study)
    panels = {axes.get_title(): axes for axes in figure.axes}
    crosses = {name: [*axes.lines[-2].get_xdata()] for name, axes in panels.items() if axes.lines}
    assert crosses["sgd"] == [1.0]
    assert crosses["adam"] == []
    assert panels["sgd"].get_ylim()[0] > 80
    assert "cross: diverged" in figure.get_suptitle()


@pytest.mark.parametrize(
    "path", sorted((FOLDER.parent / "docs" / "studies").glob("*.json")), ids=lambda p: p.stem
)
def test_results_and_rates_are_drawn_from_the_stored_study(path: Path, tmp_path: Path) -> None:
    study = json.loads(path.read_text())
    tuned = any(len(method["tuning"]) > 1 for method in study["contestants"].values())
    names = [f"{path.stem}-results.png", *[f"{path.stem}-rates.png"] * tuned]
    assert [drawn.name for drawn in curves.draw_numbers(study, tmp_path, f"{path.stem}-")] == names
    for name in names:
        assert (path.parent / name).is_file()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_of_the_tree_can_be_read(path: Path) -> None:
    plan = read(path, {})
    text = path.read_text()
    assert text.startswith(f"# python -m experiment study studies/{path.name}")
    runs = sum(len(method.trials) + len(plan.seeds) for method in plan.methods)
    assert f"{runs} runs" in text
    for method in plan.methods:
        optimizer = resolve(method.candidates[0]).optimizer
        assert optimizer in OPTIMIZERS or is_external(optimizer)


def test_variants_are_compared_with_the_first() -> None:
    pairs = read(FOLDER / "batch-norm.toml", {}).comparisons()
    assert ("sgd-no-batch-norm", "adam-no-batch-norm") in pairs
    assert ("sgd-no-batch-norm", "sgd-batch-norm") in pairs
    assert ("sgd-batch-norm", "sgd-no-batch-norm") not in pairs
    assert len(pairs) == 7


def test_flags_are_the_inverse_of_parse() -> None:
    argv = ["--no-batch-norm", "--lr", "0.003", "--milestones", "3", "5", "--schedule", "multistep"]
    options = parse([*argv, "--grayscale", "--run-dir", "x"])
    assert parse(flags(options)) == options
    assert flags({"batch_norm": True, "grayscale": False, "lr": None, "milestones": ()}) == []


def test_intervals_are_students() -> None:
    """Of 1 to 5: the mean 3, the deviation sqrt(2.5), t(0.975, 4) = 2.776445."""
    found = summarize([1, 2, 3, 4, 5])
    assert (found.n, found.mean) == (5, 3)
    assert found.sd == pytest.approx(math.sqrt(2.5))
    assert found.half_width == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert paired([2, 4, 6], [1, 2, 3]) == summarize([1, 2, 3])
    assert math.isnan(summarize([1.0]).half_width)
    assert math.isnan(summarize([]).mean)


def stop_in_validation(part: str, time: int, number: int) -> None:
    """Send SIGTERM in the first validation; the main thread, which waits for the others, hears it."""
    with signals.listen() as request:  # in a thread this only reads
        if part == "val" and request.signal is None:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                if request.signal is None:
                    sleep(0.01)


def test_a_signal_stops_a_study_and_its_run_goes_on(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the validation of its first run, which then ends as that of a study that nothing stopped."""
    path = write(tmp_path, STUDY.replace("[base]", "[base]\nreport = false"))
    with pytest.MonkeyPatch.context() as patch:
        hook_data(patch, send(signal.SIGHUP, ("val", 0, 0)))
        assert main(["study", str(path), "--run-dir", str(tmp_path / "out")]) == 128 + signal.SIGHUP
    err = capsys.readouterr().err
    assert "adam, lr 0.0001, seed 9: " in err
    assert "stopped by SIGHUP at step 3; everything is saved" in err
    assert err.endswith("\nthe same command continues\n")
    plan = read(path, {})
    runs = running.candidate(tmp_path / "out", plan.methods[0], 0)
    request = signals.StopRequest()
    assert _make([runs], 0, 1, request=request, together=False, at_once=1, split="validation") == 1
    (expected,) = running.candidate(made / "out", plan.methods[0], 0)
    metrics = [(each.folder / "metrics.jsonl").read_bytes() for each in (*runs, expected)]
    assert metrics[0] == metrics[1]


def test_a_signal_between_the_runs_of_a_study_is_heard(tmp_path: Path) -> None:
    plan = read(write(tmp_path), {})
    request = signals.StopRequest(signal.SIGUSR1)
    runs = running.candidate(tmp_path, plan.methods[0], 0)
    with pytest.raises(running.StudyStoppedError, match="stopped by SIGUSR1") as caught:
        _make([runs], 0, 1, request=request, together=False, at_once=1, split="test")
    assert caught.value.status == 128 + signal.SIGUSR1
    assert not runs[0].folder.exists()


@pytest.mark.slow
def test_seeds_together_write_the_runs_of_seeds_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """JAX, by vmap and one after another: the same lines to rounding. Runs at different steps go alone.

    Those by vmap are stopped by a signal in their first validation; all stop at that step, and go on from it.
    """
    text = STUDY[: STUDY.index('[[optimizers]]\nname = "clipped"')].replace(', "clipped"', "")
    text = text.replace("{ lr = 0.0001 }, ", "").replace('"numpy"', '"jax"').replace("steps = 3", "steps = 6")
    path = write(tmp_path, text)
    alone = running.carry_out
    with monkeypatch.context() as patch:
        hook_data(patch, stop_in_validation)
        patch.setattr(running, "carry_out", None)
        status = main(["study", str(path), "--run-dir", str(tmp_path / "--vmap"), "--vmap"])
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM\nthe same command continues\n" in capsys.readouterr().err
    for seed in ("seed-1", "seed-2"):
        run_dir = tmp_path / "--vmap" / "runs" / "adam" / seed
        assert Checkpoints(run_dir / "checkpoints", 1).steps() == [3]
        assert not list(running.lines(run_dir, "val"))
    for flag, carry_out in (("--vmap", None), ("--no-vmap", alone)):
        monkeypatch.setattr(running, "carry_out", carry_out)
        assert main(["study", str(path), "--run-dir", str(tmp_path / flag), flag]) == 0
    for seed in ("seed-1", "seed-2"):
        summary = run_folder.read_json(tmp_path / "--vmap" / "runs" / "adam" / seed / "summary.json")
        assert summary["processor_seconds"] is None  # that of one process, in which both trained
        vmapped, separate = (tmp_path / flag / "runs" / "adam" / seed for flag in ("--vmap", "--no-vmap"))
        for split, scope in (("train", "step"), ("val", "epoch"), ("test", "epoch")):
            for found, wanted in zip(
                running.lines(vmapped, split, scope), running.lines(separate, split, scope), strict=True
            ):
                assert found.keys() == wanted.keys()
                numbers = [key for key, value in wanted.items() if isinstance(value, float)]
                assert [found[key] for key in numbers] == pytest.approx(
                    [wanted[key] for key in numbers], rel=1e-3
                )
        array = weights.load(vmapped / "weights.safetensors")["fc.weight"]
        wanted_array = weights.load(separate / "weights.safetensors")["fc.weight"]
        np.testing.assert_allclose(array, wanted_array, atol=1e-4)
    run = running.Run(tmp_path / "--vmap" / "runs" / "adam" / "seed-1", {}, "")
    fresh = running.Run(tmp_path / "fresh", {}, "")
    assert not running.can_go_together([run, fresh])
    assert not running.can_go_together([fresh])


def test_vmap_is_jaxs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(write(tmp_path)), "--run-dir", str(tmp_path / "out"), "--vmap"]) == 2
    assert "--vmap: needs --framework jax" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
