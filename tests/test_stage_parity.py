"""`python -m experiment parity`: what it compares, the stage it names, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import numpy_ref.stages
import torch_oracle
import torch_oracle.stages
from experiment.__main__ import main
from tests.helpers.comparing import assert_close, random_state

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"width": 2, "stage_sizes": (1, 1), "small_images": True}
STAGES = ["input", "stem", "layer1", "layer2", "pool", "logits"]


def write_weights(path: Path, model: str = "resnet18", channels: int = 3, **options: Any) -> Path:
    """Weights in which nothing is 0 or 1, so that no term can be left out unnoticed."""
    shapes = {
        n: a.shape
        for n, a in torch_oracle.state_dict(torch_oracle.MODELS[model](5, channels, **options)).items()
    }
    save_file(random_state(shapes), path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network, and an image."""
    directory = tmp_path_factory.mktemp("parity")
    write_weights(directory / "a.safetensors", **SMALL)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(directory / "a.png")
    return directory


Told = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Run the command: its exit status, and its output by lines."""

    def run(*argv: object) -> tuple[int, list[str]]:
        status = main(["parity", *map(str, argv)])
        out, err = capsys.readouterr()
        assert err == ""
        return status, out.splitlines()

    return run


def table(lines: list[str]) -> dict[str, dict[str, str]]:
    """{stage: {title: cell}} of the printed table."""
    header = next(i for i, line in enumerate(lines) if line.startswith("stage"))
    titles = lines[header].split()
    rows = [line.split() for line in lines[header + 1 :]]
    rows = rows[: rows.index([])]
    assert all(len(row) == len(titles) for row in rows)
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


PAIRS = ["numpy-jax", "numpy-torch", "jax-torch"]


@pytest.mark.parametrize(
    ("options", "batch", "worst"),
    [
        (["--precision", "float64"], 1, 1e-14),
        (["--precision", "float64", "--train"], 4, 1e-12),
        ([], 1, 1e-5),
        (["--train"], 4, 1e-4),
    ],
)
def test_three_implementations_agree_in_every_stage(
    options: list[str], batch: int, worst: float, place: Path, told: Told
) -> None:
    """Within much less than the tolerance; but not to the last bit, or nothing was compared."""
    status, lines = told(place / "a.safetensors", place / "a.png", "--image-size", "33x36", *options)
    assert status == 0
    assert lines[-1].startswith("all agree within ")
    rows = table(lines)
    assert list(rows) == STAGES
    assert [rows[stage]["shape"] for stage in ("input", "layer2", "logits")] == [
        f"{batch}x33x36x3",
        f"{batch}x17x18x4",
        f"{batch}x5",
    ]
    for pair in PAIRS:
        found = [float(rows[stage][pair]) for stage in STAGES]
        assert found[0] == 0
        assert max(found) < worst, pair
    assert any(float(rows[stage]["numpy-torch"]) > 0 for stage in STAGES)
    assert ("copies with standard normal noise" in lines[1]) == ("--train" in options)


def test_what_is_inferred_is_said(place: Path, told: Told) -> None:
    _, lines = told(place / "a.safetensors", "--seed", 3)
    wanted = "resnet18, 5 classes, 3 channels, stage_sizes (1, 1), width 2, small_images True"
    assert lines[0] == f"{place / 'a.safetensors'}: {wanted}"
    assert lines[1] == "input: standard normal numbers of seed 3"
    assert table(lines)["input"]["shape"] == "1x32x32x3"


@pytest.mark.parametrize(
    ("model", "channels", "options", "stages"),
    [
        ("cnn", 1, {"width": 3}, ["conv"]),
        ("resnet8", 1, {"width": 2}, ["stem", "layer1", "layer2", "layer3", "pool"]),
        ("resnet50", 2, {"width": 2, "stage_sizes": (1,)}, ["stem", "layer1", "pool"]),
        ("resnet18", 3, {"width": 2, "stage_sizes": (1,), "batch_norm": False}, ["stem", "layer1", "pool"]),
    ],
)
def test_other_networks(
    model: str, channels: int, options: dict[str, Any], stages: list[str], tmp_path: Path, told: Told
) -> None:
    path = write_weights(tmp_path / "a.safetensors", model, channels, **options)
    size = [] if model == "cnn" else ["--image-size", 32]
    status, lines = told(path, *size, "--precision", "float64")
    assert status == 0
    assert list(table(lines)) == ["input", *stages, "logits"]


def test_a_state_dict_of_pytorchs_kind_is_taken_as_it_is(tmp_path: Path, told: Told) -> None:
    """`linear.*` for `fc.*`, counts of batches, and no need of --model; but it may be given."""
    shapes = {n: a.shape for n, a in torch_oracle.state_dict(torch_oracle.resnet8(5, width=2)).items()}
    state = {name.replace("fc.", "linear."): array for name, array in random_state(shapes).items()}
    save_file({**state, "bn1.num_batches_tracked": np.array(3)}, tmp_path / "a.safetensors")
    assert told(tmp_path / "a.safetensors")[0] == 0
    assert told(tmp_path / "a.safetensors", "--model", "resnet8")[0] == 0


# The image


def test_images_are_resized_and_normalised(place: Path, tmp_path: Path, told: Told) -> None:
    argv = [place / "a.safetensors", place / "a.png", "--layout", "NHWC", "--precision", "float64"]
    told(*argv, "--dump", tmp_path / "a", "--image-size", "40x50")
    told(*argv, "--dump", tmp_path / "b", "--image-size", "40x50", "--mean", 0.5, "--std", 0.25, 0.5, 1)
    pixels = np.asarray(Image.open(place / "a.png"), np.float64) / 255
    usual = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert_close("ImageNet's", load_file(tmp_path / "a")["input"], usual[None], 1e-15)
    assert_close("given", load_file(tmp_path / "b")["input"], ((pixels - 0.5) / [0.25, 0.5, 1])[None], 1e-15)


def test_a_grey_network_sees_any_image_in_grey(place: Path, tmp_path: Path, told: Told) -> None:
    path = write_weights(tmp_path / "a.safetensors", channels=1, **SMALL)
    _, lines = told(
        path, place / "a.png", "--image-size", "40x50", "--dump", tmp_path / "b", "--layout", "NHWC"
    )
    assert "mean 0, std 1" in lines[1]
    grey = np.asarray(Image.open(place / "a.png").convert("L"), np.float64)[None, :, :, None] / 255
    assert_close("grey", load_file(tmp_path / "b")["input"], grey, 1e-7)


def test_training_mode_is_that_of_a_batch(place: Path, tmp_path: Path, told: Told) -> None:
    told(place / "a.safetensors", place / "a.png", "--dump", tmp_path / "a")
    told(place / "a.safetensors", place / "a.png", "--train", "--dump", tmp_path / "b")
    one, four = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert_close("the image", four["input"][:1], one["input"], 0)
    noise = four["input"][1:] - four["input"][:1]
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert not np.allclose(four["logits"][:1], one["logits"], atol=1e-3)


# Departures


def test_a_fault_in_one_implementation_is_found_where_it_is(
    place: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = torch_oracle.load_state_dict

    def load_with_a_sign_turned(model: Any, mapping: Any) -> None:
        load(model, {**mapping, "layer2.0.conv2.weight": -mapping["layer2.0.conv2.weight"]})

    monkeypatch.setattr(torch_oracle.stages, "load_state_dict", load_with_a_sign_turned)
    status, lines = told(place / "a.safetensors", place / "a.png")
    assert status == 1
    assert lines[-3].startswith("layer2 is the first stage that departs: ")
    rows = table(lines)
    for stage in STAGES:
        departs = stage in ("layer2", "pool", "logits")
        assert [rows[stage][pair].endswith("!") for pair in PAIRS] == [False, departs, departs], stage


def test_the_place_of_the_largest_difference_is_told(place: Path, tmp_path: Path, told: Told) -> None:
    argv = [place / "a.safetensors", "--layout", "NHWC", "--precision", "float64"]
    assert told(*argv, "--dump", tmp_path / "ours")[0] == 0
    stages = dict(sorted(load_file(tmp_path / "ours").items(), reverse=True))
    scale = np.abs(stages["layer1"]).max()
    before = stages["layer1"][0, 3, 5, 1]
    stages["layer1"][0, 3, 5, 1] += 0.25 * scale
    stages["layer1"][0, 2, 2, 0] -= 0.125 * scale
    stages["layer2"] *= 2  # departs, too, but behind layer1
    save_file(stages, tmp_path / "theirs")
    status, lines = told(*argv, "--reference", tmp_path / "theirs")
    assert status == 1
    assert lines[-3].startswith("layer1 is the first stage that departs: ")
    assert lines[-3].endswith(" against reference")
    assert lines[-2].startswith("off by 2")
    assert lines[-2].endswith(", most at [0, 3, 5, 1] (NHWC)")
    given = [float(word) for word in lines[-1].partition(";")[0].split(", not ")]
    assert given == pytest.approx([before, before + 0.25 * scale], rel=1e-8)
    rows = table(lines)
    assert [stage for stage in STAGES if rows[stage]["torch-reference"].endswith("!")] == [
        "layer1",
        "layer2",
    ]
    assert told(*argv, "--reference", tmp_path / "theirs", "--tolerance", 0.6)[0] == 0


def test_what_is_not_finite_departs(place: Path, tmp_path: Path, told: Told) -> None:
    state = load_file(place / "a.safetensors")
    state["layer2.0.bn2.weight"][0] = np.nan
    save_file(state, tmp_path / "a.safetensors")
    status, lines = told(tmp_path / "a.safetensors")
    assert status == 1
    assert lines[-3].startswith("layer2 is the first stage that departs: ")
    assert "off by inf" in lines[-2]


# The files of stages


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("train", [False, True])
def test_what_was_dumped_agrees(layout: str, train: bool, place: Path, tmp_path: Path, told: Told) -> None:
    path = tmp_path / "stages.safetensors"
    argv = [place / "a.safetensors", place / "a.png", "--layout", layout, *(["--train"] if train else [])]
    assert told(*argv, "--dump", path)[0] == 0
    stages = load_file(path)
    assert set(stages) == set(STAGES)
    n = 4 if train else 1
    assert stages["layer2"].shape == ((n, 4, 16, 16) if layout == "NCHW" else (n, 16, 16, 4))
    with safe_open(path, "np") as file:
        record = json.loads(file.metadata()["run"])
        assert (record["model"], record["layout"]) == ("resnet18", layout)
    status, lines = told(*argv, "--reference", path)
    assert status == 0
    assert all(float(row["numpy-reference"]) == 0 for row in table(lines).values())


def test_the_dump_is_what_another_program_computes(place: Path, tmp_path: Path, told: Told) -> None:
    """As one who ports a model would do it, with PyTorch in the part of the other program."""
    argv = [place / "a.safetensors", place / "a.png", "--precision", "float64"]
    told(*argv, "--dump", tmp_path / "ours")
    input_ = load_file(tmp_path / "ours")["input"].transpose(0, 2, 3, 1)
    theirs = torch_oracle.stages.run_stages(
        "resnet18", load_file(place / "a.safetensors"), input_, 5, precision="float64", **SMALL
    )
    kept = {name: np.ascontiguousarray(np.moveaxis(theirs[name], -1, 1)) for name in ("layer1", "logits")}
    save_file(kept, tmp_path / "theirs")
    status, lines = told(*argv, "--reference", tmp_path / "theirs")
    assert status == 0
    cells = {stage: row["torch-reference"] for stage, row in table(lines).items()}
    assert cells == {**dict.fromkeys(STAGES, "-"), "layer1": "0.0e+00", "logits": "0.0e+00"}


# Without PyTorch


def test_two_engines_without_pytorch(place: Path, tmp_path: Path) -> None:
    program = """
