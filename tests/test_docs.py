"""The documents: their code runs."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiment.__main__ import main
from experiment.run.schedules import make_schedule
from experiment.study.plan import read
from experiment.study.tables import in_markdown, tables
from numpy_ref import adabound_bounds

ROOT = Path(__file__).parents[1]


def code_blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of one language in a document of docs/."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / document).read_text(), re.S | re.M)


def test_the_tour_runs(tmp_path):
    """Every block of docs/tour.md, one after another, as one program."""
    blocks = code_blocks("tour.md", "python")
    assert len(blocks) == 4
    program = tmp_path / "tour.py"
    program.write_text("\n".join(blocks))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_to_files_of_the_tree():
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if not target.startswith("https://"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "studies").glob("*.json")), ids=lambda p: p.stem)
def test_the_tables_of_studies_are_those_of_their_results(path: Path) -> None:
    """The stored results of older versions, without newer fields, give what docs/adabound.md shows."""
    text = (ROOT / "docs" / "adabound.md").read_text()
    part = text.partition(f"<!-- study {path.stem} -->")[2].partition("<!-- end -->")[0]
    shown = list(tables(json.loads(path.read_text())))
    assert part.count("\n#### ") == len(shown)
    for table in shown:
        assert in_markdown(table, "####") in part


def test_the_table_of_readme_has_all_optimizers_of_the_study() -> None:
    study = json.loads((ROOT / "docs" / "studies" / "fashion-mnist.json").read_text())
    cells = [
        "{mean:.1f} ({low:.1f} to {high:.1f})".format(
            **{name: 100 * each["accuracy"][name] for name in ("mean", "low", "high")}
        )
        for each in study["contestants"].values()
    ]
    assert f"| {' | '.join(cells)} |" in (ROOT / "README.md").read_text()


def test_the_bounds_in_the_document_follow_the_schedule_of_the_studies() -> None:
    """Of `final-lr-gamma`: 336 steps, 33 of them warm-up, then half a cosine to 0."""
    plan = read(ROOT / "studies" / "final-lr-gamma.toml", {})
    named = {each.name: each.candidates[0] for each in plan.contestants}
    settings = [named[name] for name in ("published", "gamma-0.1", "final-lr-3")]
    lr, length = settings[0]["lr"], 336
    schedule = make_schedule("cosine", lr, length=length, warmup_steps=length // 10)
    text = (ROOT / "docs" / "adabound.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.M)
    assert [int(row[0]) for row in rows] == [1, 34, 41, 100, 168, 201, 300, 336]
    for step, *cells in rows:
        rate = schedule(int(step) - 1)
        expected = [rate / lr]
        for setting in settings:
            bounds = adabound_bounds(int(step), setting.get("final_lr", 0.1) / lr, setting.get("gamma", 1e-3))
            expected += [rate * size for size in bounds]
        numbers = [float(number) for cell in cells for number in cell.split(", ")]
        assert numbers == pytest.approx(expected, rel=0.005), step  # three digits
    highest = {
        name: max(
            schedule(t - 1) * adabound_bounds(t, each.get("final_lr", 0.1) / lr, each.get("gamma", 1e-3))[1]
            for t in range(1, length + 1)
        )
        for name, each in named.items()
    }
    for name, words in (("gamma-0.1", "0.13"), ("gamma-0.01", "0.38"), ("final-lr-0.01", "0.30")):
        assert f"{highest[name]:.2f}" == words
        assert f"it is {words} at most" in " ".join(text.split())
    for gamma, steps, words in ((1e-3, 80_000, "1.03"), (1e-3, 336, "16"), (0.1, 336, "1.06")):
        low, high = adabound_bounds(steps, 1.0, gamma)
        assert high / low == pytest.approx((1 + 1 / (gamma * steps)) ** 2)
        assert math.isclose(high / low, float(words), rel_tol=0.02)


def test_the_walkthrough_of_parity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands and the program of docs/parity.md give the table that stands there."""
    (program,) = code_blocks("parity.md", "python")
    (shown,) = code_blocks("parity.md", "text")
    commands = [
        line.split()[3:]
        for block in code_blocks("parity.md", "sh")
        for line in block.splitlines()
        if line.startswith("python -m experiment ")
    ]
    dump, compare = commands
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    assert main(dump) == 0
    capsys.readouterr()
    exec(program, {})
    assert main(compare) == 1
    printed = capsys.readouterr().out.splitlines()
    stages, verdict = shown.split("\n\n")
    assert verdict.splitlines()[0] in printed
    for row in stages.splitlines()[1:]:
        stage, *described, a, b, c = row.split()
        (cells,) = [line.split() for line in printed if line.startswith(f"{stage} ")][:1]
        assert cells[1:3] == described
        assert [cell[-1] == "!" for cell in cells[3:6]] == [cell[-1] == "!" for cell in (a, b, c)]
    exec(program.replace("EPSILON = 1e-3", "EPSILON = 1e-5"), {})
    ours, corrected = load_file("stages.safetensors"), load_file("mine.safetensors")
    assert ours.keys() == corrected.keys()
    for name, array in ours.items():
        assert np.abs(array - corrected[name]).max() < 1e-6 * np.abs(array).max()


