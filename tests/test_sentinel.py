"""The sentinel: steps that are computed again and compared. Injected faults are found, right steps pass."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiment.commands import train
from experiment.errors import UserError, WrongStepError
from experiment.files.checkpoints import Checkpoints
from experiment.options.command_line import parse
from experiment.options.resolving import resolve
from experiment.run.second_process import SecondProcess, SecondProcessError
from experiment.run.sentinel import Sentinel
from experiment.run.step_tensors import checksums, largest_difference, network_order, place, step_tensors
from experiment.run.update_rule import UpdateRule
from experiment.run.verification import check_device
from experiment.run.verifier import FACTOR, Request
from experiment.study.running import Run as StudyRun
from experiment.study.running import can_go_together
from tests.helpers.checkpoint_trees import RUN, make_tree
from tests.helpers.faults import KINDS, NAME, Fault, VerifiedRun, injected
from tests.helpers.jax_engine import make_batches
from tests.helpers.runs import SMALL, Run

FRAMEWORKS = ("jax", "numpy")
# A bit of each kind whose effect on a thin network is above ten times the noise.
BITS = {"weight": 21, "activation": 22, "gradient": 27, "moment": 20, "statistic": 16, "product": 13}
# Where the first wrong tensor is computed, in the order of computation.
PLACES = {
    "weight": "forward pass, layer2.0.bn1",
    "activation": "forward pass, layer3.0.bn1",
    "gradient": "backward pass, layer2.0",
    "moment": "backward pass, layer2.0.conv1",
    "statistic": "forward pass, layer2.0.bn1",
    "product": "forward pass, layer3.0.bn1",
}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the NumPy engine: the networks are too small to start others for."""
    monkeypatch.setattr("numpy_ref.engine.thread_count", lambda: 1)


@pytest.fixture(scope="module", params=FRAMEWORKS)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VerifiedRun:
    """A thin ResNet-8 and Adam by either engine; compiled once."""
    return VerifiedRun(request.param, tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(engines: VerifiedRun) -> VerifiedRun:
    """A run that begins."""
    engines.restart(1)
    return engines


@pytest.mark.parametrize("kind", KINDS)
def test_a_permanent_fault_is_found_by_the_other_engine(run: VerifiedRun, kind: str) -> None:
    run.train(make_batches(2))
    fault = Fault(kind, BITS[kind], active=True)
    with injected(run, fault), pytest.raises(WrongStepError) as caught:
        run.train(make_batches(1, seed=1))
    line = str(caught.value)
    assert re.match(r"step 3 was computed wrongly: \S+ \(", line), line
    assert PLACES[kind] in line
    assert "the fault is permanent" in line
    assert "no checkpoint was verified" in line
    assert "\n" not in line
    assert max(run.second.verdicts[-1].sizes.values()) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_transient_fault_is_found_in_this_process(run: VerifiedRun, kind: str) -> None:
    """Down to a bit that is far below the noise."""
    fault = Fault(kind, 8, permanent=False, active=True)
    with injected(run, fault), pytest.raises(WrongStepError) as caught:
        run.train(make_batches(1))
    line = str(caught.value)
    assert line.startswith("step 1 was computed wrongly: ")
    assert "has another result when computed again" in line
    assert "the fault is transient: twice more, the step has the same other result" in line
    assert not run.second.verdicts


def test_a_fault_of_the_repetition_is_told_from_one_of_training(
    run: VerifiedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault("activation", 20, permanent=False)
    arrays = run.engine.arrays
    calls = []

    def strike(state: Any) -> Any:
        """After training's own computation, the sentinel reads the state."""
        calls.append(state)
        fault.active = fault.active or len(calls) == 2  # the first is before the step
        return arrays(state)

    monkeypatch.setattr(run.engine, "arrays", strike)
    with injected(run, fault), pytest.raises(WrongStepError, match="in the repetition: a third time"):
        run.train(make_batches(1))


def test_memory_that_changes_between_two_steps_is_found(run: VerifiedRun) -> None:
    fault = Fault("weight", 0)
    after = run.sentinel.after

    def after_and_flip(step: int, state: Any, metrics: Any) -> None:
        after(step, state, metrics)
        if run.framework == "numpy":
            fault.flip(state.replica.network.layer2.layers[0].conv1.weight.value)
        else:  # its arrays cannot be written
            weight = np.array(state.params[NAME])
            fault.flip(weight)
            state.params[NAME] = weight

    run.sentinel.after = after_and_flip  # type: ignore[method-assign]
    with pytest.raises(WrongStepError, match=rf"^params/{NAME} changed in memory after step 1, "):
        run.train(make_batches(1))


OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "flags": {"nesterov": True, "weight_decay": 1e-3}},
    "adabound": {"optimizer": "adabound", "clip_grad_norm": 0.5, "ema_decay": 0.9},
    "adamw": {"optimizer": "adamw", "flags": {"norm_weight_decay": 0.0, "bias_weight_decay": 0.01}},
    "amsgrad, cnn": {"model": "cnn", "optimizer": "amsgrad", "loss": "bce", "label_smoothing": 0.1},
    "frozen": {"freeze_backbone": True, "optimizer": "sgdbound"},
}


