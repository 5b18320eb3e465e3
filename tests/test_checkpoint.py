"""Checkpoints: exact, the newest few kept, whatever is damaged noticed, a full disk survived."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_resnet
from experiment.errors import UserError
from experiment.files import arrays, checkpoints
from experiment.files.arrays import differences
from experiment.files.checkpoints import CheckpointError, Checkpoints
from experiment.files.run_folder import write_json
from tests.helpers.checkpoint_trees import RUN, make_tree


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def assert_same(found, expected):
    """The same names in the same places, types, shapes and bits."""
    found, expected = dict(leaves(found)), dict(leaves(expected))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert found[name] == {}, name
            continue
        assert isinstance(found[name], np.ndarray), name
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


def copy_of(tree):
    """A copy that shares no memory."""
    return {k: copy_of(v) if isinstance(v, dict) else np.array(v) for k, v in tree.items()}


def save(directory, steps, keep=3):
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(step, make_tree(step), {**RUN, "step": step})
    checkpoints.wait()
    return checkpoints


def forbid(line):
    raise AssertionError(f"reported: {line}")


def newest(directory, report=forbid) -> tuple[int, Any, Any]:
    """The newest whole checkpoint, of which there is one."""
    found = Checkpoints(directory, 3).load_newest(report)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Whole checkpoints of steps 1 and 2, to be copied."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, [1, 2]).close()
    return directory


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_round_trip_is_exact(saved):
    step, tree, run = newest(saved)
    assert step == 2
    assert_same(tree, make_tree(2))
    assert run == {**RUN, "step": 2}
    assert differences(make_tree(2), tree) == []


def test_a_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    save(Path("runs/checkpoints"), [1]).close()
    monkeypatch.chdir("/")
    assert (tmp_path / "runs/checkpoints/1/manifest.json").is_file()


def test_no_checkpoint_yet(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    assert checkpoints.steps() == []
    assert checkpoints.load_newest(forbid) is None
    checkpoints.close()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(tmp_path, keep):
    checkpoints = save(tmp_path, [8, 9, 10, 100], keep)
    assert checkpoints.steps() == [8, 9, 10, 100][-keep:]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, checkpoints.steps()))
    assert newest(tmp_path)[0] == 100
    checkpoints.close()


def test_a_damaged_newer_one_does_not_push_out_those_saved_after_it(copy):
    """Resume has stepped over checkpoint 20 and saves 15: keeping one must not mean the damaged one."""
    shutil.copytree(copy / "2", copy / "20")
    (copy / "20" / "run.json").unlink()
    checkpoints = save(copy, [15], keep=1)
    reported: list[str] = []
    assert newest(copy, reported.append)[0] == 15
    assert len(reported) == 1
    checkpoints.save(20, make_tree(20), RUN)  # takes the place of the damaged one
    checkpoints.wait()
    assert newest(copy)[0] == 20
    checkpoints.close()


def test_what_the_engine_hands_over_is_saved_although_its_state_is_donated(tmp_path):
    """Saving goes on in the background while training overwrites the buffers that the tree came from."""
    engine = jax_resnet.Engine(
        model="cnn",
        model_options={},
        num_classes=10,
        image_shape=(32, 32, 1),
        mean=(0.5,),
        std=(0.5,),
        optimizer="adam",
        optimizer_options={"base_lr": 0.1},
        learning_rate=lambda step: 0.1,
    )
    rng = np.random.default_rng(0)
    batch: dict[str, np.ndarray] = {
        "image": rng.integers(0, 256, (8, 32, 32, 1)).astype(np.uint8),
        "label": rng.integers(0, 10, 8).astype(np.int32),
    }
    batches = [batch] * 12
    checkpoints = Checkpoints(tmp_path, 30)
    expected = {}
    for state, _ in engine.train(engine.init(), batches):
        tree = engine.to_tree(state)
        step = int(tree["step"])
        if step % 3 == 0:
            expected[step] = copy_of(tree)
            checkpoints.save(step, tree, RUN)
    checkpoints.close()
    assert sorted(expected) == checkpoints.steps() == [3, 6, 9, 12]
    contents = set()
    for step in expected:
        found = checkpoints.load(step)[0]
        assert_same(found, expected[step])
        contents.add(found["params"]["conv.weight"].tobytes())
    assert len(contents) == 4


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, seed):
    content = bytearray(path.read_bytes())
    position = random.Random(seed).randrange(8 * len(content))
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


def damage(folder, kind, seed):
    """Damage one file of a checkpoint; returns its name in the checkpoint."""
    files = files_of(folder)
    rng = random.Random(seed)
    if kind in ("manifest.json", "run.json"):
        path = folder / kind
        flip(path, seed)
    elif kind == "flip":
        sizes = [path.stat().st_size for path in files]
        path = rng.choices(files, sizes)[0]  # every bit of the checkpoint is as likely as any other
        flip(path, seed)
    elif kind == "truncate":
        path = rng.choice([path for path in files if path.stat().st_size])
        os.truncate(path, rng.randrange(path.stat().st_size))
    else:
        path = rng.choice(files)
        path.unlink()
    return path.relative_to(folder).as_posix()


KINDS = [*["flip"] * 10, *["truncate"] * 4, *["missing"] * 4, *["manifest.json"] * 3, *["run.json"] * 2]


@pytest.mark.parametrize(("seed", "kind"), list(enumerate(KINDS)))
def test_damage_is_noticed_and_named_and_the_checkpoint_before_is_used(copy, seed, kind):
    name = damage(copy / "2", kind, seed)
    reported: list[str] = []
    step, tree, run = newest(copy, reported.append)
    assert step == 1
    assert_same(tree, make_tree(1))
    assert run == {**RUN, "step": 1}
    (line,) = reported
    assert line.startswith("checkpoint 2 is damaged")
    assert len(line.splitlines()) == 1
    if name != "manifest.json":  # a flipped bit in the manifest accuses the file whose sum it was
        assert name in line
    with pytest.raises(CheckpointError):
        Checkpoints(copy, 3).load(2)


def test_every_file_of_a_checkpoint_is_watched(copy):
    for path in files_of(copy / "2"):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(CheckpointError, match="missing"):
            Checkpoints(copy, 3).load(2)
        path.write_bytes(content + b"\0")
        with pytest.raises(CheckpointError):
            Checkpoints(copy, 3).load(2)
        path.write_bytes(content)
    Checkpoints(copy, 3).load(2)


@pytest.mark.parametrize("name", ["run.json", "state/state/manifest.ocdbt", "state"])
def test_whole_by_its_sums_and_yet_no_checkpoint(copy, name):
    """Made by something else, or by a version that writes other files."""
    folder = copy / "2"
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    write_json(folder / "manifest.json", {"files": checkpoints._sums(folder)})
    reported: list[str] = []
    assert newest(copy, reported.append)[0] == 1
    (line,) = reported
    assert line.startswith("checkpoint 2 is damaged")
    assert len(line.splitlines()) == 1


def test_a_disk_that_cannot_read_is_damage_too(copy, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(checkpoints, "file_sha256", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        Checkpoints(copy, 3).load(2)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"files": 3}',
        b'{"files": {"run.json": null}}',
        b'{"files": {"run.json": {}}}',
        b'{"files": ["run.json"]}',
    ],
)
def test_a_manifest_of_another_form(copy, content):
    (copy / "2" / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        Checkpoints(copy, 3).load(2)


def test_all_damaged_is_the_users_to_know(copy):
    damage(copy / "1", "flip", 0)
    damage(copy / "2", "missing", 1)
    reported: list[str] = []
    with pytest.raises(UserError) as caught:
        Checkpoints(copy, 3).load_newest(reported.append)
    assert len(reported) == 2
    assert len(str(caught.value).splitlines()) == 1
    assert "--resume" in str(caught.value)
    assert str(copy) in str(caught.value)


def test_what_is_incomplete_is_ignored_and_removed(copy):
    shutil.copytree(copy / "2", copy / "3.incomplete")
    (copy / "4.incomplete" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    checkpoints = Checkpoints(copy, 3)
    assert checkpoints.steps() == [1, 2]
    assert newest(copy)[0] == 2
    checkpoints.remove_incomplete()
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


def test_what_is_incomplete_does_not_hinder_a_save(copy):
    (copy / "3.incomplete" / "state" / "stray").mkdir(parents=True)
    checkpoints = save(copy, [3])
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2", "3"]
    assert_same(checkpoints.load(3)[0], make_tree(3))
    assert not (copy / "3" / "state" / "stray").exists()
    checkpoints.close()


@contextmanager
def no_space_at(module, name) -> Iterator[None]:
    """A function of `module` fails as on a full disk."""

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, fail)
        yield


@contextmanager
def half_the_arrays() -> Iterator[None]:
    """Orbax comes to the end of the disk half way. TensorStore's error is no OSError, and has many lines."""

    def fail(path, tree):
        write(path, {name: arrays for name, arrays in tree.items() if name != "params"})
        raise ValueError("OUT_OF_RANGE: Error writing \"params.fc.bias/c/0\"\n[os_error_code='28']")

    write = arrays.save_arrays
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save_arrays", fail)
        yield


