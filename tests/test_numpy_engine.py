"""The NumPy engine by itself and beside the JAX engine: step, processes, and runs that change engines."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_resnet.optimizers import BOUNDED
from numpy_ref import openblas
from numpy_ref.parallel import split
from tests.helpers.comparing import assert_all_close, assert_close
from tests.helpers.jax_engine import (
    CLASSES,
    FIELDS,
    SHAPE,
    assert_same_bits,
    flat,
    learning_rate,
    make_batches,
    train,
)
from tests.helpers.jax_engine import make_engine as make_jax_engine
from tests.helpers.numpy_engine import make_engine

ROOT = Path(__file__).parents[1]
# Twenty steps of a thin ResNet in float64, as the project promises of runs that change engines.
ENGINES = 1e-10
BOUND_METRICS = ("lower_bound", "upper_bound", "at_lower", "at_upper")


@pytest.fixture(autouse=True)
def _no_processes_left():
    """Groups end when nothing refers to them: none outlives its test."""
    yield
    gc.collect()


@pytest.mark.parametrize("model", ["resnet50", "cnn"])
def test_steps_equal_the_jax_engines(model):
    """From the same seed: the same weights, and then the same losses, logits, norms, parameters, moments."""
    batches = make_batches(5)
    jax_engine, engine = make_jax_engine(model), make_engine(model)
    expected_state, expected = train(jax_engine, jax_engine.init(), batches)
    state, found = train(engine, engine.init(), batches)
    for metrics, wanted in zip(found, expected, strict=True):
        assert_all_close("metrics", metrics, wanted, ENGINES)
    tree, wanted_tree = flat(engine.to_tree(state)), flat(jax_engine.to_tree(expected_state))
    assert {k: v.dtype for k, v in tree.items()} == {k: v.dtype for k, v in wanted_tree.items()}
    assert_all_close("tree", tree, wanted_tree, ENGINES)
    logits = list(engine.evaluate(state, batches[:2]))
    for array, wanted_logits in zip(logits, jax_engine.evaluate(expected_state, batches[:2]), strict=True):
        assert_close("logits", array, wanted_logits, ENGINES)


@pytest.mark.parametrize("optimizer", BOUNDED)
def test_bounds_and_clipped_counts_agree(optimizer):
    """By JAX, by NumPy, and by two processes that each count their share; and they are the equations'."""
    final_lr = 3e-3 if optimizer == "sgdbound" else 0.1
    options = {"base_lr": 1e-3, "final_lr": final_lr, "gamma": 0.2}
    model = "resnet18" if optimizer == "adabound" else "cnn"
    engines: list[Any] = [
        make_jax_engine(model, optimizer, optimizer_options=options),
        *(make_engine(model, optimizer, n, optimizer_options=options) for n in (1, 2)),
    ]
    runs = [train(engine, engine.init(), make_batches(8))[1] for engine in engines]
    reference, *others = [[{key: float(each[key]) for key in BOUND_METRICS} for each in run] for run in runs]
    for step, metrics in enumerate(reference):
        x, end = 0.2 * (step + 1), final_lr / 1e-3 * learning_rate(step)
        expected = {"lower_bound": end * x / (x + 1), "upper_bound": end * (1 + 1 / x)}
        assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-12)
        for other in others:
            assert other[step] == pytest.approx(metrics, rel=1e-6)
    fractions = [metrics["at_lower"] + metrics["at_upper"] for metrics in reference]
    if optimizer == "sgdbound":  # the lower bound passes the rate at the third step
        assert [metrics["at_lower"] for metrics in reference] == [0, 0, *[1] * 6]
    else:
        assert all(each > 0 for each in fractions), fractions
        assert any(each < 1 for each in fractions), fractions
    assert "at_lower" not in train(make_engine("cnn"), make_engine("cnn").init(), make_batches(1))[1][0]


