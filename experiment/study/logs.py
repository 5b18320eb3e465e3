"""The logs of a study: one compressed file from which every table and figure is made.

    STUDY/logs.jsonl.xz     a line about the study, then one for each run that has ended

The first line holds the text of the study's file, so that the plan can be read again. The line of a run has
its point, its options, all of its validations, its training loss in windows, its test and its cost. A study
of 500 runs takes about a megabyte. Files of parts of a study, made on several machines, can be joined.
"""

import json
import lzma
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

import numpy as np

from experiment.errors import UserError
from experiment.files import metrics_log, run_folder
from experiment.files.results import read_summary
from experiment.files.schema import Count, Number
from experiment.options.paths import HUB
from experiment.options.resolving import resolve
from experiment.reading import LARGEST_JSON, check_regular, checked_json
from experiment.study import running
from experiment.study.entries import Options
from experiment.study.plan import Method, Plan, from_text
from experiment.study.running import HARMLESS, Run
from experiment.study.scores import best_point

NAME = "logs.jsonl.xz"
FORMAT: Final = 1
WINDOWS = 100  # of the training loss of a run; the mean of each is kept
DIGITS = 5  # of these means
TRAINING = ("loss", "at_lower", "at_upper")
MADE_WITH = ("device", "cpu_count", "threads", "python", "platform", "versions", "git_commit")
DIFFERING = ("cost", "made_with")  # of two runs that are the same


class Header(TypedDict):
    """The first line; `given` are the options that override those of the file."""

    format: Literal[1]
    name: str
    file: str
    given: dict[str, Any]


class Curve(TypedDict):
    """Numbers after so many steps; None for one that was not finite."""

    step: list[Count]
    accuracy: list[Number | None]
    loss: list[Number | None]


class Record(TypedDict):
    """A run that has ended.

    `method` is the method's name. A trial has a study and a number, from 1, and no test; a final run has
    neither, and one. `train` holds means over windows: "step" is the last of each.
    """

    method: str
    study: Count | None
    trial: Count | None
    seed: Count
    point: dict[str, Any]
    options: dict[str, Any]
    outcome: Literal["completed", "diverged"]
    validation: Curve
    train: dict[str, list[Number | None]]
    train_loss: Number | None
    test: dict[str, Number | None] | None
    cost: dict[str, Number | None]
    made_with: list[dict[str, Any]]


def key_of(record: Record) -> tuple[Any, ...]:
    """Return what a record is identified by in its study: method, study, trial, seed."""
    return record["method"], record["study"], record["trial"], record["seed"]


def collect(plan: Plan, folder: Path) -> list[Record]:
    """Return the records of all runs in a study's folder that have ended.

    Raises UserError if it holds a run of another study.
    """
    records: list[Record] = []
    for method in plan.methods:
        trials = [record_of(run) for run in running.trial_runs(folder, method) if running.is_done(run)]
        point = chosen(method, trials)
        finals = [] if point is None else running.final_runs(plan, folder, method, point)
        records += [*trials, *(record_of(run) for run in finals if running.is_done(run))]
    return records


def chosen(method: Method, trials: Sequence[Record]) -> int | None:
    """Return the point that the validation of a method's trials has chosen; None before all have ended."""
    if not method.trials:
        return 0
    if len(trials) < len(method.trials):
        return None
    points = {(trial.study, trial.number): trial.point for trial in method.trials}
    return best_point(
        [(points[record["study"] or 0, record["trial"] or 0], *last_validation(record)) for record in trials]
    )


def last_validation(record: Record) -> tuple[float, float]:
    """Return accuracy and loss of a run's last validation; (0, infinity) of a run that has diverged."""
    if record["outcome"] == "diverged":
        return 0.0, math.inf
    accuracy, loss = record["validation"]["accuracy"][-1], record["validation"]["loss"][-1]
    return accuracy or 0.0, math.inf if loss is None else loss


def record_of(run: Run) -> Record:
    """Return the record of a run that has ended."""
    record = run_folder.read_record(run.folder)
    config = resolve({}, dict(record["config"]))
    summary = read_summary(run.folder) or {}
    lines = list(metrics_log.read(run.folder / metrics_log.NAME))
    validations = list(metrics_log.select(lines, "val", "epoch"))
    epochs = [line["loss"] for line in metrics_log.select(lines, "train", "epoch")]
    speed = summary.get("images_per_second")
    test = summary.get("test")
    return {
        "method": run.method,
        "study": run.trial.study if run.trial else None,
        "trial": run.trial.number if run.trial else None,
        "seed": run.options["seed"],
        "point": run.point,
        "options": _portable(vars(config)),
        "outcome": "diverged" if running.has_diverged(run.folder) else "completed",
        "validation": {
            "step": [line["step"] for line in validations],
            "accuracy": [line["accuracy"] for line in validations],
            "loss": [line["loss"] for line in validations],
        },
        "train": _thinned(list(metrics_log.select(lines, "train", "step"))),
        "train_loss": (epochs or [None])[-1],
        "test": {name: test[name] for name in ("accuracy", "loss", "f1")} if test and not run.trial else None,
        "cost": {
            "steps": summary.get("steps"),
            "wall_seconds": summary.get("wall_seconds"),
            "processor_seconds": summary.get("processor_seconds"),
            "images_per_second": speed,
            "steps_per_second": None if speed is None else speed / config.batch_size,
        },
        "made_with": _sessions(record["sessions"]),
    }


