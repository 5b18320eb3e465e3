"""The plan of a study, read from a TOML file: methods, their trials, workloads, and seeds.

What a study compares are *methods*: an optimizer with the rule that tunes it. A *workload* is a network on a
data set. A method is tuned on each workload by *trials*, runs that are validated and never tested; the
configuration that validation chooses is then run with fresh seeds and tested. Two forms, which can be mixed:

    seeds = [1, 2, 3, 4, 5]             # of the final runs
    studies = 3                         # independent studies ...
    trials = 3                          # ... of so many trials each, for every method and workload
    space_seed = 0                      # of the points in the search spaces
    compare_with = ["adam"]             # the optimizers that all others are compared with, seed by seed; or
                                        # pairs alone: [["adabound", "adam"], ["adabound", "sgdbound"]]

    [base]                              # options as in recipes/, the same for all; report = true draws one
    eval_every = 100

    [[workloads]]                       # each optimizer in each, tuned in each
    name = "digits"
    model = "resnet8"
    dataset = "digits"
    steps = 600
    target = { accuracy = 0.9 }         # on validation
    target_found = "SGD's best of 20 trials, space_seed 7"

    [[optimizers]]
    name = "adam"
    space = { lr = [1e-4, 1e-1], weight_decay = [1e-5, 1e-2] }      # the same for all workloads

    [[optimizers]]
    name = "adam-published"             # any label, if `optimizer` names the optimizer
    optimizer = "adam"
    space = {}                          # one point: each trial repeats it with another seed

    [[optimizers]]
    name = "lion"
    optimizer = "optax:lion"            # or "mine.py:make", a file beside this one
    space = { lr = [1e-5, 1e-2], weight_decay = [1e-3, 1.0], b1 = [0.8, 0.99] }

The points of a method are the first studies x trials of a quasi-random sequence (`space.py`), in order. So
the point of a trial is a function of this file alone. Its seed is 1000 x study + trial, for every method.

A method may have given points instead: `candidates = [{ lr = 0.001 }, { lr = 0.003 }]`, which each study
tries, one a trial. With `tuning_seeds = [101]` in place of `studies` and `trials` there is one study for each
seed, all of its trials have that seed, and all methods have candidates, equally many. With one, or
without the list, nothing is tuned. `[[variants]]` are workloads that are also compared with the first one.

From the trials (`scores.py`): the steps of each until validation reaches the target; of each study the least;
the median of the studies. For the final runs: the point with the best validation accuracy at the last step,
averaged over its trials, on each workload. By default, all optimizers are compared with the first one.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from experiment.errors import UserError
from experiment.options.config import FRAMEWORKS, is_external
from experiment.options.resolving import resolve
from experiment.program import found, shipped
from experiment.reading import read_bytes
from experiment.study.entries import Options, named, options_of, points_given, seeds_of, whole_number
from experiment.study.space import Range, as_options, draw, split

FOLDER = shipped("studies")
KEYS = {"seeds", "tuning_seeds", "studies", "trials", "space_seed", "compare_with", "base", "optimizers"}
KEYS |= {"variants", "workloads"}
SEARCH = {"studies", "trials", "space_seed"}
MOST = 999  # studies, or trials of one: the seeds of trials are 1000 x study + trial


class Trial(NamedTuple):
    """A tuning run: its study and its number in it, both from 1, its point, its seed, its folder's name."""

    study: int
    number: int
    point: int
    seed: int
    folder: str


@dataclass(frozen=True)
class Workload:
    """A variant of the options, with the validation accuracy that is to be reached, if there is one."""

    name: str
    options: Options
    target: float | None = None
    target_found: str = ""


@dataclass(frozen=True)
class Method:
    """An optimizer on a workload: what is tuned, then run with every seed.

    Attributes:
        name: for its folder and in tables: "adam", or "adam-digits".
        optimizer, variant: the labels of the file; variant, the workload's, is "" where there is but one.
        candidates: all options of train.py, for each point.
        configurations: the options in which the points differ, for tables.
        trials: in the order in which they are run.
        ranges: the search space; empty where points are given.
    """

    name: str
    optimizer: str
    variant: str
    candidates: tuple[Options, ...]
    configurations: tuple[Options, ...]
    trials: tuple[Trial, ...] = ()
    ranges: dict[str, Range] = field(default_factory=dict)


class Tuning(NamedTuple):
    """How methods are tuned: by so many studies of so many trials.

    `searches` is True for the form with `studies` and `trials`; else each study has its seed of `seeds`, and
    without studies nothing is tuned.
    """

    searches: bool
    studies: int
    trials: int
    seeds: tuple[int, ...] = ()
    space_seed: int = 0


@dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        name: that of its file.
        seeds: of the final runs.
        tuning: the studies and trials.
        compare_with: pairs of labels of optimizers: one, and what it is compared with.
        workloads, methods: in the order of the file.
        across: True if each workload is also compared with the first.
        file, given: the text of its file, and the options that override it.
    """

    name: str
    seeds: tuple[int, ...]
    tuning: Tuning
    compare_with: tuple[tuple[str, str], ...]
    workloads: tuple[Workload, ...]
    methods: tuple[Method, ...]
    across: bool
    file: str
    given: Options

    def comparisons(self) -> list[tuple[str, str]]:
        """Return the pairs (method, reference): those of `compare_with` in each workload or variant, and each
        method with its optimizer in the first variant if `across`."""
        names = {(method.optimizer, method.variant): method.name for method in self.methods}
        pairs = [
            (method.name, names[reference, method.variant])
            for reference in dict.fromkeys(reference for _, reference in self.compare_with)
            for method in self.methods
            if (method.optimizer, reference) in self.compare_with
        ]
        if self.across:
            pairs += [
                (method.name, names[method.optimizer, self.methods[0].variant]) for method in self.methods
            ]
        return [(name, reference) for name, reference in pairs if name != reference]


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
        return from_text(path.stem, read_bytes(path).decode(), given, path.parent)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; name a file, or one of {', '.join(names())}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fix the file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}; fix the file") from None


def from_text(name: str, text: str, given: Options, folder: Path | None = None) -> Plan:
    """Return the study of that name whose file has this text; FILE.py of an optimizer is in `folder`.

    Raises ValueError for text that is no TOML, and UserError as `read`.
    """
    table = tomllib.loads(text)
    if unknown := table.keys() - KEYS:
        raise UserError(f"{min(unknown)} is no part of a study")
    seeds = seeds_of(table, "seeds")
    if not seeds or set(seeds) & set(seeds_of(table, "tuning_seeds")):
        raise UserError("seeds: must have at least one, and none of tuning_seeds")
    base = options_of(table.get("base", {}), "base")
    workloads = _workloads(table)
    optimizers = named(table, "optimizers")
    if not optimizers:
        raise UserError("optimizers: must have at least one")
    tuning = _tuning(table, optimizers)
    methods = [
        _method(label, entries, workload, {"report": False, **base}, tuning, given, folder)
        for workload in workloads
        for label, entries in optimizers
    ]
    _check(methods, seeds)
    labels = [label for label, _ in optimizers]
    return Plan(
        name=name,
        seeds=seeds,
        tuning=tuning,
        compare_with=_pairs(table.get("compare_with", labels[:1]), labels),
        workloads=tuple(workloads),
        methods=tuple(methods),
        across="variants" in table,
        file=text,
        given={key: value for key, value in given.items() if key not in ("data_dir", "report")},
    )


def _pairs(compare_with: Any, labels: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return (label, reference) of each comparison: all others with each name, or the pairs as given."""
    if isinstance(compare_with, list):
        if all(entry in labels for entry in compare_with):
            return tuple((one, other) for other in compare_with for one in labels if one != other)
        possible = [[one, other] for one in labels for other in labels if one != other]
        if all(entry in possible for entry in compare_with):
            return tuple((one, other) for one, other in compare_with)
    raise UserError(f"compare_with: must be names of optimizers, or pairs of names, not {compare_with!r}")


def _tuning(table: dict[str, Any], optimizers: Sequence[tuple[str, Options]]) -> Tuning:
    tuning_seeds = seeds_of(table, "tuning_seeds")
    if SEARCH & table.keys() or any("space" in entries for _, entries in optimizers):
        if tuning_seeds:
            raise UserError("tuning_seeds: each trial of a search has its own seed; leave them out")
        studies, trials = (whole_number(table, key, 3, 1, MOST) for key in ("studies", "trials"))
        return Tuning(True, studies, trials, space_seed=whole_number(table, "space_seed", 0, 0, 2**63 - 1))
    counts = {label: len(points_given(label, entries)) for label, entries in optimizers}
    if len(set(counts.values())) > 1 or not min(counts.values()):
        raise UserError(f"candidates: must be equally many for each optimizer, at least one, not {counts}")
    trials = next(iter(counts.values()))
    if trials > 1 and not tuning_seeds:
        raise UserError("tuning_seeds: needed to choose between candidates; give seeds that are not in seeds")
    tuning_seeds = tuning_seeds if trials > 1 else ()
    return Tuning(False, len(tuning_seeds), trials, tuning_seeds)


