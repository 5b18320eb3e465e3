"""Studies that search: points, scores, a small one from end to end, its logs, and claims on made data."""

from __future__ import annotations

import csv
import json
import math
import signal
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from experiment.__main__ import main
from experiment.errors import UserError
from experiment.files import run_folder
from experiment.options.resolving import resolve
from experiment.run import signals
from experiment.study import logs, results, running, scores, search_figures, tables
from experiment.study.jobs import carry_out_side_by_side, share
from experiment.study.plan import Plan, from_text, read
from experiment.study.space import draw
from experiment.study.statistics import holm, p_value
from tests.helpers.studies import one_process, run_study

__all__ = ["one_process"]  # the fixture, for every test here

FOLDER = Path(__file__).parents[1] / "studies"
STUDY = """
seeds = [1, 2]
studies = 2
trials = 2

[base]
framework = "numpy"
model = "cnn"
steps = 4
eval_every = 2
batch_size = 16

[[workloads]]
name = "easy"
target = { accuracy = 0.01 }
target_found = "any network reaches it"

[[optimizers]]
name = "adam"
space = { lr = [1e-4, 1e-1], weight_decay = [1e-6, 1e-3], beta1 = 0.8 }

[[optimizers]]
name = "sgd-published"
optimizer = "sgd"
space = {}
"""


def write(folder: Path, text: str = STUDY) -> Path:
    """A study's file."""
    path = folder / "search.toml"
    path.write_text(text)
    return path


def to_toml(table: dict[str, Any]) -> str:
    """A study's table as TOML: tables and lists of tables inline."""

    def value(entry: Any) -> str:
        if isinstance(entry, dict):
            return "{ " + ", ".join(f"{name} = {value(inner)}" for name, inner in entry.items()) + " }"
        if isinstance(entry, list):
            return "[" + ", ".join(map(value, entry)) + "]"
        return json.dumps(entry)

    return "\n".join(f"{name} = {value(entry)}" for name, entry in table.items())


@pytest.fixture(scope="module")
def evaluated() -> list[str]:
    """The splits that the runs of `made` evaluated, in order."""
    return []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, evaluated: list[str]) -> Path:
    """The folder of a finished study of STUDY, beside its file."""
    folder = tmp_path_factory.mktemp("search")
    evaluated += run_study(write(folder), folder / "out")
    return folder


def results_of(folder: Path) -> Any:
    return json.loads((folder / "study.json").read_text())


# --- points -------------------------------------------------------------------------------------------------


def test_points_are_a_function_of_the_file_and_fill_the_space() -> None:
    ranges = {"lr": (1e-5, 1e-1), "weight_decay": (1e-6, 1e-2)}
    points = draw(ranges, 64, seed=0)
    assert points == draw(ranges, 64, seed=0)
    assert points[:9] == draw(ranges, 9, seed=0)
    assert points != draw(ranges, 64, seed=1)
    alone = draw({"lr": ranges["lr"]}, 64, seed=0)
    assert [point["lr"] for point in alone] == [point["lr"] for point in points]
    for name, (low, high) in ranges.items():
        places = np.log([point[name] / low for point in points]) / math.log(high / low)
        assert (places >= 0).all()
        assert (places <= 1).all()
        counts, _ = np.histogram(places, bins=8, range=(0, 1))
        assert counts.min() >= 5, (name, counts)  # 8 on average; independent draws have fewer now and then


def test_a_whole_number_is_drawn_as_one() -> None:
    points = draw({"warmup_steps": (10, 500), "lr": (1e-3, 1e-1)}, 20, seed=0)
    assert all(type(point["warmup_steps"]) is int and 10 <= point["warmup_steps"] <= 500 for point in points)
    assert len({point["warmup_steps"] for point in points}) > 10


