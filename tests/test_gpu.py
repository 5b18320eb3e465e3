"""What a GPU could get wrong: the digits of float32, those of bfloat16, and the same bits twice.

`THREEWAY_GPU=1 pytest -m gpu` runs these on a GPU; elsewhere they run on the CPU, with the same tolerances.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiment.commands import train
from jax_resnet.engine import Engine
from jax_resnet.losses import cross_entropy
from jax_resnet.resnet import resnet50
from jax_resnet.state_dict import apply, load_state_dict, split, state_dict
from tests.helpers.comparing import assert_all_close, assert_all_near, assert_close, quick_jit, random_state
from tests.tolerances import BFLOAT16_GRADIENT, BFLOAT16_NETWORK, FLOAT32_NETWORK

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]
BATCH, CLASSES, SIZE = 8, 5, 32
LIMIT_SECONDS = 300  # for one process: a hang becomes a failure


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    image = rng.normal(size=(BATCH, SIZE, SIZE, 3)).astype(np.float32)
    return {"image": image, "label": rng.integers(0, CLASSES, BATCH).astype(np.int32)}


def gradient_on(device: jax.Device, dtype: str) -> dict[str, dict[str, np.ndarray]]:
    """Logits and statistics of a training pass, and every gradient of its loss, computed on a device.

    A ResNet with the 7x7 stem, max-pooling, and bottlenecks with a projection and with none.
    """
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        model = resnet50(CLASSES, width=4, stage_sizes=(2,), rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
        shapes = {name: value.shape for name, value in state_dict(model).items()}
        load_state_dict(model, {name: value.astype("f4") for name, value in random_state(shapes).items()})
        parts = split(model)

        @quick_jit
        def run(params: Any, batch_stats: Any, image: Any, label: Any) -> Any:
            def loss(params: Any) -> Any:
                logits, after = apply(parts.train, params, batch_stats, image)
                return cross_entropy(logits, label), ({"logits": logits}, after)

            return jax.grad(loss, has_aux=True)(params)

        values = {"image": batch()["image"].astype(dtype), "label": batch()["label"]}
        placed = jax.device_put((parts.params, parts.batch_stats, values), device)
        gradients, (logits, after) = run(*placed[:2], **placed[2])
        assert logits["logits"].devices() == {device}
        found = {"train": logits, "statistics": after, "gradient": gradients}
        return jax.tree.map(np.asarray, found)


def test_float32_at_highest_precision_has_the_digits_of_the_cpus_float64(accelerator: jax.Device) -> None:
    expected = gradient_on(jax.devices("cpu")[0], "float64")
    found = gradient_on(accelerator, "float32")
    for kind, tensors in expected.items():
        assert_all_close(kind, found[kind], tensors, FLOAT32_NETWORK)


def step(precision: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """One step of SGD: its metrics, what it took from every parameter (the gradient), the tree after it."""
    engine = Engine(
        model="resnet34",
        model_options={"width": 4, "stage_sizes": (1,), "small_images": True},
        num_classes=CLASSES,
        image_shape=(SIZE, SIZE, 3),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        optimizer="sgd",
        optimizer_options={"momentum": 0.0},
        learning_rate=lambda step: 1.0,
        precision=precision,
    )
    state = engine.init()
    before = engine.to_tree(state)["params"]
    (pair,) = engine.train(state, [batch()])
    after = engine.to_tree(pair[0])
    metrics = {name: np.asarray(pair[1][name]) for name in ("loss", "logits", "grad_norm")}
    assert engine.first_nonfinite_step(pair[0]) is None
    return metrics, {name: before[name] - value for name, value in after["params"].items()}, after


def test_a_step_in_bfloat16_is_close_to_one_in_float32(accelerator: jax.Device) -> None:
    expected, expected_gradient, expected_tree = step("float32")
    found, gradient, tree = step("bfloat16")
    for name in ("loss", "logits"):
        assert_close(name, found[name], expected[name], BFLOAT16_NETWORK)
    assert_all_close("after", tree["batch_stats"], expected_tree["batch_stats"], BFLOAT16_NETWORK)
    assert_all_near("gradient", gradient, expected_gradient, BFLOAT16_GRADIENT)
    assert_close("grad_norm", found["grad_norm"], expected["grad_norm"], BFLOAT16_GRADIENT)
    assert (found["logits"] != expected["logits"]).any()  # it was another precision
    kept = [*tree["params"].values(), *tree["batch_stats"].values(), *found.values()]
    assert {value.dtype for value in kept} == {np.dtype("float32")}


def go(device: jax.Device, run_dir: Path, *flags: str) -> None:
    """`python train.py --deterministic`; each compiles for itself: no cache hides a choice of kernels.

    On a CPU, where there is no such choice, in this process: that takes a tenth of the time.
    """
    argv = ["--deterministic", "--run-dir", str(run_dir), *flags]
    if device.platform == "cpu":
        assert train.main(argv) == 0
        return
    done = subprocess.run(
        [sys.executable, "train.py", *argv],
        cwd=ROOT,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"


def test_the_same_bits_in_one_go_again_and_after_a_stop(
    accelerator: jax.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # --deterministic adds to them
    # The CPU's kernels are deterministic without the flag: there the smallest network is enough.
    model = "resnet18" if accelerator.platform == "gpu" else "cnn"
    steps = 20
    flags = ["--model", model, "--schedule-steps", str(steps), "--eval-every", "10", "--no-report"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    go(accelerator, whole, *flags, "--steps", str(steps))
    go(accelerator, stopped, *flags, "--steps", str(steps // 2))
    first = read(whole, before=steps // 2)
    assert len(first) == 1 + steps // 2
    assert read(stopped, before=steps // 2) == first
    go(accelerator, stopped, "--resume", "--steps", str(steps))
    for name in ("metrics.jsonl", "weights.safetensors", "weights-best.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


def read(run_dir: Path, before: int) -> list[dict[str, Any]]:
    """The lines of training and validation up to a step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] <= before and line["split"] != "test"]
