"""A case that fails: what the message says, what is left, and what a replay of it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.parity import cases, compare, dump
from tests.parity.__main__ import main
from tests.parity.case import Case, Inputs, Results, make_inputs
from tests.parity.engines import ENGINES

CASE = next(case for case in cases.CONVOLUTIONS if case.name == "conv-3x3-stride-2-odd")
WRONG = (1, 2, 3, 0)


def broken(case: Case, inputs: Inputs) -> Results:
    """The NumPy engine with one wrong number in the input's gradient."""
    results = ENGINES["torch"](case, inputs)
    results["dx"][WRONG] += 0.25
    return results


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dump, "FOLDER", tmp_path / "parity-dumps")
    return tmp_path / "parity-dumps"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=dump.ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_failure_names_the_tensor_and_is_replayed_from_its_dump(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ENGINES, "numpy", broken)
    inputs = {name: 2 * array for name, array in make_inputs(CASE).items()}  # no seed gives these
    with pytest.raises(AssertionError) as caught:
        compare.check(CASE, inputs)
    message = str(caught.value)
    others = "numpy-plain, numpy-loops, jax, jax-other-convolution, torch"
    assert message.startswith(f"{CASE.name}, float64: {others} agree; numpy departs\n")
    found = re.search(r"dx of numpy against torch: off by (\S+) of .*, most at \[1, 2, 3, 0\]", message)
    assert found, message
    assert message.count("\n") == 1 + 5  # the five comparisons of that tensor, and no other
    path = Path(message.splitlines()[-1].removeprefix("replay it: python -m tests.parity replay "))
    assert path.parent == folder

    assert {file.name for file in path.iterdir()} == {
        "case.json",
        *(f"{name}.safetensors" for name in ("inputs", "numpy", "numpy-plain", "numpy-loops", "jax")),
        *(f"{name}.safetensors" for name in ("jax-other-convolution", "torch")),
    }
    notes = json.loads((path / "case.json").read_text())
    assert notes["case"]["name"] == CASE.name
    assert notes["case"]["seed"] == CASE.seed
    assert notes["versions"]["numpy"] == np.__version__
    for name, array in load_file(path / "inputs.safetensors").items():
        np.testing.assert_array_equal(array, inputs[name])

    # With the fault still there
    capsys.readouterr()
    assert main(["replay", str(path)]) == 1
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if re.match(r"dx +numpy - torch ", line))
    assert row.split()[-4:-2] == [found[1], found[1]]  # recorded, and now
    assert row.endswith("DIFFERS")
    assert out.count("DIFFERS") == 5
    assert out.endswith("agree; numpy departs\n")

    # By the command of the message, in another process, with the fault fixed
    done = run(*message.splitlines()[-1].removeprefix("replay it: python ").split())
    assert done.returncode == 0, done.stderr
    assert "DIFFERS" not in done.stdout
    assert done.stdout.endswith("numpy departs\nverdict now: all agree\n")


def test_an_error_in_an_engine_leaves_a_dump_too(folder: Path) -> None:
    case = cases.SINGLE_VALUES[0]
    with pytest.raises(ValueError, match="more than 1 value") as caught:
        compare.check(case)
    (note,) = caught.value.__notes__
    assert note.startswith(f"{case.name}, float64; replay it: python -m tests.parity replay {folder}")
    done = run(*note.partition("replay it: python ")[2].split())
    assert done.returncode == 1
    assert "ValueError('batch norm needs more than 1 value" in done.stdout  # recorded
    assert done.stderr.splitlines()[-1].startswith("ValueError: batch norm needs more than 1 value")
    assert (
        main(
            [
                "replay",
                str(
                    dump.write(replace(case, train=False), make_inputs(case), {"numpy": {}, "torch": {}}, [])
                ),
            ]
        )
        == 0
    )


