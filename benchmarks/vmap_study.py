"""Seeds trained in one compiled step (`VmappedEngines`) against seeds trained one after another.

python -m benchmarks.vmap_study --model resnet8 --seeds 5 --batch-size 32 --rounds 9

Times a step of all seeds: medians of interleaved rounds. The first step includes compilation: separate runs
compile for each seed, since the data's mean and deviation are constants of the program.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from jax_resnet import Engine
from jax_resnet.strategies.vmapped import VmappedEngines


def make_engine(model: str, seed: int) -> Engine:
    """Return an engine of a study: small gray images, AdaBound."""
    return Engine(
        model=model,
        model_options={},
        num_classes=10,
        image_shape=(32, 32, 1),
        mean=(0.5 + seed / 100,),
        std=(0.25,),
        optimizer="adabound",
        optimizer_options={"base_lr": 1e-3},
        learning_rate=lambda step: 1e-3,
        seed=seed,
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    batches = [
        {
            "image": rng.integers(256, size=(args.batch_size, 32, 32, 1), dtype=np.uint8),
            "label": rng.integers(10, size=args.batch_size, dtype=np.int32),
        }
        for _ in range(args.seeds)
    ]
    engines = [make_engine(args.model, seed) for seed in range(args.seeds)]
    vmapped = VmappedEngines(engines)
    states = [engine.init() for engine in engines]
    stacked = vmapped.stack(states)

    def separate() -> None:
        for index, engine in enumerate(engines):
            ((states[index], metrics),) = engine.train(states[index], [batches[index]])
            float(metrics["grad_norm"])  # waits for the device; the loss is there before the backward pass

    def at_once() -> None:
        nonlocal stacked
        stacked, metrics = vmapped.step(stacked, batches, 0)
        np.asarray(metrics["grad_norm"])

    candidates: dict[str, Callable[[], None]] = {"separate": separate, "together": at_once}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(args.rounds + 1):
        for name, step in candidates.items():
            begun = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    device = jax.devices()[0].device_kind
    print(f"{args.model}, {args.seeds} seeds, batch {args.batch_size} of 32x32x1, {device}")
    for name, median in medians.items():
        print(f"{name}: {median:.3f} s for a step of all seeds, first step {seconds[name][0]:.1f} s")
    print(f"together / separate: {medians['together'] / medians['separate']:.2f}")


if __name__ == "__main__":
    main()
