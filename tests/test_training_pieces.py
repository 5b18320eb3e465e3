"""The pieces of today's recipes: averages, stochastic depth, clipping, decay by kind, Nesterov's momentum.

Losses alone are in test_losses.py. Each of the others is compared with PyTorch's own over 20 steps, then all
at once in every strategy, and by hand. More is in the parity suite (`tests/parity/cases.py`), whose mutants
have a fault of each.
"""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import experiment.data.loading
import jax_resnet
import numpy_ref
import torch_oracle
import torch_oracle.losses
from experiment.commands import train as train_command
from experiment.data.drop_path import DropPath
from experiment.files.checkpoints import Checkpoints
from experiment.run.completed_run import open_run
from jax_resnet.optimizers import clip_scale
from jax_resnet.strategies.blockwise import Blockwise
from jax_resnet.strategies.vmapped import VmappedEngines
from numpy_ref.optimizers import clip_scale as numpy_clip_scale
from tests.helpers.comparing import assert_all_close, assert_close, nchw
from tests.helpers.jax_engine import (
    assert_same_bits,
    flat,
    learning_rate,
    make_batches,
    oracle,
    train,
)
from tests.helpers.jax_engine import make_engine as make_jax_engine
from tests.helpers.numpy_engine import make_engine as make_numpy_engine
from tests.helpers.runs import Run
from tests.parity import jax_side, numpy_side, torch_side
from tests.parity.case import Case, make_inputs
from tests.tolerances import FLOAT64_LAYER, FLOAT64_NETWORK

THIN: dict[str, Any] = {"model": "resnet18", "width": 2, "stage_sizes": (1, 1), "small_images": True}
STEPS = 20
DECAY = 0.1


def trajectory(
    name: str, optimizer: str, options: dict[str, Any], drop_path: float = 0.0, **engine: Any
) -> Case:
    rate = {"sgd": 0.02}.get(optimizer, 1e-3)
    training = {"optimizer": optimizer, "optimizer_options": options, "learning_rate": rate, "steps": STEPS}
    return Case(
        name,
        "trajectory",
        (8, 12, 12, 3),
        {**THIN, **training, "engine_options": engine},
        drop_path=drop_path,
    )


ALONE = [
    trajectory("average", "sgd", {}, ema_decay=0.7),
    trajectory("clipping", "sgd", {}, clip_grad_norm=0.3),
    trajectory("stochastic-depth", "adam", {}, drop_path=0.6),
    trajectory("norms-apart", "sgd", {"weight_decay": DECAY, "norm_weight_decay": 0.0}),
    trajectory("biases-apart", "adamw", {"weight_decay": DECAY, "bias_weight_decay": 0.03}),
    trajectory("nesterov", "sgd", {"nesterov": True}),
]


IN_PARITY = ("norms-apart", "biases-apart", "nesterov")  # over 1,000 steps, in `test_parity_optimizers.py`


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=pytest.mark.slow if c.name in IN_PARITY else ()) for c in ALONE],
)
def test_each_piece_alone_is_pytorchs_for_20_steps(case: Case) -> None:
    inputs = make_inputs(case)
    expected = torch_side.run(case, inputs)
    without = {**case.options, "engine_options": {}, "optimizer_options": {}}
    plain = torch_side.run(
        Case("plain", "trajectory", case.shape, without),
        {name: array for name, array in inputs.items() if name != "keep"},
    )
    changed = (plain["loss"] != expected["loss"]).any() or "average.fc.bias" in expected
    assert changed, "the piece has no effect"
    for side in (jax_side, numpy_side):
        found = side.run(case, inputs)
        assert_all_close(side.__name__, found, expected, FLOAT64_LAYER)


# All pieces at once

ALL: dict[str, Any] = {
    "model_options": {name: value for name, value in THIN.items() if name != "model"},
    "optimizer": "sgd",
    "optimizer_options": {
        "base_lr": 1e-3,
        "weight_decay": DECAY,
        "norm_weight_decay": 0.0,
        "bias_weight_decay": 0.01,
        "nesterov": True,
    },
    "clip_grad_norm": 0.3,
    "ema_decay": 0.7,
    "loss": "bce",
    "label_smoothing": 0.1,
    "class_weights": (0.5, 2.0, 1.0, 0.25, 3.0),
}
LOSS = ("loss", "label_smoothing", "class_weights")
BLOCKS = 2


