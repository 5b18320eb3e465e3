"""Time every network on this CPU in NumPy, JAX and PyTorch, training and inference, and make the table of it.

    python -m benchmarks.every_network --threads 2      # measure; nothing else should run
    python -m benchmarks.every_network --only resnet20 resnet101 --rounds 5
    python -m benchmarks.every_network --table          # write the table into benchmarks/RESULTS.md

Each case is measured as in `benchmarks.training_step`. Every result is a line of the file --out, with the
machine, the versions, the thread count and the commit. After Ctrl-C the same command continues: what the file
has under the same conditions is not measured again.

FLOPs are counted from shapes: convolutions and the linear layer, 2 for a multiplication with its addition. A
training step is forward, the gradients of all inputs but the images, and the gradients of all weights.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results_file import ROOT, Record, Results, conditions
from benchmarks.training_step import COMPILED, Case, Step, case_step, measure, torch_forms
from numpy_ref.cores import core_count

OUT, DOCUMENT = Path("runs/every_network.jsonl"), ROOT / "benchmarks" / "RESULTS.md"
BEGIN, END = "<!-- every_network: begin -->", "<!-- every_network: end -->"

CASES = [
    *(Case(f"resnet{depth}", 128, (32, 32, 3)) for depth in (8, 20, 32, 56, 110)),
    Case("resnet8", 32, (32, 32, 1)),
    Case("resnet18", 64, (32, 32, 3), {"small_images": True}),
    *(
        Case(f"resnet{depth}", batch, shape)
        for depth in (18, 34, 50, 101, 152)
        for batch, shape in ((32, (32, 32, 1)), (8, (96, 96, 3)), (4, (224, 224, 3)))
    ),
    Case("cnn", 64, (32, 32, 1)),
]
COMPILED_CASES = [
    Case("resnet20", 128, (32, 32, 3)),
    Case("resnet101", 32, (32, 32, 1)),
    Case("resnet101", 8, (96, 96, 3)),
]
TASKS = {False: "training", True: "inference"}
LIBRARIES = {"numpy": "NumPy", "jax": "JAX", "torch": "PyTorch"}
PRODUCT, SIDE = "product", 4096


def flops(case: Case, inference: bool) -> int:
    """Count the FLOPs of convolutions and linear layers in a step, without computing one."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from torch_oracle.resnet import MODELS

    height, width, channels = case.shape
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        logits = MODELS[case.model](10, channels, **case.options)(
            torch.empty(case.batch, channels, height, width)
        )
        if not inference:
            logits.sum().backward()
    return int(counter.get_total_flops())


def product_step(name: str, side: int) -> Step:
    """Return a function that multiplies two square float32 matrices in NumPy, JAX or PyTorch."""
    a, b = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
    if name == "numpy":
        return lambda: a @ b
    if name == "jax":
        import jax

        product, x, y = jax.jit(jax.numpy.matmul), jax.device_put(a), jax.device_put(b)
        return lambda: product(x, y).block_until_ready()
    import torch

    u, v = torch.from_numpy(a), torch.from_numpy(b)
    return lambda: u @ v


def measure_peak(results: Results, where: dict[str, Any], rounds: int) -> Record:
    """Return the GFLOP/s of a large product in each library, measured unless the file has it."""
    record = results.find(PRODUCT, PRODUCT, where)
    if record is None:
        seconds, _ = measure(list(LIBRARIES), product_step, where["threads"], rounds, SIDE)
        gflops = {name: 2e-9 * SIDE**3 / min(values) for name, values in seconds.items()}
        record = {"case": PRODUCT, "task": PRODUCT, "conditions": where, "side": SIDE, "gflops": gflops}
        results.add(record)
    rates = ", ".join(f"{LIBRARIES[name]} {rate:.0f}" for name, rate in record["gflops"].items())
    print(f"float32 product of side {record['side']}, GFLOP/s: {rates}", flush=True)
    return record