def test_a_network_that_is_worse_than_pytorch_in_float32_is_replayed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one tensor, or in the mean over all."""
    case = replace(cases.SINGLE_PRECISION[0], name="cnn", options={"model": "cnn", "image_size": (6, 6)})
    case = replace(case, shape=(2, 6, 6, 3))
    right = ENGINES["jax"]

    def worse(names: list[str], by: float) -> None:
        def run(case: Case, inputs: Inputs) -> Results:
            return {k: v * np.float32(1 + by * (k in names)) for k, v in right(case, inputs).items()}

        monkeypatch.setitem(ENGINES, "jax", run)

    compare.check_in_float32(case, range(2))
    worse(["grad.fc.bias"], 1e-5)
    with pytest.raises(AssertionError, match=r"grad\.fc\.bias of jax is off by .* times PyTorch's") as caught:
        compare.check_in_float32(case, range(2))
    path = Path(str(caught.value).split()[-1])
    read = dump.read(path)
    assert set(read.results) == {"numpy", "jax", "torch", "torch-channels-last", "truth"}
    found = compare.compare(read.case, read.inputs, read.results)
    assert [each.tensor for each in found if each.fault] == ["grad.fc.bias"]
    worse(list(read.results["jax"]), 7e-7)
    with pytest.raises(AssertionError, match=r"all tensors by [1-9]"):
        compare.check_in_float32(case, range(2))


@pytest.mark.parametrize("case", [*cases.OPTIMIZERS[:1], cases.TRAJECTORIES[2]], ids=lambda case: case.kind)
def test_every_kind_of_case_is_read_back_as_it_was(case: Case, folder: Path) -> None:
    inputs = make_inputs(case)
    results = {"numpy": ENGINES["numpy"](replace(case, seed=3), inputs)}
    read = dump.read(dump.write(case, inputs, results, ["why"]))
    assert read.case == case
    assert read.faults == ["why"]
    for written, found in ((inputs, read.inputs), (results["numpy"], read.results["numpy"])):
        assert written.keys() == found.keys()
        for name, array in written.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    again = ENGINES["numpy"](read.case, read.inputs)
    for name, array in results["numpy"].items():
        np.testing.assert_array_equal(again[name], array)


def test_nan_a_missing_tensor_and_another_shape_are_no_agreement() -> None:
    inputs = make_inputs(CASE)
    right = ENGINES["torch"](CASE, inputs)
    wrong: list[Results] = [
        {**right, "dx": np.where(np.arange(right["dx"].shape[-1]) == 0, np.nan, right["dx"])},
        {name: array for name, array in right.items() if name != "dx"},
        {**right, "dx": right["dx"][..., :1]},
    ]
    for results in wrong:
        for pair in ({"jax": results, "torch": right}, {"torch": right, "jax": results}):
            (bad,) = [each for each in compare.compare(CASE, inputs, pair) if each.fault]
            assert (bad.tensor, bad.error) == ("dx", np.inf)


def test_the_verdict_tells_who_is_wrong() -> None:
    def verdict(**values: float) -> str:
        results = {name.replace("_", "-"): {"y": np.array([value])} for name, value in values.items()}
        return compare.verdict(compare.compare(cases.OTHERS[0], make_inputs(cases.OTHERS[0]), results))

    assert verdict(numpy=1, jax=1, torch=1) == "all agree"
    assert verdict(numpy=1, jax=2, torch=1) == "numpy, torch agree; jax departs"
    assert verdict(numpy=1, jax=1, torch=2) == "numpy, jax agree; torch departs"
    expected = "jax, torch agree; numpy, numpy-plain depart"
    assert verdict(numpy=2, numpy_plain=2, jax=1, torch=1) == expected
    assert verdict(numpy=1, jax=2, torch=3) == "no two of numpy, jax, torch agree"


def test_what_is_no_dump_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["replay", str(tmp_path)])
    assert caught.value.code == 2
    assert "holds no case.json" in capsys.readouterr().err
