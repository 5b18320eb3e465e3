"""Replay a failed case from its dump.

python -m tests.parity replay parity-dumps/CASE
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def replay(folder: Path) -> int:
    """Compute the case again; print each pair's recorded and new difference. Return 1 if engines disagree."""
    from tests.parity import compare, dump
    from tests.parity.engines import run_all

    case, inputs, recorded, faults, versions = dump.read(folder)
    print(
        f"{case.name}: {case.kind} of {list(case.shape)}, {case.precision}, seed {case.seed}, {case.options}"
    )
    installed = dump.versions()
    changed = [f"{k} {v}, now {installed[k]}" for k, v in versions.items() if installed[k] != v]
    print(f"versions: {'; '.join(changed) or 'those of the dump'}")
    print("recorded:", *faults, sep="\n  ")
    after = compare.compare(case, inputs, run_all(case, inputs, recorded))
    before = {comparison[:3]: comparison for comparison in compare.compare(case, inputs, recorded)}
    print(f"\n{'tensor':32} {'engines':42} {'recorded':>9} {'now':>9} {'allowed':>9}")
    for now in after:
        pair, mark = f"{now.left} - {now.right}", "  DIFFERS" if now.fault else ""
        recorded_error = before[now[:3]].error if now[:3] in before else math.nan  # an engine raised an error
        print(f"{now.tensor:32} {pair:42} {recorded_error:9.1e} {now.error:9.1e} {now.allowed:9.1e}{mark}")
    print(*(now.fault for now in after if now.fault), sep="\n")
    print("verdict then:", compare.verdict(list(before.values())) if before else "an engine raised an error")
    print("verdict now:", compare.verdict(after))
    return int(any(comparison.fault for comparison in after))


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("replay", help="compute a case again").add_argument("dump", type=Path)
    options = parser.parse_args(argv)
    if not (options.dump / "case.json").is_file():
        parser.error(f"{options.dump} holds no case.json: not a dump of this suite")
    return replay(options.dump)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(sys.argv[1:]))
