"""Paths as users give them: `~` stands for the home folder, and only local paths are taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from experiment.errors import UserError


def local_path(name: str, text: str) -> str:
    """Return the local path that the flag or argument `name` was given, with `~` expanded.

    Raises:
        UserError: the text is a URL, or begins with `~` and there is no such home folder.
    """
    if "://" in text:
        raise UserError(f"{name}: {text} is a URL; name a local path, such as a mounted folder")
    if "\0" in text:
        raise UserError(f"{name}: {text!r} holds a null character; name another path")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UserError(f"{name}: the home folder of {text} is not known; write the path out, or ./{text}")
    return path


def path_type(name: str) -> Callable[[str], Path]:
    """Return the `type` of an argparse argument called `name` that is a local path."""
    return lambda text: Path(local_path(name, text))
