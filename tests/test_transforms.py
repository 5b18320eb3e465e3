"""Transforms of images: each against Pillow's own operation, NumPy's, or a value worked out by hand; and
that what is random is a function of (seed, epoch, example)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageEnhance, ImageOps

from experiment.data import loading as data_module
from experiment.data.augmentation import (
    LUMA,
    PCA_VALUES,
    PCA_VECTORS,
    Augmentation,
    crop_to_box,
    fit_image,
    flip,
    generators,
    image_of,
    pad_crop,
    pca_color,
    pixels_of,
    random_crop,
    to_gray,
)
from experiment.data.autoaugment import CIFAR10, IMAGENET, Policy, apply, autoaugment
from experiment.data.loading import Data, load
from experiment.errors import UserError
from experiment.options.config import AUGMENTATIONS
from tests.helpers import made_tfds
from tests.helpers.scripted import scripted

Pixels = npt.NDArray[np.uint8]


FILL = (100, 128, 150)


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> Pixels:
    """A colour image that changes slowly, so that a pixel's place can be told from its value."""
    down, across = np.mgrid[:height, :width]
    return np.stack([down * 255 // height, across * 255 // width, (down + across) % 256], -1).astype(np.uint8)


# Random numbers


def test_numbers_are_a_function_of_seed_epoch_and_example() -> None:
    def draw(seed: int, epoch: int, examples: Iterable[int]) -> dict[int, tuple[float, ...]]:
        wanted = np.array(list(examples))
        return {
            int(i): (*rng.random(3), rng.normal(), int(rng.integers(100)))
            for i, rng in zip(wanted, generators(seed, epoch, wanted), strict=True)
        }

    first = draw(3, 5, range(40))
    assert draw(3, 5, reversed(range(40))) == first
    assert draw(3, 5, [7]) == {7: first[7]}
    others = [first, draw(4, 5, range(40)), draw(3, 6, range(40))]
    assert len({numbers for drawn in others for numbers in drawn.values()}) == 120
    assert draw(2**32 - 1, 10**6, [10**9]).keys() == {10**9}


def test_numbers_are_spread_evenly() -> None:
    """Of 4,000 examples one after another, the first number and the correlation with its neighbour's."""
    first = np.array([rng.random() for rng in generators(0, 0, np.arange(4000))])
    assert np.histogram(first, 10, (0, 1))[0].tolist() == pytest.approx([400] * 10, abs=80)  # four deviations
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.07


# To size


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (50, 50)])
def test_the_shorter_side_is_resized_and_the_centre_cut(height: int, width: int) -> None:
    image = Image.fromarray(noise(height, width, 3))
    scale = 40 / min(height, width)
    whole = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = (whole.width - 32) // 2, (whole.height - 36) // 2
    want = np.asarray(whole)[top : top + 36, left : left + 32]
    found = fit_image(image, (36, 32), shorter_side=40)
    np.testing.assert_allclose(found.astype(int), want.astype(int), atol=1)


def test_what_is_made_to_fit_inside_is_surrounded() -> None:
    """30x60 in 40x80 fills 40x80; in 80x80 it fills the middle 40 rows."""
    image = Image.fromarray(np.full((30, 60, 3), 200, np.uint8))
    np.testing.assert_array_equal(fit_image(image, (40, 80), fill=(1, 2, 3)), 200)
    want = np.full((80, 80, 3), (1, 2, 3))
    want[20:60] = 200
    np.testing.assert_array_equal(fit_image(image, (80, 80), fill=(1, 2, 3)), want)
    grey = fit_image(image.convert("L"), (80, 80), fill=(9,))
    np.testing.assert_array_equal(grey, np.where(want[..., :1] == 200, 200, 9))


def test_crop_to_box_by_hand() -> None:
    """Of 40x60: rows 10 to 20, columns 15 to 45, and what is begun of a pixel is taken whole."""
    pixels = noise(40, 60, 3)
    for box in ([0.25, 0.25, 0.5, 0.75], np.array([0.251, 0.26, 0.5, 0.7499], np.float32)):
        np.testing.assert_array_equal(crop_to_box(Image.fromarray(pixels), box), pixels[10:20, 15:45])
    np.testing.assert_array_equal(crop_to_box(Image.fromarray(pixels), [0, 0, 1, 1]), pixels)


