"""A study's results as tables, in Markdown and in one HTML file with the figures inside."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiment.files.run_folder import short_commit
from experiment.program import command
from experiment.report.page import render
from experiment.study.running import words
from experiment.study.space import place
from experiment.study.statistics import CONFIDENCE

Json = dict[str, Any]
EDGE = 0.1  # of a range, in the logarithm


class Table(NamedTuple):
    """A heading, a text about the numbers, the names of the columns, and the rows."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(study: Json) -> Iterator[Table]:
    """Steps to the target, results, comparisons, tuning and cost; `study` is that of `results.make`.

    Studies of older versions have fewer entries, and fewer tables.
    """
    methods = study["contestants"]
    if any(workload["target"] for workload in study.get("workloads", ())):
        yield _steps(study)
    yield Table(
        "Test results",
        "The mean over the seeds, in brackets the standard deviation, and Student's 95 % interval of the "
        "mean, for this configuration and test set. Each run evaluated the test set once, after its last "
        "step.",
        ("", "configuration", "seeds", "accuracy, %", "interval", "macro F1, %", "loss", "training loss"),
        [_result(name, method, len(study["seeds"])) for name, method in methods.items()],
    )
    if study["comparisons"]:
        yield _differences(study)
    if study.get("searches"):
        yield _trials(study)
        yield _cost(study)
    elif study["tuning_seeds"]:
        yield Table(
            "Tuning",
            f"Each of a method's {study['budget']} configurations is run in full, with the tuning seed "
            f"{' and '.join(map(str, study['tuning_seeds']))}. The one with the highest validation accuracy, "
            "here in %, is chosen; ties go by loss, then to the first. Where the choice is at the edge of "
            "the range, a better configuration may lie beyond.",
            ("", *(f"configuration {k + 1}" for k in range(study["budget"])), "chosen"),
            [_tuning(name, method, study["budget"]) for name, method in methods.items()],
        )


def _steps(study: Json) -> Table:
    targets = {w["name"]: w for w in study["workloads"] if w["target"]}
    names = {(m["optimizer"], m["variant"]): m for m in study["contestants"].values()}
    labels = dict.fromkeys(label for label, _ in names)
    rows = []
    for label in labels:
        cells = [_steps_of(names[label, workload], study["studies"]) for workload in targets]
        rows.append([label, *cells, _number(study["profiles"].get(label), 2)])
    found = "; ".join(
        f"{name or 'target'}, {100 * w['target']:g} %: {w['target_found']}" for name, w in targets.items()
    )
    return Table(
        "Steps to the target",
        "The steps until validation reaches the target: the median of the studies, in brackets the best "
        "trial of each. A miss counts as infinite. The last column is the mean, over ratios from 1 to 4, of "
        "the fraction of workloads on which a method needs at most that ratio times the steps of the best: 1 "
        "for a method that is the best on all. It takes the workloads on which the trials of all methods "
        f"have ended. How the targets were found: {found}",
        ("", *(f"{name or 'steps'} to {100 * w['target']:g} %" for name, w in targets.items()), "profile"),
        rows,
    )


def _steps_of(method: Json, studies: int) -> str:
    best = ["missed" if steps is None else f"{steps:.0f}" for steps in method["best_of_studies"]]
    if len(best) < studies:
        return f"{len(best)} of {studies} studies"
    median = "missed" if method["score"] is None else f"{method['score']:.0f}"
    return median if studies == 1 else f"{median} ({', '.join(best)})"


def _differences(study: Json) -> Table:
    pairs = study["comparisons"]
    paired = "Runs of one seed start from the same weights and see the same batches: they are paired. "
    tested = "p_holm" in pairs[0]
    text = "An interval that contains 0 does not show a difference. Nothing is corrected for the number of "
    text += "comparisons."
    if tested:
        text = "The interval is that of one difference, not corrected. p is that of Student's paired test "
        text += f"of the accuracy, corrected for the number of comparisons, {len(pairs)} (Holm). The column "
        text += f"after p has better or worse where p is at most {1 - CONFIDENCE:.2g}; else nothing is shown."
    columns = ["", "compared with", "seeds", "accuracy, points", "interval", "", "F1, points", "loss"]
    rows = [_comparison(pair, len(study["seeds"])) for pair in pairs]
    if tested:
        columns.insert(5, "p")
        for row, pair in zip(rows, pairs, strict=True):
            row.insert(5, _number(pair["p_holm"], 4))
    if study.get("searches"):
        text += " The last column is the difference of the best validation accuracy of each study, the mean "
        text += "and range: where the sign changes, the luck of tuning may decide."
        columns.append("tuning, points")
        for row, pair in zip(rows, pairs, strict=True):
            row.append(_mean_and_range(pair["of_studies"]))
    return Table("Differences, seed by seed", paired + text, columns, rows)


