"""Stopping and going on, as a user meets it: `python train.py`, a signal, `python train.py --resume`.

The promise: whatever stops a run, and however often, its numbers end up as if nothing had, to the last bit.
The tests start real processes and compare what they leave on the disk with what a run left that was never
stopped.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import jax_resnet
import numpy_ref
from experiment.commands import train
from experiment.files.checkpoints import Checkpoints
from experiment.files.run_folder import check_fresh

ROOT = Path(__file__).parents[1]
ON_GPU = os.environ.get("THREEWAY_GPU") == "1"
STEPS = 100
LIMIT_SECONDS = 600  # for one process: a hang becomes a failure

# train.py, but its resnet20 has three blocks, one a stage, of half the width.
THIN = """
import functools, signal, sys
from experiment.commands.train import main
from experiment.run import session
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
make_engine = session.make_engine
def thin(*args):
    from importlib import import_module
    resnet = import_module("numpy_ref.resnet" if args[0].framework == "numpy" else "jax_resnet.resnet")
    resnet.MODELS["resnet20"] = functools.partial(resnet.resnet_cifar, 1, width=8)
    return make_engine(*args)
session.make_engine = thin
sys.exit(main())
"""
LIMITED = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"
# 258 images: 32 steps an epoch, so that most checkpoints lie within one.
FLAGS = (
    *("--dataset", "synthetic", "--steps", str(STEPS), "--train-subset", "0.14", "--batch-size", "8"),
    *("--checkpoint-every", "7", "--eval-every", "25", "--no-report"),
    *(("--deterministic",) if ON_GPU else ()),
)
PIECES = (
    *("--model-ema-decay", "0.9", "--clip-grad-norm", "1"),
    *("--weight-decay", "1e-3", "--bias-weight-decay", "0", "--loss", "bce", "--label-smoothing", "0.1"),
    *("--class-weights", "balanced", "--mixup-alpha", "0.2", "--cutmix-alpha", "1"),
    *("--randaugment", "2", "9", "--random-erase", "0.25"),
)
# The first is at its best at step 50 and overfits; the second has batch norm and the default schedule.
RUNS = {
    "adam": ("--model", "cnn", "--optimizer", "adam", "--lr", "0.01", "--schedule", "constant"),
    "adabound": ("--model", "resnet20", "--optimizer", "adabound", *PIECES, "--drop-path", "0.3"),
    "numpy": ("--framework", "numpy", "--model", "cnn", "--optimizer", "amsbound", *PIECES),
}


class Run:
    """One run folder, and the command that is started on it again and again.

    Args:
        run_dir: the folder.
        flags: of the first start; --resume finds them in config.json.
        cache: where the compiled programs are kept.
        thin: whether resnet20 is the thin one.
    """

    def __init__(self, run_dir: Path, flags: tuple[str, ...], cache: Path, *, thin: bool = True) -> None:
        self.run_dir, self.flags, self.cache, self.thin = run_dir, flags, cache, thin

    def arguments(self, *extra: str) -> list[str]:
        """As a user would give them: --resume once there is a config.json."""
        resumes = (self.run_dir / "config.json").exists()
        return [*(["--resume"] if resumes else self.flags), *extra, "--run-dir", str(self.run_dir)]

    def start(self, *extra: str, file_size: int | None = None) -> subprocess.Popen[str]:
        """Start a process.

        `file_size` is the length that no file may pass: it stands for a disk that is full.
        """
        program = ["-c", THIN] if self.thin else ["train.py"]
        caching = {
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        environment = dict(os.environ)
        if file_size is not None:
            program = ["-c", LIMITED.format(file_size) + THIN]
            caching["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e6"  # read only: else torn programs
            environment = {  # nor can coverage's data base be written
                name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")
            }
        return subprocess.Popen(
            [sys.executable, *program, *self.arguments(*extra)],
            cwd=ROOT,
            env=environment | caching,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def go(self, *extra: str) -> subprocess.CompletedProcess[str]:
        """Start, and wait for a good end."""
        return ended(self.start(*extra), 0)

    def go_here(self, *extra: str) -> str:
        """`go` in this process, whose imports are done: for what a process of its own would not change.

        Returns what was printed. On a GPU it does take one: JAX must be told of --deterministic at its start.
        """
        if ON_GPU:
            return self.go(*extra).stdout
        out = io.StringIO()
        with redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
            for module in (jax_resnet.resnet, numpy_ref.resnet):
                patch.setitem(module.MODELS, "resnet20", partial(module.resnet_cifar, 1, width=8))
            assert train.main(self.arguments(*extra)) == 0
        return out.getvalue()

    def copy(self, run_dir: Path, *, newest: int = STEPS) -> Run:
        """A copy of the folder as a kill would have left it while `newest` was the newest checkpoint."""
        shutil.copytree(self.run_dir, run_dir)
        for step in self.steps():
            if step > newest:
                shutil.rmtree(run_dir / "checkpoints" / str(step))
                (run_dir / "summary.json").unlink(missing_ok=True)
        return Run(run_dir, self.flags, self.cache, thin=self.thin)

    def steps(self) -> list[int]:
        """The complete checkpoints."""
        return Checkpoints(self.run_dir / "checkpoints", 1).steps()

    def newest(self) -> int:
        return max(self.steps(), default=0)

    def metrics(self) -> bytes:
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes() if path.exists() else b""

    def trained(self) -> int:
        """The step of the last whole line of metrics.jsonl."""
        lines = self.metrics().splitlines(keepends=True)[-2:]
        return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)

    def saving(self) -> int:
        """The checkpoint that lies half written, or 0; an old one that is being deleted does not count."""
        partial = [int(path.name.split(".")[0]) for path in self.run_dir.glob("checkpoints/*.incomplete")]
        return max((step for step in partial if step > self.newest()), default=0)

    def finished(self) -> bool:
        return (self.run_dir / "summary.json").exists()


def ended(process: subprocess.Popen[str], *statuses: int) -> subprocess.CompletedProcess[str]:
    """Wait for a process to end with one of these statuses; what it printed."""
    try:
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        process.kill()
    assert process.returncode in statuses, f"exit status {process.returncode}, not {statuses}\n{out}{err}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
    """Wait until `condition` holds; False if the process ended before it did."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the moment never came:\n{process.communicate()}")
        time.sleep(0.001)
    return True


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, np.asarray(value)


