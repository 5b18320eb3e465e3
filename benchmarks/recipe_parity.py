"""Compare the curves of ResNet-20 on CIFAR-10 by its recipe, in float32, in both engines and PyTorch.

    python -m benchmarks.recipe_parity --data-dir DIR --out FOLDER --epochs 2 --seeds 0 1 2

All candidates of a seed start from the same weights and see the same batches, augmented by the real
pipeline. In float32 two correct runs diverge within some twenty steps, so means over epochs are compared.
The last candidate measures the difference that chance alone makes: PyTorch with one weight's last bit
changed.

Epochs are interleaved. After every epoch a line is added to FOLDER/results.jsonl and a checkpoint is written
beside it: the same command continues where it stopped, or from the end with more --epochs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import scipy.stats

import experiment.data.loading
import torch_oracle
from experiment.data.loading import Data
from experiment.files.checkpoints import Checkpoints
from experiment.files.run_folder import write_file
from experiment.files.schema import History
from experiment.metrics import Metrics
from experiment.options.command_line import parse
from experiment.options.config import Config
from experiment.options.recipes import with_recipe
from experiment.options.resolving import resolve
from experiment.run.session import make_engine, resolve_lengths
from tests.parity.recipe import Oracle

REFERENCE, NUDGED = "torch", "torch-nudged"
CANDIDATES = ("jax", "numpy", REFERENCE, NUDGED)
MEASURES = ("loss", "accuracy", "val_loss", "val_accuracy")
EVAL_BATCH = 500
NO_HISTORY: History = {"length": 0, "sha256": hashlib.sha256().hexdigest()}  # there is no metrics.jsonl
Line = dict[str, Any]


def recipe(data_dir: str, seed: int, *argv: str) -> Config:
    """Return the recipe's options with this seed of weights and batches."""
    flags = ["--recipe", "cifar10-resnet20", "--data-dir", data_dir, "--seed", str(seed), *argv]
    return resolve(with_recipe(parse(flags)))


def make_candidate(name: str, config: Config, data: Data) -> Any:
    """Return an engine, or PyTorch with the same methods."""
    if name in (REFERENCE, NUDGED):
        network = torch_oracle.MODELS[config.model](data.num_classes, data.image_shape[2])
        return Oracle(network, data.mean, data.std, config.milestones)
    config = dataclasses.replace(config, framework=name)
    return make_engine(config, data, resolve_lengths(config, data, None, {}))


def first_tree(name: str, config: Config, data: Data) -> dict[str, Any]:
    """Return the initial tree of every candidate: NumPy's initial weights, which equal JAX's."""
    engine = make_candidate("numpy", config, data)
    tree: dict[str, Any] = engine.to_tree(engine.init())
    if name == NUDGED:
        weight = tree["params"]["conv1.weight"]
        weight.flat[0] = np.nextafter(weight.flat[0], np.float32(np.inf))
    return tree


def train_epoch(candidate: Any, tree: dict[str, Any], data: Data) -> tuple[dict[str, Any], Line]:
    """Train one more epoch; return the tree, and the means over its batches and over the validation part."""
    start, training, validation = time.perf_counter(), Metrics(data.num_classes), Metrics(data.num_classes)
    batches = data.train_batches(int(tree["step"]))
    state = candidate.from_tree(tree)
    for after, metrics in candidate.train(state, itertools.islice(batches, data.steps_per_epoch)):
        state = after
        training.update(np.asarray(metrics["logits"]), metrics["label"], float(metrics["loss"]))
    seconds = time.perf_counter() - start
    labels = [batch["label"] for batch in data.eval_batches("val", EVAL_BATCH)]
    logits = candidate.evaluate(state, data.eval_batches("val", EVAL_BATCH))
    for batch_logits, label in zip(logits, labels, strict=True):
        validation.update(np.asarray(batch_logits), label)
    (means, held_out), tree = (part.compute() for part in (training, validation)), candidate.to_tree(state)
    line = {"step": int(tree["step"]), "loss": means["loss"], "accuracy": means["accuracy"]}
    line |= {"val_loss": held_out["loss"], "val_accuracy": held_out["accuracy"]}
    return tree, {**line, "seconds": round(seconds, 1)}


