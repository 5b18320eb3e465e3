"""Everything that a run holds open and writes to, opened and closed here."""

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.files import run_folder, weights
from experiment.files.checkpoints import Checkpoints
from experiment.files.metrics_log import NAME, Line, MetricsLog
from experiment.files.predictions import FILE, Predictions
from experiment.files.tensorboard import EventFile
from experiment.run.console import Console


class MetricsWriter:
    """Writes lines of metrics to all its writers. Without one, in a process that is not main, to none."""

    def __init__(self, log: MetricsLog | None = None, events: EventFile | None = None) -> None:
        self._log = log
        self._writers = [writer for writer in (log, events) if writer is not None]

    def append(self, line: Line) -> None:
        """Write one line."""
        for writer in self._writers:
            writer.append(line)

    def flush(self) -> None:
        """Hand the lines to the operating system, so that a reader sees them."""
        for writer in self._writers:
            writer.flush()

    def sync(self) -> dict[str, Any]:
        """Bring the lines to the disk; return {"length", "sha256"} of metrics.jsonl for a checkpoint."""
        return {} if self._log is None else self._log.sync()


@dataclass
class RunOutput:
    """The folder of a run while this process trains in it.

    Attributes:
        folder: where it is; the null device where this process writes nothing.
        is_main: True if this process writes.
        check_folder: raises FolderLostError if the folder is no longer the one that was locked.
        console: what the user sees.
        checkpoints: those of the run.
        metrics: where metrics go: nowhere outside of `writing_metrics`.
    """

    folder: Path
    is_main: bool
    check_folder: Callable[[], None]
    console: Console
    checkpoints: Checkpoints
    metrics: MetricsWriter

    @contextmanager
    def writing_metrics(
        self, position: Mapping[str, Any], options: Mapping[str, Any] | None
    ) -> Iterator[None]:
        """Context in which `metrics` writes, after the start of metrics.jsonl that a checkpoint refers to.

        Args:
            position: {"length", "sha256"} of that start, as `sync` returned them; empty for a fresh run.
            options: the run's options, for the TensorBoard file; None to write no such file.
        """
        with ExitStack() as stack:
            stack.callback(self.console.stop)
            if self.is_main:
                log = stack.enter_context(closing(MetricsLog(self.folder / NAME, **position)))
                events = EventFile(self.folder, options) if options is not None else None
                self.metrics = MetricsWriter(log, stack.enter_context(closing(events)) if events else None)
            yield

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        if self.is_main:
            run_folder.write_json(self.folder / name, value)

    def write_weights(self, name: str, tree: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Write the weights of a checkpoint tree, whole or not at all."""
        if self.is_main:
            self.check_folder()
            weights.save(self.folder / name, weights.from_tree(tree), metadata)

    def write_predictions(self, predictions: Predictions) -> None:
        """Write predictions.npz, whole or not at all."""
        if self.is_main:
            predictions.save(self.folder / FILE)


@contextmanager
def open_output(
    folder: Path | None, *, is_main: bool, keep_checkpoints: int, check: Callable[[Path], None]
) -> Iterator[RunOutput]:
    """Lock the folder of a run, and open its log and its checkpoints.

    Args:
        folder: where the run is; None where this process writes nothing and need not know.
        is_main: True if this process writes.
        keep_checkpoints: how many of the newest to keep.
        check: raises UserError if the run cannot begin in a folder; called once it is locked.
    """
    folder = folder or Path(os.devnull)
    with ExitStack() as stack:
        lock = run_folder.lock(folder) if is_main else nullcontext(lambda: None)
        check_folder = stack.enter_context(lock)
        if is_main:
            check(folder)  # another process may have trained there since the first check
        console = Console(folder / "log.txt") if is_main else Console(stream=io.StringIO())
        stack.callback(console.close)
        checkpoints = Checkpoints(
            folder / "checkpoints",
            keep_checkpoints,
            writes=is_main,
            check_folder=check_folder,
            report=console.report,
        )
        stack.callback(_close, checkpoints)
        yield RunOutput(folder, is_main, check_folder, console, checkpoints, MetricsWriter())


def _close(checkpoints: Checkpoints) -> None:
    with suppress(OSError):  # reported already
        checkpoints.close()
