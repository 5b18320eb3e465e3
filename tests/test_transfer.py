"""Transfer learning: what a file of weights becomes in another network, and training the head alone.

Numbers are checked by PyTorch.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F

import experiment.__main__
import torch_oracle
from experiment.commands import train
from experiment.files.checkpoints import Checkpoints
from experiment.options.config import Config
from experiment.run.transfer import adapt_channels, count_parameters, initial_tree, remedy, sha256
from tests.helpers.comparing import assert_all_close, assert_close, nchw
from tests.helpers.jax_engine import CLASSES, THIN, assert_same_bits, make_batches
from tests.helpers.jax_engine import make_engine as make_jax_engine
from tests.helpers.jax_engine import train as take_steps
from tests.helpers.numpy_engine import make_engine as make_numpy_engine
from tests.helpers.runs import highest_precision
from tests.helpers.state_dicts import shapes_of, with_se
from tests.tolerances import FLOAT64_LAYER, FLOAT64_NETWORK

__all__ = ["highest_precision"]  # the fixture, for every test here

OPTIONS: dict[str, Any] = {"base_lr": 1e-3, "weight_decay": 0.05}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """The NumPy engine's others would take a second to start."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@cache
def frozen_engine(framework: str, model: str = "resnet18", optimizer: str = "adamw") -> Any:
    options: dict[str, Any] = {"freeze_backbone": True, "optimizer_options": OPTIONS}
    if framework == "jax":
        return make_jax_engine(model, optimizer, **options)
    return make_numpy_engine(model, optimizer, processes=1 + ("two" in framework), **options)


def begun(engine: Any) -> Any:
    """A state whose statistics and weights are far from what a batch would make of them."""
    tree = engine.to_tree(engine.init())
    rng = np.random.default_rng(3)
    for name, array in tree["batch_stats"].items():
        tree["batch_stats"][name] = array + rng.uniform(0.1, 0.5, array.shape)
    return engine.from_tree(tree)


@pytest.mark.parametrize(
    ("framework", "model", "optimizer"),
    [
        ("jax", "resnet18", "adamw"),
        ("jax", "cnn", "amsbound"),
        ("numpy", "resnet18", "adamw"),
        ("numpy", "cnn", "amsbound"),
        ("numpy in two processes", "resnet20", "sgd"),
    ],
)
def test_the_head_alone_is_trained_as_by_pytorch(framework, model, optimizer):
    """PyTorch's way: the backbone in eval mode, its parameters without a gradient."""
    engine = frozen_engine(framework, model, optimizer)
    state = begun(engine)
    before = engine.to_tree(state)
    batches = make_batches(4)

    extra = {"image_size": (16, 16)} if model == "cnn" else {}
    network = torch_oracle.MODELS[model](CLASSES, 3, **THIN[model], **extra).double().eval()
    torch_oracle.load_state_dict(network, {**before["params"], **before["batch_stats"]})
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))
    head = [parameter for parameter in network.parameters() if parameter.requires_grad]
    reference = torch_oracle.make_optimizer(optimizer, head, 1e-3, **OPTIONS)

    state, metrics = take_steps(engine, state, batches)
    for step, (batch, found) in enumerate(zip(batches, metrics, strict=True)):
        reference.param_groups[0]["lr"] = engine.learning_rate(step)
        reference.zero_grad()
        logits = network(torch.from_numpy(nchw(batch["image"])))
        loss = F.cross_entropy(logits, torch.from_numpy(batch["label"]).long())
        loss.backward()
        assert_close("logits", found["logits"], logits.detach(), FLOAT64_NETWORK)
        assert_close("loss", found["loss"], loss.detach(), FLOAT64_NETWORK)
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in head if p.grad is not None]))
        assert_close("grad_norm", found["grad_norm"], norm, FLOAT64_NETWORK)
        reference.step()

    after = engine.to_tree(state)
    changed = torch_oracle.state_dict(network)
    for name, array in after["params"].items():
        if name.startswith("fc."):
            assert (array != before["params"][name]).any()
            assert_close(name, array, changed[name], FLOAT64_NETWORK)
        else:
            assert array.tobytes() == before["params"][name].tobytes(), name
    assert_same_bits(after["batch_stats"], before["batch_stats"])
    moments = [value for value in after["optimizer"].values() if isinstance(value, dict)]
    assert moments
    assert all(moment.keys() == {"fc.weight", "fc.bias"} for moment in moments)


