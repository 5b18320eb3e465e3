"""Time convolutions by themselves: the NumPy engine's forms against each other and against PyTorch.

    python -m benchmarks.convolution micro      # 1,000 backward passes of a tiny convolution
    python -m benchmarks.convolution layers     # every convolution of ResNet-101, forward and backward
    python -m benchmarks.convolution loops      # one ResNet-101 pass by loops, extrapolated from its layers

Rounds are interleaved; medians are printed. In `layers` each candidate runs in its own process with one
thread, as in the NumPy engine's training, where every process computes a part of the batch. In `micro` all
run in one process: PyTorch with --threads threads, NumPy's matrix products with OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch

from numpy_ref import fast, layers, resnet101

Call = Callable[[], object]
Shape = tuple[int, int, int, int]


def interleaved(calls: Mapping[str, Call], rounds: int, repeats: int = 1) -> dict[str, float]:
    """Return the median seconds of `repeats` calls of each candidate, over interleaved `rounds`."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.05)  # until the threads of the one before have stopped to wait for work
            call()
            begun = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def numpy_backward(layer: layers.Conv2d, x: np.ndarray) -> Call:
    """Return a function that runs NumPy's backward pass again and again after one forward pass."""
    dy = np.ones_like(layer.forward(x, True))

    def call() -> object:
        layer.weight.zero_grad()
        if layer.bias is not None:
            layer.bias.zero_grad()
        return layer.backward(dy)

    return call


def torch_backward(layer: layers.Conv2d, x: np.ndarray) -> Call:
    """Return the same function for PyTorch."""
    i, o = layer.weight.value.shape[2:]
    conv = torch.nn.Conv2d(i, o, layer.kernel, layer.stride, layer.padding, bias=layer.bias is not None)
    tensor = torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)), requires_grad=True)
    y = conv(tensor)
    dy, inputs = torch.ones_like(y), [tensor, *conv.parameters()]
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def micro(rounds: int) -> None:
    """Time 1,000 backward passes: 4 to 2 channels, 3x5 images, kernel 3, stride 1, padding 3, batch 8."""
    x = np.random.default_rng(0).standard_normal((8, 3, 5, 4), np.float32)

    def layer(make: type[layers.Conv2d]) -> layers.Conv2d:
        return make(4, 2, 3, stride=1, padding=3, bias=True, rng=np.random.default_rng(0))

    calls = {
        "torch": torch_backward(layer(fast.Conv2d), x),
        "numpy, fast": numpy_backward(layer(fast.Conv2d), x),
        "numpy, plain matrix": numpy_backward(layer(layers.Conv2d), x),
        "numpy, loops": numpy_backward(layer(layers.LoopConv2d), x),
    }
    seconds = interleaved(calls, rounds, 1000)
    for name, value in seconds.items():
        print(f"  {name:24} {value:8.3f} s   {value / seconds['torch']:7.2f} of PyTorch's")


def convolutions(size: int, channels: int, batch: int) -> Iterator[tuple[str, layers.Conv2d, Shape]]:
    """Return every convolution of ResNet-101 with its input shape."""
    model = resnet101(10, channels, rng=np.random.default_rng(0))
    model.forward(np.zeros((batch, size, size, channels), np.float32))
    for name, layer in named(model):
        if isinstance(layer, layers.Conv2d):
            yield name, layer, layer.saved[1].shape


def named(layer: layers.Layer, prefix: str = "") -> Iterator[tuple[str, layers.Layer]]:
    """Yield all layers with their names."""
    for name, part in layer.parts():
        yield prefix + name, part
        yield from named(part, f"{prefix}{name}.")


FORMS = ("plain", "fast", "torch NCHW", "torch channels_last")


@dataclass(frozen=True)
class Kind:
    """A convolution's hyperparameters and its input shape [N, H, W, I]."""

    shape: Shape
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


def both_ways(form: str, kind: Kind) -> Call:
    """Return a function that runs forward and backward, input gradient included."""
    x = np.random.default_rng(0).standard_normal(kind.shape, np.float32)
    channels = kind.shape[-1]
    if form.startswith("torch"):
        layout = torch.channels_last if form.endswith("last") else torch.contiguous_format
        conv = torch.nn.Conv2d(channels, kind.outputs, kind.kernel, kind.stride, kind.padding, bias=False)
        conv = conv.to(memory_format=layout)  # type: ignore[call-overload]
        tensor = torch.tensor(x.transpose(0, 3, 1, 2)).contiguous(memory_format=layout).requires_grad_()
        dy = torch.ones_like(conv(tensor))
        return lambda: torch.autograd.grad(conv(tensor), [tensor, *conv.parameters()], dy)
    make = fast.Conv2d if form == "fast" else layers.Conv2d
    layer = make(
        channels,
        kind.outputs,
        kind.kernel,
        stride=kind.stride,
        padding=kind.padding,
        rng=np.random.default_rng(0),
    )
    backward = numpy_backward(layer, x)
    return lambda: (layer.forward(x, True), backward())


