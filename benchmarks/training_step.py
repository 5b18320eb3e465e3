"""Time a network in JAX, NumPy and PyTorch on this CPU: training steps (forward, backward, Adam), inference.

    python -m benchmarks.training_step --model resnet20 --size 128@32x32x3 --rounds 9 --threads 2
    python -m benchmarks.training_step --engine numpy --inference

Each candidate is a process with the same number of threads. Steps are interleaved, so that a drift of the
machine's speed affects all alike. Printed are medians, the ratio to PyTorch's fastest eager form, and peak
memory. PyTorch runs in four forms: NCHW or channels_last, default or fused Adam; in inference in two.

`benchmarks.every_network` measures many cases in the same way and makes a table of them.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import os
import re
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

Seconds = dict[str, list[float]]
Step = Callable[[], object]

# name: package, options of the network's builder, options of the engine
ENGINES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "jax": ("jax_resnet", {}, {}),
    "jax --remat": ("jax_resnet", {}, {"remat": True}),
    "jax --accumulate 2": ("jax_resnet", {}, {"accumulate": 2}),
    "jax --accumulate 4": ("jax_resnet", {}, {"accumulate": 4}),
    "jax --remat --accumulate 4": ("jax_resnet", {}, {"remat": True, "accumulate": 4}),
    "jax --precision bfloat16": ("jax_resnet", {}, {"precision": "bfloat16"}),
    "jax --freeze-backbone": ("jax_resnet", {}, {"freeze_backbone": True}),
    "numpy": ("numpy_ref", {}, {}),
    "numpy, patches kept": ("numpy_ref", {"keep_patches": True}, {}),
}
BY_HAND = "numpy, by hand"  # one process: forward, backward and step, as in docs/tour.md
TORCH_FORMS = {
    "torch NCHW, Adam": (False, False),
    "torch NCHW, fused Adam": (False, True),
    "torch channels_last, Adam": (True, False),
    "torch channels_last, fused Adam": (True, True),
}
DEFAULT_FORM = "torch NCHW, Adam"
TURN = 0.2  # seconds
COMPILED = "torch.compile, channels_last, fused Adam"


@dataclass(frozen=True)
class Case:
    """A network and its batch of images [batch, height, width, channels]; 10 classes.

    Attributes:
        shape: (height, width, channels).
        options: keyword arguments of the network's builder, the same in all three implementations.
    """

    model: str
    batch: int
    shape: tuple[int, int, int]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> str:
        """The network with its options."""
        return ", ".join([self.model, *(f"{name}={value}" for name, value in self.options.items())])

    @property
    def size(self) -> str:
        """The batch, as "32 @ 32x32x1"."""
        return f"{self.batch} @ {'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return f"{self.network}, {self.size}"


def torch_forms(inference: bool) -> list[str]:
    """Return PyTorch's eager forms; inference has no optimizer, so that two of the four remain."""
    return [name for name, (_, fused) in TORCH_FORMS.items() if not (inference and fused)]


def package_of(name: str) -> str:
    """Return the package that a candidate imports."""
    return "numpy_ref" if name == BY_HAND else ENGINES[name][0] if name in ENGINES else "torch_oracle"


def engine_step(name: str, case: Case, inference: bool) -> Step:
    """Return a function that takes one training step with an engine, or computes one batch of logits."""
    package, model_options, engine_options = ENGINES[name]
    batch, shape = case.batch, case.shape
    engine = importlib.import_module(package).Engine(
        model=case.model,
        model_options={**case.options, **model_options},
        num_classes=10,
        image_shape=shape,
        mean=(0.5,) * shape[2],
        std=(0.5,) * shape[2],
        optimizer="adam",
        optimizer_options={},
        learning_rate=lambda step: 1e-3,
        **engine_options,
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


def by_hand_step(case: Case, inference: bool) -> Step:
    """Return the same function for a NumPy network without an engine."""
    import numpy_ref

    rng, channels = np.random.default_rng(0), case.shape[2]
    model = numpy_ref.resnet.MODELS[case.model](10, channels, rng=rng, **case.options)
    optimizer = numpy_ref.Adam(model.parameters(), lr=1e-3)
    image = rng.standard_normal((case.batch, *case.shape)).astype(np.float32)
    label = np.arange(case.batch) % 10

    def step() -> None:
        _, dlogits = numpy_ref.cross_entropy(model.forward(image, train=True), label)
        model.backward(dlogits)
        optimizer.step()
        optimizer.zero_grad()

    return (lambda: model.forward(image)) if inference else step


def torch_step(name: str, case: Case, inference: bool) -> Step:
    """Return the same function for PyTorch, eager or compiled."""
    import torch

    from torch_oracle.resnet import MODELS

    channels_last, fused = TORCH_FORMS.get(name, (True, True))
    height, width, channels = case.shape
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net: torch.nn.Module = MODELS[case.model](10, channels, **case.options).train()
    net.to(memory_format=layout)  # type: ignore[call-overload]
    image = torch.randn(case.batch, channels, height, width).to(memory_format=layout)
    label = torch.arange(case.batch) % 10
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused)
    if name == COMPILED:
        net.compile()
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


