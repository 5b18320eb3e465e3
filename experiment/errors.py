"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A user's mistake. The message is one line that names the flag (or file) and the remedy.

    The command line prints it on stderr and exits with status 2, without a traceback.
    """


def one_line(error: object) -> str:
    """Return the message of another library's error, or any text, cut to a part of one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
