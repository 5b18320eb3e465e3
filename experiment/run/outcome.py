"""How a run ended, and the lines that say why and how to go on."""

import enum
import errno
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.errors import UserError, named_line
from experiment.files.checkpoints import Checkpoints
from experiment.program import command

SAVE_SECONDS = 10.0  # for the save under way when another process was lost


class End(enum.Enum):
    """The ways in which a run ends."""

    COMPLETED = "at its last step"
    STOPPED = "by a signal, with everything saved"
    INTERRUPTED = "by a signal, at once"
    DIVERGED = "a loss or gradient was not finite"
    FAILED = "it could not go on"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        end: in which way.
        status: the exit status.
        reason: the line that the user saw; empty for a completed run.
    """

    end: End
    status: int
    reason: str = ""


def describe_failure(error: Exception, checkpoints: Checkpoints, run_dir: Path) -> str:
    """Return in one line why a run failed, what is safe, and how to go on."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, ChildProcessError | BlockingIOError):
        reason = str(error)
    elif isinstance(error, OSError):  # data is read elsewhere
        reason = f"cannot write in {run_dir}: {error}"
    elif isinstance(error, MemoryError):
        reason = f"out of memory ({error})" if str(error) else "out of memory"
    else:
        reason = f"{named_line(error)}; the traceback is in log.txt"
    return f"{reason}; {what_is_safe(checkpoints, run_dir, 'free disk space, then ' if full else '')}"


def describe_unreadable(part: str, error: BaseException) -> str:
    """Return why data could not be read: the message of its UserError, also where a reader has wrapped it."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, UserError):
        inner = inner.__cause__ or inner.__context__
    return str(inner) if inner else f"the data ({part}) cannot be read: {named_line(error)}"


def what_is_safe(checkpoints: Checkpoints, run_dir: Path, first: str = "") -> str:
    """Return which checkpoints of a run that has failed are verified, and how to go on.

    Args:
        checkpoints: those of the run; a save under way is waited for.
        run_dir: its folder.
        first: what the user must do before.
    """
    with suppress(OSError):  # it is reported as the failure, or follows from it
        checkpoints.wait()
    steps = ", ".join(map(str, checkpoints.verified())) or "none"
    how = f"continue with {resume_command(run_dir)}"
    if not (run_dir / "config.json").is_file():
        how = "start the run again"
    return f"verified checkpoints: {steps}; {first}{how}"


def where_saved(run_dir: Path, checkpoints: Checkpoints) -> dict[str, Any]:
    """Return the folder of a run and its newest checkpoint, for the other processes of the run.

    Nothing where the run cannot be resumed yet.
    """
    with suppress(OSError):
        if (run_dir / "config.json").is_file():
            return {"folder": str(run_dir.absolute()), "newest": max(checkpoints.steps(), default=None)}
    return {}


def after_loss(run_dir: Path | None, news: Mapping[str, Any], checkpoints: Checkpoints | None = None) -> str:
    """Return the newest whole checkpoint of a run that lost a process, and how to go on with the others.

    Args:
        run_dir: its folder, as this process knows it.
        news: what `where_saved` returned in process 0, for a host that does not see the folder.
        checkpoints: in process 0 those of the run, whose save under way is waited for.
    """
    folder = Path(news["folder"]) if "folder" in news else run_dir
    if folder is None or not ("folder" in news or (folder / "config.json").is_file()):
        return "nothing is saved yet; start the run again"
    checkpoints = checkpoints or Checkpoints(folder / "checkpoints", 1, writes=False)
    with suppress(OSError):  # the save failed, or takes too long
        checkpoints.wait(SAVE_SECONDS)
    newest = checkpoints.newest_verified()
    if newest is None:
        newest = news.get("newest")
    saved = "no checkpoint yet" if newest is None else f"newest whole checkpoint: {newest}"
    return (
        f"{saved}; continue with {resume_command(folder)}, with --distributed if several processes are left"
    )


def resume_command(run_dir: Path) -> str:
    """Return the command that continues a run."""
    return f"{command('train')} --resume --run-dir {shlex.quote(str(run_dir))}"
