"""A run from its options to its summary: resolve, open, restore or begin, fit, conclude."""

import dataclasses
import logging
import re
import shlex
import signal
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

from experiment import processes
from experiment.data import loading
from experiment.data.drop_path import DropPath
from experiment.data.loading import Data
from experiment.engines import Engine, load_engine, set_environment
from experiment.errors import DivergedError, FolderLostError, RunFailedError, UserError
from experiment.files import run_folder
from experiment.files.results import check_startable
from experiment.files.tensorboard import add_images
from experiment.options.config import Config, is_external
from experiment.options.recipes import with_recipe
from experiment.options.resolving import resolve, with_local_paths
from experiment.peers import PATIENCE_SECONDS, Peers
from experiment.processes import SINGLE_PROCESS, connect
from experiment.program import command
from experiment.report import write_report
from experiment.run import external, transfer
from experiment.run.console import Console, conclude, describe
from experiment.run.outcome import (
    End,
    Outcome,
    after_loss,
    describe_failure,
    resume_command,
    what_is_safe,
    where_saved,
)
from experiment.run.output import RunOutput, open_output
from experiment.run.restoring import Start, restore
from experiment.run.schedules import ValidationHistory, Validations, make_schedule
from experiment.run.trainer import Trainer
from experiment.run.transfer import initial_tree
from experiment.run.verification import check_device, open_sentinel


