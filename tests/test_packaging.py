"""The wheel, used from a folder that is no checkout, as one who installed it uses it."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAIN = [
    "train",
    "--recipe",
    "mnist-cnn-numpy",
    "--dataset",
    "digits",
    "--steps",
    "2",
    "--train-subset",
    "0.2",
]
TRAIN += ["--batch-size", "16", "--no-report"]


def run(*command: str | Path, cwd: Path, status: int = 0, env: Mapping[str, str] | None = None) -> str:
    """Run a command; return its stdout and stderr."""
    unset = ("PYTHONPATH", "COVERAGE_PROCESS_START")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**inherited, **(env or {})},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == status, (result.args, result.stdout, result.stderr)
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy of the tracked files: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    keep = ("experiment", "jax_resnet", "numpy_ref", "torch_oracle", "recipes", "studies", "weights")
    for name in filter(None, names.split("\0")):
        source, target = ROOT / name, folder / "tree" / name
        if name.split("/")[0] in (*keep, "pyproject.toml", "README.md", "LICENSE") and os.path.lexists(
            source
        ):
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                target.symlink_to(os.readlink(source))
            else:
                target.write_bytes(source.read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "-w", folder, folder / "tree", cwd=folder)
    return next(folder.glob("*.whl"))


def use(script: list[str | Path], folder: Path, env: Mapping[str, str] | None = None) -> None:
    """Train by a recipe, predict the shipped image, read a shipped study, and fail in one line."""
    output = run(*script, *TRAIN, "--run-dir", "mine", cwd=folder, env=env)
    assert "test: accuracy" in output
    assert (folder / "mine" / "weights.safetensors").is_file()
    output = run(*script, "predict", "weights/digit.png", cwd=folder, env=env)
    assert output.splitlines()[0].endswith("weights/digit.png")
    assert len(output.splitlines()) > 1
    output = run(*script, "study", "studies/mnist-tenth.toml", "--report-only", cwd=folder, status=2, env=env)
    assert output.startswith("error: --run-dir: there is no runs/study-mnist-tenth;"), output
    output = run(*script, "predict", "mine", "absent.png", cwd=folder, status=2, env=env)
    assert len(output.splitlines()) == 1, output


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "mine"
    folder.mkdir()
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        site,
    ]
    run(*pip, wheel, cwd=folder)
    env = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    use([site / "bin" / "threeway-resnet"], folder, env)
    output = run(site / "bin" / "threeway-resnet", "--help", cwd=folder, env=env)
    assert output.startswith("usage: threeway-resnet COMMAND ...\n\n  train ")
    packages = "experiment, jax_resnet, numpy_ref, torch_oracle"
    code = f"import {packages}\nfor p in ({packages}): print(p.__file__)"
    files = [Path(line) for line in run(sys.executable, "-c", code, cwd=folder, env=env).splitlines()]
    assert [file.parts[: len(site.parts)] for file in files] == [site.parts] * 4
    assert all(file.with_name("py.typed").is_file() for file in files)


@pytest.mark.slow
def test_the_wheel_with_the_newest_packages_that_it_allows(wheel: Path, tmp_path: Path) -> None:
    """Without constraints.txt, in an environment of its own; pip brings a gigabyte."""
    venv.create(tmp_path / "venv", with_pip=True)
    python, folder = tmp_path / "venv" / "bin" / "python", tmp_path / "mine"
    folder.mkdir()
    run(python, "-m", "pip", "install", "-q", wheel, cwd=folder)
    use([python.with_name("threeway-resnet")], folder)
    run(python, "-c", "import experiment, jax_resnet, numpy_ref", cwd=folder)
    jax = ["train", "--model", "resnet8", "--steps", "2", "--batch-size", "16", "--no-test", "--no-report"]
    output = run(python.with_name("threeway-resnet"), *jax, "--run-dir", "jax", cwd=folder)
    assert "jax, float32" in output
    study = folder / "small.toml"
    study.write_text(
        "seeds = [1, 2]\ntuning_seeds = [3]\n"
        '[base]\nmodel = "cnn"\nframework = "numpy"\nsteps = 2\nbatch_size = 16\n'
        '[[optimizers]]\nname = "adam"\ncandidates = [{ lr = 0.001 }]\n'
        '[[optimizers]]\nname = "sgd"\ncandidates = [{ lr = 0.1 }]\n'
    )
    run(python.with_name("threeway-resnet"), "study", "small.toml", cwd=folder)
    assert (folder / "runs" / "study-small" / "study.md").is_file()
