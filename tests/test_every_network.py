"""The table of every network and the figure of growth, from made results: nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import every_network, growth, results_file
from benchmarks.every_network import BEGIN, CASES, COMPILED_CASES, END, LIBRARIES
from benchmarks.results_file import Results, code_commit
from benchmarks.training_step import COMPILED, TORCH_FORMS, Case, measure, torch_forms
from torch_oracle.resnet import MODELS

SECONDS = dict(
    zip(("numpy", "jax", *TORCH_FORMS, COMPILED), (0.4, 1.0, 0.9, 0.8, 0.6, 0.5, 0.3), strict=True)
)


class FakeMeasure:
    """Stands for `measure`: returns SECONDS, and ends the program before one of its calls."""

    def __init__(self, stop_before: int = 1000) -> None:
        self.cases: list[str] = []
        self.stop_before = stop_before

    def __call__(self, names: Any, make: Any, threads: int, rounds: int, *what: Any) -> Any:
        if len(self.cases) == self.stop_before:
            raise KeyboardInterrupt
        self.cases.append(str(what[0]))
        seconds = {name: [SECONDS.get(name, 1.0) * 1.1] + [SECONDS.get(name, 1.0)] * 2 for name in names}
        return seconds, {name: 10**6 * int(100 * SECONDS.get(name, 1.0)) for name in names}


Run = Callable[..., list[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command on the cases of resnet8, and return what it measured."""

    def command(*arguments: str, stop_before: int = 1000, status: int = 0) -> list[str]:
        fake = FakeMeasure(stop_before)
        monkeypatch.setattr(every_network, "measure", fake)
        out = tmp_path / "folder" / "results.jsonl"
        given = ["--only", "resnet8", "--out", str(out), "--threads", "2", *arguments]
        assert every_network.main(given) == status
        return fake.cases

    return command


RESNET8 = ["resnet8, 128 @ 32x32x3", "resnet8, 32 @ 32x32x1"]
PEAK = str(every_network.SIDE)


@pytest.mark.parametrize("batch", [1, 3])
def test_flops_of_a_cnn_by_hand(batch: int) -> None:
    """A 3x3 convolution of 1 to 8 channels with padding 1, and a linear layer of 8 * 32 * 32 inputs."""
    case = Case("cnn", batch, (32, 32, 1))
    convolution, linear = 2 * batch * 32 * 32 * 9 * 8, 2 * batch * 8 * 32 * 32 * 10
    assert every_network.flops(case, inference=True) == convolution + linear
    assert every_network.flops(case, inference=False) == 2 * convolution + 3 * linear


def test_flops_of_a_resnet_by_hand() -> None:
    """Width 4: stages of one block at 32x32, 16x16 and 8x8; the shortcuts have no convolution."""
    case = Case("resnet8", 1, (32, 32, 3), {"width": 4})
    stem = 2 * 32**2 * 9 * 3 * 4
    stages = 2 * 9 * (32**2 * (4 * 4 + 4 * 4) + 16**2 * (4 * 8 + 8 * 8) + 8**2 * (8 * 16 + 16 * 16))
    forward = stem + stages + 2 * 16 * 10
    assert every_network.flops(case, inference=True) == forward
    assert every_network.flops(case, inference=False) == 3 * forward - stem


def test_the_list_of_cases() -> None:
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names) == 23
    assert {case.model for case in CASES} == set(MODELS) - {"resnet44"}
    assert all(case in CASES for case in COMPILED_CASES)
    assert "resnet18, small_images=True, 64 @ 32x32x3" in names
    assert len(torch_forms(inference=False)) == 4
    assert torch_forms(inference=True) == ["torch NCHW, Adam", "torch channels_last, Adam"]


def test_what_the_file_has_is_not_measured_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [PEAK, *RESNET8, *RESNET8]  # the peak, training, inference
    assert run() == every
    assert run() == []
    assert run("--threads", "1") == every
    monkeypatch.setattr(results_file, "code_commit", lambda: "another")
    assert run() == every
    assert run() == run("--rounds", "3") == []
    assert run("--rounds", "10") == [*RESNET8, *RESNET8]