import sys
sys.modules["torch"] = None  # as where it is not installed: its import raises
from experiment.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "parity", str(place / "a.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "PyTorch is not installed (the extra `test` brings it)" in lines[2]
    rows = table(lines)
    assert list(rows) == STAGES
    assert set(rows["stem"]) == {"stage", "shape", "largest", "numpy-jax"}


# Mistakes


def refused(capsys: pytest.CaptureFixture[str], directory: Path, *argv: object) -> str:
    """The one line that refuses, which leaves everything as it was."""
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert main(["parity", *map(str, argv)]) == 2
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "nothing": ([], ["WEIGHTS", "parity --help"]),
    "no file": (["absent"], ["absent: cannot be read"]),
    "an image for weights": (["a.png"], ["a.png: no safetensors file", "experiment convert"]),
    "stages for weights": (["stages"], ["stages: conv1.weight is missing"]),
    "unknown model": (["a.safetensors", "--model", "resnet99"], ["--model", "resnet99"]),
    "another model": (
        ["a.safetensors", "--model", "resnet101"],
        ["as resnet101: ", "fc.weight has shape [5, 4], not [5, 64]", " more"],
    ),
    "no image": (["a.safetensors", "absent.png"], ["absent.png: not found"]),
    "weights for an image": (["a.safetensors", "stages"], ["stages: no image that Pillow reads"]),
    "half an image": (["a.safetensors", "half.png"], ["half.png: no image that Pillow reads"]),
    "channels of no image": (["two.safetensors", "a.png"], ["IMAGE", "2 channels"]),
    "small images": (["a.safetensors", "--image-size", "31"], ["--image-size: 31 is too small"]),
    "no size": (["a.safetensors", "--image-size", "big"], ["--image-size: 'big'"]),
    "another size": (["cnn.safetensors", "--image-size", "40"], ["--image-size", "32"]),
    "two means": (["a.safetensors", "a.png", "--mean", "0", "1"], ["--mean: 2 numbers for 3 channels"]),
    "no mean": (["a.safetensors", "a.png", "--mean", "nan"], ["--mean"]),
    "no deviation": (["a.safetensors", "a.png", "--std", "0"], ["--std", "above 0"]),
    "negative seed": (["a.safetensors", "--seed", "-1"], ["--seed: -1"]),
    "low precision": (["a.safetensors", "--precision", "bfloat16"], ["--precision", "bfloat16"]),
    "negative tolerance": (["a.safetensors", "--tolerance", "-1"], ["--tolerance: -1"]),
    "no tolerance": (["a.safetensors", "--tolerance", "nan"], ["--tolerance: nan"]),
    "dump exists": (["a.safetensors", "--dump", "a.png"], ["--dump", "a.png", "exists"]),
    "dump into nowhere": (["a.safetensors", "--dump", "none/stages"], ["--dump", "none", "folder"]),
    "no reference": (["a.safetensors", "--reference", "absent"], ["absent: cannot be read"]),
    "weights for a reference": (
        ["a.safetensors", "--reference", "a.safetensors"],
        [
            "--reference",
            "unknown name ",
            "the names are input, stem, layer1, layer2, pool, logits",
        ],
    ),
    "another layout": (
        ["a.safetensors", "--reference", "stages", "--layout", "NHWC"],
        ["--reference", "layer1 has shape [1, 2, 32, 32], not [1, 32, 32, 2]", "--layout"],
    ),
    "another batch": (["a.safetensors", "--reference", "stages", "--train"], ["--reference", "--train"]),
}


@pytest.fixture
def mistaken(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files to mistake for each other."""
    for name in ("a.safetensors", "a.png"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    (tmp_path / "half.png").write_bytes((place / "a.png").read_bytes()[:2000])
    save_file({"layer1": np.zeros((1, 2, 32, 32), np.float32)}, tmp_path / "stages")
    write_weights(tmp_path / "two.safetensors", channels=2, **SMALL)
    write_weights(tmp_path / "cnn.safetensors", "cnn")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, mistaken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, parts = MISTAKES[case]
    error = refused(capsys, mistaken, *argv)
    assert [part for part in parts if part not in error] == [], error
    assert len(error) < 800


def test_a_model_whose_images_it_cannot_hold(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an engine refuses is told as it says it."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("more than 1 value per channel")

    monkeypatch.setattr(numpy_ref.stages, "run_stages", refuse)
    assert "as resnet18: more than 1 value" in refused(capsys, place, place / "a.safetensors")