def expect_same_arrays(what: str, actual: dict, expected: dict) -> None:
    """Fail unless two trees have the same names, shapes, types and bits."""
    found, wanted = dict(leaves(actual)), dict(leaves(expected))
    assert sorted(found) == sorted(wanted), f"{what}: the names differ"
    for name, array in wanted.items():
        other = found[name]
        assert (other.shape, other.dtype) == (array.shape, array.dtype), f"{what}: {name}"
        if other.tobytes() != array.tobytes():
            differ = np.frombuffer(other.tobytes(), np.uint8) != np.frombuffer(array.tobytes(), np.uint8)
            first = int(differ.argmax()) // array.itemsize
            pytest.fail(
                f"{what}: {name}, element {first} of {array.size} is {other.flat[first]!r}, "
                f"not {array.flat[first]!r}"
            )


def expect_same_lines(actual: bytes, expected: bytes, split: bytes = b"") -> None:
    """Fail unless metrics.jsonl is the same byte for byte, or its lines of one split."""
    lines = ([s for s in file.splitlines(True) if split in s] for file in (actual, expected))
    for number, (found, wanted) in enumerate(itertools.zip_longest(*lines), start=1):
        assert found == wanted, f"metrics.jsonl, line {number}: {found!r}\nnot {wanted!r}"


def load_newest(run: Run) -> tuple[dict, dict]:
    """The arrays of the last checkpoint, and what else is in it but for the seconds."""
    tree, rest = Checkpoints(run.run_dir / "checkpoints", 1).load(run.newest())
    return tree, {name: value for name, value in rest.items() if name != "clock"}


