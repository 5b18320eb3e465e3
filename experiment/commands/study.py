"""`python -m experiment study STUDY`: methods compared on workloads by one TOML file, with intervals.

Every run is an ordinary run folder; the same command again continues where it stopped. The logs of all runs
are one file, from which tables and figures are made, here or elsewhere (`--from-logs`).
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from experiment.engines import load_module, set_environment
from experiment.errors import UserError
from experiment.files import run_folder
from experiment.options.command_line import Parser
from experiment.options.config import FRAMEWORKS, is_external
from experiment.options.resolving import resolve
from experiment.program import command
from experiment.run import signals
from experiment.study import jobs, logs, running
from experiment.study.plan import Method, Plan, framework_of, names, read

EXAMPLE = {"conv1.weight": np.zeros((3, 3, 1, 4), np.float32), "fc.bias": np.zeros(4, np.float32)}
"""Parameters, on which an optimizer of optax or of a file is tried before the first run."""


def main(argv: Sequence[str]) -> int:
    """Run or continue a study; write its logs, study.json, study.md, study.html and figures.

    A signal stops it as it stops a run, and the command to continue is printed. Return the exit status.

    Raises:
        UserError: a file that is no study, or runs in the folder that are of another.
    """
    options = _parser().parse_args(argv)
    if options.from_logs:
        return _from_logs(options)
    if options.file is None or options.out is not None:
        fault = "STUDY: is missing" if options.file is None else "--out: is for --from-logs"
        raise UserError(f"{fault}; name a TOML file, one of {', '.join(names())}, or give --from-logs FILE")
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
    if options.jobs < 1:
        raise UserError(f"--jobs: {options.jobs} is out of range; give 1 or more")
    if options.vmap and options.jobs > 1:
        raise UserError("--vmap: trains seeds in one process; leave it or --jobs out")
    status = 0
    if not options.report_only:
        methods = _selected(plan, options.only)
        _check_transformations(methods)
        together = False
        if options.jobs == 1:
            together = _on_gpu(plan) if options.vmap is None else options.vmap
        try:
            with signals.listen() as request:
                _carry_out(plan, methods, folder, request, together=together, at_once=options.jobs)
        except running.StudyStoppedError as stopped:
            print(f"{stopped}\nthe same command continues", file=sys.stderr)
            status = stopped.status
    if folder.is_dir():
        logs.write(folder / logs.NAME, plan, logs.collect(plan, folder))
        _report([folder / logs.NAME], folder, _words(options))
    return status


def _parser() -> Parser:
    parser = Parser(
        prog=command("study"),
        usage="%(prog)s [-h] (STUDY | --from-logs FILE [FILE ...] --out DIR) [FLAG ...]",
        description="Compare optimizers on workloads by a TOML file: tune each on validation by the same "
        "number of trials, train each with every seed, and write tables with intervals, and figures. The "
        "same command again skips completed runs and continues a stopped one.",
    )
    add = parser.add_argument
    study = f"a TOML file, or one of {', '.join(names())}"
    parser.add_path("file", metavar="STUDY", nargs="?", help=study)
    parser.add_path("--run-dir", metavar="DIR", help="folder of the study (default: runs/study-NAME)")
    add("--framework", choices=FRAMEWORKS, help="engine that trains (default: the file's)")
    parser.add_data_dir("where TFDS keeps its data (default: TFDS' own)")
    side_by_side = "runs side by side, each a process with its share of the cores (default 1)"
    add("--jobs", type=int, default=1, metavar="N", help=side_by_side)
    only = "run these optimizers, or on these workloads, alone: a part of a study, to join by --from-logs"
    add("--only", nargs="+", default=[], metavar="NAME", help=only)
    switch = argparse.BooleanOptionalAction
    vmap = "JAX: all seeds in one compiled function (default: on a GPU; on a CPU separate runs)"
    add("--vmap", action=switch, help=vmap)
    report = "a report and TensorBoard files of every run (default: none, which is faster)"
    add("--report", action=switch, help=report)
    add("--report-only", action="store_true", help="train nothing; write the tables of the runs that exist")
    from_logs = f"train nothing; write the tables of {logs.NAME} of one study, or of its parts"
    parser.add_path("--from-logs", metavar="FILE", nargs="+", help=from_logs)
    parser.add_path("--out", metavar="DIR", help="with --from-logs: where")
    return parser


def _words(options: argparse.Namespace) -> list[str]:
    """Return the arguments with which the study can be made again."""
    words = [shlex.quote(str(options.file))]
    words += [f"--framework {options.framework}"] if options.framework else []
    words += [] if options.vmap is None else ["--vmap" if options.vmap else "--no-vmap"]
    words += [f"--jobs {options.jobs}"] if options.jobs > 1 else []
    words += ["--data-dir DIR"] if options.data_dir else []
    return words + ([] if options.report is None else ["--report" if options.report else "--no-report"])


def _from_logs(options: argparse.Namespace) -> int:
    """Write the tables and figures of logs, and if there are several files, their union."""
    if options.file is not None or options.run_dir is not None or options.out is None:
        fault = "--out: is missing" if options.out is None else "--from-logs: has the study in its files"
        raise UserError(f"{fault}; give --from-logs FILE [FILE ...] --out DIR")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out: {options.out} is a file; name a folder")
    plan, records = logs.join(options.from_logs)
    options.out.mkdir(parents=True, exist_ok=True)
    logs.write(options.out / logs.NAME, plan, records)
    files = " ".join(shlex.quote(str(path)) for path in options.from_logs)
    _report([options.out / logs.NAME], options.out, [f"--from-logs {files} --out DIR"])
    return 0


def _selected(plan: Plan, only: Sequence[str]) -> list[Method]:
    """Return the methods of which every label is in `only`, as far as it names optimizers, and workloads."""
    optimizers = {method.optimizer for method in plan.methods} & set(only)
    workloads = {method.variant for method in plan.methods} & set(only)
    if unknown := sorted(set(only) - optimizers - workloads):
        labels = dict.fromkeys(label for m in plan.methods for label in (m.optimizer, m.variant) if label)
        raise UserError(f"--only: the study has no {unknown[0]}; name some of {', '.join(labels)}")
    return [
        method
        for method in plan.methods
        if (not optimizers or method.optimizer in optimizers)
        and (not workloads or method.variant in workloads)
    ]


def _check_transformations(methods: Sequence[Method]) -> None:
    """Raise UserError for an optimizer of optax or of a file that cannot be made; before the first run."""
    for method in methods:
        for options in method.candidates:
            config = resolve(options)
            if not is_external(config.optimizer):
                break
            set_environment("jax", deterministic=config.deterministic)
            check = load_module("jax", "transformations").check_transformation
            try:
                check(config.optimizer, config.external_arguments(), EXAMPLE)
            except ValueError as error:
                raise UserError(f"optimizers: {method.optimizer}: {error}; fix the file") from None


def _on_gpu(plan: Plan) -> bool:
    """True if JAX trains, and on a GPU: there seeds together take little more time than one."""
    if framework_of(plan) != "jax":
        return False
    set_environment("jax", deterministic=bool(plan.methods[0].candidates[0].get("deterministic")))
    import jax

    return jax.default_backend() == "gpu"


def _carry_out(
    plan: Plan,
    methods: Sequence[Method],
    folder: Path,
    request: signals.StopRequest,
    *,
    together: bool,
    at_once: int,
) -> None:
    """Carry out the trials, one of each method after another; then the final runs, likewise for each seed.

    So a study stopped half way is balanced. With `together`, methods follow one another, with all seeds.
    """
    points = range(max(len(method.configurations) for method in methods))
    trials = [running.candidate(folder, method, k) for k in points for method in methods]
    trials = [runs for runs in trials if runs]
    total = sum(map(len, trials)) + len(plan.seeds) * len(methods)
    count = sum(map(len, trials)) // len(methods)
    print(
        f"{plan.name}: {len(methods)} methods x ({count} tuning runs + {len(plan.seeds)} final runs) = "
        f"{total} runs in {folder}",
        flush=True,
    )
    make = partial(_make, request=request, together=together, at_once=at_once)
    done = make(trials, 0, total, split="validation")
    records = {m.name: [logs.record_of(run) for run in running.trial_runs(folder, m)] for m in methods}
    chosen = {method.name: logs.chosen(method, records[method.name]) for method in methods}
    finals = [running.final_runs(plan, folder, method, chosen[method.name] or 0) for method in methods]
    order: Iterable[Sequence[running.Run]] = finals if together else zip(*finals, strict=True)
    make(list(order), done, total, split="test")


def _make(
    groups: Sequence[Sequence[running.Run]],
    done: int,
    total: int,
    *,
    request: signals.StopRequest,
    together: bool,
    at_once: int,
    split: str,
) -> int:
    """Carry out the runs that have not ended; return how many runs of the study have ended.

    Print the accuracy of each on `split`: trials evaluate validation alone.
    """
    waiting = [[run for run in runs if not running.is_done(run)] for runs in groups]
    done += sum(map(len, groups)) - sum(map(len, waiting))

    def report(run: running.Run, seconds: float) -> None:
        nonlocal done
        done += 1
        print(f"{done}/{total} {run.label}: {_outcome(run, split)} ({seconds:.0f} s)", flush=True)

    if at_once > 1:
        jobs.carry_out_side_by_side([run for runs in waiting for run in runs], at_once, request, report)
        return done
    begun = time.monotonic()
    for runs in waiting:
        if together and runs and running.can_go_together(runs):
            running.carry_out_together(runs)
        for run in runs:
            running.check_signal(request)
            if not running.is_done(run):
                running.carry_out(run)
            report(run, time.monotonic() - begun)
            begun = time.monotonic()
    return done


def _outcome(run: running.Run, split: str) -> str:
    """Return the result of a run on `split` in words."""
    if running.has_diverged(run.folder):
        return "diverged"
    test = run_folder.read_json(run.folder / "summary.json")["test"]
    accuracy, loss = (test["accuracy"], test["loss"]) if split == "test" else running.validation(run.folder)
    return f"{split} accuracy {accuracy:.4f}, loss {loss:.4f}"


def _report(files: Sequence[Path], folder: Path, command: Sequence[str]) -> None:
    """Write results, tables and figures from logs alone."""
    from experiment.study import curves, results, search_figures, tables

    plan, records = logs.join(files)
    run_folder.write_json(folder / "study.json", results.make(plan, records, command))
    study = run_folder.read_json(folder / "study.json")  # as anyone else reads it
    text = tables.markdown(study)
    run_folder.write_file(folder / "study.md", text.encode())
    run_folder.write_file(folder / "runs.csv", results.to_csv(study).encode())
    figures = [*search_figures.draw(study, folder), *curves.draw(study, records, folder)]
    run_folder.write_file(folder / "study.html", tables.page(study, figures).encode())
    print(text)
    print(f"study.html, study.md, study.json, runs.csv, {logs.NAME} and the figures (*.png) are in {folder}")
