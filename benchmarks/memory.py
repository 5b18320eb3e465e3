"""Time and memory of --accumulate, --remat, --precision bfloat16 and --freeze-backbone in the JAX engine.

python -m benchmarks.memory --model resnet101 --batch-size 16 --size 96 --rounds 5

Time: a training step with Adam, medians of interleaved rounds. Memory: XLA's count for the compiled step
without its arguments and results (on a CPU and on a GPU alike), and the state's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np

from jax_resnet import Engine

CANDIDATES: dict[str, dict[str, Any]] = {
    "plain": {},
    "--accumulate 2": {"accumulate": 2},
    "--accumulate 4": {"accumulate": 4},
    "--remat": {"remat": True},
    "--remat --accumulate 4": {"remat": True, "accumulate": 4},
    "--precision bfloat16": {"precision": "bfloat16"},
    "--freeze-backbone": {"freeze_backbone": True},
}


class Candidate:
    """An engine ready to take steps on one batch."""

    def __init__(self, model: str, batch: dict[str, np.ndarray], options: dict[str, Any]) -> None:
        self.engine = Engine(
            model=model,
            model_options={},
            num_classes=10,
            image_shape=batch["image"].shape[1:],
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            optimizer="adam",
            optimizer_options={},
            learning_rate=lambda step: 1e-3,
            **options,
        )
        self.batch = batch
        state = self.engine.init()
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        whole = self.engine.whole()
        self.engine._strategy = whole  # on a CPU too, where not all flags need it
        lowered = whole.compiled.lower(state, whole.placement.shard_batch(batch), np.float32(1e-3))
        analysis = lowered.compile().memory_analysis()
        if analysis is None:
            raise RuntimeError("XLA does not tell of this device how much memory a program needs")
        self.temporary_bytes = int(analysis.temp_size_in_bytes)
        self.state = state
        self.seconds: list[float] = []

    def step(self) -> None:
        """Take a step and record its seconds."""
        begun = time.perf_counter()
        ((self.state, metrics),) = self.engine.train(self.state, [self.batch])
        float(metrics["grad_norm"])  # waits for the device
        self.seconds.append(time.perf_counter() - begun)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet101")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (args.batch_size, args.size, args.size, 3)
    batch = {
        "image": rng.integers(256, size=shape, dtype=np.uint8),
        "label": rng.integers(10, size=args.batch_size, dtype=np.int32),
    }
    candidates = {name: Candidate(args.model, batch, options) for name, options in CANDIDATES.items()}
    for number in range(args.rounds + 1):
        for candidate in candidates.values():
            candidate.step()
            if number == 0:  # compiled, or read from a cache
                candidate.seconds.clear()
    plain = candidates["plain"]
    device = jax.devices()[0]
    print(f"{args.model}, batch {args.batch_size} of {args.size}x{args.size}x3, Adam, {device.device_kind}")
    print("| flags | MB | of plain | s a step | of plain |\n| --- | --- | --- | --- | --- |")
    for name, candidate in candidates.items():
        seconds, reference = statistics.median(candidate.seconds), statistics.median(plain.seconds)
        megabytes, share = candidate.temporary_bytes / 1e6, candidate.temporary_bytes / plain.temporary_bytes
        print(f"| `{name}` | {megabytes:.0f} | {share:.2f} | {seconds:.3f} | {seconds / reference:.2f} |")
    print(
        f"The state itself: {plain.state_bytes / 1e6:.0f} MB, with a frozen backbone "
        f"{candidates['--freeze-backbone'].state_bytes / 1e6:.0f} MB."
    )


if __name__ == "__main__":
    main()
