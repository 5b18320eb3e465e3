"""The cores that a process may use, the threads of both engines, and what a resumed run says of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from experiment import engines
from experiment.commands import train
from experiment.files.run_folder import device_change
from numpy_ref import cores
from tests.helpers.jax_engine import make_engine
from tests.helpers.runs import SMALL, Run

ROOT = Path(__file__).parents[1]
GROUP = "jobs/mine"  # the control group of the process


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight cores without a limit; returns the folder of the control groups, which is empty."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroup")
    return tmp_path / "cgroup"


def limit(top: Path, group: str, **settings: str) -> None:
    """Write the settings of a control group; the process is in /jobs/mine of both versions."""
    lines = f"7:cpuset:/other\n4:cpu,cpuacct:/{GROUP}\n0::/{GROUP}\n"
    (top.parent / "membership").write_text(lines)
    (top / group).mkdir(parents=True, exist_ok=True)
    for name, text in settings.items():
        (top / group / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.mark.parametrize("quota", ["400000 100000", "399000 100000", "300001 100000"])
@pytest.mark.parametrize("group", [GROUP, "jobs", ""])
def test_version_2_limits_a_group_and_those_in_it(machine: Path, quota: str, group: str) -> None:
    limit(machine, group, cpu__max=quota)
    assert cores.core_count() == 4


@pytest.mark.parametrize("group", [GROUP, "jobs", ""])
def test_version_1_limits_a_group_and_those_in_it(machine: Path, group: str) -> None:
    limit(machine, f"cpu/{group}", cpu__cfs_quota_us="250000", cpu__cfs_period_us="100000")
    assert cores.core_count() == 3


def test_the_lowest_limit_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(machine, "jobs", cpu__max="500000 100000")
    limit(machine, GROUP, cpu__max="600000 100000")
    assert cores.core_count() == 5
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5}, raising=False)
    assert cores.core_count() == 2
    limit(machine, GROUP, cpu__max="1000 100000")
    assert cores.core_count() == 1


@pytest.mark.parametrize("text", ["max 100000", "", "0 0", "nonsense", "1 2 3"])
def test_what_is_no_limit(machine: Path, text: str) -> None:
    limit(machine, GROUP, cpu__max=text)
    limit(machine, f"cpu/{GROUP}", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    limit(machine, "other", cpu__max="100000 100000")
    assert cores.core_count() == 8


def test_a_system_without_control_groups_or_affinity(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores.core_count() == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert cores.core_count() == 3


@pytest.mark.parametrize(
    ("value", "threads"),
    [("4,2", 4), (" 3 ", 3), ("0", 8), ("", 8), ("-1", 8), ("many", 8), (",2", 8)],
)
def test_omp_num_threads_of_any_form(
    machine: Path, monkeypatch: pytest.MonkeyPatch, value: str, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert cores.thread_count() == threads
    assert cores.core_count() == engines.core_count() == 8


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_one_core_is_one_thread_in_both_engines() -> None:
    """In a process that may use one core: so many threads has XLA, and so many both engines report."""
    program = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
from pathlib import Path
from numpy_ref.cores import thread_count
from numpy_ref.optimizer_base import _threads
from tests.helpers.jax_engine import make_engine
device = make_engine().device
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
print(thread_count(), _threads, names.count("tf_XLAEigen\\n"), device, sep="|")
"""
    variables = ("OMP_NUM_THREADS", "NPROC", "PJRT_NPROC", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stdout == "1|1|1|1 x cpu (cpu), 1 thread\n"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the device is not a CPU")
def test_the_threads_of_xla_follow_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("cnn")
    monkeypatch.setenv("NPROC", "many")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)), raising=False)
    assert engine.threads == 7
    monkeypatch.setenv("NPROC", "5")
    assert engine.device == "1 x cpu (cpu), 5 threads"
    monkeypatch.setenv("PJRT_NPROC", "3")
    assert engine.threads == 3


def test_a_device_other_than_the_last_is_reported() -> None:
    two, one = ({"device": f"{threads} threads", "threads": threads} for threads in (2, 1))
    older: dict[str, Any] = {"device": "NumPy"}
    assert device_change([], two) is None
    assert device_change([older], two) is None
    assert device_change(["damaged"], two) is None
    assert device_change([one, two], two) is None
    assert device_change([two, one], two) == (
        "the run was on 1 threads, and is now on 2 threads: "
        "bits may differ from those of an uninterrupted run"
    )


def test_a_run_that_resumes_with_other_processes_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line comes where the number of NumPy's processes changes, and only there."""
    run, said = Run(tmp_path / "run"), []
    flags = ["--framework", "numpy", *SMALL]
    for steps, processes in ((2, 1), (3, 1), (4, 2), (5, 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", str(processes))
        assert train.main([*flags, "--steps", str(steps), "--no-test", "--run-dir", str(run.folder)]) == 0
        said.append(["bits may differ" in line for line in capsys.readouterr().out.splitlines()].count(True))
        flags = ["--resume", "--schedule-steps", "2"]
    assert said == [0, 0, 1, 0]
    assert [session["threads"] for session in run.config["sessions"]] == [1, 1, 2, 2]
    assert "2 processes" in run.config["sessions"][-1]["device"]