def compare(
    configs: Iterable[Config], epochs: int, out: Path, names: Sequence[str] = CANDIDATES
) -> list[Line]:
    """Train every candidate for `epochs` with each config; return the lines of `out`, old and new."""
    results = out / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for config in configs:
        data = experiment.data.loading.load(config.dataset, **config.data_options())
        candidates = {name: make_candidate(name, config, data) for name in names}
        for epoch, name in itertools.product(range(1, epochs + 1), names):
            key = {"seed": config.seed, "candidate": name, "epoch": epoch}
            if any(key.items() <= line.items() for line in lines):
                continue
            # A line is written after its checkpoint; of the two that are kept, one is where its epoch begins
            checkpoints = Checkpoints(out / f"seed-{config.seed}-{name}", keep=2)
            begin = (epoch - 1) * data.steps_per_epoch
            tree = checkpoints.load(begin)[0] if begin else first_tree(name, config, data)
            tree, line = train_epoch(candidates[name], tree, data)
            checkpoints.save(line["step"], tree, {"history": NO_HISTORY})
            checkpoints.close()
            lines.append({**key, **line})
            write_file(results, "".join(json.dumps(line) + "\n" for line in lines).encode())
            print(json.dumps(lines[-1]), flush=True)
    return lines


def values(lines: Sequence[Line], name: str, epoch: int, measure: str) -> dict[int, float]:
    """Return {seed: value} of one measure."""
    return {
        line["seed"]: line[measure] for line in lines if (line["candidate"], line["epoch"]) == (name, epoch)
    }


def differences(lines: Sequence[Line], name: str, epoch: int, measure: str) -> list[float]:
    """Return a candidate's relative difference from the reference for each seed."""
    measured, expected = (values(lines, candidate, epoch, measure) for candidate in (name, REFERENCE))
    return [measured[seed] / expected[seed] - 1 for seed in sorted(measured.keys() & expected.keys())]


def interval(sample: Sequence[float]) -> float:
    """Return the half width of Student's 95 % confidence interval of the mean: t s / sqrt(n)."""
    if len(sample) < 2:
        return float("nan")
    t = scipy.stats.t.ppf(0.975, len(sample) - 1)
    return float(t * statistics.stdev(sample) / len(sample) ** 0.5)


def table(lines: Sequence[Line]) -> str:
    """Format means over the seeds and differences from the reference in Markdown."""
    rows = [
        "| epoch | measure | candidate | mean | difference from torch, % | 95 % interval | seeds |",
        "| --- " * 7 + "|",
    ]
    for epoch in sorted({line["epoch"] for line in lines}):
        for measure, name in itertools.product(MEASURES, CANDIDATES):
            measured, apart = values(lines, name, epoch, measure), differences(lines, name, epoch, measure)
            if not apart:
                continue
            mean = f"| {epoch} | {measure} | {name} | {statistics.mean(measured.values()):.4f}"
            if name != REFERENCE:
                percent = f"{100 * statistics.mean(apart):+.2f} | +-{100 * interval(apart):.2f}"
            else:
                percent = " | "
            rows.append(f"{mean} | {percent} | {len(apart)} |")
    return "\n".join(rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="the CIFAR-10 recipe in three implementations, in float32")
    parser.add_argument("--data-dir", required=True, help="a TFDS data directory with cifar10")
    parser.add_argument("--out", type=Path, required=True, help="a folder for results and checkpoints")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=CANDIDATES)
    parser.add_argument("--train-subset", default="1", help="a fraction, to try it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    configs = [
        recipe(options.data_dir, seed, "--train-subset", options.train_subset) for seed in options.seeds
    ]
    print(table(compare(configs, options.epochs, options.out, options.candidates)))


if __name__ == "__main__":
    main()
