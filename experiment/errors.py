"""Exceptions whose message is the one line that the user sees, and parts of such lines."""

import re
from collections.abc import Sequence


class UserError(Exception):
    """A user's mistake. The message is one line that names the flag (or file) and the remedy.

    The command line prints it on stderr and exits with status 2, without a traceback.
    """


class RunFailedError(Exception):
    """The run cannot go on; one line says why and what is safe. Exit status 1."""


class DivergedError(RunFailedError):
    """The loss or gradient of a step was not finite."""


class WrongStepError(RunFailedError):
    """A training step was computed wrongly, or memory has changed: `--verify-every` found it."""


class FolderLostError(RunFailedError):
    """The folder of a run is no longer the one that it locked: nothing more may be written there."""


LONGEST = 1000
"""The most characters of a line on the terminal."""


def printable(text: str) -> str:
    r"""Return a message as one line that a terminal shows as it is.

    Line breaks become spaces, other control characters escapes, and the middle of a line of more than
    `LONGEST` characters is left out. File names, tensor names and arguments may hold anything.

    Examples:
        >>> printable("no file \x1b[31mred\n")
        'no file \\x1b[31mred'
    """
    text = re.sub(r"\s*[\r\n]\s*", " ", text.strip())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 + 5 :]}"


def one_line(error: object) -> str:
    """Return a message as one line of at most 300 characters; if empty, the error's type."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_of(items: Sequence[str], most: int, separator: str = "; ") -> str:
    """Return the first of some items, joined, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


def named_line(error: BaseException) -> str:
    """Return the type and the message of an error, cut to a part of one line."""
    name, text = type(error).__name__, one_line(error)
    return name if text == name else f"{name}: {text}"
