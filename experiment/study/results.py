"""The results of a study as one JSON object, from which tables are made, and with the runs curves.

Its keys are those of the first version: "contestants" are methods, "setting" is a configuration, "budget" is
the number of trials.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiment.files import run_folder
from experiment.options.resolving import resolve
from experiment.study.plan import Method, Plan
from experiment.study.running import (
    Run,
    candidate,
    choose,
    final_runs,
    has_diverged,
    is_done,
    lines,
    validation,
)
from experiment.study.statistics import Summary, paired, summarize

MEASURES = ("accuracy", "loss", "f1")
Json = dict[str, Any]


def collect(plan: Plan, folder: Path, command: Sequence[str]) -> Json:
    """Return the results of all runs that have ended so far.

    Returns:
        {"name", "command", "seeds", "tuning_seeds", "budget", "made_with", "contestants": {name: ...},
        "comparisons": [...]}; every mean has its "n", "sd" and "low" and "high", the 95 % interval. Seeds
        that diverged are in no mean; they are listed, and in a comparison those of either side.

    Raises:
        UserError: a folder holds a run of another study.
    """
    methods = {method.name: _method(plan, folder, method) for method in plan.methods}
    return {
        "name": plan.name,
        "command": list(command),
        "seeds": list(plan.seeds),
        "tuning_seeds": list(plan.tuning_seeds),
        "budget": plan.trials,
        "made_with": _made_with(folder),
        "contestants": methods,
        "comparisons": [
            {"of": of, "with": to, **_compared(methods[of], methods[to])} for of, to in plan.comparisons()
        ],
    }


def _method(plan: Plan, folder: Path, method: Method) -> Json:
    tuning = []
    for k, configuration in enumerate(method.configurations):
        runs = candidate(plan, folder, method, k)
        if all(is_done(run) for run in runs):
            accuracies = [None if has_diverged(run.folder) else validation(run.folder)[0] for run in runs]
            tuning.append({"setting": configuration, "val_accuracy": accuracies})
    tuned = not plan.tuning_seeds or len(tuning) == plan.trials
    chosen = choose(plan, folder, method) if tuned else None
    runs = [] if chosen is None else final_runs(plan, folder, method, chosen)
    runs = [run for run in runs if is_done(run)]
    ended = {str(run.options["seed"]): _test(run) for run in runs if not has_diverged(run.folder)}
    return {
        "optimizer": method.optimizer,
        "variant": method.variant,
        "tuning": tuning if plan.tuning_seeds else [],
        "chosen": chosen,
        "setting": None if chosen is None else method.configurations[chosen],
        "diverged": [run.options["seed"] for run in runs if has_diverged(run.folder)],
        "runs": ended,
        **{name: in_json(summarize([run[name] for run in ended.values()])) for name in MEASURES},
    }


def _test(run: Run) -> Json:
    """Return the test metrics of a run, the mean loss of its last training epoch, and its cost.

    `wall_seconds` counts whatever else the machine did, `processor_seconds` the run alone. The latter is None
    for runs of older versions and for seeds that trained in one process.
    """
    summary = run_folder.read_json(run.folder / "summary.json")
    epochs = [line["loss"] for line in lines(run.folder, "train")]
    cost = {name: summary[name] for name in ("steps", "wall_seconds", "images_per_second")}
    cost["processor_seconds"] = summary.get("processor_seconds")
    cost["steps_per_second"] = summary["images_per_second"] / resolve(run.options).batch_size
    return {
        **{name: summary["test"][name] for name in MEASURES},
        "train_loss": (epochs or [None])[-1],
        **cost,
    }


def _compared(ours: Json, theirs: Json) -> Json:
    """Return the differences between two methods, seed by seed, and the seeds of which a run diverged."""
    both = [(run, theirs["runs"][seed]) for seed, run in ours["runs"].items() if seed in theirs["runs"]]
    return {
        "diverged": sorted({*ours["diverged"], *theirs["diverged"]}),
        **{
            name: in_json(paired([a[name] for a, _ in both], [b[name] for _, b in both])) for name in MEASURES
        },
    }


def in_json(summary: Summary) -> Json:
    """Return a summary with the ends of its interval."""
    low, high = summary.mean - summary.half_width, summary.mean + summary.half_width
    return {**dataclasses.asdict(summary), "low": low, "high": high}


def _made_with(folder: Path) -> list[Json]:
    """Versions, device and commit of all runs, each combination once."""
    combinations: list[Json] = []
    for path in sorted(folder.glob("**/config.json")):
        for session in run_folder.read_record(path.parent)["sessions"]:
            known = {name: session[name] for name in ("device", "cpu_count", "versions", "git_commit")}
            if known not in combinations:
                combinations.append(known)
    return combinations
