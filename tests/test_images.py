"""The one decoder of image files: training and `predict` see the same pixels, and the right ones."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from experiment.__main__ import main
from experiment.commands import predict
from experiment.data import images
from experiment.data.augmentation import pixels_of
from experiment.data.images import read_image
from experiment.data.loading import load
from experiment.errors import UserError
from experiment.options.resolving import resolve
from tests.helpers import made_tfds
from tests.helpers.odd_images import (
    BITS,
    COLOR,
    GREY,
    SIDE,
    UPRIGHT,
    Kinds,
    Pixels,
    exif,
    kinds,
    noise,
    saved,
    tiff,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Kinds]:
    """A folder with the TFDS sets `color` and `grey` of every kind and the files beside them; the kinds."""
    folder = tmp_path_factory.mktemp("kinds")
    files = kinds()
    examples = [(file, 0) for file, _ in files.values()]
    for name, channels in (("color", 3), ("grey", 1)):
        made_tfds.write(folder, name, {"train": examples, "test": examples}, shape=(None, None, channels))
    for number, (file, _) in enumerate(files.values()):
        (folder / str(number)).write_bytes(file)
    return folder, files


def predicted(
    folder: Path, count: int, channels: int, monkeypatch: pytest.MonkeyPatch, size: int = SIDE
) -> Pixels:
    """The pixels that `predict` gives a network for the files of `folder`."""
    seen: list[Pixels] = []

    def logits(batches: Any) -> Any:
        for batch in batches:
            seen.append(batch)
            yield np.zeros((len(batch), 2))

    run = SimpleNamespace(
        image_shape=(size, size, channels),
        config=resolve({}),
        resolved={"class_names": ["even", "odd"]},
        logits=logits,
    )
    monkeypatch.setattr(predict, "open_run", lambda *_, **__: run)
    assert main(["predict", str(folder), *(str(folder / str(number)) for number in range(count))]) == 0
    return np.concatenate(seen)


@pytest.mark.parametrize(("name", "channels"), [("color", 3), ("grey", 1)])
@pytest.mark.parametrize("size", [SIDE, 32])
def test_training_and_predict_see_the_same_pixels(
    stored: tuple[Path, Kinds],
    name: str,
    channels: int,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, files = stored
    data = load(name, data_dir=str(folder), batch_size=1, seed=0, val_fraction=0, image_size=(size, size))
    source, _ = data.parts["train"]
    trained = source.read(np.arange(len(files)))["image"]
    predictions = predicted(folder, len(files), channels, monkeypatch, size)
    for kind, one, other in zip(files, trained, predictions, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=kind)
    batches = data.train_batches()
    epoch = [next(batches)["image"][0].tobytes() for _ in files]
    assert sorted(epoch) == sorted(image.tobytes() for image in trained)


def test_every_kind_has_its_pixels(
    stored: tuple[Path, Kinds],
) -> None:
    folder, files = stored
    for number, (kind, (file, want)) in enumerate(files.items()):
        image = read_image(folder / str(number), 3)
        if want is None:  # Pillow's own, which is upright, opaque, and of 8 bits
            want = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(image), want, err_msg=kind)
        grey = np.asarray(Image.fromarray(want).convert("L"))
        np.testing.assert_array_equal(np.asarray(read_image(folder / str(number), 1)), grey, err_msg=kind)


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        (saved(GREY.astype(np.int32), "tiff"), "integer pixels of 32 bits (mode I)"),
        (tiff(GREY.astype(np.uint32).tobytes(), 32), "integer pixels of 32 bits (mode I)"),
        (saved(GREY.astype(np.float32), "tiff"), "floating-point pixels of 32 bits (mode F)"),
        (saved(GREY.astype(np.float32), "ppm"), "floating-point pixels of 32 bits (mode F)"),
    ],
)
def test_grey_of_32_bits_is_refused_in_both(tmp_path: Path, file: bytes, fault: str) -> None:
    (tmp_path / "a").write_bytes(file)
    made_tfds.write(tmp_path, "made", {"train": [(saved(COLOR), 0), (file, 0)], "test": [(saved(COLOR), 0)]})
    remedy = "save it with 8 bits a channel"
    with pytest.raises(UserError) as caught:
        read_image(tmp_path / "a", 3)
    assert str(caught.value) == f"{tmp_path / 'a'}: {fault}; {remedy}"
    data = load("made", data_dir=str(tmp_path), batch_size=1, seed=0, val_fraction=0)
    with pytest.raises(UserError) as caught:
        list(data.eval_batches("train", 2))
    assert f"record 1 of made (train) in {tmp_path / 'made' / '1.0.0'}: {fault}; {remedy}" in str(
        caught.value
    )


def test_boxes_refer_to_the_stored_image(tmp_path: Path) -> None:
    """For each orientation: crop to the box in the stored image, then make it upright."""
    import tensorflow_datasets as tfds

    image, (top, left) = noise(50, 70, 3), (5, 30)
    box = (top / 50, left / 70, (top + 32) / 50, (left + 32) / 70)
    examples = [
        {"image": saved(image, form, exif=exif(orientation)), "label": 0, "bbox": box}
        for orientation in UPRIGHT
        for form in ("png", "tiff")
    ]
    described = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
        "bbox": tfds.features.BBoxFeature(),
    }
    made_tfds.write(tmp_path, "made", {"train": examples, "test": examples}, features=described)
    data = load("made", data_dir=str(tmp_path), batch_size=1, seed=0, image_size=(32, 32), crop_to_bbox=True)
    (batch,) = data.eval_batches("test", 16)
    inside = image[top : top + 32, left : left + 32]
    for number, read in enumerate(batch["image"]):
        orientation = 1 + number // 2
        np.testing.assert_array_equal(read, UPRIGHT[orientation](inside), err_msg=str(orientation))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("tags", [b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*", b""])
def test_orientation_that_cannot_be_read_is_upright(tmp_path: Path, tags: bytes) -> None:
    path = tmp_path / "a.jpeg"
    path.write_bytes(saved(COLOR, "jpeg", exif=b"Exif\0\0" + tags))
    want = np.asarray(Image.open(io.BytesIO(saved(COLOR, "jpeg"))))
    np.testing.assert_array_equal(np.asarray(read_image(path, 3)), want)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_out_of_range_is_upright(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(saved(COLOR, exif=exif(orientation)))
    np.testing.assert_array_equal(np.asarray(read_image(path, 3)), COLOR)


QUIET = """
import sys
from pathlib import Path
from experiment.errors import UserError
from experiment.data.images import read_image
refused = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_image(path, 3)
    except UserError:
        refused += 1
