"""The runs of a study: each an ordinary run folder, made by the code of train.py; done ones are passed over.

STUDY/tuning/NAME/study-I/trial-J      a trial of a search; or
STUDY/tuning/NAME/candidate-K/seed-S    one for each given configuration and tuning seed
STUDY/runs/NAME/seed-S                  with the configuration that validation has chosen
"""

import contextlib
import dataclasses
import gc
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import BrokenBarrierError, Thread
from typing import Any

from experiment.engines import load_module
from experiment.errors import UserError
from experiment.files import metrics_log, run_folder
from experiment.files.checkpoints import Checkpoints
from experiment.files.results import read_summary
from experiment.options.command_line import flags
from experiment.options.config import Config, flag_of, is_external
from experiment.options.resolving import resolve
from experiment.run import external, session, signals
from experiment.run.outcome import End, Outcome
from experiment.study.entries import Options
from experiment.study.plan import Method, Plan, Trial

STEP_CHECKS = ("loss", "grad_norm")  # a run ends where one of these is not finite

# Options in which a study and its runs may differ: none changes a number
HARMLESS = frozenset(
    {
        *("data_dir", "run_dir", "resume", "distributed", "recipe"),
        *("checkpoint_every", "log_every", "keep_checkpoints", "report", "test", "verify_every"),
    }
)


class StudyStoppedError(Exception):
    """A run was interrupted, or cannot go on; `status` is the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Run:
    """One run of a study: its folder, its options, and its name for the user.

    `method` is the method's name, `point` its configuration; `trial` is None for a final run.
    """

    folder: Path
    options: Options
    label: str
    method: str = ""
    point: Options = field(default_factory=dict)
    trial: Trial | None = None


def trial_runs(folder: Path, method: Method) -> list[Run]:
    """Return the runs of a method's trials, in order; they are not tested."""
    where = folder / "tuning" / method.name
    return [_run(where / t.folder, method, t.point, t.seed, t) for t in method.trials]


def candidate(folder: Path, method: Method, k: int) -> list[Run]:
    """Return the runs of the trials that have point `k`."""
    return [run for run in trial_runs(folder, method) if run.trial is not None and run.trial.point == k]


def final_runs(plan: Plan, folder: Path, method: Method, chosen: int) -> list[Run]:
    """Return the runs of a method with point `chosen`, one for each seed of the study."""
    where = folder / "runs" / method.name
    return [_run(where / f"seed-{seed}", method, chosen, seed) for seed in plan.seeds]


def _run(folder: Path, method: Method, point: int, seed: int, trial: Trial | None = None) -> Run:
    configuration = method.configurations[point]
    label = f"{method.name}, {words(configuration)}, seed {seed}"
    options = {**method.candidates[point], "seed": seed, "test": trial is None, "run_dir": str(folder)}
    return Run(folder, options, label, method.name, configuration, trial)


def words(configuration: Options) -> str:
    """Return a configuration in words: "lr 0.001, final_lr 0.1"."""
    return ", ".join(f"{key} {value}" for key, value in configuration.items()) or "as given"


def portable_name(optimizer: str) -> str:
    """Return the name of an optimizer; of FILE.py:FUNCTION without the folder of the file."""
    return Path(optimizer).name if is_external(optimizer) else optimizer


def validation(folder: Path) -> tuple[float, float]:
    """Return accuracy and loss of a run's last validation; (0, infinity) of a run that has diverged."""
    if has_diverged(folder):
        return 0.0, math.inf
    last = _last_validation(folder)
    return last["accuracy"], math.inf if last["loss"] is None else last["loss"]


def _last_validation(folder: Path) -> dict[str, Any]:
    return list(lines(folder, "val"))[-1]


def lines(folder: Path, split: str, scope: str = "epoch") -> Iterator[metrics_log.Line]:
    """Yield the lines of a run's metrics.jsonl of one split and scope."""
    return metrics_log.read(folder / metrics_log.NAME, split, scope)