def test_a_stopped_run_continues(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(stop_before=2, status=130) == [PEAK, RESNET8[0]]
    assert "the same command continues" in capsys.readouterr().err
    assert run() == [RESNET8[1], *RESNET8]


def test_the_code_has_a_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert code_commit()
    monkeypatch.setattr(results_file, "ROOT", tmp_path)
    assert code_commit() == "unknown"


@pytest.mark.parametrize("compiler", [False, True])
def test_the_table(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: bool) -> None:
    """NumPy takes 0.4 / 0.5 of PyTorch's fastest form in training, and 0.4 / 0.6 in inference."""
    monkeypatch.setattr(every_network, "has_compiler", lambda: compiler)
    monkeypatch.setattr(every_network, "flops", lambda case, inference: 5 * 10**9)
    document = tmp_path / "document.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(every_network, "DOCUMENT", document)
    run()
    run("--only", "resnet20")
    assert run("--table") == []
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\n- ")
    assert text.endswith(f" |\n\n{END}\nafter\n")
    assert "old" not in text
    training, inference = text.split("### Inference")
    rows = [line for line in training.splitlines() if line.startswith("| resnet")]
    peak = 2e-9 * every_network.SIDE**3 / SECONDS["numpy"]
    shares = ", ".join(f"{5 / seconds / peak:.2f}" for seconds in (0.4, 1.0, 0.5))
    compiled = "0.60" if compiler else "no compiler"
    assert rows[0].startswith(f"| resnet8 | 128 @ 32x32x3 | 500 | 0.80 | 2.00 |  | 12, 5, 10 | {shares} |")
    assert rows[0].endswith("| 40, 100, 50 | 0.80, 2.00 |")
    assert rows[1].startswith(f"| resnet20 | 128 @ 32x32x3 | 500 | 0.80 | 2.00 | {compiled} |")
    assert "| resnet8 | 32 @ 32x32x1 | 600 | 0.67 | 1.67 |" in inference
    assert "NumPy takes no longer than PyTorch in 3, JAX in 0" in training


def test_only_results_of_the_newest_conditions_are_in_the_table(run: Run, tmp_path: Path) -> None:
    run()
    run("--only", "cnn", "--threads", "1")
    table = every_network.table(Results(tmp_path / "folder" / "results.jsonl"))
    assert "1 thread." in table
    assert "| cnn |" in table
    assert "resnet8" not in table


def test_there_is_no_table_without_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no results"):
        every_network.table(Results(tmp_path / "nothing"))


@pytest.mark.parametrize("document", ["", "B", "E", "E B", "B E E", "B B E"])
def test_markers_that_do_not_enclose(document: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        every_network.replace_between(document, "B", "E", "text")


def test_the_document_has_the_markers() -> None:
    text = every_network.DOCUMENT.read_text()
    assert every_network.replace_between(text, BEGIN, END, "new").count("new") > 0


def test_the_figure_of_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every_network, "measure", FakeMeasure())
    monkeypatch.setattr(growth, "FIGURE", tmp_path / "growth.png")
    out = tmp_path / "results.jsonl"
    assert growth.main(["--out", str(out), "--threads", "2"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    sizes = [len(cases) for cases in growth.PANELS.values()]
    assert len(records) == 1 + sum(sizes) - (len(sizes) - 1)  # the peak; one case is in every panel
    with Image.open(tmp_path / "growth.png") as image:
        assert image.width > 1000


def test_seconds_of_a_product() -> None:
    """Real processes, as small as can be."""
    seconds, sizes = measure(list(LIBRARIES), every_network.product_step, 1, 2, 8)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(LIBRARIES, 2)
    assert min(value for values in seconds.values() for value in values) > 0
    assert set(sizes) == set(LIBRARIES)


def test_a_candidate_that_fails_ends_the_measurement(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ChildProcessError, match="numpy ended early"):
        measure(["numpy"], every_network.product_step, 1, 2, -1)
    assert "negative dimensions" in capfd.readouterr().err