def test_the_image_to_predict_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, predict = code_blocks("evaluation.md", "sh")[1].splitlines()
    monkeypatch.setattr("numpy_ref.engine.core_count", lambda: 1)  # too little work to start processes for
    monkeypatch.chdir(tmp_path)
    program = re.fullmatch(r'python -c "(.*)"', make)
    assert program is not None
    exec(program[1], {})
    assert main(predict.partition("#")[0].split()[3:]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digit.png"
    probability, digit = lines[1].split()
    assert (f"{float(probability):.2f}", digit) == ("0.70", "1")
    assert predict.endswith("# 0.70 for 1, which it is")


def test_the_sheet_of_augmented_pictures_can_be_drawn(tmp_path, monkeypatch):
    from experiment.data.loading import load

    script = runpy.run_path(str(ROOT / "docs" / "draw_augmentation.py"))
    monkeypatch.setitem(script["rows"].__globals__, "COLUMNS", 2)
    for name, count in (("digits", 8), ("synthetic", 10)):
        data = load(name, data_dir=None, batch_size=8, seed=0)
        assert len(script["rows"](data)) == count
    script["draw"](tmp_path / "sheet.png", data, "synthetic")
    for path in (tmp_path / "sheet.png", ROOT / "docs" / "augmentation.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_figures_of_convolution_can_be_drawn(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "draw_convolution.py"))
    for draw in ("draw_windows", "draw_patches"):
        script[draw].__globals__["FOLDER"] = tmp_path
        script[draw]()
    for name in ("convolution.png", "im2col.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (ROOT / "docs" / name).is_file()


def test_the_picture_of_adabounds_bounds_can_be_drawn(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "draw_adabound.py"))
    script["draw"].__globals__["FOLDER"] = tmp_path
    script["draw"]()
    assert (tmp_path / "adabound_bounds.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_results_of_a_study_take_their_place_in_the_document(tmp_path):
    summary = {"n": 2, "mean": 0.9, "sd": 0.01, "low": 0.81, "high": 0.99}
    measures = dict.fromkeys(("accuracy", "f1", "loss"), summary)
    contestant = {"chosen": 0, "setting": {"lr": 0.1}, "runs": {}, "diverged": [], "tuning": [], **measures}
    study: dict[str, Any] = {
        "name": "mnist-tenth",
        "command": ["FILE"],
        "made_with": [],
        "seeds": [1, 2],
        "tuning_seeds": [],
    }
    study |= {"contestants": {"adam": contestant}, "comparisons": []}
    (tmp_path / "study.json").write_text(json.dumps(study))
    (tmp_path / "curves.png").write_bytes(b"picture")
    script = runpy.run_path(str(ROOT / "docs" / "fill_adabound.py"))
    script["main"].__globals__["FOLDER"] = tmp_path / "docs"
    (tmp_path / "docs").mkdir()
    document = tmp_path / "docs" / "adabound.md"
    document.write_text("before\n<!-- study mnist-tenth -->\nold\n<!-- end -->\nafter\n")
    for _ in range(2):  # in place of what it wrote itself too
        script["main"]([str(tmp_path)])
        text = document.read_text()
        assert "| adam | lr 0.1 | 2 | 90.00 (1.00) | 81.00 to 99.00 |" in text
        assert re.fullmatch(r"before\n.*after\n", text, re.S)
        assert "old" not in text
        assert text.count("mnist-tenth-curves.png") == 1
    assert (tmp_path / "docs" / "studies" / "mnist-tenth-curves.png").read_bytes() == b"picture"
