"""Mixup, CutMix, RandAugment, random erasing and another size for testing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageEnhance, ImageOps

from experiment.data.augmentation import fill_color, generators, image_of, pixels_of, random_erase
from experiment.data.loading import Data, load
from experiment.data.mixing import Mixing, box, cutmix, mixup
from experiment.data.randaugment import OPERATIONS, operate, randaugment
from experiment.data.types import Batch
from tests.helpers.scripted import scripted

FILL = (100, 128, 150)
PART = np.arange(10, 40)
IMAGE = np.random.default_rng(5).integers(0, 256, (40, 32, 3), dtype=np.uint8)


def read(examples: npt.NDArray[np.int64]) -> Batch:
    """Images all of one value, which is the example's index."""
    images = np.broadcast_to(examples.astype(np.uint8)[:, None, None, None], (len(examples), 32, 24, 1))
    return {"image": images.copy(), "label": (examples % 10).astype(np.int32)}


def mixed(mixing: Mixing, examples: Any, epoch: int = 2) -> Batch:
    return mixing.batch(read, PART, np.asarray(examples), epoch)


def test_mixup_by_hand() -> None:
    image, lam = mixup(np.array([[[10]]], np.uint8), np.array([[[21]]], np.uint8), 0.25)
    assert (image.item(), lam) == (18, 0.25)  # 2.5 + 15.75 = 18.25


@pytest.mark.parametrize(
    ("lam", "center", "expected"),
    [
        (0.75, (0.5, 0.5), (8, 4, 24, 12)),  # half of each side, around row 16 and column 8
        (0.75, (0.0, 0.99), (0, 11, 8, 16)),  # around row 0 and column 15, cut at the corner
        (1.0, (0.5, 0.5), (16, 8, 16, 8)),  # empty
        (0.0, (0.5, 0.5), (0, 0, 32, 16)),  # the whole image
    ],
)
def test_the_box_by_hand(lam: float, center: tuple[float, float], expected: tuple[int, ...]) -> None:
    """Of an image of 32x16: top, left, bottom, right."""
    assert box((32, 16), lam, center) == expected


def test_cutmix_takes_the_box_and_counts_what_is_left() -> None:
    ones, twos = np.ones((32, 16, 3), np.uint8), np.full((32, 16, 3), 2, np.uint8)
    image, lam = cutmix(ones, twos, 0.75, (0.0, 0.0))
    assert (image[:8, :4] == 2).all()
    assert (image == 1).sum() == 3 * (32 * 16 - 32)
    assert lam == 1 - 32 / (32 * 16)
    assert (ones == 1).all()


@pytest.mark.parametrize("mixing", [Mixing(0.2, 0.0, 7), Mixing(0.0, 1.0, 7), Mixing(0.3, 0.7, 7)])
def test_draws_depend_on_seed_epoch_and_example_alone(mixing: Mixing) -> None:
    batch = mixed(mixing, [12, 30, 17])
    for i, example in enumerate([12, 30, 17]):
        alone = mixed(mixing, [example])
        for name, values in batch.items():
            np.testing.assert_array_equal(alone[name], values[i : i + 1], err_msg=name)
    for other in (mixed(mixing, [12, 30, 17], epoch=3), mixed(Mixing(0.3, 0.7, 8), [12, 30, 17])):
        assert (other["lam"] != batch["lam"]).any()


def test_labels_and_shares_are_those_of_the_pixels() -> None:
    examples = np.tile(PART, 20)
    batch = Mixing(0.4, 1.0, 0).batch(read, PART, examples, 0)
    assert batch["label"].tolist() == (examples % 10).tolist()
    boxes = 0
    for example, image, label2, lam in zip(
        examples, batch["image"], batch["label2"], batch["lam"], strict=True
    ):
        values = Counter(image.ravel().tolist())
        assert 0 <= lam <= 1
        if len(values) > 1:  # CutMix of two images
            assert lam == pytest.approx(values[example] / image.size)
            (other,) = values.keys() - {example}
            assert other % 10 == label2
            boxes += 1
    assert len(set(batch["label2"].tolist())) == 10


def test_one_or_the_other_with_probability_one_half() -> None:
    mixing, kinds = Mixing(0.2, 1.0, 0), Counter[bool]()
    for rng in generators(0, 0, np.arange(2000), 2):
        kinds[mixing._draw(rng)[1] is None] += 1
    assert 900 < kinds[True] < 1100


def data(**options: Any) -> Data:
    return load("digits", data_dir=None, batch_size=16, seed=3, train_subset=0.2, **options)


def test_batches_of_a_run_are_mixed_and_can_be_continued() -> None:
    options: dict[str, Any] = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "augment": "crop-flip"}
    whole = data(**options)
    assert whole.held() is None  # an engine that holds the images could not mix them
    batches = whole.train_batches()
    first = [next(batches) for _ in range(20)]
    again = next(whole.train_batches(19))
    for name, values in first[19].items():
        np.testing.assert_array_equal(again[name], values)
    plain = next(data(augment="crop-flip").train_batches())
    np.testing.assert_array_equal(plain["label"], first[0]["label"])
    assert (plain["image"] != first[0]["image"]).any()


