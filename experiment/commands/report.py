"""`python -m experiment report RUN...`: the report of runs, also of one that goes on or was killed."""

from collections.abc import Sequence

from experiment.errors import UserError
from experiment.files import metrics_log
from experiment.files.run_folder import write_file
from experiment.options.command_line import Parser
from experiment.program import command
from experiment.report import FOLDER, write_report
from experiment.report.reading import read_run


def main(argv: Sequence[str]) -> int:
    """Write report/index.html in the folder of each run; return 0. All are looked at first.

    Raises:
        UserError: a folder that is not that of a run, or cannot be written in.
    """
    parser = Parser(
        prog=command("report"),
        description=f"Write {FOLDER}/index.html in the folder of a run, and the figures in it as PNG. The "
        "run may go on meanwhile, or have been killed: the page says what is absent.",
    )
    parser.add_path("runs", metavar="RUN", nargs="+", help="the folder of a run")
    parser.add_argument(
        "--csv",
        action="store_true",
        help=f"write {FOLDER}/metrics.csv, too: metrics.jsonl as a table, a column for each name, an empty "
        "cell where a line has no value or one that is not finite",
    )
    options = parser.parse_args(argv)
    for run_dir in options.runs:
        read_run(run_dir)
    for run_dir in options.runs:
        try:
            print(write_report(run_dir)[0])
            if options.csv:
                table = run_dir / FOLDER / "metrics.csv"
                write_file(table, metrics_log.to_csv(run_dir / metrics_log.NAME).encode())
                print(table)
        except OSError as error:
            raise UserError(f"{run_dir / FOLDER}: cannot be written ({error.strerror})") from None
    return 0
