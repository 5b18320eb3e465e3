"""`python -m experiment prepare`: what it says without TensorFlow, and MNIST by TFDS' own builder with it."""

from __future__ import annotations

import gzip
import importlib.util
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiment.__main__ import COMMANDS, main
from experiment.commands import prepare
from experiment.data.loading import load
from experiment.errors import UserError
from tests.helpers import made_tfds

ROOT = Path(__file__).parents[1]


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """The exit status, stdout and stderr of a command."""
    status = main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def one_error(result: tuple[int, str, str], *parts: str) -> None:
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert [part for part in parts if part not in err] == [], err


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    status, out, err = told(capsys, *argv)
    assert (status, err) == (0, "")
    for name, text in COMMANDS.items():
        assert name in out
        assert text in out
        assert importlib.util.find_spec(f"experiment.commands.{name}")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    one_error(told(capsys, "prepair", "mnist"), "'prepair'", "prepare")


def test_module_runs() -> None:
    command = [sys.executable, "-m", "experiment", "prepare", "Mnist"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_what_needs_no_preparation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("digits", "synthetic"):
        assert told(capsys, "prepare", name, "--data-dir", str(tmp_path))[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_already_prepared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = made_tfds.images(4, (28, 28))
    directory = made_tfds.write(tmp_path, "mnist", {"train": files, "test": files}, shape=(28, 28, 1))
    status, out, err = told(capsys, "prepare", "mnist", "--data-dir", str(tmp_path))
    assert (status, err) == (0, "")
    assert out == f"mnist 1.0.0 is already prepared in {directory}\n"


@pytest.mark.parametrize(("name", "part"), [("mnits", "did you mean mnist"), ("a/../b", "not a TFDS name")])
def test_unknown_data_set(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, part: str) -> None:
    one_error(told(capsys, "prepare", name, "--data-dir", str(tmp_path)), "--dataset", part)
    assert list(tmp_path.iterdir()) == []


def test_without_tensorflow(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = told(capsys, "prepare", "mnist", "--data-dir", str(tmp_path / "my data"))
    command = f".venv-prepare/bin/python -m experiment prepare mnist --data-dir '{tmp_path / 'my data'}'"
    one_error(result, "mnist needs TensorFlow", "python -m venv", "'.[prepare]'", command)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("no space\nleft"), AssertionError(), RuntimeError("x" * 999)])
def test_a_failure_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    import tensorflow_datasets as tfds

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tfds, "builder", fail)
    result = told(capsys, "prepare", "mnist", "--data-dir", str(tmp_path))
    one_error(result, "mnist could not be prepared: ", type(error).__name__)
    assert len(result[2]) < 400


def test_what_is_downloaded_by_hand(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow_datasets as tfds

    builder = SimpleNamespace(MANUAL_DOWNLOAD_INSTRUCTIONS="\nGet a.tar\nand b.tar.\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: builder)
    result = told(capsys, "prepare", "imagenet2012", "--data-dir", str(tmp_path))
    one_error(result, "by hand", str(tmp_path / "downloads" / "manual"), "Get a.tar and b.tar.")
    assert list(tmp_path.iterdir()) == []


# With TensorFlow

WITH_LOCAL_FILES = """
import shutil, sys
from pathlib import Path
from tensorflow_datasets.core.download import checksums, downloader

def from_disk(self, url, destination, verify=True):
    # What the download hands over: a file, and its sum, which TFDS compares with the one it has on record.
    path = Path(destination) / url.rsplit("/")[-1]
    shutil.copy(Path(FILES) / path.name, path)
    self._pbar_url.update(1)
    return downloader.DownloadResult(path=path, url_info=checksums.get_all_url_infos()[url])

downloader._Downloader._sync_download = from_disk
from experiment.__main__ import main
sys.exit(main(["prepare", "mnist", "--data-dir", DATA_DIR]))
"""


@pytest.fixture(scope="module")
def python_with_tensorflow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with the extra `prepare`: THREEWAY_TF_PYTHON, or that of a fresh venv."""
    if given := os.environ.get("THREEWAY_TF_PYTHON"):
        return given
    place = tmp_path_factory.mktemp("prepare") / "venv"
    python = str(place / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    install = [python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", ".[prepare]"]
    subprocess.run(install, cwd=ROOT, check=True)
    return python


def write_idx(directory: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write the four files of MNIST, with images made here; return those and the labels of each split."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    parts = {}
    for split, prefix, count in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 10:18, 10:18] = rng.integers(0, 256, (count, 8, 8))
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        for kind, array, magic in (("images-idx3", images, 0x803), ("labels-idx1", labels, 0x801)):
            header = struct.pack(f">{1 + array.ndim}i", magic, *array.shape)
            with gzip.open(directory / f"{prefix}-{kind}-ubyte.gz", "wb", compresslevel=1) as file:
                file.write(header + array.tobytes())
        parts[split] = (images, labels)
    return parts


def start(python: str, files: Path, data_dir: Path) -> subprocess.Popen[str]:
    program = f"FILES, DATA_DIR = {str(files)!r}, {str(data_dir)!r}\n{WITH_LOCAL_FILES}"
    return subprocess.Popen(
        [python, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_mnist_through_the_builder_of_tfds(python_with_tensorflow: str, tmp_path: Path) -> None:
    """Killed half way, nothing is taken for MNIST; run again, all is read back without TensorFlow."""
    parts = write_idx(tmp_path / "idx")
    data_dir = tmp_path / "tfds"

    killed = start(python_with_tensorflow, tmp_path / "idx", data_dir)
    written = 0
    while killed.poll() is None and not written:
        time.sleep(0.05)
        records = (data_dir / "mnist").glob("incomplete.*/*.array_record*")
        written = sum(path.stat().st_size for path in records)
    assert written, killed.communicate()[1]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    with pytest.raises(UserError, match="mnist is not prepared"):
        load("mnist", data_dir=str(data_dir), batch_size=64, seed=0)

    process = start(python_with_tensorflow, tmp_path / "idx", data_dir)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    want = f"mnist 3.0.1 is prepared in {data_dir / 'mnist' / '3.0.1'}: train 60000, test 10000"
    assert out.splitlines()[-1] == want

    again = start(python_with_tensorflow, tmp_path / "idx", data_dir)
    assert "already prepared" in again.communicate(timeout=120)[0]
    assert again.returncode == 0

    data = load("mnist", data_dir=str(data_dir), batch_size=64, seed=0, val_fraction=0)
    assert "tensorflow" not in sys.modules
    for split, (images, labels) in parts.items():
        batches = list(data.eval_batches("train" if split == "train" else "test", 5000))
        read = np.concatenate([batch["image"] for batch in batches])
        read_labels = np.concatenate([batch["label"] for batch in batches])
        # TFDS shuffles what it writes: put both in the order of their bytes before comparing.
        padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]
        np.testing.assert_array_equal(rows(read, read_labels), rows(padded, labels), err_msg=split)


def rows(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The images with their labels, one a row [N, H * W + 1], in an order of nothing but themselves."""
    together = np.concatenate([images.reshape(len(images), -1), labels[:, None].astype(np.uint8)], axis=1)
    ordered = b"".join(sorted(map(bytes, together)))
    return np.frombuffer(ordered, np.uint8).reshape(together.shape)


def test_install_command_is_that_of_this_project() -> None:
    assert (ROOT / "constraints.txt").is_file()
    assert "prepare = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "-c constraints.txt -e '.[prepare]'" in prepare.install()
