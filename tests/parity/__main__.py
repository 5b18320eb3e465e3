"""Replay a case that failed, from the inputs that it left.

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
    """Compute the case anew and print each pair's difference, then and now; 1 if engines disagree now."""
    from tests.parity import compare, dump
    from tests.parity.engines import run_all

    case, inputs, recorded, faults, versions = dump.read(folder)
    print(
        f"{case.name}: {case.kind} of {list(case.shape)}, {case.precision}, seed {case.seed}, {case.options}"
    )
    now = dump.versions()
    changed = [f"{k} {v}, now {now[k]}" for k, v in versions.items() if now[k] != v]
    print(f"versions: {'; '.join(changed) or 'those of the dump'}")
    print("recorded:", *faults, sep="\n  ")
    after = compare.compare(case, inputs, run_all(case, inputs, recorded))
    before = {each[:3]: each for each in compare.compare(case, inputs, recorded)}
    print(f"\n{'tensor':32} {'engines':42} {'recorded':>9} {'now':>9} {'allowed':>9}")
    for each in after:
        pair, mark = f"{each.left} - {each.right}", "  DIFFERS" if each.fault else ""
        then = before[each[:3]].error if each[:3] in before else math.nan  # an engine raised an error
        print(f"{each.tensor:32} {pair:42} {then:9.2e} {each.error:9.2e} {each.allowed:9.1e}{mark}")
    print(*(each.fault for each in after if each.fault), sep="\n")
    print("verdict then:", compare.verdict(list(before.values())) if before else "an engine raised an error")
    print("verdict now:", compare.verdict(after))
    return int(any(each.fault for each in after))


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("replay", help="compute a case anew").add_argument("dump", type=Path)
    options = parser.parse_args(argv)
    if not (options.dump / "case.json").is_file():
        parser.error(f"{options.dump} holds no case.json: not a dump of this suite")
    return replay(options.dump)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(sys.argv[1:]))
