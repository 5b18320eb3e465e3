"""Draw time against memory of the JAX engine's flags, beside NumPy and PyTorch: docs/memory.png.

    python -m benchmarks.memory
    python -m benchmarks.memory --model resnet101 --size 16@96x96x3

Each is a process with the same number of threads. Time: a training step with Adam, medians of interleaved
rounds. Memory: the peak of the process and its children, less its memory after imports, so with parameters,
gradients and the optimizer's state. The compilation's own memory counts too where it is the peak.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_file import ROOT
from benchmarks.training_step import ENGINES, Case, case_step, measure, parse_size, torch_forms
from numpy_ref.cores import core_count

FIGURE = ROOT / "docs" / "memory.png"
DEFAULT = ("jax", "jax --remat", "numpy")
CASES = (
    Case("resnet20", 128, (32, 32, 3)),
    Case("resnet50", 8, (96, 96, 3)),
    Case("resnet101", 32, (32, 32, 1)),
    Case("resnet101", 8, (96, 96, 3)),
    Case("resnet101", 4, (224, 224, 3)),
)
Point = tuple[float, float]  # seconds, bytes


def measure_points(case: Case, names: Sequence[str], threads: int, rounds: int) -> dict[str, Point]:
    """Return seconds and bytes by name; "PyTorch" is the fastest of its eager forms."""
    forms = torch_forms(inference=False)
    seconds, sizes = measure([*names, *forms], case_step, threads, rounds, case, False)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = min(forms, key=medians.__getitem__)
    points = {name: (medians[name], float(sizes[name])) for name in names}
    return {**points, "PyTorch": (medians[fastest], float(sizes[fastest]))}


def print_table(case: str, points: dict[str, Point]) -> None:
    """Print a row for each candidate, as ratios to PyTorch."""
    seconds, size = points["PyTorch"]
    print(f"\n{case}\n\n| | MB | of PyTorch | s a step | of PyTorch |\n| --- | --- | --- | --- | --- |")
    for name, (own, memory) in points.items():
        print(f"| {name} | {memory / 1e6:.0f} | {memory / size:.2f} | {own:.3f} | {own / seconds:.2f} |")


def draw(results: dict[str, dict[str, Point]], path: Path) -> None:
    """Draw a panel for each case."""
    from matplotlib.figure import Figure

    from experiment.report.style import BLUE, DOCUMENT_WIDTH, GREEN, ORANGE, save_document, style

    with style():
        figure = Figure(figsize=(DOCUMENT_WIDTH, 2.4 * -(-len(results) // 3)), layout="constrained")
        panels: Any = list(figure.subplots(-(-len(results) // 3), 3, squeeze=False).flat)
        for axes, (case, points) in zip(panels, results.items(), strict=False):
            seconds, size = points["PyTorch"]
            for name, (own, memory) in points.items():
                color = GREEN if name == "PyTorch" else BLUE if name == "numpy" else ORANGE
                axes.plot(memory / size, own / seconds, "o", color=color, ms=5)
                label = "NumPy" if name == "numpy" else "JAX" if name == "jax" else name.removeprefix("jax ")
                axes.annotate(
                    label, (memory / size, own / seconds), (4, 4), textcoords="offset points", fontsize=7
                )
            axes.axvline(1, color=GREEN, lw=0.6, ls="--")
            axes.set(xlabel="memory / PyTorch's", ylabel="time / PyTorch's")
            axes.margins(0.25)
            axes.set_title(case, fontsize=9)
        for axes in panels[len(results) :]:
            axes.set_visible(False)
        save_document(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="time against memory of the JAX engine's flags"
    )
    parser.add_argument("--model", help="with --size: this network alone; nothing is drawn")
    parser.add_argument("--size", default="8@96x96x3", help="BATCH@HxWxC")
    parser.add_argument("--engine", nargs="+", choices=list(ENGINES), default=list(DEFAULT))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=core_count())
    args = parser.parse_args(argv)
    cases = [Case(args.model, *parse_size(args.size))] if args.model else CASES
    results = {}
    for case in cases:
        results[str(case)] = measure_points(case, args.engine, args.threads, args.rounds)
        print_table(str(case), results[str(case)])
    if not args.model:
        draw(results, FIGURE)
        print(f"drawn: {FIGURE}")


if __name__ == "__main__":
    main()
