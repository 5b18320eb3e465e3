"""Time from `python train.py` to the end of its first step, with a cold and a warm compilation cache.

python -m benchmarks.first_step --rounds 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def seconds_to_first_step(cache: Path, flags: list[str]) -> float:
    """Return the seconds until train.py reports its first step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-u",
            str(ROOT / "train.py"),
            "--steps",
            "1",
            "--run-dir",
            f"{folder}/run",
            *flags,
        ]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        elapsed = 0.0
        for line in process.stdout:
            if line.startswith("first step"):
                elapsed = time.perf_counter() - begun
        if process.wait() or not elapsed:
            raise RuntimeError(f"train.py ended with status {process.returncode} and took no step")
    return elapsed


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="time from the command to the first step; further flags go to train.py"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args, flags = parser.parse_known_args()
    cold, warm = [], []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(seconds_to_first_step(Path(folder), flags))
            warm.append(seconds_to_first_step(Path(folder), flags))
    print(f"train.py {' '.join(flags)}: seconds to the first step, median of {args.rounds}")
    print(
        f"  cold compilation cache {statistics.median(cold):6.1f}   ({', '.join(f'{s:.1f}' for s in cold)})"
    )
    print(
        f"  warm compilation cache {statistics.median(warm):6.1f}   ({', '.join(f'{s:.1f}' for s in warm)})"
    )


if __name__ == "__main__":
    main()