def test_trials_have_points_and_seeds_of_their_own() -> None:
    plan = from_text("search", STUDY, {})
    adam, sgd = plan.methods
    assert [method.name for method in plan.methods] == ["adam-easy", "sgd-published-easy"]
    assert [tuple(trial)[:4] for trial in adam.trials] == [
        (1, 1, 0, 1001),
        (1, 2, 1, 1002),
        (2, 1, 2, 2001),
        (2, 2, 3, 2002),
    ]
    assert [tuple(trial)[:4] for trial in sgd.trials] == [
        (1, 1, 0, 1001),
        (1, 2, 0, 1002),
        (2, 1, 0, 2001),
        (2, 2, 0, 2002),
    ]
    for options, point in zip(adam.candidates, adam.configurations, strict=True):
        assert options["beta1"] == 0.8
        assert {name: options[name] for name in ("lr", "weight_decay")} == point
    assert sgd.configurations == ({},)
    assert resolve(sgd.candidates[0]).lr == 0.1
    assert plan.workloads[0].target == 0.01


def test_points_are_the_same_on_all_workloads() -> None:
    text = STUDY + '\n[[workloads]]\nname = "other"\nbatch_size = 8\n'
    plan = from_text("search", text, {})
    by_name = {method.name: method for method in plan.methods}
    assert by_name["adam-easy"].configurations == by_name["adam-other"].configurations
    assert by_name["adam-other"].candidates[0]["batch_size"] == 8
    assert plan.comparisons() == [("sgd-published-easy", "adam-easy"), ("sgd-published-other", "adam-other")]
    plan = from_text("search", 'compare_with = [["adam", "sgd-published"]]\n' + text, {})
    assert plan.comparisons() == [("adam-easy", "sgd-published-easy"), ("adam-other", "sgd-published-other")]


