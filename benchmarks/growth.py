"""Draw how the time of a training step grows with the batch, the image's side and the depth: docs/growth.png.

    python -m benchmarks.growth --threads 2

Measured, stored and continued as in `benchmarks.every_network`. The dashed line is the time that the step's
FLOPs take at the machine's peak, the rate of a large float32 product. It is in proportion to the FLOPs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.every_network import OUT, measure_cases, measure_peak, medians
from benchmarks.results_file import ROOT, Record, Results, conditions
from benchmarks.training_step import Case
from numpy_ref.cores import core_count

FIGURE = ROOT / "docs" / "growth.png"
MODEL, BATCH, SIDE = "resnet20", 32, 32
BATCHES, SIDES, DEPTHS = (8, 16, 32, 64, 128, 256), (16, 24, 32, 48, 64), (8, 20, 32, 56, 110)

PANELS: dict[str, dict[int, Case]] = {
    "batch size": {batch: Case(MODEL, batch, (SIDE, SIDE, 3)) for batch in BATCHES},
    "side of the image": {side: Case(MODEL, BATCH, (side, side, 3)) for side in SIDES},
    "layers": {depth: Case(f"resnet{depth}", BATCH, (SIDE, SIDE, 3)) for depth in DEPTHS},
}
TITLES = (
    f"ResNet-20, {SIDE}x{SIDE}",
    f"ResNet-20, batch {BATCH}",
    f"batch {BATCH}, {SIDE}x{SIDE}",
)


def draw(records: dict[str, Record], peak: Record, path: Path) -> None:
    """Draw a panel for each quantity. `records` are by the names of the cases."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    from experiment.report.style import BLUE, DOCUMENT_WIDTH, FAINT, GREEN, ORANGE, save_document, style

    lines = (
        ("numpy", "NumPy", BLUE, "o-"),
        ("jax", "JAX", ORANGE, "s-"),
        ("torch", "PyTorch, its fastest eager form", GREEN, "^-"),
    )
    best = 1e9 * max(peak["gflops"].values())
    where = peak["conditions"]
    with style():
        figure = Figure(figsize=(DOCUMENT_WIDTH, 3.5), layout="constrained")
        panels: Sequence[Any] = figure.subplots(1, len(PANELS), sharey=True)
        for axes, title, (quantity, cases) in zip(panels, TITLES, PANELS.items(), strict=True):
            of_panel = [records[str(case)] for case in cases.values()]
            for name, label, color, form in lines:
                seconds = [medians(record)[name] for record in of_panel]
                axes.plot(list(cases), seconds, form, color=color, ms=4, label=label)
            ideal = [record["flops"] / best for record in of_panel]
            axes.plot(list(cases), ideal, "--", color=FAINT, label=f"FLOPs at {best / 1e9:.0f} GFLOP/s")
            axes.set(xscale="log", yscale="log", xlabel=quantity)
            axes.set_title(title, fontsize=9)
            axes.xaxis.set_major_locator(FixedLocator(list(cases)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(ScalarFormatter())
        panels[0].set_ylabel("seconds a training step")
        handles, labels = panels[0].get_legend_handles_labels()
        machine = f"{where['cpu']}, {where['threads']} threads, commit {where['commit']}"
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), title=machine)
        save_document(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description="draw how a step's time grows"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=core_count())
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, read and continued")
    options = parser.parse_args(argv)
    results, where = Results(options.out), conditions(options.threads)
    cases = list({str(case): case for cases in PANELS.values() for case in cases.values()}.values())
    try:
        peak = measure_peak(results, where, options.rounds)
        measure_cases(cases, [False], results, where, options.rounds)
    except KeyboardInterrupt:
        print(f"stopped; the same command continues from {options.out}", file=sys.stderr)
        return 130
    records = {str(case): results.find(str(case), "training", where) for case in cases}
    draw({name: record for name, record in records.items() if record is not None}, peak, FIGURE)
    print(f"drawn: {FIGURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
