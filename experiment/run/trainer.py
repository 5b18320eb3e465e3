"""Drive an engine's loop: everything that is the same for every engine.

Metrics, validation, checkpoints, signals and the watch for numbers that are not finite are here, once.
Results depend on the options, the data and the step alone. Only the times that a run records depend on the
clock.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from experiment.data.loading import Data
from experiment.engines import Engine, caches_compilation
from experiment.errors import DivergedError, RunFailedError
from experiment.files.metrics_log import GRADIENT_NORM
from experiment.files.predictions import Collector
from experiment.files.results import WEIGHTS
from experiment.metrics import Metrics
from experiment.options.config import Config
from experiment.run.outcome import describe_unreadable, what_is_safe
from experiment.run.output import RunOutput
from experiment.run.restoring import Start
from experiment.run.schedules import ValidationHistory, has_converged
from experiment.run.sentinel import Sentinel
from experiment.run.signals import StopSignal
from experiment.run.timing import Timer
from experiment.run.transfer import count_parameters

# Per-step metrics besides loss and logits; the last four exist for AdaBound and its variants alone.
STEP_METRICS = ("grad_norm", "update_norm", "lower_bound", "upper_bound", "at_lower", "at_upper")
IN_SUMMARY = ("framework", "model", "dataset", "optimizer", "seed")
TIMES_IN_SUMMARY = ("compile_seconds", "wall_seconds", "processor_seconds")


@dataclasses.dataclass(kw_only=True, eq=False)
class Trainer:
    """Train from a start to the last step.

    Args:
        config: the run's options.
        data: the splits.
        engine: what computes.
        output: where everything is written; its `metrics` are open.
        validations: those so far, which the engine's schedule reads; later ones are added here.
        start: where the run starts.
        total_steps: the last step.
        identity: what a resumed run may not change, for its checkpoints.
        sentinel: verifies steps; None for none.

    Attributes:
        step: the last step that was taken.
        stop: its `signal` is the one that stopped the run, or None.
    """

    config: Config
    data: Data
    engine: Engine
    output: RunOutput
    validations: ValidationHistory
    start: Start
    total_steps: int
    identity: dict[str, Any]
    sentinel: Sentinel | None = None

    def __post_init__(self) -> None:
        config, engine, output, start = self.config, self.engine, self.output, self.start
        self.console, self.checkpoints, self.log = output.console, output.checkpoints, output.metrics
        self.steps_per_epoch = self.data.steps_per_epoch
        self.checkpoint_every = config.checkpoint_every or self.steps_per_epoch
        self.eval_every = config.eval_every or self.steps_per_epoch
        self.stop = StopSignal(engine.all_reduce_max, config.log_every if engine.is_synchronized else 1)
        self.timer = Timer(start.clock)
        self.state, self.step, self.best = start.state, start.step, start.best
        self.epoch_metrics = Metrics(self.data.num_classes)
        if start.epoch_metrics:
            self.epoch_metrics = Metrics.from_json(start.epoch_metrics)
        self._saved_step = start.step

    def fit(self) -> dict[str, Any] | None:
        """Train, then test unless `config.test` is off; return the summary, or None if a signal stopped the
        run before its end.

        Raises:
            RunFailedError: data cannot be read; DivergedError: a loss or gradient is not finite;
                WrongStepError: the sentinel found a wrong step.
            OSError: the disk is full.
        """
        with self.stop.listen():
            if self.config.init_from is not None and not self.start.history:
                self._save()  # so that a resumed run does not need the --init-from file
            self._train()
            if self.sentinel:
                self.sentinel.finish(self.state, self.stop.requested)
            if self.stop.signal is None and self._converged():
                self.console.report(
                    f"step {self.step}: no better validation loss for "
                    f"{self.config.early_stopping_patience} validations, the run ends early"
                )
            summary = self._finish() if self.stop.signal is None else None
            self.checkpoints.wait()
            return summary

    def _train(self) -> None:
        if self.stop.requested() or (self.start.validation_due and not self._validate()):
            return
        remaining = max(self.total_steps - self.step, 0)
        if not remaining or self._converged():
            return
        cache = "the next start finds it in the cache" if caches_compilation() else "no cache keeps it"
        compiling = f"compiling the training step of {self.config.model}: no progress is shown; {cache}"
        self.console.report(compiling if self.engine.compiles else "taking the first step")
        batches: Iterator[Any] = itertools.islice(self._batches(self.step), remaining)
        if self.sentinel:
            batches = self.sentinel.watch(batches, self.step)
            self.sentinel.before_next(self.step, self.state)
        pending: list[tuple[int, dict[str, Any]]] = []
        self.timer.resume()
        for state, metrics in self.engine.train(self.state, batches, self._needs_state):
            self.step += 1
            pending.append((self.step, metrics))
            if self.timer.awaits_first_step:
                float(metrics["loss"])  # waits for the device
                self.console.report(f"first step after {self.timer.first_step():.1f} s")
                self.console.start(self.step, self.total_steps, self.config.batch_size)
                self.timer.resume()
            else:
                self.timer.count_step()
            if state is None:  # more steps follow in the same call of the compiled function
                continue
            self.state = state
            self.timer.end_call()
            if not (self.stop.requested_at(self.step) or self._needs_state(self.step)):
                continue
            self._drain(pending)
            self.timer.pause()
            self._show(pending[-1][1])
            if self.sentinel:
                self.sentinel.after(self.step, self.state, pending[-1][1])
            pending.clear()
            if self._validate_and_save():
                break
            if self.sentinel:
                self.sentinel.before_next(self.step, self.state)
            self.timer.resume()
        self.console.stop()

    def _validate_and_save(self) -> bool:
        """Validate and save if a step calls for it; return True if the run ends with this step."""
        last = self.step == self.total_steps
        due = last or self.step % self.eval_every == 0
        validated = self._validate() if due else True
        converged = self._converged()
        if not (last or converged or self.step % self.checkpoint_every == 0 or self.stop.signal is not None):
            return False
        self._save(validation_due=not validated)
        stop = self.stop.requested()  # a signal may have come while `_save` waited for the previous save
        return stop or converged

    def _batches(self, start_step: int) -> Iterator[Any]:
        """Training batches; for an engine that holds the images, their indices and draws."""
        with self._reading("train"):
            whole = self.data.held() if self.engine.holds_images else None
        if whole is None:
            return self._readable("train", self.data.train_batches(start_step))
        self.engine.hold(whole["image"], self.data.augmentation.fill)
        return self._readable("train", self.data.train_draws(whole["label"], start_step))

    def _needs_state(self, step: int) -> bool:
        """True if the trainer must validate, save, log or verify after a step."""
        intervals = (self.eval_every, self.checkpoint_every, self.steps_per_epoch, self.config.log_every)
        if self.sentinel and self.sentinel.needs_state(step):
            return True
        return step == self.total_steps or any(step % interval == 0 for interval in intervals)

    def _drain(self, pending: list[tuple[int, dict[str, Any]]]) -> None:
        """Write the lines of steps whose metrics are still on the device; stop if one is not finite."""
        for step, metrics in pending:
            logits, label, loss = np.asarray(metrics["logits"]), metrics["label"], float(metrics["loss"])
            batch = Metrics(self.data.num_classes)
            batch.update(logits, label, loss)
            self.epoch_metrics.update(logits, label, loss)
            line = self._line("train", "step", step)
            names = [name for name in STEP_METRICS if name in metrics]
            names += sorted(name for name in metrics if name.startswith(GRADIENT_NORM))
            numbers = {name: float(metrics[name]) for name in names}
            self.log.append({**line, **batch.compute(), "lr": self.engine.learning_rate(step - 1), **numbers})
            if step % self.steps_per_epoch == 0:
                self.log.append({**self._line("train", "epoch", step), **self.epoch_metrics.compute()})
                self.epoch_metrics = Metrics(self.data.num_classes)
        self.log.flush()
        if (first_nonfinite_step := self.engine.first_nonfinite_step(self.state)) is not None:
            self.checkpoints.wait()
            good = self.checkpoints.verified()
            kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint before it"
            raise DivergedError(
                f"loss or gradient was not finite at step {first_nonfinite_step}; {kept} "
                f"in {self.checkpoints.directory}; try a smaller --lr"
            )

    def _show(self, metrics: dict[str, Any]) -> None:
        accuracy = float((np.asarray(metrics["logits"]).argmax(1) == metrics["label"]).mean())
        epoch = f"{self._epoch(self.step)}/{self._epoch(self.total_steps)}"
        speed = self.timer.images_per_second(self.config.batch_size)
        self.console.progress(self.step, self.total_steps, epoch, float(metrics["loss"]), accuracy, speed)

    def _evaluate(self, split: Any, collector: Collector | None = None) -> dict[str, float] | None:
        """Return the metrics of a split, every example counted once, or None if a signal came."""
        metrics = Metrics(self.data.num_classes)
        batches = self._readable(split, self.data.eval_batches(split, self.config.eval_batch_size))
        for_engine, for_labels = itertools.tee(batches)
        if self.stop.requested():
            return None
        for logits, batch in zip(self.engine.evaluate(self.state, for_engine), for_labels, strict=True):
            if self.stop.requested():
                return None
            metrics.update(logits, batch["label"])
            if collector is not None:
                collector.update(batch["image"], logits, batch["label"])
        return metrics.compute()

    def _validate(self) -> bool:
        """Validate, and save the best weights; return False if a signal came before it was done."""
        if not self.data.val_size:
            return True
        result = self._evaluate("val")
        if result is None:
            return False
        self.validations.add(self.step, result["loss"])
        self.log.append({**self._line("val", "epoch", self.step), **result})
        words = "loss {loss:.4f}, accuracy {accuracy:.4f}, macro F1 {f1:.4f}".format(**result)
        self.console.report(f"step {self.step}: validation {words}")
        if result["loss"] < (self.best["loss"] if self.best else math.inf):  # never so for NaN
            self.log.flush()  # else a kill could leave weights of a step not in metrics.jsonl
            if self.best is not None and self.best["step"] <= self._saved_step:  # a checkpoint's best
                self.checkpoints.keep_best(self.output.folder / WEIGHTS["best"], self.best["step"])
            self.best = {"step": self.step, **result}
            self._write_weights(WEIGHTS["best"], self.engine.to_tree(self.state))
        return True

    def _converged(self) -> bool:
        return has_converged(self.validations, self.config.early_stopping_patience)

    def _save(self, *, validation_due: bool = False) -> None:
        run: dict[str, Any] = {
            "history": self.log.sync(),
            "epoch_metrics": self.epoch_metrics.to_json(),
            "best": self.best,
            "clock": dataclasses.asdict(self.timer.now()),
            "identity": self.identity,
        }
        if validation_due:
            run["validation_due"] = True
        self.checkpoints.save(self.step, self.engine.to_tree(self.state), run)
        self._saved_step = self.step

    def _finish(self) -> dict[str, Any] | None:
        """Test the final weights and write them; these lines come after the last checkpoint's history.

        Return the summary, or None if a signal came during the test.
        """
        collector, test = Collector(self.data.test_size), None
        if self.config.test:
            test = self._evaluate("test", collector)
            if test is None:
                return None
        self.checkpoints.wait()  # a checkpoint of this step must exist before its results do
        if test is not None:
            self.log.append({**self._line("test", "epoch", self.step), **test})
        self.log.sync()
        tree = self.engine.to_tree(self.state)
        self._write_weights(WEIGHTS["final"], tree)
        if test is not None:
            self.output.write_predictions(collector.finish(self.step, self.data.class_names))
        trained, frozen = count_parameters(tree["params"], freeze_backbone=self.config.freeze_backbone)
        clock = self.timer.now()
        return {
            **{name: getattr(self.config, name) for name in IN_SUMMARY},
            "parameters": trained + frozen,
            "trainable_parameters": trained,
            "frozen_parameters": frozen,
            "steps": self.step,
            "epochs": self.step / self.steps_per_epoch,
            "test": test,
            "best": self.best,
            "images_per_second": self.timer.images_per_second(self.config.batch_size),
            **{name: getattr(clock, name) for name in TIMES_IN_SUMMARY},
        }

    def _write_weights(self, name: str, tree: dict[str, Any]) -> None:
        metadata: dict[str, Any] = {
            "model": self.config.model,
            "dataset": self.config.dataset,
            "step": self.step,
        }
        # without the file that the run began from, which is of one machine
        metadata["identity"] = {
            name: value for name, value in self.identity.items() if not name.startswith("init_from")
        }
        self.output.write_weights(name, tree, metadata)

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
        """Context that turns exceptions of a data reader, except MemoryError, into RunFailedError."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            safe = what_is_safe(self.checkpoints, self.output.folder)
            raise RunFailedError(f"{describe_unreadable(part, error)}; {safe}") from error
