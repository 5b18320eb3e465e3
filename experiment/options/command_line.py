"""The command lines: the parser of every command, and train.py's, which is made from Config."""

import argparse
import dataclasses
import functools
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from experiment.errors import UserError
from experiment.options.config import GROUPS, Config, flag_of
from experiment.options.paths import HUB, local_path
from experiment.options.resolving import resolve, with_local_paths
from experiment.program import command


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that raises UserError, where the original prints the usage as well."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError that says where the arguments are listed."""
        raise UserError(f"{message.removeprefix('argument ')} (`{self.prog} --help` lists the arguments)")

    def add_path(
        self, argument: str, *, metavar: str, any_bytes: bool = False, hub: bool = False, **options: Any
    ) -> None:
        """Add an argument that is a local path (see `local_path`); its value is a `Path`.

        With `hub` it may be the name of weights on the Hub instead, and is then left a string.
        """
        name = argument if argument.startswith("-") else metavar

        def path(text: str) -> Path | str:
            if hub and text.startswith(HUB):
                return text
            return Path(local_path(name, text, any_bytes=any_bytes))

        self.add_argument(argument, metavar=metavar, type=path, **options)

    def add_data_dir(self, help: str) -> None:
        """Add --data-dir, whose value is text, as in the options of a run."""
        kind = functools.partial(local_path, "--data-dir")
        self.add_argument("--data-dir", metavar="DIR", type=kind, help=help)


def make_parser() -> argparse.ArgumentParser:
    """The command line of train.py, made from Config. Flags that are not given are absent from its result."""
    parser = Parser(
        prog=command("train"),
        usage="%(prog)s [FLAG ...]",
        description="Train a ResNet with JAX or with NumPy.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(Config)
    group: Any = parser
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        _add_argument(group, field, hints[field.name])
    return parser


def _add_argument(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    text = field.metadata["help"].replace("%", "%%")
    if isinstance(field.default, bool):
        on = flag_of(field).replace("--no-", "--")
        action = "store_true" if field.name == "resume" else argparse.BooleanOptionalAction
        text += " (default: on)" if field.default else ""
        group.add_argument(on, dest=field.name, action=action, help=text)
        return
    many = isinstance(field.default, tuple)
    kind = next(t for t in (typing.get_args(hint) or (hint,)) if t is not types.NoneType)
    if field.metadata["choices"]:
        text += ": " + ", ".join(field.metadata["choices"])
    if field.default is not None and not many:
        text += f" (default {field.default})"
    group.add_argument(
        flag_of(field),
        dest=field.name,
        type=kind,
        nargs="+" if many else None,
        metavar={int: "N", float: "X", str: "NAME"}[kind],
        help=text,
    )


def parse(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The flags that were given, as {name of the field: value}. Raises UserError."""
    given = vars(make_parser().parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return with_local_paths(given)


def flags(options: dict[str, Any]) -> list[str]:
    """The inverse of `parse`: the flags that give these options, None left out."""
    words: list[str] = []
    for field in dataclasses.fields(Config):
        value = options.get(field.name)
        if isinstance(field.default, bool):
            words += [flag_of(field)] if value is not None and value != field.default else []
        elif value is not None and value != ():
            words += [flag_of(field), *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def argv_of(config: Config) -> list[str]:
    """Return the flags that give a resolved `config`, except its folder and whether it is resumed."""
    usual = vars(resolve({"optimizer": config.optimizer})) | {"optimizer": Config.optimizer}  # its lr, decay
    # `config` already includes the recipe's options.
    skipped = ("run_dir", "resume", "recipe")
    changed = {name: value for name, value in vars(config).items() if value != usual[name]}
    return flags({name: value for name, value in changed.items() if name not in skipped})