def work(form: str, pipe: Connection) -> None:
    """Serve as a worker: for each kind received, send the seconds of one call, after one warm-up call."""
    torch.set_num_threads(1)
    before: Kind | None = None
    while (kind := pipe.recv()) is not None:
        if kind != before:
            before, call = kind, both_ways(form, kind)
        call()
        begun = time.perf_counter()
        call()
        pipe.send(time.perf_counter() - begun)


def every_layer(rounds: int, size: int, channels: int, batch: int) -> None:
    """Time forward and backward of each kind of convolution, each form in its own process with one thread;
    print the sums over the network."""
    kinds: dict[Kind, list[str]] = {}
    for name, layer, shape in convolutions(size, channels, batch):
        kind = Kind(shape, layer.weight.value.shape[-1], layer.kernel, layer.stride, layer.padding)
        kinds.setdefault(kind, []).append(name)
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for form in FORMS:
        pipes[form], theirs = spawn.Pipe()
        spawn.Process(target=work, args=(form, theirs), daemon=True).start()

    def ask(form: str, kind: Kind) -> float:
        pipes[form].send(kind)
        return float(pipes[form].recv())

    total = dict.fromkeys(FORMS, 0.0)
    best_total = 0.0
    print(
        f"  {'first of its kind':22} {'kernel':16} {'times':>5}",
        *(f"{form:>19}" for form in FORMS),
        "ms",
        end="",
    )
    print("   fast / best of PyTorch")
    for kind, names in kinds.items():
        seconds: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(rounds):
            for form in FORMS:
                seconds[form].append(ask(form, kind))
        median = {form: statistics.median(values) for form, values in seconds.items()}
        best = min(median[form] for form in FORMS if form.startswith("torch"))
        best_total += len(names) * best
        for form in FORMS:
            total[form] += len(names) * median[form]
        kernel = "x".join(map(str, (*kind.kernel, kind.shape[-1], kind.outputs)))
        print(f"  {names[0]:22} {kernel:16} {len(names):5}", end="")
        print(*(f"{1e3 * median[form]:20.2f}" for form in FORMS), f"{median['fast'] / best:24.2f}")
    print("  all convolutions, s:", ", ".join(f"{form} {value:.3f}" for form, value in total.items()), end="")
    print(f", best of PyTorch a layer {best_total:.3f}")
    fastest = min(total[form] for form in FORMS if form.startswith("torch"))
    print(f"  fast / PyTorch's better layout: {total['fast'] / fastest:.2f}")
    print(f"  fast / PyTorch's better layout of each layer: {total['fast'] / best_total:.2f}")
    print(f"  fast / plain: {total['fast'] / total['plain']:.2f}")
    for pipe in pipes.values():
        pipe.send(None)


def loops(size: int, channels: int, batch: int) -> None:
    """Time each kind of convolution by loops and by matrix products, on one image, without other layers."""
    seconds = {"loops": 0.0, "matrix": 0.0}
    timed: dict[tuple[object, ...], dict[str, float]] = {}
    for _, layer, shape in convolutions(size, channels, 1):
        kind = (shape, layer.weight.value.shape, layer.stride)
        if kind not in timed:
            i, o = layer.weight.value.shape[2:]
            slow = layers.LoopConv2d(
                i, o, layer.kernel, stride=layer.stride, padding=layer.padding, rng=np.random.default_rng(0)
            )
            x = np.random.default_rng(0).standard_normal(shape, np.float32)
            many = np.random.default_rng(0).standard_normal((batch, *shape[1:]), np.float32)
            timed[kind] = {"loops": 0.0, "matrix": 0.0}
            for name, form, images in (("loops", slow, x), ("matrix", layer, many)):
                form.backward(np.ones_like(form.forward(images, True)))
                begun = time.perf_counter()
                form.backward(np.ones_like(form.forward(images, True)))
                timed[kind][name] = (time.perf_counter() - begun) / len(images)
        for name in seconds:
            seconds[name] += timed[kind][name]
    for name, value in seconds.items():
        print(f"  {name:8} {value:9.4f} s an image, forward and backward, all convolutions of ResNet-101")
    print(f"  loops / matrix: {seconds['loops'] / seconds['matrix']:.0f}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="time convolutions in NumPy and PyTorch")
    parser.add_argument("what", choices=["micro", "layers", "loops"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    threads = 1 if args.what == "layers" else args.threads
    print(f"{args.what}, {threads} thread{'s' * (threads > 1)}, median of {args.rounds} interleaved rounds")
    match args.what:
        case "micro":
            micro(args.rounds)
        case "layers":
            every_layer(args.rounds, args.size, args.channels, args.batch)
        case "loops":
            loops(args.size, args.channels, args.batch)


if __name__ == "__main__":
    main()
