"""The wheel, used from a folder that is no checkout, as one who installed it uses it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

from experiment import program
from experiment.commands import convert, prepare
from experiment.errors import UserError
from experiment.run.completed_run import open_run
from experiment.run.outcome import resume_command
from experiment.study import plan

ROOT = Path(__file__).parents[1]
SOURCES = ("experiment", "jax_resnet", "numpy_ref", "parity", "torch_oracle", "recipes", "studies", "weights")
FILES = ("pyproject.toml", "README.md", "LICENSE")
TRAIN = shlex.split("train --dataset digits --steps 2 --train-subset 0.2 --batch-size 16 --no-report")


def run(*command: str | Path, cwd: Path, status: int = 0, env: Mapping[str, str] | None = None) -> str:
    """Run a command; return its stdout and stderr."""
    unset = ("PYTHONPATH", "COVERAGE_PROCESS_START")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    words = list(map(str, command))
    environment = {**inherited, **(env or {})}
    result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == status, (result.args, result.stdout, result.stderr)
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy of its files: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    list_files = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run([*list_files, *SOURCES, *FILES], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.exists():
            target.write_bytes(source.read_bytes())
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=tree)
    return next(folder.glob("*.whl"))


def use(script: Path, folder: Path, env: Mapping[str, str] | None = None) -> None:
    """Train by a recipe, predict the shipped image, and find a shipped study by its name."""
    output = run(script, *TRAIN, "--recipe", "mnist-cnn-numpy", "--run-dir", "mine", cwd=folder, env=env)
    assert "test: accuracy" in output
    assert (folder / "mine" / "weights.safetensors").is_file()
    path, *classes = run(script, "predict", "weights/digit.png", cwd=folder, env=env).splitlines()
    assert path.endswith("/experiment/weights/digit.png")
    assert classes[0].split() == ["0.6969", "1"]
    output = run(script, "study", "mnist-tenth", "--report-only", cwd=folder, status=2, env=env)
    assert output.startswith("error: --run-dir: there is no runs/study-mnist-tenth;"), output


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "mine"
    folder.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    run(*install, "--target", site, wheel, cwd=folder)
    env = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    use(site / "bin" / "threeway-resnet", folder, env)
    packages = "experiment, jax_resnet, numpy_ref, parity, torch_oracle"
    code = f"import {packages}\nfor p in ({packages}): print(p.__file__)"
    files = [Path(line) for line in run(sys.executable, "-c", code, cwd=folder, env=env).splitlines()]
    assert [file.parts[: len(site.parts)] for file in files] == [site.parts] * 5
    assert all(file.with_name("py.typed").is_file() for file in files)
    for name in ("recipes", "studies"):
        installed = {path.name for path in (site / "experiment" / name).iterdir()}
        assert installed == {path.name for path in (ROOT / name).iterdir()}
    script = site / "bin" / "threeway-resnet"
    shown = run(sys.executable, "-X", "importtime", script, "--help", cwd=folder, env=env)
    assert "usage: threeway-resnet COMMAND ...\n\n  train " in shown
    imported = {line.split("|")[-1].strip() for line in shown.splitlines() if line.startswith("import time:")}
    assert "experiment.program" in imported
    assert not imported & {"jax", "torch", "numpy", "tensorflow_datasets", "orbax.checkpoint"}


MODULE = "/site-packages/experiment/__main__.py"


@pytest.mark.parametrize(
    ("typed", "checkout", "train", "report"),
    [
        (["train.py", "--seed", "1"], True, "python train.py", "python -m experiment report"),
        ([MODULE, "report", "RUN"], True, "python train.py", "python -m experiment report"),
        ([MODULE, "train"], True, "python -m experiment train", "python -m experiment report"),
        ([MODULE, "report", "RUN"], False, "python -m experiment train", "python -m experiment report"),
        (["/bin/threeway-resnet", "train"], True, "threeway-resnet train", "threeway-resnet report"),
        (["/bin/threeway-resnet", "report"], False, "threeway-resnet train", "threeway-resnet report"),
    ],
)
def test_suggested_commands_begin_with_what_was_typed(
    monkeypatch: pytest.MonkeyPatch, typed: list[str], checkout: bool, train: str, report: str
) -> None:
    monkeypatch.setattr(sys, "argv", typed)
    monkeypatch.setattr(program, "in_checkout", lambda: checkout)
    assert (program.command("train"), program.command("report")) == (train, report)
    assert program.label() == ("train.py: " if train == "python train.py" else "")
    assert resume_command(Path("my run")) == f"{train} --resume --run-dir 'my run'"


def test_extras_are_installed_from_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wheel has no constraints.txt beside it."""
    monkeypatch.setattr(program, "in_checkout", lambda: False)
    assert prepare.install().endswith("/bin/pip install 'WHEEL[prepare]'")
    with pytest.raises(SystemExit):
        convert.main(["--help"])
    assert "pip install 'WHEEL[test]'" in " ".join(capsys.readouterr().out.split())


