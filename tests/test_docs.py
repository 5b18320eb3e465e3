"""The documents: their code runs."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

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