@pytest.mark.parametrize("optimizer", FIELDS)
def test_a_run_changes_engines_twice(optimizer):
    """JAX, NumPy, JAX: losses and parameters of 20 steps as without a change."""
    model = "resnet18" if optimizer in ("adam", "adabound") else "cnn"
    options: dict[str, Any] = {"optimizer": optimizer, "model": model}
    batches = make_batches(20)
    jax_engine, numpy_engine = make_jax_engine(**options), make_engine(**options)
    state, expected = train(jax_engine, jax_engine.init(), batches)
    wanted = flat(jax_engine.to_tree(state))

    losses, tree, done = [], jax_engine.to_tree(jax_engine.init()), 0
    parts: list[tuple[Any, int]] = [(jax_engine, 6), (numpy_engine, 8), (jax_engine, 6)]
    for engine, steps in parts:
        state, metrics = train(engine, engine.from_tree(tree), batches[done : done + steps])
        losses += [float(each["loss"]) for each in metrics]
        tree, done = engine.to_tree(state), done + steps
    assert_close("losses", losses, [float(each["loss"]) for each in expected], ENGINES)
    assert_all_close("tree", flat(tree), wanted, ENGINES)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_images_of_uint8_are_normalized_as_in_jax(precision):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, size=(6, *SHAPE), dtype=np.uint8)
    batch: dict[str, Any] = {"image": image, "label": rng.integers(CLASSES, size=6, dtype=np.int32)}
    engines: list[Any] = [make("cnn", precision=precision) for make in (make_engine, make_jax_engine)]
    first, second = (train(engine, engine.init(), [batch])[1][0] for engine in engines)
    tolerance = ENGINES if precision == "float64" else 1e-5
    assert_close("logits", first["logits"], second["logits"], tolerance)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_compute_as_one(processes):
    """Batches that split evenly, unevenly, and that are smaller than the number of processes."""
    batches = [*make_batches(2, 8), *make_batches(1, 7), *make_batches(1, 2), *make_batches(1, 8)]
    one, several = make_engine("resnet50"), make_engine("resnet50", processes=processes)
    state, expected = train(one, one.init(), batches)
    states, found = train(several, several.init(), batches)
    for metrics, wanted in zip(found, expected, strict=True):
        assert_all_close("metrics", metrics, wanted, ENGINES)
    assert_all_close("tree", flat(several.to_tree(states)), flat(one.to_tree(state)), ENGINES)
    logits = np.concatenate(list(several.evaluate(states, batches)))
    assert_close("logits", logits, np.concatenate(list(one.evaluate(state, batches))), ENGINES)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("optimizer", ["adabound", "amsgrad", "sgd"])
def test_a_tree_continues_bit_for_bit(optimizer, processes):
    batches = make_batches(6)
    engine = make_engine("resnet50", optimizer, processes)
    state, expected = train(engine, engine.init(), batches)
    half, _ = train(engine, engine.init(), batches[:3])
    tree = engine.to_tree(half)
    kept = {name: array.copy() for name, array in flat(tree).items()}
    second = make_engine("resnet50", optimizer, processes)
    resumed, found = train(second, second.from_tree(tree), batches[3:])
    assert_same_bits(second.to_tree(resumed), engine.to_tree(state))
    for metrics, wanted in zip(found, expected[3:], strict=True):
        assert_same_bits(metrics, wanted)
    train(engine, half, batches[3:])
    for name, array in flat(tree).items():  # a tree is a copy
        np.testing.assert_array_equal(array, kept[name])


def test_the_tree_has_what_the_optimizer_has():
    for optimizer, fields in FIELDS.items():
        tree = make_engine("cnn", optimizer).to_tree(make_engine("cnn", optimizer).init())
        assert set(tree["optimizer"]) == fields
        assert int(tree["step"]) == 0


def test_the_first_nonfinite_step_is_kept():
    batches = make_batches(4)
    batches[2]["image"][0, 0, 0, 0] = np.nan
    for processes in (1, 2):
        engine = make_engine(processes=processes)
        state, metrics = train(engine, engine.init(), batches)
        assert engine.first_nonfinite_step(state) == 3
        assert [bool(np.isfinite(each["loss"])) for each in metrics] == [True, True, False, False]


def test_an_error_in_a_process_is_raised():
    batch = make_batches(1, 4)[0]
    engine = make_engine(processes=2)
    with pytest.raises(ValueError, match="expected channels last"):
        train(engine, engine.init(), [{**batch, "image": batch["image"][..., :1]}])


@pytest.mark.parametrize("make", [make_engine, make_jax_engine])
def test_wrong_labels_are_refused_before_the_step(make):
    """NumPy and XLA both take -1 for the last class. The state goes on from the step before."""
    engine: Any = make("cnn")
    first, second = make_batches(2)
    state, _ = train(engine, engine.init(), [first])
    label = second["label"]
    one_hot = np.eye(CLASSES, dtype=np.int32)[label]
    wrong = [
        (
            np.where(np.arange(len(label)) == 3, -1, label),
            "label 3 is -1, where classes are 0 to",
        ),
        (label + CLASSES, f"label 0 is {label[0] + CLASSES}, where"),
        (label[:, np.newaxis], r"must have shape .*, got \(8, 1\)"),
        (one_hot, rf"must have shape .*, got \(8, {CLASSES}\)"),
        (label.astype(np.float32), "must be integers, got float32"),
    ]
    for array, message in wrong:
        with pytest.raises(ValueError, match=message):
            next(engine.train(state, [{**second, "label": array}]))
    with pytest.raises(ValueError, match=r"labels must have shape|batch of 0"):
        next(engine.train(state, [{name: array[:0] for name, array in second.items()}]))
    _, found = train(engine, state, [second])
    _, expected = train(engine, engine.init(), [first, second])
    assert_same_bits(found[0], expected[1])


@pytest.mark.parametrize("processes", [1, 2])
def test_an_empty_batch_is_evaluated_to_no_logits(processes):
    engine, batches = make_engine("cnn", processes=processes), make_batches(2)
    batches[0] = {name: array[:0] for name, array in batches[0].items()}
    shapes = [logits.shape for logits in engine.evaluate(engine.init(), batches)]
    assert shapes == [(0, CLASSES), (8, CLASSES)]