def test_crop_to_box_takes_whole_pixels_back() -> None:
    """Edges of pixels that were stored as float32 parts of the side."""
    pixels = noise(96, 128)
    for top, left in itertools.product(range(0, 90, 7), range(0, 120, 11)):
        box = np.array([top / 96, left / 128, (top + 5) / 96, (left + 3) / 128], np.float32)
        found = np.asarray(crop_to_box(Image.fromarray(pixels), box))
        np.testing.assert_array_equal(found, pixels[top : top + 5, left : left + 3])


@pytest.mark.parametrize("box", [[0.5, 0, 0.5, 1], [0, 0.9, 1, 0.1], [-0.1, 0, 1, 1], [0, 0, 1, 1.1]])
def test_a_box_outside_is_an_error(box: list[float]) -> None:
    with pytest.raises(ValueError, match="no box inside"):
        crop_to_box(Image.fromarray(noise(40, 60)), box)


def test_grey_statistics() -> None:
    """The mean is that of Pillow's grey image; the deviation too, where channels rise and fall together."""
    grey = noise(64, 64).astype(float)
    image = np.stack([grey, 0.5 * grey, 0.25 * grey], -1).astype(np.uint8)
    (mean,), (std,) = to_gray((tuple(image.mean((0, 1))), tuple(image.std((0, 1)))))
    want = np.asarray(Image.fromarray(image).convert("L"))
    assert mean == pytest.approx(want.mean(), abs=0.6)  # Pillow rounds down
    assert std == pytest.approx(want.std(), rel=0.01)
    assert sum(LUMA) == pytest.approx(1)


# Crops and flips


def test_pad_crop_is_a_window_of_the_padded_image() -> None:
    image = noise(32, 48, 3)
    padded = np.full((40, 60, 3), (1, 2, 3), np.uint8)
    padded[4:36, 6:54] = image
    for top, left in itertools.product(range(9), range(13)):
        found = pad_crop(image, (1, 2, 3), scripted((top + 0.5) / 9, (left + 0.5) / 13))
        np.testing.assert_array_equal(found, padded[top : top + 32, left : left + 48])
    for draw, (top, left) in (((0.0, 0.0), (0, 0)), ((0.9999, 0.9999), (8, 12))):
        found = pad_crop(image, (1, 2, 3), scripted(*draw))
        np.testing.assert_array_equal(found, padded[top : top + 32, left : left + 48])


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60)])
def test_random_crop_is_resizing_then_cropping(height: int, width: int) -> None:
    image = Image.fromarray(noise(height, width, 3))
    for draw, side, part in (
        ((0.0, 0.0, 0.0), 40, 0.0),
        ((0.9999,) * 3, 48, 1.0),
        ((0.5, 0.5, 0.5), 44, 0.5),
    ):
        scale = side / 60
        whole = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
        top, left = int(part * (whole.height - 32)), int(part * (whole.width - 36))
        found = random_crop(image, (32, 36), (40, 48), scripted(*draw))
        want = np.asarray(whole)[top : top + 32, left : left + 36]
        np.testing.assert_allclose(found.astype(int), want.astype(int), atol=1)


def test_every_size_and_place_is_drawn() -> None:
    """A shorter side of 32 to 34 of a square: the crop of 32 has 1, 4 and 9 places."""
    image = Image.fromarray(smooth(240, 240))
    crops = {
        random_crop(image, (32, 32), (32, 34), rng).tobytes() for rng in generators(0, 0, np.arange(300))
    }
    assert len(crops) == 1 + 4 + 9


def test_flip_mirrors_every_other_image() -> None:
    image = noise(32, 40, 3)
    mirrored = np.asarray(ImageOps.mirror(Image.fromarray(image)))
    np.testing.assert_array_equal(flip(image, scripted(0.49)), mirrored)
    np.testing.assert_array_equal(flip(image, scripted(0.5)), image)