class Session:
    """A start or resume of a run. Its constructor resolves the options; only `run` writes.

    Args:
        given: {field of Config: value}, as `parse` makes them of flags.
        argv: those flags, for config.json.
        join: returns the engine to use in place of the run's, for runs that train together.

    Attributes:
        config: the options.
        stored: the content of config.json; None for a fresh run.
        resolved: what follows from the options and the data.
        data: the splits.
        engine: what computes.
        validations: those that the engine's schedule reads.
        tree: the engine's initial tree with the weights of --init-from; None without them.
        notes: lines for the user, which are logged once there is a log.
        process: which of several processes this is.

    Raises:
        UserError: the run is refused.
    """

    def __init__(self, given: dict[str, Any], argv: list[str], join: Callable[[Engine], Engine]) -> None:
        given = with_local_paths(given)
        self.argv, self.stored = argv, None
        if given.get("resume") and given.get("run_dir"):
            self.stored = run_folder.read_record(Path(given["run_dir"]))
        if self.stored is None:  # a resumed run keeps its options, even if its recipe changed
            given = with_recipe(given)
        self.config = config = resolve(given, self.stored and self.stored["config"])
        if config.run_dir is not None:
            self._check(Path(config.run_dir))
        set_environment(config.framework, deterministic=config.deterministic)
        recorded = self.stored and run_folder.recorded_data(self.stored["resolved"])
        self.peers = self._meet() if config.distributed else None
        data = loading.load(config.dataset, **config.data_options(), recorded=recorded)
        note = self.stored and run_folder.check_same_data(self.stored["resolved"], data)
        self.notes = [*data.notes, *([note] if note else [])]
        self.resolved = resolve_lengths(config, data, self.stored, given)
        self.process = connect(self.peers) if config.distributed else SINGLE_PROCESS
        self.data = dataclasses.replace(data, place=self.process)
        self.validations = ValidationHistory(config.eval_every or data.steps_per_epoch)
        self.engine = join(make_engine(config, self.data, self.resolved, self.validations))
        check_device(config, self.engine)
        if config.drop_path:
            drop_path = DropPath(config.drop_path, self.engine.num_blocks, config.seed)
            self.data = dataclasses.replace(self.data, drop_path=drop_path)
        self.tree = self._initial_tree() if self.stored is None else None

    def run(self) -> Outcome:
        """Open what is written, restore or begin, fit, conclude; return how the run ended.

        Raises:
            UserError: the run is refused, as another process trains in its folder.
        """
        config, is_main = self.config, self.process.is_main
        folder = Path(config.run_dir) if config.run_dir is not None else None
        name = f"{config.model}-{config.dataset}-{config.optimizer}"
        if is_main and self.stored is None:
            folder = run_folder.create(folder, re.sub("[/:]", "-", name))
        with open_output(
            folder, is_main=is_main, keep_checkpoints=config.keep_checkpoints, check=self._check
        ) as output:
            self._inform_peers(output)
            return self._drive(output)

    def _meet(self) -> Peers:
        """Begin to watch the other processes."""
        peers, run_dir = processes.meet(), self.config.run_dir
        peers.advice = lambda news: after_loss(None if run_dir is None else Path(run_dir), news)
        return peers

    def _inform_peers(self, output: RunOutput) -> None:
        """Let the watch over the other processes, if there are any, know where the run is."""
        if self.peers is None:
            return
        self.peers.report = lambda line: output.console.fail(f"the run failed: {line}")
        if output.is_main:
            self.peers.news = lambda: where_saved(output.folder, output.checkpoints)
            self.peers.advice = lambda news: after_loss(output.folder, news, output.checkpoints)

    def _check(self, folder: Path) -> None:
        """Raise UserError if the run cannot begin in `folder`, or config.json has changed."""
        if self.stored is None:
            run_folder.check_fresh(folder)
        elif run_folder.read_record(folder) != self.stored:
            raise UserError(f"--run-dir: another process has trained in {folder} meanwhile; start again")
        else:
            check_startable(folder, self.stored)

    def _drive(self, output: RunOutput) -> Outcome:
        """Restore or begin, fit, conclude; log how the run ended."""
        console, folder = output.console, output.folder
        draws_report = self.config.report and output.is_main
        try:
            identity = run_folder.identity(self.config, self.resolved)
            start = self._restore_or_begin(output, identity)
            options = self._record(output, start)
            arguments_of = partial(engine_arguments, data=self.data, resolved=self.resolved)
            verifying = open_sentinel(self.config, self.data, self.engine, output, start.step, arguments_of)
            writing = output.writing_metrics(start.history, options if draws_report else None)
            with writing, verifying as sentinel:
                trainer = Trainer(
                    config=self.config,
                    data=self.data,
                    engine=self.engine,
                    output=output,
                    validations=self.validations,
                    start=start,
                    total_steps=self.resolved["total_steps"],
                    identity=identity,
                    sentinel=sentinel,
                )
                if self.peers is not None:
                    self.peers.step = lambda: trainer.step
                summary = trainer.fit()
            outcome = _conclude(trainer, summary, output)
            page = write_the_report(folder, trainer.step, console) if draws_report else None
            if page and summary is not None:
                console.report(f"report: {page}")
            return outcome
        except RunFailedError as error:
            processes.fail()
            outcome = _failed(console, error, "")
            if draws_report and not isinstance(error, FolderLostError):
                write_the_report(folder, trainer.step, console)
            return outcome
        except (UserError, BrokenBarrierError):  # the second: another of the runs that train together ended
            raise
        except Exception as error:
            processes.fail(0.0 if isinstance(error, OSError | MemoryError) else PATIENCE_SECONDS)
            if not isinstance(error, OSError | MemoryError):
                console.log(traceback.format_exc())
            return _failed(console, error, describe_failure(error, output.checkpoints, folder))
        except KeyboardInterrupt:  # before the first step, or the second Ctrl-C
            processes.fail()
            reason = f"interrupted at once; {what_is_safe(output.checkpoints, folder)}"
            console.fail(reason, label="")
            return Outcome(End.INTERRUPTED, 128 + signal.SIGINT, reason)

    def _initial_tree(self) -> dict[str, Any] | None:
        return initial_tree(self.engine, self.config, self.resolved, self.notes.append)

    def _restore_or_begin(self, output: RunOutput, identity: dict[str, Any]) -> Start:
        if self.stored is not None:
            total_steps = self.resolved["total_steps"]
            start = restore(self.engine, output, self.validations, total_steps, identity)
            if start is not None:
                return start
        tree = self.tree or self._initial_tree()  # fresh, or killed before its first checkpoint
        return Start(self.engine.init() if tree is None else self.engine.from_tree(tree))

    def _record(self, output: RunOutput, start: Start) -> dict[str, Any]:
        """Write config.json and describe the run; return the options as config.json has them."""
        config = dataclasses.replace(self.config, resume=False, run_dir=None, distributed=False)
        engine, before = self.engine, self.stored["sessions"] if self.stored else []
        newest = run_folder.session(start.step, engine.device, engine.threads, self.argv)
        options = dataclasses.asdict(config)
        record = {"config": options, "resolved": self.resolved, "sessions": [*before, newest]}
        output.write_json("config.json", record)
        describe(record, engine.device, output.folder, output.console)
        change = run_folder.device_change(before, newest)
        for line in [*self.notes, *([change] if change else [])]:
            output.console.report(line)
        return options


def start(
    given: dict[str, Any], argv: list[str], join: Callable[[Engine], Engine] = lambda engine: engine
) -> Outcome:
    """Begin or resume the run of the options that were given; return how it ended. Arguments as of `Session`.

    Raises:
        UserError: the run is refused; what can be refused is refused before the disk is touched.
    """
    for name in ("absl", "asyncio"):  # Orbax logs what we report in a line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        outcome = Session(given, argv, join).run()
    except (UserError, OSError, MemoryError, KeyboardInterrupt):
        processes.fail()
        raise
    except Exception:
        processes.fail(PATIENCE_SECONDS)
        raise
    if outcome.end in (End.COMPLETED, End.STOPPED):
        processes.done()
    return outcome