def batches_of(count: int, size: int = 8) -> list[dict[str, np.ndarray]]:
    drop_path = DropPath(0.5, BLOCKS, seed=3)
    rng = np.random.default_rng(4)
    return [
        {
            **batch,
            "label2": np.roll(batch["label"], 1),
            "lam": rng.random(size),
            "drop_path": drop_path.factors(np.arange(size), epoch),
        }
        for epoch, batch in enumerate(make_batches(count, size))
    ]


@pytest.fixture(scope="module", autouse=True)
def _no_processes_left() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def blockwise() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The tree and the metrics after 4 steps, in the strategy of a CPU; as NumPy has them."""
    results = []
    for make in (make_jax_engine, make_numpy_engine):
        engine: Any = make(**ALL, log_gradients=True)
        state, metrics = train(engine, engine.init(), batches_of(4))
        results.append((engine.to_tree(state), metrics))
    expect_same(results[0], results[1])
    return results[0]


def expect_same(found: Any, expected: Any) -> None:
    (tree, metrics), (expected_tree, expected_metrics) = found, expected
    assert_all_close("tree", flat(tree), flat(expected_tree), FLOAT64_NETWORK)
    for step, (values, wanted) in enumerate(zip(metrics, expected_metrics, strict=True)):
        assert_all_close(f"metrics of step {step}", values, wanted, FLOAT64_NETWORK)


WHOLE: dict[str, dict[str, Any]] = {"whole": {}, "chunked": {"chunk": 3}, "remat": {"remat": True}}


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_every_strategy_computes_the_same(name: str, blockwise: Any) -> None:
    engine: Any = make_jax_engine(**ALL, **WHOLE[name], log_gradients=True)
    if name == "whole":
        assert isinstance(engine._strategy, Blockwise)
        engine._strategy = engine.whole()
    state, metrics = train(engine, engine.init(), batches_of(4))
    expect_same((engine.to_tree(state), metrics), blockwise)
    (logits,) = engine.evaluate(state, make_batches(1))
    other: Any = make_numpy_engine(**ALL)
    (wanted,) = other.evaluate(other.from_tree(engine.to_tree(state)), make_batches(1))
    assert_close("logits of the average", logits, wanted, FLOAT64_NETWORK)


@pytest.mark.slow
def test_seeds_together_equal_each_alone() -> None:
    weights = (ALL["class_weights"], ALL["class_weights"][::-1])  # those of a run follow from its seed
    engines = [make_jax_engine(**{**ALL, "class_weights": weights[seed]}, seed=seed) for seed in (0, 1)]
    vmapped, batches = VmappedEngines(engines), batches_of(3)
    shifted = [{**batch, "drop_path": batch["drop_path"][::-1].copy()} for batch in batches]
    parts = list(zip(batches, shifted, strict=True))
    *_, (stacked, _) = vmapped.train([engine.init() for engine in engines], parts)
    for index, engine in enumerate(engines):
        state, _ = train(engine, engine.init(), [part[index] for part in parts])
        tree, expected = engine.to_tree(vmapped.one(stacked, index)), engine.to_tree(state)
        assert_all_close(f"seed {index}", flat(tree), flat(expected), FLOAT64_NETWORK)


@pytest.mark.slow
def test_micro_batches_get_the_factors_of_their_examples() -> None:
    """And are clipped, decayed and averaged once a step, as PyTorch's loops do it; in a chunk of steps."""
    engine: Any = make_jax_engine(**ALL, accumulate=2, chunk=3)
    state = engine.init()
    network: Any = torch_oracle.resnet18(5, 3, **ALL["model_options"]).double()
    tree = engine.to_tree(state)
    torch_oracle.load_state_dict(network, {**tree["params"], **tree["batch_stats"]})
    network.train()
    options = {name: value for name, value in ALL["optimizer_options"].items() if name != "base_lr"}
    optimizer = torch_oracle.make_optimizer("sgd", dict(network.named_parameters()), 0.0, **options)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ALL["ema_decay"]), use_buffers=True)
    batches, loss = batches_of(3), torch_oracle.losses.Loss(*(ALL[name] for name in LOSS))
    state, metrics = train(engine, state, batches)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad()
        for part in range(2):
            rows = {k: torch.from_numpy(np.ascontiguousarray(v[part::2])) for k, v in batch.items()}
            rows |= {name: rows[name].long() for name in ("label", "label2")}
            logits = network(torch.from_numpy(nchw(rows["image"].numpy())), rows["drop_path"])
            (loss(logits, rows) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), ALL["clip_grad_norm"])
        assert norm > ALL["clip_grad_norm"]
        assert_close("norm before clipping", metrics[step]["grad_norm"], norm, FLOAT64_NETWORK)
        optimizer.step()
        average.update_parameters(network)
    tree = engine.to_tree(state)
    for module, part in ((network, tree), (average.module, tree["ema"])):
        expected = torch_oracle.state_dict(module)
        assert_all_close("weights", {**part["params"], **part["batch_stats"]}, expected, FLOAT64_NETWORK)