FAILURES = {
    "an array": half_the_arrays,
    "run.json": lambda: no_space_at(checkpoints, "write_json"),
    "fsync": lambda: no_space_at(checkpoints, "_fsync"),
    "the last rename": lambda: no_space_at(os, "rename"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_full_disk_costs_only_the_checkpoint_being_written(copy, failure):
    checkpoints = Checkpoints(copy, 2)
    with FAILURES[failure]():
        checkpoints.save(3, make_tree(3), RUN)
        with pytest.raises(OSError, match="checkpoint 3 could not be written") as caught:
            checkpoints.wait()
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]
    for step in (1, 2):
        assert_same(checkpoints.load(step)[0], make_tree(step))
    # With space again it goes on.
    checkpoints.save(3, make_tree(3), RUN)
    checkpoints.close()
    assert checkpoints.steps() == [2, 3]
    assert_same(checkpoints.load(3)[0], make_tree(3))


def fsync_fails(monkeypatch, code, *, folders):
    """fsync gives an error for folders, or for files."""
    fsync = os.fsync

    def fail(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_is_told_once(tmp_path, monkeypatch, code):
    """CIFS, FUSE and vboxsf: the checkpoints are written, and a line says what a power cut may cost."""
    fsync_fails(monkeypatch, code, folders=True)
    reported: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3, report=reported.append)
    for step in (1, 2):
        checkpoints.save(step, make_tree(step), RUN)
    checkpoints.close()
    assert checkpoints.verified() == [1, 2]
    (line,) = reported
    assert len(line.splitlines()) == 1
    assert line.startswith("warning: ")
    assert str(tmp_path) in line
    assert os.strerror(code) in line


@pytest.mark.parametrize(
    ("code", "folders"), [(errno.EIO, True), (errno.EINVAL, False), (errno.ENOSPC, True)]
)
def test_any_other_failure_to_sync_fails_the_save(tmp_path, monkeypatch, code, folders):
    fsync_fails(monkeypatch, code, folders=folders)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3, report=forbid)
    checkpoints.save(1, make_tree(1), RUN)
    with pytest.raises(OSError, match="checkpoint 1 could not be written") as caught:
        checkpoints.close()
    assert caught.value.errno == code
    assert checkpoints.steps() == []


