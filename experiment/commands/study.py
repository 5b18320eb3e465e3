"""`python -m experiment study FILE`: optimizers x seeds from one TOML file, with intervals.

Every run is an ordinary run folder; the same command again continues where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiment import rundir
from experiment.commands.parser import Parser
from experiment.config import FRAMEWORKS
from experiment.errors import UserError
from experiment.study import running
from experiment.study.plan import Plan, read


def main(argv: Sequence[str]) -> int:
    """Carry a study out, or on; write study.json, study.md, study.html and curves. Returns the exit status.

    Raises:
        UserError: a file that is no study, or runs in the folder that are of another.
    """
    parser = Parser(
        prog="python -m experiment study",
        description="Compare optimizers over seeds by a TOML file: tune each on validation with the same "
        "number of settings, train each with every seed, write tables with intervals, and curves. The same "
        "command again passes over what is finished and continues what was stopped.",
    )
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="the study, such as those in studies/")
    add("--run-dir", metavar="DIR", type=Path, help="folder of the study (default: runs/study-NAME)")
    add("--framework", choices=FRAMEWORKS, help="engine that trains (default: the file's)")
    add("--data-dir", metavar="DIR", help="where TFDS keeps its data (default: TFDS' own)")
    add("--report-only", action="store_true", help="train nothing; tables of the runs that there are")
    options = parser.parse_args(argv)
    given = {"framework": options.framework, "data_dir": options.data_dir}
    plan = read(options.file, {name: value for name, value in given.items() if value is not None})
    folder = options.run_dir or Path("runs") / f"study-{plan.name}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--run-dir: {folder} is a file; name a folder")
    if options.report_only and not folder.is_dir():
        raise UserError(
            f"--run-dir: there is no {folder}; name the study's folder, or leave --report-only out"
        )
    status = 0
    if not options.report_only:
        try:
            _carry_out(plan, folder)
        except running.StudyStoppedError as stopped:
            print(f"{stopped}\nthe same command continues", file=sys.stderr)
            status = stopped.status
    if folder.is_dir():
        _report(plan, folder, argv)
    return status


def _carry_out(plan: Plan, folder: Path) -> None:
    """Tuning, then seed by seed all contestants, so that a study that was stopped half way is balanced."""
    import train

    tuning = running.tuning_runs(plan, folder)
    total = len(tuning) + len(plan.seeds) * len(plan.contestants)
    print(
        f"{plan.name}: {len(plan.contestants)} contestants, {plan.budget} settings each with "
        f"{len(plan.tuning_seeds)} tuning seeds, {len(plan.seeds)} seeds: {total} runs in {folder}",
        flush=True,
    )
    for index, run in enumerate(tuning):
        _make(run, train.start, f"{index + 1}/{total}")
    chosen = {each.name: running.choose(plan, folder, each) for each in plan.contestants}
    columns = [running.final_runs(plan, folder, each, chosen[each.name]) for each in plan.contestants]
    runs = [run for same_seed in zip(*columns, strict=True) for run in same_seed]
    for index, run in enumerate(runs, len(tuning)):
        _make(run, train.start, f"{index + 1}/{total}")


def _make(run: running.Run, start: running.Start, count: str) -> None:
    if running.is_done(run):
        return
    begun = time.monotonic()
    running.carry_out(run, start)
    outcome = "diverged"
    if not running.has_diverged(run.folder):
        test = rundir.read_json(run.folder / "summary.json")["test"]
        outcome = f"test accuracy {test['accuracy']:.4f}, loss {test['loss']:.4f}"
    print(f"{count} {run.label}: {outcome} ({time.monotonic() - begun:.0f} s)", flush=True)


def _report(plan: Plan, folder: Path, argv: Sequence[str]) -> None:
    from experiment.study import curves, results, tables

    study = results.collect(plan, folder, argv)
    rundir.write_json(folder / "study.json", study)
    study = rundir.read_json(folder / "study.json")  # as anyone else reads it
    text = tables.markdown(study)
    rundir.write_file(folder / "study.md", text.encode())
    rundir.write_file(folder / "study.html", tables.page(study, curves.draw(study, folder)).encode())
    print(text)
    print(f"study.json, study.md, study.html and curves are in {folder}")
