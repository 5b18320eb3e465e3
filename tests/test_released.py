"""The network that comes with the tree: its hash, what it knows, and that its command makes it again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path

import pytest
from PIL import Image

from experiment.__main__ import main
from experiment.commands.predict import RELEASED
from experiment.data.loading import load
from experiment.files import run_folder
from numpy_ref.cores import thread_count

MACHINE = RELEASED / "machine.json"
# Other kernels round otherwise, training magnifies it, and some of the 360 test images change their class.
ELSEWHERE = 0.02


def sha256(path: Path) -> str:
    """Of a file, as sha256sum prints it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listed() -> dict[str, str]:
    """The sums in SHA256SUMS, by file name."""
    lines = (RELEASED / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def machine() -> dict[str, object]:
    """What the bits of a run in NumPy depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "avx512": "avx512f" in cpu.get("flags", ""),
        "cores": thread_count(),
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "scikit-learn": importlib.metadata.version("scikit-learn"),
    }


def test_the_files_are_those_that_were_released() -> None:
    assert "weights.safetensors" in listed()
    for name, digest in listed().items():
        assert sha256(RELEASED / name) == digest, name
    assert (RELEASED / "weights.safetensors").stat().st_size < 3e6


def test_it_predicts_out_of_the_box(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At least nine of ten test images, as files, are classified correctly."""
    config = run_folder.read_record(RELEASED)["config"]
    data = load("digits", data_dir=None, batch_size=8, seed=config["seed"])
    batch = next(iter(data.eval_batches("test", 10)))
    paths = [str(tmp_path / f"{index}.png") for index in range(10)]
    for path, image in zip(paths, batch["image"], strict=True):
        Image.fromarray(image[..., 0]).save(path)
    assert main(["predict", *paths, "--top", "1"]) == 0
    found = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    wanted = [data.class_names[label] for label in batch["label"]]
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= 9


@pytest.mark.slow
def test_its_command_makes_it_again(tmp_path: Path) -> None:
    """Bit for bit on the machine and versions that made it, elsewhere as accurate."""
    from experiment.commands import train

    command = run_folder.read_record(RELEASED)["sessions"][-1]["command"]
    command[command.index("--run-dir") + 1] = str(tmp_path / "again")
    assert train.main(command) == 0
    accuracy, released = (
        run_folder.read_json(folder / "summary.json")["test"]["accuracy"]
        for folder in (tmp_path / "again", RELEASED)
    )
    assert accuracy == pytest.approx(released, abs=ELSEWHERE)
    if machine() == run_folder.read_json(MACHINE):
        assert sha256(tmp_path / "again" / "weights.safetensors") == listed()["weights.safetensors"]
