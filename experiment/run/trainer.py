"""Drive an engine's loop: everything that is the same for every engine.

Metrics, validation, checkpoints, resume, signals and the watch for numbers that are not finite are here,
once. What a run writes is a function of its options and the step alone, never of the clock or of where it
was stopped.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import math
import shlex
import signal
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from experiment.data.loading import Data
from experiment.engines import Engine, keeps_programs
from experiment.errors import RunFailedError, UserError
from experiment.files import predictions, weights
from experiment.files.checkpoints import Checkpoints, differences
from experiment.files.metrics_log import History, unchanged_start
from experiment.files.results import WEIGHTS
from experiment.files.tensorboard import EventFile
from experiment.metrics import Metrics
from experiment.options.config import Config
from experiment.processes import SINGLE_PROCESS, ProcessInfo, processor_seconds
from experiment.run import signals
from experiment.run.console import Console
from experiment.run.schedules import has_converged
from experiment.run.transfer import count_parameters

# What an engine tells of a step beside loss and logits; the last four of AdaBound and its kin alone.
STEP_NUMBERS = ("grad_norm", "update_norm", "lower_bound", "upper_bound", "at_lower", "at_upper")


@dataclasses.dataclass
class Start:
    """Where a run begins: a state, and what the checkpoint it came from knows of the run."""

    state: Any
    step: int = 0
    history: dict[str, Any] = dataclasses.field(default_factory=dict)
    epoch_metrics: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    clock: dict[str, Any] = dataclasses.field(default_factory=dict)
    validation_due: bool = False  # a signal came before or during the validation of this step


@dataclasses.dataclass
class Clock:
    """Seconds of all sessions. Training counts neither compilation nor evaluation nor checkpoints.

    `processor_seconds` is None where it is not known: runs that train together share a process, and older
    checkpoints do not record it.
    """

    wall_seconds: float = 0.0
    processor_seconds: float | None = 0.0
    compile_seconds: float = 0.0
    train_seconds: float = 0.0
    train_steps: int = 0


def begin(engine: Engine, tree: dict[str, Any] | None = None) -> Start:
    """The start of a fresh run, from the engine's own weights or those of a tree."""
    return Start(engine.init() if tree is None else engine.from_tree(tree))


def restore(
    engine: Engine,
    checkpoints: Checkpoints,
    run_dir: Path,
    total_steps: int,
    console: Console,
    identity: Mapping[str, Any],
) -> Start | None:
    """The start of a resumed run: its newest checkpoint that is whole, or None if there is none yet.

    `identity` is what the run may not change, as `rundir.identity` returns it.

    Raises UserError if the checkpoint is of other options, of a newer version, of another model, optimizer or
    number of classes, if it is beyond `total_steps`, or if the history it belongs to was changed. Nothing is
    written before these checks.
    """
    found = checkpoints.load_newest(console.say)
    if found is None:
        checkpoints.remove_incomplete()
        console.say("no checkpoint yet: starting at step 0")
        return None
    step, tree, run = found
    made_with = run.pop("identity", None)
    _check_identity(made_with or {}, identity, f"checkpoint {step} in {checkpoints.directory}")
    if unknown := sorted(run.keys() - {field.name for field in dataclasses.fields(Start)}):
        raise UserError(
            f"--resume: checkpoint {step} in {checkpoints.directory} has an unknown entry {unknown[0]!r}, of "
            "a newer version; use that version"
        )
    lines = differences(engine.to_tree(engine.init()), tree)
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise UserError(
            f"--resume: checkpoint {step} in {checkpoints.directory} is of another model or optimizer: "
            f"{'; '.join(lines[:3])}{more}; name the run it belongs to"
        )
    if step > total_steps:
        raise UserError(f"--steps: the run is at step {step}; give as many or more")
    unchanged_start(run_dir / "metrics.jsonl", **run["history"])
    checkpoints.remove_incomplete()
    if made_with is None:
        console.say(
            f"checkpoint {step} is of an older version and holds no options: those of config.json are taken"
        )
    start = Start(state=engine.from_tree(tree), step=step, **run)
    best_weights = run_dir / WEIGHTS["best"]
    if start.best is not None and not checkpoints.restore_best(best_weights, start.best["step"]):
        console.say(
            f"{best_weights}: the best weights so far, of step {start.best['step']}, are lost; "
            "the next better ones are written there"
        )
    console.say(f"resuming at step {step}")
    return start


