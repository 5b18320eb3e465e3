"""The plan of a study, read from a TOML file: methods, their candidate configurations, and seeds.

    seeds = [1, 2, 3, 4, 5]
    tuning_seeds = [101]                # none of `seeds`
    compare_with = ["adam"]             # the optimizers that all others are compared with, seed by seed

    [base]                              # options as in recipes/, the same for all; report = true draws one
    model = "resnet8"
    dataset = "mnist"

    [[optimizers]]
    name = "adam"
    candidates = [{ lr = 0.001 }, { lr = 0.003 }]   # as many for each optimizer; one: no tuning

    [[optimizers]]
    name = "large-final-lr"             # any label, if `optimizer` names the optimizer
    optimizer = "adabound"
    candidates = [{ final_lr = 0.5 }, { final_lr = 1.0 }]

    [[variants]]                        # optional: each optimizer in each, tuned in each
    name = "without-batch-norm"
    batch_norm = false

By default, all optimizers are compared with the first one. Each variant is also compared with the first
variant.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.options.config import FRAMEWORKS
from experiment.options.recipes import checked
from experiment.options.resolving import resolve
from experiment.program import found, shipped
from experiment.reading import read_bytes

Options = dict[str, Any]
FOLDER = shipped("studies")
GIVEN_BY_STUDY = {"seed", "test"}
COMMON = {"framework", "deterministic"}  # of the process that makes all runs


@dataclass(frozen=True)
class Method:
    """An optimizer in a variant: what is tuned, then run with every seed.

    Attributes:
        name: for its folder and in tables: "adam", or "adam-without-batch-norm".
        optimizer, variant: the labels of the file; variant is "" where there is but one.
        candidates: all options of train.py, for each candidate.
        configurations: the options in which the candidates differ, for tables.
    """

    name: str
    optimizer: str
    variant: str
    candidates: tuple[Options, ...]
    configurations: tuple[Options, ...]


@dataclass(frozen=True)
class Plan:
    """A study; `compare_with` are labels of optimizers."""

    name: str
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    compare_with: tuple[str, ...]
    methods: tuple[Method, ...]

    @property
    def trials(self) -> int:
        """The number of candidate configurations of each method."""
        return len(self.methods[0].candidates)

    def comparisons(self) -> list[tuple[str, str]]:
        """Return the pairs (method, reference): a method is compared with the optimizers of `compare_with` in
        its variant, and with its optimizer in the first variant."""
        names = {(method.optimizer, method.variant): method.name for method in self.methods}
        pairs = [(method, (label, method.variant)) for label in self.compare_with for method in self.methods]
        pairs += [(method, (method.optimizer, self.methods[0].variant)) for method in self.methods]
        return [(method.name, names[key]) for method, key in pairs if names[key] != method.name]


def names() -> list[str]:
    """The shipped studies."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read(path: Path, given: Options) -> Plan:
    """Return the study that the file at `path` describes.

    Args:
        path: TOML, as above, or the name of a shipped study, such as `Path("cars")`.
        given: options that override those of the file: framework, data_dir, report.

    Raises:
        UserError: the file is absent, no TOML, or not as described; an option is unknown, of the wrong
            type or out of range; the optimizers have different numbers of candidates.
    """
    path = FOLDER / f"{path}.toml" if str(path) in names() and not path.is_file() else found(path)
    try:
        return _plan(path.stem, tomllib.loads(read_bytes(path).decode()), given)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; name a file, or one of {', '.join(names())}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fix the file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}; fix the file") from None


def _plan(name: str, table: dict[str, Any], given: Options) -> Plan:
    unknown = table.keys() - {"seeds", "tuning_seeds", "compare_with", "base", "optimizers", "variants"}
    if unknown:
        raise UserError(f"{min(unknown)} is no part of a study")
    seeds, tuning_seeds = (_seeds(table, key) for key in ("seeds", "tuning_seeds"))
    if not seeds or set(seeds) & set(tuning_seeds):
        raise UserError("seeds: must have at least one, and none of tuning_seeds")
    base = _options(table.get("base", {}), "base")
    variants = _named(table, "variants") or [("", {})]
    optimizers = _named(table, "optimizers")
    if not optimizers:
        raise UserError("optimizers: must have at least one")
    methods = []
    for variant, changes in variants:
        for label, entries in optimizers:
            entries = {"optimizer": label, **entries}
            configurations = entries.pop("candidates", [{}])
            if not isinstance(configurations, list) or not all(isinstance(c, dict) for c in configurations):
                raise UserError(f"optimizers: {label}: candidates must be a list of tables")
            common = {"report": False, **base, **_options(changes, variant), **_options(entries, label)}
            particular = tuple(_options(configuration, label) for configuration in configurations)
            candidates = tuple({**common, **configuration, **given} for configuration in particular)
            for options in candidates:
                if 0 in (resolve(options).steps, resolve(options).epochs):
                    raise UserError(f"{label}: a run must have a step")
            methods.append(
                Method("-".join(filter(None, (label, variant))), label, variant, candidates, particular)
            )
    if len({method.name for method in methods}) < len(methods):
        raise UserError("variants: two methods have the same name, optimizer-variant")
    counts = {method.optimizer: len(method.candidates) for method in methods}
    if len(set(counts.values())) > 1 or not min(counts.values()):
        raise UserError(f"candidates: must be equally many for each optimizer, at least one, not {counts}")
    trials = next(iter(counts.values()))
    if trials > 1 and not tuning_seeds:
        raise UserError("tuning_seeds: needed to choose between candidates; give seeds that are not in seeds")
    if trials > 1 and not all(resolve(method.candidates[0]).val_fraction for method in methods):
        raise UserError("val_fraction: must be above 0, because validation chooses between candidates")
    labels = [label for label, _ in optimizers]
    compare_with = table.get("compare_with", labels[:1])
    if not isinstance(compare_with, list) or not all(label in labels for label in compare_with):
        raise UserError(f"compare_with: must be names of optimizers, not {compare_with!r}")
    return Plan(name, seeds, tuning_seeds if trials > 1 else (), tuple(compare_with), tuple(methods))


def _seeds(table: dict[str, Any], key: str) -> tuple[int, ...]:
    seeds = table.get(key, [])
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or len(set(seeds)) < len(seeds):
        raise UserError(f"{key}: must be a list of different whole numbers from 0 on, not {seeds!r}")
    return tuple(seeds)


def _named(table: dict[str, Any], key: str) -> list[tuple[str, Options]]:
    """Return the tables under `key` with their names, which become names of folders."""
    entries = table.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{key}: must be tables [[{key}]]")
    named = []
    for entry in entries:
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,99}", name):
            raise UserError(
                f"{key}: name must be of small letters, digits, '-', '_' and '.', at most 100, not {name!r}"
            )
        named.append((name, {option: value for option, value in entry.items() if option != "name"}))
    if len({name for name, _ in named}) < len(named):
        raise UserError(f"{key}: two have the same name")
    return named


def _options(table: Any, where: str) -> Options:
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


def framework_of(plan: Plan) -> str:
    """Return the engine of a study; all its runs have the same."""
    return str(plan.methods[0].candidates[0].get("framework", FRAMEWORKS[0]))
