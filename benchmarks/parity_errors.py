"""Differences between NumPy, JAX and PyTorch in ResNet-101: the tables of docs/parity.md.

python -m benchmarks.parity_errors
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.parity import cases, dump
from tests.parity.case import Case, make_inputs
from tests.parity.compare import REFERENCES, errors, mean_ratios, ratios
from tests.parity.engines import run_all

ENGINES = ["numpy", "jax", *REFERENCES]
PARTS = {  # columns of the tables
    "logits": "logits",
    "input gradient": "dx",
    "worst parameter gradient": "grad.",
    "worst running statistic": "after.",
}


def worst(error_by_tensor: Mapping[str, float], prefix: str) -> str:
    """Return the largest error among the tensors with this name or prefix, and the tensor's name."""
    name = max(
        (name for name in error_by_tensor if name.startswith(prefix)), key=lambda name: error_by_tensor[name]
    )
    return f"{error_by_tensor[name]:.1e}" + (f" (`{name.removeprefix(prefix)}`)" if name != prefix else "")


def row(title: str, cells: Iterable[str]) -> str:
    """Format a Markdown table row."""
    return f"| {title} | {' | '.join(cells)} |"


def heading(title: str) -> str:
    """Format a table heading."""
    return row(title, PARTS) + "\n" + "| --- " * (1 + len(PARTS)) + "|"


def float64(case: Case) -> None:
    """Print the errors of each pair of engines."""
    results = run_all(case, make_inputs(case), ENGINES)
    print(heading("float64: pair"))
    for left, right in itertools.combinations(ENGINES, 2):
        differences = errors(results[left], results[right])
        print(row(f"{left} - {right}", (worst(differences, prefix) for prefix in PARTS.values())))


def float32(case: Case, seeds: range) -> None:
    """Print each engine's error against the float64 reference: per tensor, the largest over the seeds."""
    largest: dict[str, dict[str, float]] = {engine: {} for engine in ENGINES}
    error_by_engine: dict[str, list[dict[str, float]]] = {"numpy": [], "jax": []}
    for seed in seeds:
        float32_case = replace(case, precision="float32", seed=seed)
        results = run_all(float32_case, make_inputs(float32_case), [*ENGINES, "truth"])
        for engine in ENGINES:
            for name, error in errors(results[engine], results["truth"]).items():
                largest[engine][name] = max(error, largest[engine].get(name, 0.0))
        for engine, seeds_errors in error_by_engine.items():
            seeds_errors.append(ratios(results, engine))
    print(f"\n{heading(f'float32, the worst of {len(seeds)} seeds')}")
    for engine in ENGINES:
        print(row(engine, (worst(largest[engine], prefix) for prefix in PARTS.values())))
    print("\n| error / PyTorch's own | geometric mean over all tensors | worst tensor |\n| --- | --- | --- |")
    for engine, seeds_errors in error_by_engine.items():
        means = mean_ratios(seeds_errors)
        name = max(means, key=lambda name: means[name])
        print(
            f"| {engine} | {statistics.geometric_mean(means.values()):.2f} | {means[name]:.1f} (`{name}`) |"
        )


def main() -> None:
    """Run the command line."""
    table = {case.name: case for case in [*cases.FULL, *cases.NETWORKS]}
    parser = argparse.ArgumentParser(description="errors of each pair of engines in one network")
    parser.add_argument("--case", choices=table, default="resnet101", help="one of tests/parity/cases.py")
    parser.add_argument("--seeds", type=int, default=5, help="in float32")
    options = parser.parse_args()
    case = table[options.case]
    print(f"{case.name}, input {list(case.shape)}, {'train' if case.train else 'evaluation'} mode")
    print(", ".join(f"{name} {version}" for name, version in dump.versions().items()), end="\n\n")
    float64(case)
    float32(case, range(options.seeds))


if __name__ == "__main__":
    main()
