"""The results of a study as one JSON object, made from the records of its runs; tables and figures follow.

Some keys are those of the first version: "contestants" are methods, "setting" is a configuration, "budget" is
the number of trials of a study, "val_accuracy" of "tuning" has a value for each trial of a configuration.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

from experiment.study.logs import Record, chosen, last_validation
from experiment.study.plan import Method, Plan
from experiment.study.scores import area, median_of_best, ratios, steps_to_target
from experiment.study.statistics import Summary, holm, p_value, paired, summarize

MEASURES = ("accuracy", "loss", "f1")
COST = ("wall_seconds", "processor_seconds", "steps_per_second")
OF_TRIAL = ("study", "trial", "seed", "point", "outcome")
Json = dict[str, Any]


def make(plan: Plan, records: Sequence[Record], command: Sequence[str]) -> Json:
    """Return the results of all runs that have ended so far.

    Returns:
        {"name", "command", "seeds", "tuning_seeds", "budget", "studies", "searches", "workloads",
        "made_with", "contestants": {name: ...}, "comparisons": [...], "scores": {workload: {method: steps}},
        "ratios": the same of ratios, "profiles": {optimizer: area}}. Every mean has its "n", "sd", "low" and
        "high", the 95 % interval. Seeds that diverged are in no mean; they are listed, and in a comparison
        those of either side. "p" is that of Student's paired test, "p_holm" corrected for all comparisons.
        Steps are infinite for a miss, which JSON has as null.
    """
    of_method: dict[str, list[Record]] = {method.name: [] for method in plan.methods}
    for record in records:
        of_method[record["method"]].append(record)
    targets = {workload.name: workload.target for workload in plan.workloads}
    methods = {
        method.name: _method(plan, method, of_method[method.name], targets[method.variant])
        for method in plan.methods
    }
    return {
        "name": plan.name,
        "command": list(command),
        "seeds": list(plan.seeds),
        "tuning_seeds": list(plan.tuning.seeds),
        "budget": plan.tuning.trials,
        "studies": plan.tuning.studies,
        "searches": plan.tuning.searches,
        "workloads": [
            {"name": each.name, "target": each.target, "target_found": each.target_found}
            for each in plan.workloads
        ],
        "made_with": _made_with(records),
        "contestants": methods,
        "comparisons": _comparisons(plan, methods),
        **_profiles(plan, methods),
    }


def _method(plan: Plan, method: Method, records: Sequence[Record], target: float | None) -> Json:
    trials = {(r["study"], r["trial"]): r for r in records if r["study"] is not None}
    planned = [trial for trial in method.trials if (trial.study, trial.number) in trials]
    finals = [record for record in records if record["study"] is None]
    point = chosen(method, list(trials.values()))
    ended = [record for record in finals if record["outcome"] == "completed"]
    runs = {str(record["seed"]): _test(record) for record in ended}
    return {
        "optimizer": method.optimizer,
        "variant": method.variant,
        "ranges": {name: list(ends) for name, ends in method.ranges.items()},
        "trials": [_trial(trials[trial.study, trial.number], target) for trial in planned],
        **_score(plan, method, trials, target),
        "tuning": _tuning(method, trials),
        "chosen": point,
        "setting": None if point is None else method.configurations[point],
        "diverged": [record["seed"] for record in finals if record["outcome"] == "diverged"],
        "runs": runs,
        **{name: in_json(summarize([run[name] for run in runs.values()])) for name in MEASURES},
    }


def _trial(record: Record, target: float | None) -> Json:
    accuracy, loss = last_validation(record)
    curve, diverged = record["validation"], record["outcome"] == "diverged"
    steps = None if target is None else steps_to_target(curve["step"], curve["accuracy"], target)
    return {
        **{name: value for name, value in record.items() if name in OF_TRIAL},
        "steps_to_target": steps,
        "val_accuracy": None if diverged else accuracy,
        "val_loss": None if diverged else loss,
        **{name: record["cost"].get(name) for name in COST},
    }


def _score(plan: Plan, method: Method, trials: dict[Any, Record], target: float | None) -> Json:
    """Return the best steps to the target of each study whose trials have all ended, and their median."""
    if target is None or not method.trials:
        return {"best_of_studies": [], "score": None}
    studies = []
    for study in range(1, plan.tuning.studies + 1):
        keys = [(trial.study, trial.number) for trial in method.trials if trial.study == study]
        if all(key in trials for key in keys):
            curves = [trials[key]["validation"] for key in keys]
            studies.append([steps_to_target(curve["step"], curve["accuracy"], target) for curve in curves])
    complete = len(studies) == plan.tuning.studies
    return {
        "best_of_studies": [min(steps) for steps in studies],
        "score": median_of_best(studies) if complete else math.nan,
    }


def _tuning(method: Method, trials: dict[Any, Record]) -> list[Json]:
    """Return the configurations whose trials have all ended, with the validation accuracy of each trial."""
    tuning = []
    for k, configuration in enumerate(method.configurations):
        keys = [(trial.study, trial.number) for trial in method.trials if trial.point == k]
        if keys and all(key in trials for key in keys):
            records = [trials[key] for key in keys]
            accuracies = [
                None if record["outcome"] == "diverged" else last_validation(record)[0] for record in records
            ]
            tuning.append({"setting": configuration, "val_accuracy": accuracies})
    return tuning


def _test(record: Record) -> Json:
    """Return the test metrics of a run, the mean loss of its last training epoch, and its cost.

    `wall_seconds` counts whatever else the machine did, `processor_seconds` the run alone. The latter is None
    for runs of older versions and for seeds that trained in one process.
    """
    test = record["test"] or {}
    return {**{name: test[name] for name in MEASURES}, "train_loss": record["train_loss"], **record["cost"]}


def _comparisons(plan: Plan, methods: Json) -> list[Json]:
    comparisons = [
        {"of": of, "with": to, **_compared(methods[of], methods[to])} for of, to in plan.comparisons()
    ]
    corrected = holm([1.0 if pair["p"] is None else pair["p"] for pair in comparisons])
    return [
        {**pair, "p_holm": None if pair["p"] is None else p}
        for pair, p in zip(comparisons, corrected, strict=True)
    ]


def _compared(ours: Json, theirs: Json) -> Json:
    """Return the differences between two methods, seed by seed, and the seeds of which a run diverged.

    There is no test, "p" None, where a seed diverged: those that did not prove nothing alone.
    """
    both = [(run, theirs["runs"][seed]) for seed, run in ours["runs"].items() if seed in theirs["runs"]]
    diverged = sorted({*ours["diverged"], *theirs["diverged"]})
    differences = [a["accuracy"] - b["accuracy"] for a, b in both]
    return {
        "diverged": diverged,
        "p": None if diverged or len(both) < 2 else p_value(differences),
        "of_studies": _tuned_apart(ours["trials"], theirs["trials"]),
        **{
            name: in_json(paired([a[name] for a, _ in both], [b[name] for _, b in both])) for name in MEASURES
        },
    }


def _tuned_apart(ours: Sequence[Json], theirs: Sequence[Json]) -> list[float]:
    """Return the difference of the best validation accuracies of each study that both methods have begun.

    They differ by the luck of tuning, which the final runs of one chosen point do not show.
    """

    def best(trials: Sequence[Json]) -> dict[int, float]:
        result: dict[int, float] = {}
        for trial in trials:
            result[trial["study"]] = max(result.get(trial["study"], 0.0), trial["val_accuracy"] or 0.0)
        return result

    first, second = best(ours), best(theirs)
    return [first[study] - second[study] for study in first if study in second]


def _profiles(plan: Plan, methods: Json) -> Json:
    """Return scores, ratios and profiles over the workloads with a target that all methods have ended on."""
    scores: dict[str, dict[str, float]] = {}
    for workload in plan.workloads:
        of_workload = {
            method.optimizer: methods[method.name]["score"]
            for method in plan.methods
            if method.variant == workload.name
        }
        if workload.target is not None and not any(s is None or math.isnan(s) for s in of_workload.values()):
            scores[workload.name] = of_workload
    of_all = ratios(scores)
    labels = dict.fromkeys(method.optimizer for method in plan.methods)
    return {
        "scores": scores,
        "ratios": of_all,
        "profiles": {label: area(label, of_all) for label in labels} if of_all else {},
    }


def in_json(summary: Summary) -> Json:
    """Return a summary with the ends of its interval."""
    low, high = summary.mean - summary.half_width, summary.mean + summary.half_width
    return {**dataclasses.asdict(summary), "low": low, "high": high}


def _made_with(records: Sequence[Record]) -> list[Json]:
    """Versions, device and commit of all runs, each combination once."""
    combinations: list[Json] = []
    for record in records:
        combinations += [made_with for made_with in record["made_with"] if made_with not in combinations]
    return combinations


def to_csv(study: Json) -> str:
    """Return a line for each run that has ended: its point, its validation, its test and its cost.

    A trial has a study and a number, a final run a test. Steps to the target are empty for a miss.
    """
    rows = []
    for method in study["contestants"].values():
        names = {"workload": method["variant"], "method": method["optimizer"]}
        for trial in method["trials"]:
            measured = {name: value for name, value in trial.items() if name != "point"}
            rows.append({**names, "kind": "trial", **measured, **trial["point"]})
        for seed in [*method["runs"], *map(str, method["diverged"])]:
            run = method["runs"].get(seed, {})
            measured = {f"test_{name}": run.get(name) for name in MEASURES} | {n: run.get(n) for n in COST}
            outcome = "completed" if run else "diverged"
            final = {"kind": "final", "seed": seed, "outcome": outcome}
            rows.append({**names, **final, **measured, **(method["setting"] or {})})
    first = ["workload", "method", "kind", "study", "trial", "seed", "outcome"]
    last = ["steps_to_target", "val_accuracy", "val_loss", *(f"test_{name}" for name in MEASURES), *COST]
    options = dict.fromkeys(name for row in rows for name in row if name not in (*first, *last))
    table = io.StringIO()
    writer = csv.DictWriter(table, [*first, *options, *last], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()
