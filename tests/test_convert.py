"""`python -m experiment convert`: PyTorch's files and safetensors files, there and back; what it refuses."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import torch_oracle.weights
from experiment.__main__ import main
from experiment.commands import convert
from torch_oracle.weights import read, serialize


def tensors() -> dict[str, Tensor]:
    """One of every kind that state dicts hold: a matrix, a scalar, an empty one, several types."""
    draw = torch.Generator().manual_seed(0)
    return {
        "conv1.weight": torch.randn(4, 3, 2, 2, generator=draw),
        "bn1.num_batches_tracked": torch.tensor(2**40),
        "half.weight": torch.randn(3, 5, generator=draw).bfloat16(),
        "double.weight": torch.randn(2, generator=draw, dtype=torch.float64),
        "mask": torch.tensor([True, False]),
        "nothing": torch.zeros(0, 3),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def run(*paths: Path) -> int:
    return main(["convert", *map(str, paths)])


# There and back


@pytest.mark.parametrize("suffix", convert.TORCH)
def test_there_and_back_is_exact(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin, middle, end = tmp_path / f"a{suffix}", tmp_path / "b.safetensors", tmp_path / f"c{suffix}"
    torch.save(tensors(), begin)
    assert run(begin, middle) == 0
    assert_same(load_file(middle), tensors())
    assert run(middle, end) == 0
    assert_same(torch.load(end, weights_only=True), tensors())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([begin.name, middle.name, end.name])
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{middle}: 6 tensors, 68 numbers", f"{end}: 6 tensors, 68 numbers"]
    assert err == ""


WAYS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "ordered": OrderedDict,
    "parameters": lambda state: {
        name: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        for name, tensor in state.items()
    },
    "a checkpoint": lambda state: {
        "epoch": 3,
        "state_dict": state,
        "best_prec1": 91.73,
        "optimizer": {"a": [1]},
    },
    "torchvision's": lambda state: {"model": state, "args": {"lr": 0.1}},
    "PyTorch's tutorial": lambda state: {"epoch": 1, "model_state_dict": state, "loss": torch.tensor(1.0)},
    "DataParallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "DataParallel's checkpoint": lambda state: {
        "state_dict": OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())
    },
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_saving_is_read(way: str, zipped: bool, tmp_path: Path) -> None:
    torch.save(WAYS[way](tensors()), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "a.pth")
    assert_same(found, tensors())
    assert not any(tensor.requires_grad for tensor in found.values())


def test_a_module_of_that_name_keeps_its_prefix(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(2), "fc.weight": torch.ones(3)}
    torch.save(state, tmp_path / "a.pth")
    assert_same(read(tmp_path / "a.pth"), state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_views_are_written_each_on_its_own(suffix: str, tmp_path: Path) -> None:
    """Tied, strided and sliced tensors, as state dicts hold them; of a slice, not the whole storage."""
    whole = torch.arange(100_000.0)
    state = {
        "slice": whole[10:14],
        "tied": whole[10:14],
        "strided": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    path = tmp_path / f"a{suffix}"
    path.write_bytes(serialize(state, suffix))
    assert_same(read(path), state)
    assert path.stat().st_size < 10_000


def test_the_oracles_weights_go_through_both_kinds(tmp_path: Path) -> None:
    model = torch_oracle.resnet18(5, width=2)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "a.safetensors") == 0
    other = torch_oracle.resnet18(5, width=2)
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))  # PyTorch's own, which wants every name
    assert_same(other.state_dict(), model.state_dict())


def test_the_suffixes_are_the_oracles() -> None:
    assert (convert.SAFETENSORS, convert.TORCH) == (
        torch_oracle.weights.SAFETENSORS,
        torch_oracle.weights.TORCH,
    )
    with pytest.raises(ValueError, match=r"suffix must be one of .*, not '\.onnx'"):
        serialize({}, ".onnx")


# Mistakes


class Code:
    """Makes a folder when it is unpickled, which must not happen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.iterdir()}


def refused(capsys: pytest.CaptureFixture[str], directory: Path, *argv: object) -> str:
    """The one line that refuses, which leaves everything as it was."""
    before = listing(directory)
    assert main(["convert", *map(str, argv)]) == 2
    assert listing(directory) == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


