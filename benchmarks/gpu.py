"""ResNets on one NVIDIA GPU: this project's JAX step checked against PyTorch's, then timed beside it.

    python -m benchmarks.gpu --out results
    python -m benchmarks.gpu --parts check resnet101 --batch 128 --out results
    python -m benchmarks.gpu --tiny --out results   # anywhere: shows that it runs, its figures mean nothing

Needs JAX, Flax, optax and PyTorch: no data set, no network. PyTorch's networks are this project's own, which
have torchvision's layers. Each candidate is a process that keeps its memory; rounds of `--steps` steps are
interleaved. All compute in bfloat16 with float32 state. PyTorch: channels_last,
autocast, fused Adam; eager, and compiled with CUDA graphs ("reduce-overhead"; `--compile max-autotune` is its
other good mode, and takes minutes to compile). Images are on the GPU: JAX normalizes uint8 in its step,
PyTorch gets normalized images.

FLOPs are XLA's count of the step's program as it is written; the roofline is the bandwidth of the GPU's
memory, against the bytes that XLA counts for the optimized program. A short table comes last; everything is
in OUT/gpu.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}  # bytes a second: the makers' data sheets
TENSORS = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and its training batch."""

    model: str
    batch: int
    size: int
    classes: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


PARTS = {
    "resnet101": [Case("resnet101", batch, 224, 1000) for batch in (128, 256)],
    "resnet50": [Case("resnet50", batch, 224, 1000) for batch in (128, 256)],
    "cifar": [Case(model, batch, 32, 10) for model in ("resnet20", "resnet32") for batch in (128, 1024)],
}
THIN: dict[str, dict[str, Any]] = {
    "resnet101": {"width": 4, "stage_sizes": (1, 1)},
    "resnet50": {"width": 4, "stage_sizes": (1,)},
    "cifar": {"width": 4},
}
TINY = {
    name: [dataclasses.replace(case, batch=4, size=32, options=THIN[name]) for case in cases[:1]]
    for name, cases in PARTS.items()
}
JAX_FORMS = {"jax, adam": ("adam", 1), "jax, adabound": ("adabound", 1), "jax, adam, 10 a call": ("adam", 10)}
EAGER = "torch, eager"


class Candidate(Protocol):
    """A network ready for training."""

    @property
    def facts(self) -> dict[str, Any]:
        """Return facts besides its speed."""

    def run(self, steps: int) -> None:
        """Take `steps` steps; wait for the last."""


def jax_engine(case: Case, optimizer: str, precision: str = TENSORS, chunk: int = 1) -> Any:
    """Return this project's engine for a case."""
    from jax_resnet import Engine

    return Engine(
        model=case.model,
        model_options=case.options,
        num_classes=case.classes,
        image_shape=(case.size, case.size, 3),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        optimizer=optimizer,
        optimizer_options={"base_lr": 1e-3},
        learning_rate=lambda step: 1e-3,
        precision=precision,
        chunk=chunk,
    )


def made_batch(case: Case) -> dict[str, np.ndarray]:
    """Return noise: uint8 images [N, S, S, 3] and labels [N]."""
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(case.batch, case.size, case.size, 3), dtype=np.uint8)
    return {"image": image, "label": rng.integers(case.classes, size=case.batch, dtype=np.int32)}