def test_a_frozen_run_goes_on_in_the_other_engine():
    batches = make_batches(6)
    engines = {"jax": frozen_engine("jax"), "numpy": frozen_engine("numpy")}
    whole, _ = take_steps(engines["jax"], begun(engines["jax"]), batches)
    for first, second in (("jax", "numpy"), ("numpy", "jax")):
        state, _ = take_steps(engines[first], begun(engines[first]), batches[:3])
        state = engines[second].from_tree(engines[first].to_tree(state))
        state, _ = take_steps(engines[second], state, batches[3:])
        tree, expected = engines[second].to_tree(state), engines["jax"].to_tree(whole)
        for part in ("params", "batch_stats"):
            assert_all_close(part, tree[part], expected[part], FLOAT64_NETWORK)
        for field in ("mu", "nu"):
            assert_all_close(field, tree["optimizer"][field], expected["optimizer"][field], FLOAT64_NETWORK)


def test_there_is_no_backward_through_the_frozen_part(monkeypatch):
    """JAX multiplies a third as often, as in forward alone; NumPy calls no convolution's backward."""

    def flops(engine) -> float:
        batch = make_batches(1)[0]
        with engine._precision():
            args = (engine.init(), engine._placement.shard_batch(batch), np.float64(0.1))
            return engine.whole().compiled.lower(*args).cost_analysis()["flops"]

    assert flops(frozen_engine("jax")) < 0.45 * flops(make_jax_engine())

    def refuse(*args: Any) -> None:
        raise AssertionError("backward of a convolution")

    monkeypatch.setattr("numpy_ref.fast.Conv2d.backward", refuse)
    held = frozen_engine("numpy")
    take_steps(held, held.init(), make_batches(1))
    with pytest.raises(AssertionError, match="backward of a convolution"):
        take_steps(whole := make_numpy_engine(), whole.init(), make_batches(1))


def test_a_grey_image_gets_the_response_it_had_in_three_channels():
    rng = np.random.default_rng(0)
    grey = torch.from_numpy(rng.normal(size=(2, 1, 9, 9)))
    kernel = rng.normal(size=(4, 3, 3, 3))
    expected = F.conv2d(grey.expand(-1, 3, -1, -1), torch.from_numpy(kernel))
    found = F.conv2d(grey, torch.from_numpy(adapt_channels(kernel, 1)))
    assert_close("3 to 1", found, expected, FLOAT64_LAYER)
    colour = torch.from_numpy(rng.normal(size=(2, 3, 9, 9)))
    single = rng.normal(size=(4, 1, 3, 3))
    expected = F.conv2d(colour.mean(1, keepdim=True), torch.from_numpy(single))
    found = F.conv2d(colour, torch.from_numpy(adapt_channels(single, 3)))
    assert_close("1 to 3", found, expected, FLOAT64_LAYER)
    for channels in (3, 4):
        assert adapt_channels(kernel, channels) is kernel


SMALL = ["--model", "cnn", "--train-subset", "0.1", "--batch-size", "16", "--warmup-steps", "0"]
SMALL += ["--no-report"]


def make_file(path: Path, model: str, classes: int, channels: int, change: Any = lambda state: state) -> Path:
    """A network of PyTorch's, in a file."""
    torch.manual_seed(0)
    state = torch_oracle.state_dict(torch_oracle.MODELS[model](classes, channels, **THIN[model]))
    for name in state:
        if "running" in name:
            state[name] = state[name] + np.float32(0.25)
    safetensors.numpy.save_file(change(state), path)
    return path