def test_three_processes_compute_what_one_does(blockwise: Any) -> None:
    engine: Any = make_numpy_engine(**ALL, processes=3, log_gradients=True)
    state, metrics = train(engine, engine.init(), batches_of(4))
    expect_same((engine.to_tree(state), metrics), blockwise)
    (logits,) = engine.evaluate(state, make_batches(1))
    alone: Any = make_numpy_engine(**ALL)
    (expected,) = alone.evaluate(alone.from_tree(engine.to_tree(state)), make_batches(1))
    assert_close("logits of the average", logits, expected, FLOAT64_NETWORK)


@pytest.mark.parametrize("make", [make_jax_engine, make_numpy_engine])
def test_a_run_without_them_has_no_arrays_of_them(make: Any) -> None:
    engine = make("cnn")
    tree = engine.to_tree(engine.init())
    assert tree.keys() == {"params", "batch_stats", "optimizer", "step"}


@pytest.mark.parametrize("make", [make_jax_engine, make_numpy_engine])
def test_a_norm_that_is_not_finite_is_noticed_though_it_is_clipped(make: Any) -> None:
    engine = make("cnn", clip_grad_norm=1.0)
    batches = make_batches(3)
    batches[1]["image"][0, 0, 0, 0] = np.nan
    state, _ = train(engine, engine.init(), batches)
    assert engine.first_nonfinite_step(state) == 2


# By hand


@pytest.mark.parametrize("make", [make_jax_engine, make_numpy_engine])
def test_the_average_by_hand_and_evaluation_with_it(make: Any) -> None:
    engine = make("cnn", "sgd", ema_decay=0.75)
    average: dict[str, Any] | None = None
    for state, _ in engine.train(engine.init(), make_batches(3)):
        tree = engine.to_tree(state)
        latest = tree["params"]
        if average is None:
            assert_same_bits(tree["ema"]["params"], latest)
            average = latest
        else:
            average = {name: 0.75 * average[name] + 0.25 * latest[name] for name in latest}
            assert_all_close("average", tree["ema"]["params"], average, FLOAT64_LAYER)
    (logits,) = engine.evaluate(state, make_batches(1))
    network = oracle("cnn", {"params": average, "batch_stats": {}}).eval()
    expected = network(torch.from_numpy(nchw(make_batches(1)[0]["image"]))).detach()
    assert_close("logits", logits, expected, FLOAT64_NETWORK)


@pytest.mark.parametrize(
    ("norm", "expected"), [(0.5, 1.0), (1.999, 1.0), (4.0, 2 / (4 + 1e-6)), (np.inf, 0.0), (np.nan, np.nan)]
)
def test_the_factor_that_clips_by_hand(norm: float, expected: float) -> None:
    gradient = torch.tensor([norm])
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([parameter], 2.0)
    assert parameter.grad is not None
    for scale in (numpy_clip_scale(norm, 2.0), float(clip_scale(jnp.float32(norm), 2.0))):
        np.testing.assert_allclose(scale, expected, rtol=1e-7)
        np.testing.assert_allclose(scale * norm, parameter.grad.item(), rtol=1e-6)


