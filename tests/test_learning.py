"""What a learner meets first: the example, the documents' programs, the notebooks."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_lenet_learns_digits(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples" / "lenet_digits.py"
    runpy.run_path(str(path))
    name, value, accuracy = capsys.readouterr().out.split()
    assert (name, value) == ("test", "accuracy")
    assert float(accuracy) > 0.95