def cnn_file(path: Path, classes: int = 10, change: Any = lambda state: state) -> Path:
    """The weights of the CNN that SMALL names."""
    torch.manual_seed(0)
    state = torch_oracle.state_dict(torch_oracle.cnn(classes, 1))
    safetensors.numpy.save_file(change(state), path)
    return path


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("classes", [CLASSES, 7])
def test_both_engines_begin_from_the_same_tensors(tmp_path, classes, channels):
    path = make_file(tmp_path / "weights.safetensors", "resnet20", classes, channels)
    given = safetensors.numpy.load_file(path)
    config, resolved = Config(init_from=str(path)), {"init_from_sha256": sha256(str(path))}
    engines: list[Any] = [make_jax_engine("resnet20"), make_numpy_engine("resnet20")]
    trees, said = [], []
    for engine in engines:
        lines: list[str] = []
        tree = initial_tree(engine, config, resolved, lines.append)
        assert tree is not None
        trees.append(engine.to_tree(engine.from_tree(tree)))
        said.append(lines)
    assert_same_bits(trees[1], trees[0])
    assert said[0] == said[1]
    assert ("the head is new: 5 classes, where the file has 7" in said[0]) == (classes == 7)
    told = "conv1.weight: a third of it for each of the 3 channels of the images"
    assert (told in said[0]) == (channels == 1)
    fresh = engines[0].to_tree(engines[0].init())["params"]
    params = {**trees[0]["params"], **trees[0]["batch_stats"]}
    assert params.keys() == given.keys()
    for name, array in params.items():
        if name.startswith("fc.") and classes == 7:  # the head of a fresh run
            assert array.tobytes() == fresh[name].tobytes()
        elif name == "conv1.weight" and channels == 1:
            np.testing.assert_array_equal(array, given[name].repeat(3, 1).astype(np.float64) / 3)
        else:
            np.testing.assert_array_equal(array, given[name], err_msg=name)