@pytest.mark.parametrize("model", ["resnet50", "resnet8", "cnn"])
@pytest.mark.parametrize("decays", [(0.0, None), (None, 0.3), (0.2, 0.3)])
def test_decay_by_kind_is_torchvisions(model: str, decays: tuple[float | None, float | None]) -> None:
    """By the classes of modules, as its `set_weight_decay` goes by; here by names."""
    norm_decay, bias_decay = decays
    network: Any = (
        torch_oracle.MODELS[model](5, 3, batch_norm=True) if model != "cnn" else torch_oracle.cnn(5)
    )
    for path, module in network.named_modules():
        for last, _ in module.named_parameters(recurse=False):
            expected = 0.1
            if last == "bias" and bias_decay is not None:
                expected = bias_decay
            elif isinstance(module, torch.nn.BatchNorm2d) and norm_decay is not None:
                expected = norm_decay
            for package in (jax_resnet, numpy_ref, torch_oracle):
                rule = package.optimizers.weight_decay_of
                assert rule(f"{path}.{last}", 0.1, norm_decay, bias_decay) == expected, path


def test_rates_increase_linearly_and_kept_branches_make_up_for_dropped_ones() -> None:
    factors = DropPath(0.4, 5, seed=0).factors(np.arange(20_000), epoch=1)
    rates = [0.0, 0.1, 0.2, 0.3, 0.4]
    for column, rate in zip(factors.T, rates, strict=True):
        np.testing.assert_allclose(np.unique(column), [0, 1 / (1 - rate)] if rate else [1])
        assert abs((column == 0).mean() - rate) < 0.02
    assert (abs(factors.mean(0) - 1) < 0.02).all()
    assert DropPath(0.5, 1, seed=0).factors(np.arange(9), 0).tolist() == [[1.0]] * 9


def test_draws_depend_on_seed_epoch_example_and_block_alone() -> None:
    draw = DropPath(0.9, 6, seed=1)
    examples = np.array([5, 17, 3, 99])
    factors = draw.factors(examples, 2)
    np.testing.assert_array_equal(draw.factors(examples[::-1], 2), factors[::-1])
    np.testing.assert_array_equal(draw.factors(examples[1:2], 2), factors[1:2])
    for other in (draw.factors(examples, 3), DropPath(0.9, 6, seed=2).factors(examples, 2)):
        assert ((other == 0) != (factors == 0)).any()


def test_an_engine_that_holds_the_images_gets_the_same_draws() -> None:
    data = experiment.data.loading.load("digits", data_dir=None, batch_size=32, seed=1, augment="crop-flip")
    plain = next(data.train_batches(40))
    data = dataclasses.replace(data, drop_path=DropPath(0.5, 3, seed=1))
    held = data.held()
    assert held is not None
    batch, drawn = next(data.train_batches(40)), next(data.train_draws(held["label"], 40))
    np.testing.assert_array_equal(batch["drop_path"], drawn["drop_path"])
    np.testing.assert_array_equal(batch["image"], plain["image"])  # other draws move no image
    assert "drop_path" not in plain
    assert batch["drop_path"].shape == (32, 3)


# Runs

