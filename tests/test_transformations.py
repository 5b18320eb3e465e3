"""Optimizers beside the table, `optax:NAME` and `FILE.py:FUNCTION`: training, checkpoints, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiment.commands import train
from experiment.files import run_folder, weights
from experiment.options.config import Config, as_arguments, is_external
from experiment.options.resolving import resolve
from jax_resnet.step import compute_gradient
from jax_resnet.transformations import check_transformation, make_transformation
from tests.helpers.jax_engine import make_batches, make_engine

FILE = """
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Pulled(NamedTuple):
    start: optax.Params
    count: jax.Array


def pull(strength):
    # toward where the weights began: a state that is not zero at first
    def update(updates, state, params):
        updates = jax.tree.map(lambda u, p, s: u + strength * (p - s), updates, params, state.start)
        return updates, Pulled(state.start, state.count + 1)

    return optax.GradientTransformation(lambda params: Pulled(params, jnp.ones((), jnp.int32)), update)


def make(learning_rate, strength=0.01, largest=1.0):
    parts = optax.clip_by_global_norm(largest), pull(strength), optax.trace(0.9)
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def branches(learning_rate):
    return optax.sgd(learning_rate if learning_rate > 0 else 1.0)


def grows(learning_rate):
    return optax.GradientTransformation(lambda p: (), lambda g, state, params=None: (g, (*state, g)))


def loses(learning_rate):
    return optax.GradientTransformation(lambda p: (), lambda g, state, params=None: ({}, state))


def typed_key(learning_rate):
    return optax.noisy_sgd(learning_rate, key=jax.random.key(0))


NUMBER = 3
"""
PARAMS = {"conv1.weight": np.ones((3, 3, 1, 2), np.float32), "fc.bias": np.arange(4, dtype=np.float32)}
COMMAND = ["--framework", "jax", "--model", "cnn", "--batch-size", "16", "--schedule", "constant"]
COMMAND += ["--eval-every", "2", "--checkpoint-every", "2", "--no-report", "--no-test"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of a user."""
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("name", "external"),
    [
        ("optax:lion", True),
        ("optax:contrib.muon", True),
        ("mine.py:make", True),
        ("some folder/mine.py:make", True),
        ("adam", False),
        ("optax:", False),
        ("optax:li-on", False),
        ("mine.py", False),
        ("mine.py:", False),
        ("mine.txt:make", False),
    ],
)
def test_names(name: str, external: bool) -> None:
    assert is_external(name) is external


def test_arguments_are_numbers_switches_and_text() -> None:
    words = as_arguments({"nesterov": True, "b1": 0.9, "mu_dtype": "bfloat16", "mask": None})
    assert words == ("b1=0.9", "mask=null", 'mu_dtype="bfloat16"', "nesterov=true")
    expected = {"b1": 0.9, "mask": None, "mu_dtype": "bfloat16", "nesterov": True}
    assert Config(optimizer_arguments=words).external_arguments() == expected
    assert Config(optimizer_arguments=("mu_dtype=bfloat16",)).external_arguments() == {"mu_dtype": "bfloat16"}


def test_the_transformation_is_optaxs() -> None:
    grads = {name: jnp.sin(array) for name, array in PARAMS.items()}
    given = make_transformation("optax:lion", 0.1, {"b1": 0.8})
    expected = optax.lion(0.1, b1=0.8)
    for name in PARAMS:
        np.testing.assert_array_equal(
            *(tx.update(grads, tx.init(PARAMS), PARAMS)[0][name] for tx in (given, expected))
        )


