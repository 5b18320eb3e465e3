"""The one decoder of image files: training and `predict` see the same pixels, and the right ones."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFile, PngImagePlugin, features

from experiment.__main__ import main
from experiment.commands import predict
from experiment.data import images
from experiment.data.augmentation import pixels_of
from experiment.data.images import read_image
from experiment.data.loading import load
from experiment.errors import UserError
from experiment.options.resolving import resolve
from tests.helpers import made_tfds

ROOT = Path(__file__).parents[1]
SIDE = 40

Pixels = npt.NDArray[np.uint8]
Kinds = dict[str, tuple[bytes, Pixels | None]]
"""By name: a file, and its pixels in color; None where the format loses some."""


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


COLOR, GREY = noise(SIDE, SIDE, 3), noise(SIDE, SIDE, seed=1)
GREY16 = GREY.astype(np.uint16) << 8 | noise(SIDE, SIDE, seed=2)
ALPHA = np.where(np.arange(SIDE)[:, None] < 10, 0, 255).astype(np.uint8).repeat(SIDE, 1)
BITS = GREY > 127


def rgb(grey: Pixels) -> Pixels:
    return np.repeat(grey[..., None], 3, -1)


def on_white(image: Pixels) -> Pixels:
    """Return an image with its ten transparent rows put on white."""
    image = image.copy()
    image[:10] = 255
    return image


def saved(image: Any, form: str = "png", **options: Any) -> bytes:
    """The bytes of an image file, of a Pillow image or an array."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


UPRIGHT: dict[int, Callable[[Any], Any]] = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: np.swapaxes(image, 0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.swapaxes(np.rot90(image, 2), 0, 1),
    8: np.rot90,
}
"""By EXIF orientation: the function that makes the stored image upright."""


def png(raw: bytes, depth: int, color_type: int, transparent: bytes | None = None) -> bytes:
    """A PNG file of SIDE x SIDE pixels whose rows are `raw`, with `transparent` as its tRNS chunk."""

    def chunk(kind: bytes, content: bytes | None) -> bytes:
        if content is None:
            return b""
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, color_type, 0, 0, 0)
    width = len(raw) // SIDE
    rows = b"".join(b"\0" + raw[row * width : (row + 1) * width] for row in range(SIDE))
    parts = ((b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(pixels: bytes, bits: int, white_is_zero: bool = False) -> bytes:
    """A TIFF file of SIDE x SIDE grey pixels, not compressed."""
    tags = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8}
    tags |= {277: 1, 278: SIDE, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def twelve_bits(values: npt.NDArray[Any]) -> bytes:
    """Return pairs of 12-bit values in three bytes, the upper bits first."""
    first, second = values.reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def kinds() -> Kinds:
    """Every kind of file that Pillow writes here and `predict` reads."""
    palette = Image.fromarray(COLOR).quantize(16)
    entries = np.asarray(palette)
    opaque = np.asarray(palette.convert("RGB"))
    alphas = bytes([0, *[255] * 15])
    one_clear = np.where((entries == 0)[..., None], np.uint8(255), opaque)
    level = int(GREY16[3, 5])
    clear16 = np.where(level == GREY16, np.uint8(255), GREY)
    color_key = np.where((COLOR[7, 7] == COLOR).all(-1, keepdims=True), np.uint8(255), COLOR)
    color16 = (COLOR.astype(np.uint16) << 8 | noise(SIDE, SIDE, 3, seed=3)).astype(">u2").tobytes()
    frames = [Image.fromarray(noise(SIDE, SIDE, 3, seed=seed)) for seed in (4, 5)]
    moving: dict[str, Any] = {"save_all": True, "append_images": frames}
    gif = saved(palette, "gif", transparency=0, save_all=True, append_images=[frames[0].quantize(16)])
    cmyk = Image.fromarray(COLOR).convert("CMYK")
    files: Kinds = {
        "rgb png": (saved(COLOR), COLOR),
        "grey png": (saved(GREY), rgb(GREY)),
        "16-bit grey png": (saved(GREY16), rgb(GREY)),
        "16-bit grey png, one level transparent": (
            png(GREY16.astype(">u2").tobytes(), 16, 0, struct.pack(">H", level)),
            rgb(clear16),
        ),
        "16-bit rgb png": (png(color16, 16, 2), COLOR),
        "palette png": (saved(palette), opaque),
        "palette png, one entry transparent": (saved(palette, transparency=0), one_clear),
        "palette png, alphas": (saved(palette, transparency=alphas), one_clear),
        "LA png": (saved(np.dstack([GREY, ALPHA])), on_white(rgb(GREY))),
        "RGBA png": (saved(np.dstack([COLOR, ALPHA])), on_white(COLOR)),
        "rgb png, one color transparent": (
            saved(COLOR, transparency=tuple(int(value) for value in COLOR[7, 7])),
            color_key,
        ),
        "1-bit png": (saved(Image.fromarray(BITS)), rgb(255 * BITS.astype(np.uint8))),
        "1-bit png, black transparent": (
            png(np.packbits(BITS, axis=1).tobytes(), 1, 0, b"\0\0"),
            np.full((SIDE, SIDE, 3), 255, np.uint8),
        ),
        "animated png": (saved(COLOR, **moving), COLOR),
        "rgb jpeg": (saved(COLOR, "jpeg"), None),
        "grey jpeg": (saved(GREY, "jpeg"), None),
        "cmyk jpeg": (saved(cmyk, "jpeg"), None),
        "animated gif, one entry transparent": (gif, one_clear),
        "bmp": (saved(COLOR, "bmp"), COLOR),
        "16-bit pgm": (saved(GREY16.astype(np.int32), "ppm"), rgb(GREY)),
        "12-bit pgm": (
            f"P5 {SIDE} {SIDE} 4095\n".encode() + (GREY16 >> 4).astype(">u2").tobytes(),
            rgb((np.rint((GREY16 >> 4) / 4095 * 65535).astype(np.uint16) >> 8).astype(np.uint8)),
        ),
        "16-bit tiff": (saved(GREY16, "tiff"), rgb(GREY)),
        "16-bit tiff, white is zero": (tiff((~GREY16).tobytes(), 16, white_is_zero=True), rgb(GREY)),
        "12-bit tiff": (tiff(twelve_bits(GREY16 >> 4), 12), rgb(GREY)),
        "cmyk tiff": (saved(cmyk, "tiff"), np.asarray(cmyk.convert("RGB"))),
    }
    if features.check("jpg_2000"):
        files["16-bit jpeg 2000"] = (saved(GREY16, "jpeg2000", irreversible=False), rgb(GREY))
    if features.check("webp"):
        rgba = np.dstack([COLOR, ALPHA])
        files["webp"] = (saved(rgba, "webp", lossless=True, exact=True), on_white(COLOR))
        files["animated webp"] = (saved(COLOR, "webp", lossless=True, **moving), COLOR)
    if features.check("avif"):
        files["avif"] = (saved(COLOR, "avif"), None)
        files["animated avif"] = (saved(COLOR, "avif", **moving), None)
    for orientation, upright in UPRIGHT.items():
        for form in ("png", "jpeg", "tiff"):
            name = f"{form}, orientation {orientation}"
            file = saved(COLOR, form, exif=exif(orientation))
            want = pixels_of(Image.open(io.BytesIO(saved(COLOR, form))).convert("RGB"))
            files[name] = (file, upright(want))
    return files


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
