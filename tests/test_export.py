"""`python -m experiment export`: what each file computes, beside PyTorch and both engines; refusals."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from markdown_it import MarkdownIt

import torch_oracle
from experiment import __main__
from experiment.commands import export, train
from experiment.errors import UserError
from experiment.files import onnx_graph
from experiment.program import shipped
from jax_resnet.export import StepRunner, export_network, export_step, flat_state, run_network
from tests.helpers.comparing import assert_all_close, assert_close
from tests.helpers.jax_engine import CLASSES, MEAN, SHAPE, STD, flat
from tests.helpers.jax_engine import make_engine as make_jax_engine
from tests.helpers.numpy_engine import make_engine as make_numpy_engine
from tests.helpers.runs import highest_precision
from tests.tolerances import FLOAT64_NETWORK

__all__ = ["highest_precision"]

# The difference that the project promises of an exported network in float32, of its largest logit.
EXPORTED = 1e-5

BOTTLENECKS: dict[str, Any] = {"width": 8, "stage_sizes": (1, 2, 1)}
NETWORKS: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("resnet8", {}, (32, 40, 3)),
    ("resnet20", {"width": 4, "batch_norm": False}, (32, 32, 1)),
    ("resnet18", {"width": 8, "stage_sizes": (1, 1, 1, 1)}, (64, 48, 3)),
    ("resnet18", {"width": 4, "stage_sizes": (2, 1), "small_images": True, "batch_norm": False}, (32, 32, 1)),
    ("resnet50", BOTTLENECKS, (64, 64, 1)),
    ("resnet50", {**BOTTLENECKS, "stride_in_1x1": True}, (64, 64, 3)),
    ("cnn", {"image_size": (32, 36)}, (32, 36, 1)),
]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The NumPy engine's others would take a second to start."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def warm(model: str, channels: int, options: dict[str, Any], size: tuple[int, int]) -> torch.nn.Module:
    """A network of PyTorch's whose running statistics are those of some batches, in evaluation mode."""
    torch.manual_seed(0)
    network = torch_oracle.MODELS[model](CLASSES, channels, **options).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, channels, *size))
    return network.eval()


@pytest.mark.parametrize(("model", "options", "shape"), NETWORKS)
def test_the_onnx_graph_is_the_network(
    model: str, options: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    network = warm(model, shape[2], options, shape[:2])
    state, at_1x1 = torch_oracle.state_dict(network), options.get("stride_in_1x1", False)
    content = onnx_graph.build(state, shape, stride_in_1x1=at_1x1, metadata={"mean": [0.5]})
    for count in (1, 5):
        image = np.random.default_rng(count).normal(size=(count, shape[2], *shape[:2])).astype(np.float32)
        with torch.no_grad():
            expected = network(torch.from_numpy(image))
        assert_close("logits", onnx_graph.run(content, image), expected, EXPORTED)


def test_the_onnx_file_says_what_it_takes() -> None:
    import onnx

    state = torch_oracle.state_dict(torch_oracle.resnet8(CLASSES, 3))
    content = onnx_graph.build(state, SHAPE, stride_in_1x1=False, metadata={"mean": MEAN, "std": STD})
    model = onnx.load_from_string(content)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", onnx_graph.OPSET)]
    assert {entry.key: json.loads(entry.value) for entry in model.metadata_props} == {
        "mean": list(MEAN),
        "std": list(STD),
    }
    (given,), (result,) = model.graph.input, model.graph.output
    sizes = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert (given.name, sizes) == ("image", ["N", 3, 16, 16])
    assert [d.dim_param or d.dim_value for d in result.type.tensor_type.shape.dim] == ["N", CLASSES]
    assert {entry.name for entry in model.graph.initializer} >= state.keys()


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), np.uint8)


