"""Run every CPU benchmark, one after another, and write their output to a file.

    python -m benchmarks --out results.md     # two hours on two cores; nothing else should run
    python -m benchmarks --only every_network first_step --data-dir DIR

The figures of `benchmarks/RESULTS.md` come from these commands. A GPU has its own, `benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from numpy_ref.cores import core_count

ROOT = Path(__file__).resolve().parent.parent
COMMANDS: dict[str, list[list[str]]] = {
    "every_network": [[]],
    "growth": [[]],
    "convolution": [["micro"], ["layers"], ["loops"]],
    "first_step": [["--rounds", "3"]],
    "memory": [[]],
    "input_pipeline": [[]],  # with --data-dir
}


def header() -> str:
    """Return the date, the machine and the versions."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    machine = f"{core_count()} cores, {platform.machine()}, {platform.system()}"
    return (
        f"# CPU, {time.strftime('%d %B %Y')}\n\n{machine}, Python {platform.python_version()}; {versions}.\n"
    )


def run(name: str, arguments: Sequence[str]) -> tuple[str, bool]:
    """Run one benchmark; return its Markdown section (command and output) and True if it succeeded."""
    command = ["python", "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    failure = "" if done.returncode == 0 else f"failed with status {done.returncode}\n"
    return f"\n`{' '.join(command)}`\n\n```\n{done.stdout.strip()}\n{failure}```\n", not failure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="run the benchmarks of a CPU")
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--data-dir", help="a TFDS data directory; without it input_pipeline is left out")
    parser.add_argument("--out", type=Path, help="Markdown file for all of it, written as it goes")
    options = parser.parse_args(argv)
    if "input_pipeline" in options.only and options.data_dir is None:
        options.only.remove("input_pipeline")
    text, good = header(), True
    print(text, flush=True)
    for name in options.only:
        for arguments in COMMANDS[name]:
            more = ["--data-dir", options.data_dir] if name == "input_pipeline" else []
            section, ended = run(name, [*arguments, *more])
            print(section, flush=True)
            text, good = text + section, good and ended
            if options.out:
                options.out.write_text(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