def expect_same(run: Run, reference: Run) -> None:
    """Fail unless all that a finished run left is, to the last bit, what the reference left."""
    expect_same_lines(run.metrics(), reference.metrics())
    (tree, rest), (expected, expected_rest) = load_newest(run), load_newest(reference)
    assert run.newest() == reference.newest() == tree["step"]
    assert {"params", "batch_stats", "optimizer", "step"} <= set(expected)
    expect_same_arrays("the last checkpoint", tree, expected)
    assert rest == expected_rest
    for name in ("weights.safetensors", "weights-best.safetensors"):
        expect_same_arrays(name, load_file(run.run_dir / name), load_file(reference.run_dir / name))
    one, other = (json.loads((each.run_dir / "summary.json").read_text()) for each in (run, reference))
    for name in ("model", "optimizer", "parameters", "steps", "epochs", "test", "best"):
        assert one[name] == other[name], f"summary.json: {name}"
    left = [path.name for path in run.run_dir.rglob("*") if path.name.endswith((".tmp", ".incomplete"))]
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def references(tmp_path_factory, cache) -> dict[str, Run]:
    """A run of each optimizer that nothing stops; many of its checkpoints are kept, to go on from."""
    folder = tmp_path_factory.mktemp("references")
    runs = {
        name: Run(folder / name, (*flags, *FLAGS, "--keep-checkpoints", "10"), cache)
        for name, flags in RUNS.items()
    }
    for process in [run.start() for run in runs.values()]:
        ended(process, 0)
    shutil.copytree(cache, os.environ["JAX_COMPILATION_CACHE_DIR"], dirs_exist_ok=True)  # for `go_here`
    return runs


@dataclass
class Kill:
    """When a kill is due, the seconds to wait then, and whether, looked at afterwards, it struck as meant."""

    due: Callable[[], bool]
    delay: float
    struck: Callable[[], bool]


def plan_kill(moment: str, run: Run, rng: random.Random) -> Kill:
    """The kill of a run that is about to be started."""
    config = run.run_dir / "config.json"

    def inode() -> int:
        return config.stat().st_ino if config.exists() else 0

    session, last = inode(), STEPS - 8  # a save follows
    step = rng.randint(min(max(run.newest(), run.trained()) + 1, last), last)
    match moment:
        case "before config.json":
            return Kill((run.run_dir / ".lock").exists, 0.0, lambda: not config.exists())
        case "before the first checkpoint":
            return Kill(
                lambda: inode() != session,
                rng.uniform(0, 0.2),
                lambda: config.exists() and not run.steps() and not run.saving(),
            )
        case "during a save":
            return Kill(lambda: run.saving() >= step, rng.uniform(0, 0.03), lambda: run.saving() >= step)
        case "right after a save":
            return Kill(lambda: run.newest() >= step, 0.0, lambda: run.newest() >= step)
        case "at a random step":
            return Kill(
                lambda: inode() != session and run.trained() >= step,
                rng.uniform(0, 0.05),
                lambda: not run.finished(),
            )
        case "in the final evaluation":
            return Kill(
                lambda: inode() != session and STEPS in (run.saving(), run.newest()),
                rng.uniform(0, 0.05),
                lambda: run.trained() == STEPS and not run.finished(),
            )
    raise ValueError(moment)


def kill(run: Run, moment: str, rng: random.Random) -> bool:
    """Start the run and SIGKILL it; whether it struck as meant. The run may have come to its end before."""
    plan = plan_kill(moment, run, rng)
    process = run.start()
    if wait_for(process, plan.due):
        time.sleep(plan.delay)
        process.kill()
    return ended(process, 0, -signal.SIGKILL).returncode != 0 and plan.struck()


