"""Checkpoints: Orbax for the arrays, a manifest of SHA-256 sums so that no flipped bit is ever loaded.

A checkpoint is a folder `checkpoints/STEP` with
    state/         the engine-neutral tree {params, batch_stats, optimizer, step}, with --model-ema-decay also
                   ema (`Engine.to_tree`), by Orbax
    run.json       history (length and SHA-256 of metrics.jsonl), epoch_metrics, best, clock, identity (the
                   options), perhaps validation_due: see `Trainer._save`
    manifest.json  the size and SHA-256 of every other file; written last
It is made as `checkpoints/STEP.incomplete` and renamed when all of it has reached the disk, so that a folder
whose name is a number is complete. Beside them, `weights-best-STEP.safetensors` are earlier best weights that
a checkpoint still refers to.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from experiment.errors import FolderLostError, UserError
from experiment.files import weights
from experiment.files.arrays import Tree, call_alone, load_arrays, save_arrays
from experiment.files.run_folder import checkpoint_steps, file_sha256, write_file, write_json
from experiment.files.schema import CheckpointRecord, Manifest
from experiment.reading import read_checked_json

MANIFEST = "manifest.json"
NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}  # what fsync of a folder says on CIFS, FUSE, vboxsf


class CheckpointError(Exception):
    """A checkpoint is damaged; the message says how."""


class Checkpoints:
    """The checkpoints of a run in `directory`, of which the newest `keep` are kept, and the verified one.

    Without `writes` nothing is saved or removed: another process does it. Saving goes on in a background
    thread. The tree passed to `save` must hold its own NumPy arrays, and nobody may change them afterwards,
    so that the engine can donate its state to the next step. `check_folder` raises if the run's folder must
    not be written to any more. `report` gets one line if the file system cannot sync folders.

    Attributes:
        verified_step: the newest step that `run.sentinel` has verified, -1 before the first, None without it.
            The newest checkpoint up to it is kept until there is a newer one, and so is the first after it,
            which will be the next.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        *,
        writes: bool = True,
        check_folder: Callable[[], None] = lambda: None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.directory, self.keep = directory.absolute(), keep  # Orbax takes no relative path
        self.check_folder = check_folder
        self._writes, self._report = writes, report
        self.verified_step: int | None = None
        self._folders_sync = True
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, ascending."""
        return checkpoint_steps(self.directory)

    def save(self, step: int, tree: Tree, run: dict[str, Any]) -> None:
        """Begin to save; waits for the save before it, and raises what that raised (OSError: disk full).

        `run["best"]["step"]`, where there is one, is the step of the best weights so far.
        """
        self.check_folder()
        self.wait()
        if self._writes:
            self._pending = self._executor.submit(self._write, step, tree, run)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the save under way has reached the disk; raises what it raised, or TimeoutError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result(seconds)

    def close(self) -> None:
        """Wait for the save under way, then end the background thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def _write(self, step: int, tree: Tree, run: dict[str, Any]) -> None:
        final = self.directory / str(step)
        partial = self.directory / f"{step}.incomplete"
        try:
            _remove(partial)
            self.directory.mkdir(exist_ok=True)  # no parents: the folder of the run is not made again
            partial.mkdir()
            call_alone(save_arrays, partial / "state", tree)
            write_json(partial / "run.json", run)
            write_json(partial / MANIFEST, {"files": _sums(partial)})
            for path in [*partial.rglob("*"), partial]:
                self._sync(path)
            self.check_folder()
            _remove(final)  # a damaged one that resume has stepped over, or something else of this name
            os.rename(partial, final)
            self._sync(self.directory)
        except Exception as error:
            with suppress(OSError):
                _remove(partial)
            self._remove_if_lost()
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            failure = OSError(f"checkpoint {step} could not be written: {reason}")
            failure.errno = _errno(error)
            raise failure from error
        # Damaged checkpoints that resume skipped are newer than this one; they do not count toward `keep`.
        older = [old for old in self.steps() if old < step]
        protected = self._protected([*older, step])
        for old in older[: max(len(older) + 1 - self.keep, 0)]:
            if old in protected:
                continue
            # Rename it first: a kill must not leave half of a checkpoint whose name marks it as complete.
            removed = self.directory / f"{old}.incomplete"
            _remove(removed)
            os.rename(self.directory / str(old), removed)
            _remove(removed)
        self._remove_unused_best()

    def _protected(self, steps: list[int]) -> set[int]:
        """Return which checkpoints must stay because of what is verified: see the class."""
        if self.verified_step is None:
            return set()
        good = [step for step in steps if step <= self.verified_step]
        others = [step for step in steps if step > self.verified_step]
        return {*good[-1:], *others[:1]}

    def _remove_if_lost(self) -> None:
        """Remove the empty folders that Orbax has made again after the run was removed."""
        try:
            self.check_folder()
        except FolderLostError:
            for folder in (self.directory, self.directory.parent):
                with suppress(OSError):
                    folder.rmdir()

    def _sync(self, path: Path) -> None:
        """Bring a file or folder to the disk; report once if the file system cannot do it for folders."""
        try:
            _fsync(path)
        except OSError as error:
            if not path.is_dir() or error.errno not in NO_FSYNC:
                raise
            if self._folders_sync:
                self._report(
                    f"warning: the file system of {self.directory} cannot sync folders ({error.strerror}): "
                    "after a power cut the newest checkpoint may be missing"
                )
            self._folders_sync = False

    def verified(self) -> list[int]:
        """The steps of the checkpoints whose sums are right, ascending; reads all of them."""
        whole = []
        for step in self.steps():
            with suppress(CheckpointError):
                _verify(self.directory / str(step))
                whole.append(step)
        return whole

    def newest_verified(self) -> int | None:
        """The step of the newest checkpoint whose sums are right, or None; reads no older ones."""
        for step in reversed(self.steps()):
            with suppress(CheckpointError):
                _verify(self.directory / str(step))
                return step
        return None

    def remove_incomplete(self) -> None:
        """Delete what a killed process left half written."""
        for path in self.directory.glob("*.incomplete*") if self._writes else ():
            with suppress(OSError):  # the next save of that step reports it
                _remove(path)
        for path in self.directory.glob("*.tmp") if self._writes else ():
            path.unlink(missing_ok=True)

    def best_weights(self, step: int) -> Path:
        """Return where the best weights of `step` are kept after better ones have taken their place."""
        return self.directory / f"weights-best-{step}.safetensors"

    def keep_best(self, path: Path, step: int) -> None:
        """Keep the best weights in `path`, of `step`, for as long as they are the best of a checkpoint.

        `path` stays where it is, unless the file system has no hard links.
        """
        kept = self.best_weights(step)
        if not self._writes or weights.step_of(path) != step or (kept.exists() and kept.samefile(path)):
            return
        _link(path, kept, otherwise=lambda: os.replace(path, kept))

    def restore_best(self, path: Path, step: int) -> bool:
        """Write the best weights of `step` to `path`, unless they are there; False if they are lost."""
        if weights.step_of(path) == step:
            return True
        kept = self.best_weights(step)
        if weights.step_of(kept) != step:
            return False
        if self._writes:
            _link(kept, path, otherwise=lambda: write_file(path, kept.read_bytes()))
        return True

    def _remove_unused_best(self) -> None:
        try:
            steps = [self._best_step(step) for step in self.steps()]
        except (OSError, ValueError):  # a damaged checkpoint may refer to any
            return
        used = {self.best_weights(step) for step in steps if step is not None}
        for path in self.directory.glob("weights-best-*.safetensors"):
            if path not in used:
                path.unlink()

    def _best_step(self, step: int) -> int | None:
        """Return the step of the best weights at a checkpoint, or None if there are none yet.

        Raises OSError or ValueError if its run.json is damaged.
        """
        record: dict[str, Any] = read_checked_json(self.directory / str(step) / "run.json", CheckpointRecord)
        best: dict[str, int] | None = record.get("best")
        return None if best is None else best["step"]

    def load_newest(self, report: Callable[[str], None]) -> tuple[int, Tree, dict[str, Any]] | None:
        """(step, tree, run) of the newest whole checkpoint, or None if there is none at all.

        Damaged ones are passed to `report`, one line each. Raises UserError if there are some and all are
        damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return (step, *self.load(step))
            except CheckpointError as error:
                report(f"checkpoint {step} is damaged and is not used: {error}")
        if steps:
            raise UserError(f"--resume: every checkpoint in {self.directory} is damaged; start a fresh run")
        return None

    def load(self, step: int) -> tuple[Tree, dict[str, Any]]:
        """(tree, run) of one checkpoint, its sums checked first. Raises CheckpointError if one differs."""
        folder = self.directory / str(step)
        _verify(folder)
        try:
            tree, run = (
                call_alone(load_arrays, folder / "state"),
                read_checked_json(folder / "run.json", CheckpointRecord),
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"cannot be read: {error}") from error
        if not np.array_equal(tree.get("step", step), step):
            raise CheckpointError(f"it is of step {tree['step']}; give its folder that name")
        return tree, run


def _sums(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    }


def _verify(folder: Path) -> None:
    try:
        listed = read_checked_json(folder / MANIFEST, Manifest)["files"]
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error}") from None
    if "run.json" not in listed or not any(name.startswith("state/") for name in listed):
        raise CheckpointError(f"{MANIFEST} does not list run.json and the files of state/")
    for name, entry in listed.items():
        path, listed_size, listed_sha256 = folder / name, entry["bytes"], entry["sha256"]
        if not path.is_file():
            raise CheckpointError(f"{name} is missing")
        try:
            size, sha256 = path.stat().st_size, file_sha256(path)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error}") from None
        if size != listed_size:
            raise CheckpointError(f"{name} has {size} bytes, not {listed_size}")
        if sha256 != listed_sha256:
            raise CheckpointError(f"{name} differs from its SHA-256")


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or a link but not its target; nothing if absent."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _errno(error: Exception) -> int | None:
    """Return the errno of an error. TensorStore raises no OSError; its message contains the number."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else getattr(error, "errno", None)


def _link(source: Path, target: Path, otherwise: Callable[[], None]) -> None:
    """Make `target`, which may exist, a hard link to the file `source`; it takes no space.

    `otherwise` is called on a file system that has no hard links.
    """
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        otherwise()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