class JaxCandidate:
    """The engine's step; one compiled call takes `chunk` of them."""

    def __init__(self, case: Case, optimizer: str, chunk: int) -> None:
        import jax

        self.engine = jax_engine(case, optimizer, chunk=chunk)
        self.chunk, self.state = chunk, self.engine.init()
        self.facts: dict[str, Any] = {}
        batch = made_batch(case)
        if chunk > 1:
            self.engine.hold(batch["image"], (0, 0, 0))
            still = {"shift": np.zeros((case.batch, 2), np.int32), "flip": np.zeros(case.batch, bool)}
            draws = {"index": np.arange(case.batch, dtype=np.int32), "label": batch["label"], **still}
            self.steps = self.engine.train(self.state, itertools.repeat(draws), lambda step: False)
            return
        whole = self.engine.whole()
        self.batch, self.lr = jax.block_until_ready(whole.placement.shard_batch(batch)), np.float32(1e-3)
        lowered = whole.compiled.lower(self.state, self.batch, self.lr)
        self.program = lowered.compile()
        memory, cost = self.program.memory_analysis(), self.program.cost_analysis()
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        self.facts = {
            "flops": lowered.cost_analysis()["flops"],
            "bytes": cost["bytes accessed"],
            "peak_bytes": needed - memory.alias_size_in_bytes,
            "hlo": hlo_counts(self.program.as_text()),
        }

    def run(self, steps: int) -> None:
        """Take `steps` steps, in whole chunks; wait for the last."""
        if self.chunk > 1:
            for _ in range(-(-steps // self.chunk) * self.chunk):
                _, metrics = next(self.steps)
            loss = metrics["loss"]
        else:
            for _ in range(steps):
                output = self.program(self.state, self.batch, self.lr)
                self.state, loss = output.state, output.loss
        if not np.isfinite(float(loss)):  # waits for the device
            raise FloatingPointError("the loss is not finite")


class TorchCandidate:
    """PyTorch's step in bfloat16 autocast with fused Adam; `mode` goes to torch.compile, None is eager."""

    def __init__(self, case: Case, mode: str | None) -> None:
        import torch

        import torch_oracle

        torch.backends.cudnn.benchmark = True
        torch.manual_seed(0)
        self.torch, self.gpu = torch, torch.cuda.is_available()
        device = "cuda" if self.gpu else "cpu"
        model = torch_oracle.MODELS[case.model](case.classes, 3, **case.options).train()
        model.to(device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        self.model = torch.compile(model, mode=mode) if mode else model
        batch = made_batch(case)
        image = torch.from_numpy((batch["image"] / 255 - 0.5) / 0.25).float().permute(0, 3, 1, 2)
        self.image = image.to(device, memory_format=torch.channels_last)
        self.label, self.device, self.mode = torch.from_numpy(batch["label"]).long().to(device), device, mode

    @property
    def facts(self) -> dict[str, Any]:
        """Return the peak memory, CUDA graphs included."""
        return {"peak_bytes": self.torch.cuda.max_memory_reserved() if self.gpu else None}

    def run(self, steps: int) -> None:
        """Take `steps` steps; wait for the last."""
        torch = self.torch
        for _ in range(steps):
            if self.mode:
                torch.compiler.cudagraph_mark_step_begin()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(self.model(self.image), self.label)
            loss.backward()
            self.optimizer.step()
        if not np.isfinite(loss.item()):  # waits for the device
            raise FloatingPointError("the loss is not finite")


def make(name: str, case: Case) -> Candidate:
    """Return the candidate with this name."""
    if name in JAX_FORMS:
        return JaxCandidate(case, *JAX_FORMS[name])
    return TorchCandidate(case, None if name == EAGER else name.rpartition(" ")[2])


def hlo_counts(text: str) -> dict[str, int]:
    """Count the relevant operations in an optimized program, inside fusions too."""
    counts: Counter[str] = Counter()
    for line in text.splitlines():
        match = re.search(r" = .*?\s([a-z][a-z0-9-]*)\(", line)
        if match:
            operation = match[1]
            if target := re.search(r'custom_call_target="([^"]*)"', line):
                operation = target[1]
            counts[operation] += 1
    groups = {
        "convolutions": ("convolution", "__cudnn$conv"),
        "products": ("dot", "__cublas", "__triton"),
        "fusions": ("fusion",),
        "transposes": ("transpose",),
        "copies": ("copy",),
    }
    return {
        group: sum(
            n for name, n in counts.items() if name == starts[0] or name.startswith(starts[1:] or "\0")
        )
        for group, starts in groups.items()
    }


def check(case: Case) -> dict[str, Any]:
    """Check the engine's float32 against PyTorch's from the same weights, and its bfloat16 against float32.

    Raises:
        AssertionError: a difference exceeds its limit.
    """
    import jax
    import torch

    import torch_oracle

    batch = made_batch(case)
    errors: dict[str, Any] = {}
    engines = {kind: jax_engine(case, "adam", kind) for kind in ("float32", TENSORS)}
    tree = engines["float32"].to_tree(engines["float32"].init())
    network = torch_oracle.MODELS[case.model](case.classes, 3, **case.options)
    torch_oracle.load_state_dict(network, {**tree["params"], **tree["batch_stats"]})
    image = torch.from_numpy((batch["image"] / 255 - 0.5) / 0.25).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = network.train()(image).numpy()
    metrics = {}
    for kind, engine in engines.items():
        with jax.default_matmul_precision("highest" if kind == "float32" else "default"):
            ((_, latest),) = engine.train(engine.from_tree(tree), [batch])
            metrics[kind] = {name: np.asarray(value) for name, value in latest.items()}
    scale = np.abs(expected).max()
    errors["float32 logits"] = float(np.abs(metrics["float32"]["logits"] - expected).max() / scale), 1e-3
    errors[f"{TENSORS} logits"] = float(np.abs(metrics[TENSORS]["logits"] - expected).max() / scale), 0.1
    for name, limit in (("loss", 0.02), ("grad_norm", 0.1)):
        one, other = float(metrics["float32"][name]), float(metrics[TENSORS][name])
        errors[f"{TENSORS} {name}"] = abs(other - one) / abs(one), limit
    for name, (error, limit) in errors.items():
        print(f"check {case.model}: {name} off by {error:.1e}, of {limit:g} allowed", flush=True)
        assert error <= limit, f"{name} is off by {error}"
    return {name: error for name, (error, _) in errors.items()}


def serve(pipe: Connection, name: str, case: Case) -> None:
    """Run a candidate's process: prepare, then take as many steps as each message asks for and send the
    seconds. A string is sent in place of seconds if it fails."""
    try:
        begun = time.perf_counter()
        candidate = make(name, case)
        candidate.run(3)
        pipe.send(time.perf_counter() - begun)
        while steps := pipe.recv():
            begun = time.perf_counter()
            candidate.run(steps)
            pipe.send(time.perf_counter() - begun)
        pipe.send(candidate.facts)
    except Exception as error:  # out of memory has many names
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def contest(case: Case, names: Sequence[str], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Return a row for each candidate: median images/s, seconds of preparation, facts."""
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    running: list[tuple[dict[str, Any], Any, Connection]] = []

    def ask(row: dict[str, Any], pipe: Connection) -> Any:
        try:
            answer = pipe.recv()
        except EOFError:
            answer = "ended"
        if isinstance(answer, str):
            row["failed"] = answer
            print(f"{row['model']} {row['batch']} {row['name']}: {answer}", file=sys.stderr, flush=True)
        return answer

    for name in names:
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, name, case))
        process.start()
        there.close()
        row = {"name": name, **dataclasses.asdict(case), "seconds": []}
        rows.append(row)
        row["ready_seconds"] = ask(row, here)
        running.append((row, process, here))
    for _ in range(rounds):
        for row, _, pipe in running:
            if "failed" not in row:
                pipe.send(steps)
                row["seconds"].append(ask(row, pipe))
    for row, process, pipe in running:
        if "failed" not in row:
            pipe.send(0)
            facts = ask(row, pipe)
            row |= facts if "failed" not in row else {}
            taken = -(-steps // 10) * 10 if row["name"].endswith("a call") else steps
            row["images_per_second"] = case.batch * taken / statistics.median(row["seconds"])
        process.join()
    return rows


def table(rows: list[dict[str, Any]], bandwidth: float | None) -> str:
    """Format the rows as text; ratios are to PyTorch's fastest form for the same network and batch."""
    lines = [f"{'':>20} {'':24} {'images/s':>9} {'ratio':>6} {'TFLOP/s':>8} {'roofline':>8} {'GB':>6}"]
    for row in rows:
        title = f"{row['model']} {row['batch']}@{row['size']}"
        if "failed" in row:
            lines.append(f"{title:>20} {row['name']:24} failed: {row['failed'][:60]}")
            continue
        same = [r for r in rows if (r["model"], r["batch"]) == (row["model"], row["batch"])]
        torch = [r["images_per_second"] for r in same if "torch" in r["name"] and "failed" not in r]
        speed = row["images_per_second"]
        ratio = f"{speed / max(torch):6.2f}" if torch else f"{'-':>6}"
        flops = next((r["flops"] for r in same if r.get("flops")), 0) * speed / row["batch"] / 1e12
        share = f"{'-':>8}"
        if bandwidth and row.get("bytes"):
            share = f"{row['bytes'] * speed / row['batch'] / bandwidth:8.2f}"
        size = f"{row['peak_bytes'] / 1e9:6.1f}" if row.get("peak_bytes") else f"{'-':>6}"
        lines.append(f"{title:>20} {row['name']:24} {speed:9.0f} {ratio} {flops:8.2f} {share} {size}")
    for row in rows:
        if row.get("hlo"):
            counts = ", ".join(f"{count} {name}" for name, count in row["hlo"].items())
            lines.append(f"{row['model']} {row['batch']}@{row['size']}, {row['name']}: {counts}")
    return "\n".join(lines)


def device_name(gpu: bool) -> str:
    """Return the name of the GPU, or of the CPU."""
    if gpu:
        import torch

        return str(torch.cuda.get_device_name())
    return platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    import torch

    parser = argparse.ArgumentParser(description="ResNets on one NVIDIA GPU, JAX against PyTorch")
    parser.add_argument("--parts", nargs="+", choices=["check", *PARTS], default=["check", *PARTS])
    parser.add_argument("--batch", nargs="+", type=int, help="only cases of these batches")
    parser.add_argument("--compile", nargs="*", default=["reduce-overhead"], help="modes of torch.compile")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--tiny", action="store_true", help="thin networks, one short round, without compile")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    options = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    if not gpu and not options.tiny:
        parser.error("--tiny: PyTorch finds no NVIDIA GPU; with this flag the script runs on the CPU")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others need memory too
    rounds, steps = (1, 2) if options.tiny else (options.rounds, options.steps)
    names = [*JAX_FORMS, EAGER]
    if not options.tiny:
        names += [f"torch, compiled {mode}" for mode in options.compile]
    device = device_name(gpu)
    packages = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")
    result: dict[str, Any] = {
        "device": device,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rows": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    bandwidth = next((value for name, value in BANDWIDTH.items() if name in device), None)
    for part in options.parts:
        if part == "check":
            case = dataclasses.replace((TINY if options.tiny else PARTS)["resnet50"][0], batch=8, size=64)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                result["check"] = pool.apply(check, (case,))
        else:
            for case in (TINY if options.tiny else PARTS)[part]:
                if not options.batch or case.batch in options.batch:
                    result["rows"] += contest(case, names, rounds, steps)
        (options.out / "gpu.json").write_text(json.dumps(result, indent=1))
    print(f"{device}; " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    print(table(result["rows"], bandwidth))
    return 1 if any("failed" in row for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