def _portable(options: Options) -> Options:
    """Return the options that decide on a run's numbers, with the names of files in place of their paths."""
    kept = {name: value for name, value in options.items() if name not in HARMLESS}
    weights = options["init_from"]
    if weights is not None and not weights.startswith(HUB):
        weights = Path(weights).name
    return kept | {"optimizer": running.portable_name(options["optimizer"]), "init_from": weights}


def _sessions(sessions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the sessions of a run were made with, each combination once."""
    combinations: list[dict[str, Any]] = []
    for session in sessions:
        made_with = {name: session.get(name) for name in MADE_WITH}
        if made_with not in combinations:
            combinations.append(made_with)
    return combinations


def _thinned(lines: Sequence[metrics_log.Line]) -> dict[str, list[float | None]]:
    """Return means over windows of the training loss, and of the coordinates clipped by AdaBound.

    Args:
        lines: those of the steps.
    """
    names = [name for name in TRAINING if lines and lines[0].get(name) is not None]
    windows = np.array_split(np.arange(len(lines)), min(WINDOWS, len(lines))) if lines else []
    curve: dict[str, list[float | None]] = {"step": [lines[window[-1]]["step"] for window in windows]}
    for name in names:
        values = [[lines[i].get(name) for i in window] for window in windows]
        curve[name] = [
            None if None in window else float(f"{math.fsum(window) / len(window):.{DIGITS}g}")
            for window in values
        ]
    return curve


def header_of(plan: Plan) -> Header:
    """Return the first line of a study's logs."""
    return {"format": FORMAT, "name": plan.name, "file": plan.file, "given": plan.given}


def write(path: Path, plan: Plan, records: Iterable[Record]) -> None:
    """Write the logs of a study, whole or not at all."""
    in_order = sorted(records, key=lambda record: json.dumps(key_of(record)))
    lines: list[Any] = [header_of(plan), *in_order]
    text = "".join(json.dumps(run_folder.finite(line), sort_keys=True) + "\n" for line in lines)
    run_folder.write_file(path, lzma.compress(text.encode(), preset=6))


def read(path: Path) -> tuple[Header, list[Record]]:
    """Return the first line of a file of logs, and its records. Raises UserError if it is none."""
    try:
        check_regular(path)
        with lzma.open(path) as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise ValueError(f"it is larger than {LARGEST_JSON >> 20} MB")
        first, *rest = content.splitlines()
        header: Header = checked_json(first, Header)
        records: list[Record] = [checked_json(line, Record) for line in rest]
    except FileNotFoundError:
        raise UserError(f"--from-logs: {path} not found; name {NAME} of a study's folder") from None
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise UserError(f"--from-logs: {path} cannot be read ({error}); restore the file") from None
    return header, records


def join(paths: Sequence[Path]) -> tuple[Plan, list[Record]]:
    """Return the study of one or more files of logs, and the records of all of them.

    A run may be in several files, if its numbers are the same in all of them.

    Raises:
        UserError: a file cannot be read, or is of another study; two files contradict each other; one holds
            a run that its study does not have.
    """
    files = [read(path) for path in paths]
    header = dict(files[0][0])
    for path, (other, _) in zip(paths, files, strict=True):
        if differing := [name for name, value in other.items() if header[name] != value]:
            what = " and ".join(differing)
            raise UserError(f"--from-logs: {path} is of another study than {paths[0]}: its {what} differs")
    try:
        plan = from_text(files[0][0]["name"], files[0][0]["file"], files[0][0]["given"])
    except (ValueError, UserError) as error:
        raise UserError(f"--from-logs: {paths[0]}: {error}; restore the file") from None
    expected = {
        *((method.name, t.study, t.number, t.seed) for method in plan.methods for t in method.trials),
        *((method.name, None, None, seed) for method in plan.methods for seed in plan.seeds),
    }
    joined: dict[tuple[Any, ...], Record] = {}
    for path, (_, records) in zip(paths, files, strict=True):
        for record in records:
            key = key_of(record)
            words = ", ".join(str(part) for part in key if part is not None)
            if key not in expected:
                raise UserError(f"--from-logs: {path} holds a run that the study does not have: {words}")
            if key in joined and (name := contradiction(joined[key], record)):
                fault = f"--from-logs: {path} contradicts a file before it about {words}: its {name} differs"
                raise UserError(f"{fault}; leave one of them out")
            joined.setdefault(key, record)
    return plan, list(joined.values())


def contradiction(one: Record, other: Record) -> str | None:
    """Return the first name in which two records of one run differ, or None."""
    theirs = dict(other)
    names = (name for name, value in one.items() if name not in DIFFERING and value != theirs[name])
    return next(names, None)
