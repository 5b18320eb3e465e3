"""What a learner meets first: the example, the documents' programs, the notebooks."""

from __future__ import annotations

import re
import runpy
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def test_the_lenet_learns_digits(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples" / "lenet_digits.py"
    runpy.run_path(str(path))
    name, value, accuracy = capsys.readouterr().out.split()
    assert (name, value) == ("test", "accuracy")
    assert float(accuracy) > 0.95


def test_the_program_of_build_your_own(tmp_path: Path) -> None:
    """The blocks of docs/numpy_engine.md; and the message for the mistake that it describes."""
    text = (ROOT / "docs" / "numpy_engine.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert len(blocks) == 2
    program = "\n".join(blocks)
    exec(program, {"__name__": "program"})
    with pytest.raises(ValueError, match="gradient of a") as error:
        exec(program.replace("(x <= 0)", "(x > 0)"), {"__name__": "program"})
    assert f"\n    ValueError: {error.value}\n" in text


def test_the_derivations_name_functions_that_exist() -> None:
    text = (ROOT / "docs" / "derivations.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| (`.+) \|$", text, re.M)
    assert len(rows) == 9
    for row in rows:
        for names, path in re.findall(r"((?:`[\w.]+`(?:, )?)+) in `(numpy_ref/[\w/]+)\.py`", row):
            module = import_module(path.replace("/", "."))
            for name in re.findall(r"[\w.]+", names):
                assert attrgetter(name)(module).__doc__, name


@pytest.mark.parametrize("name", ["one_gradient_by_hand", "adam_and_adabound"])
def test_a_notebook_prints_what_it_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs without an error, and its text is the stored one: the numbers are printed rounded."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    folder = ROOT / "docs" / "notebooks"
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    stored = [printed(cell) for cell in notebook.cells]
    assert any(stored)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    for cell, expected in zip(notebook.cells, stored, strict=True):
        assert printed(cell).replace("-0.00000", " 0.00000") == expected.replace("-0.00000", " 0.00000")


def printed(cell: Any) -> str:
    """Return what a cell of a notebook printed; figures are not compared."""
    outputs = cell.get("outputs", [])
    assert not [o for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    return "".join(o.text for o in outputs if o.output_type == "stream")


def test_the_page_of_convolution_is_made_by_its_script() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_convolution_page.py"))
    stored = (ROOT / "docs" / "convolution.html").read_text(encoding="utf-8")
    assert stored == script["page"](), "run python docs/make_convolution_page.py"
    assert "http" not in stored
