"""Files of older commits still work: runs resume, are evaluated, reported and compared; studies go on.

Each folder of `tests/fixtures` was made by the commit that its `config.json` names, and never changes:
    run/            8 of 16 steps of AdaBound on the NumPy engine, completed, with its checkpoint
    extended.jsonl  the lines of metrics.jsonl that follow where the same commit trained to step 16
    study/          a study of study.toml, without weights and checkpoints
    recipe.toml     a recipe, and recipe.json the options that it stood for
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiment.__main__ import main
from experiment.commands import train
from experiment.options.recipes import checked
from experiment.options.resolving import resolve

OLDER = sorted((Path(__file__).parent / "fixtures").iterdir())

# Of the metrics at steps 9 to 16, on another machine: BLAS adds up in another order. Measured between 1 and 2
# threads: 1e-6; a step from a wrong state moves the loss by 1e-2 and more.
TOLERANCE = 1e-3


@pytest.fixture(params=OLDER, ids=lambda folder: folder.name)
def older(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of one folder of fixtures."""
    return Path(shutil.copytree(request.param, tmp_path / "older"))


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """Keep the NumPy engine in this process: starting workers takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_resumes(older: Path) -> None:
    run = older / "run"
    weights = (run / "weights.safetensors").read_bytes()
    assert train.main(["--run-dir", str(run), "--resume", "--steps", "16"]) == 0
    expected = json_lines((older / "extended.jsonl").read_text())
    lines = json_lines((run / "metrics.jsonl").read_text())[-len(expected) :]
    for line, known in zip(lines, expected, strict=True):
        assert line.keys() == known.keys()
        for name, value in known.items():
            assert line[name] == (value if isinstance(value, str) else pytest.approx(value, rel=TOLERANCE))
    assert (run / "weights.safetensors").read_bytes() != weights
    assert json.loads((run / "summary.json").read_text())["steps"] == 16


def test_a_run_is_evaluated(older: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = json.loads((older / "run" / "summary.json").read_text())["test"]["accuracy"]
    for which in ("final", "best"):
        assert main(["evaluate", str(older / "run"), "--weights", which]) == 0
        assert f"{accuracy:.4f}" in capsys.readouterr().out


def test_a_run_is_reported_and_compared(older: Path) -> None:
    assert main(["report", str(older / "run")]) == 0
    assert (older / "run" / "report" / "index.html").stat().st_size > 1000
    other = shutil.copytree(older / "run", older / "other")
    assert main(["compare", str(older / "run"), str(other), "--out", str(older / "compared")]) == 0
    assert (older / "compared" / "index.html").stat().st_size > 1000


def test_a_study_is_read_and_continued(older: Path) -> None:
    """Its results stay the same without training, and after one of its runs was made again."""
    folder = older / "study"
    command = ["study", str(older / "study.toml"), "--run-dir", str(folder)]
    expected = json.loads((folder / "study.json").read_text())["contestants"]
    lost = folder / "runs" / "adam" / "seed-2"
    for removed, options in ((folder / "study.json", ["--report-only"]), (lost, [])):
        shutil.rmtree(removed) if removed.is_dir() else removed.unlink()
        assert main([*command, *options]) == 0
        study = json.loads((folder / "study.json").read_text())["contestants"]
        assert study.keys() == expected.keys()
        for name in expected:
            assert study[name]["chosen"] == expected[name]["chosen"]
            assert study[name]["accuracy"] == pytest.approx(expected[name]["accuracy"], rel=TOLERANCE)


def test_a_recipe_means_the_same(older: Path) -> None:
    options = checked(tomllib.loads((older / "recipe.toml").read_text()))
    config = json.loads(json.dumps(dataclasses.asdict(resolve(options))))
    expected = json.loads((older / "recipe.json").read_text()) | {"recipe": None}
    assert {name: config[name] for name in expected} == expected
