"""Time the input pipeline of recipes, alone and together with the training step.

    python -m benchmarks.input_pipeline --data-dir DIR
    python -m benchmarks.input_pipeline --data-dir DIR --framework numpy --only cifar10 imagenet

Prints images/s of the first pass over the data, which reads and decodes files; of later passes, which take
small sets from memory; of the training step (0 seconds: not measured); the ratio of later passes to the
step; and the slowdown of the step fed by the pipeline over the step fed with one repeated batch, in
interleaved rounds of a second. ImageNet is replaced by generated 500x375 JPEG files.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiment.data.builtin import SyntheticSource
from experiment.data.loading import Data, load
from experiment.engines import set_environment
from experiment.options.command_line import parse
from experiment.options.config import Config
from experiment.options.resolving import resolve
from experiment.run.session import make_engine, resolve_lengths
from tests.helpers import made_tfds

CIFAR = "--dataset cifar10 --train-subset 0.2 --model resnet20 --batch-size 128"
CARS = "--dataset cars196 --crop-to-bbox --image-size 64x96 --model resnet101"
IMAGENET = "--dataset imagenet2012 --val-fraction 0 --model resnet34 --resize 256 480"
RECIPES = {
    "digits": "--dataset digits --model resnet101",
    "fashion_mnist": "--dataset fashion_mnist --train-subset 0.2 --model resnet20 --batch-size 128 "
    "--augment crop-flip",
    "cifar10": f"{CIFAR} --augment crop-flip",
    "cifar10, autoaugment": f"{CIFAR} --augment autoaugment-cifar10",
    "cars196": f"{CARS} --grayscale",
    "cars196, crop-flip": f"{CARS} --augment crop-flip",
    "imagenet": f"{IMAGENET} --augment crop-flip",
    "imagenet, pca": f"{IMAGENET} --augment crop-flip-pca",
    "imagenet, autoaugment": f"{IMAGENET} --augment autoaugment",
}


def make_imagenet(root: Path, count: int = 256) -> None:
    """Write a TFDS data set imagenet2012 of generated photographs: smooth, with noise; about 28 kB each."""
    source = SyntheticSource(0, count, (375, 500))
    images, _ = source.images(np.arange(count))
    files = [
        (made_tfds.encoded(Image.blend(p, p.resize((125, 94)).resize((500, 375)), 0.5), "jpeg"), 0)
        for p in images
    ]
    made_tfds.write(root, "imagenet2012", {"train": files, "validation": files[:2]})


def passes(data: Data, seconds: float) -> tuple[float, float]:
    """Return images/s of the first pass and of later passes, each for at most `seconds`."""
    batches = data.train_batches()
    first = rate(itertools.islice(batches, data.steps_per_epoch), data.batch_size, seconds)
    return first, rate(batches, data.batch_size, seconds)


def rate(batches: Iterator[Any], batch_size: int, seconds: float) -> float:
    """Return images/s of an iterator."""
    begun, count = time.perf_counter(), 0
    for _ in batches:
        count += batch_size
        if time.perf_counter() - begun > seconds:
            break
    return count / (time.perf_counter() - begun)


def appetite(config: Config, data: Data, seconds: float) -> tuple[float, float]:
    """Return images/s of the training step: fed with one repeated batch, and fed by the pipeline."""
    engine = make_engine(config, data, resolve_lengths(config, data, None, {}))
    pipeline = data.train_batches()
    for _ in range(data.steps_per_epoch):  # the first pass, in which files are read
        batch = next(pipeline)
    sources: tuple[Iterator[Any], ...] = (itertools.repeat(batch), pipeline)
    source = sources[0]
    batches = (next(source) for _ in itertools.count())
    norms = (float(metrics["grad_norm"]) for _, metrics in engine.train(engine.init(), batches))
    next(norms)
    rates: tuple[list[float], list[float]] = ([], [])
    for turn in range(2 * max(1, round(seconds / 2))):
        source = sources[turn % 2]
        next(norms)
        rates[turn % 2].append(rate(norms, config.batch_size, 1.0))
    return statistics.median(rates[0]), statistics.median(rates[1])


def main() -> None:
    """Print a row for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="a TFDS data directory")
    parser.add_argument("--framework", default="jax", choices=["jax", "numpy"])
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seconds", type=float, default=5.0, help="for each pass (default 5)")
    parser.add_argument("--step-seconds", type=float, default=10.0, help="for training steps (default 10)")
    options = parser.parse_args()
    set_environment(options.framework, deterministic=False)
    print("recipe                    first pass   later   training step   later / step   cost of feeding")
    with tempfile.TemporaryDirectory() as made:
        if any(name.startswith("imagenet") for name in options.only):
            make_imagenet(Path(made))
        for name in options.only:
            directory = made if name.startswith("imagenet") else options.data_dir
            flags = [*RECIPES[name].split(), "--data-dir", directory, "--framework", options.framework]
            config = resolve(parse(flags))
            data = load(config.dataset, **config.data_options())
            first, later = passes(data, options.seconds)
            step = fed = float("nan")
            if options.step_seconds:
                step, fed = appetite(config, data, options.step_seconds)
            row = f"{name:<25} {first:>10.0f} {later:>7.0f} {step:>15.1f} {later / step:>14.1f}"
            print(f"{row} {step / fed - 1:>17.1%}", flush=True)


if __name__ == "__main__":
    main()
