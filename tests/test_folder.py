"""`--dataset folder`: layouts, order, statistics, identity, odd files, and runs on a folder of images."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiment.__main__ import main
from experiment.commands import train
from experiment.data import builtin, contents, folder, listing, tfds
from experiment.data.images import decode_image, read_image, stored_size
from experiment.data.loading import Data, load
from experiment.errors import UserError
from experiment.options.command_line import parse
from experiment.run.session import Session
from tests.helpers import made_tfds, odd_images
from tests.helpers.odd_images import Pixels, noise, saved
from tests.helpers.runs import Run


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty; one thread for the NumPy engine."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return path


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def make(root: Path, parts: Sequence[str] = ("",), count: int = 5, side: int = 32) -> Path:
    """Write `count` images of each of the classes `cat` and `dog` into each part."""
    seed = iter(range(10**6))
    names = [Path(part, name, f"{i}.png") for part in parts for name in ("cat", "dog") for i in range(count)]
    return write(root, {str(name): saved(noise(side, side, 3, seed=next(seed))) for name in names})


def load_folder(root: Path, **options: Any) -> Data:
    arguments: dict[str, Any] = {"data_dir": str(root), "batch_size": 2, "seed": 0} | options
    return load("folder", **arguments)


def names(data: Data, split: Any) -> list[str]:
    """The names of the files of a part."""
    source, indices = data.parts[split]
    source = source._source if isinstance(source, builtin.CachedSource) else source
    assert isinstance(source, folder.FolderSource)
    return [source._names[index] for index in indices]


def refusal(root: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_folder(root, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(("--data-dir: ", "--val-fraction: ", "--test-fraction: "))
    return line


# Layouts


@pytest.mark.parametrize(
    ("parts", "test", "val"),
    [
        (("train", "val", "test"), "test", "val"),
        (("train", "validation", "test"), "test", "validation"),
        (("train", "test"), "test", None),
        (("train", "val"), "val", None),
        (("train",), None, None),
        (("",), None, None),
    ],
)
def test_which_part_is_which(tmp_path: Path, parts: tuple[str, ...], test: str, val: str) -> None:
    make(tmp_path, parts, count=10)
    data = load_folder(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.identity["data_test_split"] == test
    sizes = (data.train_size, data.val_size, data.test_size)
    assert sizes == ((20, 20, 20) if val else (18, 2, 20) if test else (16, 2, 2))
    for split, part in (("train", parts[0]), ("val", val or parts[0]), ("test", test or parts[0])):
        assert all(name.startswith(f"{part}/" if part else "") for name in names(data, split))
    everything = [name for split in ("train", "val", "test") for name in names(data, split)]
    assert len(set(everything)) == len(everything) == 20 * len(parts)
    if val:
        without = load_folder(tmp_path, val_fraction=0)
        assert (without.train_size, without.val_size) == (20, 0)
        assert "has a validation part" in refusal(tmp_path, val_fraction=0.2)
    if test:
        assert "has a test part" in refusal(tmp_path, test_fraction=0.2)


def test_a_class_may_be_named_like_a_part(tmp_path: Path) -> None:
    """Of vehicles, say: `train` holds images and no folders, so it is a class."""
    make(tmp_path)
    (tmp_path / "dog").rename(tmp_path / "train")
    assert load_folder(tmp_path).class_names == ("cat", "train")


def test_the_order_is_that_of_torchvisions_image_folder(tmp_path: Path) -> None:
    """By class, then as `sorted(os.walk(...))` gives folders and `sorted` their files; links are followed."""
    order = ["b", "B", "a/z.png", "a/x/1.png", "a/x.d/2.png", "a/x/y/3.png", "a.png", "10.png", "9.png"]
    files = {f"dog/{name}": saved(noise(32, 32, seed=i)) for i, name in enumerate(order)}
    write(tmp_path / "data", {**files, "Cat/1.png": saved(noise(32, 32))})
    write(tmp_path / "elsewhere", {"linked.png": saved(noise(32, 32))})
    (tmp_path / "data" / "dog" / "link").symlink_to(tmp_path / "elsewhere")
    expected = []
    for name in ("Cat", "dog"):
        top = str(tmp_path / "data" / name)
        for where, _, inside in sorted(os.walk(top, followlinks=True)):
            expected += [os.path.relpath(os.path.join(where, f), tmp_path / "data") for f in sorted(inside)]
    (_, parts) = listing.list_files(tmp_path / "data")
    assert [file.name for file in parts["train"]] == expected
    assert [file.label for file in parts["train"]] == [0] + [1] * (len(expected) - 1)


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    make(tmp_path)
    data = load_folder(tmp_path)
    hidden = [".DS_Store", "cat/.DS_Store", "cat/._0.png", "dog/Thumbs.db", "desktop.ini", ".git/config"]
    hidden += ["README", "cat/.hidden/a.png", "__MACOSX/cat/a.png"]
    write(tmp_path, dict.fromkeys(hidden, b"no image"))
    assert load_folder(tmp_path).identity == data.identity


# Size, statistics, pixels


@pytest.mark.parametrize(
    ("sides", "size"),
    [([48], (48, 48)), ([20], (32, 32)), ([48, 40], (224, 224)), ([225], (224, 224)), ([224], (224, 224))],
)
def test_default_sizes(tmp_path: Path, sides: list[int], size: tuple[int, int]) -> None:
    write(make(tmp_path, side=sides[0]), {"dog/last.png": saved(noise(sides[-1], sides[-1], 3))})
    assert load_folder(tmp_path).image_shape == (*size, 3)
    assert load_folder(tmp_path, image_size=(32, 40)).image_shape == (32, 40, 3)


def test_a_size_that_differs_late_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of 256 files are looked at first; then those of all."""
    monkeypatch.setattr(folder, "LARGEST_DEFAULT", 40)
    small = saved(noise(33, 33, 3))
    files = {f"{name}/{i:03d}.png": small for name in ("cat", "dog") for i in range(300)}
    write(tmp_path, files | {"dog/002.png": saved(noise(34, 33, 3))})
    data = load_folder(tmp_path)
    assert data.image_shape == (40, 40, 3)
    assert data.mean == load_folder(tmp_path, image_size=(40, 40)).mean


