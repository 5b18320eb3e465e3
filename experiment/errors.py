"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A user's mistake. The message is one line that names the flag (or file) and the remedy.

    The command line prints it on stderr and exits with status 2, without a traceback.
    """