def test_steps_of_the_engine_are_those_of_the_transformation(file: Path) -> None:
    """Of a ResNet, with a state that begins with the weights, and a norm over all gradients."""
    options: dict[str, Any] = {"strength": 0.1, "largest": 0.5}
    engine = make_engine(
        "resnet8",
        f"{file}:make",
        optimizer_options=options,
        precision="float32",
        learning_rate=lambda step: 0.01,
    )
    state = engine.init()
    params = {name: jnp.array(np.array(array)) for name, array in state.params.items()}
    batch_stats = {name: jnp.array(np.array(array)) for name, array in state.batch_stats.items()}
    tx = make_transformation(f"{file}:make", 0.01, options)
    opt_state: Any = tx.init(params)
    for name, start in params.items():
        np.testing.assert_array_equal(state.opt_state[1].start[name], start)
    for batch in make_batches(3):
        batch["image"] = batch["image"].astype(np.float32)
        grads = compute_gradient(engine.network, params, batch_stats, batch).grads
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        ((state, _),) = engine.train(state, [batch])
        for name, array in params.items():
            np.testing.assert_allclose(state.params[name], array, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("optimizer", ["optax:lion", "optax:adafactor", "FILE:make"])
def test_a_stopped_run_goes_on_bit_for_bit(optimizer: str, file: Path, tmp_path: Path) -> None:
    name = optimizer.replace("FILE", str(file))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = [*COMMAND, "--optimizer", name, "--lr", "0.01"]
    if optimizer == "optax:lion":
        command += ["--optimizer-arguments", "b1=0.8", "weight_decay=0.1"]
    assert train.main([*command, "--steps", "4", "--run-dir", str(whole)]) == 0
    assert train.main([*command, "--steps", "2", "--run-dir", str(parts)]) == 0
    assert train.main(["--run-dir", str(parts), "--resume", "--steps", "4"]) == 0
    expected = weights.load(whole / "weights.safetensors")
    for key, array in weights.load(parts / "weights.safetensors").items():
        np.testing.assert_array_equal(array, expected[key], err_msg=key)
    record = run_folder.read_record(parts)
    assert record["config"]["optimizer"] == name
    assert ("optimizer_sha256" in record["resolved"]) is (optimizer == "FILE:make")


def test_a_changed_file_is_refused(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--run-dir", str(tmp_path / "run")]
    assert train.main([*COMMAND, "--optimizer", f"{file}:make", "--steps", "2", *run]) == 0
    file.write_text(FILE.replace("strength=0.01", "strength=0.02"))
    capsys.readouterr()
    assert train.main([*run, "--resume", "--steps", "4"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--optimizer: {file} was changed since the run began" in error


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("optax:lionn", {}, "optax has no function lionn"),
        ("optax:contrib.lionn", {}, "optax has no function contrib.lionn"),
        ("optax:scale_by_adam", {}, "its first argument is no learning rate"),
        ("optax:lion", {"b3": 0.9}, "unexpected keyword argument 'b3'"),
        ("FILE:absent", {}, "has no function absent"),
        ("FILE:NUMBER", {}, "has no function NUMBER"),
        ("FILE:branches", {}, "the rate is traced, so use jnp.where"),
        ("FILE:grows", {}, "a step changes the structure"),
        ("FILE:loses", {}, "other names or shapes than the parameters"),
        ("FILE:typed_key", {}, "its state holds a typed key"),
        ("absent.py:make", {}, "absent.py: cannot be read (No such file or directory)"),
    ],
)
def test_what_cannot_train_is_refused(name: str, arguments: dict[str, Any], reason: str, file: Path) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        check_transformation(name.replace("FILE", str(file)), arguments, PARAMS)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_run_is_named(file: Path) -> None:
    file.write_text("import optax\nraise RuntimeError('no data')\n")
    with pytest.raises(ValueError, match=rf"{file}: cannot be run \(RuntimeError: no data\)"):
        make_transformation(f"{file}:make", 0.1, {})


def test_a_mistake_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train.main([*COMMAND, "--optimizer", "optax:lionn", "--steps", "2", "--run-dir", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--optimizer: optax:lionn: optax has no function lionn; fix it, or choose another" in error
    assert not run.exists()


def test_the_options_of_the_table_are_no_arguments() -> None:
    config = resolve({"optimizer": "optax:lion", "optimizer_arguments": ("b1=0.8",), "lr": 1e-4})
    assert config.optimizer_options() == {"base_lr": 1e-4}
    assert config.external_arguments() == {"b1": 0.8}
