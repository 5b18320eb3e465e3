"""The folder of a run: its lock, what may lie in it, and small files that are written whole, then renamed."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.errors import FolderLostError, UserError
from experiment.files.schema import Record, Resolved
from experiment.options.config import Config
from experiment.options.resolving import is_changeable
from experiment.program import ROOT, in_checkout
from experiment.reading import check_regular, read_checked_json

if TYPE_CHECKING:
    from experiment.data.loading import Data

BEFORE_CONFIG = {".lock", "log.txt", "config.json.tmp"}  # what a run makes before config.json
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "grain", "tensorflow-datasets")

# What config.json keeps of the data, and a resumed run must find unchanged.
DATA_FACTS = (
    *("num_classes", "class_names", "image_shape", "mean", "std"),
    *("train_size", "val_size", "test_size"),
)
ENGINE_FACTS = ("num_classes", "image_shape", "mean", "std")  # of these, what an engine is made of

# All that "resolved" of config.json may hold, and of these what a resumed run may not change.
RESOLVED = frozenset(Resolved.__annotations__)
FIXED = RESOLVED - {"total_steps", "steps_per_epoch", "optimizer_options"}


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` atomically: write `content` to a file beside it, fsync, then rename that file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a link there is removed, not followed
    with open(temporary, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON at `path`, whole or not at all; what is not finite becomes null."""
    write_file(path, (json.dumps(finite(value), indent=2) + "\n").encode())


def finite(value: Any) -> Any:
    """`value` with None for every float that is not finite: JSON has no word for it."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_sha256(path: Path) -> str:
    """Return the SHA-256 sum of a file as hexadecimal digits. Raises OSError."""
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, kind: Any = Any) -> Any:
    """Return the JSON at `path`, a file of a run. Raises UserError if it is absent, or not of the type."""
    try:
        return read_checked_json(path, kind)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; is this the folder of a run?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore the file, or start a fresh run") from None


def read_named_record(run_dir: Path) -> dict[str, Any]:
    """Return `read_record` of a folder that was named as an argument, not by --run-dir."""
    if not (run_dir / "config.json").is_file():
        if (run_dir / "study.json").is_file():
            raise UserError(f"{run_dir}: is the folder of a study; name runs in it: {run_dir}/runs/*/*")
        raise UserError(f"{run_dir}: is not the folder of a run (it has no config.json); name another")
    return read_record(run_dir)


def read_record(run_dir: Path) -> dict[str, Any]:
    """Return the content of config.json of a run: {"config", "resolved", "sessions"}.

    Raises UserError if it is none, or if a newer version wrote it and this one would ignore something in it.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        free = not run_dir.is_file() and not other_files(run_dir)
        remedy = "name another" + (", or leave --resume out to start one there" if free else "")
        raise UserError(f"--run-dir: {run_dir} is not the folder of a run (it has no config.json); {remedy}")
    record: dict[str, Any] = read_json(path, Record)
    resolved, usual = record["resolved"], Config()
    known = [(record, Record.__annotations__), (record["config"], vars(usual)), (resolved, RESOLVED)]
    known.append((resolved.get("optimizer_options", {}), usual.optimizer_options()))
    for values, names in known:
        if unknown := sorted(values.keys() - set(names)):
            raise UserError(f"{path}: unknown option {unknown[0]!r}, of a newer version; use that version")
    channels = {len(resolved[name]) for name in ("mean", "std") if name in resolved}
    channels |= {resolved["image_shape"][2]} if "image_shape" in resolved else set()
    classes = {resolved[name] for name in ("num_classes",) if name in resolved}
    classes |= {len(resolved[name]) for name in ("class_names", "class_weights") if name in resolved}
    if max(len(channels), len(classes)) > 1:
        raise UserError(
            f"{path}: its classes, or its channels, mean and std, differ in number; restore the file"
        )
    return record


def identity(config: Config, resolved: dict[str, Any]) -> dict[str, Any]:
    """Return what a resumed run may not change, {name: value as JSON has it}, for its checkpoints to keep.

    Args:
        config: the options of the run.
        resolved: what followed from them and the data.
    """
    options = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if not is_changeable(name, config.schedule)
    }
    fixed = {name: value for name, value in resolved.items() if name in FIXED}
    if config.schedule != "cosine":  # the others have no length
        fixed.pop("schedule_steps", None)
    same: dict[str, Any] = json.loads(json.dumps({**options, **fixed}))
    return same


def differing(made_with: Any, present: Mapping[str, Any]) -> str | None:
    """Return the first name whose value differs in two identities, or None; versions may lack some names."""
    entries = made_with.items() if isinstance(made_with, dict) else ()
    return next((name for name, old in entries if old != present.get(name, old)), None)


def checkpoint_steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending: `directory`'s folders named by a number."""
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def data_facts(data: Data) -> dict[str, Any]:
    """Return what config.json keeps of the data: their shape and sizes, and which data they are."""
    return {**{name: getattr(data, name) for name in DATA_FACTS}, **data.identity}