def test_twenty_right_steps_pass(run: VerifiedRun) -> None:
    run.train(make_batches(20))
    assert run.sentinel.counts.here == run.sentinel.counts.by_second == 20


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        ("jax", "sgd"),
        ("numpy", "sgd"),
        ("numpy", "adabound"),
        ("jax", "adamw"),
        ("numpy", "amsgrad, cnn"),
        ("jax", "frozen"),
        ("numpy", "frozen"),
    ],
)
def test_right_steps_pass(framework: str, name: str, tmp_path: Path) -> None:
    run = VerifiedRun(framework, tmp_path, **OPTIONS[name])
    batches = make_batches(6)
    if name == "sgd":  # what recipes add to a batch
        rng = np.random.default_rng(0)
        for batch in batches:
            factors = 1.5 * rng.integers(2, size=(8, run.engine.num_blocks))
            batch |= {"drop_path": factors, "label2": np.roll(batch["label"], 1), "lam": rng.random(8)}
    run.train(batches)
    assert run.sentinel.counts.here == run.sentinel.counts.by_second == len(batches)
    assert run.second.verdicts[0].by_float64
    (line,) = run.lines
    assert line.startswith(f"verified {len(batches)} steps: each computed again in this process, ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_no_false_alarm_in_2000_steps(framework: str, name: str, tmp_path: Path) -> None:
    run = VerifiedRun(framework, tmp_path, optimizer=name)
    rng = np.random.default_rng(0)
    batches = (make_batches(1, seed=int(seed))[0] for seed in rng.integers(2**31, size=2000))
    run.train(batches)
    assert run.sentinel.counts.by_second == 2000
    assert run.sentinel.counts.by_float64 < 1000


def test_what_the_sentinel_does_changes_no_bit(run: VerifiedRun) -> None:
    sums = {}
    for every, verified in ((2, 2), (100, 0)):
        run.restart(every)
        run.train(make_batches(5))
        assert run.sentinel.counts.here == verified
        sums[every] = checksums(run.engine.arrays(run.state))
    assert sums[2] == sums[100]


def test_a_state_is_made_of_its_arrays(run: VerifiedRun) -> None:
    arrays = {name: np.array(array) for name, array in run.engine.arrays(run.state).items()}
    before = checksums(arrays)
    assert checksums(run.engine.arrays(run.engine.from_tree(run.engine.to_tree(run.state)))) == before
    ((after, _),) = run.engine.train(run.state, make_batches(1))
    assert checksums(run.engine.arrays(after)) != before
    again = run.engine.from_arrays(arrays, reuse=after)
    assert checksums(run.engine.arrays(again)) == before
    assert (again is after) == (run.framework == "numpy")


def test_every_nth_step_is_verified_and_its_state_is_asked_for(tmp_path: Path) -> None:
    sentinel = VerifiedRun("numpy", tmp_path, every=10).sentinel
    assert [step for step in range(1, 31) if sentinel.is_due(step)] == [10, 20, 30]
    assert [step for step in range(31) if sentinel.needs_state(step)] == [0, 9, 10, 19, 20, 29, 30]


def test_a_jump_counts_at_its_own_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error as large as the jump of an earlier step is not noise at a step without one."""
    run = VerifiedRun("numpy", tmp_path, model="cnn")
    run.train(make_batches(2))
    verifier, name = run.second.verifier, "optimizer/mu/conv.weight"
    (batch,) = make_batches(1, seed=5)
    before = {path: np.array(array) for path, array in run.engine.arrays(run.state).items()}
    rate = run.engine.learning_rate(run.step)
    ((state, metrics),) = run.engine.train(run.state, [batch])
    after = {path: np.array(array) for path, array in run.engine.arrays(state).items()}
    after[name] = after[name] + np.float32(0.01) * np.abs(after[name]).max()
    numbers = float(metrics["loss"]), float(metrics["grad_norm"])
    request = Request(run.step + 1, rate, before, after, *numbers, batch)
    take = verifier._take

    def jump(engine: str, precision: str, step: Request) -> Any:
        """Steps from moved weights have the same error."""
        tensors = take(engine, precision, step)
        return tensors if step is request else {**tensors, name: after[name]}

    assert verifier.check(request).wrong == name
    monkeypatch.setattr(verifier, "_take", jump)
    monkeypatch.setattr(verifier, "_updates", lambda step: {})
    assert not verifier.check(request).wrong
    monkeypatch.setattr(verifier, "_take", take)
    assert verifier.check(request).wrong == name


def test_wrong_logits_are_named(run: VerifiedRun) -> None:
    (batch,) = make_batches(1)
    run.sentinel.before_next(0, run.state)
    batches = run.sentinel.watch(iter([batch]), 0)
    ((state, metrics),) = run.engine.train(run.state, batches)
    logits = np.asarray(metrics["logits"]) + 1
    with pytest.raises(
        WrongStepError, match=r"^step 1 .*: logits \(forward pass, the logits\).* in some bits"
    ):
        run.sentinel.after(1, state, {**metrics, "logits": logits})


def test_images_that_cannot_be_read_again_do_not_end_the_run(tmp_path: Path) -> None:
    """On a device that holds them."""
    run = VerifiedRun("numpy", tmp_path)

    def read(step: int) -> Any:
        raise OSError("the server is gone")

    run.sentinel._read = read
    run.train(make_batches(3))
    assert run.sentinel.counts.here == 3
    assert not run.second.verdicts
    assert run.lines[0].startswith("the images of step 1 could not be read again (the server is gone): from")


def test_an_alarm_soon_after_a_resume_names_the_checkpoint_of_before(tmp_path: Path) -> None:
    run = VerifiedRun("numpy", tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    for step in (4, 6):
        checkpoints.save(step, make_tree(step), {**RUN, "step": step})
        checkpoints.wait()
    sentinel = Sentinel(
        run.engine,
        1,
        start_step=4,
        second=None,
        second_name="jax",
        checkpoints=checkpoints,
        report=run.lines.append,
    )
    with pytest.raises(WrongStepError) as caught:
        sentinel._fail("step 7 was computed wrongly")
    checkpoints.close()
    words = (
        r"the newest checkpoint from before this session is 4: remove the later ones \(6\) from .*--resume"
    )
    assert re.search(words, str(caught.value))


def test_the_end_of_a_run_waits_for_the_last_verdict_with_a_line(tmp_path: Path) -> None:
    run = VerifiedRun("numpy", tmp_path)
    take, calls = run.second.take, list[None]()

    def take_late() -> Any:
        calls.append(None)
        return take() if len(calls) > 2 else None

    run.second.take = take_late  # type: ignore[method-assign]
    run.train(make_batches(1))
    assert run.lines[0] == "waiting for the jax engine to compare the last verified step"
    assert run.lines[1].startswith("verified 1 steps")


def test_a_busy_second_engine_is_passed_over_and_counted(tmp_path: Path) -> None:
    run = VerifiedRun("numpy", tmp_path)
    take = run.second.take

    def take_late() -> Any:
        return take() if run.step % 3 == 0 else None

    run.second.take = take_late  # type: ignore[method-assign]
    run.train(make_batches(6))
    assert run.sentinel.counts.here == 6
    assert run.sentinel.counts.by_second == 3
    assert run.sentinel.counts.busy == 3
    assert run.lines[0].endswith("which was busy at 3")


def test_a_second_process_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    run = VerifiedRun("numpy", tmp_path)

    def fail() -> Any:
        raise SecondProcessError("it has ended with status -9")

    run.second.take = fail  # type: ignore[method-assign]
    run.train(make_batches(3))
    assert run.sentinel.counts.here == 3
    assert run.lines[0].startswith("the process of the jax engine failed (it has ended with status -9): ")


def answer_of(second: SecondProcess) -> Any:
    """Wait for the answer, at most a minute."""
    deadline = time.monotonic() + 60
    while (answer := second.take()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return answer


def test_arrays_reach_the_second_process_as_they_are() -> None:
    """Also a scalar, one without numbers, one that is not in C's order, and integers."""
    before: dict[str, np.ndarray] = {
        "step": np.array(3, np.int32),
        "none": np.zeros((0, 2)),
        "transposed": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
    }
    second = SecondProcess(partial(attrgetter, "before"))
    try:
        second.ask(Request(1, 0.1, before, {}, 0.5, 1.0, {"image": np.ones((2, 2), np.uint8)}))
        answer = answer_of(second)
    finally:
        second.close()
    assert answer.keys() == before.keys()
    for name, array in before.items():
        assert (answer[name].dtype, answer[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(answer[name], array)


def test_a_second_process_answers_one_request_at_a_time() -> None:
    second = SecondProcess(partial(itemgetter, 1))
    try:
        assert second.take() is None
        second.ask("abc")
        assert not second.is_idle
        assert answer_of(second) == "b"
        second.ask("a")
        with pytest.raises(SecondProcessError, match="IndexError"):
            answer_of(second)
        second._process.kill()
        second.ask("abc")
        with pytest.raises(SecondProcessError, match="ended with status -9"):
            answer_of(second)
    finally:
        second.close()


ORPHAN = """
import time
from functools import partial
from experiment.run.second_process import SecondProcess
if __name__ == "__main__":
    second = SecondProcess(partial(partial, time.sleep))
    second.ask(60)
    print(second._process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_second_process_ends_with_the_first_and_ignores_what_a_terminal_sends(
    tmp_path: Path, number: signal.Signals
) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    first = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    status = Path(f"/proc/{int(first.stdout.readline())}/stat")

    def runs() -> bool:
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"

    if number is signal.SIGINT:
        for _ in range(20):  # while it imports, too
            os.kill(int(status.parent.name), number)
            time.sleep(0.05)
        assert runs()
    first.kill()
    first.wait()
    deadline = time.monotonic() + 20
    while runs() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs()


def test_the_tensors_of_a_step_are_in_the_order_of_computation(tmp_path: Path) -> None:
    run = VerifiedRun("numpy", tmp_path, ema_decay=0.9)
    names = list(step_tensors(run.engine.arrays(run.state), 0.0, 0.0))
    order = ["batch_stats/bn1.running_mean", "batch_stats/layer1.0.bn1.running_mean"]
    order += ["batch_stats/layer1.0.bn2.running_var", "batch_stats/layer3.0.bn2.running_var", "loss"]
    order += ["optimizer/mu/fc.weight", "optimizer/mu/layer1.0.conv2.weight", "optimizer/mu/conv1.weight"]
    order += ["optimizer/nu/fc.bias", "grad_norm", "params/conv1.weight", "params/fc.weight"]
    order += ["ema/params/conv1.weight"]
    positions = [names.index(name) for name in order]
    assert positions == sorted(positions)
    expected = set(run.engine.arrays(run.state)) - {"step", "optimizer/count"}
    assert set(names) == expected | {"loss", "grad_norm"}


def test_places_in_words() -> None:
    assert place("optimizer/mu/layer1.0.conv1.weight") == "backward pass, layer1.0.conv1"
    assert place("params/fc.bias") == "update, fc"
    assert place("ema/batch_stats/bn1.running_var") == "average of the weights, bn1"
    assert place("loss") == "forward pass, the loss"
    blocks = [
        "layer1.0.downsample.0.weight",
        "layer1.0.conv3.weight",
        "layer1.0.bn3.bias",
        "layer1.0.bn2.bias",
    ]
    expected = [blocks[3], blocks[1], blocks[2], blocks[0]]
    assert sorted(blocks, key=network_order) == expected


def test_every_flipped_bit_changes_a_checksum() -> None:
    array = np.arange(7, dtype=np.float32)  # 28 bytes: the last four are no whole word
    (before,) = checksums({"a": array}).values()
    for index in range(7):
        for bit in range(32):
            changed = array.copy()
            changed.view(np.uint32)[index] ^= np.uint32(1 << bit)
            assert checksums({"a": changed}) != {"a": before}
    assert checksums({"a": np.array(3)}) != checksums({"a": np.array(4)})


def test_the_largest_difference_is_infinite_for_nan_in_one() -> None:
    assert largest_difference(np.array([1.0, np.nan]), np.array([2.0, np.nan])) == 1
    assert largest_difference(np.array([1.0, np.nan]), np.array([1.0, 0.0])) == np.inf
    assert largest_difference(np.array([np.inf]), np.array([np.inf])) == 0
    assert largest_difference(np.zeros(0), np.zeros(0)) == 0


@pytest.mark.parametrize(
    "optimizer", ["adam", "adamw", "amsgrad", "adabound", "amsbound", "adaboundw", "sgdbound", "sgd"]
)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_update_follows_from_the_first_moment(framework: str, optimizer: str, tmp_path: Path) -> None:
    """Over many steps: the rounding of 1 - b^t is largest after a thousand."""
    flags = {"weight_decay": 0.01}
    run = VerifiedRun(framework, tmp_path, 10**9, model="cnn", optimizer=optimizer, flags=flags)
    options = resolve({"optimizer": optimizer, **flags}).optimizer_options()
    rule, state = UpdateRule(optimizer, options), run.state
    for offset in (0, 1000):
        start = {name: np.array(array) for name, array in run.engine.arrays(state).items()}
        counts = {"step": np.array(offset, np.int32), "optimizer/count": np.array(offset, np.int32)}
        state = run.engine.from_arrays(start | {name: counts[name] for name in start.keys() & counts.keys()})
        for step, batch in enumerate(make_batches(3), offset + 1):
            before = {name: np.array(array) for name, array in run.engine.arrays(state).items()}
            ((state, _),) = run.engine.train(state, [batch])
            actual = run.engine.arrays(state)
            for name, value, noise in rule.expected(before, actual, run.engine.learning_rate(step - 1), step):
                assert (np.abs(actual[name] - value) <= FACTOR / 4 * noise).all(), (step, name)


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "float64"],
        ["--precision", "bfloat16"],
        ["--distributed"],
        ["--accumulate", "2"],
    ],
)
def test_what_cannot_be_verified_is_refused(flags: list[str]) -> None:
    with pytest.raises(UserError, match=r"^--verify-every: .*; leave one (flag|of the flags) out$"):
        resolve(parse(["--verify-every", "10", *flags]))
    resolve(parse(["--verify-every", "0", *flags]))


def test_parts_of_a_batch_without_batch_norm_can_be_verified() -> None:
    resolve(parse(["--verify-every", "10", "--accumulate", "2", "--no-batch-norm"]))
    resolve(parse(["--verify-every", "10", "--accumulate", "2", "--model", "cnn", "--remat", "--no-remat"]))


def test_a_device_that_may_give_other_bits_is_refused() -> None:
    config: Any = resolve(parse(["--verify-every", "10"]))
    device: Any = type("Device", (), {"threads": None})()
    with pytest.raises(UserError, match=r"^--verify-every: .*add --deterministic"):
        check_device(config, device)
    check_device(dataclasses.replace(config, deterministic=True), device)
    check_device(dataclasses.replace(config, verify_every=0), device)


def test_the_seeds_of_a_study_that_are_verified_run_one_by_one(tmp_path: Path) -> None:
    def runs(**options: Any) -> list[StudyRun]:
        return [StudyRun(tmp_path / str(seed), {"seed": seed, **options}, "") for seed in (1, 2)]

    assert can_go_together(runs(verify_every=0))
    assert not can_go_together(runs(verify_every=100))


def test_the_last_verified_checkpoint_is_kept_until_the_next(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    kept = []
    for step, verified in ((10, -1), (20, 10), (30, 10), (40, 10), (50, 35), (60, 60), (70, 60)):
        checkpoints.verified_step = verified
        checkpoints.save(step, make_tree(step), {**RUN, "step": step})
        checkpoints.wait()
        kept.append(checkpoints.steps())
    checkpoints.close()
    assert kept == [
        [10],
        [10, 20],
        [10, 20, 30],
        [10, 20, 30, 40],
        [30, 40, 50],
        [50, 60],
        [60, 70],
    ]


FLAGS = [*SMALL, "--framework", "numpy", "--steps", "8", "--checkpoint-every", "3", "--warmup-steps", "0"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run without the sentinel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numpy_ref.engine.thread_count", lambda: 1)
        folder = tmp_path_factory.mktemp("plain") / "run"
        assert train.main([*FLAGS, "--run-dir", str(folder)]) == 0
        yield Run(folder)


def test_a_run_is_verified_and_resumed_with_the_same_bits(plain: Run, tmp_path: Path) -> None:
    """With the process of the other engine; a resumed run may have another interval."""
    run = Run(tmp_path / "run")
    folder = ["--run-dir", str(run.folder)]
    assert train.main([*FLAGS, "--steps", "5", "--schedule-steps", "8", "--verify-every", "2", *folder]) == 0
    log = (run.folder / "log.txt").read_text()
    assert re.search(r"verified 2 steps: each computed again in this process, [12] by the jax engine", log)
    assert run.config["config"]["verify_every"] == 2
    assert train.main(["--resume", "--steps", "8", "--verify-every", "1", *folder]) == 0
    assert "verified 3 steps" in (run.folder / "log.txt").read_text()
    assert run.config["config"]["verify_every"] == 1
    lines = [line for line in run.lines("train") if line["scope"] == "step"]
    assert lines == plain.lines("train", "step")
    assert run.content("weights.safetensors") == plain.content("weights.safetensors")


def test_an_alarm_ends_the_run_and_names_the_checkpoint_to_go_on_from(
    plain: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A wrong product from step 4 on, in this process alone. Without it, the run goes on: the same bits."""
    from numpy_ref import layers

    forward, take, calls = layers.Linear.forward, SecondProcess.take, []

    def wrong(self: Any, x: np.ndarray, train: bool = False) -> np.ndarray:
        calls.append(train)
        y = forward(self, x, train)
        return y * np.float32(1.001) if sum(calls) > 6 else y  # each step is computed twice

    def wait_and_take(self: SecondProcess) -> Any:
        if self._answer is not None:
            self._answer.exception()
        return take(self)

    run = Run(tmp_path / "my run")
    folder = ["--run-dir", str(run.folder)]
    flags = ["--verify-every", "1", "--checkpoint-every", "1", "--keep-checkpoints", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers.Linear, "forward", wrong)
        patch.setattr(SecondProcess, "take", wait_and_take)
        assert train.main([*FLAGS, *flags, *folder]) == 1
    _, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert (
        "error: the run failed: step 4 was computed wrongly: loss (forward pass, the loss) is off by" in line
    )
    assert "; float64 agrees with the jax engine; the fault is permanent: " in line
    later = run.folder / "checkpoints"
    how = f"the last verified checkpoint is 3: remove the later ones (4) from {later}, then continue"
    assert f"{how} on another device with python train.py --resume --run-dir '{run.folder}'" in line
    assert line.partition("error: ")[2] in (run.folder / "log.txt").read_text()
    assert not (run.folder / "summary.json").exists()
    shutil.rmtree(later / "4")
    assert train.main(["--resume", "--verify-every", "0", *folder]) == 0
    for name in ("metrics.jsonl", "weights.safetensors"):
        assert run.content(name) == plain.content(name)
