"""The parser of a command's arguments, whose complaints are one line, as those of all commands."""

import argparse
from typing import NoReturn

from experiment.errors import UserError


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that raises UserError, where the original prints the usage as well."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError that says where the arguments are listed."""
        raise UserError(f"{message.removeprefix('argument ')} (`{self.prog} --help` lists the arguments)")
