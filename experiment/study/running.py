"""The runs of a study: each an ordinary run folder, made by the code of train.py; done ones are passed over.

STUDY/tuning/NAME/candidate-K/seed-S    one for each candidate setting and tuning seed
STUDY/runs/NAME/seed-S                  with the setting that validation has chosen
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from experiment.options.config import Config, flag_of
from experiment.options.resolving import resolve
from experiment.run import session, signals
from experiment.run.outcome import End, Outcome
from experiment.study.plan import Contestant, Options, Plan

STEP_CHECKS = ("loss", "grad_norm")  # a run ends where one of these is not finite

# What may differ between a study and its runs: none of it moves a number
HARMLESS = frozenset(
    {
        *("data_dir", "run_dir", "resume", "distributed", "recipe"),
        *("checkpoint_every", "log_every", "keep_checkpoints", "report", "test"),
    }
)


class StudyStoppedError(Exception):
    """A run was interrupted, or cannot go on; `status` is the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Run:
    """One run of a study: its folder, its options, and what it is in words."""

    folder: Path
    options: Options
    label: str


def candidate(plan: Plan, folder: Path, contestant: Contestant, k: int) -> list[Run]:
    """The tuning runs of setting number `k`, one for each tuning seed; they do not evaluate the test set."""
    where = folder / "tuning" / contestant.name / f"candidate-{k + 1}"
    return [_run(where, contestant, k, seed, test=False) for seed in plan.tuning_seeds]


def final_runs(plan: Plan, folder: Path, contestant: Contestant, chosen: int) -> list[Run]:
    """The runs of a contestant, one for each seed of the study."""
    where = folder / "runs" / contestant.name
    return [_run(where, contestant, chosen, seed, test=True) for seed in plan.seeds]


def _run(where: Path, contestant: Contestant, k: int, seed: int, *, test: bool) -> Run:
    folder = where / f"seed-{seed}"
    label = f"{contestant.name}, {words(contestant.settings[k])}, seed {seed}"
    own = {"seed": seed, "test": test, "run_dir": str(folder)}
    return Run(folder, {**contestant.candidates[k], **own}, label)


def words(setting: Options) -> str:
    """A setting in words: "lr 0.001, final_lr 0.1"."""
    return ", ".join(f"{key} {value}" for key, value in setting.items()) or "as given"


def choose(plan: Plan, folder: Path, contestant: Contestant) -> int:
    """The index of the setting with the highest mean validation accuracy over the tuning seeds, ties by loss,
    and then the first.

    A diverged run has accuracy 0.
    """

    def score(k: int) -> tuple[float, float]:
        found = [validation(run.folder) for run in candidate(plan, folder, contestant, k)]
        return math.fsum(accuracy for accuracy, _ in found), -math.fsum(loss for _, loss in found)

    return max(range(plan.budget), key=score) if plan.tuning_seeds else 0


def validation(folder: Path) -> tuple[float, float]:
    """Accuracy and loss of a run's last validation; (0, infinity) of a run that has diverged."""
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
    """True if the loss or gradient of a step was not finite, or at its end the test loss (the validation loss
    of a run that was not tested); the same would happen again."""
    if summary := read_summary(folder):
        return (summary["test"] or _last_validation(folder))["loss"] is None
    return any(
        line[name] is None for line in lines(folder, "train", "step") for name in STEP_CHECKS & line.keys()
    )


def is_done(run: Run) -> bool:
    """Whether a run has ended, at its last step or by diverging.

    Raises UserError if its folder holds a run of other options: the study's file was changed, or a default.
    """
    if not (run.folder / "config.json").exists():
        return False
    stored, config = resolve({}, dict(run_folder.read_record(run.folder)["config"])), resolve(run.options)
    for field in dataclasses.fields(Config):
        old, new = getattr(stored, field.name), getattr(config, field.name)
        if field.name not in HARMLESS and old != new:
            raise UserError(
                f"{run.folder}: is of another study: {flag_of(field)}: the run has {old}, not {new}; restore "
                "the study's file, or give another --run-dir"
            )
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
    """Whether runs of one contestant can train in one program: they stand at the same step, and none may end
    before the others."""
    steps = {max(Checkpoints(run.folder / "checkpoints", 1).steps(), default=0) for run in runs}
    return len(runs) > 1 and len(steps) == 1 and "early_stopping_patience" not in runs[0].options


def carry_out_together(runs: Sequence[Run]) -> None:
    """Make or continue runs that differ in the seed alone, in one program of JAX's.

    When one of them fails all stop: they can be continued one by one. At a signal all stop at one step.
    Raises what one of them raised, and StudyStoppedError at a signal.
    """
    rendezvous = load_module("jax", "together").Rendezvous(len(runs))
    errors: list[Exception] = []

    def drive(index: int, run: Run) -> None:
        end = End.FAILED
        try:
            end = _start(run, partial(rendezvous.join, index)).end
        except BrokenBarrierError:
            pass
        except Exception as error:
            errors.append(error)
        finally:
            if end in (End.FAILED, End.DIVERGED):  # at a signal the others end by themselves
                rendezvous.leave()

    threads = [Thread(target=drive, args=each) for each in enumerate(runs)]
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
