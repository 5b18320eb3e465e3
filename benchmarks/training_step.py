"""Time a training step of ResNet-101 (forward, backward, Adam) in JAX and in PyTorch, on this CPU.

    python -m benchmarks.training_step --size 32@32x32x1 --rounds 9 --threads 2

Every contestant is a process of its own with the same number of threads. They take turns, one step each,
round after round, so that a machine whose speed drifts is the same for all; medians and the ratio to
PyTorch's fastest eager form are printed. PyTorch runs in four forms: NCHW or channels_last, Adam as it comes
or fused.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

TORCH_FORMS = {
    "torch NCHW, Adam": (False, False),
    "torch NCHW, fused Adam": (False, True),
    "torch channels_last, Adam": (True, False),
    "torch channels_last, fused Adam": (True, True),
}
DEFAULT_FORM = "torch NCHW, Adam"


def jax_step(batch: int, shape: tuple[int, int, int], model: str) -> Callable[[], None]:
    """A function that takes one training step with the JAX engine."""
    from jax_resnet import Engine

    engine = Engine(
        model=model,
        model_options={},
        num_classes=10,
        image_shape=shape,
        mean=(0.5,) * shape[2],
        std=(0.5,) * shape[2],
        optimizer="adam",
        optimizer_options={},
        learning_rate=lambda step: 1e-3,
    )
    rng = np.random.default_rng(0)
    image = rng.standard_normal((batch, *shape)).astype(np.float32)
    label = (np.arange(batch) % 10).astype(np.int32)

    def batches():
        while True:
            yield {"image": image, "label": label}

    steps = engine.train(engine.init(), batches())

    def step() -> None:
        state, _ = next(steps)
        np.asarray(state["step"])  # the step's whole program has run when any output is there

    return step


def torch_step(
    batch: int, shape: tuple[int, int, int], model: str, channels_last: bool, fused: bool
) -> Callable[[], None]:
    """A function that takes one training step with the oracle in eager PyTorch."""
    import torch

    from torch_oracle.resnet import MODELS

    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = MODELS[model](10, shape[2]).train()
    net.to(memory_format=layout)  # type: ignore[call-overload]
    image = torch.randn(batch, shape[2], *shape[:2]).to(memory_format=layout)
    label = torch.arange(batch) % 10
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused)
    loss_fn = torch.nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_fn(net(image), label).backward()
        optimizer.step()

    return step


def work(
    name: str, batch: int, shape: tuple[int, int, int], model: str, threads: int, pipe: Connection
) -> None:
    """A contestant: gets ready, then takes a step whenever it is asked and answers with its seconds."""
    os.sched_setaffinity(
        0, sorted(os.sched_getaffinity(0))[:threads]
    )  # XLA has a thread for each processor it sees
    if name == "jax":
        os.environ["JAX_PLATFORMS"] = "cpu"
        step = jax_step(batch, shape, model)
    else:
        import torch

        torch.set_num_threads(threads)
        step = torch_step(batch, shape, model, *TORCH_FORMS[name])
    step()
    step()
    pipe.send(None)
    while pipe.recv():
        begun = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - begun)


def measure(
    names: list[str], batch: int, shape: tuple[int, int, int], model: str, threads: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of `rounds` steps of each contestant, taken in turns."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name in names:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(name, batch, shape, model, threads, there), daemon=True)
        process.start()
        here.recv()
        workers[name] = (process, here)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, (_, pipe) in workers.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    for process, pipe in workers.values():
        pipe.send(False)
        process.join()
    return seconds


def report(size: str, seconds: dict[str, list[float]], threads: int) -> None:
    """Print medians and the ratios of JAX to PyTorch's fastest and default form."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = min(TORCH_FORMS, key=lambda name: medians[name])
    rounds = len(seconds["jax"])
    print(
        f"\nResNet training step, {size}, float32, {threads} threads, median of {rounds} interleaved rounds"
    )
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        print(f"  {name:32} {median:7.3f} s   {median / medians[fastest]:5.2f} of PyTorch's fastest")
    print(f"  jax / PyTorch's fastest eager ({fastest}): {medians['jax'] / medians[fastest]:.2f}")
    print(f"  jax / PyTorch's default eager: {medians['jax'] / medians[DEFAULT_FORM]:.2f}")


def parse_size(text: str) -> tuple[int, tuple[int, int, int]]:
    """'32@32x32x1' to (32, (32, 32, 1)): batch, and height, width, channels."""
    batch, _, shape = text.partition("@")
    height, width, channels = shape.split("x")
    return int(batch), (int(height), int(width), int(channels))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="time training steps on this CPU, JAX against PyTorch")
    parser.add_argument(
        "--size", nargs="+", default=["32@32x32x1", "8@96x96x3", "4@224x224x3"], help="BATCH@HxWxC"
    )
    parser.add_argument("--model", default="resnet101")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    for size in args.size:
        batch, shape = parse_size(size)
        seconds = measure(["jax", *TORCH_FORMS], batch, shape, args.model, args.threads, args.rounds)
        report(f"{args.model} {size}", seconds, args.threads)


if __name__ == "__main__":
    main()
