"""The data pipeline: splits, order, coverage, pixels and messages.

Order and coverage are tested on sources whose images are their own numbers, reading on TFDS directories
made here (no TensorFlow, no network), and the real data sets where THREEWAY_DATA_DIR names them.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import random
import re
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from experiment.data import builtin, splitting, tfds
from experiment.data import loading as data_module
from experiment.data.augmentation import fit_image, image_of
from experiment.data.builtin import CachedSource, SyntheticSource, cached
from experiment.data.loading import Data, load
from experiment.data.splitting import Split, split_indices, stratified_split
from experiment.data.types import IMAGENET, Batch, Dataset, Labels
from experiment.errors import UserError
from tests.helpers import made_tfds

ROOT = Path(__file__).parents[1]


class Numbered:
    """A source whose images of 32x32 hold their own number, in their first four bytes."""

    def __init__(self, count: int, delay: Callable[[], float] = lambda: 0.0) -> None:
        self.count, self.delay = count, delay
        self.reads: list[int] = []
        self.readers: set[int] = set()

    def __len__(self) -> int:
        return self.count

    def read(self, indices: npt.NDArray[np.int64]) -> Batch:
        time.sleep(self.delay())
        self.reads.extend(indices.tolist())
        self.readers.add(threading.get_ident())
        images = np.zeros((len(indices), 32, 32, 1), np.uint8)
        images[:, 0, :4, 0] = indices.astype("<u4").view(np.uint8).reshape(-1, 4)
        return {"image": images, "label": (indices % 7).astype(np.int32)}

    def labels(self, indices: npt.NDArray[np.int64]) -> Labels:
        return (indices % 7).astype(np.int32)

    def images(self, indices: npt.NDArray[np.int64]) -> tuple[list[Image.Image], Labels]:
        batch = self.read(indices)
        return [image_of(image) for image in batch["image"]], batch["label"]


def numbers(batch: Batch) -> list[int]:
    """The numbers that the images of a batch hold."""
    found: list[int] = np.ascontiguousarray(batch["image"][:, 0, :4, 0]).view("<u4")[:, 0].tolist()
    assert batch["label"].tolist() == [number % 7 for number in found]
    return found


def order(batches: Iterable[Batch], count: int | None = None) -> list[list[int]]:
    return [numbers(batch) for batch in itertools.islice(batches, count)]


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


@pytest.fixture
def load_numbered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Data]:
    """`load`, of a data set of numbered images: (train, test, delay) and the arguments of `load`."""

    def load_it(
        train: int, test: int = 5, *, delay: Callable[[], float] = lambda: 0.0, **options: Any
    ) -> Data:
        parts = (Numbered(train, delay), Numbered(test, delay))
        dataset = Dataset(*parts, tuple("abcdefg"), (32, 32, 1), (0.5,), (0.5,), builtin.identity("0"))
        monkeypatch.setattr(data_module, "open_dataset", lambda *_, **__: dataset)
        return load("numbered", data_dir=None, **({"seed": 0, "batch_size": 1} | options))

    return load_it


# Order and coverage


@pytest.mark.parametrize(
    ("train", "batch_size", "steps"), [(103, 10, 10), (64, 32, 2), (33, 32, 1), (5, 5, 1), (7, 1, 7)]
)
def test_an_epoch_has_no_example_twice(
    load_numbered: Callable[..., Data], train: int, batch_size: int, steps: int
) -> None:
    data = load_numbered(train, batch_size=batch_size, val_fraction=0)
    assert data.steps_per_epoch == steps
    batches = data.train_batches()
    epochs = [order(batches, steps) for _ in range(12)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [batch_size] * steps
        assert len(set(flat(epoch))) == steps * batch_size
    # Every epoch is shuffled again, and the remainder that is dropped is not always the same.
    assert len({tuple(flat(epoch)) for epoch in epochs}) >= min(12, train)
    assert set(flat(flat(epoch) for epoch in epochs)) == set(range(train))


def test_one_example_is_an_epoch(load_numbered: Callable[..., Data]) -> None:
    data = load_numbered(1, val_fraction=0)
    assert order(data.train_batches(), 3) == [[0], [0], [0]]


@pytest.mark.parametrize("start_step", [0, 1, 8, 9, 10, 26, 27, 1_000_000_007])
def test_a_batch_is_a_function_of_seed_and_step(load_numbered: Callable[..., Data], start_step: int) -> None:
    options = {"seed": 3, "batch_size": 10, "val_fraction": 0.1}
    resumed = order(load_numbered(100, **options).train_batches(start_step), 4)
    if start_step < 1000:
        assert resumed == order(load_numbered(100, **options).train_batches(), start_step + 4)[start_step:]
    for shift in range(4):
        assert order(load_numbered(100, **options).train_batches(start_step + shift), 1) == [resumed[shift]]
    assert resumed != order(load_numbered(100, **(options | {"seed": 4})).train_batches(start_step), 4)


def test_a_negative_step_is_refused(load_numbered: Callable[..., Data]) -> None:
    with pytest.raises(ValueError, match="start_step"):
        load_numbered(10).train_batches(-1)


def test_the_number_of_threads_does_not_change_the_order(
    load_numbered: Callable[..., Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = order(load_numbered(60, batch_size=4).train_batches(5), 30)
    monkeypatch.setattr(data_module, "_SMALL_IMAGE", 0)
    monkeypatch.setattr(data_module, "core_count", lambda: 8)
    dawdle = random.Random(0)
    data = load_numbered(60, batch_size=4, delay=lambda: dawdle.uniform(0, 0.01))
    assert order(data.train_batches(5), 30) == one
    source, _ = data.parts["train"]
    assert isinstance(source, Numbered)
    assert len(source.readers) > 1, "only one thread read"


def test_an_abandoned_iterator_leaves_no_thread(load_numbered: Callable[..., Data]) -> None:
    before = set(threading.enumerate())
    stream = load_numbered(60, batch_size=4).train_batches()
    next(stream)
    readers = set(threading.enumerate()) - before
    assert readers
    del stream
    for reader in readers:
        reader.join(timeout=5)
        assert not reader.is_alive()


@pytest.mark.parametrize("batch_size", [1, 7, 29, 30, 31, 1000])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_evaluation_sees_each_example_once(
    load_numbered: Callable[..., Data], split: Split, batch_size: int
) -> None:
    data = load_numbered(150, 30, batch_size=4, val_fraction=0.2)
    size = {"train": data.train_size, "val": data.val_size, "test": data.test_size}[split]
    seen = order(data.eval_batches(split, batch_size))
    assert [len(batch) for batch in seen[:-1]] == [batch_size] * (len(seen) - 1)
    assert sorted(flat(seen)) == data.parts[split][1].tolist()
    assert len(flat(seen)) == size == {"train": 120, "val": 30, "test": 30}[split]
    assert order(data.eval_batches(split, batch_size)) == seen


def test_no_validation_yields_nothing(load_numbered: Callable[..., Data]) -> None:
    data = load_numbered(10, val_fraction=0)
    assert (data.train_size, data.val_size) == (10, 0)
    assert list(data.eval_batches("val", 4)) == []


def test_training_trains_on_the_training_part(load_numbered: Callable[..., Data]) -> None:
    data = load_numbered(50, batch_size=5, train_subset=0.8, val_fraction=0.25)
    trained = set(flat(order(data.train_batches(), data.steps_per_epoch)))
    assert trained == set(flat(order(data.eval_batches("train", 7))))
    assert trained.isdisjoint(flat(order(data.eval_batches("val", 7))))


def test_batches_are_the_callers_own() -> None:
    """An engine may change a batch in place, or keep it; the cache and the data set are not touched."""
    for name in ("digits", "synthetic"):
        data = load(name, data_dir=None, batch_size=8, seed=0)
        first = next(data.eval_batches("test", 8))
        kept = {key: value.copy() for key, value in first.items()}
        first["image"][:] = 0
        first["label"][:] = 0
        again = next(data.eval_batches("test", 8))
        for key, value in again.items():
            np.testing.assert_array_equal(value, kept[key], err_msg=f"{name} {key}")


# Splits


@given(
    size=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    train_subset=st.floats(0, 1, exclude_min=True),
    val_fraction=st.floats(0, 1, exclude_max=True),
)
@example(size=2, seed=0, train_subset=1.0, val_fraction=1e-9)
def test_split(size: int, seed: int, train_subset: float, val_fraction: float) -> None:
    used = max(1, round(size * train_subset))
    val_size = max(1, round(used * val_fraction)) if val_fraction else 0
    if val_size == used:
        with pytest.raises(UserError, match=r"--train-subset .* --val-fraction"):
            split_indices(size, seed, train_subset, val_fraction)
        return
    train, val = split_indices(size, seed, train_subset, val_fraction)
    assert len(val) == val_size
    assert len(train) == used - val_size
    assert len({*train.tolist(), *val.tolist()}) == used
    assert all(0 <= index < size for index in (*train, *val))
    for part, again in zip((train, val), split_indices(size, seed, train_subset, val_fraction), strict=True):
        np.testing.assert_array_equal(part, again)


def test_the_split_depends_on_the_seed() -> None:
    splits = {tuple(split_indices(100, seed, 0.5, 0.2)[part]) for seed in range(10) for part in (0, 1)}
    assert len(splits) == 20


# The data sets that need no files


@pytest.fixture(scope="module")
def small() -> dict[str, Data]:
    return {name: load(name, data_dir=None, batch_size=32, seed=0) for name in ("digits", "synthetic")}


def everything(data: Data, split: Split) -> Batch:
    """A whole part as one batch."""
    (batch,) = data.eval_batches(split, 10**6)
    return batch


@pytest.mark.parametrize(
    ("name", "sizes", "shape"),
    [("digits", (1293, 144, 360), (32, 32, 1)), ("synthetic", (1843, 205, 512), (32, 32, 3))],
)
def test_small_data_sets(
    small: dict[str, Data], name: str, sizes: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    data = small[name]
    assert (data.train_size, data.val_size, data.test_size) == sizes
    assert data.image_shape == shape
    assert data.num_classes == len(data.class_names) == 10
    assert data.steps_per_epoch == sizes[0] // 32
    for batch, size in ((next(data.train_batches()), 32), (everything(data, "test"), sizes[2])):
        assert set(batch) == {"image", "label"}
        assert batch["image"].shape == (size, *shape)
        assert batch["label"].shape == (size,)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32


@pytest.mark.parametrize(("name", "tolerance"), [("digits", 1e-3), ("synthetic", 5e-3)])
def test_statistics_are_those_of_the_images(small: dict[str, Data], name: str, tolerance: float) -> None:
    source, _ = small[name].parts["train"]
    images = source.read(np.arange(len(source)))["image"] / 255
    np.testing.assert_allclose(images.mean((0, 1, 2)), small[name].mean, atol=tolerance)
    np.testing.assert_allclose(images.std((0, 1, 2)), small[name].std, atol=tolerance)


def test_digits_are_scikit_learns(small: dict[str, Data]) -> None:
    from sklearn.datasets import load_digits

    originals, labels = load_digits(return_X_y=True)
    parts = [everything(small["digits"], split) for split in ("train", "val", "test")]
    together = np.concatenate([part["label"] for part in parts])
    assert np.bincount(together).tolist() == np.bincount(labels).tolist()
    # Resizing by an integer factor keeps the mean, but for rounding and the edges.
    images = np.concatenate([part["image"] for part in parts])
    assert images.max() == 255
    assert images.mean() == pytest.approx(originals.mean() / 16 * 255, abs=0.5)


def test_digits_test_part_is_a_stratified_fifth_for_every_seed(small: dict[str, Data]) -> None:
    test = everything(small["digits"], "test")
    counts = np.bincount(test["label"], minlength=10)
    assert counts.min() >= 35
    assert counts.max() <= 37
    # So that a change of scikit-learn's that moves examples between the parts is noticed.
    assert zlib.crc32(test["label"].astype("<i4").tobytes()) == 0x57DA2C56
    cases: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2, "train_subset": 0.1, "val_fraction": 0.5}]
    for options in cases:
        other = load("digits", data_dir=None, **({"batch_size": 8} | options))
        np.testing.assert_array_equal(everything(other, "test")["image"], test["image"])


def test_stratified_parts_are_scikit_learns() -> None:
    from sklearn.model_selection import train_test_split

    for seed in range(100):  # of classes so large that scikit-learn takes them
        generator = np.random.default_rng(seed)
        labels = generator.integers(generator.integers(2, 11), size=generator.integers(100, 400))
        fraction = generator.uniform(0.15, 0.7)
        options: dict[str, Any] = {"test_size": fraction, "random_state": 0, "stratify": labels}
        expected = train_test_split(np.arange(len(labels)), **options)
        for part, expected_part in zip(stratified_split(labels, fraction), expected, strict=True):
            np.testing.assert_array_equal(part, expected_part)


def test_other_sizes() -> None:
    for name, channels in (("digits", 1), ("synthetic", 3)):
        data = load(name, data_dir=None, batch_size=4, seed=0, image_size=(40, 64))
        assert data.image_shape == (40, 64, channels)
        assert next(data.train_batches())["image"].shape == (4, 40, 64, channels)


def test_synthetic_is_a_function_of_the_index() -> None:
    source = SyntheticSource(10, 50, (32, 32))
    whole = source.read(np.arange(50))
    some = np.array([49, 3, 3, 0])
    for key, value in source.read(some).items():
        np.testing.assert_array_equal(value, whole[key][some])
    assert whole["label"].tolist() == [index % 10 for index in range(50)]
    assert len({image.tobytes() for image in whole["image"]}) == 50


def test_synthetic_can_be_learned(small: dict[str, Data]) -> None:
    """The direction of the stripes shows in the spectrum: the nearest class mean is right 9 times of 10."""

    def spectrum(batch: Batch) -> npt.NDArray[np.float64]:
        grey = batch["image"].mean(-1)
        return np.abs(np.fft.rfft2(grey - grey.mean((1, 2), keepdims=True))).reshape(len(grey), -1)

    train, test = everything(small["synthetic"], "train"), everything(small["synthetic"], "test")
    features = spectrum(train)
    means = np.stack([features[train["label"] == label].mean(0) for label in range(10)])
    distance = ((spectrum(test)[:, None] - means) ** 2).sum(-1)
    assert (distance.argmin(1) == test["label"]).mean() > 0.9


# The transform, and the cache


def test_28_is_padded_to_32() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    fitted = fit_image(Image.fromarray(pixels), (32, 32))
    np.testing.assert_array_equal(fitted, np.pad(pixels, 2)[..., None])


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (50, 200), (224, 224)])
@pytest.mark.parametrize("shape", [(100, 60), (60, 100), (33, 33), (24, 24), (400, 37), (1, 1)])
def test_fitted_image_covers_the_target(shape: tuple[int, int], size: tuple[int, int]) -> None:
    fitted = fit_image(Image.fromarray(np.full((*shape, 3), 200, np.uint8)), size)
    np.testing.assert_array_equal(fitted, np.full((*size, 3), 200))


def test_the_centre_is_kept() -> None:
    """A wide image of three stripes, red, green and blue: fitted to a square, only green is left."""
    image = np.zeros((60, 180, 3), np.uint8)
    for stripe in range(3):
        image[:, 60 * stripe : 60 * stripe + 60, stripe] = 255
    fitted = fit_image(Image.fromarray(image), (32, 32))
    np.testing.assert_array_equal(fitted[:, 1:-1], np.broadcast_to(np.array([0, 255, 0]), (32, 30, 3)))
    turned = fit_image(Image.fromarray(image.transpose(1, 0, 2)), (32, 32))
    np.testing.assert_array_equal(turned, fitted.transpose(1, 0, 2))


def test_fitting_is_resizing_then_cropping() -> None:
    """Also at the edges of the crop, where the filter reaches beyond them."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 180, 3), dtype=np.uint8))
    resized = np.asarray(image.resize((96, 32), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(fit_image(image, (32, 32)).astype(int), resized[:, 32:64], atol=1)


def test_shrinking_is_antialiased() -> None:
    """A checkerboard of single pixels shrinks to grey, not to black and white."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.ptp(fit_image(Image.fromarray(board), (32, 32)).astype(int)) < 30


def test_the_size_it_has_is_not_touched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit_image(Image.fromarray(pixels), (40, 50)), pixels)


def test_cache_reads_once() -> None:
    source = Numbered(100)
    cache = CachedSource(source, (32, 32, 1))
    assert len(cache) == 100
    for indices in ([5, 3, 5], [3, 8], [], [8, 3, 5]):
        assert numbers(cache.read(np.array(indices, np.int64))) == indices
    assert sorted(set(source.reads)) == [3, 5, 8]
    assert len(source.reads) <= 4


def test_cache_under_threads() -> None:
    dawdle = random.Random(0)
    cache = CachedSource(Numbered(200, lambda: dawdle.uniform(0, 0.002)), (32, 32, 1))
    wrong: list[list[int]] = []

    def reader(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            indices = rng.integers(0, 200, 16)
            if numbers(cache.read(indices)) != indices.tolist():
                wrong.append(indices.tolist())

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_is_too_large_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Numbered(10)
    monkeypatch.setattr(builtin, "CACHE_BYTES", 10 * 32 * 32)
    assert isinstance(cached(source, (32, 32, 1)), CachedSource)
    monkeypatch.setattr(builtin, "CACHE_BYTES", 10 * 32 * 32 - 1)
    assert cached(source, (32, 32, 1)) is source


# TFDS directories made here


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "tfds data"


def load_made(root: Path, name: str = "made", **options: Any) -> Data:
    return load(name, data_dir=str(root), **({"batch_size": 2, "seed": 0} | options))


def pixels(data: Data, split: Split) -> list[npt.NDArray[np.uint8]]:
    source, _ = data.parts[split]
    return list(source.read(np.arange(len(source)))["image"])


def test_made_grey_28(root: Path) -> None:
    train, test = made_tfds.images(30, (28, 28)), made_tfds.images(9, (28, 28), seed=1)
    made_tfds.write(root, "made", {"train": train, "test": test}, shape=(28, 28, 1))
    cases: list[dict[str, Any]] = [{}, {"image_size": (32, 32)}]
    for options in cases:
        data = load_made(root, **options)
        assert (data.train_size, data.val_size, data.test_size) == (27, 3, 9)
        assert (data.image_shape, data.class_names) == ((32, 32, 1), ("even", "odd"))
        assert (data.mean, data.std) == ((0.5,), (0.5,))
        read_back = {"train": pixels(data, "train"), "test": pixels(data, "test")}
        for split, examples in (("train", train), ("test", test)):
            for read, (file, _) in zip(read_back[split], examples, strict=True):
                want = np.pad(np.asarray(Image.open(io.BytesIO(file))), 2)[..., None]
                np.testing.assert_array_equal(read, want)
    data = load_made(root, image_size=(48, 64))
    assert next(data.train_batches())["image"].shape == (2, 48, 64, 1)


def test_every_kind_of_file_becomes_rgb(root: Path) -> None:
    """ImageNet has grey and CMYK files; PNG may have a palette or transparency. All become RGB."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    kinds = {
        "rgb png": (rgb, "png"),
        "grey png": (rgb.convert("L"), "png"),
        "palette png": (rgb.quantize(16), "png"),
        "transparent png": (rgb.convert("RGBA"), "png"),
        "rgb jpeg": (rgb, "jpeg"),
        "grey jpeg": (rgb.convert("L"), "jpeg"),
        "cmyk jpeg": (rgb.convert("CMYK"), "jpeg"),
    }
    files = [(made_tfds.encoded(*kind), 0) for kind in kinds.values()]
    made_tfds.write(root, "made", {"train": files, "test": files})
    data = load_made(root, image_size=(40, 40))
    for kind, read, (file, _) in zip(kinds, pixels(data, "train"), files, strict=True):
        want = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        np.testing.assert_array_equal(read, want, err_msg=kind)
    exact = np.asarray(rgb)
    by_kind = dict(zip(kinds, pixels(data, "train"), strict=True))
    np.testing.assert_array_equal(by_kind["rgb png"], exact)
    np.testing.assert_array_equal(by_kind["transparent png"], exact)
    np.testing.assert_array_equal(
        by_kind["grey png"], np.repeat(np.asarray(rgb.convert("L"))[..., None], 3, -1)
    )


def test_one_transform_for_every_part(root: Path) -> None:
    files = made_tfds.images(6, (50, 70, 3))
    made_tfds.write(root, "made", {"train": files, "test": files})
    data = load_made(root, image_size=(33, 44))
    for trained, tested in zip(pixels(data, "train"), pixels(data, "test"), strict=True):
        np.testing.assert_array_equal(trained, tested)


@pytest.mark.parametrize(
    ("name", "shape", "stored", "want"),
    [
        ("made", (None, None, 3), (50, 70, 3), (224, 224, 3)),
        ("cars196", (None, None, 3), (50, 70, 3), (96, 96, 3)),
        ("made", (40, 48, 3), (40, 48, 3), (40, 48, 3)),
        ("made", (16, 16, 1), (16, 16), (32, 32, 1)),
        ("made", (64, 20, 1), (64, 20), (64, 32, 1)),
    ],
)
def test_default_sizes(
    root: Path, name: str, shape: Any, stored: tuple[int, ...], want: tuple[int, int, int]
) -> None:
    files = made_tfds.images(4, stored)
    made_tfds.write(root, name, {"train": files, "test": files}, shape=shape)
    data = load_made(root, name)
    assert data.image_shape == want
    assert next(data.train_batches())["image"].shape == (2, *want)


@pytest.mark.parametrize(
    ("name", "splits", "tested"),
    [
        ("made", {"train": 8, "test": 3, "validation": 4}, 3),
        ("made", {"train": 8, "validation": 4}, 4),
        ("made", {"train": 8, "test": 0, "validation": 4}, 4),
        ("imagenet2012", {"train": 8, "test": 3, "validation": 4}, 4),
    ],
)
def test_which_split_is_test(root: Path, name: str, splits: dict[str, int], tested: int) -> None:
    files = {split: made_tfds.images(count, (32, 32, 3)) for split, count in splits.items()}
    made_tfds.write(root, name, files)
    data = load_made(root, name)
    assert (data.train_size + data.val_size, data.test_size) == (8, tested)
    assert (data.mean, data.std) == IMAGENET


def one_line(caught: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    """The message is one line and has every part in it."""
    message = str(caught.value)
    assert "\n" not in message
    missing = [part for part in parts if part not in message]
    assert not missing, message


def test_splits_that_do_not_fit(root: Path) -> None:
    files = made_tfds.images(4, (32, 32, 3))
    for name, splits in (
        ("a", {"train": files, "unlabeled": files}),
        ("b", {"test": files}),
        ("c", {"train": files, "test": [], "unlabeled": files}),
        ("d", {"train": [], "test": files}),
        ("e", {}),
    ):
        made_tfds.write(root, name, splits)
        with pytest.raises(UserError) as caught:
            load_made(root, name)
        needed = "test or validation" if splits.get("train") else "train"
        there = ", ".join(f"{split} ({len(examples)} examples)" for split, examples in splits.items())
        one_line(
            caught,
            f"--dataset {name}: it has no {needed} split with examples",
            f"it has {there or 'none'}; use another",
            *(["or hold a part of train out with --test-fraction 0.1"] if splits.get("train") else []),
        )


@pytest.mark.parametrize("splits", [{"train": 20}, {"train": 20, "test": 0}])
def test_a_set_with_a_train_split_alone(root: Path, splits: dict[str, int]) -> None:
    """The test part does not depend on the seed, and no image is in two parts."""
    made_tfds.write(root, "made", {s: made_tfds.images(n, (32, 32, 3)) for s, n in splits.items()})
    for fraction, tested in ((None, 2), (0.25, 5), (0.001, 1)):
        loaded = [load_made(root, test_fraction=fraction, seed=seed) for seed in (0, 1)]
        parts = [{split: set(data.parts[split][1].tolist()) for split in data.parts} for data in loaded]
        assert parts[0]["test"] == parts[1]["test"]
        assert parts[0]["train"] != parts[1]["train"]
        for data, part in zip(loaded, parts, strict=True):
            assert (data.train_size + data.val_size, data.test_size) == (20 - tested, tested)
            assert len(part["train"] | part["val"] | part["test"]) == 20
            assert data.identity["data_test_split"] is None
            seen = {image.tobytes() for image in everything(data, "test")["image"]}
            assert seen.isdisjoint(image.tobytes() for image in everything(data, "train")["image"])
    with pytest.raises(UserError) as caught:
        load_made(root, test_fraction=0.99)
    one_line(caught, "--test-fraction 0.99 leaves no example to train on")


def test_a_test_part_is_not_held_out_beside_a_test_split(root: Path) -> None:
    with pytest.raises(UserError) as caught:
        load("digits", data_dir=None, batch_size=2, seed=0, test_fraction=0.1)
    one_line(caught, "--test-fraction: digits has a test part; leave the flag out")
    files = made_tfds.images(10, (32, 32, 3))
    made_tfds.write(root, "made", {"train": files, "test": [(file, -1) for file, _ in files]})
    data = load_made(root, test_fraction=0.2)  # its labels are hidden
    assert (data.train_size + data.val_size, data.test_size) == (8, 2)


def test_configurations(root: Path) -> None:
    """`NAME/CONFIG:VERSION`; alone, a name is that of the default one, and an error names those there are."""
    files = made_tfds.images(8, (32, 32, 3))
    for config, count in (("large", 8), ("small", 4)):
        made_tfds.write(root, "made", {"train": files[:count], "test": files[:2]}, config=config)
    made_tfds.write(root, "made", {"train": files[:6], "test": files[:2]}, config="small", version="0.9.0")
    known = {"made/large": (8, "1.0.0"), "made/small": (4, "1.0.0"), "made/small:0.9.0": (6, "0.9.0")}
    for name, (count, version) in known.items():
        data = load_made(root, name)
        assert data.train_size + data.val_size == count
        assert data.identity["data_version"] == version
        assert data.identity["data_config"] == name[5:10]
    there = "has made/large:1.0.0, made/small:0.9.0, made/small:1.0.0; name one of these, or run"
    for name in ("made", "made/other", "made/small:2.0.0", "made:1.0.0"):
        with pytest.raises(UserError) as caught:
            load_made(root, name)
        one_line(caught, f"--dataset {name}: --data-dir", there, f"prepare {name} ")
    (root / "made" / ".config").mkdir()
    (root / "made" / ".config" / "metadata.json").write_text('{"default_config_name": "large"}')
    assert load_made(root).identity["data_config"] == "large"


def test_features_of_other_names(root: Path) -> None:
    """The only features of their types; others beside `image` and `label` do not matter."""
    import tensorflow_datasets as tfds

    image, label = tfds.features.Image(shape=(32, 32, 3)), tfds.features.ClassLabel(num_classes=2)
    files = made_tfds.images(4, (32, 32, 3))
    for name, keys in (("a", ("photo", "species")), ("b", ("image", "species")), ("c", ("image", "label"))):
        features = {keys[0]: image, keys[1]: label}
        examples = [dict(zip(keys, pair, strict=True)) for pair in files]
        if name == "c":
            features |= {"mask": image, "coarse": label}
            examples = [{**each, "mask": files[0][0], "coarse": 1} for each in examples]
        made_tfds.write(root, name, {"train": examples, "test": examples}, features=features)
        data = load_made(root, name, val_fraction=0)
        batch = everything(data, "train")
        assert batch["label"].tolist() == [0, 1, 0, 1]
        for read, (file, _) in zip(batch["image"], files, strict=True):
            np.testing.assert_array_equal(read, np.asarray(Image.open(io.BytesIO(file))))
    features = {"left": image, "right": image, "label": label}
    examples = [{"left": file, "right": file, "label": number} for file, number in files]
    made_tfds.write(root, "d", {"train": examples, "test": examples}, features=features)
    with pytest.raises(UserError) as caught:
        load_made(root, "d")
    one_line(
        caught,
        "--dataset d: an image and a class are needed",
        "left (Image)",
        "right (Image)",
        "label (ClassLabel)",
    )


def test_features_that_do_not_fit(root: Path) -> None:
    import tensorflow_datasets as tfds

    features = tfds.features
    image, label = features.Image(shape=(32, 32, 3)), features.ClassLabel(num_classes=2)
    files = made_tfds.images(4, (32, 32, 3))
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "a": ({"image": image, "one": label, "other": label}, "other (ClassLabel)"),
        "b": ({"image": image, "label": features.Scalar(np.int64)}, "label (Scalar)"),
        "c": ({"label": label, "text": features.Text()}, "text (Text)"),
        "d": ({"image": features.Image(shape=(32, 32, 4)), "label": label}, "4 of uint8"),
        "e": ({"image": features.Image(shape=(32, 32, 1), dtype=np.uint16), "label": label}, "1 of uint16"),
        "f": ({"image": image, "label": features.Sequence(label)}, "label (Sequence)"),
        "g": ({"image": image, "label": features.ClassLabel()}, "`label` has no number of classes"),
    }
    for name, (named, message) in cases.items():
        made_tfds.write(root, name, {"train": files, "test": files}, features=named)
        with pytest.raises(UserError) as caught:
            load_made(root, name)
        one_line(caught, f"--dataset {name}:", message, "use another")


def test_hidden_test_labels(root: Path) -> None:
    """Validation is the test part where there is one; else the message says that labels are hidden."""
    files = made_tfds.images(4, (32, 32, 3))
    hidden = [(file, -1) for file, _ in files]
    made_tfds.write(root, "made", {"train": files, "validation": files[:3], "test": hidden})
    data = load_made(root)
    assert (data.test_size, data.identity["data_test_split"]) == (3, "validation")
    cases = {
        "a": ({"train": files, "test": hidden}, "the labels of its test split are hidden (-1)"),
        "b": (
            {"train": files, "test": hidden, "validation": hidden},
            "the labels of its test and validation split are hidden (-1)",
        ),
        "c": ({"train": hidden, "test": files}, "the labels of its train split are hidden (-1)"),
        "d": ({"train": files, "test": [*files, hidden[0]]}, "the labels of its test split are hidden (-1)"),
        "imagenet2012": ({"train": files, "test": hidden}, "it has no validation split with examples"),
    }
    for name, (splits, message) in cases.items():
        made_tfds.write(root, name, splits)
        with pytest.raises(UserError) as caught:
            load_made(root, name)
        one_line(caught, f"--dataset {name}: {message}", "it has train (4 examples), test (", "use another")
        assert "delete" not in str(caught.value)
        assert "prepare" not in str(caught.value)


@pytest.mark.parametrize(
    ("label", "fault"), [(-1, "has no label (-1)"), (2, "has the label 2, which is none of its 2 classes")]
)
def test_a_label_that_is_no_class_names_its_record(root: Path, label: int, fault: str) -> None:
    files = made_tfds.images(9, (32, 32, 3))
    files[3] = (files[3][0], label)
    directory = made_tfds.write(root, "made", {"train": files, "test": files[:3]})
    data = load_made(root, val_fraction=0)
    with pytest.raises(UserError) as caught:
        list(data.eval_batches("train", 2))
    one_line(caught, f"--data-dir: record 3 of made (train) in {directory} {fault}", "use another data set")
    assert "delete" not in str(caught.value)


def data_file(directory: Path, split: str) -> Path:
    (path,) = directory.glob(f"*-{split}.array_record*")
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 16
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no records": lambda directory: data_file(directory, "test").unlink(),
    "cut records": lambda directory: cut(data_file(directory, "train")),
    "empty records": lambda directory: data_file(directory, "train").write_bytes(b""),
    "foreign records": lambda directory: data_file(directory, "test").write_bytes(b"no records\n" * 9000),
    "no JSON": lambda directory: (directory / "dataset_info.json").write_text("{"),
    "other JSON": lambda directory: (directory / "dataset_info.json").write_text("[1, 2]"),
    "no features": lambda directory: (directory / "features.json").write_text("{"),
    "other features": lambda directory: (directory / "features.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_before_a_run_begins(root: Path, damage: str) -> None:
    files = made_tfds.images(64, (32, 32, 3))
    directory = made_tfds.write(root, "made", {"train": files, "test": files})
    DAMAGE[damage](directory)
    with pytest.raises(UserError) as caught:
        load_made(root)
    command = f"python -m experiment prepare made --data-dir '{root}'"
    one_line(caught, "--data-dir", "made", str(root), f"move that folder away and run `{command}`")


def test_a_flipped_bit_is_noticed_when_it_is_read(root: Path) -> None:
    files = made_tfds.images(64, (32, 32, 3))
    directory = made_tfds.write(root, "made", {"train": files, "test": files})
    path = data_file(directory, "train")
    # The records are the first 64 images' bytes; the end of the file is the index and padding.
    place = sum(len(file) for file, _ in files) // 2
    flip(path, place / path.stat().st_size)
    starts = [path.read_bytes().find(file[:60]) for file, _ in files]
    damaged = max(number for number, start in enumerate(starts) if start < place)
    data = load_made(root, batch_size=8)
    for stream in (data.train_batches(), data.eval_batches("train", 8)):
        with pytest.raises(UserError) as caught:
            list(itertools.islice(stream, data.steps_per_epoch + 1))
        one_line(caught, f"record {damaged} of made (train)", "cannot be read", "move that folder away")


@pytest.mark.parametrize("file", [b"", b"no image", made_tfds.encoded(np.zeros((40, 40), np.uint8))[:45]])
def test_a_broken_image_is_noticed(root: Path, file: bytes) -> None:
    files = made_tfds.images(8, (32, 32, 3))
    made_tfds.write(root, "made", {"train": [*files, (file, 0)], "test": files})
    data = load_made(root, val_fraction=0)
    with pytest.raises(UserError) as caught:
        list(data.eval_batches("train", 3))
    one_line(caught, "record 8 of made (train)", "no image that Pillow reads", "use another data set")
    assert "delete" not in str(caught.value)


def test_a_record_is_named_as_the_data_set_names_it(root: Path) -> None:
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
        "file_name": tfds.features.Text(),
        "bbox": tfds.features.BBoxFeature(),
    }
    examples: list[dict[str, Any]] = [
        {"image": file, "label": label, "file_name": b"a\n%d.png" % label, "bbox": (0.0, 0.0, 1.0, 1.0)}
        for file, label in made_tfds.images(3, (32, 32, 3))
    ]
    examples[1]["image"] = b"no image"
    examples[2]["bbox"] = (0.5, 0.0, 0.5, 1.0)
    made_tfds.write(root, "made", {"train": examples, "test": examples[:1]}, features=features)
    data = load_made(root, val_fraction=0, crop_to_bbox=True)
    with pytest.raises(UserError) as caught:
        list(data.eval_batches("train", 2))
    one_line(caught, "--data-dir: record 1, file_name a 1.png, of made (train) in ")
    source, _ = data.parts["train"]
    with pytest.raises(UserError) as caught:
        source.read(np.array([2]))
    one_line(
        caught, "record 2, file_name a 0.png, of made (train)", "no box inside", "leave --crop-to-bbox out"
    )


def test_other_formats_are_refused(root: Path) -> None:
    files = made_tfds.images(4, (32, 32, 3))
    directory = made_tfds.write(root, "made", {"train": files, "test": files})
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    for path in directory.glob("*.array_record*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    with pytest.raises(UserError) as caught:
        load_made(root)
    one_line(caught, "tfrecord", "array_record", "--data-dir DIR")


def test_the_newest_version_is_read(root: Path) -> None:
    files = made_tfds.images(4, (32, 32, 3))
    old = made_tfds.write(root, "made", {"train": files, "test": files})
    old.rename(old.with_name("0.9.0"))
    made_tfds.write(root, "made", {"train": files * 2, "test": files})
    assert load_made(root, val_fraction=0).train_size == 8


def test_an_unfinished_preparation_is_no_data_set(root: Path) -> None:
    files = made_tfds.images(4, (32, 32, 3))
    directory = made_tfds.write(root, "mnist", {"train": files, "test": files})
    directory.rename(directory.with_name("incomplete.ABC123_1.0.0"))
    with pytest.raises(UserError) as caught:
        load_made(root, "mnist")
    one_line(caught, "mnist is not prepared", "python -m experiment prepare mnist")


# Messages


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("mnits", {}, ["--dataset mnits", "did you mean mnist"]),
        ("digit", {}, ["--dataset digit", "did you mean digits"]),
        ("zzzzzzzzzz", {}, ["--dataset zzzzzzzzzz", "use digits"]),
        (
            "mnist",
            {},
            ["--dataset mnist", "not prepared", "run `python -m experiment prepare mnist --data-dir "],
        ),
        ("imagenet2012", {}, ["prepare imagenet2012"]),
        (
            "cifar10",
            {"data_dir": "nowhere"},
            ["--data-dir nowhere (which does not exist)", "prepare cifar10"],
        ),
        ("cifar10", {"data_dir": "a file"}, ["--data-dir a file (which does not exist)", "'a file'"]),
        ("cifar10", {"data_dir": None}, ["--data-dir ", "run `python -m experiment prepare cifar10`"]),
        ("mnist/x", {}, ["--dataset mnist/x is not prepared", "prepare mnist/x --data-dir "]),
        ("mnist:3.0.1", {}, ["--dataset mnist:3.0.1 is not prepared", "prepare mnist:3.0.1 "]),
        ("mnist:3", {}, ["--dataset 'mnist:3' is not a TFDS name", "version"]),
        ("folder", {"data_dir": None}, ["--dataset folder", "--data-dir DIR"]),
        ("folder", {"data_dir": "nowhere"}, ["--data-dir: nowhere does not exist"]),
        ("folder", {"data_dir": "a file"}, ["--data-dir: a file is a file"]),
        ("folder", {}, ["--data-dir: empty has no class"]),
        ("folder", {"crop_to_bbox": True}, ["--crop-to-bbox: folder has no bounding boxes"]),
        ("../mnist", {}, ["--dataset", "path"]),
        ("MNIST", {}, ["--dataset 'MNIST'", "lower-case"]),
        ("mnist\n", {}, ["--dataset 'mnist\\n'"]),
        ("", {}, ["--dataset ''"]),
        ("kaggle:a", {}, ["--dataset"]),
        ("digits", {"batch_size": 1294}, ["--batch-size 1294", "1293", "--train-subset"]),
        ("digits", {"batch_size": 0}, ["--batch-size 0"]),
        ("digits", {"train_subset": 0.0}, ["--train-subset: 0.0 "]),
        ("digits", {"train_subset": 1.5}, ["--train-subset: 1.5"]),
        ("digits", {"train_subset": float("nan")}, ["--train-subset: nan"]),
        ("digits", {"train_subset": 1e-9}, ["--train-subset 1e-09", "--val-fraction 0.1"]),
        ("digits", {"val_fraction": 1.0}, ["--val-fraction: 1.0 "]),
        ("digits", {"val_fraction": -0.1}, ["--val-fraction: -0.1"]),
        ("digits", {"val_fraction": 0.9999}, ["--val-fraction 0.9999", "leave no example"]),
        ("digits", {"image_size": (31, 32)}, ["--image-size: 31x32", "32"]),
        ("synthetic", {"image_size": (64, 8)}, ["--image-size: 64x8"]),
        ("mnist", {"image_size": (28, 28)}, ["--image-size: 28 is"]),
        ("digits", {"resize": (32,), "image_size": (40, 48)}, ["--resize: 32", "40x48", "48 or more"]),
        ("digits", {"crop_to_bbox": True}, ["--crop-to-bbox: digits", "leave the flag out"]),
        ("synthetic", {"crop_to_bbox": True}, ["--crop-to-bbox: synthetic", "cars196"]),
        ("digits", {"grayscale": True}, ["--grayscale: digits", "leave the flag out"]),
        ("digits", {"augment": "crop-flip-pca"}, ["--augment: crop-flip-pca", "use crop-flip"]),
        (
            "synthetic",
            {"augment": "crop-flip-pca", "grayscale": True},
            ["--augment: crop-flip-pca", "use crop-flip"],
        ),
        ("digits", {"seed": -1}, ["--seed: -1"]),
        ("digits", {"seed": 2**32}, ["--seed: 4294967296"]),
    ],
)
def test_a_users_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], parts: list[str]
) -> None:
    import tensorflow_datasets as tfds

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", "~/tensorflow_datasets")
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("a file").touch()
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    arguments: dict[str, Any] = {"data_dir": "empty", "batch_size": 4, "seed": 0} | options
    with pytest.raises(UserError) as caught:
        load(name, **arguments)
    one_line(caught, *parts)
    assert sorted(tmp_path.rglob("*")) == before


