"""The output of a run on the terminal: lines, kept in log.txt too, and a progress bar."""

import errno
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from experiment import program
from experiment.errors import UserError, printable
from experiment.reading import open_no_link

PLAIN_LINE_SECONDS = 5.0
OF_A_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a path that a user gave: no file can have it."""


def prepare_streams() -> None:
    """Make the standard streams safe to print to.

    A closed stream (`>&-`) is replaced by the null device, so that no file opened later takes its file
    descriptor. Characters that a stream's encoding lacks, and file names that are not valid text, are printed
    as escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, mode)  # noqa: SIM115 - lasts as long as the process
            setattr(sys, name, stream)
        if mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def release_streams() -> None:
    """Flush the standard streams; drop output whose reader has gone, where Python would print an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def exit_status(command: Callable[[], int], name: str = "", interrupted: str = "interrupted") -> int:
    """Run a command; return its exit status: 0, 2 for a user's mistake, 1 for a failure of the system.

    Mistakes and failures are one line on stderr, after `name`. The status is 141 if the reader of the output
    has gone (`| head`), 130 if the command was interrupted.
    """
    prepare_streams()
    try:
        return command()
    except UserError as error:
        print(f"{name}error: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except (OSError, MemoryError) as error:
        print(f"{name}error: {printable(str(error)) or 'out of memory'}", file=sys.stderr)
        return 2 if isinstance(error, OSError) and error.errno in OF_A_NAME else 1
    except KeyboardInterrupt:
        print(f"{name}{interrupted}", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        release_streams()


class Console:
    """Lines on `stream` and in a log; on a terminal a bar with loss, accuracy, images/s and time left."""

    def __init__(self, log: Path | None = None, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._log: TextIO | None = None  # closed by close()
        if log:
            self._log = open(  # noqa: SIM115
                log, "a", encoding="utf-8", errors="backslashreplace", opener=open_no_link
            )
        if self._log and _same_file(self._stream, self._log):  # `> RUN/log.txt`: it has the lines already
            self._stream = open(os.devnull, "w")  # noqa: SIM115 - as long as the console
        self._bar: Any = None
        self._terminal = _is_terminal(self._stream)
        self._last_line = 0.0

    def report(self, text: str) -> None:
        """Print and log a line, above the bar. Ignore a terminal that is gone and a full disk."""
        text = printable(text)
        with suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            else:
                print(text, file=self._stream, flush=True)
        self.log(text)

    def fail(self, text: str, label: str = "error: ") -> None:
        """The last line of a run that failed or was interrupted: on stderr after a label, and in the log."""
        self.stop()
        text = printable(text)
        with suppress(OSError, ValueError):
            print(f"{program.label()}{label}{text}", file=sys.stderr)
        self.log(text)

    def log(self, text: str) -> None:
        """One line in the log alone."""
        if self._log:
            with suppress(OSError, ValueError):
                self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
                self._log.flush()

    def start(self, done: int, total: int, batch_size: int) -> None:
        """Show a bar over `total` steps of which `done` are done."""
        from tqdm import tqdm

        self._batch_size = batch_size
        self._bar = tqdm(
            total=total * batch_size,
            initial=done * batch_size,
            unit=" images",
            unit_scale=True,
            file=self._stream,
            disable=not self._terminal,
            dynamic_ncols=True,
            smoothing=0.1,
        )

    def progress(self, step: int, total: int, epoch: str, loss: float, accuracy: float, speed: float) -> None:
        """Move the bar to `step`; without a terminal, a plain line every few seconds."""
        if self._terminal:
            self._bar.set_description(f"epoch {epoch}")
            self._bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.3f}", refresh=False)
            self._bar.update(step * self._batch_size - self._bar.n)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS or step == total:
            self._last_line = time.monotonic()
            left = (total - step) * self._batch_size / speed if speed else 0.0
            self.report(
                f"step {step}/{total}, epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.3f}, "
                f"{speed:.0f} images/s, {left:.0f} s left"
            )

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Take the bar away and close the log."""
        self.stop()
        if self._log:
            with suppress(OSError):
                self._log.close()


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # an object with `write` alone; a closed file
        return False


def _same_file(one: TextIO, other: TextIO) -> bool:
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except (AttributeError, OSError, ValueError):  # a stream without a file
        return False


def describe(record: dict[str, Any], device: str, run_dir: Path, console: Console) -> None:
    """Report what will be trained; `record` is the content of config.json."""
    config, resolved = record["config"], record["resolved"]
    height, width, channels = resolved["image_shape"]
    console.report(
        f"{config['model']} on {config['dataset']}: {resolved['train_size']} training, "
        f"{resolved['val_size']} validation and {resolved['test_size']} test images "
        f"of {height}x{width}x{channels}, {resolved['num_classes']} classes"
    )
    console.report(
        f"{config['optimizer']}, learning rate {config['lr']:g} ({config['schedule']}, "
        f"{resolved['warmup_steps']} steps of warm-up), batch {config['batch_size']}, "
        f"{resolved['total_steps']} steps of {resolved['steps_per_epoch']} an epoch"
    )
    console.report(f"{config['framework']}, {config['precision']}, on {device}; everything goes to {run_dir}")


def conclude(summary: dict[str, Any], run_dir: Path, console: Console) -> None:
    """Say what was learned and where it is; `summary` is what summary.json holds."""
    test, best, frozen = summary["test"], summary["best"], summary["frozen_parameters"]
    count = f"{summary['parameters']:,} parameters" + (f", {frozen:,} of them frozen," if frozen else "")
    result = "the test set was not evaluated (--no-test)"
    if test:
        words = "test: accuracy {accuracy:.4f}, macro F1 {f1:.4f}, top-5 {top5:.4f}, loss {loss:.4f}"
        result = words.format(**test)
    console.report(
        f"{result}; {count} after {summary['steps']} steps, "
        f"{summary['images_per_second']:.0f} images/s, {summary['wall_seconds']:.0f} s"
    )
    if best:
        words = "best on validation: accuracy {accuracy:.4f}, loss {loss:.4f} at step {step}"
        console.report(words.format(**best))
    console.report(f"weights, metrics, summary and checkpoints are in {run_dir}")