def _method(
    label: str,
    entries: Options,
    workload: Workload,
    base: Options,
    tuning: Tuning,
    given: Options,
    folder: Path | None,
) -> Method:
    entries = {"optimizer": label, **entries}
    optimizer = entries["optimizer"] = _located(entries["optimizer"], folder)
    candidates, space = entries.pop("candidates", None), entries.pop("space", None)
    if candidates is not None and space is not None:
        raise UserError(f"{label}: has a space and candidates; leave one of them out")
    fixed, ranges = split({} if space is None else space, label)
    entries |= fixed
    points: list[Options] = [{}] if candidates is None else points_given(label, {"candidates": candidates})
    if ranges:
        points = draw(ranges, tuning.studies * tuning.trials, tuning.space_seed)
    elif candidates is not None and len(points) != tuning.trials:
        raise UserError(f"{label}: candidates must be as many as trials, {tuning.trials}, not {len(points)}")
    options = []
    for point in points:
        own = options_of(as_options({**entries, **point}, optimizer), label)
        options.append({**base, **workload.options, **own, **given})
        resolved = resolve(options[-1])
        if 0 in (resolved.steps, resolved.epochs):
            raise UserError(f"{label}: a run must have a step")
    name = "-".join(filter(None, (label, workload.name)))
    trials = _trials(len(points), tuning)
    return Method(name, label, workload.name, tuple(options), tuple(points), trials, ranges)


def _trials(points: int, tuning: Tuning) -> tuple[Trial, ...]:
    if not tuning.searches:
        studies = list(enumerate(tuning.seeds, 1))
        return tuple(
            Trial(study, k + 1, k, seed, f"candidate-{k + 1}/seed-{seed}")
            for k in range(points)
            for study, seed in studies
        )
    return tuple(
        Trial(
            study,
            number,
            ((study - 1) * tuning.trials + number - 1) % points,  # given points are the same in each study
            1000 * study + number,
            f"study-{study}/trial-{number}",
        )
        for study in range(1, tuning.studies + 1)
        for number in range(1, tuning.trials + 1)
    )


def _located(optimizer: Any, folder: Path | None) -> Any:
    """Return an optimizer's name, of FILE.py:FUNCTION with the whole path of the file in `folder`."""
    if folder is None or not isinstance(optimizer, str) or not is_external(optimizer):
        return optimizer
    file, _, function = optimizer.rpartition(":")
    return optimizer if file == "optax" else f"{(folder / file).absolute()}:{function}"


def _check(methods: Sequence[Method], seeds: Sequence[int]) -> None:
    """Raise UserError for methods that do not fit together."""
    if len({method.name for method in methods}) < len(methods):
        raise UserError("variants: two methods have the same name, optimizer-variant")
    trials = [trial for method in methods for trial in method.trials]
    if both := {trial.seed for trial in trials} & set(seeds):
        raise UserError(f"seeds: {min(both)} is the seed of a trial; give others, such as 1 to 5")
    if trials and not all(resolve(method.candidates[0]).val_fraction for method in methods):
        raise UserError("val_fraction: must be above 0, because validation chooses between candidates")


def _workloads(table: dict[str, Any]) -> list[Workload]:
    """Return the variants or workloads of a file; one without a name if there are none."""
    if {"variants", "workloads"} <= table.keys():
        raise UserError("variants: are workloads compared with the first; name all under one of the two")
    entries = named(table, "variants") + named(table, "workloads")
    return [_workload(name, options) for name, options in entries] or [Workload("", {})]


def _workload(name: str, options: Options) -> Workload:
    target, how = options.pop("target", None), options.pop("target_found", "")
    accuracy: Any = None
    if target is not None:
        if isinstance(target, dict) and len(target) == 1:
            accuracy = target.get("accuracy")
        if type(accuracy) not in (int, float) or not 0 < accuracy <= 1:
            raise UserError(f"{name}: target must be {{ accuracy = A }}, A above 0 and at most 1")
        if not isinstance(how, str) or not how.strip():
            raise UserError(f"{name}: target_found must say in a sentence how the target was found")
        return Workload(name, options_of(options, name), float(accuracy), how)
    if how:
        raise UserError(f"{name}: target_found without a target; add target = {{ accuracy = A }}")
    return Workload(name, options_of(options, name))


def framework_of(plan: Plan) -> str:
    """Return the engine of a study; all its runs have the same."""
    return str(plan.methods[0].candidates[0].get("framework", FRAMEWORKS[0]))