EXPECTED = {
    ("Identity", 30, False): lambda image: image,
    ("Solarize", 10, False): lambda image: ImageOps.solarize(image, 170),
    ("Posterize", 15, False): lambda image: ImageOps.posterize(image, 6),
    ("Posterize", 9, False): lambda image: ImageOps.posterize(image, 7),
    ("AutoContrast", 3, True): ImageOps.autocontrast,
    ("Equalize", 3, True): ImageOps.equalize,
    ("Brightness", 10, False): lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    ("Brightness", 10, True): lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    ("Color", 30, False): lambda image: ImageEnhance.Color(image).enhance(1.9),
    ("Contrast", 30, True): lambda image: ImageEnhance.Contrast(image).enhance(0.1),
    ("Sharpness", 20, False): lambda image: ImageEnhance.Sharpness(image).enhance(1.6),
    ("Rotate", 10, False): lambda image: image.rotate(10, fillcolor=FILL),
    ("Rotate", 10, True): lambda image: image.rotate(-10, fillcolor=FILL),
    ("ShearX", 20, False): lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0.2, 0, 0, 1, 0), fillcolor=FILL
    ),
    ("ShearY", 20, True): lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, 0, -0.2, 1, 0), fillcolor=FILL
    ),
    ("TranslateX", 30, False): lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, 14, 0, 1, 0), fillcolor=FILL
    ),
    ("TranslateY", 15, True): lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, -9), fillcolor=FILL
    ),
}
"""By Pillow, with torchvision's magnitudes: 150/331 of 32 pixels is 14.5, half of that of 40 is 9.06."""


@pytest.mark.parametrize("case", EXPECTED, ids=str)
def test_operations_of_randaugment_are_pillows(case: tuple[str, int, bool]) -> None:
    image = image_of(IMAGE)
    found = pixels_of(operate(case[0], image, case[1], case[2], FILL))
    np.testing.assert_array_equal(found, pixels_of(EXPECTED[case](image)))


def test_every_operation_is_tried() -> None:
    assert {name for name, _, _ in EXPECTED} == set(OPERATIONS)
    assert len(OPERATIONS) == 14


def test_randaugment_applies_what_it_draws() -> None:
    """Operation 5 of 14 is Rotate, 11 Solarize; a number below 1/2 is the other way."""
    image = image_of(IMAGE)
    found = randaugment(image, 2, 10, FILL, scripted(5.5 / 14, 0.6, 11.5 / 14, 0.4))
    expected = ImageOps.solarize(image.rotate(10, fillcolor=FILL), 170)
    np.testing.assert_array_equal(pixels_of(found), pixels_of(expected))


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_of_gray_and_color_images(channels: int) -> None:
    image = image_of(IMAGE[..., :channels])
    for rng in generators(0, 0, np.arange(100)):
        changed = randaugment(image, 3, 30, FILL[:channels], rng)
        assert (changed.mode, changed.size) == (image.mode, image.size)


def test_random_erasing_has_torchvisions_ranges() -> None:
    areas, ratios, erased = [], [], 0
    for rng in generators(1, 0, np.arange(400)):
        image = np.zeros((64, 64, 3), np.uint8)
        changed = random_erase(image, 0.25, (9, 9, 9), rng)
        assert not image.any()
        rows, columns = np.flatnonzero(changed[..., 0].any(1)), np.flatnonzero(changed[..., 0].any(0))
        if len(rows):
            erased += 1
            assert (changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 9).all()
            areas.append(len(rows) * len(columns) / 64**2)
            ratios.append(len(rows) / len(columns))
    assert 70 < erased < 130
    assert min(areas) > 0.018
    assert 0.25 < max(areas) < 0.34
    assert 0.27 < min(ratios) < 0.5
    assert 2 < max(ratios) < 3.6


def test_erased_pixels_are_the_mean_color() -> None:
    batches = data(random_erase=1.0).train_batches()
    mean = fill_color(data().mean)[0]
    first = next(batches)["image"]
    assert all((image == mean).any() for image in first)


def test_randaugment_alone_and_after_crop_and_flip() -> None:
    plain = next(data().train_batches())["image"]
    assert (next(data(randaugment=(2, 9)).train_batches())["image"] != plain).any()
    both = next(data(augment="crop-flip", randaugment=(2, 9)).train_batches())["image"]
    again = next(data(augment="crop-flip", randaugment=(2, 9)).train_batches())["image"]
    np.testing.assert_array_equal(both, again)


def test_another_size_for_validation_and_test() -> None:
    small, large = data(), data(eval_size=(48, 40))
    np.testing.assert_array_equal(next(small.train_batches())["image"], next(large.train_batches())["image"])
    for split in ("val", "test"):
        batches = zip(small.eval_batches(split, 32), large.eval_batches(split, 32), strict=True)
        for first, second in batches:
            assert second["image"].shape[1:] == (48, 40, 1)
            np.testing.assert_array_equal(first["label"], second["label"])