def test_given_points_are_tried_by_each_study() -> None:
    text = STUDY.replace("space = {}", "candidates = [{ lr = 0.1 }, { lr = 1.0 }]")
    (_, sgd) = from_text("search", text, {}).methods
    assert [(trial.study, trial.point) for trial in sgd.trials] == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_arguments_of_a_transformation_come_from_the_space(tmp_path: Path) -> None:
    text = STUDY.replace('"numpy"', '"jax"').replace("space = {}", "space = { lr = 0.1 }")
    text += '[[optimizers]]\nname = "lion"\noptimizer = "optax:lion"\nclip_grad_norm = 1.0\n'
    text += "optimizer_arguments = { mu_dtype = 'float32' }\n"
    text += "space = { lr = [1e-5, 1e-2], weight_decay = [1e-3, 1.0], b1 = 0.8 }\n"
    text += '[[optimizers]]\nname = "mine"\noptimizer = "mine.py:make"\nspace = { lr = [1e-3, 1e-1] }\n'
    *_, lion, mine = read(write(tmp_path, text), {}).methods
    config = resolve(lion.candidates[0])
    point = lion.configurations[0]
    assert (config.optimizer, config.lr, config.clip_grad_norm) == ("optax:lion", point["lr"], 1.0)
    expected = {"mu_dtype": "float32", "b1": 0.8, "weight_decay": point["weight_decay"]}
    assert config.external_arguments() == expected
    assert resolve(mine.candidates[0]).optimizer == f"{tmp_path / 'mine.py'}:make"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("studies = 2", "studies = 0", "studies: must be a whole number from 1 to 999, not 0"),
        ("trials = 2", "trials = 1.5", "trials: must be a whole number"),
        ("studies = 2", "space_seed = -1", "space_seed: must be a whole number from 0"),
        ("trials = 2", "trials = 2\ntuning_seeds = [9]", "tuning_seeds: each trial of a search has its own"),
        ("seeds = [1, 2]", "seeds = [1, 2002]", "seeds: 2002 is the seed of a trial"),
        ("lr = [1e-4, 1e-1]", "lr = [1e-1, 1e-4]", "adam: space: lr must be [low, high], 0 < low < high"),
        ("lr = [1e-4, 1e-1]", "lr = [0, 1e-4]", "adam: space: lr must be [low, high]"),
        ("lr = [1e-4, 1e-1]", "lr = [1e-4, 1e-3, 1e-2]", "adam: space: lr must be [low, high]"),
        ("lr = [1e-4, 1e-1]", "lrr = [1e-4, 1e-1]", "adam: lrr is no option here (did you mean lr?)"),
        ("lr = [1e-4, 1e-1]", "model = [1e-4, 1e-1]", "adam: model cannot be"),
        ("lr = [1e-4, 1e-1]", "beta2 = [0.9, 1.9]", "--beta2"),
        ("space = {}", "space = 1", "sgd-published: space must be a table"),
        ("space = {}", "space = {}\ncandidates = [{}]", "sgd-published: has a space and candidates"),
        ("space = {}", "candidates = [{}]", "sgd-published: candidates must be as many as trials, 2, not 1"),
        ("{ accuracy = 0.01 }", "{ accuracy = 1.1 }", "easy: target must be { accuracy = A }"),
        ("{ accuracy = 0.01 }", "{ loss = 0.1 }", "easy: target must be { accuracy = A }"),
        ("{ accuracy = 0.01 }", "0.9", "easy: target must be { accuracy = A }"),
        ('target_found = "any network reaches it"\n', "", "easy: target_found must say in a sentence"),
        ("target = { accuracy = 0.01 }\n", "", "easy: target_found without a target"),
        ("[[workloads]]", '[[variants]]\nname = "x"\n[[workloads]]', "name all under one of the two"),
        ("steps = 4", "steps = 4\nval_fraction = 0", "val_fraction: must be above 0"),
        ('optimizer = "sgd"', 'optimizer = "optax:sgd"', "--optimizer: optax:sgd needs --framework jax"),
        ('optimizer = "sgd"', "optimizer = 3", "sgd-published: optimizer cannot be 3"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FILE", "--jobs", "0"], "--jobs: 0 is out of range"),
        (["FILE", "--only", "adam", "nobody"], "--only: the study has no nobody; name some of adam, easy"),
        (["FILE", "--out", "x"], "--out: is for --from-logs"),
        ([], "STUDY: is missing"),
        (["--from-logs", "absent.xz"], "--out: is missing"),
        (["FILE", "--from-logs", "absent.xz", "--out", "x"], "--from-logs: has the study in its files"),
        (["--from-logs", "absent.xz", "--out", "x"], "--from-logs: absent.xz not found"),
        (["--from-logs", "FILE", "--out", "x"], "cannot be read"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path))
    assert main(["study", *(word.replace("FILE", path) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_transformation_that_cannot_be_made_is_refused_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = STUDY.replace('"numpy"', '"jax"').replace('optimizer = "sgd"', 'optimizer = "optax:lion"')
    path = write(tmp_path, text.replace("space = {}", "space = { lr = [1e-4, 1e-2], b3 = 0.9 }"))
    assert main(["study", str(path), "--run-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "optimizers: sgd-published: optax:lion: " in error
    assert "unexpected keyword argument 'b3'" in error
    assert not (tmp_path / "out").exists()


# --- scores and tests ---------------------------------------------------------------------------------------


def test_steps_to_a_target() -> None:
    assert scores.steps_to_target([2, 4, 6], [0.1, 0.5, 0.4], 0.5) == 4
    assert scores.steps_to_target([2, 4], [0.1, None], 0.5) == math.inf
    assert scores.steps_to_target([], [], 0.5) == math.inf  # it diverged before its first validation
    assert scores.median_of_best([[6, math.inf], [4, 8], [math.inf, math.inf]]) == 6
    assert scores.median_of_best([[4.0], [math.inf]]) == math.inf
    assert math.isnan(scores.median_of_best([]))


def test_profiles_with_ties_and_misses() -> None:
    """Dolan & More by hand: a and b tie on the first, b alone ends the second, none ends the third."""
    steps = {
        "first": {"a": 100.0, "b": 100.0, "c": 150.0},
        "second": {"a": math.inf, "b": 80.0, "c": 320.0},
        "third": {"a": math.inf, "b": math.inf, "c": math.inf},
    }
    of_all = scores.ratios(steps)
    assert of_all["first"] == {"a": 1, "b": 1, "c": 1.5}
    assert of_all["second"] == {"a": math.inf, "b": 1, "c": 4}
    assert set(of_all["third"].values()) == {math.inf}
    rho = {method: [scores.profile(method, of_all, tau) for tau in (1, 1.5, 4)] for method in "abc"}
    assert rho == {"a": [1 / 3] * 3, "b": [2 / 3] * 3, "c": [0, 1 / 3, 2 / 3]}
    areas = [scores.area(method, of_all) for method in "abc"]
    assert areas == pytest.approx([1 / 3, 2 / 3, (4 - 1.5) / 3 / 3])
    grid = np.linspace(1, 4, 3001)
    for method, area in zip("abc", areas, strict=True):
        assert np.mean([scores.profile(method, of_all, tau) for tau in grid]) == pytest.approx(area, abs=1e-3)


def test_the_best_point() -> None:
    assert scores.best_point([(0, 0.5, 1.0), (1, 0.7, 1.0), (2, 0.6, 0.1)]) == 1
    assert scores.best_point([(0, 0.5, 1.0), (1, 0.5, 0.9)]) == 1  # by the loss
    assert scores.best_point([(1, 0.5, 1.0), (0, 0.5, 1.0)]) == 0  # by the order
    assert scores.best_point([(0, 0.9, 1.0), (0, 0.1, 1.0), (1, 0.6, 1.0)]) == 1  # the mean of its trials
    assert scores.best_point([(0, 0.0, math.inf), (1, 0.0, math.inf)]) == 0  # all diverged
    assert scores.best_point([]) is None


def test_p_values_are_scipys_and_need_spread() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 20):
        first, second = rng.normal(size=(2, n))
        assert p_value(list(first - second)) == pytest.approx(ttest_rel(first, second).pvalue, rel=1e-9)
    assert p_value([0.0, 0.0, 0.0]) == 1
    assert p_value([0.91 - 0.9, 0.95 - 0.94, 0.31 - 0.3]) == 1  # equal but for rounding
    assert p_value([0.1]) == 1


def test_holm() -> None:
    """The example of R's p.adjust."""
    given = [0.01, 0.02, 0.03, 0.04, 0.05]
    assert holm(given) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


# --- from end to end ----------------------------------------------------------------------------------------


def test_trials_never_evaluate_the_test_set(made: Path, evaluated: list[str]) -> None:
    """Eight trials validate twice; four final runs validate twice and are tested once."""
    assert evaluated == ["val"] * 16 + ["val", "val", "test"] * 4
    assert len(list((made / "out" / "tuning").glob("*/study-*/trial-*"))) == 8
    for folder in (made / "out" / "tuning").glob("*/*/*"):
        assert run_folder.read_json(folder / "summary.json")["test"] is None
        assert not (folder / "predictions.npz").exists()


def test_a_search_is_scored_and_chosen(made: Path) -> None:
    study = results_of(made / "out")
    plan = read(made / "search.toml", {})
    for method in plan.methods:
        found = study["contestants"][method.name]
        assert [(t["study"], t["trial"], t["seed"]) for t in found["trials"]] == [
            (trial.study, trial.number, trial.seed) for trial in method.trials
        ]
        for trial, planned in zip(found["trials"], method.trials, strict=True):
            assert trial["point"] == method.configurations[planned.point]
            folder = made / "out" / "tuning" / method.name / planned.folder
            assert trial["val_accuracy"] == running.validation(folder)[0]
            assert trial["processor_seconds"] > 0
        best = [max(t["val_accuracy"] for t in found["trials"] if t["study"] == k) for k in (1, 2)]
        if method.optimizer == "adam":
            assert found["setting"] in [t["point"] for t in found["trials"] if t["val_accuracy"] == max(best)]
        else:
            assert (found["chosen"], found["setting"]) == (0, {})
        assert found["best_of_studies"] == [2, 2]
        assert found["score"] == 2
        for seed in study["seeds"]:
            config = run_folder.read_record(made / "out" / "runs" / method.name / f"seed-{seed}")["config"]
            assert {name: config[name] for name in found["setting"]} == found["setting"]
    assert study["scores"] == {"easy": {"adam": 2, "sgd-published": 2}}
    assert study["profiles"] == {"adam": 1, "sgd-published": 1}
    (pair,) = study["comparisons"]
    differences = [
        study["contestants"]["sgd-published-easy"]["runs"][seed]["accuracy"]
        - study["contestants"]["adam-easy"]["runs"][seed]["accuracy"]
        for seed in ("1", "2")
    ]
    assert pair["p_holm"] == pair["p"] == p_value(differences)
    of_studies = {
        name: [max(t["val_accuracy"] for t in method["trials"] if t["study"] == k) for k in (1, 2)]
        for name, method in study["contestants"].items()
    }
    expected = np.subtract(of_studies["sgd-published-easy"], of_studies["adam-easy"])
    assert pair["of_studies"] == list(expected)


def test_tables_and_figures_of_a_search(made: Path) -> None:
    titles = [table.title for table in tables.tables(results_of(made / "out"))]
    assert titles == ["Steps to the target", "Test results", "Differences, seed by seed", "Trials", "Cost"]
    text = (made / "out" / "study.md").read_text()
    assert "| adam | 2 (2, 2) | 1.00 |" in text
    assert "easy, 1 %: any network reaches it" in text
    assert "| sgd-published-easy | fixed | 4 | 0 |" in text
    assert "| adam-easy | lr 0.0001 to 0.1, weight_decay 1e-06 to 0.001 | 4 | 0 |" in text
    assert "| all | 12 | 0 |" in text
    names = {path.stem for path in (made / "out").glob("*.png")}
    assert names == {"results", "profiles", "quantiles", "sensitivity-easy", "curves-easy"}
    assert (made / "out" / "study.html").read_text().count("data:image/png;base64") == 5


def test_every_run_is_a_line_of_the_csv(made: Path) -> None:
    rows = list(csv.DictReader((made / "out" / "runs.csv").read_text().splitlines()))
    study = results_of(made / "out")
    assert len(rows) == 12
    trials = [row for row in rows if row["method"] == "adam" and row["kind"] == "trial"]
    for row, trial in zip(trials, study["contestants"]["adam-easy"]["trials"], strict=True):
        assert float(row["lr"]) == trial["point"]["lr"]
        assert float(row["val_accuracy"]) == trial["val_accuracy"]
        assert (row["workload"], row["outcome"], row["test_accuracy"]) == ("easy", "completed", "")
    finals = [row for row in rows if row["method"] == "sgd-published" and row["kind"] == "final"]
    runs = study["contestants"]["sgd-published-easy"]["runs"]
    assert {row["seed"]: float(row["test_accuracy"]) for row in finals} == {
        seed: run["accuracy"] for seed, run in runs.items()
    }


def test_everything_is_made_from_the_logs_alone(made: Path, tmp_path: Path) -> None:
    out = made / "out"
    assert (out / logs.NAME).stat().st_size < 20_000
    assert main(["study", "--from-logs", str(out / logs.NAME), "--out", str(tmp_path / "new")]) == 0
    again, first = results_of(tmp_path / "new"), results_of(out)
    del again["command"], first["command"]
    assert again == first
    for path in [*out.glob("*.png"), out / "runs.csv", out / logs.NAME]:
        assert (tmp_path / "new" / path.name).read_bytes() == path.read_bytes(), path.name
    body = (out / "study.md").read_text().split("\n\n", 2)[2]
    assert (tmp_path / "new" / "study.md").read_text().endswith(body)
    assert "--from-logs" in (tmp_path / "new" / "study.md").read_text()


def test_the_records_of_runs(made: Path) -> None:
    _, records = logs.read(made / "out" / logs.NAME)
    assert len(records) == 12
    for record in records:
        assert record["validation"]["step"] == [2, 4]
        assert record["train"]["step"] == [1, 2, 3, 4]
        assert len(record["train"]["loss"]) == 4
        assert record["options"]["steps"] == 4
        assert "data_dir" not in record["options"]
        assert record["made_with"][0]["versions"]["numpy"] == np.__version__
        assert (record["test"] is None) is (record["trial"] is not None)


def test_halves_are_joined(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each machine runs one method; a run may be in both files, if its numbers are the same."""
    plan, records = logs.join([made / "out" / logs.NAME])
    halves = [[r for r in records if r["method"].startswith(name)] for name in ("adam", "sgd")]
    halves[1].append({**halves[0][0], "cost": {**halves[0][0]["cost"], "wall_seconds": 1e6}})
    files = [tmp_path / "one.xz", tmp_path / "two.xz"]
    for path, half in zip(files, halves, strict=True):
        logs.write(path, plan, half)
    assert main(["study", "--from-logs", *map(str, files), "--out", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / logs.NAME).read_bytes() == (made / "out" / logs.NAME).read_bytes()
    assert results_of(tmp_path / "both")["profiles"] == {"adam": 1, "sgd-published": 1}
    assert main(["study", "--from-logs", str(files[1]), "--out", str(tmp_path / "half")]) == 0
    assert "1 of 2 studies" not in (tmp_path / "half" / "study.md").read_text()
    assert "| adam | 0 of 2 studies | - |" in (tmp_path / "half" / "study.md").read_text()

    changed = json.loads(json.dumps(halves[0][0]))
    changed["validation"]["accuracy"][0] += 0.01
    other = from_text("search", plan.file.replace("seeds = [1, 2]", "seeds = [1, 3]"), {})
    foreign = {**halves[0][0], "seed": 77}
    cases: list[tuple[str, Plan, list[Any], str]] = [
        ("contradiction.xz", plan, [changed], "about adam-easy, 1, 1, 1001: its validation differs"),
        ("other.xz", other, [], "is of another study than"),
        ("foreign.xz", plan, [foreign], "a run that the study does not have: adam-easy, 1, 1, 77"),
    ]
    for name, of, records, message in cases:
        logs.write(tmp_path / name, of, records)
        capsys.readouterr()
        command = ["study", "--from-logs", str(files[0]), str(tmp_path / name), "--out", str(tmp_path / "no")]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "no").exists()
    (tmp_path / "cut.xz").write_bytes(files[0].read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cut\.xz cannot be read"):
        logs.read(tmp_path / "cut.xz")


def test_a_part_of_a_study_is_run_by_the_names_of_its_methods(made: Path, tmp_path: Path) -> None:
    """Made beside the whole one: the same records, but for their cost."""
    out = tmp_path / "out"
    assert main(["study", str(made / "search.toml"), "--run-dir", str(out), "--only", "sgd-published"]) == 0
    assert {path.name for path in (out / "tuning").iterdir()} == {"sgd-published-easy"}
    _, whole = logs.read(made / "out" / logs.NAME)
    _, part = logs.read(out / logs.NAME)
    by_key = {logs.key_of(record): record for record in whole}
    assert len(part) == 6
    assert all(logs.contradiction(record, by_key[logs.key_of(record)]) is None for record in part)


def test_a_study_that_has_begun_has_tables(made: Path, tmp_path: Path) -> None:
    """After some of its records: nothing is scored, chosen or compared before its trials have ended."""
    plan, records = logs.join([made / "out" / logs.NAME])
    for count in (0, 1, 5, 9):
        study = json.loads(json.dumps(run_folder.finite(results.make(plan, records[:count], []))))
        assert tables.markdown(study)
        assert results.to_csv(study).count("\n") == 1 + count
        search_figures.draw(study, tmp_path)
        if count < 4:
            assert study["scores"] == {}
            assert all(method["chosen"] is None for method in study["contestants"].values())


# --- side by side -------------------------------------------------------------------------------------------


def test_shares_of_the_cores() -> None:
    assert [list(share(range(5), slot, 2)) for slot in (0, 1)] == [[0, 1], [2, 3]]
    assert [list(share([3], slot, 2)) for slot in (0, 1)] == [[3], [3]]


def small(folder: Path) -> tuple[Plan, list[running.Run]]:
    """A study of one method, and its four trials."""
    text = STUDY[: STUDY.index('[[optimizers]]\nname = "sgd-published"')]
    plan = read(write(folder, text), {})
    return plan, running.trial_runs(folder / "out", plan.methods[0])


def test_runs_side_by_side_are_those_of_the_study(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time, stopped after the first has ended; the same command continues."""
    _, runs = small(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in `made`
    request, ended = signals.StopRequest(), list[running.Run]()

    def stop(run: running.Run, seconds: float) -> None:
        assert seconds > 0
        ended.append(run)
        request.signal = signal.SIGTERM

    with pytest.raises(running.StudyStoppedError, match="stopped by SIGTERM") as caught:
        carry_out_side_by_side(runs, 2, request, stop)
    assert caught.value.status == 128 + signal.SIGTERM
    assert 1 <= len(ended) <= 2
    assert not runs[-1].folder.exists()
    rest = [run for run in runs if not running.is_done(run)]
    assert len(rest) >= 2
    carry_out_side_by_side(rest, 2, signals.StopRequest(), lambda run, seconds: None)
    for run in runs:
        expected = made / run.folder.relative_to(tmp_path)
        assert (run.folder / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()


def test_a_run_that_fails_beside_others_is_named(tmp_path: Path) -> None:
    _, runs = small(tmp_path)
    broken = running.Run(runs[0].folder, {**runs[0].options, "dataset": "nothing_of_this_name"}, "broken")
    with pytest.raises((UserError, running.StudyStoppedError), match="nothing_of_this_name"):
        carry_out_side_by_side([broken, runs[1]], 2, signals.StopRequest(), lambda run, seconds: None)


# --- the studies of the tree, in small ----------------------------------------------------------------------


OF_REAL_DATA = (
    *("train_subset", "epochs", "init_from", "freeze_backbone", "batch_norm", "augment"),
    "warmup_steps",
)
SEARCHES = [path for path in sorted(FOLDER.glob("*.toml")) if "[[workloads]]" in path.read_text()]


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_a_study_of_the_tree_in_small(path: Path, tmp_path: Path) -> None:
    """The same file, with two trials, one workload on digits, and one seed: all train, all is drawn."""
    table = tomllib.loads(path.read_text())
    workload = {**table["workloads"][0], "dataset": "digits", "model": "cnn", "steps": 2, "eval_every": 2}
    for name in OF_REAL_DATA:
        workload.pop(name, None)
        table.get("base", {}).pop(name, None)
    small_table = {**table, "studies": 1, "trials": 2, "seeds": [1], "workloads": [workload]}
    file = tmp_path / path.name
    file.write_text(to_toml(small_table))
    assert main(["study", str(file), "--run-dir", str(tmp_path / "out")]) == 0
    study = results_of(tmp_path / "out")
    assert len(study["contestants"]) == len(table["optimizers"])
    for name, method in study["contestants"].items():
        assert len(method["trials"]) == 2, name
        assert len(method["runs"]) + len(method["diverged"]) == 1, name
    assert (tmp_path / "out" / "study.html").stat().st_size > 10_000


# --- claims on made data ------------------------------------------------------------------------------------


MADE = """
seeds = [1, 2, 3, 4, 5]

[base]
framework = "numpy"
model = "cnn"
steps = 1000
eval_every = 50

[[workloads]]
name = "first"
target = { accuracy = 0.8 }
target_found = "made"

[[workloads]]
name = "second"
target = { accuracy = 0.8 }
target_found = "made"

[[optimizers]]
name = "adam"
space = { lr = [1e-4, 1e-1] }

[[optimizers]]
name = "sgd"
space = { lr = [1e-3, 1.0] }

[[optimizers]]
name = "amsgrad"
space = { lr = [1e-4, 1e-1] }
"""
REPETITIONS = 1000
STEPS = np.arange(50, 1001, 50)


def made_records(
    plan: Plan, rng: np.random.Generator, better: dict[str, float], speed: dict[str, float], optimum: float
) -> list[logs.Record]:
    """The records of a study whose runs follow from a formula and chance.

    Args:
        plan: the study.
        rng: chance; seeds of final runs have an effect that all methods share.
        better: what is added to a method's test accuracy.
        speed: the factor of a method's speed.
        optimum: how much accuracy a trial loses a decade from the best rate.
    """
    records: list[logs.Record] = []
    of_seed = rng.normal(0, 0.005, len(plan.seeds))
    for method in plan.methods:
        low, high = method.ranges["lr"]
        best_rate = math.sqrt(low * high)
        runs: list[tuple[Any, Any, int, int, float]] = [
            (trial.study, trial.number, trial.seed, trial.point, 0.0) for trial in method.trials
        ]
        point = None
        for finals in (False, True):
            if finals:
                point = logs.chosen(method, [r for r in records if r["method"] == method.name])
                assert point is not None
                runs = [(None, None, s, point, of_seed[i]) for i, s in enumerate(plan.seeds)]
            for study, number, seed, k, effect in runs:
                distance = math.log10(method.configurations[k]["lr"] / best_rate)
                top = 0.9 - optimum * distance**2 + effect + rng.normal(0, 0.005)
                top += better.get(method.optimizer, 0.0) if finals else 0.0
                rate = speed.get(method.optimizer, 1.0) * rng.lognormal(0, 0.1) / 150
                accuracy = np.clip(top * (1 - np.exp(-STEPS * rate)), 0, 1)
                records.append(record(method.name, study, number, seed, accuracy, top))
    return records


def record(method: str, study: Any, number: Any, seed: int, accuracy: Any, top: float) -> logs.Record:
    """A run that ended, without what no table needs."""
    test: Any = {"accuracy": top, "loss": 1 - top, "f1": top} if study is None else None
    cost: Any = {"wall_seconds": 1.0, "processor_seconds": 1.0, "steps_per_second": 1.0}
    return {
        "method": method,
        "study": study,
        "trial": number,
        "seed": seed,
        "point": {},
        "options": {},
        "outcome": "completed",
        "validation": {"step": list(STEPS), "accuracy": list(accuracy), "loss": [0.1] * len(STEPS)},
        "train": {},
        "train_loss": 0.1,
        "test": test,
        "cost": cost,
        "made_with": [],
    }


def claims(study: Any) -> dict[tuple[str, str], str]:
    """What the table of differences says: {(method, compared with): "better" or "worse"}."""
    return {
        (pair["of"], pair["with"]): tables._comparison(pair, 5)[5]
        for pair in study["comparisons"]
        if tables._comparison(pair, 5)[5]
    }


def test_a_known_winner_is_found() -> None:
    """sgd is 3 points better on both workloads, and twice as fast; amsgrad is no different from adam."""
    plan, rng = from_text("made", MADE, {}), np.random.default_rng(0)
    found = 0
    for _ in range(REPETITIONS):
        study = results.make(plan, made_records(plan, rng, {"sgd": 0.03}, {"sgd": 2.0}, 0.0), [])
        expected = {(f"sgd-{w}", f"adam-{w}"): "better" for w in ("first", "second")}
        fastest = max(study["profiles"], key=study["profiles"].__getitem__)
        found += claims(study) == expected and fastest == "sgd"
    assert found >= 900, found


def test_no_difference_is_rarely_claimed() -> None:
    """Of 1,000 studies of three equal methods, at most 65 claim any difference: 50 are expected at most."""
    plan, rng = from_text("made", MADE, {}), np.random.default_rng(1)
    claimed = sum(
        bool(claims(results.make(plan, made_records(plan, rng, {}, {}, 0.0), []))) for _ in range(REPETITIONS)
    )
    assert 10 <= claimed <= 65, claimed


def test_the_luck_of_tuning_is_part_of_a_difference() -> None:
    """Where accuracy falls off around the best rate, methods that differ in their points alone may differ.


    The test is of the configurations that were found, not of the luck of finding them: docs/training.md.
    """
    rng = np.random.default_rng(2)
    plans = (from_text("made", f"space_seed = {seed}\n{MADE}", {}) for seed in range(100))
    claimed = sum(bool(claims(results.make(p, made_records(p, rng, {}, {}, 0.2), []))) for p in plans)
    assert 12 <= claimed <= 40, claimed
