"""Damage every kind of file of a run folder, and see whether anything wrong goes unnoticed.

For each trial a file of a completed run is damaged: a flipped bit, a shorter file, an empty one, none, a
folder or a link in its place, the file of another checkpoint, an earlier manifest. Then `verify`, `evaluate`
and `train.py --resume` are run. Each must either give what the undamaged run gives, to the bit, or say in one
line what is wrong.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from experiment.commands import evaluate, train, verify
from experiment.run.console import exit_status

RUN = ["--framework", "numpy", "--model", "cnn", "--train-subset", "0.1", "--batch-size", "16", "--no-report"]
RUN += ["--schedule", "constant"]
STEPS, LONGER = "8", "12"
NOT_READ = ("log.txt", ".lock")  # nothing is computed from them
COMPARED = ("metrics.jsonl", "weights.safetensors", "weights-best.safetensors")


@dataclass
class Answer:
    """What a command gave: its exit status, its output, and the lines on stderr."""

    status: int | None
    output: str
    errors: list[str]

    @property
    def in_one_line(self) -> bool:
        """True if the command refused in one line."""
        return self.status in (1, 2) and len(self.errors) == 1


@dataclass
class Tally:
    """The results of a campaign: a count for each outcome, and a line for each trial that went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def report(self) -> bool:
        """Print the counts and what went wrong; return True if nothing did."""
        for name, count in self.counts.items():
            print(f"{count:6} {name}")
        print(f"{len(self.wrong):6} wrong", *self.wrong, sep="\n")
        return not self.wrong


def ask(main: Callable[[list[str]], int], argv: list[str]) -> Answer:
    """Run a command in this process. A status of None stands for a traceback."""
    output, errors = io.StringIO(), io.StringIO()
    status: int | None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = exit_status(lambda: main(argv))
        except Exception:
            status = None
            traceback.print_exc()
    lines = [line for line in errors.getvalue().splitlines() if line]
    return Answer(status, output.getvalue(), lines)


def make_run(folder: Path) -> None:
    """Make the run that is damaged: eight steps, a checkpoint every four."""
    answer = ask(train.main, [*RUN, "--steps", STEPS, "--checkpoint-every", "4", "--run-dir", str(folder)])
    if answer.status != 0:
        raise RuntimeError(f"the run cannot be made: {answer.errors}")


def continue_run(folder: Path) -> Answer:
    """Continue it to twelve steps."""
    return ask(train.main, ["--resume", "--steps", LONGER, "--run-dir", str(folder)])


def files_of(folder: Path) -> list[Path]:
    """Return the files of a run that are read, relative to its folder, in order."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if path.name not in NOT_READ)


def flip(path: Path, rng: random.Random) -> None:
    """Flip a bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def shorten(path: Path, rng: random.Random) -> None:
    """Cut off the end."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def empty(path: Path, rng: random.Random) -> None:
    """Leave a file of no bytes."""
    path.write_bytes(b"")


def remove(path: Path, rng: random.Random) -> None:
    """Remove it."""
    path.unlink()


def put_folder(path: Path, rng: random.Random) -> None:
    """Put a folder in its place."""
    path.unlink()
    path.mkdir()


def put_link(path: Path, rng: random.Random) -> None:
    """Put a link in its place, to nothing."""
    path.unlink()
    path.symlink_to("nowhere")


def exchange(path: Path, rng: random.Random) -> None:
    """Put the file of the other checkpoint in its place; of a file outside checkpoints, another file."""
    parts = list(path.parts)
    if "checkpoints" in parts and (number := parts[parts.index("checkpoints") + 1]).isdecimal():
        parts[parts.index("checkpoints") + 1] = "4" if number == "8" else "8"
        other = Path(*parts)
    else:
        other = next(
            p for p in sorted(path.parent.iterdir()) if p.is_file() and p.name not in (path.name, ".lock")
        )
    if other.is_file():
        shutil.copyfile(other, path)
    else:
        path.unlink()


KINDS = (flip, flip, flip, shorten, empty, remove, put_folder, put_link, exchange)


def damages(
    folder: Path, times: int, seed: int
) -> Iterator[tuple[Path, Callable[[Path, random.Random], None]]]:
    """Yield a file and a kind of damage for each trial: every file in turn, kinds in turn."""
    files = [path for path in files_of(folder) if (folder / path).stat().st_size]
    rng = random.Random(seed)
    for trial in range(times):
        yield files[trial % len(files)], KINDS[(trial // len(files) + rng.randrange(len(KINDS))) % len(KINDS)]


def damaged_files(folder: Path, times: int, seed: int) -> Tally:
    """Run the campaign in an empty folder."""
    base, undisturbed, copy = folder / "base", folder / "undisturbed", folder / "copy"
    make_run(base)
    shutil.copytree(base, undisturbed)
    evaluated = ask(evaluate.main, [str(undisturbed)]).output
    if continue_run(undisturbed).status != 0:
        raise RuntimeError("the undamaged run cannot be continued")
    expected = {name: (undisturbed / name).read_bytes() for name in COMPARED}
    tally, rng = Tally(), random.Random(seed)
    for path, damage in damages(base, times, seed):
        shutil.copytree(base, copy, symlinks=True)
        damage(copy / path, rng)
        where = f"{damage.__name__} {path}"
        verified = ask(verify.main, [str(copy)])
        tested = ask(evaluate.main, [str(copy)])
        resumed = continue_run(copy)
        exact = resumed.status == 0 and all(
            (copy / name).read_bytes() == content for name, content in expected.items()
        )
        same = tested.status == 0 and tested.output.replace(str(copy), str(undisturbed)) == evaluated
        answers = {"verify": verified, "evaluate": tested, "resume": resumed}
        for name, answer in answers.items():
            if answer.status is None:
                tally.wrong.append(f"{where}: {name}: traceback: {answer.errors[-1]}")
        if not (same or tested.in_one_line):
            tally.wrong.append(f"{where}: evaluate: status {tested.status}, another result")
        if not (exact or resumed.in_one_line):
            tally.wrong.append(
                f"{where}: resume: status {resumed.status}, another result {resumed.errors[:1]}"
            )
        noticed = verified.status == 1 or verified.in_one_line
        outcome = "noticed by verify" if noticed else "not noticed, and harmless to the bit"
        if not noticed and not (exact and same):
            outcome = "not noticed by verify, refused by a command"
        tally.counts[outcome] += 1
        tally.counts["continued to the bit"] += exact
        tally.counts["continuing refused in one line"] += resumed.in_one_line
        shutil.rmtree(copy)
    return tally