print(refused)
"""


def test_no_library_writes_lines_of_its_own(tmp_path: Path) -> None:
    """Decode damaged TIFFs, for which libtiff and Pillow's logger write lines, and a large image."""
    count = 0
    for name, file in (
        ("lzw", saved(COLOR, "tiff", compression="tiff_lzw")),
        ("jpeg", saved(COLOR, "tiff", compression="jpeg")),
        ("group4", saved(Image.fromarray(BITS), "tiff", compression="group4")),
    ):
        for place in range(0, len(file), 31):
            damaged = file[:place] + bytes([file[place] ^ 0xFF]) + file[place + 1 :]
            (tmp_path / f"{name}-{place}").write_bytes(damaged)
            count += 1
    (tmp_path / "large").write_bytes(f"P5 {10_000} {10_000} 255\n".encode())  # 100 million pixels
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert count / 4 < int(done.stdout) < count


def test_a_large_image_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(self: Any) -> None:
        raise AssertionError("decoded")

    path = tmp_path / "large.png"
    Image.new("1", (200, 100)).save(path)
    monkeypatch.setattr(images, "MAX_PIXELS", 19_999)
    for kind in (ImageFile.ImageFile, PngImagePlugin.PngImageFile):
        monkeypatch.setattr(kind, "load", decode)
    with pytest.raises(UserError, match=r"large.png: 200x100 pixels are too many; .* 19,999 pixels$"):
        read_image(path, 3)


@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "bmp"])
def test_a_damaged_image_is_one_line(form: str, tmp_path: Path) -> None:
    """Cut at many places, or with a byte changed: an image, or one line; never another error."""
    file = saved(noise(24, 24, 3), form)
    path = tmp_path / f"a.{form}"
    refused = []
    damaged = [file[:end] for end in range(0, len(file), max(1, len(file) // 40))]
    for place in range(0, len(file), max(1, len(file) // 40)):
        damaged.append(file[:place] + bytes([file[place] ^ 0xFF]) + file[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        try:
            assert pixels_of(read_image(path, 3)).shape[-1] == 3
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert not [line for line in refused if "\n" in line or not line.startswith(f"{path}: ")]
