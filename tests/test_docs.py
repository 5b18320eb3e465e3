"""The documents: their code runs."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def test_the_tour_runs(tmp_path):
    """Every block of docs/tour.md, one after another, as one program."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "tour.md").read_text(), re.S | re.M)
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


def test_the_sheet_of_augmented_pictures_can_be_drawn(tmp_path, monkeypatch):
    from experiment.data import load

    script = runpy.run_path(str(ROOT / "docs" / "draw_augmentation.py"))
    monkeypatch.setitem(script["rows"].__globals__, "COLUMNS", 2)
    for name, count in (("digits", 8), ("synthetic", 10)):
        data = load(name, data_dir=None, batch_size=8, seed=0)
        assert len(script["rows"](data)) == count
    script["draw"](tmp_path / "sheet.png", data, "synthetic")
    for path in (tmp_path / "sheet.png", ROOT / "docs" / "augmentation.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_pictures_of_convolution_can_be_drawn(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "draw_convolution.py"))
    for draw in ("draw_windows", "draw_columns"):
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
