"""Campaigns of kills, races and failing file systems against real runs; each prints a table.

    python -m benchmarks.reliability elastic --times 30     # a quarter of an hour on two cores

Exit status 1 if something was lost. The tables of docs/reliability.md come from these commands.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reliability import elastic


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if something was lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    campaigns = parser.add_subparsers(dest="campaign", required=True)
    killed = campaigns.add_parser("elastic", help="one of four processes is killed; fewer go on")
    killed.add_argument("--times", type=int, default=30, help="number of kills (default 30)")
    killed.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    killed.add_argument("--folder", type=Path, help="where the runs go; what failed is kept there")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return 0 if elastic.run(options.times, options.seed, folder) else 1


if __name__ == "__main__":
    sys.exit(main())