# Colour


def test_pca_color_by_hand() -> None:
    """a = (1, 0, 0): -0.5675 * 0.2175 * 255 = -31.5, -0.5808 ... = -32.2, -0.5836 ... = -32.4."""

    class One:
        def normal(self, scale: float, size: int) -> npt.NDArray[np.float64]:
            assert (scale, size) == (0.1, 3)
            return np.array([1.0, 0, 0])

    one: Any = One()
    image = np.array([[[200, 200, 200], [10, 40, 255]]], np.uint8)
    np.testing.assert_array_equal(pca_color(image, one), [[[169, 168, 168], [0, 8, 223]]])


def test_pca_color_has_the_covariance_of_the_paper() -> None:
    """0.01 V diag(l^2) V', and the components are at right angles."""
    image = np.full((1, 1, 3), 128, np.uint8)
    shifts = np.array([pca_color(image, rng)[0, 0] for rng in generators(0, 0, np.arange(4000))]) - 128.0
    want = 255**2 * 0.01 * PCA_VECTORS @ np.diag(PCA_VALUES**2) @ PCA_VECTORS.T
    np.testing.assert_allclose(np.cov(shifts.T), want, atol=0.1 * want.max())
    np.testing.assert_allclose(PCA_VECTORS.T @ PCA_VECTORS, np.eye(3), atol=1e-3)


# AutoAugment


def by_hand(name: str, x: Pixels, strength: float, sign: int) -> npt.NDArray[Any]:
    """An operation in NumPy, at the translation of a half of the side."""
    height, width, _ = x.shape
    down, across = np.mgrid[:height, :width]
    match name:
        case "Invert":
            return 255 - x
        case "Solarize":
            return np.where(x < round(256 * (1 - strength)), x, 255 - x)
        case "Posterize":
            step = 2 ** round(4 * strength)
            return x // step * step
        case "Brightness":
            return np.clip(x * (0.1 + 1.8 * strength), 0, 255).astype(int)
        case "Color":
            grey = x @ np.array(LUMA)
            return np.clip(grey[..., None] + (0.1 + 1.8 * strength) * (x - grey[..., None]), 0, 255)
        case "Contrast":
            grey = (x @ np.array(LUMA)).mean()
            return np.clip(grey + (0.1 + 1.8 * strength) * (x - grey), 0, 255)
        case "AutoContrast":
            low, high = x.min((0, 1)).astype(float), x.max((0, 1))
            return (x - low) * 255 / (high - low)
        case "Equalize":
            return np.stack([equalized(x[..., channel]) for channel in range(3)], -1)
        case "ShearX":
            across = across + 0.5 + sign * 0.3 * strength * (down + 0.5)
        case "ShearY":
            down = down + 0.5 + sign * 0.3 * strength * (across + 0.5)
        case "TranslateX":
            across = across + sign * int(strength / 2 * width)
        case "TranslateY":
            down = down + sign * int(strength / 2 * height)
        case "Rotate":
            angle = np.radians(sign * 30 * strength)  # anticlockwise on the screen, whose y points down
            u, v = across + 0.5 - width / 2, down + 0.5 - height / 2
            across = np.cos(angle) * u - np.sin(angle) * v + width / 2
            down = np.sin(angle) * u + np.cos(angle) * v + height / 2
    down, across = np.floor(down).astype(int), np.floor(across).astype(int)
    inside = (down >= 0) & (down < height) & (across >= 0) & (across < width)
    moved = x[np.clip(down, 0, height - 1), np.clip(across, 0, width - 1)]
    return np.where(inside[..., None], moved, FILL)


def equalized(x: Pixels) -> npt.NDArray[Any]:
    """Pillow's rule: the step is what all pixels but those of the last value make, divided by 255."""
    counts = np.bincount(x.ravel(), minlength=256)
    step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
    table = (step // 2 + np.cumsum(counts) - counts) // step
    return np.minimum(table, 255)[x]


OPERATIONS = (
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "AutoContrast", "Invert", "Equalize"),
    *("Solarize", "Posterize", "Color", "Contrast", "Brightness"),
)