def test_the_number_of_an_error_of_tensorstore_is_known(copy):
    checkpoints = Checkpoints(copy, 3)
    with half_the_arrays():
        checkpoints.save(3, make_tree(3), RUN)
        with pytest.raises(OSError, match="checkpoint 3") as caught:
            checkpoints.close()
    assert caught.value.errno == errno.ENOSPC


def test_only_whole_checkpoints_are_verified(copy):
    assert Checkpoints(copy, 3).verified() == [1, 2]
    damage(copy / "2", "flip", 0)
    assert Checkpoints(copy, 3).verified() == [1]
    damage(copy / "1", "missing", 0)
    assert Checkpoints(copy, 3).verified() == []


@pytest.mark.parametrize("then", ["save", "close"])
def test_a_failed_save_is_told_by_what_comes_next(copy, then):
    saver = Checkpoints(copy, 2)
    with no_space_at(checkpoints, "write_json"):
        saver.save(3, make_tree(3), RUN)
        with pytest.raises(OSError, match="checkpoint 3"):
            saver.save(4, make_tree(4), RUN) if then == "save" else saver.close()
    saver.wait()  # told once
    saver.close()
    assert saver.steps() == [1, 2]


def test_differences_name_what_differs():
    expected, found = make_tree(1), make_tree(2)
    assert differences(expected, found) == []
    del found["params"]["fc.bias"]
    found["params"]["fc.extra"] = np.zeros(2)
    found["params"]["conv1.weight"] = np.zeros((4, 1, 3, 3), np.float32)
    found["params"]["layer1.0.bn1.weight"] = np.zeros(5, np.float32)
    found["optimizer"]["nu"] = {"conv1.weight": np.zeros(3)}
    found["batch_stats"] = {"bn1.running_mean": np.zeros(3)}
    assert differences(expected, found) == [
        "batch_stats/bn1.running_mean is unexpected",
        "optimizer/nu/conv1.weight is unexpected",
        "params/conv1.weight is float32[4, 1, 3, 3], not float32[4, 3, 3, 3]",
        "params/fc.bias is missing",
        "params/fc.extra is unexpected",
        "params/layer1.0.bn1.weight is float32[5], not float64[5]",
    ]


def test_loading_needs_no_pickle(saved, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle is loaded")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(np, "load", forbidden)
    assert newest(saved)[0] == 2


def test_a_pickle_is_not_loaded(copy, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "bang"),)

    for path in files_of(copy / "2"):
        path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        Checkpoints(copy, 3).load(2)
    assert not (tmp_path / "bang").exists()