def _mean_and_range(differences: Sequence[float]) -> str:
    if not differences:
        return "-"
    mean, low, high = (
        _number(value, 2, 100, "+")
        for value in (statistics.mean(differences), min(differences), max(differences))
    )
    return mean if len(differences) == 1 else f"{mean} ({low} to {high})"


def _trials(study: Json) -> Table:
    count = study["studies"] * study["budget"]
    return Table(
        "Trials",
        f"{study['studies']} studies of {study['budget']} trials, each with a point of the search space and "
        "its own seed: their validation accuracy after the last step, in %. A diverged trial counts as 0. "
        "The configuration with the highest one is chosen; ties go by loss, then to the first. Within a "
        "tenth of the edge of a range, in the logarithm, a better one may lie beyond.",
        ("", "search space", "trials", "diverged", "best", "median", "worst", "chosen"),
        [_searched(name, method, count) for name, method in study["contestants"].items()],
    )


def _searched(name: str, method: Json, planned: int) -> list[str]:
    trials = method["trials"]
    accuracies = sorted((trial["val_accuracy"] or 0.0 for trial in trials), reverse=True)
    numbers = ["-"] * 3
    if trials:
        numbers = [_number(a, 2, 100) for a in (accuracies[0], statistics.median(accuracies), accuracies[-1])]
    chosen = "-"
    if method["setting"] is not None:
        places = {n: place(method["setting"], ends, n) for n, ends in method["ranges"].items()}
        edges = [n for n, where in places.items() if not EDGE <= where <= 1 - EDGE]
        chosen = words(method["setting"]) + (f"; at the edge: {', '.join(edges)}" if edges else "")
    space = ", ".join(f"{n} {low:g} to {high:g}" for n, (low, high) in method["ranges"].items())
    diverged = sum(trial["outcome"] == "diverged" for trial in trials)
    of = "" if len(trials) == planned else f" of {planned}"
    return [name, space or "fixed", f"{len(trials)}{of}", str(diverged), *numbers, chosen]


def _cost(study: Json) -> Table:
    runs = {
        name: [*method["trials"], *method["runs"].values()] for name, method in study["contestants"].items()
    }
    lost = {
        name: len(method["diverged"]) + sum(trial["outcome"] == "diverged" for trial in method["trials"])
        for name, method in study["contestants"].items()
    }
    every = [run for of_method in runs.values() for run in of_method]
    rows = [_cost_of(name, of_method, lost[name]) for name, of_method in runs.items()]
    return Table(
        "Cost",
        "Of trials and final runs together. Processor time is that of all threads of a run, with its "
        "validations and without waiting; it is not recorded of a run that diverged. Steps a second are "
        "those of training alone, the median over the runs.",
        ("", "runs", "diverged", "processor seconds a run", "in all, minutes", "steps a second"),
        [*rows, _cost_of("all", every, sum(lost.values()))],
    )


def _cost_of(name: str, runs: Sequence[Json], diverged: int) -> list[str]:
    seconds = [run["processor_seconds"] for run in runs if run["processor_seconds"] is not None]
    speeds = [run["steps_per_second"] for run in runs if run["steps_per_second"] is not None]
    return [
        name,
        str(len(runs) + diverged - sum(run.get("outcome") == "diverged" for run in runs)),
        str(diverged),
        _number(statistics.mean(seconds), 1) if seconds else "-",
        _number(sum(seconds) / 60, 1) if seconds else "-",
        _number(statistics.median(speeds), 1) if speeds else "-",
    ]


def _number(value: float | None, digits: int, scale: float = 1, sign: str = "") -> str:
    return "-" if value is None else f"{value * scale:{sign}.{digits}f}"


