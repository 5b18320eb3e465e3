"""Which faults does `--verify-every N` find, and what does it cost?

    python -m benchmarks.sentinel faults --seeds 5      # a thin ResNet-8, faults in one of its blocks
    python -m benchmarks.sentinel cost --rounds 3       # ResNet-20 and ResNet-101

`faults` prints two tables. A permanent fault is in every step from some step on; the other engine must find
it within N steps. Its size is the largest error of any tensor, in units of the noise that is measured.
A transient fault is in one computation of one step; it is found if that step is verified. The step is drawn
at random.

`cost` prints the seconds that one verified step costs: of the training process, and of the steps that are
slower while the other engine computes beside them, with the lowest priority. The start of the second process,
and what is compiled there, is left out.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiment.engines import ENGINES, load_engine, set_environment
from experiment.errors import WrongStepError
from experiment.files.checkpoints import Checkpoints
from experiment.options.resolving import resolve
from experiment.run.second_process import SecondProcess
from experiment.run.sentinel import Sentinel
from experiment.run.update_rule import UpdateRule
from experiment.run.verification import make_check
from experiment.run.verifier import Setup
from tests.helpers.faults import KINDS, Fault, VerifiedRun, injected
from tests.helpers.jax_engine import make_batches

BITS = {
    "weight": (4, 10, 14, 18, 22),
    "activation": (4, 10, 14, 18, 22),
    "gradient": (10, 18, 22, 24, 25),
    "moment": (4, 8, 12, 16, 20),
    "statistic": (2, 6, 10, 14, 18),
    "product": (2, 6, 10, 14, 18),
}
INTERVALS = (1, 10)
CASES = (("resnet20", 128, (32, 32, 3)), ("resnet101", 8, (96, 96, 3)))


def found(run: VerifiedRun, fault: Fault, every: int, seed: int) -> bool:
    """Train until the first verified step and a random number of steps more, then with a fault: found?

    A permanent fault has N steps to be found in, a transient one strikes the first step.
    """
    rng = np.random.default_rng(seed)
    run.restart(every)
    batches = make_batches(3 * every, seed=seed)
    begin = every + int(rng.integers(every))
    run.train(batches[:begin])
    with injected(run, fault):
        fault.active = True
        try:
            run.train(batches[begin : begin + every])
        except WrongStepError:
            return True
        finally:
            fault.active = False
    return False


def size_of(run: VerifiedRun) -> float:
    """The largest error of the last step that the other engine compared, in units of the noise.

    NaN if it was near enough for float32 to decide.
    """
    sizes = run.second.verdicts[-1].sizes.values()
    return max(sizes, default=float("nan"))


def print_faults(seeds: int) -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as folder:
        for framework in ENGINES:
            run = VerifiedRun(framework, Path(folder))
            print(f"\n{framework}: permanent faults, found within N steps (size in units of the noise)\n")
            print("| fault | relative size | " + heads() + " |")
            print("| --- " * (2 + len(INTERVALS)) + "|")
            for kind in KINDS:
                for bit in BITS[kind]:
                    print_row(run, kind, bit, seeds)
            print(f"\n{framework}: transient faults, found\n")
            print("| fault | relative size | " + heads() + " |")
            print("| --- " * (2 + len(INTERVALS)) + "|")
            for kind in KINDS:
                bit = BITS[kind][1]
                rates = [
                    sum(found(run, Fault(kind, bit, permanent=False), every, seed) for seed in range(seeds))
                    for every in INTERVALS
                ]
                cells = " | ".join(f"{rate} of {seeds}" for rate in rates)
                print(f"| {kind} | {relative(bit)} | {cells} |", flush=True)


def print_row(run: VerifiedRun, kind: str, bit: int, seeds: int) -> None:
    """Print the row of a permanent fault: how often it was found, and its median size."""
    cells = []
    for every in INTERVALS:
        count, sizes = 0, []
        for seed in range(seeds):
            count += found(run, Fault(kind, bit), every, seed)
            sizes.append(size_of(run))
        cells.append(f"{count} of {seeds} ({statistics.median(sizes):.2g})")
    print(f"| {kind} | {relative(bit)} | {' | '.join(cells)} |", flush=True)


def heads() -> str:
    """The heads of the columns for N."""
    return " | ".join(f"N = {every}" for every in INTERVALS)


def relative(bit: int) -> str:
    """How much a flipped bit changes a number, in words."""
    return f"2^{bit - 23}" if bit < 23 else f"exponent, bit {bit - 23}"


class Chosen(Sentinel):
    """A sentinel that verifies the steps in `chosen`."""

    chosen: frozenset[int] = frozenset()

    def is_due(self, step: int) -> bool:
        """True if a step is to be verified."""
        return step in self.chosen


def print_cost(framework: str, model: str, size: int, shape: tuple[int, int, int], rounds: int) -> None:
    """Print what one verified step costs."""
    arguments: dict[str, Any] = {
        "model": model,
        "model_options": {},
        "num_classes": 10,
        "image_shape": shape,
        "mean": (0.5,) * shape[2],
        "std": (0.5,) * shape[2],
        "optimizer": "adam",
        "optimizer_options": resolve({}).optimizer_options(),
    }
    (other,) = ENGINES.keys() - {framework}
    engine = load_engine(framework)(**arguments, learning_rate=lambda step: 1e-3)
    setup = Setup(
        framework,
        other,
        dict.fromkeys(ENGINES, arguments),
        UpdateRule("adam", arguments["optimizer_options"]),
    )
    second = SecondProcess(partial(make_check, setup))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), 1)
        sentinel = Chosen(engine, 1, second=second, second_name=other, checkpoints=checkpoints, report=fail)
        try:
            rows = list(itertools.islice(measure(engine, sentinel, second, size, shape), rounds + 1))[1:]
        finally:
            sentinel.close()
            checkpoints.close()
    step, here, beside, steps = (statistics.median(column) for column in zip(*rows, strict=True))
    share = (here + beside) / (100 * step)
    print(
        f"| {framework} | {model}, {size} @ {shape[0]}x{shape[1]} | {step:.2f} | {here:.2f} | {beside:.2f} | "
        f"{steps:.0f} | {share:.1%} |",
        flush=True,
    )


def fail(line: str) -> None:
    """Raise RuntimeError: the second process has failed."""
    raise RuntimeError(line)


def measure(
    engine: Any, sentinel: Chosen, second: SecondProcess, size: int, shape: tuple[int, int, int]
) -> Iterator[tuple[float, float, float, float]]:
    """Verify a step again and again; yield the seconds of a plain step, those of verifying in this process,
    those that the steps beside the other engine lose, and the number of these steps."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((size, *shape)).astype(np.float32)
    batches = itertools.repeat({"image": image, "label": (np.arange(size) % 10).astype(np.int32)})
    state, step = engine.init(), 0
    steps = engine.train(state, sentinel.watch(batches, 0))

    def take() -> tuple[Any, Any, float]:
        nonlocal step
        begun = time.perf_counter()
        state, metrics = next(steps)
        float(metrics["grad_norm"])
        step += 1
        return state, metrics, time.perf_counter() - begun

    for _ in range(3):
        state, _, _ = take()
    while True:
        plain = statistics.median(take()[2] for _ in range(5))
        state, _, _ = take()
        sentinel.chosen = frozenset({step + 1})
        begun = time.perf_counter()
        sentinel.before_next(step, state)
        here = time.perf_counter() - begun
        state, metrics, _ = take()
        begun = time.perf_counter()
        sentinel.after(step, state, metrics)
        sentinel.chosen = frozenset()
        sentinel.before_next(step, state)
        here += time.perf_counter() - begun
        beside = []
        while sentinel.counts.by_second < sentinel.counts.here:
            state, metrics, seconds = take()
            beside.append(seconds)
            sentinel.after(step, state, metrics)
        yield plain, here, max(sum(beside) - plain * len(beside), 0.0), float(len(beside))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sentinel", description=__doc__)
    parser.add_argument("what", choices=("faults", "cost"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=[case[0] for case in CASES])
    options = parser.parse_args(argv)
    if options.what == "faults":
        print_faults(options.seeds)
        return
    set_environment("jax", deterministic=False)  # the second process finds what was compiled before
    heads = ("engine", "case", "step, s", "here, s", "beside, s", "steps beside", "at N = 100")
    print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")
    for framework in ENGINES:
        for model, size, shape in CASES:
            if options.model in (None, model):
                print_cost(framework, model, size, shape, options.rounds)


if __name__ == "__main__":
    main()
