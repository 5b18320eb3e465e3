"""--log-gradients: the norm of each parameter's gradient, in every engine and strategy; log and figure."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiment.__main__ import main
from experiment.commands import train as train_command
from experiment.report import figures
from experiment.report.reading import read_run
from jax_resnet.strategies.blockwise import Blockwise
from jax_resnet.strategies.chunked import Chunked
from jax_resnet.strategies.vmapped import VmappedEngines
from tests.helpers import made_run
from tests.helpers.comparing import assert_all_close, assert_close, nchw
from tests.helpers.jax_engine import assert_same_bits, learning_rate, make_batches, oracle, train
from tests.helpers.jax_engine import make_engine as make_jax_engine
from tests.helpers.numpy_engine import make_engine as make_numpy_engine
from tests.helpers.runs import SMALL, Run
from tests.tolerances import FLOAT64_NETWORK

PREFIX = "grad_norm/"
DECAY = 0.1  # the norms are those before it is added


def make_whole(**options: Any) -> Any:
    engine: Any = make_jax_engine(**options)
    engine._strategy = engine.whole()
    return engine


ENGINES: dict[str, Callable[..., Any]] = {
    "jax, blockwise": make_jax_engine,
    "jax, whole": make_whole,
    "jax, chunked": lambda **options: make_jax_engine(**{**options, "chunk": 2}),
    "jax, accumulate": lambda **options: make_jax_engine(**options, accumulate=2),
    "numpy": make_numpy_engine,
    "numpy, three processes": lambda **options: make_numpy_engine(**options, processes=3),
}
OPTIONS: dict[str, Any] = {"optimizer_options": {"weight_decay": DECAY}}


def model_of(name: str) -> str:
    """The CNN, soon compiled, where a strategy handles all networks alike."""
    return "cnn" if name in ("jax, whole", "jax, chunked") else "resnet8"


@pytest.fixture(autouse=True)
def _no_processes_left() -> Iterator[None]:
    yield
    gc.collect()


def norms_of(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(PREFIX): v for name, v in metrics.items() if name.startswith(PREFIX)}


@pytest.mark.parametrize("name", ENGINES)
def test_norms_are_those_of_pytorchs_gradients(name: str) -> None:
    """Of the mean loss of the batch, or of micro-batches, before weight decay; in three steps."""
    engine = ENGINES[name](model=model_of(name), **OPTIONS, log_gradients=True)
    micro_batches = 2 if "accumulate" in name else 1
    state = engine.init()
    network = oracle(model_of(name), engine.to_tree(state))
    optimizer = torch.optim.Adam(network.parameters(), weight_decay=DECAY)
    batches = make_batches(3)
    _, metrics = train(engine, state, batches)
    if "jax" in name:
        kind = {"jax, blockwise": Blockwise, "jax, chunked": Chunked}.get(name)
        assert kind is None or isinstance(engine._strategy, kind)
    for step, (batch, found) in enumerate(zip(batches, metrics, strict=True)):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.zero_grad()
        for part in range(micro_batches):
            image, label = (batch[key][part::micro_batches] for key in ("image", "label"))
            loss = F.cross_entropy(network(torch.from_numpy(nchw(image))), torch.from_numpy(label).long())
            (loss / micro_batches).backward()
        expected = {
            key: torch.linalg.vector_norm(p.grad)
            for key, p in network.named_parameters()
            if p.grad is not None
        }
        assert norms_of(found).keys() == dict(network.named_parameters()).keys() == expected.keys()
        assert_all_close(f"step {step}", norms_of(found), expected, FLOAT64_NETWORK)
        total = np.sqrt(sum(float(norm) ** 2 for norm in norms_of(found).values()))
        assert_close("grad_norm", found["grad_norm"], total, FLOAT64_NETWORK)
        optimizer.step()


@pytest.mark.parametrize("name", ["jax, blockwise", "jax, whole", "numpy"])
def test_the_flag_adds_norms_and_changes_no_bit(name: str) -> None:
    """In float32, where another order of a sum is seen. Chunks and micro-batches take the whole step."""
    batches = [{**batch, "image": batch["image"].astype(np.float32)} for batch in make_batches(3)]
    trees, rows = [], []
    for log_gradients in (False, True):
        engine = ENGINES[name](
            **{"model": model_of(name), **OPTIONS, "precision": "float32"}, log_gradients=log_gradients
        )
        state, metrics = train(engine, engine.init(), batches)
        trees.append(engine.to_tree(state))
        rows.append(metrics)
    assert_same_bits(trees[1], trees[0])
    for without, with_norms in zip(*rows, strict=True):
        assert not norms_of(without)
        assert norms_of(with_norms)
        assert_same_bits({key: with_norms[key] for key in without}, without)


def test_seeds_trained_together_have_the_norms_of_each() -> None:
    engines = [make_jax_engine("cnn", seed=seed, log_gradients=True) for seed in (0, 1)]
    vmapped, batches = VmappedEngines(engines), make_batches(2)
    ((_, metrics),) = vmapped.train([engine.init() for engine in engines], [batches])
    for index, engine in enumerate(engines):
        (alone,) = train(engine, engine.init(), [batches[index]])[1]
        together = norms_of(vmapped.one(metrics, index))
        assert together.keys() == {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}
        assert_all_close(f"seed {index}", together, norms_of(alone), FLOAT64_NETWORK)


def test_only_the_head_has_norms_where_it_alone_is_trained() -> None:
    for make in (make_jax_engine, make_numpy_engine):
        engine = make("resnet8", freeze_backbone=True, log_gradients=True)
        (metrics,) = train(engine, engine.init(), make_batches(1))[1]
        assert norms_of(metrics).keys() == {"fc.weight", "fc.bias"}


def run_of(folder: Path, *flags: str) -> Run:
    assert train_command.main([*SMALL, "--steps", "4", "--run-dir", str(folder), *flags]) == 0
    return Run(folder)


@pytest.mark.parametrize("framework", ["jax", "numpy"])
def test_a_run_logs_them_also_from_a_resume_on(framework: str, tmp_path: Path) -> None:
    flags = ("--framework", framework, "--schedule-steps", "4", "--no-test")
    plain = run_of(tmp_path / "plain", *flags)
    assert not [name for line in plain.lines() for name in line if name.startswith(PREFIX)]

    logged = run_of(tmp_path / "logged", *flags, "--steps", "2")
    run_of(logged.folder, "--framework", framework, "--log-gradients", "--resume")
    first, *_, last = logged.lines("train", "step")
    assert not norms_of(first)
    norms = norms_of(last)
    assert norms.keys() >= {"fc.weight", "fc.bias"}
    assert np.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(last["grad_norm"], rel=1e-5)
    assert_same_bits(logged.weights(), plain.weights())


def test_a_report_draws_them_and_tensorboard_and_csv_carry_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [flag for flag in SMALL if flag != "--no-report"] + ["--framework", "numpy", "--steps", "2"]
    assert train_command.main([*flags, "--log-gradients", "--run-dir", str(tmp_path / "run")]) == 0
    logged = Run(tmp_path / "run")
    norms = norms_of(logged.lines("train", "step")[-1])
    assert (logged.folder / "report" / "gradients.png").is_file()
    events = EventAccumulator(str(logged.folder / "tensorboard")).Reload()
    values = [(event.step, event.value) for event in events.Scalars(f"step/{PREFIX}fc.weight")]
    assert values == [(1, pytest.approx(values[0][1])), (2, pytest.approx(norms["fc.weight"]))]
    assert main(["report", str(logged.folder), "--csv"]) == 0
    header = (logged.folder / "report" / "metrics.csv").read_text().splitlines()[0]
    assert f"{PREFIX}fc.weight" in header.split(",")


def test_the_figure_shows_three_steps_and_the_layers_from_the_image_on(tmp_path: Path) -> None:
    """Weights without batch norm's; a norm of 0 or null leaves a gap."""
    folder = made_run.write(tmp_path / "run", steps=9)
    layers = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.2.conv1", "layer1.10.conv1", "fc"]
    others = ["bn1.weight", "layer1.0.bn2.bias", "layer1.0.downsample.1.weight", "fc.bias"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["scope"] == "step" and line["step"] > 4:  # the flag came with a resume
            norms = {f"{layer}.weight": 10.0**-index for index, layer in enumerate(layers)}
            for name in sorted([*norms, *others]):
                line[PREFIX + name] = norms.get(name, 7.0)
            line[f"{PREFIX}layer1.0.conv1.weight"] = None if line["step"] == 7 else 0.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = read_run(folder).gradient_norms
    assert [step for step, _ in drawn] == [5, 7, 9]
    expected = [1.0, 0.0, 1e-2, 1e-3, 1e-4, 1e-5]
    for step, norms in drawn:
        assert list(norms) == layers
        expected[1] = np.nan if step == 7 else 0.0
        np.testing.assert_allclose(list(norms.values()), expected)
    assert main(["report", str(folder)]) == 0
    assert (folder / "report" / "gradients.png").is_file()
    page = (folder / "report" / "index.html").read_text()
    assert figures.ALT["gradients"].split(",")[0].replace("'", "&#39;") in page
