"""The benchmark for a GPU runs on a CPU too, thin, and imports nothing that a bare machine lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[1]
PROGRAM = """
  %convolution.1 = bf16[8,4]{1,0} convolution(bf16[8,4]{1,0} %p, bf16[4]{0} %q), window={}
  %cudnn = (bf16[8]{0}, u8[16]{0}) custom-call(bf16[8]{0} %a), custom_call_target="__cudnn$convForward"
  ROOT %fusion.2 = f32[] fusion(f32[8]{0} %b), kind=kLoop, calls=%c
  %transpose.3 = f32[4,8]{1,0} transpose(f32[8,4]{1,0} %d), dimensions={1,0}
"""


def test_operations_of_a_program_are_counted():
    counts = {"convolutions": 2, "products": 0, "fusions": 1, "transposes": 1, "copies": 0}
    assert gpu.hlo_counts(PROGRAM) == counts


def test_the_smallest_candidates_run_and_stand_in_the_table():
    (case,) = gpu.TINY["cifar"]
    rows: list[dict[str, Any]] = []
    for name in ("jax, adam", gpu.EAGER):
        candidate = gpu.make(name, case)
        candidate.run(1)
        rows.append({"name": name, "model": case.model, "batch": case.batch, "size": case.size})
        rows[-1] |= {"images_per_second": 10.0 * len(rows), **candidate.facts}
    assert rows[0]["flops"] > 1e6
    assert rows[0]["bytes"] > rows[0]["peak_bytes"] > 1e5
    assert rows[0]["hlo"]["fusions"] > 10
    text = gpu.table([*rows, {**rows[0], "name": "jax, adabound", "failed": "out of memory"}], 1e12)
    assert "0.50" in text
    assert "failed: out of memory" in text


@pytest.mark.slow
def test_all_of_it(tmp_path):
    bare = "import sys; sys.modules |= dict.fromkeys(('grain', 'orbax', 'sklearn', 'tensorflow_datasets'));"
    code = f"{bare} from benchmarks import gpu; sys.exit(gpu.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--tiny", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["model"] for row in result["rows"]} == {"resnet101", "resnet50", "resnet20"}
    assert all(row["images_per_second"] > 0 for row in result["rows"])
    assert result["check"]