def test_shipped_files_are_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the user's comes first, and a folder that has a study's name is no study."""
    monkeypatch.setattr("numpy_ref.engine.thread_count", lambda: 1)  # too little work to start processes for
    monkeypatch.chdir(tmp_path)
    digit = Path("weights/digit.png")
    assert program.found(digit) == program.shipped("weights") / "digit.png"
    for other in ("weights/absent.png", "weights/../pyproject.toml", "digit.png", "recipes/mine.toml"):
        assert program.found(Path(other)) == Path(other)
    assert open_run(Path("weights/digits-resnet8"), framework="numpy").image_shape == (32, 32, 1)
    (tmp_path / "cars").mkdir()
    assert plan.read(Path("cars"), {}).name == "cars"
    assert plan.read(Path("studies/cars.toml"), {}) == plan.read(Path("cars"), {})
    with pytest.raises(UserError, match=r"^absent: not found; name a file, or one of batch-norm, cars, "):
        plan.read(Path("absent"), {})
    digit.parent.mkdir()
    digit.touch()
    assert program.found(digit) == digit


@pytest.mark.slow
def test_the_wheel_with_the_newest_packages_that_it_allows(wheel: Path, tmp_path: Path) -> None:
    """Without constraints.txt, in an environment of its own; pip brings a gigabyte."""
    venv.create(tmp_path / "venv", with_pip=True)
    python, folder = tmp_path / "venv" / "bin" / "python", tmp_path / "mine"
    script = python.with_name("threeway-resnet")
    folder.mkdir()
    run(python, "-m", "pip", "install", "-q", wheel, cwd=folder)
    use(script, folder)
    run(python, "-c", "import experiment, jax_resnet, numpy_ref", cwd=folder)
    shipped = "weights/digits-resnet8"
    assert "top-1 0.98" in run(script, "evaluate", shipped, cwd=folder)
    assert "all agree" in run(script, "parity", f"{shipped}/weights.safetensors", cwd=folder)
    jax = ["train", "--model", "resnet8", "--steps", "2", "--batch-size", "16", "--no-test", "--no-report"]
    assert "jax, float32" in run(script, *jax, "--run-dir", "jax", cwd=folder)
    (folder / "small.toml").write_text(
        "seeds = [1, 2]\ntuning_seeds = [3]\n"
        '[base]\nmodel = "cnn"\nframework = "numpy"\nsteps = 2\nbatch_size = 16\n'
        '[[optimizers]]\nname = "adam"\ncandidates = [{ lr = 0.001 }]\n'
        '[[optimizers]]\nname = "sgd"\ncandidates = [{ lr = 0.1 }]\n'
    )
    run(script, "study", "small.toml", cwd=folder)
    study = (folder / "runs" / "study-small" / "study.md").read_text()
    assert "`threeway-resnet study small.toml`" in study
