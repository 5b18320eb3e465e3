"""How a run ended, and the lines that say why and how to go on."""

import enum
import errno
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from experiment.errors import UserError, named_line
from experiment.files.checkpoints import Checkpoints
from experiment.program import command


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


def resume_command(run_dir: Path) -> str:
    """Return the command that continues a run."""
    return f"{command('train')} --resume --run-dir {shlex.quote(str(run_dir))}"