@pytest.mark.parametrize(
    "model",
    ["resnet50", "cnn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "resnet8"))],
)
def test_the_network_of_stablehlo_is_the_engines(model: str) -> None:
    engine = make_jax_engine(model)
    state = engine.init()
    tree = engine.to_tree(state)
    content = export_network(engine, SHAPE)
    for count in (1, 5):
        (expected,) = engine.evaluate(state, [{"image": pixels(count)}])
        found = run_network(content, {**tree["params"], **tree["batch_stats"]}, pixels(count))
        assert_close("logits", found, expected, FLOAT64_NETWORK)


@pytest.mark.parametrize(
    ("model", "optimizer", "options"),
    [
        pytest.param("resnet50", "adam", {}, marks=pytest.mark.slow),
        ("cnn", "adabound", {}),
        pytest.param("resnet8", "sgd", {}, marks=pytest.mark.slow),
        pytest.param("resnet18", "amsbound", {"accumulate": 2}, marks=pytest.mark.slow),
        pytest.param("resnet18", "adamw", {"freeze_backbone": True}, marks=pytest.mark.slow),
    ],
)
def test_the_exported_step_is_the_engines(model: str, optimizer: str, options: dict[str, Any]) -> None:
    """Three steps in float64: of the JAX engine, and of the NumPy engine, which has no micro-batches."""
    jax_engine = make_jax_engine(model, optimizer, **options)
    step = export_step(jax_engine, SHAPE, 8)
    tree = jax_engine.to_tree(jax_engine.init())
    engines: list[Any] = [jax_engine]
    if "accumulate" not in options:
        engines.append(make_numpy_engine(model, optimizer, **options))
    for engine in engines:
        runner = StepRunner(step, flat_state(jax_engine.from_tree(tree)))
        assert [name for name, *_ in runner.leaves] == sorted(runner.state)
        state = engine.from_tree(tree)
        for i in range(3):
            label = np.random.default_rng(i).integers(CLASSES, size=8, dtype=np.int32)
            batch = {"image": pixels(8, i), "label": label}
            rate = engine.learning_rate(i)
            state, metrics = next(iter(engine.train(state, [batch])))
            found = runner.take(batch, rate)
            assert_close("loss", found.pop("loss"), np.asarray(metrics["loss"]), FLOAT64_NETWORK)
            assert_close("logits", found.pop("logits"), np.asarray(metrics["logits"]), FLOAT64_NETWORK)
            after = {name.replace("/", "."): array for name, array in flat(engine.to_tree(state)).items()}
            assert found.pop("first_nonfinite_step") == -1
            assert_all_close(f"step {i}", found, after, FLOAT64_NETWORK)


# The command

RESNET8 = shipped("weights") / "digits-resnet8"
SMALL = ["--model", "cnn", "--train-subset", "0.05", "--batch-size", "16", "--steps", "2", "--no-report"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the JAX engine, of the network that compiles soonest."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    assert train.main([*SMALL, "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "all"
    assert __main__.main(["export", str(run), "--out", str(out)]) == 0
    return out


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


FILES = {
    *("model.onnx", "model.pth", "network.stablehlo", "training_step.stablehlo"),
    *("weights.safetensors", "training_state.safetensors"),
}


def test_every_file_is_written_and_stands_in_the_card(run: Path, exported: Path) -> None:
    assert names(exported) == FILES | {"README.md"}
    assert {path.name for path in exported.parent.iterdir()} == {"all"}
    card = (exported / "README.md").read_text()
    tokens = MarkdownIt("commonmark").enable("table").parse(card)
    assert sum(token.type == "table_open" for token in tokens) == 7
    for name in FILES:
        digest = hashlib.sha256((exported / name).read_bytes()).hexdigest()
        size = (exported / name).stat().st_size
        assert f"| `{name}` | {size:,} | `{digest}` |" in card
    verdicts = re.findall(r"^\| `(\S+)` \| (.+) \| \S+ \| \S+ \| agrees \|$", card, re.MULTILINE)
    assert len(verdicts) == 7
    assert ("model.onnx", "logits of 5 real images") in verdicts
    assert ("training_step.stablehlo", "state after each of 3 training steps on real images") in verdicts
    summary = json.loads((run / "summary.json").read_text())
    assert f"| test | {summary['test']['loss']:.4f} | {summary['test']['accuracy']:.4f} |" in card
    assert "states no license" in card
    assert str(run.parent) not in card


def test_stablehlo_needs_jax_alone(run: Path, exported: Path) -> None:
    """In a process that finds none of this project's packages: logits, and three steps that learn."""
    program = """
import json, sys
import jax, numpy as np
from safetensors.numpy import load_file

def load(name):
    return jax.export.deserialize(bytearray(open(name, "rb").read()))

image = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 1), np.uint8)
label = np.arange(16, dtype=np.int32) % 10
logits = load("network.stablehlo").call(load_file("weights.safetensors"), image)
step, state, losses = load("training_step.stablehlo"), load_file("training_state.safetensors"), []
for _ in range(3):
    state, metrics = step.call(state, image, label, np.float32(1e-4))
    losses.append(float(metrics["loss"]))
assert not {"jax_resnet", "experiment", "flax", "optax"} & set(sys.modules)
print(json.dumps([np.asarray(logits).tolist(), losses, int(state["step"])]))
"""
    command = [sys.executable, "-P", "-c", f"import jax.export\n{program}"]
    done = subprocess.run(command, cwd=exported, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    logits, losses, steps = json.loads(done.stdout)
    network = torch_oracle.cnn(10, 1)
    torch_oracle.load_state_dict(network, safetensors.numpy.load_file(run / "weights.safetensors"))
    config = json.loads((run / "config.json").read_text())["resolved"]
    image = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 1), np.uint8)
    x = ((image / 255 - config["mean"]) / config["std"]).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.no_grad():
        assert_close("logits", np.array(logits), network.eval()(torch.from_numpy(x)), EXPORTED)
    assert losses[2] < losses[0]
    assert steps == 3


def test_the_pth_file_is_the_state_dict(run: Path, exported: Path) -> None:
    found = torch.load(exported / "model.pth", weights_only=True)
    expected = safetensors.numpy.load_file(run / "weights.safetensors")
    assert found.keys() == expected.keys()
    assert all((found[name].numpy() == array).all() for name, array in expected.items())
    torch_oracle.cnn(10, 1).load_state_dict(found)


def test_a_run_of_numpy_without_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step is compared with NumPy's in float64; of images there are random ones, as the card tells."""
    options = [*SMALL, "--framework", "numpy", "--optimizer", "adabound"]
    assert train.main([*options, "--run-dir", str(tmp_path / "run")]) == 0

    def absent(*args: Any, **options: Any) -> None:
        raise UserError("--data-dir: there is no data")

    monkeypatch.setattr("experiment.data.loading.load", absent)
    assert export.main([str(tmp_path / "run"), "--batch-size", "4"]) == 0
    out = capsys.readouterr().out
    twin = "training_step.stablehlo: exported in float64, with the NumPy engine: state after each of 3"
    assert re.search(twin + r" training steps on random images: off by \d\.\de-1\d, .*: agrees", out)
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "Random images alone were compared, since the run's data set was not at hand: --data-dir" in card
    assert " real images" not in card
    assert "`label`: int32 [4]" in card


def test_a_resnet_is_exported_and_refused_where_it_departs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The released network, whose folder of the project nothing is written to."""
    words = [str(RESNET8), "--out", str(tmp_path / "out"), "--format"]
    assert export.main([*words, "pth", "onnx"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`torch_oracle.resnet8` of threeway-resnet is one" in card
    assert "stablehlo" not in card
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    monkeypatch.setattr(onnx_graph, "EPSILON", 1e-3)
    assert export.main([*words, "onnx"]) == 1
    out, err = capsys.readouterr()
    assert "model.onnx: logits of 8 random images: off by " in out
    assert err == "error: model.onnx does not agree with the run, so nothing is written\n"
    assert names(tmp_path) == set()


def test_a_step_that_departs_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a learning rate that is larger by a ten-thousandth."""
    take = StepRunner.take
    monkeypatch.setattr(StepRunner, "take", lambda self, batch, lr: take(self, batch, lr * 1.0001))
    assert export.main([str(run), "--format", "stablehlo", "--out", str(tmp_path / "out")]) == 1
    assert "DIFFERS: params." in capsys.readouterr().out
    assert names(tmp_path) == set()


def test_a_failure_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "model_card", full)
    with pytest.raises(OSError, match="No space left"):
        export.main([str(run), "--format", "pth", "--out", str(tmp_path / "out")])
    assert names(tmp_path) == set()


