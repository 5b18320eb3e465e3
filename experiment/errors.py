"""Exceptions whose message is the one line that the user sees."""


class UserError(Exception):
    """A user's mistake. The message is one line that names the flag (or file) and the remedy.

    The command line prints it on stderr and exits with status 2, without a traceback.
    """


class RunFailedError(Exception):
    """The run cannot go on; one line says why and what is safe. Exit status 1."""


class FolderLostError(RunFailedError):
    """The folder of a run is no longer the one that it locked: nothing more may be written there."""


def one_line(error: object) -> str:
    """Return the message of another library's error, or any text, cut to a part of one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
