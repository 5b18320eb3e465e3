"""The matrix products of a training step alone: what a convolution by products can reach on this machine.

    python -m benchmarks.products --rounds 9

For ResNet-20 at 128 @ 32x32x3: every product that `numpy_ref/fast/row_products.py` makes, forward and
backward, on arrays of their shapes, with nothing between them; beside PyTorch's whole step, interleaved. An
engine that makes these products takes at least as long.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import numpy as np

from benchmarks.training_step import Case, Step, measure, torch_forms, torch_step

PRODUCTS = "products alone"
CASE = Case("resnet20", 128, (32, 32, 3))
Layer = tuple[int, int, int, int]  # channels in and out, side of the image and of the output


def layers() -> Iterator[Layer]:
    """Yield the 19 convolutions of ResNet-20, all 3x3."""
    yield 3, 16, 32, 32
    for channels, side in ((16, 32), (32, 16), (64, 8)):
        if channels > 16:
            yield channels // 2, channels, 2 * side, side
        for _ in range(6 if channels == 16 else 5):
            yield channels, channels, side, side


def flops() -> int:
    """Return the floating-point operations of all products; the first layer makes no dx."""
    return sum(2 * 9 * i * o * s * s * CASE.batch * (3 if i > 3 else 2) for i, o, _, s in layers())


def products_step() -> Step:
    """Return a function that makes the products of one step."""
    rng = np.random.default_rng(0)
    calls: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def array(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    for i, o, side, out in layers():
        pixels = out * CASE.batch  # of one row of the output
        images, douts = array(side, i, pixels), array(out, o, pixels)
        forward, dweight = np.empty((3 * o, pixels), np.float32), np.empty((3 * i, o), np.float32)
        dimage = np.empty((3 * i, pixels), np.float32)
        weight, transposed = array(3 * o, 3 * i), array(3 * i, 3 * o)
        for row in range(out):
            first = min(row * side // out, side - 3)
            rows = images[first : first + 3].reshape(3 * i, pixels)
            calls.append((weight, rows, forward))
            calls += [(rows, douts[row].T, dweight)] * 3  # one for each column of the kernel
            if i > 3:
                first = min(row, out - 3)
                calls.append((transposed, douts[first : first + 3].reshape(3 * o, pixels), dimage))

    def step() -> None:
        for left, right, product in calls:
            np.matmul(left, right, out=product)

    return step


def make(name: str) -> Step:
    """Return the function of a candidate."""
    return products_step() if name == PRODUCTS else torch_step(name, CASE, inference=False)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="time the matrix products of a step of ResNet-20 alone")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    forms = torch_forms(inference=False)
    seconds, _ = measure([PRODUCTS, *forms], make, args.threads, args.rounds)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    fastest = min(forms, key=median.__getitem__)
    print(f"{CASE}, {args.threads} threads, medians of {args.rounds} interleaved rounds")
    print(f"  {PRODUCTS}: {1e3 * median[PRODUCTS]:.0f} ms, {flops() / median[PRODUCTS] / 1e9:.0f} GFLOP/s")
    print(f"  whole step of {fastest}: {1e3 * median[fastest]:.0f} ms")
    print(f"  ratio: {median[PRODUCTS] / median[fastest]:.2f}")


if __name__ == "__main__":
    main()