def test_a_signal_to_the_whole_group_is_left_to_the_parent():
    """A terminal and a batch system send it to every process; the engine's own go on, so that it can save."""
    engine = make_engine(processes=2)
    first, *batches = make_batches(5)
    state, _ = train(engine, engine.init(), [first])
    group = state._group
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    for step, (number, batch) in enumerate(zip(numbers, batches, strict=True), start=2):
        for process in group._processes:
            os.kill(process.pid, number)
        state, _ = train(engine, state, [batch])
        assert state.step == step, number.name
        assert all(process.exitcode is None for process in group._processes), number.name


def test_a_process_that_dies_is_reported():
    engine = make_engine(processes=2)
    state, _ = train(engine, engine.init(), make_batches(1))
    group = state._group
    os.kill(group._processes[1].pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"process 2 of 2 .* was killed by SIGKILL"):
        train(engine, state, make_batches(1))
    for process in group._processes:
        process.join(10)
        assert process.exitcode is not None


def test_processes_end_with_their_parent():
    """Even one that was killed leaves none behind."""
    program = """
import sys, time
from tests.helpers.jax_engine import make_batches, train
from tests.helpers.numpy_engine import make_engine
if __name__ == "__main__":
    engine = make_engine(processes=2)
    state, _ = train(engine, engine.init(), make_batches(1))
    print(*(process.pid for process in state._group._processes), flush=True)
    time.sleep(60)
"""
    check_none_left(program)


def check_none_left(program: str) -> None:
    """Start a program that prints the numbers of its two processes; kill it; they end."""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_process_that_waits_for_others_ends_with_its_parent():
    """The parent was killed after it had sent a step to one process, and not to the other."""
    program = """
import os, signal
from tests.helpers.jax_engine import make_batches, train
from tests.helpers.numpy_engine import make_engine
if __name__ == "__main__":
    engine = make_engine(processes=2)
    state, _ = train(engine, engine.init(), make_batches(1))
    group, (batch,) = state._group, make_batches(1)
    print(*(process.pid for process in group._processes), flush=True)
    group._ends[0].send(("train", 2, (batch["image"], batch["label"], 8, 1e-3, 2)))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    check_none_left(program)


@pytest.mark.parametrize(("count", "parts"), [(8, 2), (7, 2), (7, 3), (3, 3), (1, 1)])
def test_split_is_even_and_whole(count, parts):
    slices = split(count, parts)
    found = [list(range(count))[each] for each in slices]
    assert [i for each in found for i in each] == list(range(count))
    assert {len(each) for each in found} <= {count // parts, -(-count // parts)}


def test_the_device_in_words(monkeypatch):
    kernels = "" if openblas.kernels() is None else f", OpenBLAS {openblas.kernels()}"
    assert make_engine().device == f"NumPy {np.__version__}, 1 process{kernels}"
    assert make_engine(processes=2).device == f"NumPy {np.__version__}, 2 processes{kernels}"
    monkeypatch.setattr(openblas, "_library", lambda: None)  # NumPy is linked to another library
    assert make_engine().device == f"NumPy {np.__version__}, 1 process"


KERNELS = """
from numpy_ref import openblas
from numpy_ref.parallel import Group, SharedMemory, board_size

def work(name, arguments):
    return openblas.kernels()

def make(communicator, memory):
    return work

if __name__ == "__main__":
    group = Group(2, SharedMemory(board_size(2)), make)
    print(openblas.kernels(), *group.call("kernels", [(), ()]))
"""


@pytest.mark.skipif(openblas.kernels() is None, reason="NumPy is linked to another library than OpenBLAS")
def test_all_processes_use_the_same_kernels(tmp_path):
    """Those that the user names, too: any CPU with AVX2 runs Nehalem's."""
    script = tmp_path / "kernels.py"
    script.write_text(KERNELS)
    x86 = np.show_config(mode="dicts")["Machine Information"]["host"]["cpu"] == "x86_64"
    for named in (None, *(["Nehalem"] if x86 else [])):
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"OPENBLAS_CORETYPE": named} if named else {})
        command = [sys.executable, str(script)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == 3 * [named or openblas.kernels()]


@pytest.mark.skipif(openblas.kernels() is None, reason="NumPy is linked to another library than OpenBLAS")
def test_a_control_group_of_one_core_leaves_openblas_one_thread(tmp_path):
    (tmp_path / "membership").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    program = """
import sys
from pathlib import Path
from numpy_ref import cores, openblas
from tests.helpers.numpy_engine import make_engine
cores.CGROUPS, cores.MEMBERSHIP = Path(sys.argv[1]), Path(sys.argv[1], "membership")
library = openblas._library()
library.scipy_openblas_set_num_threads64_(2)
print(make_engine(processes=None).processes, library.scipy_openblas_get_num_threads64_())
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1 1\n"
