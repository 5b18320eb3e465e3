"""ResNet-20 on CIFAR-10 by its recipe, in float32, in both engines and in PyTorch: do the curves agree?

    python -m benchmarks.recipe_parity --data-dir DIR --out FOLDER --epochs 2 --seeds 0 1 2

All contestants of a seed start from the same weights and see the same batches, augmented by the real
pipeline. In float32 two right runs part within some twenty steps, so means over epochs are compared. How far
those may be apart by chance the last contestant tells: PyTorch again, one weight's last bit changed.

The contestants take turns, an epoch each. After every epoch FOLDER/results.jsonl has a line more and a
checkpoint lies beside it: the same command goes on where it was stopped, with more --epochs from the end.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from experiment.metrics import Metrics
from experiment.options.command_line import parse
from experiment.options.config import Config
from experiment.options.recipes import with_recipe
from experiment.options.resolving import resolve
from experiment.run.session import make_engine, resolve_lengths
from tests.parity.recipe import Oracle

JUDGE, NUDGED = "torch", "torch-nudged"
CONTESTANTS = ("jax", "numpy", JUDGE, NUDGED)
MEASURES = ("loss", "accuracy", "val_loss", "val_accuracy")
EVAL_BATCH = 500
Line = dict[str, Any]


def recipe(data_dir: str, seed: int, *argv: str) -> Config:
    """The recipe's options, with the seed of weights and batches."""
    flags = ["--recipe", "cifar10-resnet20", "--data-dir", data_dir, "--seed", str(seed), *argv]
    return resolve(with_recipe(parse(flags)))


def make_contestant(name: str, config: Config, data: Data) -> Any:
    """An engine, or PyTorch behind the same methods."""
    if name in (JUDGE, NUDGED):
        network = torch_oracle.MODELS[config.model](data.num_classes, data.image_shape[2])
        return Oracle(network, data.mean, data.std, config.milestones)
    config = dataclasses.replace(config, framework=name)
    return make_engine(config, data, resolve_lengths(config, data, None, {}))


def first_tree(name: str, config: Config, data: Data) -> dict[str, Any]:
    """Where a contestant starts: NumPy's initial weights, which are JAX's too."""
    engine = make_contestant("numpy", config, data)
    tree: dict[str, Any] = engine.to_tree(engine.init())
    if name == NUDGED:
        weight = tree["params"]["conv1.weight"]
        weight.flat[0] = np.nextafter(weight.flat[0], np.float32(np.inf))
    return tree


def train_epoch(contestant: Any, tree: dict[str, Any], data: Data) -> tuple[dict[str, Any], Line]:
    """The tree after one more epoch; the means over its batches, and over the validation part after it."""
    start, training, validation = time.perf_counter(), Metrics(data.num_classes), Metrics(data.num_classes)
    batches = data.train_batches(int(tree["step"]))
    state = contestant.from_tree(tree)
    for after, found in contestant.train(state, itertools.islice(batches, data.steps_per_epoch)):
        state = after
        training.update(np.asarray(found["logits"]), found["label"], float(found["loss"]))
    seconds = time.perf_counter() - start
    labels = [batch["label"] for batch in data.eval_batches("val", EVAL_BATCH)]
    logits = contestant.evaluate(state, data.eval_batches("val", EVAL_BATCH))
    for each, label in zip(logits, labels, strict=True):
        validation.update(np.asarray(each), label)
    (means, held_out), tree = (part.compute() for part in (training, validation)), contestant.to_tree(state)
    line = {"step": int(tree["step"]), "loss": means["loss"], "accuracy": means["accuracy"]}
    line |= {"val_loss": held_out["loss"], "val_accuracy": held_out["accuracy"]}
    return tree, {**line, "seconds": round(seconds, 1)}


def compare(
    configs: Iterable[Config], epochs: int, out: Path, names: Sequence[str] = CONTESTANTS
) -> list[Line]:
    """Train every contestant for so many epochs by each config; the lines of `out`, old and new."""
    results = out / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for config in configs:
        data = experiment.data.loading.load(config.dataset, **config.data_options())
        contestants = {name: make_contestant(name, config, data) for name in names}
        for epoch, name in itertools.product(range(1, epochs + 1), names):
            key = {"seed": config.seed, "contestant": name, "epoch": epoch}
            if any(key.items() <= line.items() for line in lines):
                continue
            # A line is written after its checkpoint; of the two that are kept, one is where its epoch begins
            checkpoints = Checkpoints(out / f"seed-{config.seed}-{name}", keep=2)
            begin = (epoch - 1) * data.steps_per_epoch
            tree = checkpoints.load(begin)[0] if begin else first_tree(name, config, data)
            tree, line = train_epoch(contestants[name], tree, data)
            checkpoints.save(line["step"], tree, {})
            checkpoints.close()
            lines.append({**key, **line})
            write_file(results, "".join(json.dumps(each) + "\n" for each in lines).encode())
            print(json.dumps(lines[-1]), flush=True)
    return lines


def values(lines: Sequence[Line], name: str, epoch: int, measure: str) -> dict[int, float]:
    """By seed."""
    return {
        line["seed"]: line[measure] for line in lines if (line["contestant"], line["epoch"]) == (name, epoch)
    }


def differences(lines: Sequence[Line], name: str, epoch: int, measure: str) -> list[float]:
    """A contestant's relative difference from the judge, seed by seed."""
    found, expected = (values(lines, each, epoch, measure) for each in (name, JUDGE))
    return [found[seed] / expected[seed] - 1 for seed in sorted(found.keys() & expected.keys())]


def interval(sample: Sequence[float]) -> float:
    """Half the width of Student's 95 % confidence interval of the mean: t s / sqrt(n)."""
    if len(sample) < 2:
        return float("nan")
    t = scipy.stats.t.ppf(0.975, len(sample) - 1)
    return float(t * statistics.stdev(sample) / len(sample) ** 0.5)


def table(lines: Sequence[Line]) -> str:
    """Means over the seeds and the difference from the judge, in Markdown."""
    rows = [
        "| epoch | measure | contestant | mean | difference from torch, % | 95 % interval | seeds |",
        "| --- " * 7 + "|",
    ]
    for epoch in sorted({line["epoch"] for line in lines}):
        for measure, name in itertools.product(MEASURES, CONTESTANTS):
            found, apart = values(lines, name, epoch, measure), differences(lines, name, epoch, measure)
            if not apart:
                continue
            mean = f"| {epoch} | {measure} | {name} | {statistics.mean(found.values()):.4f}"
            if name != JUDGE:
                percent = f"{100 * statistics.mean(apart):+.2f} | +-{100 * interval(apart):.2f}"
            else:
                percent = " | "
            rows.append(f"{mean} | {percent} | {len(apart)} |")
    return "\n".join(rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="the CIFAR-10 recipe in three implementations, in float32")
    parser.add_argument("--data-dir", required=True, help="a TFDS data directory with cifar10")
    parser.add_argument("--out", type=Path, required=True, help="a folder for results and checkpoints")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--train-subset", default="1", help="a fraction, to try it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    configs = [
        recipe(options.data_dir, seed, "--train-subset", options.train_subset) for seed in options.seeds
    ]
    print(table(compare(configs, options.epochs, options.out, options.contestants)))


if __name__ == "__main__":
    main()