def has_compiler() -> bool:
    """Return True if torch.compile finds a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


def measure_case(
    case: Case, inference: bool, results: Results, where: dict[str, Any], rounds: int
) -> tuple[Record, bool]:
    """Return the result of a case, and True if the file had it, from as many rounds or more."""
    known = results.find(str(case), TASKS[inference], where)
    if known is not None and known["rounds"] >= rounds:
        return known, True
    names = ["numpy", "jax", *torch_forms(inference)]
    if case in COMPILED_CASES and has_compiler():
        names.append(COMPILED)
    seconds, sizes = measure(names, case_step, where["threads"], rounds, case, inference)
    record = {
        "case": str(case),
        "task": TASKS[inference],
        "conditions": where,
        "date": time.strftime("%Y-%m-%d"),
        "rounds": rounds,
        "flops": flops(case, inference),
        "seconds": seconds,
        "bytes": sizes,
    }
    results.add(record)
    return record, False


def measure_cases(
    cases: Sequence[Case], tasks: Sequence[bool], results: Results, where: dict[str, Any], rounds: int
) -> None:
    """Measure what the file lacks, and print a line for each case."""
    for inference in tasks:
        for number, case in enumerate(cases, 1):
            begun = time.monotonic()
            record, known = measure_case(case, inference, results, where, rounds)
            took = "from the file" if known else f"{time.monotonic() - begun:.0f} s"
            print(f"{number:2}/{len(cases)} {summary(case, record)}; {took}", flush=True)


def medians(record: Record) -> dict[str, float]:
    """Return the median seconds of NumPy ("numpy"), JAX ("jax"), PyTorch's fastest eager form ("torch") and
    the compiled one (COMPILED, if it was measured)."""
    every = {name: statistics.median(values) for name, values in record["seconds"].items()}
    chosen = {name: every[name] for name in ("numpy", "jax", COMPILED) if name in every}
    return {**chosen, "torch": every[fastest_form(record)]}


def fastest_form(record: Record) -> str:
    """Return the name of PyTorch's fastest eager form."""
    forms = [name for name in torch_forms(record["task"] == "inference") if name in record["seconds"]]
    return min(forms, key=lambda name: statistics.median(record["seconds"][name]))


def milliseconds(seconds: float) -> str:
    """Return seconds as milliseconds, with decimals where they are few."""
    return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1}f}"


def summary(case: Case, record: Record) -> str:
    """Return a case's medians as a line of text."""
    seconds = medians(record)
    ratios = ", ".join(
        f"{LIBRARIES.get(name, 'torch.compile')} {value / seconds['torch']:.2f}"
        for name, value in seconds.items()
        if name != "torch"
    )
    return (
        f"{case}, {record['task']}: {ratios} of {milliseconds(seconds['torch'])} ms ({fastest_form(record)})"
    )


HEADER = """\
| network | batch @ size | PyTorch, ms | NumPy / PyTorch | JAX / PyTorch | compiled / PyTorch \
| GFLOP/s: NumPy, JAX, PyTorch | of the peak | MB: NumPy, JAX, PyTorch | of PyTorch's |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def row(case: Case, record: Record, peak: float) -> str:
    """Return a case's row of the table. `peak` is in FLOP/s."""
    seconds = medians(record)
    ratios = {name: f"{value / seconds['torch']:.2f}" for name, value in seconds.items()}
    rates = [record["flops"] / seconds[name] for name in LIBRARIES]
    torch_bytes = record["bytes"][fastest_form(record)]
    sizes = [record["bytes"]["numpy"], record["bytes"]["jax"], torch_bytes]
    cells = [
        case.network,
        case.size,
        milliseconds(seconds["torch"]),
        ratios["numpy"],
        ratios["jax"],
        ratios.get(COMPILED, "no compiler" if case in COMPILED_CASES else ""),
        ", ".join(f"{rate / 1e9:.0f}" for rate in rates),
        ", ".join(f"{rate / peak:.2f}" for rate in rates),
        ", ".join(f"{size / 1e6:.0f}" for size in sizes),
        ", ".join(f"{size / torch_bytes:.2f}" for size in sizes[:2]),
    ]
    return f"| {' | '.join(cells)} |\n"


