"""Time convolutions by themselves: the NumPy engine's forms against each other and against PyTorch.

    python -m benchmarks.convolution micro      # 1,000 backward passes of a tiny convolution
    python -m benchmarks.convolution layers     # every convolution of ResNet-101, forward and backward
    python -m benchmarks.convolution loops      # a pass of ResNet-101 by loops, extrapolated from its layers

Contestants take turns in one process; medians are printed. PyTorch, in `micro` alone (the threads of two
libraries in one process would stand in each other's way), runs with --threads threads, NumPy's matrix
products with those it began with (OMP_NUM_THREADS).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from numpy_ref import fast, layers, resnet101

Call = Callable[[], object]
Shape = tuple[int, int, int, int]


def interleaved(calls: Mapping[str, Call], rounds: int, repeats: int = 1) -> dict[str, float]:
    """The median over `rounds` of the seconds that `repeats` calls of each take."""
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
    """Backward on the state that one forward kept, input gradient included."""
    dy = np.ones_like(layer.forward(x, True))

    def call() -> object:
        layer.weight.zero_grad()
        if layer.bias is not None:
            layer.bias.zero_grad()
        return layer.backward(dy)

    return call


def torch_backward(layer: layers.Conv2d, x: np.ndarray) -> Call:
    """The same in PyTorch."""
    i, o = layer.weight.value.shape[2:]
    conv = torch.nn.Conv2d(i, o, layer.kernel, layer.stride, layer.padding, bias=layer.bias is not None)
    tensor = torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)), requires_grad=True)
    y = conv(tensor)
    dy, inputs = torch.ones_like(y), [tensor, *conv.parameters()]
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def micro(rounds: int) -> None:
    """Channels 4 to 2, pictures of 3x5, kernel 3, stride 1, padding 3, batch 8: 1,000 backward passes."""
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
    """Every convolution of ResNet-101, with the shape of its input."""
    model = resnet101(10, channels, rng=np.random.default_rng(0))
    model.forward(np.zeros((batch, size, size, channels), np.float32))
    for name, layer in named(model):
        if isinstance(layer, layers.Conv2d):
            yield name, layer, layer.kept[1].shape


def named(layer: layers.Layer, prefix: str = "") -> Iterator[tuple[str, layers.Layer]]:
    """All layers with their names."""
    for name, part in layer.parts():
        yield prefix + name, part
        yield from named(part, f"{prefix}{name}.")


def every_layer(rounds: int, size: int, channels: int, batch: int) -> None:
    """Forward and backward of each kind of convolution, in the plain form and in the fast one; the sums."""
    kinds: dict[tuple[object, ...], list[tuple[str, layers.Conv2d, Shape]]] = {}
    for name, layer, shape in convolutions(size, channels, batch):
        kinds.setdefault((shape, layer.weight.value.shape, layer.stride), []).append((name, layer, shape))
    total = {"plain": 0.0, "fast": 0.0}
    print(
        f"  {'first of its kind':22} {'kernel':18} {'times':>5} {'plain ms':>9} {'fast ms':>9} {'ratio':>6}"
    )
    for group in kinds.values():
        name, layer, shape = group[0]
        i, o = layer.weight.value.shape[2:]
        plain = layers.Conv2d(i, o, layer.kernel, stride=layer.stride, padding=layer.padding, rng=None)
        x = np.random.default_rng(0).standard_normal(shape, np.float32)

        def both(each: layers.Conv2d, x: np.ndarray = x) -> Call:
            backward = numpy_backward(each, x)
            return lambda: (each.forward(x, True), backward())

        each = interleaved({"plain": both(plain), "fast": both(layer)}, rounds)
        for form in total:
            total[form] += len(group) * each[form]
        kernel = "x".join(map(str, layer.weight.value.shape))
        print(
            f"  {name:22} {kernel:18} {len(group):5} {1e3 * each['plain']:9.2f} {1e3 * each['fast']:9.2f} "
            f"{each['fast'] / each['plain']:6.2f}"
        )
    ratio = total["fast"] / total["plain"]
    print(f"  all convolutions: plain {total['plain']:.3f} s, fast {total['fast']:.3f} s, ratio {ratio:.2f}")


def loops(size: int, channels: int, batch: int) -> None:
    """Each kind of convolution once by loops, on one picture; the rest of the network is left out of both."""
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
            for name, each, pictures in (("loops", slow, x), ("matrix", layer, many)):
                each.backward(np.ones_like(each.forward(pictures, True)))
                begun = time.perf_counter()
                each.backward(np.ones_like(each.forward(pictures, True)))
                timed[kind][name] = (time.perf_counter() - begun) / len(pictures)
        for name in seconds:
            seconds[name] += timed[kind][name]
    for name, value in seconds.items():
        print(f"  {name:8} {value:9.4f} s a picture, forward and backward, all convolutions of ResNet-101")
    print(f"  loops / matrix: {seconds['loops'] / seconds['matrix']:.0f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="time convolutions in NumPy and PyTorch")
    parser.add_argument("what", choices=["micro", "layers", "loops"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.what}, {args.threads} threads, median of {args.rounds} interleaved rounds")
    match args.what:
        case "micro":
            micro(args.rounds)
        case "layers":
            every_layer(args.rounds, args.size, args.channels, args.batch)
        case "loops":
            loops(args.size, args.channels, args.batch)


if __name__ == "__main__":
    main()
