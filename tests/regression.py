"""Check that a change moves no bit: the same short runs at another commit and in this tree, compared.

    python -m tests.regression BASE              # BASE: a commit, such as HEAD~3 or main
    python -m tests.regression BASE --only jax-remat numpy-killed

Each run is a real `python train.py`. The SHA-256 of every tensor, in the weights and in the checkpoint, and
of `metrics.jsonl` must agree. Both sides run on this machine, with the same packages, one after the other. A
difference is printed by name with its size, and the exit status is 1. The twelve runs take about five minutes
on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "weights" / "digits-resnet8" / "weights.safetensors"
LIMIT_SECONDS = 600  # for one process

# train.py with a ResNet-101 an eighth as wide. A file, since the NumPy engine's workers import it again.
THIN = """
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

class Thin(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in ("jax_resnet.resnet", "numpy_ref.resnet"):
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module
        def exec_module(module):
            from functools import partial
            execute(module)
            module.MODELS["resnet101"] = partial(module.MODELS["resnet101"], width=8)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Thin())

if __name__ == "__main__":
    import train
    sys.exit(train.main())
"""


@dataclass(frozen=True)
class Case:
    """One run: the flags of each start, and what happens between them.

    Attributes:
        starts: flags of the first start and of each `--resume` after it.
        kill_at: the first start gets SIGKILL once this step's checkpoint is there.
        devices: virtual CPU devices of JAX.
    """

    starts: tuple[str, ...]
    kill_at: int | None = None
    devices: int = 1


CASES = {
    "jax-resnet101-adam": Case(("--model resnet101 --steps 6",)),
    "numpy-resnet101-adam": Case(("--framework numpy --model resnet101 --steps 8",)),
    "jax-resnet20-adabound": Case(("--model resnet20 --optimizer adabound --augment crop-flip --steps 8",)),
    "numpy-resnet20-adabound": Case(
        ("--framework numpy --model resnet20 --optimizer adabound --augment crop-flip --steps 8",)
    ),
    "jax-cnn-sgd-float64": Case(("--model cnn --optimizer sgd --precision float64 --steps 12",)),
    "numpy-cnn-plateau-float64": Case(
        (
            "--framework numpy --model cnn --optimizer sgd --precision float64 --schedule plateau "
            "--patience 0 --lr 0.3 --eval-every 2 --steps 12",
        )
    ),
    "jax-transfer-frozen": Case(
        (f"--model resnet8 --init-from {TRAINED} --freeze-backbone --dataset synthetic --steps 8",)
    ),
    "jax-accumulate": Case(("--model resnet8 --accumulate 2 --steps 8",)),
    "jax-remat": Case(("--model resnet20 --remat --steps 6",)),
    "numpy-killed": Case(
        ("--framework numpy --model resnet20 --optimizer amsbound --steps 24", ""), kill_at=4
    ),
    "jax-then-numpy": Case(
        (
            "--model resnet8 --optimizer adabound --steps 6 --schedule-steps 12",
            "--framework numpy --steps 12 --schedule-steps 12",
        )
    ),
    "jax-8-devices": Case(("--model resnet8 --steps 6",), devices=8),
}
COMMON = "--batch-size 16 --train-subset 0.25 --checkpoint-every 4 --keep-checkpoints 1 --no-report"


@dataclass(frozen=True)
class Outcome:
    """What a run left: {name: array} of every tensor, and the lines of metrics.jsonl."""

    tensors: Mapping[str, np.ndarray]
    metrics: Sequence[bytes] = field(default=())


def make(tree: Path, name: str, case: Case, run_dir: Path, cache: Path) -> Outcome:
    """Make one run with the code of `tree`. Raises RuntimeError if a start does not end as it should."""
    for number, flags in enumerate(case.starts):
        first = number == 0
        arguments = [*flags.split(), *(COMMON.split() if first else ["--resume"]), "--run-dir", str(run_dir)]
        killed = case.kill_at if first else None
        status, output = _start(tree, arguments, case.devices, cache, run_dir, killed)
        expected = -signal.SIGKILL if killed is not None else 0
        if status != expected:
            raise RuntimeError(f"{name}: exit status {status}, not {expected}, in {tree}:\n{output}")
    return read(run_dir)


def _start(
    tree: Path, arguments: list[str], devices: int, cache: Path, run_dir: Path, kill_at: int | None
) -> tuple[int, str]:
    """Run train.py of `tree` once; return its exit status and output."""
    program = cache / "thin_train.py"
    program.write_text(THIN)
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    process = subprocess.Popen(
        [sys.executable, str(program), *arguments],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        if kill_at is not None:
            while process.poll() is None and not (run_dir / "checkpoints" / str(kill_at)).exists():
                time.sleep(0.002)
            process.kill()
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    return process.returncode, output


def read(run_dir: Path) -> Outcome:
    """Read every tensor that a run left, in its weights and its newest checkpoint, and its metrics."""
    from orbax.checkpoint import v1 as ocp

    tensors: dict[str, np.ndarray] = {}
    for path in sorted(run_dir.glob("*.safetensors")):
        tensors |= {f"{path.name}: {name}": array for name, array in load_file(path).items()}
    newest = max((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for name, array in _leaves(ocp.load(newest / "state")):
        tensors[f"checkpoint {newest.name}: {name}"] = array
    return Outcome(tensors, (run_dir / "metrics.jsonl").read_bytes().splitlines())


def _leaves(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, np.asarray(value)


def compare(before: Outcome, after: Outcome) -> list[str]:
    """Return what differs between two outcomes, a line each; empty if every byte agrees."""
    lines = [f"{name} is gone" for name in before.tensors if name not in after.tensors]
    lines += [f"{name} is new" for name in after.tensors if name not in before.tensors]
    moved = []
    for name, old in before.tensors.items():
        if name in after.tensors and _digest(old) != _digest(new := after.tensors[name]):
            moved.append(f"{name}: {_distance(old, new)}")
    if moved:
        lines.append(f"{len(moved)} of {len(before.tensors)} tensors differ, the first: {moved[0]}")
    if _sha256(b"\n".join(before.metrics)) != _sha256(b"\n".join(after.metrics)):
        pairs = zip(before.metrics, after.metrics, strict=False)
        equal = next((k for k, (old, new) in enumerate(pairs) if old != new), None)
        if equal is None:
            lines.append(f"metrics.jsonl has {len(after.metrics)} lines, not {len(before.metrics)}")
        else:
            line, earlier = after.metrics[equal].decode(), before.metrics[equal].decode()
            lines.append(f"metrics.jsonl differs from line {equal + 1} on: {line}, not {earlier}")
    return lines


def _digest(array: np.ndarray) -> str:
    """SHA-256 of type, shape and bytes."""
    return _sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _distance(old: np.ndarray, new: np.ndarray) -> str:
    """Say how far two arrays are apart, relative to the largest magnitude of the first."""
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return f"{new.dtype}{list(new.shape)}, not {old.dtype}{list(old.shape)}"
    wide = old.astype(np.float64)
    scale = float(np.abs(wide).max(initial=0.0)) or 1.0
    return f"by {float(np.abs(new.astype(np.float64) - wide).max()) / scale:.1e}"


@contextlib.contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out into `folder`, as a git worktree that is removed at the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return 0 if every byte agrees, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.regression", description="Compare twelve short runs with those of a commit."
    )
    parser.add_argument("base", metavar="BASE", help="the commit to compare with")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="these runs alone")
    options = parser.parse_args(argv)
    differing = 0
    with tempfile.TemporaryDirectory(prefix="threeway-resnet-") as name:
        out = Path(name)
        with worktree(options.base, out / "base") as base:
            for case_name in options.only:
                case, begun = CASES[case_name], time.monotonic()
                before = make(base, case_name, case, out / f"{case_name}-base", out)
                after = make(ROOT, case_name, case, out / f"{case_name}-head", out)
                lines = compare(before, after)
                differing += bool(lines)
                result = "DIFFERS" if lines else f"same, {len(before.tensors)} tensors"
                print(f"{case_name}: {result} ({time.monotonic() - begun:.0f} s)", flush=True)
                for line in lines:
                    print(f"    {line}", flush=True)
    print(f"{differing} of {len(options.only)} runs differ from {options.base}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
