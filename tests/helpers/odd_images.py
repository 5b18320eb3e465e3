"""Image files of every kind that Pillow writes, with the pixels that they stand for."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, features

from experiment.data.augmentation import pixels_of

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
