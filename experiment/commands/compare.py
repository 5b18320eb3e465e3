"""`python -m experiment compare RUN RUN...`: a page of runs side by side, and its figures as PNG."""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiment.errors import UserError
from experiment.options.command_line import Parser
from experiment.program import command
from experiment.report import write_page
from experiment.report.comparison import NAMES, is_comparison, render_comparison
from experiment.report.reading import read_run


def main(argv: Sequence[str]) -> int:
    """Write the page; return 0. Nothing is written unless all runs can be read.

    Raises:
        UserError: fewer than two runs; a folder that is not that of a run; DIR is in use or cannot be made.
    """
    parser = Parser(
        prog=command("compare"),
        description="Runs side by side, finished or not: their curves over one another, a table of final and "
        "best results and of speeds, and the options in which they differ.",
    )
    parser.add_path("runs", metavar="RUN", nargs="+", help="the folder of a run; two or more")
    parser.add_path("--out", metavar="DIR", default=Path("comparison"), help="default: comparison")
    options = parser.parse_args(argv)
    if len(options.runs) < 2:
        raise UserError("RUN: one run has nothing to be compared with; name two or more")
    out: Path = options.out
    if out.exists() and not (out.is_dir() and is_comparison(out)):
        raise UserError(f"--out: {out} holds something else than a comparison; name another folder")
    runs = [read_run(run_dir) for run_dir in options.runs]
    for run in runs:
        for line in run.damaged:
            print(f"{run.folder}: {line}", file=sys.stderr)
    page, images = render_comparison(runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        print(write_page(out, page, images, NAMES))
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror}); name another folder") from None
    return 0