FLAGS = [
    "--model",
    "resnet18",
    "--small-images",
    "--train-subset",
    "0.1",
    "--batch-size",
    "16",
    "--no-report",
]
FLAGS += ["--optimizer", "sgd", "--lr", "0.02", "--precision", "float64", "--weight-decay", "0.01"]
FLAGS += ["--nesterov", "--norm-weight-decay", "0", "--bias-weight-decay", "0.001", "--clip-grad-norm", "2"]
FLAGS += ["--model-ema-decay", "0.8", "--drop-path", "0.5", "--augment", "crop-flip", "--schedule-steps", "6"]
FLAGS += ["--batch-norm-group", "4"]
FLAGS += ["--label-smoothing", "0.1", "--mixup-alpha", "0.2", "--cutmix-alpha", "1", "--loss", "bce"]
FLAGS += [
    "--class-weights",
    "balanced",
    "--randaugment",
    "2",
    "9",
    "--random-erase",
    "0.25",
    "--test-size",
    "40",
]
FLAGS += ["--eval-every", "3", "--checkpoint-every", "2", "--log-every", "1"]


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (jax_resnet.resnet, numpy_ref.resnet):
        options = {name: THIN[name] for name in ("width", "stage_sizes")}
        monkeypatch.setitem(module.MODELS, "resnet18", partial(module.resnet18, **options))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(folder: Path, framework: str, steps: int, *flags: str) -> Run:
    start = ["--resume"] if folder.exists() else FLAGS
    arguments = [*start, "--framework", framework, "--steps", str(steps), "--run-dir", str(folder), *flags]
    assert train_command.main(arguments) == 0
    return Run(folder)


def tree_of(result: Run) -> dict[str, Any]:
    return Checkpoints(result.folder / "checkpoints", 1).load(6)[0]


def test_runs_with_everything_on_stop_and_continue_and_switch_engines(tmp_path: Path, thin: None) -> None:
    trees, losses = {}, {}
    for framework in ("jax", "numpy"):
        whole = run(tmp_path / framework, framework, 6)
        stopped = run(tmp_path / f"{framework}-stopped", framework, 3, "--no-test")
        shutil.copytree(stopped.folder, tmp_path / f"{framework}-switched")
        run(stopped.folder, framework, 6)
        assert stopped.content("weights.safetensors") == whole.content("weights.safetensors")
        best = "weights-best.safetensors"
        assert stopped.content(best) == whole.content(best)
        assert_same_bits(tree_of(stopped), tree_of(whole))
        trees[framework] = tree_of(whole)
        losses[framework] = [line["loss"] for line in whole.lines("train", "step")]
    assert_close("losses", losses["numpy"], losses["jax"], FLOAT64_NETWORK)
    assert_all_close("trees", flat(trees["numpy"]), flat(trees["jax"]), FLOAT64_NETWORK)
    for first, second in (("jax", "numpy"), ("numpy", "jax")):
        switched = run(tmp_path / f"{first}-switched", second, 6)
        assert_all_close("switched", flat(tree_of(switched)), flat(trees[second]), FLOAT64_NETWORK)

    # What is written, evaluated and opened is the average; the checkpoint has the raw weights, too.
    average = {**trees["numpy"]["ema"]["params"], **trees["numpy"]["ema"]["batch_stats"]}
    assert_same_bits(whole.weights(), average)
    assert (trees["numpy"]["params"]["fc.weight"] != average["fc.weight"]).any()
    opened = open_run(whole.folder, framework="jax")
    data = experiment.data.loading.load("digits", **opened.config.data_options())
    batches = list(data.eval_batches("test", 128))
    logits = np.concatenate(list(opened.logits(batch["image"] for batch in batches)))
    labels = np.concatenate([batch["label"] for batch in batches])
    assert (logits.argmax(1) == labels).mean() == pytest.approx(whole.summary["test"]["accuracy"])


def test_a_run_may_not_change_them_on_resume(
    tmp_path: Path, thin: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "run", "numpy", 2, "--no-test").folder
    capsys.readouterr()
    changes = {"--model-ema-decay": "0.9", "--drop-path": "0.1", "--clip-grad-norm": "1"}
    for flag, value in {**changes, "--batch-norm-group": "8"}.items():
        assert train_command.main(["--resume", "--run-dir", str(folder), flag, value]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert flag in line


def test_a_run_from_other_weights_averages_those(tmp_path: Path, thin: None) -> None:
    begun = run(tmp_path / "begun", "numpy", 2, "--no-test")
    weights = str(begun.folder / "weights.safetensors")
    other = run(tmp_path / "other", "numpy", 0, "--init-from", weights, "--seed", "7", "--no-test")
    assert_same_bits(other.weights(), begun.weights())
