"""The file of results: JSON lines, each with the conditions under which it was measured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MEASURED_CODE = ("numpy_ref", "jax_resnet", "torch_oracle", "benchmarks/training_step.py")
Record = dict[str, Any]


def conditions(threads: int) -> dict[str, Any]:
    """Return what a result depends on besides the case: machine, kernels, versions, code and threads."""
    import torch

    names = ("numpy", "jax", "jaxlib", "flax", "optax", "torch")
    steering = ("OMP_", "OPENBLAS_", "MKL_", "XLA_")
    return {
        "cpu": cpu_model(),
        "threads": threads,
        "numpy_simd": np.show_config(mode="dicts")["SIMD Extensions"]["found"],
        "blas": blas_kernels(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(steering)},
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": code_commit(),
    }


def cpu_model() -> str:
    """Return the processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def blas_kernels() -> list[str]:
    """Return the libraries of matrix products that NumPy has loaded, with their kernels, if threadpoolctl is
    there."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return []
    return sorted(
        f"{info['internal_api']} {info['version']}, kernels {info.get('architecture', 'unknown')}"
        for info in threadpool_info()
        if info["user_api"] == "blas"
    )


def code_commit() -> str:
    """Return the last commit of the measured code, and a hash of what differs from it in the working tree."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments, "--", *MEASURED_CODE]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        commit, changes = git("log", "-1", "--format=%h"), git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    differs = hashlib.sha256(changes.encode()).hexdigest()[:8]
    return commit.strip() + (f" with changes {differs}" if changes else "")


class Results:
    """A file of JSON lines, one for each result; a result is found by its case, task and conditions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.records: list[Record] = [json.loads(line) for line in lines]

    def find(self, case: str, task: str, where: dict[str, Any]) -> Record | None:
        """Return the newest result, or None."""
        key = (case, task, where)
        for record in reversed(self.records):
            if (record["case"], record["task"], record["conditions"]) == key:
                return record
        return None

    def add(self, record: Record) -> None:
        """Append a result to the file."""
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
