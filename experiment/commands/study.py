"""`python -m experiment study STUDY`: optimizers x seeds from one TOML file, with intervals.

Every run is an ordinary run folder; the same command again continues where it stopped.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiment.engines import set_environment
from experiment.errors import UserError
from experiment.files import run_folder
from experiment.options.command_line import Parser
from experiment.options.config import FRAMEWORKS
from experiment.program import command
from experiment.run import signals
from experiment.study import running
from experiment.study.plan import Plan, framework_of, names, read


def main(argv: Sequence[str]) -> int:
    """Run or continue a study; write study.json, study.md, study.html and figures. Return the exit status.

    A signal stops it as it stops a run, and the command to continue is printed.

    Raises:
        UserError: a file that is no study, or runs in the folder that are of another.
    """
    parser = Parser(
        prog=command("study"),
        description="Compare optimizers over seeds by a TOML file: tune each on validation with the same "
        "number of configurations, train each with every seed, and write tables with intervals, and "
        "figures. The same command again skips completed runs and continues a stopped one.",
    )
    add = parser.add_argument
    parser.add_path("file", metavar="STUDY", help=f"a TOML file, or one of {', '.join(names())}")
    parser.add_path("--run-dir", metavar="DIR", help="folder of the study (default: runs/study-NAME)")
    add("--framework", choices=FRAMEWORKS, help="engine that trains (default: the file's)")
    parser.add_data_dir("where TFDS keeps its data (default: TFDS' own)")
    switch = argparse.BooleanOptionalAction
    vmap = "JAX: all seeds in one compiled function (default: on a GPU; on a CPU separate runs)"
    add("--vmap", action=switch, help=vmap)
    report = "a report and TensorBoard files of every run (default: none, which is faster)"
    add("--report", action=switch, help=report)
    add("--report-only", action="store_true", help="train nothing; write the tables of the runs that exist")
    options = parser.parse_args(argv)
    given = {"framework": options.framework, "data_dir": options.data_dir, "report": options.report}
    plan = read(options.file, {name: value for name, value in given.items() if value is not None})
    folder = options.run_dir or Path("runs") / f"study-{plan.name}"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--run-dir: {folder} is a file; name a folder")
    if options.report_only and not folder.is_dir():
        remedy = "name the study's folder, or leave --report-only out"
        raise UserError(f"--run-dir: there is no {folder}; {remedy}")
    if options.vmap and framework_of(plan) != "jax":
        raise UserError("--vmap: needs --framework jax; add it, or leave the flag out")
    status = 0
    if not options.report_only:
        together = _on_gpu(plan) if options.vmap is None else options.vmap
        try:
            with signals.listen() as request:
                _carry_out(plan, folder, request, together=together)
        except running.StudyStoppedError as stopped:
            print(f"{stopped}\nthe same command continues", file=sys.stderr)
            status = stopped.status
    if folder.is_dir():
        words = [shlex.quote(str(options.file))]
        words += [f"--framework {options.framework}"] if options.framework else []
        words += [] if options.vmap is None else ["--vmap" if options.vmap else "--no-vmap"]
        words += ["--data-dir DIR"] if options.data_dir else []
        words += [] if options.report is None else ["--report" if options.report else "--no-report"]
        _report(plan, folder, words)
    return status


def _on_gpu(plan: Plan) -> bool:
    """True if JAX trains, and on a GPU: there seeds together take little more time than one."""
    if framework_of(plan) != "jax":
        return False
    set_environment("jax", deterministic=bool(plan.methods[0].candidates[0].get("deterministic")))
    import jax

    return jax.default_backend() == "gpu"


def _carry_out(plan: Plan, folder: Path, request: signals.StopRequest, *, together: bool) -> None:
    """Tune, then run all methods for one seed after another: a study stopped half way is balanced.

    With `together`, run all seeds of one method after another instead.
    """
    configurations = [
        running.candidate(plan, folder, method, k)
        for method in plan.methods
        for k in range(plan.trials)
        if plan.tuning_seeds
    ]
    total = sum(map(len, configurations)) + len(plan.seeds) * len(plan.methods)
    print(
        f"{plan.name}: {len(plan.methods)} methods x ({plan.trials * len(plan.tuning_seeds)} tuning runs + "
        f"{len(plan.seeds)} final runs) = {total} runs in {folder}",
        flush=True,
    )
    done = 0
    for tuning in configurations:
        done = _make(tuning, done, total, request, together=together, split="validation")
    chosen = {method.name: running.choose(plan, folder, method) for method in plan.methods}
    groups = [running.final_runs(plan, folder, method, chosen[method.name]) for method in plan.methods]
    order: Iterable[Sequence[running.Run]] = groups if together else zip(*groups, strict=True)
    for runs in order:
        done = _make(runs, done, total, request, together=together, split="test")


def _make(
    runs: Sequence[running.Run],
    done: int,
    total: int,
    request: signals.StopRequest,
    *,
    together: bool,
    split: str,
) -> int:
    """Carry out the runs that have not ended; return how many runs of the study have ended.

    Print the accuracy of each on `split`: tuning runs evaluate validation alone.
    """
    begun = time.monotonic()
    waiting = [run for run in runs if not running.is_done(run)]
    if together and running.can_go_together(waiting):
        running.carry_out_together(waiting)
    for run in waiting:
        running.check_signal(request)
        if not running.is_done(run):
            running.carry_out(run)
        if running.has_diverged(run.folder):
            outcome = "diverged"
        else:
            test = run_folder.read_json(run.folder / "summary.json")["test"]
            tested = split == "test"
            accuracy, loss = (test["accuracy"], test["loss"]) if tested else running.validation(run.folder)
            outcome = f"{split} accuracy {accuracy:.4f}, loss {loss:.4f}"
        place = done + runs.index(run) + 1
        print(f"{place}/{total} {run.label}: {outcome} ({time.monotonic() - begun:.0f} s)", flush=True)
        begun = time.monotonic()
    return done + len(runs)


def _report(plan: Plan, folder: Path, command: Sequence[str]) -> None:
    from experiment.study import curves, results, tables

    study = results.collect(plan, folder, command)
    run_folder.write_json(folder / "study.json", study)
    study = run_folder.read_json(folder / "study.json")  # as anyone else reads it
    text = tables.markdown(study)
    run_folder.write_file(folder / "study.md", text.encode())
    run_folder.write_file(folder / "study.html", tables.page(study, curves.draw(study, folder)).encode())
    print(text)
    print(f"study.html, study.md, study.json and the figures (*.png) are in {folder}")
