"""`python -m experiment verify PATH...`: are runs, checkpoints and weights what was written?"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiment.errors import UserError, printable
from experiment.files.run_folder import checkpoint_steps
from experiment.files.soundness import Finding, verify_checkpoint, verify_run, verify_weights
from experiment.options.command_line import Parser
from experiment.program import SCRIPT, command, found
from experiment.report import FOLDER
from experiment.report.figures import draw
from experiment.report.page import render_report
from experiment.report.reading import read_run

LOG = re.compile(r"<details><summary>log\.txt.*?</details>", re.DOTALL)
FIGURES = re.compile(r"data:image/[^\"]*")
# The name of the folder, which may have been moved, and the program that was typed
NAMES = re.compile(
    r": [^<]*</title>|(?<=<p class=\"faint\">).*?(?=: )|"
    + "|".join(
        re.escape(form)
        for words in ("python train.py", "python -m experiment train", f"{SCRIPT} train")
        for form in (words, " ".join(f"<span>{word}</span>" for word in words.split()))
    )
)


def main(argv: Sequence[str]) -> int:
    """Verify what the paths name, and print a line for each file or checkpoint.

    Returns:
        0 if all is sound; 1 if something is not.

    Raises:
        UserError: a path is absent, or nothing of a run is in it.
    """
    parser = Parser(
        prog=command("verify"),
        description="Verify the folder of a run, a checkpoint, a file of weights, or a folder with any of "
        "them in it: sums and hashes, names and shapes, numbers that are not finite, metrics.jsonl against "
        "the checkpoints, results and report against their data. Nothing is changed. The exit status is 1 "
        "if something is damaged.",
    )
    parser.add_path("paths", metavar="PATH", any_bytes=True, nargs="+", help="a folder or a file of weights")
    parser.add_argument("--json", action="store_true", help="print a list of findings as JSON")
    options = parser.parse_args(argv)
    findings: list[Finding] = []
    for given in options.paths:
        path = found(given)
        if not path.exists():
            raise UserError(f"{path}: not found; name the folder of a run, a checkpoint or a file of weights")
        before = len(findings)
        for finding in _verify(path):
            findings.append(finding)
            if not options.json:
                _print(finding)
        if len(findings) == before:
            raise UserError(f"{path}: holds no run, no checkpoint and no weights; name another folder")
    bad = sum(bool(finding.problems) for finding in findings)
    if options.json:
        rows = [{**dataclasses.asdict(finding), "path": str(finding.path)} for finding in findings]
        print(json.dumps(rows, indent=2))
    else:
        print(
            f"{len(findings)} verified, {bad} of them damaged"
            if bad
            else f"{len(findings)} verified, all sound"
        )
    return 1 if bad else 0


def _print(finding: Finding) -> None:
    words = "; ".join([*finding.problems, *finding.notes])
    mark = "DAMAGED" if finding.problems else "ok"
    print(f"{mark:8} {printable(str(finding.path))}" + (f": {printable(words)}" if words else ""))
    sys.stdout.flush()


def _verify(path: Path) -> Iterator[Finding]:
    """Verify what is at a path; in a folder that is no run and no checkpoint, all that is below it."""
    if path.is_file():
        yield verify_weights(path)[0]
    elif (path / "config.json").exists():
        yield from verify_run(path)
        yield from _verify_report(path)
    elif (path / "manifest.json").exists() or (path.name.isdecimal() and (path / "state").is_dir()):
        yield verify_checkpoint(path.absolute())[0]
    else:
        # A checkpoint that is being saved or removed ends in .incomplete
        names = [name for name in os.listdir(path) if name[0] != "." and not name.endswith(".incomplete")]
        for entry in (path / name for name in sorted(names)):
            if entry.is_dir() and not entry.is_symlink():
                yield from _verify(entry)
            elif entry.suffix == ".safetensors":
                yield verify_weights(entry)[0]


def _verify_report(run_dir: Path) -> Iterator[Finding]:
    """Compare a report with the page that its data give now, but for the log, which goes on, and names."""
    page = run_dir / FOLDER / "index.html"
    if not page.is_file():
        return
    finding = Finding(page, "report")
    try:
        run = read_run(run_dir)
        pages = page.read_text(encoding="utf-8", errors="replace"), render_report(run, draw(run))
        present, expected = (NAMES.sub("", LOG.sub("", text)) for text in pages)
        if present != expected:
            if FIGURES.sub("", present) == FIGURES.sub("", expected):
                finding.notes.append("its figures are damaged, or of other versions of matplotlib and Pillow")
            elif checkpoint_steps(run_dir / "checkpoints") and not run.finished:
                finding.notes.append("it is of an earlier step of the run, which goes on")
            else:
                finding.problems.append(
                    f"it is not what the data give; `{command('report')}` writes it again"
                )
    except UserError as error:
        finding.problems.append(str(error))
    yield finding