@pytest.fixture
def files(tmp_path: Path) -> Path:
    torch.save(tensors(), tmp_path / "good.pth")
    save_file(tensors(), tmp_path / "good.safetensors")
    (tmp_path / "link.pt").symlink_to("good.pth")
    (tmp_path / "folder.pth").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "target", "parts"),
    [
        ("absent.pth", "a.safetensors", ["absent.pth: not found"]),
        ("folder.pth", "a.safetensors", ["folder.pth: is no file"]),
        ("good.onnx", "a.safetensors", ["good.onnx: the suffix must be one of .safetensors, .pth, .pt, .th"]),
        ("good.pth", "a.npz", ["a.npz: the suffix must be one of"]),
        ("good.pth", "a", ["a: the suffix must be one of"]),
        ("good.pth", "good.safetensors", ["good.safetensors: exists", "remove it"]),
        ("good.safetensors", "good.pth", ["good.pth: exists", "remove it"]),
        ("good.safetensors", "link.pt", ["link.pt: exists"]),
        ("good.pth", "good.pth", ["good.pth: is the file to be read"]),
        ("good.pth", "link.pt", ["link.pt: is the file to be read"]),
        ("good.pth", "a.th", ["a.th: is of the kind of", "good.pth", ".safetensors"]),
        ("good.safetensors", "a.safetensors", ["a.safetensors: is of the kind of"]),
        ("good.pth", "none/a.safetensors", ["there is no folder", "none"]),
        ("good.pth", "good.pth/a.safetensors", ["there is no folder"]),
    ],
)
def test_a_mistake_in_the_names(
    source: str, target: str, parts: list[str], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, files, files / source, files / target)
    assert [part for part in parts if part not in error] == [], error


@pytest.mark.parametrize(
    "argv", [[], ["a.pth"], ["a.pth", "b.safetensors", "c"], ["a.pth", "b.pth", "--all"]]
)
def test_a_mistake_in_the_arguments(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "convert --help" in refused(capsys, tmp_path, *argv)


def save_code(path: Path) -> None:
    torch.save({"weight": torch.ones(2), "trap": Code(path.with_name("trapped"))}, path)


def cut(path: Path) -> None:
    path.write_bytes(serialize(tensors(), path.suffix)[:-100])


CONTENTS: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "code": ("a.pth", save_code, ["mkdir", "code", "state_dict()"]),
    "a model": ("a.pth", lambda path: torch.save(torch.nn.Linear(2, 2), path), ["Linear", "state_dict()"]),
    "arguments beside": (
        "a.pth",
        lambda path: torch.save({"state_dict": tensors(), "args": argparse.Namespace(lr=1)}, path),
        ["argparse.Namespace", "state_dict()"],
    ),
    "NumPy arrays": ("a.pth", lambda path: torch.save({"a": np.ones(2)}, path), ["numpy", "code"]),
    "TorchScript": (
        "a.pt",
        lambda path: torch.jit.save(torch.jit.script(torch.nn.ReLU()), path),
        ["TorchScript", "state_dict()"],
    ),
    "a list": ("a.pth", lambda path: torch.save([torch.ones(1)], path), ["no state dict", "list"]),
    "a tensor": ("a.pth", lambda path: torch.save(torch.ones(1), path), ["no state dict", "Tensor"]),
    "an empty dict": ("a.pth", lambda path: torch.save({}, path), ["no state dict"]),
    "numbers": (
        "a.pth",
        lambda path: torch.save({"fc.weight": torch.ones(1), "epoch": 3, "lr": 0.1}, path),
        ["no tensors: epoch (int), lr (float)"],
    ),
    "garbage": ("a.th", lambda path: path.write_bytes(b"hello world" * 99), ["no file of torch.save"]),
    "nothing": ("a.pth", lambda path: path.write_bytes(b""), ["no file of torch.save"]),
    "half a file": ("a.pth", cut, ["no file of torch.save", "damaged"]),
    "half a safetensors file": ("a.safetensors", cut, ["no safetensors file", "damaged"]),
    "no safetensors file": ("a.safetensors", save_code, ["no safetensors file"]),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case", CONTENTS)
def test_a_file_that_is_no_state_dict(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, save, parts = CONTENTS[case]
    save(tmp_path / name)
    target = tmp_path / ("b.pth" if name.endswith("safetensors") else "b.safetensors")
    capfd.readouterr()
    error = refused(capfd, tmp_path, tmp_path / name, target)
    assert str(tmp_path / name) in error
    assert [part for part in parts if part not in error] == [], error
    assert len(error) < 500


def test_without_pytorch(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = refused(capsys, files, files / "good.pth", files / "new.safetensors")
    assert "extra `test`" in error
    assert "'.[test]'" in error


def test_a_disk_that_cannot_be_written_to(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_file", fail)
    error = refused(capsys, files, files / "good.pth", files / "new.safetensors")
    assert "new.safetensors: cannot be written (No space left on device)" in error
