"""Train a ResNet with JAX or with NumPy.

    python train.py                                             # ResNet-101 on handwritten digits, Adam
    python train.py --optimizer adabound --seed 1
    python train.py --framework numpy                           # the same, from scratch in NumPy
    python train.py --dataset mnist --data-dir DIR --model resnet18 --epochs 1
    python train.py --recipe cifar10-resnet20 --data-dir DIR    # the options of recipes/cifar10-resnet20.toml
    python train.py --run-dir runs/mine --resume                # continue, bit for bit

Everything the run writes is under --run-dir: config.json, metrics.jsonl, summary.json, weights, checkpoints,
report/index.html and TensorBoard files. Exit status: 0 done; 1 the run failed, and what was saved is named;
2 a mistake in the flags; 128 + n a signal.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from threading import BrokenBarrierError
from typing import TYPE_CHECKING, Any

from experiment.engines import Engine, load_engine, set_environment
from experiment.errors import FolderLostError, RunFailedError, UserError
from experiment.files import run_folder
from experiment.files.results import check_startable
from experiment.options.config import Config, parse, refuse_unused, resolve, with_local_paths
from experiment.options.recipes import with_recipe
from experiment.processes import SINGLE_PROCESS, connect
from experiment.run.console import prepare_streams, release_streams
from experiment.run.schedules import make_schedule
from experiment.run.transfer import initial_tree, sha256

if TYPE_CHECKING:
    from experiment.data.loading import Data
    from experiment.run.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    # JAX and the tracing of a network make a million objects, which stay. To go through them for garbage
    # again and again takes a tenth of the time to the first step.
    gc.set_threshold(100_000)
    prepare_streams()
    try:
        given = parse(argv)
        if not given.get("resume"):
            refuse_unused(given, resolve(with_recipe(given)))
        return start(given, list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except (OSError, MemoryError) as error:
        print(f"train.py: error: {str(error) or 'out of memory'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the folder of the run was opened
        print("train.py: interrupted before the run began", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        release_streams()


def start(
    given: dict[str, Any], argv: list[str], join: Callable[[Engine], Engine] = lambda engine: engine
) -> int:
    """Begin or resume the run of the options that were given; returns the exit status. Raises UserError.

    Args:
        given: {field of Config: value}, as `experiment.options.config.parse` makes them of flags.
        argv: those flags, for config.json.
        join: gives the engine to use in place of the run's own, for runs that train together.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what we report in a line
    given = with_local_paths(given)
    stored = None
    if given.get("resume") and given.get("run_dir"):
        stored = run_folder.read_record(Path(given["run_dir"]))
    if stored is None:  # a resumed run has its options, whatever has become of the recipe
        given = with_recipe(given)
    config = resolve(given, stored and stored["config"])
    if config.run_dir is not None:
        check_folder(Path(config.run_dir), stored)
    return run(config, stored, given, argv, join)


def check_folder(run_dir: Path, stored: dict[str, Any] | None) -> None:
    """Raise UserError if a run cannot begin in `run_dir`, or continue where config.json held `stored`."""
    if stored is None:
        run_folder.check_fresh(run_dir)
    elif run_folder.read_record(run_dir) != stored:
        raise UserError(f"--run-dir: another process has trained in {run_dir} meanwhile; start again")
    else:
        check_startable(run_dir, stored)