def _conclude(trainer: Trainer, summary: dict[str, Any] | None, output: RunOutput) -> Outcome:
    """Write the summary, or log which signal stopped the run."""
    if summary is not None:
        if output.is_main:
            output.check_folder()
        output.write_json("summary.json", summary)
        conclude(summary, output.folder, output.console)
        return Outcome(End.COMPLETED, 0)
    number = trainer.stop.signal
    assert number is not None
    reason = (
        f"stopped by {number.name} at step {trainer.step}; everything is saved: "
        f"continue with {resume_command(output.folder)}"
    )
    output.console.report(reason)
    return Outcome(End.STOPPED, 128 + number, reason)


def _failed(console: Console, error: Exception, reason: str) -> Outcome:
    reason = f"the run failed: {reason or error}"
    console.fail(reason)
    return Outcome(End.DIVERGED if isinstance(error, DivergedError) else End.FAILED, 1, reason)


def write_the_report(run_dir: Path, step: int, console: Console) -> Path | None:
    """Write the report; return the page. Whatever goes wrong with it, the run itself is done and saved."""
    try:
        page, images = write_report(run_dir)
        add_images(run_dir, {name: image.png for name, image in images.items()}, step)
        return page
    except Exception as error:  # of a library that draws
        console.report(
            f"the run is saved, but its report could not be made ({type(error).__name__}: {error}); "
            f"try {command('report')} {shlex.quote(str(run_dir))}"
        )
        return None


def resolve_lengths(
    config: Config, data: Data, stored: dict[str, Any] | None, given: dict[str, Any]
) -> dict[str, Any]:
    """Return what follows from the options and the data together, for config.json.

    Raises UserError if a resumed run would change the length of its schedule without --schedule-steps.
    """
    total_steps = config.total_steps(data.steps_per_epoch)
    length = config.schedule_steps or total_steps
    if stored is not None:
        external.check_unchanged(config.optimizer, stored["resolved"])
        old = stored["resolved"]["schedule_steps"]
        if old != length and "schedule_steps" in given:
            raise UserError(
                f"--schedule-steps: the run has {old}, not {length}; leave the flag out, or start a fresh run"
            )
        if old != length and config.schedule == "cosine":
            flag = "--steps" if "steps" in given else "--epochs"
            raise UserError(
                f"{flag}: would change the cosine schedule's length from {old} to {length} steps; "
                f"add --schedule-steps {old} to keep it"
            )
        length = old
    initial = transfer.identity(config.init_from) if stored is None else transfer.recorded(stored["resolved"])
    warmup = min(data.steps_per_epoch, length // 10) if config.warmup_steps is None else config.warmup_steps
    if config.schedule == "cosine" and config.warmup_steps and warmup >= length > 0:
        raise UserError(
            f"--warmup-steps: {warmup} leaves nothing of the cosine schedule's {length} steps; give fewer"
        )
    return {
        "total_steps": total_steps,
        "steps_per_epoch": data.steps_per_epoch,
        "schedule_steps": length,
        "warmup_steps": warmup,
        "optimizer_options": config.optimizer_options(),
        **({"class_weights": list(data.class_weights())} if config.class_weights == "balanced" else {}),
        **initial,
        **external.identity(config.optimizer),
        **run_folder.data_facts(data),
    }


def engine_arguments(config: Config, data: Data, resolved: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a run's engine, without its schedule: plain values."""
    options = resolved["optimizer_options"]
    return {
        **config.engine_options(),
        **{name: getattr(data, name) for name in run_folder.ENGINE_FACTS},
        "optimizer": config.optimizer,
        "optimizer_options": config.external_arguments() if is_external(config.optimizer) else options,
        "freeze_backbone": config.freeze_backbone,
        "class_weights": resolved.get("class_weights"),
    }


def make_engine(
    config: Config, data: Data, resolved: dict[str, Any], validations: Validations = ()
) -> Engine:
    """Return the engine of a run. Raises UserError for a batch that the devices cannot share."""
    config.check_batch_norm(*data.image_shape[:2])
    schedule = make_schedule(
        config.schedule,
        resolved["optimizer_options"]["base_lr"],
        length=resolved["schedule_steps"],
        milestones=config.milestones,
        factor=config.decay_factor,
        patience=config.patience,
        cooldown=config.cooldown,
        validations=validations,
        warmup_steps=resolved["warmup_steps"],
    )
    arguments = engine_arguments(config, data, resolved)
    try:
        engine = load_engine(config.framework)(**arguments, learning_rate=schedule)
    except ValueError as error:
        if not is_external(config.optimizer):
            raise
        raise UserError(f"--optimizer: {error}; fix it, or choose another") from None
    if config.batch_size // config.accumulate % engine.device_count:
        parts = f" in {config.accumulate} micro-batches" if config.accumulate > 1 else ""
        raise UserError(
            f"--batch-size: {config.batch_size}{parts} is no multiple of the {engine.device_count} devices"
        )
    return engine
