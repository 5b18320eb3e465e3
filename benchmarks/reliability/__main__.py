"""Campaigns of kills, races and failing file systems against real runs; each prints a table.

    python -m benchmarks.reliability elastic --times 30     # a quarter of an hour on two cores
    python -m benchmarks.reliability races --times 100
    python -m benchmarks.reliability crashes --modes kill   # every file-system operation; needs cc and Linux
    python -m benchmarks.reliability damaged-files --times 500
    python -m benchmarks.reliability arguments --times 500
    python -m benchmarks.reliability odd-files
    python -m benchmarks.reliability soak --steps 10000     # nothing disturbs it; draws docs/soak.png

Exit status 1 if something was lost, or grew. The tables of docs/reliability.md come from these commands.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reliability import crashes, damaged_files, elastic, odd_inputs, races, soak


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--folder", type=Path, help="where the runs go; what failed is kept there")
    common.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    campaigns = parser.add_subparsers(dest="campaign", required=True)
    killed = campaigns.add_parser("elastic", parents=[common], help="one of four processes is killed")
    killed.add_argument("--times", type=int, default=30, help="number of kills (default 30)")
    raced = campaigns.add_parser("races", parents=[common], help="several commands in one folder")
    raced.add_argument("--times", type=int, default=100, help="number of trials (default 100)")
    crashed = campaigns.add_parser("crashes", parents=[common], help="each file-system operation fails")
    crashed.add_argument("--modes", nargs="+", choices=list(crashes.MODES), default=list(crashes.MODES))
    crashed.add_argument("--stride", type=int, default=1, help="take every N-th operation (default 1)")
    for name, words in (("damaged-files", "files of a run"), ("arguments", "command lines")):
        damaged = campaigns.add_parser(name, parents=[common], help=f"{words}, damaged or odd")
        damaged.add_argument("--times", type=int, default=500, help="number of trials (default 500)")
    campaigns.add_parser("odd-files", parents=[common], help="files of every kind, malformed or huge")
    soaked = campaigns.add_parser("soak", parents=[common], help="a long run: does anything grow?")
    soaked.add_argument("--steps", type=int, default=10_000, help="of each engine (default 10000)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if something was lost."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    if options.campaign == "crashes" and crashes.PRELOADED not in os.environ:
        return crashes.run_with_shim(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        match options.campaign:
            case "elastic":
                good = elastic.run(options.times, options.seed, folder)
            case "races":
                good = races.run(options.times, options.seed, folder)
            case "damaged-files":
                good = damaged_files.damaged_files(folder, options.times, options.seed).report()
            case "arguments":
                good = odd_inputs.odd_command_lines(folder, options.times, options.seed).report()
            case "odd-files":
                good = odd_inputs.odd_files(folder).report()
            case "soak":
                good = soak.run(options.steps, folder)
            case _:
                good = crashes.run(folder, options.modes, options.stride)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