def run(
    config: Config,
    stored: dict[str, Any] | None,
    given: dict[str, Any],
    argv: list[str],
    join: Callable[[Engine], Engine],
) -> int:
    """Train or resume by a checked config; what can be refused is refused before the disk is touched."""
    set_environment(config.framework, deterministic=config.deterministic)
    from experiment.data import loading as data_module
    from experiment.files.checkpoints import Checkpoints
    from experiment.run.console import Console, conclude, describe
    from experiment.run.trainer import (
        Trainer,
        begin,
        describe_failure,
        restore,
        resume_command,
        what_is_safe,
    )

    data = data_module.load(config.dataset, **config.data_options())
    note = run_folder.check_same_data(stored["resolved"], data) if stored is not None else None
    resolved = resolve_lengths(config, data, stored, given)
    place = connect() if config.distributed else SINGLE_PROCESS
    data = dataclasses.replace(data, place=place)
    validations: list[tuple[int, float]] = []  # what a plateau is seen in
    engine = join(make_engine(config, data, resolved, validations))
    said = [note] if note else []
    tree = initial_tree(engine, config, resolved, said.append) if stored is None else None
    run_dir = Path(config.run_dir or os.devnull)  # of those that write nothing
    if place.is_main and stored is None:
        name = f"{config.model}-{config.dataset}-{config.optimizer}"
        run_dir = run_folder.create(Path(config.run_dir) if config.run_dir else None, name)
    with run_folder.lock(run_dir) if place.is_main else nullcontext(lambda: None) as check_lock:
        if place.is_main:
            check_folder(run_dir, stored)  # another process may have trained there since the first check
        console = Console(run_dir / "log.txt") if place.is_main else Console(stream=io.StringIO())
        checkpoints = Checkpoints(
            *(run_dir / "checkpoints", config.keep_checkpoints),
            writes=place.is_main,
            check_folder=check_lock,
            report=console.say,
        )
        try:
            start, identity = None, run_folder.identity(config, resolved)
            if stored is not None:
                start = restore(engine, checkpoints, run_dir, resolved["total_steps"], console, identity)
            if start is None:  # fresh, or killed before its first checkpoint
                start = begin(engine, tree or initial_tree(engine, config, resolved, said.append))
            session = run_folder.session(start.step, engine.device, argv)
            sessions = [*(stored["sessions"] if stored else []), session]
            config = dataclasses.replace(config, resume=False, run_dir=None, distributed=False)
            record = {"config": dataclasses.asdict(config), "resolved": resolved, "sessions": sessions}
            if place.is_main:
                run_folder.write_json(run_dir / "config.json", record)
            else:
                config = dataclasses.replace(config, report=False)
            describe(record, engine.device, run_dir, console)
            for line in said:
                console.say(line)
            trainer = Trainer(
                *(config, data, engine, run_dir, checkpoints, console, resolved["total_steps"]),
                validations,
                identity,
                place,
            )
            summary = trainer.fit(start)
            if summary is None:
                assert trainer.stopped_by is not None
                console.say(
                    f"stopped by {trainer.stopped_by.name} at step {trainer.step}; everything is saved: "
                    f"continue with {resume_command(run_dir)}"
                )
                report(config, run_dir, trainer.step, console)
                return 128 + trainer.stopped_by
            if place.is_main:
                check_lock()
                run_folder.write_json(run_dir / "summary.json", summary)
            conclude(summary, run_dir, console)
            if page := report(config, run_dir, trainer.step, console):
                console.say(f"report: {page}")
            return 0
        except RunFailedError as error:
            console.fail(f"the run failed: {error}")
            if not isinstance(error, FolderLostError):
                report(config, run_dir, trainer.step, console)
            return 1
        except (UserError, BrokenBarrierError):  # the second: another of the runs that train together ended
            raise
        except Exception as error:
            if not isinstance(error, OSError | MemoryError):
                console.log(traceback.format_exc())
            console.fail(f"the run failed: {describe_failure(error, checkpoints, run_dir)}")
            return 1
        except KeyboardInterrupt:  # before the first step, or the second Ctrl-C
            console.fail(f"interrupted at once; {what_is_safe(checkpoints, run_dir)}", label="")
            return 128 + signal.SIGINT
        finally:
            with suppress(OSError):  # told already
                checkpoints.close()
            console.close()


def report(config: Config, run_dir: Path, step: int, console: Console) -> Path | None:
    """Write the report; returns the page. Whatever goes wrong with it, the run itself is done and saved."""
    if not config.report:
        return None
    from experiment.files.tensorboard import add_pictures
    from experiment.report import write_report

    try:
        page, pictures = write_report(run_dir)
        add_pictures(run_dir, {name: picture.png for name, picture in pictures.items()}, step)
        return page
    except Exception as error:  # of a library that draws
        console.say(
            f"the run is saved, but its report could not be made ({type(error).__name__}: {error}); "
            f"try python -m experiment report {shlex.quote(str(run_dir))}"
        )
        return None


def resolve_lengths(
    config: Config, data: Data, stored: dict[str, Any] | None, given: dict[str, Any]
) -> dict[str, Any]:
    """What follows from the options and the data together; kept in config.json.

    Raises UserError if a resumed run would change the length of its schedule without saying so.
    """
    total_steps = config.total_steps(data.steps_per_epoch)
    length = config.schedule_steps or total_steps
    if stored is not None:
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
    initial = stored["resolved"].get("init_from_sha256") if stored else sha256(config.init_from)
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
        "init_from_sha256": initial,
        **run_folder.data_facts(data),
    }


def make_engine(
    config: Config, data: Data, resolved: dict[str, Any], validations: Sequence[tuple[int, float]] = ()
) -> Engine:
    """The engine of a run. Raises UserError for a batch that the devices cannot share."""
    config.check_pictures(*data.image_shape[:2])
    memory = {"accumulate": config.accumulate, "remat": config.remat} if config.framework == "jax" else {}
    engine = load_engine(config.framework)(
        model=config.model,
        model_options=config.model_options(),
        num_classes=data.num_classes,
        image_shape=data.image_shape,
        mean=data.mean,
        std=data.std,
        optimizer=config.optimizer,
        optimizer_options=resolved["optimizer_options"],
        learning_rate=make_schedule(
            config.schedule,
            resolved["optimizer_options"]["base_lr"],
            length=resolved["schedule_steps"],
            milestones=config.milestones,
            factor=config.decay_factor,
            patience=config.patience,
            cooldown=config.cooldown,
            validations=validations,
            warmup_steps=resolved["warmup_steps"],
        ),
        precision=config.precision,
        seed=config.seed,
        freeze_backbone=config.freeze_backbone,
        **memory,
    )
    if config.batch_size // config.accumulate % engine.device_count:
        parts = f" in {config.accumulate} micro-batches" if config.accumulate > 1 else ""
        raise UserError(
            f"--batch-size: {config.batch_size}{parts} is no multiple of the {engine.device_count} devices"
        )
    return engine