@pytest.mark.parametrize("strength", [0.0, 5 / 9, 1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_what_it_is_by_hand(name: str, strength: float) -> None:
    image = noise(48, 64, 3) // 2 + 40
    for backwards, sign in ((False, 1), (True, -1)):
        found = pixels_of(apply(name, image_of(image), strength, backwards, 0.5, FILL)).astype(int)
        apart = np.abs(found - by_hand(name, image, strength, sign))
        if name == "Rotate":  # a pixel whose place is on the edge of two may go either way
            assert (apart > 0).mean() < 0.01
        else:
            # Pillow rounds the grey before it multiplies, and cuts the result
            assert apart.max() <= (1.5 if name in ("Color", "Contrast", "AutoContrast") else 0)


def test_sharpness_is_pillows_between_0_1_and_1_9() -> None:
    image = image_of(noise(32, 32, 3))
    for strength, factor in ((0.0, 0.1), (0.5, 1.0), (1.0, 1.9)):
        want = ImageEnhance.Sharpness(image).enhance(factor)
        np.testing.assert_array_equal(apply("Sharpness", image, strength, False, 0.5, FILL), want)


@pytest.mark.parametrize("policy", [CIFAR10, IMAGENET])
def test_every_step_of_a_policy_works_on_colour_and_grey(policy: Policy) -> None:
    assert len(policy.sub_policies) == 25
    for steps in policy.sub_policies:
        assert len(steps) == 2
        for name, probability, magnitude in steps:
            assert 0 <= probability <= 1
            assert (magnitude is None) == (name in ("AutoContrast", "Equalize", "Invert"))
            for shape in ((32, 40, 3), (32, 40, 1)):
                image = noise(*shape)
                changed = apply(
                    name, image_of(image), (magnitude or 0) / 9, True, policy.translation, FILL[: shape[2]]
                )
                assert pixels_of(changed).shape == shape
    with pytest.raises(ValueError, match="Cutout"):
        apply("Cutout", image_of(noise(32, 32, 3)), 0, False, 0, FILL)


def test_rows_of_the_published_tables() -> None:
    """The first, one in the middle and the last row of Table 7 and Table 9."""
    assert [CIFAR10.sub_policies[row] for row in (0, 11, 24)] == [
        (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
        (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
        (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
    ]
    assert [IMAGENET.sub_policies[row] for row in (0, 17, 24)] == [
        (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
        (("Sharpness", 0.4, 7), ("Invert", 0.6, None)),
        (("Equalize", 0.8, None), ("Equalize", 0.6, None)),
    ]


def test_autoaugment_does_the_steps_whose_probability_is_met() -> None:
    """The second row of Table 7: Rotate with 0.7 at 2, then TranslateX with 0.3 at 9, which is 10 pixels."""
    image = image_of(noise(32, 32, 3))
    row = 1.5 / 25
    turned = image.rotate(30 * 2 / 9, fillcolor=FILL)

    def shifted(of: Image.Image, by: int) -> Image.Image:
        out = Image.new("RGB", of.size, FILL)
        out.paste(of, (-by, 0))
        return out

    for draws, want in (
        ((row, 0.7, 0.9, 0.3, 0.9), image),
        ((row, 0.69, 0.9, 0.3, 0.9), turned),
        ((row, 0.69, 0.9, 0.29, 0.9), shifted(turned, 10)),
        ((row, 0.7, 0.9, 0.29, 0.1), shifted(image, -10)),
    ):
        np.testing.assert_array_equal(autoaugment(image, CIFAR10, FILL, scripted(*draws)), want)


# The whole, in batches


CASES: list[dict[str, Any]] = [
    *({"augment": name} for name in AUGMENTATIONS[1:]),
    {"augment": "crop-flip", "grayscale": True},
    {"augment": "autoaugment", "grayscale": True},
    {"augment": "crop-flip-pca", "resize": (40, 56)},
    {"augment": "autoaugment", "resize": (40, 56), "image_size": (32, 40)},
]


def made(**options: Any) -> Data:
    return load("synthetic", data_dir=None, **({"batch_size": 16, "seed": 3, "train_subset": 0.05} | options))


def by_example(data: Data, steps: int) -> dict[tuple[int, int], bytes]:
    """{(epoch, example): its pixels} of the first steps."""
    found = {}
    order = Augmentation.batch

    def keep(self: Any, source: Any, examples: npt.NDArray[np.int64], epoch: int) -> Any:
        batch = order(self, source, examples, epoch)
        for example, image in zip(examples, batch["image"], strict=True):
            found[epoch, int(example)] = image.tobytes()
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Augmentation, "batch", keep)
        list(itertools.islice(data.train_batches(), steps))
    return found


@pytest.mark.parametrize("options", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_changed_batch_is_a_function_of_seed_and_step(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(itertools.islice(made(**options).train_batches(), 12))  # two epochs of 5 and a bit
    resumed = list(itertools.islice(made(**options).train_batches(7), 5))
    monkeypatch.setattr(data_module, "_SMALL_IMAGE", 0)
    threaded = list(itertools.islice(made(**options).train_batches(), 12))
    for want, found in zip((*whole, *whole[7:]), (*threaded, *resumed), strict=True):
        np.testing.assert_array_equal(found["image"], want["image"])
        np.testing.assert_array_equal(found["label"], want["label"])
    shape = made(**options).image_shape
    assert {batch["image"].shape for batch in whole} == {(16, *shape)}
    assert {batch["image"].dtype for batch in whole} == {np.dtype(np.uint8)}
    other = next(made(**options, seed=4).train_batches())
    assert not np.array_equal(other["image"], whole[0]["image"])


@pytest.mark.parametrize("options", [CASES[0], CASES[-1]])
def test_the_size_of_the_batch_changes_no_image(options: dict[str, Any]) -> None:
    large, small = (by_example(made(**options, batch_size=size), 80 // size) for size in (16, 4))
    common = large.keys() & small.keys()
    assert len(common) >= 60
    assert {key: large[key] for key in common} == {key: small[key] for key in common}
    epochs = by_example(made(**options, batch_size=46), 4)
    first = {example: pixels for (epoch, example), pixels in epochs.items() if epoch == 0}
    again = [
        first[example] == pixels for (epoch, example), pixels in epochs.items() if epoch and example in first
    ]
    assert again
    assert not all(again), "every epoch has the same images"


@pytest.mark.parametrize("options", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_evaluation_is_not_changed(options: dict[str, Any]) -> None:
    """Validation and test images, and the statistics that normalise them, are those without --augment."""
    changed = made(**options)
    resize = options.get("resize", ())[:1]
    plain = made(**(options | {"augment": "none", "resize": resize}))
    assert (changed.mean, changed.std) == (plain.mean, plain.std)
    for split in ("val", "test"):
        for ours, theirs in zip(
            changed.eval_batches(split, 100),
            plain.eval_batches(split, 100),
            strict=True,
        ):
            np.testing.assert_array_equal(ours["image"], theirs["image"])


def test_training_at_one_size_is_the_evaluations_transform() -> None:
    """Without --augment, --resize 40 gives training images as evaluation has them."""
    data = made(resize=(40,))
    batch = next(data.train_batches())
    fitted = {image.tobytes() for image in next(data.eval_batches("train", 1000))["image"]}
    assert {image.tobytes() for image in batch["image"]} <= fitted


@pytest.mark.parametrize(
    ("name", "options", "fill"),
    [("digits", {}, (0,)), ("synthetic", {}, (128,) * 3), ("synthetic", {"grayscale": True}, (127,))],
)
def test_what_surrounds_an_image(name: str, options: dict[str, Any], fill: tuple[int, ...]) -> None:
    assert load(name, data_dir=None, batch_size=4, seed=0, **options).augmentation.fill == fill


def test_mean_only() -> None:
    data, usual = made(mean_only=True), made()
    assert (data.mean, data.std) == (usual.mean, (1.0, 1.0, 1.0))


# Data sets with boxes and of many sizes


@pytest.fixture
def boxed(tmp_path: Path) -> Path:
    """A data set `made` with a white box in each black image, and its box; 6 to train, 3 to test."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
        "bbox": tfds.features.BBoxFeature(),
    }
    examples = []
    for number in range(9):
        image = np.zeros((60 + number, 80, 3), np.uint8)
        top, left, bottom, right = 10 + number, 5 * number, 40 + number, 5 * number + 40
        image[top:bottom, left:right] = (250, 200, 150)
        box = (top / len(image), left / 80, bottom / len(image), right / 80)
        examples.append({"image": made_tfds.encoded(image), "label": number % 2, "bbox": box})
    made_tfds.write(tmp_path, "made", {"train": examples[:6], "test": examples[6:]}, features=features)
    return tmp_path


def test_crop_to_bbox(boxed: Path) -> None:
    """Boxes are 30x40: in 48x64 nothing else is left; in 48x48 are 6 rows of the mean above and below."""
    options: dict[str, Any] = {"data_dir": str(boxed), "batch_size": 2, "seed": 0, "crop_to_bbox": True}
    for split in ("train", "test"):
        (batch,) = load("made", **options, image_size=(48, 64), val_fraction=0).eval_batches(split, 9)
        np.testing.assert_array_equal(batch["image"], np.broadcast_to([250, 200, 150], batch["image"].shape))
    (batch,) = load("made", **options, image_size=(48, 48)).eval_batches("test", 9)
    np.testing.assert_array_equal(batch["image"][:, 6:42], np.broadcast_to([250, 200, 150], (3, 36, 48, 3)))
    mean = [round(255 * value) for value in (0.485, 0.456, 0.406)]
    for rows in (slice(0, 6), slice(42, 48)):
        np.testing.assert_array_equal(batch["image"][:, rows], np.broadcast_to(mean, (3, 6, 48, 3)))
    # With --resize the box is covered and cut, as any image
    resized = load("made", **options, image_size=(48, 48), resize=(48, 56), augment="crop-flip")
    for batch in (next(resized.train_batches()), next(resized.eval_batches("test", 3))):
        np.testing.assert_array_equal(batch["image"], np.broadcast_to([250, 200, 150], batch["image"].shape))
    grey = load("made", **options, image_size=(48, 64), grayscale=True)
    assert grey.image_shape == (48, 64, 1)
    np.testing.assert_array_equal(
        next(grey.train_batches())["image"], 209
    )  # 0.299 250 + 0.587 200 + 0.114 150


def test_crop_to_bbox_needs_boxes(tmp_path: Path) -> None:
    files = made_tfds.images(4, (40, 40, 3))
    made_tfds.write(tmp_path, "made", {"train": files, "test": files})
    with pytest.raises(UserError, match=r"^--crop-to-bbox: made has no bounding boxes; .* cars196$"):
        load("made", data_dir=str(tmp_path), batch_size=2, seed=0, crop_to_bbox=True)
    made_tfds.write(tmp_path, "grey", {"train": files, "test": files}, shape=(40, 40, 1))
    with pytest.raises(UserError, match=r"^--grayscale: grey is gray already; leave the flag out$"):
        load("grey", data_dir=str(tmp_path), batch_size=2, seed=0, grayscale=True)


def write_as_tfds_does(root: Path, name: str, images: list[Pixels], **fields: Any) -> None:
    """Write images as a data set with the features and splits that it has in TFDS."""
    import tensorflow_datasets as tfds

    features = dict(tfds.builder(name, data_dir=root / "absent").info.features)
    examples = [{"image": made_tfds.encoded(image), "label": n, **fields} for n, image in enumerate(images)]
    test = "validation" if name == "imagenet2012" else "test"
    made_tfds.write(root, name, {"train": examples, test: examples}, features=features)


def test_cifar100(tmp_path: Path) -> None:
    images = [noise(32, 32, 3, seed=number) for number in range(20)]
    write_as_tfds_does(tmp_path, "cifar100", images, id=b"a", coarse_label=3)
    data = load(
        "cifar100",
        data_dir=str(tmp_path),
        batch_size=9,
        seed=0,
        augment="autoaugment-cifar10",
        mean_only=True,
    )
    assert (data.num_classes, data.image_shape) == (100, (32, 32, 3))
    assert (data.train_size, data.val_size) == (18, 2)
    assert (data.mean, data.std) == ((0.5071, 0.4865, 0.4409), (1, 1, 1))
    assert next(data.train_batches())["image"].shape == (9, 32, 32, 3)
    for image, label in zip(*next(data.eval_batches("test", 20)).values(), strict=True):
        np.testing.assert_array_equal(image, images[label])


def test_imagenets_training_crops_come_from_the_whole_image(tmp_path: Path) -> None:
    """Images of several sizes in ImageNet's own features: each crop is a part at a drawn size."""
    sizes = [(300, 400), (375, 280), (256, 256), (500, 333)]
    write_as_tfds_does(tmp_path, "imagenet2012", [smooth(*size) for size in sizes], file_name=b"a.JPEG")
    data = load(
        "imagenet2012",
        data_dir=str(tmp_path),
        batch_size=4,
        seed=0,
        val_fraction=0,
        resize=(256, 480),
        augment="crop-flip-pca",
    )
    assert (data.image_shape, data.num_classes) == ((224, 224, 3), 1000)
    batches = list(itertools.islice(data.train_batches(), 10))
    assert {batch["image"].shape for batch in batches} == {(4, 224, 224, 3)}
    # The slope of the second channel across tells the size: 255 levels a width, less of it the larger
    slopes = [abs(int(i[100, -1, 1]) - int(i[100, 0, 1])) for batch in batches for i in batch["image"]]
    assert max(slopes) > 1.4 * min(slopes)
    tested = next(data.eval_batches("test", 4))
    for image, size in zip(tested["image"], sizes, strict=True):
        want = fit_image(Image.fromarray(smooth(*size)), (224, 224), shorter_side=256)
        np.testing.assert_array_equal(image, want)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"grayscale": True}, (96, 96, 1)),
        ({"grayscale": True, "crop_to_bbox": True}, (96, 96, 1)),
        ({"image_size": (64, 96), "crop_to_bbox": True, "augment": "crop-flip"}, (64, 96, 3)),
        ({"image_size": (64, 64), "resize": (72, 96), "augment": "crop-flip-pca"}, (64, 64, 3)),
        ({"image_size": (64, 64), "resize": (72, 96), "augment": "autoaugment"}, (64, 64, 3)),
    ],
)
def test_real_cars(data_dir: Path, options: dict[str, Any], shape: tuple[int, int, int]) -> None:
    data = load("cars196", data_dir=str(data_dir), batch_size=32, seed=0, **options)
    assert data.image_shape == shape
    assert len(data.mean) == len(data.std) == shape[2]
    assert next(data.train_batches())["image"].shape == (32, *shape)
    test = np.concatenate([batch["image"] for batch in data.eval_batches("test", 64)])
    assert test.shape == (187, *shape)
    normalised = (test / 255 - data.mean) / data.std
    assert np.abs(normalised.mean((0, 1, 2))).max() < 0.5
    assert 0.7 < normalised.std() < 1.3


def test_real_cifar_in_grey_is_normalised(data_dir: Path) -> None:
    data = load("cifar10", data_dir=str(data_dir), batch_size=128, seed=0, grayscale=True)
    assert (data.train_size, data.val_size, data.image_shape) == (45_000, 5_000, (32, 32, 1))
    source, _ = data.parts["train"]
    images = source.read(np.arange(0, 50_000, 20))["image"] / 255
    assert images.mean() == pytest.approx(data.mean[0], abs=0.01)
    assert images.std() == pytest.approx(data.std[0], abs=0.01)
