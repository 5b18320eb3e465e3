"""The entries of a study's file, each checked by itself: whole numbers, seeds, named tables, options."""

import re
from typing import Any

from experiment.errors import UserError
from experiment.options.recipes import checked

Options = dict[str, Any]
GIVEN_BY_STUDY = {"seed", "test"}
COMMON = {"framework", "deterministic"}  # the same for all runs of a study


def points_given(label: str, entries: Options) -> list[Options]:
    """Return the candidates of the method `label`; without a list there is one, which changes nothing."""
    tables = entries.get("candidates", [{}])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"optimizers: {label}: candidates must be a list of tables")
    return list(tables)


def whole_number(table: dict[str, Any], key: str, default: int, least: int, most: int) -> int:
    """Return the number under `key`, or the default."""
    number = table.get(key, default)
    if type(number) is not int or not least <= number <= most:
        raise UserError(f"{key}: must be a whole number from {least} to {most}, not {number!r}")
    return number


def seeds_of(table: dict[str, Any], key: str) -> tuple[int, ...]:
    """Return the list of seeds under `key`; an absent one is empty."""
    seeds = table.get(key, [])
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or len(set(seeds)) < len(seeds):
        raise UserError(f"{key}: must be a list of different whole numbers from 0 on, not {seeds!r}")
    return tuple(seeds)


def named(table: dict[str, Any], key: str) -> list[tuple[str, Options]]:
    """Return the tables under `key` with their names, which become names of folders."""
    entries = table.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{key}: must be tables [[{key}]]")
    pairs = []
    for entry in entries:
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,99}", name):
            raise UserError(
                f"{key}: name must be of small letters, digits, '-', '_' and '.', at most 100, not {name!r}"
            )
        pairs.append((name, {option: value for option, value in entry.items() if option != "name"}))
    if len({name for name, _ in pairs}) < len(pairs):
        raise UserError(f"{key}: two have the same name")
    return pairs


def options_of(table: Any, where: str) -> Options:
    """Return a table of options, checked. Raises UserError, which names the table by `where`."""
    if not isinstance(table, dict):
        raise UserError(f"{where}: must be a table of options")
    reserved = GIVEN_BY_STUDY & table.keys()
    if reserved:
        raise UserError(f"{where}: {min(reserved)} is given by the study")
    if where != "base" and COMMON & table.keys():
        raise UserError(f"{where}: {min(COMMON & table.keys())} is the same for all; name it under [base]")
    try:
        return checked(table)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
