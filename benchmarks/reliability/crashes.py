"""A run that is killed, or sees an error, at each of its file-system operations in turn.

A shim in C (`crash_shim.c`), compiled here and preloaded, counts the calls on the folder of the run: of
Python, and of Orbax's C++. One trial kills the process at call K, or lets the call fail. Then the run goes
on. It must end with the bits of one that nothing disturbed, or say in one line what to do. The calls are
those of a fresh run with its saves, and of a resumed run that finds a half-written save.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.reliability.forked import FLAGS, Command, launch, preload, same_results

SHIM = Path(__file__).with_name("crash_shim.c")
PRELOADED = "THREEWAY_CRASH_SHIM"  # set in the process that has the shim
STEPS = ("--steps", "6", "--checkpoint-every", "2", "--eval-every", "2", "--keep-checkpoints", "2")
MODES = {"kill": 1, "kill in a write": 2, "ENOSPC": 3, "EIO": 4, "EACCES": 5}
PHASES = ("a fresh run", "a resumed run")


def compile_shim(folder: Path) -> Path:
    """Compile the shim into a folder; return the library."""
    library = folder / "crash_shim.so"
    command = [
        "cc",
        "-O1",
        "-w",
        "-U_FORTIFY_SOURCE",
        "-fPIC",
        "-shared",
        "-o",
        str(library),
        str(SHIM),
        "-ldl",
    ]
    subprocess.run(command, check=True)
    return library


def run_with_shim(arguments: Sequence[str]) -> int:
    """Compile the shim, and run this campaign in a process that has it; return its exit status."""
    with tempfile.TemporaryDirectory() as temporary:
        environment = os.environ | {
            "LD_PRELOAD": str(compile_shim(Path(temporary))),
            PRELOADED: "1",
            "OMP_NUM_THREADS": "1",
        }
        program = [sys.executable, "-m", "benchmarks.reliability", *arguments]
        return subprocess.run(program, env=environment, check=False).returncode


@dataclass
class Tally:
    """What came of the trials of one phase and mode.

    Attributes:
        operations: how many the undisturbed run has.
        trials: how many were made; of them
        struck: in which the operation came,
        stopped: in which the run was killed, or failed with one line,
        equal: after which the run had the bits of the undisturbed one,
        told: after which it said in one line what to do,
        lost: the rest, a line for each.
    """

    operations: int
    trials: int = 0
    struck: int = 0
    stopped: int = 0
    equal: int = 0
    told: int = 0
    lost: list[str] = field(default_factory=list)


class Campaign:
    """Trials in a folder: the undisturbed run, and where each phase begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reference = folder / "reference"
        self._shim = ctypes.CDLL(None)
        whole = self._train(self.reference, "reference", *FLAGS, *STEPS)
        whole.wait()
        if faults := whole.faults(0):
            raise RuntimeError(f"the undisturbed run failed: {faults}")
        self._begin_resumed()

    def _begin_resumed(self) -> None:
        """Leave in `resumed` a run as a kill leaves it in the middle of a save."""
        begun = self.folder / "resumed"
        shutil.copytree(self.reference, begun)
        for path in (begun / "checkpoints").iterdir():
            if path.name == "6":
                path.rename(path.with_name("6.incomplete"))
        for name in ("summary.json", "weights.safetensors", "predictions.npz"):
            (begun / name).unlink(missing_ok=True)

    def _train(self, run_dir: Path, name: str, *arguments: str, number: int = 0, mode: int = 0) -> Command:
        counted = self.folder / "count"

        def setup() -> None:
            self._shim.crash_shim_arm(os.fsencode(run_dir), ctypes.c_long(number), mode)
            leave = os._exit

            def leave_counted(status: int) -> None:
                counted.write_text(str(self._shim.crash_shim_count()))
                leave(status)

            os._exit = leave_counted  # type: ignore[assignment]

        command = [*arguments, "--run-dir", str(run_dir)]
        return launch(command, self.folder / f"{name}.err", setup=setup)

    def _place(self, phase: str) -> tuple[Path, tuple[str, ...]]:
        """Prepare the folder of a trial; return it and the flags of the command."""
        run_dir = self.folder / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        if phase == "a fresh run":
            return run_dir, (*FLAGS, *STEPS)
        shutil.copytree(self.folder / "resumed", run_dir)
        return run_dir, ("--resume",)

    def _counted(self) -> int:
        path = self.folder / "count"
        number = int(path.read_text()) if path.exists() else 0
        path.unlink(missing_ok=True)
        return number

    def operations(self, phase: str) -> int:
        """Return how many operations a phase has when nothing disturbs it."""
        run_dir, flags = self._place(phase)
        self._counted()
        command = self._train(run_dir, "count", *flags)
        command.wait()
        if faults := command.faults(0) or same_results(run_dir, self.reference):
            raise RuntimeError(f"{phase} failed: {faults}")
        return self._counted()

    def trial(self, phase: str, mode: str, number: int, tally: Tally) -> None:
        """Disturb operation `number`, go on, and add what came of it to the tally."""
        run_dir, flags = self._place(phase)
        self._counted()
        first = self._train(run_dir, "first", *flags, number=number, mode=MODES[mode])
        status = first.wait()
        tally.trials += 1
        killed = MODES[mode] <= 2 and status == -9
        tally.struck += killed or (MODES[mode] > 2 and self._counted() >= number)
        tally.stopped += status != 0
        faults = [] if killed else first.faults(0, 1, 2)
        begun = (run_dir / "config.json").exists()
        last = self._train(run_dir, "last", *(("--resume",) if begun else (*FLAGS, *STEPS)))
        faults += last.faults(0, 1, 2) if last.wait() is not None else ["the resumed run hangs"]
        if not faults and last.status == 0:
            faults += same_results(run_dir, self.reference)
            tally.equal += not faults
        elif not faults:
            tally.told += 1
        if faults:
            tally.lost.append(f"{phase}, {mode} at {number}: {'; '.join(faults)}")
            print(tally.lost[-1], flush=True)


def table(tallies: dict[tuple[str, str], Tally]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| run | disturbed by | operations | trials | struck | stopped | same bits | one line | lost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (phase, mode), tally in tallies.items():
        numbers = (tally.operations, tally.trials, tally.struck, tally.stopped, tally.equal, tally.told)
        lines.append(f"| {phase} | {mode} | {' | '.join(map(str, numbers))} | {len(tally.lost)} |")
    return "\n".join(lines)


def run(folder: Path, modes: Sequence[str], stride: int) -> bool:
    """Make the trials in a folder, at every `stride`-th operation; return True if nothing was lost."""
    preload()
    campaign = Campaign(folder)
    tallies: dict[tuple[str, str], Tally] = {}
    for phase in PHASES:
        operations = campaign.operations(phase)
        print(f"{phase}: {operations} file-system operations", flush=True)
        for mode in modes:
            tally = tallies[phase, mode] = Tally(operations)
            for number in range(1, operations + 1, stride):
                campaign.trial(phase, mode, number, tally)
    print(f"\n{table(tallies)}", flush=True)
    return not any(tally.lost for tally in tallies.values())