def test_names_of_others_are_read(tmp_path, capsys):
    """akamaster's `linear`, PyTorch's `num_batches_tracked`, and an average of a compiled network."""

    def change(state):
        renamed = {name.replace("fc.", "linear."): array for name, array in state.items()}
        renamed["bn1.num_batches_tracked"] = np.array(3)
        return {"n_averaged": np.array(7)} | {f"module._orig_mod.{k}": array for k, array in renamed.items()}

    path = cnn_file(tmp_path / "weights.safetensors", change=change)
    argv = ["--init-from", str(path), "--steps", "0", "--run-dir", str(tmp_path / "run")]
    assert train.main([*SMALL, "--framework", "numpy", *argv]) == 0
    assert f"left out of {path}, as it lies beside the network: n_averaged" in capsys.readouterr().out
    saved = safetensors.numpy.load_file(tmp_path / "run" / "weights.safetensors")
    given = safetensors.numpy.load_file(path)
    for name in ("conv.weight", "fc.bias"):
        original = f"module._orig_mod.{name.replace('fc', 'linear')}"
        assert saved[name].tobytes() == given[original].tobytes()


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_runs_own_weights_are_looked_at_too(tmp_path, capsys, command):
    run_dir = tmp_path / "run"
    argv = ["--framework", "numpy", "--steps", "0", "--run-dir", str(run_dir)]
    assert train.main([*SMALL, *argv]) == 0
    path = run_dir / "weights.safetensors"
    state = safetensors.numpy.load_file(path)
    state["conv.bias"][2] = np.nan
    safetensors.numpy.save_file(state, path)
    (tmp_path / "a.png").write_bytes(b"")
    capsys.readouterr()
    images = [str(tmp_path / "a.png")] if command == "predict" else []
    assert experiment.__main__.main([command, str(run_dir), *images]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: conv.bias has 1 of 8 values that are NaN or infinite, the first at [2]" in line


@pytest.mark.parametrize("framework", ["jax", "numpy"])
def test_a_frozen_run_and_its_resume_without_the_file(tmp_path, capsys, framework):
    path = cnn_file(tmp_path / "weights.safetensors", classes=7)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    argv = ["--framework", framework, "--init-from", str(path), "--freeze-backbone", "--schedule", "constant"]
    for name, steps in (("whole", "5"), ("parted", "2")):
        assert train.main([*SMALL, *argv, "--steps", steps, "--run-dir", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert "81,930 parameters are trained, 80 are frozen" in out
    assert "82,010 parameters, 80 of them frozen, after 5 steps" in out
    record = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert record["config"]["init_from"] == str(path)
    assert record["resolved"]["init_from_sha256"] == digest
    path.unlink()
    assert train.main(["--resume", "--run-dir", str(tmp_path / "parted"), "--steps", "5"]) == 0
    whole, parted = (
        Checkpoints(tmp_path / name / "checkpoints", 1).load(5)[0] for name in ("whole", "parted")
    )
    assert_same_bits(parted, whole)
    record = json.loads((tmp_path / "parted" / "config.json").read_text())
    assert record["resolved"]["init_from_sha256"] == digest
    summary = json.loads((tmp_path / "parted" / "summary.json").read_text())
    counts = [summary[f"{kind}parameters"] for kind in ("", "trainable_", "frozen_")]
    assert counts == [82010, 81930, 80]


def test_the_first_checkpoint_is_of_step_0_and_before_it_the_same_file_is_wanted(tmp_path, capsys):
    path, run_dir = cnn_file(tmp_path / "weights.safetensors"), tmp_path / "run"
    argv = [*SMALL, "--init-from", str(path), "--steps", "0", "--run-dir", str(run_dir)]
    assert train.main(argv) == 0
    assert Checkpoints(run_dir / "checkpoints", 1).steps() == [0]
    weights, resume = (run_dir / "weights.safetensors").read_bytes(), ["--resume", "--run-dir", str(run_dir)]
    shutil.rmtree(run_dir / "checkpoints")
    assert train.main(resume) == 0
    assert (run_dir / "weights.safetensors").read_bytes() == weights
    shutil.rmtree(run_dir / "checkpoints")
    cnn_file(path, change=lambda state: {name: 2 * array for name, array in state.items()})
    capsys.readouterr()
    assert train.main(resume) == 2
    assert "was changed since the run began" in capsys.readouterr().err


def without_some(state):
    del state["conv.weight"]
    return {**state, "stray.weight": state["fc.bias"], "conv.bias": np.zeros(3, np.float32)}


UNFIT = {
    "another model": (
        ["--model", "resnet20"],
        [
            "missing conv1.weight, bn1.weight, ",
            ", 9 whole blocks (layer1.0 to layer3.2); unexpected conv.bias, conv.weight; shape mismatch ",
            "the file is of cnn, 10 classes, 1 channels",
            ": choose --model cnn",
        ],
    ),
    "names": (
        [],
        [
            "missing conv.weight; unexpected stray.weight; shape mismatch conv.bias [3], not [8]; ",
            "name another file",
        ],
    ),
    "NaN": ([], ["conv.bias has 1 of 8 values that are NaN or infinite, the first at [1]"]),
    "integers": ([], ["fc.bias is of type int32, and weights are floating-point numbers"]),
    "two networks": (
        [],
        ["several networks, under student, teacher", "--key of `python -m experiment convert`"],
    ),
    "no such file": (["--init-from", "absent.safetensors"], ["absent.safetensors", "No such file"]),
    "no safetensors": (["--init-from", "notes.txt"], ["notes.txt", "python -m experiment convert"]),
    "a folder": (["--init-from", "folder"], ["folder", "directory"]),
    "frozen without a file": (["--freeze-backbone"], ["--freeze-backbone", "--init-from FILE"]),
}


def with_nan(state):
    state["conv.bias"][1] = np.nan
    return state


CHANGES = {
    "names": without_some,
    "NaN": with_nan,
    "integers": lambda state: {**state, "fc.bias": np.arange(10, dtype=np.int32)},
    "two networks": lambda state: {
        f"{name}.{key}": array for name in ("student", "teacher") for key, array in state.items()
    },
}


@pytest.mark.parametrize("mistake", UNFIT)
def test_a_file_that_does_not_fit_is_refused_in_a_line(tmp_path, monkeypatch, capsys, mistake):
    monkeypatch.chdir(tmp_path)
    argv, words = UNFIT[mistake]
    path = cnn_file(tmp_path / "weights.safetensors", change=CHANGES.get(mistake, lambda state: state))
    (tmp_path / "notes.txt").write_text("no tensors here")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    init = [] if mistake == "frozen without a file" else ["--init-from", str(path)]
    assert train.main([*SMALL, "--framework", "numpy", "--steps", "1", *init, *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: --")
    for word in words:
        assert word in line
    assert sorted(tmp_path.rglob("*")) == before


CNN: dict[str, Any] = {"image_size": (40, 40)}
REMEDIES: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]], str]] = {
    "another model": (
        ("resnet50", {}),
        ("resnet34", {}),
        "the file is of resnet34, *: choose --model resnet34",
    ),
    "a thin one": (
        ("resnet18", {}),
        ("resnet18", {"width": 8}),
        "the file is of resnet18, *, width 8; no flag sets its width: name another file",
    ),
    "a thin one of another model": (
        ("resnet18", {}),
        ("resnet20", {"width": 4}),
        "the file is of resnet20, *, width 4; no flag sets its width: name another file",
    ),
    "a thin one of few blocks": (
        ("resnet101", {}),
        ("resnet50", {"width": 8, "stage_sizes": (2, 2)}),
        "*; no flag sets its stage_sizes and width: name another file",
    ),
    "no batch norm": (("resnet18", {}), ("resnet18", {"batch_norm": False}), "*: add --no-batch-norm"),
    "batch norm": (("resnet18", {"batch_norm": False}), ("resnet18", {}), "*: leave --no-batch-norm out"),
    "a small stem": (
        ("resnet20", {}),
        ("resnet18", {"small_images": True}),
        "*: choose --model resnet18, add --small-images",
    ),
    "no small stem": (("resnet18", {"small_images": True}), ("resnet18", {}), "*: leave --small-images out"),
    "a cnn": (("resnet18", {}), ("cnn", CNN), "*: choose --model cnn, add --image-size 40x40"),
    "a cnn of another size": (("cnn", {}), ("cnn", CNN), "*: add --image-size 40x40"),
}


@pytest.mark.parametrize("case", REMEDIES)
def test_the_remedy_names_flags_that_there_are(case):
    (model, options), (other, other_options), words = REMEDIES[case]
    found = remedy(shapes_of(model, **options), shapes_of(other, **other_options))
    assert fnmatch.fnmatchcase(found, words), found


def test_what_no_network_here_has_is_named_once():
    own, with_modules = shapes_of("resnet18"), with_se("resnet18")
    assert remedy(own, with_modules) == "name another file"  # its names are listed before
    grouped = {
        name: (*shape[:1], shape[1] // 4, *shape[2:]) if name.endswith("conv2.weight") else shape
        for name, shape in own.items()
    }
    assert remedy(own, grouped).startswith(
        "its convolutions have 4 groups (ResNeXt), which no network here has"
    )
    assert remedy(own, {**own, "conv1.weight": (0, 3, 7, 7)}).startswith(
        "conv1.weight is of shape [0, 3, 7, 7]"
    )


def test_counts():
    params = {"conv1.weight": np.zeros((2, 3)), "fc.weight": np.zeros(5), "fc.bias": np.zeros(1)}
    assert count_parameters(params, freeze_backbone=False) == (12, 0)
    assert count_parameters(params, freeze_backbone=True) == (6, 6)
