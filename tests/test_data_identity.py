"""Which data a run used is recorded, and other data under the same name are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiment.__main__ import main
from experiment.commands import train
from experiment.data import builtin
from experiment.data.loading import load
from tests.helpers import made_tfds

FILES = made_tfds.images(8, (32, 32, 3))
FIELDS = ("data_version", "data_config", "data_test_split", "data_sha256")


def write(root: Path) -> Path:
    return made_tfds.write(root, "made", {"train": FILES, "test": FILES[:4]}, shape=(32, 32, 3))


def identity(root: Path, name: str = "made", **options: Any) -> dict[str, str | None]:
    return dict(load(name, data_dir=str(root), batch_size=2, seed=0, **options).identity)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def larger(directory: Path) -> None:
    edit(directory / "dataset_info.json", lambda info: info["splits"][0].update(numBytes="1"))


def other_features(directory: Path) -> None:
    """The features say that images are of 32x32; now, that sizes differ."""

    def change(described: Any) -> None:
        image = described["featuresDict"]["features"]["image"]["image"]
        image["shape"]["dimensions"] = ["-1", "-1", "3"]

    edit(directory / "features.json", change)


def another_version(directory: Path) -> None:
    edit(directory / "dataset_info.json", lambda info: info.update(version="1.1.0"))
    directory.rename(directory.with_name("1.1.0"))


def cited(directory: Path) -> None:
    words = {"description": "other words", "citation": "other words"}
    edit(directory / "dataset_info.json", lambda info: info.update(words))


def test_the_identity_is_that_of_the_stored_examples(tmp_path: Path) -> None:
    directory = write(tmp_path)
    before = identity(tmp_path)
    assert tuple(before) == FIELDS
    assert list(before.values())[:3] == ["1.0.0", None, "test"]
    copy = shutil.copytree(tmp_path, tmp_path / "elsewhere")
    cited(copy / "made" / "1.0.0")
    assert identity(copy, image_size=(40, 40), val_fraction=0.5) == before
    sums = {before["data_sha256"]}
    for number, change in enumerate((larger, other_features, another_version)):
        copy = shutil.copytree(tmp_path / "made", tmp_path / str(number) / "made")
        change(copy / directory.name)
        sums.add(identity(tmp_path / str(number))["data_sha256"])
    assert len(sums) == 4


def test_the_identity_of_data_without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("digits", "synthetic"):
        facts = identity(Path(), name)
        assert list(facts.values())[:3] == [None, None, None]
        assert identity(Path(), name, image_size=(40, 40), val_fraction=0.5) == facts
    before = identity(Path(), "synthetic")
    monkeypatch.setattr(
        builtin.SyntheticSource, "_image", lambda self, number: np.zeros((32, 32, 3), np.uint8)
    )
    assert identity(Path(), "synthetic") != before


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set `made`, and a run of two steps on it."""
    folder = tmp_path_factory.mktemp("identity")
    write(folder / "data")
    argv = ["--dataset", "made", "--data-dir", str(folder / "data"), "--run-dir", str(folder / "run")]
    argv += ["--model", "cnn", "--framework", "numpy", "--steps", "2", "--batch-size", "2", "--no-report"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert train.main(argv) == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a copy of the data and the run."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


EVALUATE = ["evaluate", "run", "--data-dir", "data"]
RESUME = ["--run-dir", "run", "--resume", "--data-dir", "data", "--steps", "3"]


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", [larger, another_version])
def test_other_data_of_the_same_name_and_size_are_refused(
    here: Path, change: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = json.loads((here / "run" / "config.json").read_text())["resolved"]
    change(here / "data" / "made" / "1.0.0")
    before = listing(here / "run")
    for command in (lambda: main(EVALUATE), lambda: train.main(RESUME)):
        capsys.readouterr()
        assert command() == 2
        out, error = capsys.readouterr()
        assert (out, error.count("\n")) == ("", 1)
        for part in ("--data-dir", f"made (version {recorded['data_version']}", recorded["data_sha256"][:12]):
            assert part in error
    assert listing(here / "run") == before


def test_the_data_that_were_recorded_are_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(EVALUATE) == 0
    assert capsys.readouterr().err == ""


def test_a_run_that_recorded_no_data_goes_on_and_says_so(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder of a commit before these fields; a resumed run has them."""
    path = here / "run" / "config.json"
    recorded = json.loads(path.read_text())["resolved"]
    edit(path, lambda record: [record["resolved"].pop(name) for name in FIELDS])
    note = "which version of its data the run began with is not recorded; taken is made (version 1.0.0, "
    capsys.readouterr()
    assert main(EVALUATE) == 0
    assert note in capsys.readouterr().err
    assert train.main([*RESUME[:3], "--data-dir", "data"]) == 0
    assert note in (here / "run" / "log.txt").read_text()
    assert json.loads(path.read_text())["resolved"] == recorded