def test_refusals_are_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert __main__.main(["export", *words]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err.removeprefix("error: ").rstrip("\n")

    absent, empty, there = tmp_path / "absent", tmp_path / "empty", tmp_path / "there"
    empty.mkdir()
    there.mkdir()
    assert refused(str(absent)) == f"{absent}: not found; name the folder of a run"
    assert refused(str(empty)).startswith(f"{empty}: is not the folder of a run (it has no config.json)")
    assert (
        refused(str(run), "--out", str(there)) == f"--out: {there} exists; remove it, or name another folder"
    )
    missing = absent / "out"
    assert refused(str(run), "--out", str(missing)) == f"--out: there is no folder {absent}; make it first"
    assert refused(str(run), "--batch-size", "1").startswith("--batch-size: 1 is out of range")
    assert "invalid choice: 'tflite'" in refused(str(run), "--format", "tflite")
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    (stopped / "weights.safetensors").unlink()
    assert "continue it with --resume, or take --weights best" in refused(str(stopped), "--format", "pth")
    find = importlib.util.find_spec
    for package, name, extra in (("onnxruntime", "onnx", "export"), ("torch", "pth", "test")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, p=package: None if n == p else find(n))
        line = refused(str(run))
        assert line.startswith(f"--format {name}: needs {package}, which the extra `{extra}` brings: run `")
        assert line.endswith("`, or name the other formats")
    assert names(tmp_path) == {"empty", "there", "stopped"}


@pytest.mark.slow
def test_a_resnet101(tmp_path: Path) -> None:
    """At full width, with statistics of its own training; every file, in minutes."""
    options = ["--train-subset", "0.1", "--batch-size", "8", "--steps", "3", "--no-report", "--no-test"]
    assert train.main([*options, "--run-dir", str(tmp_path / "run")]) == 0
    assert export.main([str(tmp_path / "run")]) == 0
    assert names(tmp_path / "run" / "export") == FILES | {"README.md"}


@pytest.mark.slow
def test_a_run_with_every_piece_of_a_recipe_is_exported(tmp_path: Path) -> None:
    """The weights are the average, the step has the loss and its size of images; evaluation has another."""
    flags = [
        "--model",
        "resnet8",
        "--train-subset",
        "0.1",
        "--batch-size",
        "16",
        "--steps",
        "2",
        "--no-report",
    ]
    flags += ["--model-ema-decay", "0.9", "--drop-path", "0.1", "--clip-grad-norm", "1", "--loss", "bce"]
    flags += ["--label-smoothing", "0.1", "--class-weights", "balanced", "--mixup-alpha", "0.2"]
    flags += ["--test-size", "40", "--norm-weight-decay", "0", "--weight-decay", "0.001"]
    for framework in ("jax", "numpy"):
        folder = tmp_path / framework
        assert train.main([*flags, "--framework", framework, "--run-dir", str(folder)]) == 0
        assert export.main([str(folder)]) == 0
        state = safetensors.numpy.load_file(folder / "export" / "training_state.safetensors")
        average = safetensors.numpy.load_file(folder / "weights.safetensors")
        np.testing.assert_array_equal(state["ema/params/fc.weight"], average["fc.weight"])
