"""Ready recipes: options of `train.py` by their names in config.json, in a TOML file of recipes/.

    python train.py --recipe cifar10-resnet20 --data-dir DIR --epochs 2      # flags override the recipe

A file opens with a comment: its command, what it reproduces, the source, the result and the time to expect.
"""

import dataclasses
import difflib
import tomllib
import typing
from typing import Any

from experiment.errors import UserError
from experiment.options.config import Config, as_arguments
from experiment.options.resolving import fits
from experiment.program import shipped

FOLDER = shipped("recipes")
NOT_IN_RECIPES = frozenset({"recipe", "run_dir", "resume", "data_dir"})  # of a run or a machine, in no recipe


def names() -> list[str]:
    """The recipes there are."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def with_recipe(given: dict[str, Any]) -> dict[str, Any]:
    """Return the given flags, {field of Config: value}, over the options of the recipe they name.

    A given length, --epochs or --steps, replaces the recipe's. If another --schedule than multistep is given,
    the recipe's milestones are dropped.

    Raises:
        UserError: there is no such recipe, or it is no TOML, or it has an unknown option or one of another
            type. Ranges are for `Config.check`.
    """
    if given.get("recipe") is None:
        return given
    recipe = _load(given["recipe"])
    if {"epochs", "steps"} & given.keys():
        recipe = {name: value for name, value in recipe.items() if name not in ("epochs", "steps")}
    if given.get("schedule", "multistep") != "multistep":
        recipe.pop("milestones", None)
    return recipe | given


def _load(name: str) -> dict[str, Any]:
    """The options of a recipe."""
    if name not in names():
        raise UserError(f"--recipe: unknown recipe {name!r}; choose one of {', '.join(names())}")
    path = FOLDER / f"{name}.toml"
    try:
        return checked(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"--recipe: {path} cannot be read ({error}); restore the file") from None
    except UserError as error:
        raise UserError(f"--recipe: {path}: {error}; fix the file, or choose another") from None


def checked(options: dict[str, Any]) -> dict[str, Any]:
    """Return options read from TOML, lists made tuples, and the table `optimizer_arguments` its words.

    Raises UserError for an unknown name or another type. Ranges are for `Config.check`.
    """
    if isinstance(arguments := options.get("optimizer_arguments"), dict):
        options = {**options, "optimizer_arguments": as_arguments(arguments)}
    hints = typing.get_type_hints(Config)
    known = {field.name for field in dataclasses.fields(Config)} - NOT_IN_RECIPES
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    for key, value in options.items():
        if key not in known or not fits(value, hints[key]):
            if key in known:
                raise UserError(f"{key} cannot be {value!r}")
            similar = difflib.get_close_matches(key, known, 1)
            hint = f" (did you mean {similar[0]}?)" if similar else ""
            raise UserError(f"{key} is no option here{hint}")
    return options
