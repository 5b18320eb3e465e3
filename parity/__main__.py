"""`python -m parity FILE.py`: compare the two models that a file defines."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parity import ParityError, Report, compare

_NAMES = ("reference", "candidate", "inputs")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; return 0 if the models agree, 1 if they differ, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m parity",
        description="Compare two models. FILE.py defines reference and candidate (parity.torch_model(...), "
        "parity.nnx_model(...), ...), inputs, and where it differs candidate_inputs.",
        epilog="Exit status: 0 if the models agree, 1 if they differ, 2 for a mistake in arguments or file.",
    )
    parser.add_argument("file", metavar="FILE.py", type=Path)
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="write the report there, too, as one HTML file"
    )
    options = parser.parse_args(argv)
    try:
        report = run_file(options.file)
    except ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    if options.html is not None:
        try:
            report.save(options.html)
        except OSError as error:
            print(f"error: --html: {options.html} cannot be written ({error.strerror})", file=sys.stderr)
            return 2
    return 0 if report.agrees else 1


def run_file(path: Path) -> Report:
    """Compare the models that a Python file defines.

    Raises:
        ParityError: there is no such file, or it lacks a name.
    """
    if not path.is_file():
        raise ParityError(f"{path}: no such file; give a Python file that defines {', '.join(_NAMES)}")
    sys.path.insert(0, str(path.resolve().parent))  # the file imports what lies beside it
    try:
        defined: dict[str, Any] = runpy.run_path(str(path))
    finally:
        sys.path.pop(0)
    missing = [name for name in _NAMES if name not in defined]
    if missing:
        raise ParityError(f"{path} does not define {missing[0]}; it must define {', '.join(_NAMES)}")
    return compare(
        defined["reference"], defined["candidate"], defined["inputs"], defined.get("candidate_inputs")
    )


if __name__ == "__main__":
    sys.exit(main())
