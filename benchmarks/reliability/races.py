"""Several commands at once in one folder, and a folder that is moved or deleted under a run.

Each trial is one of five scenes. A command that is refused or fails must end with one line and exit status 2
or 1, without a traceback and without a hang. In the end the run must have the bits of one that was alone.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.reliability.forked import FLAGS, Command, launch, preload, same_results

STEPS = ("--steps", "60", "--checkpoint-every", "10", "--eval-every", "15")
READERS = ("report", "compare", "evaluate")


def train(folder: Path, name: str, *arguments: str) -> Command:
    """Start `python train.py` on the folder of a run, which lies in `folder` with what the command prints."""
    return launch([*arguments, "--run-dir", str(folder / "run")], folder / f"{name}.err")


def resumed(folder: Path, reference: Path) -> list[str]:
    """Go on with a run; return what is wrong with its end."""
    last = train(folder, "last", "--resume")
    last.wait()
    return last.faults(0) or same_results(folder / "run", reference)


def two_starts(folder: Path, reference: Path, rng: random.Random) -> list[str]:
    """Two fresh starts in one folder: one trains, the other is refused."""
    first = train(folder, "first", *FLAGS, *STEPS)
    time.sleep(rng.choice([0.0, rng.uniform(0, 0.2), rng.uniform(0, 1.5)]))
    second = train(folder, "second", *FLAGS, *STEPS)
    statuses = sorted(command.wait() or 0 for command in (first, second))
    faults = [*first.faults(0, 2), *second.faults(0, 2)]
    if not faults and statuses != [0, 2]:
        faults.append(f"the two starts ended with {statuses}")
    return faults or same_results(folder / "run", reference)


def two_resumes(folder: Path, reference: Path, rng: random.Random) -> list[str]:
    """Two processes continue one run: one trains, the other is refused, or finds it done."""
    interrupted(folder, reference, rng)
    first = train(folder, "first", "--resume")
    time.sleep(rng.choice([0.0, rng.uniform(0, 0.2), rng.uniform(0, 1.5)]))
    second = train(folder, "second", "--resume")
    statuses = [command.wait() for command in (first, second)]
    faults = [*first.faults(0, 2), *second.faults(0, 2)]
    if not faults and 0 not in statuses:
        faults.append(f"the two resumes ended with {statuses}")
    return faults or same_results(folder / "run", reference)


def readers(folder: Path, reference: Path, rng: random.Random) -> list[str]:
    """Reports, comparisons and evaluations of a run that is being written."""
    writer = train(folder, "writer", *FLAGS, *STEPS)
    faults: list[str] = []
    number = 0
    while writer.runs():
        name = rng.choice(READERS)
        arguments = [name, str(folder / "run")]
        if name == "compare":
            arguments += [str(reference), "--out", str(folder / "comparison")]
        reader = launch(arguments, folder / f"reader-{number}.err", module="experiment.__main__")
        reader.wait()
        faults += reader.faults(0, 2)
        number += 1
    return [*faults, *(writer.faults(0) or same_results(folder / "run", reference))]


def moved(folder: Path, reference: Path, rng: random.Random) -> list[str]:
    """The folder is moved away under the run, which ends, and back; then the run goes on."""
    writer = train(folder, "writer", *FLAGS, *STEPS)
    wait_a_moment(folder, rng)
    (folder / "run").rename(folder / "elsewhere")
    writer.wait()
    faults = writer.faults(0, 1)
    if (folder / "run").exists():
        faults.append("the run has made its folder again")
        shutil.rmtree(folder / "run")
    (folder / "elsewhere").rename(folder / "run")
    return faults or resumed(folder, reference)


def deleted(folder: Path, reference: Path, rng: random.Random) -> list[str]:
    """The folder is deleted under the run, which ends; then it starts afresh."""
    writer = train(folder, "writer", *FLAGS, *STEPS)
    wait_a_moment(folder, rng)
    aside = folder / "aside"
    (folder / "run").rename(aside)  # at once: files could come while it is deleted
    shutil.rmtree(aside, ignore_errors=True)
    writer.wait()
    shutil.rmtree(aside, ignore_errors=True)
    faults = writer.faults(0, 1)
    if (folder / "run").exists():
        faults.append("the run has made its folder again")
        shutil.rmtree(folder / "run")
    last = train(folder, "last", *FLAGS, *STEPS)
    last.wait()
    return faults or last.faults(0) or same_results(folder / "run", reference)


def wait_a_moment(folder: Path, rng: random.Random) -> None:
    """Wait until a run has begun, and for a random time."""
    while not (folder / "run" / "config.json").exists():
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.5))


def interrupted(folder: Path, reference: Path, rng: random.Random) -> None:
    """Copy the run of a reference as a kill would have left it after a random checkpoint."""
    shutil.copytree(reference, folder / "run")
    newest = rng.choice([10, 20, 30, 40, 50])
    for path in (reference / "checkpoints").glob("[0-9]*"):
        if int(path.name) > newest:
            shutil.rmtree(folder / "run" / "checkpoints" / path.name)
    for name in ("summary.json", "weights.safetensors", "predictions.npz"):
        (folder / "run" / name).unlink(missing_ok=True)


SCENES: dict[str, Callable[[Path, Path, random.Random], list[str]]] = {
    "two starts": two_starts,
    "two resumes": two_resumes,
    "readers beside a writer": readers,
    "folder moved away": moved,
    "folder deleted": deleted,
}


def table(results: Sequence[tuple[str, list[str]]]) -> str:
    """Return the results as Markdown."""
    lines = ["| scene | trials | nothing lost |", "| --- | --- | --- |"]
    for name in (*SCENES, "all"):
        some = [faults for scene, faults in results if name in (scene, "all")]
        lines.append(f"| {name} | {len(some)} | {sum(not faults for faults in some)} |")
    return "\n".join(lines)


def run(times: int, seed: int, folder: Path) -> bool:
    """Make trials in a folder and print them; return True if nothing was lost."""
    preload("matplotlib.pyplot", "jinja2", "experiment.commands.report", "experiment.commands.compare")
    made = folder / "reference"
    made.mkdir()
    alone = train(made, "reference", *FLAGS, *STEPS, "--keep-checkpoints", "10")
    alone.wait()
    if faults := alone.faults(0):
        raise RuntimeError(f"the run that was alone failed: {faults}")
    results: list[tuple[str, list[str]]] = []
    for number in range(times):
        scene = list(SCENES)[number % len(SCENES)]
        place = folder / str(number)
        place.mkdir()
        faults = SCENES[scene](place, made / "run", random.Random(f"{seed} {number}"))
        results.append((scene, faults))
        if faults:
            print(f"{number}, {scene}: {'; '.join(faults)}", flush=True)
        else:
            shutil.rmtree(place)
    print(f"\n{table(results)}", flush=True)
    return not any(faults for _, faults in results)
