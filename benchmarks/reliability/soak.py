"""A long run of a small network, watched from outside: does anything grow that should stay level?

The run evaluates, saves and writes its TensorBoard files every `EVERY` steps, and a report is made of it ten
times while it goes on. Every half second memory, open files and threads of its processes are read from
/proc (Linux), and the step that it has reached. docs/soak.png shows them.

Level means: in the last quarter of the run the median of memory, and the least numbers of files and
threads, are at most `GROWTH` times those of the second quarter. During a save there are more of them, and a
pool of threads may start one late. The time of a step is only shown: it depends on the machine, too.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.reliability.elastic import ROOT, last_step
from benchmarks.training_step import memory

FIGURE = ROOT / "docs" / "soak.png"
FRAMEWORKS = ("numpy", "jax")
EVERY, REPORTS = 100, 10
FLAGS = ("--model", "cnn", "--batch-size", "32", "--eval-every", str(EVERY), "--checkpoint-every", str(EVERY))
SAMPLE_SECONDS = 0.5
GROWTH = 1.05


@dataclass(frozen=True)
class Sample:
    """What the processes of a run hold at one moment.

    Attributes:
        seconds: since the start of the run.
        step: of the last line in its metrics.jsonl.
        megabytes: of memory, without libraries; shared pages counted once.
        files, threads: their numbers, over all its processes.
    """

    seconds: float
    step: int
    megabytes: float
    files: int
    threads: int


def processes(pid: int) -> Iterator[int]:
    """The process, its children and theirs."""
    yield pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
        yield from processes(int(child))


def sample(pid: int, run_dir: Path, begun: float) -> Sample | None:
    """Read what the processes of a run hold; None if one of them has just ended."""
    try:
        every = [Path(f"/proc/{number}") for number in processes(pid)]
        files = sum(len(list((place / "fd").iterdir())) for place in every)
        threads = sum(len(list((place / "task").iterdir())) for place in every)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Sample(time.monotonic() - begun, last_step(run_dir), memory(pid) / 1e6, files, threads)


def watch(framework: str, steps: int, run_dir: Path) -> list[Sample]:
    """Run `python train.py` to its end, with reports meanwhile; return the samples while it takes steps.

    Raises RuntimeError if the run or a report fails.
    """
    name = ["--framework", framework, "--run-dir", str(run_dir)]
    command = [sys.executable, "train.py", *FLAGS, *name, "--steps", str(steps)]
    report = [sys.executable, "-m", "experiment", "report", str(run_dir)]
    samples: list[Sample] = []
    reports: list[subprocess.Popen[bytes]] = []
    with open(run_dir.with_suffix(".log"), "w+", encoding="utf-8") as log:
        begun = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                time.sleep(SAMPLE_SECONDS)
                latest = sample(process.pid, run_dir, begun)
                if latest is None or not 0 < latest.step < steps:
                    continue
                samples.append(latest)
                if latest.step * REPORTS >= steps * (len(reports) + 1):
                    reports.append(subprocess.Popen(report, cwd=ROOT, stdout=log, stderr=log))
            statuses = [one.wait() for one in (process, *reports)]
        finally:
            for one in (process, *reports):
                one.kill()
                one.wait()
        if any(statuses):
            raise RuntimeError(f"the run in {run_dir}, or a report of it, failed; see {log.name}")
    return samples


def quarter(samples: Sequence[Sample], number: int, steps: int) -> list[Sample]:
    """The samples of a quarter of a run's steps; the first has number 0."""
    return [s for s in samples if number * steps <= 4 * s.step < (number + 1) * steps]


def growth(samples: Sequence[Sample], steps: int) -> list[str]:
    """Return what grew from the second quarter of a run to the last; empty if nothing did."""
    before, after = quarter(samples, 1, steps), quarter(samples, 3, steps)
    if not before or not after:
        return ["too few samples"]
    found = []
    for name, measure in (("megabytes", median), ("files", min), ("threads", min)):
        old, new = (measure(getattr(s, name) for s in part) for part in (before, after))
        if new > GROWTH * old:
            found.append(f"{name} from {old:.0f} to {new:.0f}")
    return found


def step_times(samples: Sequence[Sample]) -> tuple[list[int], list[float]]:
    """Return steps, and milliseconds a step between them and the ones before, saves and evaluations included.

    Steps reach metrics.jsonl in groups; an interval is at least `EVERY` steps long.
    """
    steps, times = [], []
    last = samples[0]
    for s in samples:
        if s.step - last.step >= EVERY:
            steps.append(s.step)
            times.append(1e3 * (s.seconds - last.seconds) / (s.step - last.step))
            last = s
    return steps, times


def draw(runs: dict[str, list[Sample]], path: Path) -> None:
    """Draw memory, open files, threads and step time of each run against its steps."""
    from matplotlib.figure import Figure

    from experiment.report.style import BLUE, DOCUMENT_WIDTH, ORANGE, save_document, style

    titles = {"megabytes": "memory, MB", "files": "open files", "threads": "threads"}
    with style():
        figure = Figure(figsize=(DOCUMENT_WIDTH, 4.6), layout="constrained")
        panels = dict(zip([*titles, "time"], figure.subplots(2, 2, sharex=True).flat, strict=True))
        for (framework, samples), color in zip(runs.items(), (BLUE, ORANGE), strict=False):
            for name, axes in panels.items():
                steps, values = [s.step for s in samples], [getattr(s, name, 0) for s in samples]
                if name == "time":
                    steps, values = step_times(samples)
                axes.plot(steps, values, color=color, lw=1, label=framework)
        for name, axes in panels.items():
            axes.set_title(titles.get(name, "a step, ms, with evaluations, saves and reports"), fontsize=9)
            axes.set_ylim(bottom=0)
        for axes in (panels["threads"], panels["time"]):
            axes.set_xlabel("step")
        handles, labels = panels["files"].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        save_document(figure, path)


def run(steps: int, folder: Path, figure: Path = FIGURE) -> bool:
    """Watch a run of each engine and draw both; return False if something grew."""
    runs: dict[str, list[Sample]] = {}
    good = True
    print("| engine | quarter | memory, MB | open files | threads | ms a step |\n|" + " --- |" * 6)
    for framework in FRAMEWORKS:
        runs[framework] = samples = watch(framework, steps, folder / f"soak-{framework}")
        for number in range(4):
            part = quarter(samples, number, steps)
            if len(part) > 1:
                speed = 1e3 * (part[-1].seconds - part[0].seconds) / max(1, part[-1].step - part[0].step)
                held = median(s.megabytes for s in part)
                threads = f"{min(s.threads for s in part)} to {max(s.threads for s in part)}"
                files = f"{min(s.files for s in part)} to {max(s.files for s in part)}"
                columns = f"{held:.0f} | {files} | {threads} | {speed:.1f}"
                print(f"| {framework} | {number + 1} | {columns} |")
        grown = growth(samples, steps)
        good &= not grown
        print(f"{framework}: {'; '.join(grown) or 'level'}", flush=True)
    draw(runs, figure)
    print(f"drawn: {figure}")
    return good