def case_step(name: str, case: Case, inference: bool) -> Step:
    """Return the function of a candidate."""
    if name == BY_HAND:
        return by_hand_step(case, inference)
    return (engine_step if name in ENGINES else torch_step)(name, case, inference)


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


def work(name: str, make: Callable[..., Step], threads: int, pipe: Connection, *what: Any) -> None:
    """Run a candidate: prepare, then take steps for each message and send the seconds of one.

    A step shorter than TURN is repeated for about TURN after one that is not counted: the first one after
    other candidates finds caches and threads cold, which in training happens once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its candidates
    os.environ["JAX_PLATFORMS"] = "cpu"
    if package_of(name) == "torch_oracle":
        importlib.import_module("torch").set_num_threads(threads)
    importlib.import_module(package_of(name))
    pipe.send("imported")
    step = make(name, *what)
    step()
    repeats = max(1, int(TURN / seconds_of(step, 1)))
    try:
        pipe.send("ready")
        while pipe.recv():
            if repeats > 1:
                step()
            pipe.send(seconds_of(step, repeats))
    except (EOFError, ConnectionError):
        return  # the parent was stopped


def seconds_of(step: Step, repeats: int) -> float:
    """Return the mean seconds of `repeats` steps."""
    begun = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - begun) / repeats


def measure(
    names: Sequence[str], make: Callable[..., Step], threads: int, rounds: int, *what: Any
) -> tuple[Seconds, dict[str, int]]:
    """Return for each candidate the seconds of a step in each of `rounds` interleaved turns, and its peak
    memory in bytes: from its start to the end of its second step, and in one more turn, less its memory after
    imports.

    Args:
        names: of engines and of PyTorch's forms.
        make: `make(name, *what)` returns the function to time; it runs in the candidate's process.

    Raises:
        ChildProcessError: a candidate ended early.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    peaks: dict[str, int] = {}
    before: dict[str, int] = {}
    seconds: Seconds = {name: [] for name in names}
    cores = os.sched_getaffinity(0)
    try:
        # Inherited by the candidates: NumPy and XLA have a thread for each processor that they see at import
        os.sched_setaffinity(0, sorted(cores)[:threads])
        for name in names:
            here, there = context.Pipe()
            process = context.Process(target=work, args=(name, make, threads, there, *what))
            process.start()
            there.close()  # so that the end of the process is the end of the pipe
            workers[name] = (process, here)
            here.recv()
            before[name] = memory(process.pid)
            peaks[name] = peak_memory(process.pid, here)
        for _ in range(rounds):
            for name, (_, pipe) in workers.items():
                pipe.send(True)
                seconds[name].append(pipe.recv())
        for name, (process, pipe) in workers.items():
            pipe.send(True)
            peaks[name] = max(peaks[name], peak_memory(process.pid, pipe))
            pipe.send(False)
            process.join()
    except (EOFError, ConnectionError) as error:
        raise ChildProcessError(f"{name} ended early (out of memory?)") from error
    finally:
        os.sched_setaffinity(0, cores)
        for _, pipe in workers.values():
            pipe.close()
        for process, _ in workers.values():
            process.join(10)
            process.terminate()
            process.join()
    return seconds, {name: peaks[name] - before[name] for name in names}


def report(title: str, seconds: Seconds, sizes: dict[str, int], threads: int) -> None:
    """Print medians, peak memory, and the ratios to PyTorch's fastest and default form."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = min((name for name in TORCH_FORMS if name in medians), key=medians.__getitem__)
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
    candidates = [*ENGINES, BY_HAND]
    parser.add_argument("--engine", nargs="+", choices=candidates, default=["jax", "numpy"])
    parser.add_argument("--inference", action="store_true", help="time logits instead of training steps")
    parser.add_argument("--model", default="resnet101")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=core_count())
    args = parser.parse_args()
    for size in args.size:
        case = Case(args.model, *parse_size(size))
        names = [*args.engine, *torch_forms(args.inference)]
        results = measure(names, case_step, args.threads, args.rounds, case, args.inference)
        task = "inference" if args.inference else "training step"
        report(f"{case}, {task}", *results, args.threads)


if __name__ == "__main__":
    main()