def kill_and_go(run: Run, reference: Run, moments: list[str], seed: int) -> int:
    """Kill a run at each of the moments, let it end, and compare; the number of kills."""
    rng, kills = random.Random(seed), 0
    for moment in moments:
        for _ in range(10):  # a kill may come too late, or too early
            kills += 1
            if kill(run, moment, rng):
                break
            if run.finished():  # no later kill can strike this one
                shutil.rmtree(run.run_dir)
        else:
            pytest.fail(f"no kill struck {moment}")
    assert not run.finished()
    run.go()
    expect_same(run, reference)
    return kills


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        (
            "adam",
            ["before config.json", "during a save", "in the final evaluation"],
        ),
        pytest.param(
            "adabound",
            ["before the first checkpoint", "at a random step", "during a save"],
            marks=pytest.mark.slow,
        ),
        ("numpy", ["before the first checkpoint", "at a random step"]),
    ],
)
def test_killed_runs_end_as_one_that_was_not(references, tmp_path, optimizer, moments):
    reference = references[optimizer]
    run = Run(tmp_path / "run", reference.flags, reference.cache)
    kill_and_go(run, reference, moments, seed=0)
    sessions = json.loads((run.run_dir / "config.json").read_text())["sessions"]
    steps = [session["step"] for session in sessions]
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert steps[-1] > 0  # it did go on from a checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("framework", "optimizer"), [("jax", "adam"), ("jax", "adabound"), ("numpy", "adabound")]
)
def test_twenty_killed_runs(tmp_path, cache, framework, optimizer):
    """ResNet-20 itself. 20 times, two at a time, each with three or four kills at moments of its own."""
    flags = ("--framework", framework, "--model", "resnet20", "--optimizer", optimizer, *FLAGS)
    reference = Run(tmp_path / "reference", flags, cache, thin=False)
    reference.go()
    choices: tuple[list[str | None], ...] = (
        ["before config.json", "before the first checkpoint"],
        ["during a save", "right after a save"],
        ["at a random step"],
        ["in the final evaluation", None],
    )

    def repetition(number: int) -> int:
        moments = [choice[number // 2**i % len(choice)] for i, choice in enumerate(choices)]
        run = Run(tmp_path / str(number), flags, cache, thin=False)
        kills = kill_and_go(run, reference, [moment for moment in moments if moment], seed=number)
        shutil.rmtree(run.run_dir)
        return kills

    with ThreadPoolExecutor(2) as executor:
        kills = list(executor.map(repetition, range(20)))
    print(f"{sum(kills)} kills of {framework} {optimizer}: {kills}")


def check_stopped(run: Run, process: subprocess.Popen[str], number: signal.Signals) -> int:
    """The step at which a signal stopped a run cleanly."""
    result = ended(process, 128 + number)
    assert result.stderr == ""
    told = re.fullmatch(
        rf"stopped by {number.name} at step (\d+); everything is saved: "
        rf"continue with python train.py --resume --run-dir {re.escape(str(run.run_dir))}",
        result.stdout.splitlines()[-1],
    )
    assert told, result.stdout
    assert run.newest() == int(told[1])
    assert not run.finished()
    return int(told[1])


def test_a_signal_saves_and_ends_cleanly(references, tmp_path):
    """SIGTERM while the step is compiled, which takes effect after that step; then Ctrl-C in the midst."""
    reference = references["adabound"]
    run = Run(tmp_path / "run", reference.flags, reference.cache)
    process, log = run.start(), run.run_dir / "log.txt"
    assert wait_for(process, lambda: log.exists() and "compiling" in log.read_text())
    process.send_signal(signal.SIGTERM)
    assert check_stopped(run, process, signal.SIGTERM) == 1
    process = run.start()
    assert wait_for(process, lambda: run.trained() >= 30)
    process.send_signal(signal.SIGINT)
    assert 30 <= check_stopped(run, process, signal.SIGINT) < STEPS
    run.go_here()
    expect_same(run, reference)


def test_ctrl_c_before_training_is_one_line_and_the_folder_can_be_used(references, tmp_path):
    run = Run(tmp_path / "run", references["adam"].flags, references["adam"].cache)
    process = run.start()
    assert wait_for(process, (run.run_dir / ".lock").exists)
    process.send_signal(signal.SIGINT)
    result = ended(process, 128 + signal.SIGINT)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "train.py: interrupted" in result.stderr
    if not (run.run_dir / "config.json").exists():
        check_fresh(run.run_dir)


def test_a_torn_last_line_is_repaired(references, tmp_path):
    reference = references["adam"]
    run = reference.copy(tmp_path / "run", newest=49)
    length = load_newest(run)[1]["history"]["length"]
    metrics = run.run_dir / "metrics.jsonl"
    assert len(metrics.read_bytes()) > length + 700
    os.truncate(metrics, length + 700)
    assert not metrics.read_bytes().endswith(b"\n")
    assert "resuming at step 49" in run.go_here()
    expect_same(run, reference)


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_used(references, tmp_path):
    reference = references["adabound"]
    run = reference.copy(tmp_path / "run", newest=56)
    files = [path for path in (run.run_dir / "checkpoints" / "56").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0b100
    largest.write_bytes(content)
    told = run.go_here()
    assert f"checkpoint 56 is damaged and is not used: {largest.relative_to(largest.parents[4])}" in told
    assert "resuming at step 49" in told
    expect_same(run, reference)


def test_other_intervals_on_resume_keep_the_training_numbers(references, tmp_path):
    reference = references["adabound"]
    run = reference.copy(tmp_path / "run", newest=49)
    checkpoints = run.run_dir / "checkpoints"
    shutil.copytree(checkpoints / "49", checkpoints / "56.incomplete")  # a step that is not saved again
    run.go_here("--checkpoint-every", "5", "--eval-every", "9", "--log-every", "4", "--keep-checkpoints", "2")
    expect_same_lines(run.metrics(), reference.metrics(), split=b'"train"')
    assert run.metrics() != reference.metrics()  # validations at other steps
    lines = [json.loads(line) for line in run.metrics().splitlines() if b'"val"' in line]
    best, last = (
        min((line["loss"], line["step"]) for line in lines if line["step"] <= step)[1] for step in (95, STEPS)
    )
    earlier = {f"weights-best-{best}.safetensors"} if best != last else set()
    assert {path.name for path in checkpoints.iterdir()} == {"95", "100"} | earlier
    expect_same_arrays("the last checkpoint", load_newest(run)[0], load_newest(reference)[0])
    weights = [load_file(each.run_dir / "weights.safetensors") for each in (run, reference)]
    expect_same_arrays("weights.safetensors", *weights)


def test_a_finished_run_that_gets_more_steps_equals_one_long_run(references, tmp_path):
    flags = (*references["adam"].flags, "--warmup-steps", "5")
    short, long = (Run(tmp_path / name, flags, references["adam"].cache) for name in ("short", "long"))
    short.go_here("--steps", "50")
    long.go_here()
    assert short.newest() == 50
    short.go_here("--steps", str(STEPS))
    expect_same(short, long)


def test_a_run_goes_on_in_the_other_engine(references, tmp_path, monkeypatch):
    """JAX, NumPy, JAX: data, history and numbers go on as in one engine; float64 shows it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # one process: the others would not know of the thin network
    flags = ("--model", "resnet20", "--optimizer", "adabound", "--precision", "float64", *FLAGS)
    flags = (*flags, "--schedule", "constant", "--warmup-steps", "0", "--val-fraction", "0", "--no-test")
    cache = references["adam"].cache
    whole, changing = (Run(tmp_path / name, flags, cache) for name in ("whole", "changing"))
    whole.go_here("--steps", "24")
    changing.go_here("--steps", "9")
    for framework, steps in (("numpy", "17"), ("jax", "24")):
        changing.go_here("--framework", framework, "--steps", steps)
    lines = [
        [json.loads(line) for line in run.metrics().splitlines() if b'"scope": "step"' in line]
        for run in (whole, changing)
    ]
    assert [line["step"] for line in lines[1]] == [line["step"] for line in lines[0]] == list(range(1, 25))
    for name in ("loss", "lr", "grad_norm", "update_norm"):
        np.testing.assert_allclose([x[name] for x in lines[1]], [x[name] for x in lines[0]], rtol=1e-9)
    sessions = json.loads((changing.run_dir / "config.json").read_text())["sessions"]
    assert [session["step"] for session in sessions] == [0, 9, 17]
    assert "NumPy" in sessions[1]["device"]


def test_a_numpy_run_knows_neither_flax_nor_the_other_engine(tmp_path):
    """JAX, which Orbax and Grain import, is held to the CPU."""
    program = """
import os, sys, train
assert train.main(sys.argv[1:]) == 0
found = {name.split(".")[0] for name in sys.modules} & {"flax", "optax", "jax_resnet", "torch", "tensorflow"}
assert not found, found
assert os.environ["JAX_PLATFORMS"] == "cpu"
"""
    flags = ("--framework", "numpy", "--model", "cnn", "--steps", "2", "--no-report")
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-c", program, *flags, "--run-dir", str(tmp_path / "run")]
    subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT_SECONDS, check=True)


def test_resuming_a_finished_run_changes_nothing(references, tmp_path):
    run = references["adam"].copy(tmp_path / "run")
    run.go_here()
    expect_same(run, references["adam"])


def check_full_disk(run: Run, process: subprocess.Popen[str], reason: str = "") -> None:
    """The run said in one line why it failed and what is whole, and that is true."""
    result = ended(process, 1)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    (told,) = lines
    assert told.startswith(f"train.py: error: the run failed: cannot write in {run.run_dir}: {reason}")
    command = f"python train.py --resume --run-dir {run.run_dir}"
    assert told.endswith(f"; verified checkpoints: 42, 49; continue with {command}")
    assert run.steps() == [42, 49]
    for step in run.steps():
        Checkpoints(run.run_dir / "checkpoints", 1).load(step)


def test_a_full_disk_costs_at_most_the_checkpoint_being_written(references, tmp_path):
    """There is no space for the next checkpoint; not even for a line of metrics.jsonl; for nothing at all."""
    adam, adabound = references["adam"], references["adabound"]
    metrics = adam.copy(tmp_path / "length", newest=49)
    line = load_newest(metrics)[1]["history"]["length"] + 1_000
    cases = [(adabound, 70_000, "checkpoint 56 could not be written"), (adam, line, ""), (adam, 100, "")]
    runs = [reference.copy(tmp_path / str(size), newest=49) for reference, size, _ in cases]
    processes = [
        run.start("--eval-every", "1000", file_size=size)
        for run, (_, size, _) in zip(runs, cases, strict=True)
    ]
    for run, process, (_, _, reason) in zip(runs, processes, cases, strict=True):
        check_full_disk(run, process, reason)
    for run, (reference, _, _) in zip(runs, cases, strict=True):
        run.go_here("--eval-every", "25")
        expect_same(run, reference)


def test_a_signal_on_a_full_disk_does_not_say_that_all_is_saved(references, tmp_path):
    run = references["adabound"].copy(tmp_path / "run", newest=49)
    process = run.start("--eval-every", "1000", "--checkpoint-every", "1000", file_size=70_000)
    log = run.run_dir / "log.txt"
    told = log.read_text().count("compiling")
    assert wait_for(process, lambda: log.read_text().count("compiling") > told)
    process.send_signal(signal.SIGTERM)
    check_full_disk(run, process, "checkpoint 50 could not be written")


def test_the_compilation_cache_changes_no_bit(references, cache, tmp_path):
    """The reference compiled for itself; here programs come from the cache, then from one a kill has torn."""
    reference = references["adam"]
    entries = {path: path.read_bytes() for path in cache.iterdir()}
    assert any(path.name.startswith("jit_train_step") for path in entries)
    warm, torn = Run(tmp_path / "warm", reference.flags, cache), reference.copy(tmp_path / "torn", newest=49)
    warm.go()
    assert set(cache.iterdir()) == set(entries)  # nothing was compiled
    for path, content in entries.items():
        path.write_bytes(content[: len(content) // 2])
    assert "persistent compilation cache" in torn.go().stderr  # JAX warns
    for path, content in entries.items():
        path.write_bytes(content)
    for run in (warm, torn):
        expect_same(run, reference)