def has_diverged(folder: Path) -> bool:
    """True if the loss or gradient of a step, or the final test loss, was not finite.

    For a run that was not tested, the final validation loss counts. A repeated run would diverge again.
    """
    if summary := read_summary(folder):
        return (summary["test"] or _last_validation(folder))["loss"] is None
    return any(
        line[name] is None for line in lines(folder, "train", "step") for name in STEP_CHECKS & line.keys()
    )


def is_done(run: Run) -> bool:
    """True if a run has ended, at its last step or by diverging.

    Raises UserError if its folder holds a run of other options: the study's file was changed, or a default.
    """
    if not (run.folder / "config.json").exists():
        return False
    record = run_folder.read_record(run.folder)
    stored, config = resolve({}, dict(record["config"])), resolve(run.options)
    for option in dataclasses.fields(Config):
        old, new = getattr(stored, option.name), getattr(config, option.name)
        if option.name == "optimizer":
            old, new = portable_name(old), portable_name(new)
        if option.name not in HARMLESS and old != new:
            raise UserError(
                f"{run.folder}: is of another study: {flag_of(option)}: the run has {old}, not {new}; "
                "restore the study's file, or give another --run-dir"
            )
    external.check_unchanged(config.optimizer, record["resolved"])
    return read_summary(run.folder) is not None or has_diverged(run.folder)


def carry_out(run: Run) -> None:
    """Make or continue a run; its lines go to its log.txt alone.

    Raises StudyStoppedError if it was interrupted, or failed in another way than by diverging.
    """
    with _quiet():
        outcome = _start(run)
    gc.collect()  # the engine's processes and memory end with it
    if outcome.end not in (End.COMPLETED, End.DIVERGED):
        raise StudyStoppedError(f"{run.label}: {outcome.reason}", outcome.status)


def can_go_together(runs: Sequence[Run]) -> bool:
    """True if runs of one method can train in lockstep: they are at the same step, none may end before the
    others, and none takes a step again to verify it."""
    steps = {max(Checkpoints(run.folder / "checkpoints", 1).steps(), default=0) for run in runs}
    options = runs[0].options
    alone = "early_stopping_patience" in options or bool(options.get("verify_every"))
    return len(runs) > 1 and len(steps) == 1 and not alone


def carry_out_together(runs: Sequence[Run]) -> None:
    """Make or continue runs that differ in the seed alone, with one compiled function for all of them.

    When one of them fails all stop: they can be continued one by one. At a signal all stop at one step.
    Raises what one of them raised, and StudyStoppedError at a signal.
    """
    rendezvous = load_module("jax", "strategies.vmapped").Rendezvous(len(runs))
    errors: list[Exception] = []

    def drive(index: int, run: Run) -> None:
        end = End.FAILED
        try:
            end = _start(run, partial(rendezvous.wrap, index)).end
        except BrokenBarrierError:
            pass
        except Exception as error:
            errors.append(error)
        finally:
            if end in (End.FAILED, End.DIVERGED):  # at a signal the others end by themselves
                rendezvous.leave()

    threads = [Thread(target=drive, args=numbered) for numbered in enumerate(runs)]
    with signals.listen() as request, _quiet():
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            rendezvous.leave()
            for thread in threads:
                thread.join()
            message = "interrupted; each run continues from its newest checkpoint"
            raise StudyStoppedError(message, 130) from None
    gc.collect()
    if errors:
        raise errors[0]
    check_signal(request)


def check_signal(request: signals.StopRequest) -> None:
    """Raise StudyStoppedError if a signal asked to stop."""
    if request.signal is not None:
        raise StudyStoppedError(f"stopped by {request.signal.name}", 128 + request.signal)


def _start(run: Run, *join: Any) -> Outcome:
    options = dict(run.options)
    if (run.folder / "config.json").exists():
        options["resume"] = True
    return session.start(options, flags(options), *join)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