def recorded_data(resolved: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what config.json of a run holds of its data; None if that is not complete."""
    return (
        resolved
        if all(isinstance(resolved.get(name), list) for name in ("image_shape", "mean", "std"))
        else None
    )


def check_same_data(old: dict[str, Any], data: Data) -> str | None:
    """Compare `data` with what config.json holds of a run's, `old`.

    Returns:
        None; for a run of an older version, which did not record which data it used, a line that says so.

    Raises:
        UserError: the data are not those of the run.
    """
    for name, value in data_facts(data).items():
        value = list(value) if isinstance(value, tuple) else value  # as JSON has it
        if old.get(name) != value and name not in data.identity:
            raise UserError(
                f"--data-dir: the data have {name} {value}, and had {old.get(name)} when the run began; "
                "name the directory of those"
            )
    present = _identity_words(data.name, data.identity)
    if "data_sha256" not in old:
        return f"which version of its data the run began with is not recorded; taken is {present}"
    recorded = {name: old.get(name) for name in data.identity}
    if recorded != data.identity:
        remedy = "name a directory whose newest version is that one"
        if data.identity["data_version"] is None:
            remedy = "install the versions of packages that it began with"
        if data.name == "folder":
            remedy = "name the folder with those files, or start a fresh run"
        raise UserError(
            f"--data-dir: the data are {present}; the run began with "
            f"{_identity_words(data.name, recorded)}; {remedy}"
        )
    return None


def _identity_words(name: str, identity: Mapping[str, Any]) -> str:
    """Return a data set's name and identity in words."""
    words = ("version", "configuration", "tested on split")
    values = (identity[key] for key in ("data_version", "data_config", "data_test_split"))
    facts = [f"{word} {value}" for word, value in zip(words, values, strict=True) if value is not None]
    facts.append(f"SHA-256 {str(identity['data_sha256'])[:12]}")
    return f"{name} ({', '.join(facts)})"


def check_fresh(run_dir: Path) -> None:
    """Raise UserError if `run_dir` cannot hold a new run: it has something in it, or it is no folder.

    Files of a run killed before it wrote config.json do not count: the run is started again.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir: {run_dir} is a file; name a folder that does not exist yet")
    if (run_dir / "config.json").exists():
        raise UserError(
            f"--run-dir: {run_dir} is in use; add --resume to continue it, or name another folder"
        )
    if others := other_files(run_dir):
        raise UserError(
            f"--run-dir: {run_dir} holds {others[0]} and no run; name a folder that is empty or does not "
            "exist, and redirect the output of a run to a file outside (its log.txt has the same lines)"
        )


def other_files(run_dir: Path) -> list[str]:
    """Return the names in a folder, except those of files that a run killed at its start leaves."""
    names = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
    return sorted(names - BEFORE_CONFIG)


def create(run_dir: Path | None, name: str) -> Path:
    """Make the folder of a new run: `run_dir`, or one under runs/ named by the time and `name`."""
    if run_dir is not None:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--run-dir: {run_dir} cannot be made ({error.strerror}); name another folder"
            ) from None
        return run_dir
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    for suffix in ("", *(f"-{attempt}" for attempt in range(1, 1000))):
        with suppress(FileExistsError):
            run_dir = Path("runs") / f"{stem}{suffix}"
            run_dir.mkdir(parents=True)
            return run_dir
    raise UserError(f"--run-dir: runs/{stem} exists a thousand times; name a folder with --run-dir")


@contextmanager
def lock(run_dir: Path) -> Iterator[Callable[[], None]]:
    """Lock the folder for this process; the operating system unlocks it however the process ends.

    Yields a function that raises FolderLostError if the file that was locked is not the one in the folder any
    more: the folder was removed, moved, or removed and made again, maybe by another run.
    """
    import filelock

    path = run_dir.absolute() / ".lock"

    def inode() -> tuple[int, int] | None:
        with suppress(FileNotFoundError, NotADirectoryError):
            status = path.stat()
            return status.st_dev, status.st_ino
        return None

    def check() -> None:
        if inode() != locked:
            raise FolderLostError(
                f"{run_dir} was removed, moved or replaced while the run went on; nothing more is written "
                "there; put the folder back and continue with --resume, or start a fresh run"
            )

    if not run_dir.is_dir():  # filelock would make it
        raise UserError(f"--run-dir: {run_dir} was removed meanwhile; name another folder")
    try:
        with filelock.FileLock(path, timeout=0):
            locked = inode()
            yield check
    except filelock.Timeout:
        raise UserError(
            f"--run-dir: another process is training in {run_dir}; wait for it, or stop it"
        ) from None


def session(step: int, device: str, threads: int | None, argv: list[str]) -> dict[str, Any]:
    """Describe a start or resume for config.json, so that every number can be traced.

    Args:
        step: the step it starts at.
        device: the engine's device in words.
        threads: the number of the engine's CPU threads or processes.
        argv: the flags.
    """
    return {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": argv,
        "device": device,
        "threads": threads,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": git_commit(),
    }


def device_change(sessions: list[Any], newest: dict[str, Any]) -> str | None:
    """Return a line if `newest` computes on another device than the last of `sessions`, else None.

    The device in words has the number of threads. Sessions of older versions, which did not record that
    number, are not compared.
    """
    before = sessions[-1] if sessions else None
    if not isinstance(before, dict) or "threads" not in before or before.get("device") == newest["device"]:
        return None
    return (
        f"the run was on {before.get('device')}, and is now on {newest['device']}: "
        "bits may differ from those of an uninterrupted run"
    )


def git_commit() -> str | None:
    """The commit of the source tree, with `-dirty` behind it if files differ; None outside a checkout."""
    if not in_checkout():  # a virtual environment may lie in the repository of another project
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def short_commit(commit: Any) -> str:
    """Return a commit from `git_commit` in ten digits."""
    words = str(commit or "unknown")
    return words[:10] + ("-dirty" if words.endswith("-dirty") else "")
