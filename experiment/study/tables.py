"""A study's results as tables, in Markdown and in one HTML file with the figures inside."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiment.files.run_folder import short_commit
from experiment.program import command
from experiment.report.page import render
from experiment.study.running import words

Json = dict[str, Any]


class Table(NamedTuple):
    """A heading, a text about the numbers, the names of the columns, and the rows."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(study: Json) -> Iterator[Table]:
    """Results, comparisons and tuning; `study` is that of `results.collect`."""
    methods = study["contestants"]
    yield Table(
        "Test results",
        "The mean over the seeds, in brackets the standard deviation, and Student's 95 % interval of the "
        "mean, for this configuration and test set. Each run evaluated the test set once, after its last "
        "step.",
        ("", "configuration", "seeds", "accuracy, %", "interval", "macro F1, %", "loss", "training loss"),
        [_result(name, method, len(study["seeds"])) for name, method in methods.items()],
    )
    if study["comparisons"]:
        yield Table(
            "Differences, seed by seed",
            "Runs of one seed start from the same weights and see the same batches: they are paired. An "
            "interval that contains 0 does not show a difference. Nothing is corrected for the number of "
            "comparisons.",
            ("", "compared with", "seeds", "accuracy, points", "interval", "", "F1, points", "loss"),
            [_comparison(pair, len(study["seeds"])) for pair in study["comparisons"]],
        )
    if study["tuning_seeds"]:
        yield Table(
            "Tuning",
            f"Each of a method's {study['budget']} configurations is run in full, with the tuning seed "
            f"{' and '.join(map(str, study['tuning_seeds']))}. The one with the highest validation accuracy, "
            "here in %, is chosen; ties go by loss, then to the first. Where the choice is at the edge of "
            "the range, a better configuration may lie beyond.",
            ("", *(f"configuration {k + 1}" for k in range(study["budget"])), "chosen"),
            [_tuning(name, method, study["budget"]) for name, method in methods.items()],
        )


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