def _mean_sd(summary: Json, digits: int, scale: float = 1, sign: str = "") -> str:
    deviation = _number(summary["sd"], digits, scale)
    return _number(summary["mean"], digits, scale, sign) + ("" if deviation == "-" else f" ({deviation})")


def _interval(summary: Json, sign: str = "") -> str:
    low, high = (_number(summary[end], 2, 100, sign) for end in ("low", "high"))
    return "-" if low == "-" else f"{low} to {high}"


def _seeds(n: int, planned: int, diverged: Sequence[int]) -> str:
    """The number of seeds in a mean, and those left out because they diverged."""
    gone = f" (diverged: {', '.join(map(str, diverged))})" if diverged else ""
    return f"{n}{f' of {planned}' if n < planned else ''}{gone}"


def _result(name: str, method: Json, planned: int) -> list[str]:
    training = [run["train_loss"] for run in method["runs"].values() if run["train_loss"] is not None]
    return [
        name,
        words(method["setting"]) if method["setting"] is not None else "-",
        _seeds(method["accuracy"]["n"], planned, method["diverged"]),
        _mean_sd(method["accuracy"], 2, 100),
        _interval(method["accuracy"]),
        _mean_sd(method["f1"], 2, 100),
        _mean_sd(method["loss"], 4),
        _number(sum(training) / len(training) if training else None, 4),
    ]


def _comparison(pair: Json, planned: int) -> list[str]:
    accuracy = pair["accuracy"]
    low, high = accuracy["low"], accuracy["high"]
    verdict = ""
    if pair["diverged"]:
        verdict = "-"  # the seeds that did not diverge prove nothing alone
    elif "p_holm" in pair:
        if pair["p_holm"] is not None and pair["p_holm"] <= 1 - CONFIDENCE:
            verdict = "better" if accuracy["mean"] > 0 else "worse"
    elif low is not None and not low <= 0 <= high:
        verdict = "better" if low > 0 else "worse"
    return [
        pair["of"],
        pair["with"],
        _seeds(accuracy["n"], planned, pair["diverged"]),
        _mean_sd(accuracy, 2, 100, "+"),
        _interval(accuracy, "+"),
        verdict,
        _mean_sd(pair["f1"], 2, 100, "+"),
        _mean_sd(pair["loss"], 4, 1, "+"),
    ]


def _tuning(name: str, method: Json, trials: int) -> list[str]:
    cells = [f"{words(tried['setting'])}: {_percent(tried['val_accuracy'])}" for tried in method["tuning"]]
    chosen = "-" if method["chosen"] is None else str(method["chosen"] + 1)
    if trials > 2 and method["chosen"] in (0, trials - 1):
        chosen += ", edge of the range"
    return [name, *cells, *["-"] * (trials - len(cells)), chosen]


def _percent(accuracies: Sequence[float | None]) -> str:
    """The mean, where a diverged run counts as 0."""
    if all(accuracy is None for accuracy in accuracies):
        return "diverged"
    return _number(sum(accuracy or 0 for accuracy in accuracies) / len(accuracies), 2, 100)


def markdown(study: Json) -> str:
    """The tables in Markdown."""
    parts = [f"# Study: {study['name']}", head(study), *(in_markdown(table, "##") for table in tables(study))]
    return "\n\n".join(parts) + "\n"


def in_markdown(table: Table, level: str) -> str:
    """One table under its heading, whose signs are `level`."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = (" | ".join(cell.replace("|", r"\|") for cell in row) for row in rows)
    return f"{level} {table.title}\n\n{table.text}\n\n" + "\n".join(f"| {line} |" for line in lines)


def page(study: Json, figures: Sequence[Path]) -> str:
    """The tables, and PNG files, as one HTML file."""
    return render(
        "study.html",
        title=f"Study: {study['name']}",
        head=head(study).split("`"),
        tables=list(tables(study)),
        figures=[(path.stem, path.read_bytes()) for path in figures],
    )


def head(study: Json) -> str:
    """The command, devices and commits of the runs, as a sentence."""
    sessions = study["made_with"]
    devices = "; ".join(sorted({f"{s['device']}, {s['cpu_count']} cores" for s in sessions}))
    commits = ", ".join(sorted({short_commit(session["git_commit"]) for session in sessions}))
    words = " ".join([command("study"), *study["command"]])
    return f"Reproduce with `{words}`. Runs on {devices or '-'}, of commit {commits or '-'}."