def facts(where: dict[str, Any], peak: Record) -> str:
    """Return the conditions and the peak as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    kernels = "; ".join(where["blas"]) or "unknown"
    rates = ", ".join(f"{LIBRARIES[name]} {rate:.0f}" for name, rate in peak["gflops"].items())
    best = max(peak["gflops"], key=peak["gflops"].__getitem__)
    threads = f"{where['threads']} thread{'s' * (where['threads'] > 1)}"
    lines = [
        f"- {where['cpu']}, {threads}. NumPy finds {', '.join(where['numpy_simd'])}; its matrix products: "
        f"{kernels}. PyTorch uses {where['torch_simd']}.",
        f"- Python {where['python']}, {versions}; commit {where['commit']}.",
        f"- A float32 product of side {peak['side']} reaches, in GFLOP/s: {rates}. The peak is "
        f"{LIBRARIES[best]}'s.",
    ]
    if where["environment"]:
        variables = ", ".join(f"`{name}={value}`" for name, value in sorted(where["environment"].items()))
        lines.append(f"- Environment: {variables}.")
    return "\n".join(lines) + "\n"


def table(results: Results, cases: Sequence[Case] = CASES) -> str:
    """Return the Markdown of all results that share the conditions of the newest one.

    Raises:
        ValueError: there is no result.
    """
    if not results.records:
        raise ValueError(f"{results.path} has no results")
    where = results.records[-1]["conditions"]
    peak = results.find(PRODUCT, PRODUCT, where)
    assert peak is not None  # it is measured before the first case
    text = facts(where, peak)
    for task in TASKS.values():
        named = [(case, results.find(str(case), task, where)) for case in cases]
        there = [(case, record) for case, record in named if record is not None]
        if there:
            rows = [row(case, record, 1e9 * max(peak["gflops"].values())) for case, record in there]
            text += (
                f"\n### {task.capitalize()}\n\n{count_wins([r for _, r in there])}\n\n{HEADER}{''.join(rows)}"
            )
    return text


def count_wins(records: Sequence[Record]) -> str:
    """Return sentences: rounds and dates, how often each engine is ahead, and PyTorch's fastest forms."""
    ahead = {
        name: sum(medians(record)[name] <= medians(record)["torch"] for record in records)
        for name in ("numpy", "jax")
    }
    forms = [fastest_form(record).removeprefix("torch ") for record in records]
    often = ", ".join(f"{form} ({forms.count(form)})" for form in sorted(set(forms), key=forms.count)[::-1])
    return (
        f"Medians of {span([record['rounds'] for record in records])} rounds, "
        f"{span([record['date'] for record in records])}. "
        f"Cases: {len(records)}. NumPy takes no longer than PyTorch in {ahead['numpy']}, "
        f"JAX in {ahead['jax']}. "
        f"PyTorch's fastest forms: {often}."
    )


def span(values: Sequence[Any]) -> str:
    """Return "least to greatest", or the value where all are equal."""
    return " to ".join(str(value) for value in sorted({min(values), max(values)}))


def replace_between(document: str, begin: str, end: str, text: str) -> str:
    """Return the document with `text` between the two marker comments.

    Raises:
        ValueError: a marker is not there exactly once, or they are in the wrong order.
    """
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(end) < document.index(begin):
        raise ValueError(f"the document needs {begin} and then {end}, once each")
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.every_network", description="time every network"
    )
    models = list(dict.fromkeys(case.model for case in CASES))
    parser.add_argument("--only", nargs="+", choices=models, default=models, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=core_count())
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, read and continued")
    parser.add_argument(
        "--table", action="store_true", help=f"measure nothing; write the table into {DOCUMENT.name}"
    )
    options = parser.parse_args(argv)
    results = Results(options.out)
    if options.table:
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(replace_between(text, BEGIN, END, table(results)), encoding="utf-8")
        return 0
    where = conditions(options.threads)
    try:
        measure_peak(results, where, options.rounds)
        cases = [case for case in CASES if case.model in options.only]
        measure_cases(cases, list(TASKS), results, where, options.rounds)
    except KeyboardInterrupt:
        print(f"stopped; the same command continues from {options.out}", file=sys.stderr)
        return 130
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