QUIET = """
import json, os, sys
from experiment.data.loading import load
from experiment.errors import UserError
name, data_dir = sys.argv[1:]
data = load(name, data_dir=data_dir, batch_size=8, seed=0)
next(data.train_batches())
for split in ("train", "val", "test"):
    next(data.eval_batches(split, 8))
for wrong in ("nosuchthing", "emnist"):
    try:
        load(wrong, data_dir=data_dir, batch_size=8, seed=0)
    except UserError:
        pass
    else:
        raise AssertionError(wrong)
assert "tensorflow_datasets" in sys.modules
print(*sorted({module.split(".")[0] for module in sys.modules}))
"""


def quiet_load(name: str, data_dir: Path, home: Path) -> None:
    """Load in a process of its own: nothing on stderr, no TensorFlow, nothing written below HOME."""
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", QUIET, name, str(data_dir)],
        cwd=ROOT,
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {"tensorflow", "torch"}.isdisjoint(done.stdout.split())
    assert list(home.rglob("*")) == []


def test_loading_is_quiet_and_needs_no_tensorflow(root: Path, tmp_path: Path) -> None:
    files = made_tfds.images(40, (28, 28))
    made_tfds.write(root, "made", {"train": files, "test": files}, shape=(28, 28, 1))
    quiet_load("made", root, tmp_path / "home")


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_only_what_is_needed_is_imported(name: str) -> None:
    program = f"""
import sys
from experiment.data.loading import load
assert not {{"grain", "jax", "PIL", "sklearn", "tensorflow_datasets"}} & set(sys.modules)
load({name!r}, data_dir=None, batch_size=8, seed=0)
assert not {{"grain", "jax", "sklearn", "tensorflow_datasets"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=True)


# The real data sets


@pytest.mark.parametrize(
    ("name", "sizes", "classes", "shape"),
    [
        ("mnist", (60000, 10000), 10, (32, 32, 1)),
        ("fashion_mnist", (60000, 10000), 10, (32, 32, 1)),
        ("cifar10", (50000, 10000), 10, (32, 32, 3)),
        ("cars196", (560, 187), 196, (96, 96, 3)),
    ],
)
def test_real_data_sets(
    data_dir: Path, name: str, sizes: tuple[int, int], classes: int, shape: tuple[int, int, int]
) -> None:
    data = load(name, data_dir=str(data_dir), batch_size=64, seed=0)
    assert (data.train_size + data.val_size, data.test_size) == sizes
    assert (data.num_classes, data.image_shape) == (classes, shape)
    assert len(data.mean) == len(data.std) == shape[-1]
    batch = next(data.train_batches())
    assert batch["image"].shape == (64, *shape)
    assert 0 <= batch["label"].min() <= batch["label"].max() < classes
    source, _ = data.parts["train"]
    images = source.read(np.arange(0, sizes[0], 20))["image"] / 255
    if name.endswith("mnist"):
        np.testing.assert_array_equal(images[:, [0, 1, 30, 31]], 0)
        np.testing.assert_array_equal(images[:, :, [0, 1, 30, 31]], 0)
        images = images[:, 2:30, 2:30]
    if name != "cars196":  # ImageNet's constants stand for its own
        np.testing.assert_allclose(images.mean((0, 1, 2)), data.mean, atol=0.01)
        np.testing.assert_allclose(images.std((0, 1, 2)), data.std, atol=0.01)


def test_real_mnist_equals_what_tfds_decodes(data_dir: Path) -> None:
    import tensorflow_datasets as tfds

    theirs = tfds.data_source(
        "mnist",
        split="test",
        data_dir=data_dir,
        download=False,
        builder_kwargs={"file_format": "array_record"},
    )
    data = load("mnist", data_dir=str(data_dir), batch_size=64, seed=0)
    batch = everything(data, "test")
    assert np.bincount(batch["label"]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    for index in range(0, 10000, 97):
        want = theirs[index]
        np.testing.assert_array_equal(batch["image"][index, 2:30, 2:30], want["image"], err_msg=str(index))
        assert batch["label"][index] == want["label"]


def test_real_loading_is_quiet_and_needs_no_tensorflow(data_dir: Path, tmp_path: Path) -> None:
    quiet_load("mnist", data_dir, tmp_path / "home")


def test_data_is_frozen(small: dict[str, Data]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        small["digits"].name = "other"  # type: ignore[misc]


def test_messages_name_existing_flags() -> None:
    """What the messages tell the user to change is what the command line has."""
    flags = {f"--{name}" for name in ("dataset", "data-dir", "batch-size", "seed")}
    flags |= {"--train-subset", "--val-fraction", "--augment", "--resize", "--crop-to-bbox", "--grayscale"}
    flags |= {"--test-fraction", "--class-weights"}
    text = "".join(
        Path(module.__file__ or "").read_text() for module in (data_module, splitting, builtin, tfds)
    )
    assert set(re.findall(r"--[a-z][a-z-]+", text)) == flags