@pytest.mark.parametrize("options", [{}, {"grayscale": True}, {"image_size": (40, 36), "resize": (48,)}])
def test_statistics_are_those_of_the_training_part(tmp_path: Path, options: dict[str, Any]) -> None:
    """At the run's size and color, without validation and test, to the rounding of a sum in float64."""
    make(tmp_path, count=20)
    for seed in (0, 1):
        data = load_folder(tmp_path, seed=seed, **options)
        (batch,) = data.eval_batches("train", 1000)
        images = batch["image"] / 255
        np.testing.assert_allclose(data.mean, images.mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(data.std, images.std((0, 1, 2)), rtol=1e-12)
    assert load_folder(tmp_path, mean_only=True).std == (1.0, 1.0, 1.0)


def test_a_channel_without_change_is_not_divided_by_zero(tmp_path: Path) -> None:
    image = noise(32, 32, 3)
    image[..., 2] = 0
    write(tmp_path, {f"{name}/{i}.png": saved(image) for name in ("cat", "dog") for i in range(4)})
    data = load_folder(tmp_path)
    assert (data.mean[2], data.std[2]) == (0.0, 1.0)


def test_every_kind_of_image_is_read_as_by_predict(tmp_path: Path) -> None:
    """All kinds of files of `odd_images`, under names that say nothing."""
    kinds = odd_images.kinds()
    files = {f"{('cat', 'dog')[i % 2]}/{i:02d}": file for i, (file, _) in enumerate(kinds.values())}
    write(tmp_path, files)
    data = load_folder(tmp_path, val_fraction=0, image_size=(odd_images.SIDE,) * 2)
    for split in ("train", "test"):
        source, indices = data.parts[split]
        for name, image in zip(names(data, split), source.read(indices)["image"], strict=True):
            np.testing.assert_array_equal(image, np.asarray(read_image(tmp_path / name, 3)), err_msg=name)


def test_a_header_has_the_size_of_the_decoded_image() -> None:
    image = noise(30, 50, 3)
    files = {name: file for name, (file, _) in odd_images.kinds().items()}
    for orientation in odd_images.UPRIGHT:
        for form in ("png", "jpeg", "tiff"):
            files[f"{form} {orientation}"] = saved(image, form, exif=odd_images.exif(orientation))
    for name, file in files.items():
        decoded = decode_image(io.BytesIO(file), 3)
        assert stored_size(io.BytesIO(file)) == (decoded.height, decoded.width), name


# Refusals


def special_files(root: Path) -> dict[str, str]:
    """Add files that are none, or no images, to the class `cat`; return why each cannot be used."""
    png = saved(noise(32, 32, 3))
    bad = {
        "truncated.png": (png[: len(png) // 2], "no image that Pillow reads"),
        "text.jpg": (b"not an image\n", "no image that Pillow reads"),
        "empty.png": (b"", "no image that Pillow reads"),
        "wide.tif": (saved(noise(32, 32).astype(np.int32), "tiff"), "integer pixels of 32 bits"),
    }
    write(root, {f"cat/{name}": content for name, (content, _) in bad.items()})
    cat = root / "cat"
    (cat / "nowhere.png").symlink_to("absent.png")
    (cat / "itself.png").symlink_to("itself.png")
    os.mkfifo(cat / "fifo.png")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(cat)  # the names of sockets are short
        server.bind("socket.png")
        os.chdir(here)
    (cat / "device.png").symlink_to("/dev/zero")
    (cat / os.fsdecode(b"caf\xe9.png")).write_bytes(png)
    links = dict.fromkeys(("nowhere.png", "itself.png"), "a link that leads nowhere")
    kinds = dict.fromkeys(("fifo.png", "socket.png", "device.png"), "no regular file")
    return (
        {name: fault for name, (_, fault) in bad.items()} | links | kinds | {"caf": "its name is not UTF-8"}
    )


def test_all_bad_files_are_named_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, count=10)
    good = load_folder(tmp_path)
    bad = special_files(tmp_path)
    for _ in range(2):  # the second time with a cache
        capsys.readouterr()
        line = refusal(tmp_path)
        assert f"{len(bad)} of the {20 + len(bad)} files in {tmp_path} cannot be used (named above" in line
        assert "--skip-bad" in line
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(bad)
        for name, fault in bad.items():
            found = [line for line in lines if line.startswith(f"cat/{name}") and fault in line]
            assert found, (name, lines)
    data = load_folder(tmp_path, skip_bad=True)
    assert (data.identity, data.mean) == (good.identity, good.mean)
    assert len(data.notes) == len(bad)
    assert all(note.startswith("--skip-bad: passed over cat/") for note in data.notes)


def test_few_bad_files_are_named_in_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(make(tmp_path), {"dog/a.jpg": b"", "dog/b\nc.jpg": b"text"})
    line = refusal(tmp_path)
    assert "2 of the 12 files" in line
    assert "dog/a.jpg: no image" in line
    assert "dog/b c.jpg: no image" in line
    assert capsys.readouterr().err == ""


def looped(root: Path) -> None:
    (root / "dog" / "inner").mkdir()
    (root / "dog" / "inner" / "loop").symlink_to("..")


def a_class_less(root: Path) -> None:
    shutil.rmtree(make(root, ("train", "test")) / "test" / "dog")


def a_class_more(root: Path) -> None:
    write(make(root, ("train", "val")), {"val/emu/1.png": b""})


def no_class(root: Path) -> None:
    for name in ("cat", "dog"):
        shutil.rmtree(root / name)


def all_bad(root: Path) -> None:
    for path in (root / "dog").iterdir():
        path.write_bytes(b"")


LAYOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one class": (lambda root: shutil.rmtree(root / "dog"), "has only one class, cat: put"),
    "no class": (no_class, "has no class: put"),
    "an empty class": (lambda root: (root / "bird").mkdir(), "no image of bird in the train part"),
    "a loop": (looped, "inner/loop leads back to a folder that it lies in"),
    "a name that is no text": (lambda root: (root / os.fsdecode(b"\xe9")).mkdir(), "is not UTF-8; rename it"),
    "test alone": (lambda root: make(root, ("test",)), "has test, and no train"),
    "a class less": (a_class_less, "the class dog is in train, not in test"),
    "a class more": (a_class_more, "the class emu is in val, not in train"),
    "two validations": (lambda root: make(root, ("train", "val", "validation")), "has val and validation"),
}  # fmt: skip


@pytest.mark.parametrize("change", LAYOUTS)
def test_a_layout_that_does_not_fit_is_one_line(tmp_path: Path, cache: Path, change: str) -> None:
    make(tmp_path)
    LAYOUTS[change][0](tmp_path)
    line = refusal(tmp_path)
    assert LAYOUTS[change][1] in line
    assert list(cache.iterdir()) == []


def test_a_class_whose_files_are_all_bad(tmp_path: Path) -> None:
    make(tmp_path)
    all_bad(tmp_path)
    assert "5 of the 10 files" in refusal(tmp_path)
    assert "no image of dog in the train part" in refusal(tmp_path, skip_bad=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads every file")
def test_files_and_folders_without_permission(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "cat" / "0.png").chmod(0)
    assert "cat/0.png: cannot be read (Permission denied)" in refusal(tmp_path)
    (tmp_path / "dog").chmod(0)
    assert "dog cannot be read (Permission denied); make it readable" in refusal(tmp_path)
    (tmp_path / "dog").chmod(0o700)


# The cache and the identity


def test_the_second_start_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    data = load_folder(tmp_path)
    monkeypatch.setattr(contents, "open_regular", lambda path: pytest.fail(f"opened {path}"))
    again = load_folder(tmp_path, seed=1)
    assert again.identity == data.identity
    assert load_folder(tmp_path).mean == data.mean


def test_what_has_changed_is_read_again(tmp_path: Path, cache: Path) -> None:
    """A file of other times, even of the same size; and everything, if the cache is damaged or lost."""
    make(tmp_path)
    first = load_folder(tmp_path)
    path = tmp_path / "cat" / "0.png"
    times = path.stat()
    path.write_bytes(bytes([*path.read_bytes()[:-1], 0]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as by `cp -p`: one time differs
    changed = load_folder(tmp_path)
    assert changed.identity != first.identity
    (file,) = (cache / "threeway-resnet" / "folders").iterdir()
    whole = file.read_bytes()
    for damage in (b"", b"[]", b"{}", whole[:-9], whole.replace(b'"format": 1', b'"format": 0')):
        file.write_bytes(damage)
        assert load_folder(tmp_path).identity == changed.identity
    shutil.rmtree(cache)
    cache.write_bytes(b"")  # no folder can be made there
    assert load_folder(tmp_path).identity == changed.identity


def test_the_identity_is_that_of_names_classes_and_contents(tmp_path: Path) -> None:
    make(tmp_path / "a", count=3)
    identity = load_folder(tmp_path / "a").identity
    copy = shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load_folder(copy, image_size=(40, 40), val_fraction=0.5).identity == identity
    sums = {identity["data_sha256"]}
    for change in (
        lambda: (copy / "cat" / "0.png").rename(copy / "cat" / "renamed.png"),
        lambda: (copy / "cat" / "1.png").rename(copy / "dog" / "1b.png"),
        lambda: (copy / "dog").rename(copy / "wolf"),
        lambda: shutil.copy(copy / "cat" / "2.png", copy / "wolf" / "0.png"),
    ):
        change()
        sums.add(load_folder(copy).identity["data_sha256"])
    assert len(sums) == 5


# Runs

RUN = ["--framework", "numpy", "--batch-size", "8", "--schedule", "constant", "--no-report"]
RUN += ["--augment", "crop-flip", "--eval-every", "2", "--checkpoint-every", "2"]


def trained(run: Path, *argv: str) -> Run:
    assert train.main([*RUN, "--run-dir", str(run), *argv]) == 0
    return Run(run)


def same_results(one: Run, other: Run) -> None:
    assert one.content("metrics.jsonl") == other.content("metrics.jsonl")
    for which in ("weights", "weights-best"):
        weights, others = one.weights(which), other.weights(which)
        assert weights.keys() == others.keys()
        for name, array in weights.items():
            np.testing.assert_array_equal(array, others[name], err_msg=name)


def check_trains_as_tfds(
    tmp_path: Path, images: Pixels, labels: Sequence[int], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images as PNG files in folders and as a TFDS set, in the same order: the same bits."""
    order = np.argsort(labels, kind="stable")
    classes = sorted({f"class {label}" for label in labels})
    files = {f"class {labels[i]}/{place:04d}.png": saved(images[i]) for place, i in enumerate(order)}
    test = dict(list(files.items())[::7])
    for part, members in (("train", files), ("test", test)):
        write(tmp_path / "folder" / part, members)
    import tensorflow_datasets

    features = {
        "image": tensorflow_datasets.features.Image(shape=(32, 32, 3)),
        "label": tensorflow_datasets.features.ClassLabel(names=classes),
    }
    splits = {
        part: [(content, classes.index(name.partition("/")[0])) for name, content in members.items()]
        for part, members in (("train", files), ("test", test))
    }
    made_tfds.write(tmp_path / "tfds", "made", splits, features=features)
    data = load_folder(tmp_path / "folder", seed=3)
    monkeypatch.setitem(tfds.STATISTICS, "made", (data.mean, data.std))
    options = ["--model", model, "--steps", "4", "--seed", "3", "--dataset"]
    by_folder = trained(tmp_path / "1", *options, "folder", "--data-dir", str(tmp_path / "folder"))
    by_tfds = trained(tmp_path / "2", *options, "made", "--data-dir", str(tmp_path / "tfds"))
    assert by_folder.config["resolved"]["train_size"] == round(0.9 * len(images))
    same_results(by_folder, by_tfds)


def test_a_folder_trains_as_the_tfds_set_of_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.random.default_rng(1).integers(0, 3, 60).tolist()
    check_trains_as_tfds(tmp_path, noise(60, 32, 32, 3), labels, "cnn", monkeypatch)


def test_a_folder_of_cifar10_trains_as_the_tfds_set(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load("cifar10", data_dir=str(data_dir), batch_size=1, seed=0, train_subset=0.0066)
    (batch,) = data.eval_batches("train", 300)
    images, labels = batch["image"], batch["label"].tolist()
    check_trains_as_tfds(tmp_path, images, labels, "resnet8", monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, and a run of six steps on it; one bad file was passed over."""
    path = tmp_path_factory.mktemp("finished")
    write(make(path / "data", count=20), {"dog/bad.jpg": b"no image"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        trained(path / "run", *SMALL, "--data-dir", str(path / "data"), "--steps", "6")
    return path


SMALL = ["--model", "cnn", "--dataset", "folder", "--skip-bad"]


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a copy of the data and the run."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_stopped_run_goes_on_bit_for_bit(here: Path) -> None:
    """From its checkpoint, with a data folder elsewhere and without what the cache knew."""
    trained(here / "stopped", *SMALL, "--data-dir", "data", "--steps", "4", "--schedule-steps", "6")
    shutil.copytree("data", "elsewhere")
    for name in ("weights.safetensors", "summary.json"):  # as after a kill
        (here / "stopped" / name).unlink()
    with open(here / "stopped" / "metrics.jsonl", "a") as file:
        file.write('{"cut')
    argv = ["--run-dir", "stopped", "--resume", "--data-dir", "elsewhere", "--steps", "6"]
    assert train.main(argv) == 0
    resumed, whole = Run(here / "stopped"), Run(here / "run")
    same_results(resumed, whole)
    assert resumed.config["resolved"] == whole.config["resolved"]
    assert "--skip-bad: passed over dog/bad.jpg: no image" in (here / "stopped" / "log.txt").read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(here: Path) -> None:
    """SIGKILL once a checkpoint is there. All in processes of their own, which have equally many threads."""
    program = [sys.executable, str(Path(__file__).parents[1] / "train.py"), "--run-dir"]
    argv = [*RUN, "--model", "resnet20", "--dataset", "folder", "--skip-bad", "--data-dir", "data"]
    argv += ["--steps", "14"]
    subprocess.run([*program, "whole", *argv], stdout=subprocess.DEVNULL, check=True)
    with subprocess.Popen([*program, "killed", *argv], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (here / "killed" / "checkpoints" / "4").is_dir():
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    subprocess.run([*program, "killed", "--resume"], stdout=subprocess.DEVNULL, check=True)
    same_results(Run(here / "killed"), Run(here / "whole"))


def test_other_images_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = here / "data" / "dog" / "3.png"
    path.write_bytes(saved(noise(32, 32, 3, seed=12345)))
    before = {p: p.read_bytes() for p in (here / "run").rglob("*") if p.is_file()}
    for command in (
        lambda: main(["evaluate", "run", "--data-dir", "data"]),
        lambda: train.main(["--run-dir", "run", "--resume", "--data-dir", "data", "--steps", "8"]),
    ):
        capsys.readouterr()
        assert command() == 2
        out, error = capsys.readouterr()
        assert (out, error.count("\n")) == ("", 1)
        assert "--data-dir: the data are folder (SHA-256 " in error
        assert "name the folder with those files, or start a fresh run" in error
    assert {p: p.read_bytes() for p in (here / "run").rglob("*") if p.is_file()} == before


def test_evaluation_computes_no_statistics(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mean and deviation are those of config.json, so that no image is decoded that is not evaluated."""
    monkeypatch.setattr(contents, "pixel_sums", lambda pixels: pytest.fail("summed"))
    assert main(["evaluate", "run", "--data-dir", "data"]) == 0
    accuracy = json.loads((here / "run" / "summary.json").read_text())["test"]["accuracy"]
    assert f"{accuracy:.4f}" in capsys.readouterr().out
    recorded = json.loads((here / "run" / "config.json").read_text())["resolved"]
    (here / "data" / "dog" / "bad.jpg").unlink()
    monkeypatch.setattr(contents, "decode_image", lambda *_: pytest.fail("decoded"))
    data = load_folder(here / "data", recorded=recorded)
    assert (list(data.mean), list(data.std)) == (recorded["mean"], recorded["std"])


def made_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda path: path.unlink(), "is gone; it was there at the start; restore it"),
        (lambda path: path.write_bytes(b""), "was changed since the start; restore it"),
        (made_fifo, "was changed since the start; restore it"),
    ],
)
def test_a_file_that_changes_during_the_run_ends_it_in_one_line(
    tmp_path: Path, change: Callable[[Path], object], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "data", count=20)
    argv = ["--run-dir", str(tmp_path / "run"), "--model", "cnn", "--dataset", "folder", "--steps", "6"]
    given = parse([*RUN, *argv, "--data-dir", str(tmp_path / "data")])
    session = Session(given, [], lambda engine: engine)
    lost = names(session.data, "test")[0]
    change(tmp_path / "data" / lost)
    outcome = session.run()
    assert outcome.status == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"the run failed: --data-dir: {tmp_path / 'data' / lost}: {fault}; verified checkpoints: " in line


def test_without_validation_a_plateau_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "data", ("train", "val", "test"))
    argv = ["--dataset", "folder", "--data-dir", str(tmp_path / "data"), "--schedule", "plateau"]
    assert train.main([*argv, "--val-fraction", "0", "--run-dir", str(tmp_path / "run")]) == 2
    assert "--schedule plateau: needs validation" in capsys.readouterr().err


def test_skip_bad_is_for_folders(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--skip-bad"]) == 2
    assert "--skip-bad: dataset digits does not use it" in capsys.readouterr().err


# Prediction


def test_predict_takes_folders_and_patterns(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same classes in every form, a batch or several; bad files are named at the end."""
    capsys.readouterr()
    files = sorted(str(path) for path in Path("data/cat").iterdir())
    assert main(["predict", "run", *files]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line[0] != " "] == files
    for images in (["data/cat"], ["data/c*/*.png"], ["data/**/cat/*.png"], ["data/cat", "--batch-size", "3"]):
        assert main(["predict", "run", *images]) == 0
        assert capsys.readouterr().out == printed
    (here / "data" / "cat" / ".hidden").write_bytes(b"")
    assert main(["predict", "run", "data"]) == 1
    out, error = capsys.readouterr()
    assert len([line for line in out.splitlines() if line[0] != " "]) == 40
    assert error.startswith("passed over: data/dog/bad.jpg: no image that Pillow reads")
    assert error.count("\n") == 1


def test_predict_writes_csv_and_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "run", "data/dog", "--out", "a.json"]) == 1
    assert main(["predict", "run", "data/dog", "--out", "a.csv", "--batch-size", "7"]) == 1
    out, error = capsys.readouterr()
    assert out.splitlines()[-1] == "a.csv: 20 images"
    assert error.count("passed over: data/dog/bad.jpg") == 2
    objects = json.loads((here / "a.json").read_text())
    header, *rows = [line.split(",") for line in (here / "a.csv").read_text().splitlines()]
    assert header == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    assert len(objects) == len(rows) == 20
    for item, row in zip(objects, rows, strict=True):
        assert item["file"] == row[0]
        assert [c["class"] for c in item["classes"]] == [row[1], row[3]]
        assert [c["probability"] for c in item["classes"]] == pytest.approx([float(row[2]), float(row[4])])
        assert float(row[2]) + float(row[4]) == pytest.approx(1)
    assert list(here.glob("*.tmp")) == []


def test_predict_sees_what_the_test_saw(here: Path) -> None:
    """The run's own size, resize and color: the same accuracy as `evaluate`."""
    recorded = json.loads((here / "run" / "config.json").read_text())
    data = load_folder(here / "data", skip_bad=True, recorded=recorded["resolved"])
    files = names(data, "test")
    assert main(["predict", "run", *(f"data/{name}" for name in files), "--out", "a.json"]) == 0
    found = [item["classes"][0]["class"] for item in json.loads((here / "a.json").read_text())]
    right = [predicted == name.partition("/")[0] for predicted, name in zip(found, files, strict=True)]
    assert np.mean(right) == json.loads((here / "run" / "summary.json").read_text())["test"]["accuracy"]


def test_large_images_are_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "CACHE_BYTES", 1000)
    make(tmp_path)
    source, _ = load_folder(tmp_path).parts["train"]
    assert isinstance(source, folder.FolderSource)
