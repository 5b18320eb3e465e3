"""The command that runs the benchmarks of a CPU."""

from __future__ import annotations

import importlib.util
import subprocess

import pytest

from benchmarks import __main__ as benchmarks


@pytest.mark.parametrize("status", [0, 3])
def test_what_they_print_is_written(tmp_path, monkeypatch, status):
    asked = []

    def run(command, **options):
        asked.append(command[2:])
        return subprocess.CompletedProcess(command, status, stdout="12.3 seconds\n")

    monkeypatch.setattr(subprocess, "run", run)
    out = tmp_path / "results.md"
    assert benchmarks.main(["--only", "first_step", "convolution", "--out", str(out)]) == (status != 0)
    assert asked[0] == ["benchmarks.first_step", "--rounds", "3"]
    assert len(asked) == 4
    text = out.read_text()
    assert text.count("12.3 seconds") == 4
    assert ("failed with status 3" in text) == (status == 3)


def test_every_benchmark_of_the_list_is_there():
    assert all(importlib.util.find_spec(f"benchmarks.{name}") for name in benchmarks.COMMANDS)