def _check_identity(made_with: Mapping[str, Any], identity: Mapping[str, Any], checkpoint: str) -> None:
    """Raise UserError if a checkpoint was made with other options or data than those of config.json."""
    for name in made_with:
        if name in identity and made_with[name] != identity[name]:
            old, new = (textwrap.shorten(str(each[name]), 60) for each in (made_with, identity))
            raise UserError(
                f"--resume: {checkpoint} was made with {name} {old}, and config.json has {new}; restore the "
                "config.json of that run"
            )


class Trainer:
    """Trains from a start to the last step.

    Args:
        config: the run's options.
        data: the splits.
        engine: what computes.
        run_dir: where everything is written.
        checkpoints: where checkpoints are.
        total_steps: the last step.
        validations: the list that the engine's schedule looks at; filled here.
        identity: what a resumed run may not change, for its checkpoints.
        place: which of several processes this is; the first alone writes.
    """

    def __init__(
        self,
        config: Config,
        data: Data,
        engine: Engine,
        run_dir: Path,
        checkpoints: Checkpoints,
        console: Console,
        total_steps: int,
        validations: list[tuple[int, float]],
        identity: dict[str, Any],
        place: ProcessInfo = SINGLE_PROCESS,
    ) -> None:
        self.config, self.data, self.engine = config, data, engine
        self.run_dir, self.checkpoints, self.console = run_dir, checkpoints, console
        self.total_steps, self.validations, self.place = total_steps, validations, place
        self.identity = identity
        self.steps_per_epoch = data.steps_per_epoch
        self.checkpoint_every = config.checkpoint_every or self.steps_per_epoch
        self.eval_every = config.eval_every or self.steps_per_epoch
        self.stopped_by: signal.Signals | None = None
        self._request = signals.StopRequest()
        # Runs that train together must stop at the same step: as processes they ask each other, as threads by
        # their engine. An answer takes a moment, so that they ask only where they log, and in evaluation.
        self._stop_every = config.log_every if engine.is_synchronized else 1

    def fit(self, start: Start) -> dict[str, Any] | None:
        """Train, then test unless `config.test` is off; returns the summary, or None if a signal stopped the
        run before its end.

        Raises RunFailedError if a loss or gradient is not finite or data cannot be read; OSError if the disk
        is full.
        """
        self.clock = Clock(**{"processor_seconds": None, **start.clock} if start.clock else {})
        if threading.current_thread() is not threading.main_thread():  # other runs share this process
            self.clock.processor_seconds = None
        self._begun = time.monotonic() - self.clock.wall_seconds
        self._processor_begun = processor_seconds() - (self.clock.processor_seconds or 0.0)
        self.state, self.step, self.best = start.state, start.step, start.best
        self._saved_step = start.step
        classes = self.data.num_classes
        self.epoch_metrics = (
            Metrics.from_json(start.epoch_metrics) if start.epoch_metrics else Metrics(classes)
        )
        self.history = History(self.run_dir / "metrics.jsonl", **start.history, writes=self.place.is_main)
        options = dataclasses.asdict(self.config)
        self.events = EventFile(self.run_dir, options) if self.config.report else None
        # The one at the end of a run that got more steps later is off the beat: it must not change the rest.
        self.validations[:] = [each for each in self.history.validations if not each[0] % self.eval_every]
        try:
            with signals.listen() as self._request:
                if self.config.init_from is not None and not start.history:
                    self._save()  # so that resume has no need of the file
                self._train(start)
                if self.stopped_by is None and self._converged():
                    self.console.say(
                        f"step {self.step}: no better validation loss for "
                        f"{self.config.early_stopping_patience} validations, the run ends early"
                    )
                summary = self._finish() if self.stopped_by is None else None
                self.checkpoints.wait()
                return summary
        finally:
            self.console.stop()
            self.history.close()
            if self.events is not None:
                self.events.close()

    def _train(self, start: Start) -> None:
        if self._stop_requested() or (start.validation_due and not self._validate()):
            return
        remaining = max(self.total_steps - start.step, 0)
        if not remaining or self._converged():
            return
        kept = "the next start finds it in the cache" if keeps_programs() else "no cache keeps it"
        self.console.say(
            f"compiling the training step of {self.config.model}: nothing moves meanwhile; {kept}"
            if self.engine.compiles
            else "taking the first step"
        )
        batches = itertools.islice(self._batches(start.step), remaining)
        pending: list[tuple[int, dict[str, Any]]] = []
        begun = time.monotonic()
        first_seconds: float | None = None
        measured, fresh = 0, True  # fresh: in the call that compiles
        for state, metrics in self.engine.train(self.state, batches, self._needs_state):
            self.step += 1
            pending.append((self.step, metrics))
            if first_seconds is None:
                float(metrics["loss"])  # waits for the device
                first_seconds = time.monotonic() - begun
                self.console.say(f"first step after {first_seconds:.1f} s")
                self.console.start(self.step, self.total_steps, self.config.batch_size)
                begun = time.monotonic()
            elif not fresh:
                measured += 1
            if state is None:  # others follow in the same call
                continue
            self.state, fresh = state, False
            last = self.step == self.total_steps
            evaluate = self.step % self.eval_every == 0 or last
            save = self.step % self.checkpoint_every == 0 or last
            stop = self.step % self._stop_every == 0 and self._stop_requested()
            if not (stop or self._needs_state(self.step)):
                continue
            self._drain(pending)
            seconds = time.monotonic() - begun
            self.clock.train_seconds += seconds
            self.clock.train_steps += measured
            if measured and first_seconds:
                self.clock.compile_seconds += max(first_seconds - seconds / measured, 0.0)
                first_seconds = 0.0
            self._show(pending[-1][1])
            pending.clear()
            validated = not evaluate or self._validate()
            converged = self._converged()
            if save or converged or self.stopped_by is not None:
                self._save(validation_due=not validated)
                stop = self._stop_requested()  # also while the save before this one was waited for
            if stop or converged:
                break
            begun, measured = time.monotonic(), 0
        self.console.stop()

    def _batches(self, start_step: int) -> Iterator[Any]:
        """The training batches; of an engine that holds the pictures, what they are made of."""
        with self._reading("train"):
            held = self.data.held() if self.engine.holds_images else None
        if held is None:
            return self._readable("train", self.data.train_batches(start_step))
        self.engine.hold(held["image"], self.data.augmentation.fill)
        return self._readable("train", self.data.train_draws(held["label"], start_step))

    def _needs_state(self, step: int) -> bool:
        """Whether something is done after a step that wants its state, or its metrics on the disk."""
        intervals = (self.eval_every, self.checkpoint_every, self.steps_per_epoch, self.config.log_every)
        return step == self.total_steps or any(step % interval == 0 for interval in intervals)

    def _stop_requested(self) -> bool:
        """True if any of the runs that train together received a stop signal; all must ask at once."""
        if self.stopped_by is None:
            number = self.engine.all_reduce_max(self._request.signal or 0)
            self.stopped_by = signal.Signals(number) if number else None
        return self.stopped_by is not None

    def _drain(self, pending: list[tuple[int, dict[str, Any]]]) -> None:
        """Write the lines of steps whose metrics are still on the device; stop if one is not finite."""
        for step, metrics in pending:
            logits, label, loss = np.asarray(metrics["logits"]), metrics["label"], float(metrics["loss"])
            batch = Metrics(self.data.num_classes)
            batch.update(logits, label, loss)
            self.epoch_metrics.update(logits, label, loss)
            line = self._line("train", "step", step)
            numbers = {name: float(metrics[name]) for name in STEP_NUMBERS if name in metrics}
            self._record({**line, **batch.compute(), "lr": self.engine.learning_rate(step - 1), **numbers})
            if step % self.steps_per_epoch == 0:
                self._record({**self._line("train", "epoch", step), **self.epoch_metrics.compute()})
                self.epoch_metrics = Metrics(self.data.num_classes)
        self._flush()
        first_nonfinite_step = self.engine.first_nonfinite_step(self.state)
        if first_nonfinite_step is not None:
            self.checkpoints.wait()
            good = self.checkpoints.verified()
            kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint before it"
            raise RunFailedError(
                f"loss or gradient was not finite at step {first_nonfinite_step}; {kept} "
                f"in {self.checkpoints.directory}; try a smaller --lr"
            )

    def _show(self, metrics: dict[str, Any]) -> None:
        accuracy = float((np.asarray(metrics["logits"]).argmax(1) == metrics["label"]).mean())
        epochs = -(-self.total_steps // self.steps_per_epoch)
        epoch = f"{self._epoch(self.step)}/{epochs}"
        speed = self.images_per_second
        self.console.progress(self.step, self.total_steps, epoch, float(metrics["loss"]), accuracy, speed)

    @property
    def images_per_second(self) -> float:
        """Training pictures a second, without compilation, evaluation and checkpoints."""
        clock = self.clock
        return (
            clock.train_steps * self.config.batch_size / clock.train_seconds if clock.train_seconds else 0.0
        )

    def _clock_now(self) -> Clock:
        known = self.clock.processor_seconds is not None
        return dataclasses.replace(
            self.clock,
            wall_seconds=time.monotonic() - self._begun,
            processor_seconds=processor_seconds() - self._processor_begun if known else None,
        )

    def _evaluate(
        self, split: Any, collector: predictions.Collector | None = None
    ) -> dict[str, float] | None:
        """The metrics of every example of a split, each exactly once, or None if a signal came."""
        metrics = Metrics(self.data.num_classes)
        batches = self._readable(split, self.data.eval_batches(split, self.config.eval_batch_size))
        for_engine, for_labels = itertools.tee(batches)
        if self._stop_requested():
            return None
        for logits, batch in zip(self.engine.evaluate(self.state, for_engine), for_labels, strict=True):
            if self._stop_requested():
                return None
            metrics.update(logits, batch["label"])
            if collector is not None:
                collector.update(batch["image"], logits, batch["label"])
        return metrics.compute()

    def _validate(self) -> bool:
        """Validate, and keep the best weights; returns False if a signal came before it was done."""
        if not self.data.val_size:
            return True
        result = self._evaluate("val")
        if result is None:
            return False
        if self.step % self.eval_every == 0:
            self.validations.append((self.step, result["loss"]))
        self._record({**self._line("val", "epoch", self.step), **result})
        self.console.say(f"step {self.step}: validation {_words(result)}")
        if result["loss"] < (self.best["loss"] if self.best else math.inf):  # never so for not-a-number
            self._flush()  # else a kill leaves weights of a step that metrics.jsonl does not have
            if self.best is not None and self.best["step"] <= self._saved_step:  # a checkpoint's best
                self.checkpoints.keep_best(self.run_dir / WEIGHTS["best"], self.best["step"])
            self.best = {"step": self.step, **result}
            self._write_weights(WEIGHTS["best"], self.engine.to_tree(self.state))
        return True

    def _converged(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and has_converged(self.validations, patience)

    def _save(self, *, validation_due: bool = False) -> None:
        run: dict[str, Any] = {
            "history": self.history.sync(),
            "epoch_metrics": self.epoch_metrics.to_json(),
            "best": self.best,
            "clock": dataclasses.asdict(self._clock_now()),
            "identity": self.identity,
        }
        if validation_due:
            run["validation_due"] = True
        self.checkpoints.save(self.step, self.engine.to_tree(self.state), run)
        self._saved_step = self.step

    def _finish(self) -> dict[str, Any] | None:
        """Test the final weights and write them; these lines come after the last checkpoint's history.

        Returns the summary, or None if a signal came during the test.
        """
        collector = predictions.Collector(self.data.test_size) if self.config.test else None
        test = None
        if collector is not None:
            test = self._evaluate("test", collector)
            if test is None:
                return None
        self.checkpoints.wait()  # whoever finds a result finds a checkpoint of its step
        if test is not None:
            self._record({**self._line("test", "epoch", self.step), **test})
        self.history.sync()
        tree = self.engine.to_tree(self.state)
        self._write_weights(WEIGHTS["final"], tree)
        if collector is not None and self.place.is_main:
            collector.finish(self.step, self.data.class_names).save(self.run_dir / predictions.FILE)
        trained, frozen = count_parameters(tree["params"], freeze_backbone=self.config.freeze_backbone)
        clock = self._clock_now()
        return {
            "framework": self.config.framework,
            "model": self.config.model,
            "dataset": self.config.dataset,
            "optimizer": self.config.optimizer,
            "seed": self.config.seed,
            "parameters": trained + frozen,
            "trainable_parameters": trained,
            "frozen_parameters": frozen,
            "steps": self.step,
            "epochs": self.step / self.steps_per_epoch,
            "test": test,
            "best": self.best,
            "images_per_second": self.images_per_second,
            "compile_seconds": clock.compile_seconds,
            "wall_seconds": clock.wall_seconds,
            "processor_seconds": clock.processor_seconds,
        }

    def _write_weights(self, name: str, tree: dict[str, Any]) -> None:
        if not self.place.is_main:
            return
        self.checkpoints.check_folder()
        metadata = {"model": self.config.model, "dataset": self.config.dataset, "step": self.step}
        weights.save(self.run_dir / name, weights.from_tree(tree), metadata)

    def _record(self, line: dict[str, Any]) -> None:
        self.history.append(line)
        if self.events is not None:
            self.events.append(line)

    def _flush(self) -> None:
        self.history.flush()
        if self.events is not None:
            self.events.flush()

    def _line(self, split: str, scope: str, step: int) -> dict[str, Any]:
        return {"split": split, "scope": scope, "step": step, "epoch": self._epoch(step)}

    def _epoch(self, step: int) -> int:
        """The epoch, from 1, that step `step` belongs to."""
        return -(-step // self.steps_per_epoch)

    def _readable(self, part: str, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches. Raises RunFailedError where one cannot be read."""
        with self._reading(part):
            yield from batches

    @contextmanager
    def _reading(self, part: str) -> Iterator[None]:
        """Inside, whatever a reader of data raises becomes a RunFailedError."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            safe = what_is_safe(self.checkpoints, self.run_dir)
            raise RunFailedError(f"{_unreadable(part, error)}; {safe}") from error


def _unreadable(part: str, error: BaseException) -> str:
    """What could not be read: the words of the data's own UserError, also where a reader has wrapped it."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, UserError):
        inner = inner.__cause__ or inner.__context__
    return str(inner) if inner else f"the data ({part}) cannot be read: {_one_line(error)}"


def describe_failure(error: Exception, checkpoints: Checkpoints, run_dir: Path) -> str:
    """Return in one line why a run failed, what is safe, and how to go on."""
    space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, ChildProcessError | BlockingIOError):
        reason = str(error)
    elif isinstance(error, OSError):  # data is read elsewhere
        reason = f"cannot write in {run_dir}: {error}"
    elif isinstance(error, MemoryError):
        reason = f"out of memory ({error})" if str(error) else "out of memory"
    else:
        reason = f"{_one_line(error)}; the traceback is in log.txt"
    return f"{reason}; {what_is_safe(checkpoints, run_dir, 'free disk space, then ' if space else '')}"


def what_is_safe(checkpoints: Checkpoints, run_dir: Path, first: str = "") -> str:
    """Return in words which checkpoints of a run that has failed are verified, and how to go on.

    Args:
        checkpoints: those of the run; a save under way is waited for.
        run_dir: its folder.
        first: what the user must do before.
    """
    with suppress(OSError):  # it is told as the failure, or follows from it
        checkpoints.wait()
    steps = ", ".join(map(str, checkpoints.verified())) or "none"
    how = f"continue with {resume_command(run_dir)}"
    if not (run_dir / "config.json").is_file():
        how = "start the run again"
    return f"verified checkpoints: {steps}; {first}{how}"


def resume_command(run_dir: Path) -> str:
    """Return the command that continues a run."""
    return f"python train.py --resume --run-dir {shlex.quote(str(run_dir))}"


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _words(result: dict[str, float]) -> str:
    return f"loss {result['loss']:.4f}, accuracy {result['accuracy']:.4f}, macro F1 {result['f1']:.4f}"
