"""Time ResNet-101 in JAX, NumPy and PyTorch on this CPU: training steps (forward, backward, Adam), inference.

    python -m benchmarks.training_step --size 32@32x32x1 --rounds 9 --threads 2
    python -m benchmarks.training_step --engine numpy --inference

Each candidate is a process with the same number of threads. Steps are interleaved, so that a drift of the
machine's speed affects all alike. Printed are medians, the ratio to PyTorch's fastest eager form, and peak
memory. PyTorch runs in four forms: NCHW or channels_last, default or fused Adam.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

Seconds = dict[str, list[float]]

TORCH_FORMS = {
    "torch NCHW, Adam": (False, False),
    "torch NCHW, fused Adam": (False, True),
    "torch channels_last, Adam": (True, False),
    "torch channels_last, fused Adam": (True, True),
}
DEFAULT_FORM = "torch NCHW, Adam"


Step = Callable[[], object]
ENGINES = {
    "jax": ("jax_resnet", {}),
    "numpy": ("numpy_ref", {}),
    "numpy, patches kept": ("numpy_ref", {"keep_patches": True}),
}


def engine_step(name: str, batch: int, shape: tuple[int, int, int], model: str, inference: bool) -> Step:
    """Return a function that takes one training step with an engine, or computes one batch of logits."""
    package, options = ENGINES[name]
    engine = importlib.import_module(package).Engine(
        model=model,
        model_options=options,
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
    batches = itertools.repeat({"image": image, "label": (np.arange(batch) % 10).astype(np.int32)})
    state = engine.init()
    if inference:
        logits = engine.evaluate(state, batches)
        return lambda: np.asarray(next(logits)).sum()
    steps = engine.train(state, batches)
    # Block by block, the loss is there before the backward pass; the gradient's norm comes last
    return lambda: float(next(steps)[1]["grad_norm"])


def torch_step(name: str, batch: int, shape: tuple[int, int, int], model: str, inference: bool) -> Step:
    """Return the same function for eager PyTorch."""
    import torch

    from torch_oracle.resnet import MODELS

    channels_last, fused = TORCH_FORMS[name]
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

    @torch.inference_mode()
    def infer() -> None:
        net(image)

    if inference:
        net.eval()
        return infer
    return step


def memory(pid: int | None) -> int:
    """Return the bytes that a process and its children hold, without libraries, shared pages counted once
    (Linux: proportional set size). 0 after its end."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = sum(int(kb) for kb in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB", rollup, re.MULTILINE)) * 1024
    return own + sum(memory(int(child)) for child in children)


def peak_memory(pid: int | None, pipe: Connection) -> int:
    """Return the most bytes that a candidate holds until it answers; sampling slows it down."""
    peak = 0
    while not pipe.poll(0.01):
        peak = max(peak, memory(pid))
    pipe.recv()
    return peak


def work(name: str, threads: int, pipe: Connection, *what: Any) -> None:
    """Run a candidate: prepare, then take a step for each message and send its seconds."""
    os.sched_setaffinity(
        0, sorted(os.sched_getaffinity(0))[:threads]
    )  # XLA has a thread for each processor it sees
    if name in ENGINES:
        os.environ["JAX_PLATFORMS"] = "cpu"
        importlib.import_module(ENGINES[name][0])
        make = engine_step
    else:
        torch = importlib.import_module("torch")
        importlib.import_module("torch_oracle")
        torch.set_num_threads(threads)
        make = torch_step
    pipe.send("imported")
    step = make(name, *what)
    step()
    step()
    pipe.send("ready")
    while pipe.recv():
        begun = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - begun)


def measure(names: list[str], threads: int, rounds: int, *what: Any) -> tuple[Seconds, dict[str, int]]:
    """Return for each candidate the seconds of `rounds` interleaved steps, and its peak memory in bytes: from
    its start to the end of its second step, and in one more step, less its memory after imports."""
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    peaks: dict[str, int] = {}
    before: dict[str, int] = {}
    for name in names:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(name, threads, there, *what))
        process.start()
        workers[name] = (process, here)
        here.recv()
        before[name] = memory(process.pid)
        peaks[name] = peak_memory(process.pid, here)
    seconds: Seconds = {name: [] for name in names}
    for _ in range(rounds):
        for name, (_, pipe) in workers.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    for name, (process, pipe) in workers.items():
        pipe.send(True)
        peaks[name] = max(peaks[name], peak_memory(process.pid, pipe))
        pipe.send(False)
        process.join()
    return seconds, {name: peaks[name] - before[name] for name in names}


def report(title: str, seconds: Seconds, sizes: dict[str, int], threads: int) -> None:
    """Print medians, peak memory, and the ratios to PyTorch's fastest and default form."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = min(TORCH_FORMS, key=lambda name: medians[name])
    rounds = len(seconds[fastest])
    print(f"\n{title}, float32, {threads} threads, median of {rounds} interleaved rounds")
    print(f"  {'':32} {'seconds':>9} {'of fastest':>11} {'of default':>11} {'MB':>6}")
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        ratios = f"{median / medians[fastest]:11.2f} {median / medians[DEFAULT_FORM]:11.2f}"
        print(f"  {name:32} {median:9.3f} {ratios} {sizes[name] / 1e6:6.0f}", flush=True)


def parse_size(text: str) -> tuple[int, tuple[int, int, int]]:
    """Parse '32@32x32x1' into (32, (32, 32, 1)): batch, and (height, width, channels)."""
    batch, _, shape = text.partition("@")
    height, width, channels = shape.split("x")
    return int(batch), (int(height), int(width), int(channels))


def main() -> None:
    """Run the command line."""
    from numpy_ref.cores import core_count  # a candidate imports its engine after its cores are chosen

    parser = argparse.ArgumentParser(description="time the engines on this CPU against PyTorch")
    parser.add_argument(
        "--size", nargs="+", default=["32@32x32x1", "8@96x96x3", "4@224x224x3"], help="BATCH@HxWxC"
    )
    parser.add_argument("--engine", nargs="+", choices=list(ENGINES), default=["jax", "numpy"])
    parser.add_argument("--inference", action="store_true", help="time logits instead of training steps")
    parser.add_argument("--model", default="resnet101")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=core_count())
    args = parser.parse_args()
    for size in args.size:
        batch, shape = parse_size(size)
        what = (batch, shape, args.model, args.inference)
        results = measure([*args.engine, *TORCH_FORMS], args.threads, args.rounds, *what)
        task = "inference" if args.inference else "training step"
        report(f"{args.model} {size}, {task}", *results, args.threads)


if __name__ == "__main__":
    main()
