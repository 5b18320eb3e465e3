"""The one decoder of image files: for training, evaluation, prediction and reports.

An image file becomes 8-bit RGB or gray, so that a network sees the same pixels in training and afterwards:

- The first frame of an animated file is taken.
- The camera's orientation (EXIF) is applied. Orientation that cannot be read counts as upright.
- Transparency (an alpha channel, or a color or palette entry marked as transparent) is put on white.
- 16-bit gray keeps its upper 8 bits. 16-bit color does too; Pillow reads it so.
- CMYK, palette, 1-bit and all other kinds that Pillow converts are converted.
- Gray of 32 bits is refused: its range is not known.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiment.data.augmentation import crop_to_box
from experiment.data.types import Size
from experiment.errors import UserError, one_line
from experiment.reading import check_regular

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 150_000_000
"""The most pixels of an image: 600 MB in Pillow's memory. Pillow itself opens up to 178,956,970."""

_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 274, 258, 262  # tags of TIFF and EXIF
_MIN_IS_WHITE = 0


class ImageError(Exception):
    """An image that cannot be used. The message says why, in one line, without the name of the file."""


def read_image(path: Path, channels: int) -> Image:
    """Decode the image file at `path`; `channels` and the result as in `decode_image`.

    Raises:
        UserError: there is no such file, it cannot be read, or `decode_image` cannot use it.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            return decode_image(file, channels)
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name an image file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ImageError as error:
        raise UserError(f"{path}: {error}") from None


def stored_size(file: IO[bytes]) -> Size:
    """Return the height and width that `decode_image` gives an image, from its header alone.

    Raises:
        ImageError: the file is no image.
    """
    from PIL import Image

    _silence_libraries()
    try:
        with Image.open(file) as stored:
            width, height = stored.size
            swapped = stored.format != "TIFF" and _axes(_orientation(stored))[0]  # Pillow swaps a TIFF's
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        raise _no_image(error) from error
    return (width, height) if swapped else (height, width)


def decode_image(file: IO[bytes], channels: int, box: Iterable[float] | None = None) -> Image:
    """Decode an image file of any format that Pillow reads.

    Args:
        file: an open binary file.
        channels: 1 or 3.
        box: ymin, xmin, ymax, xmax on the scale 0..1 of the image as it is stored, before the EXIF
            orientation is applied; only what is inside is returned.

    Returns:
        An upright image of mode `L` for 1 channel and `RGB` for 3.

    Raises:
        ImageError: the file is no image or damaged; it has more than `MAX_PIXELS` (checked before it is
            decoded); its gray has 32 bits.
        ValueError: the box is empty or not inside the image.
    """
    from PIL import Image

    _silence_libraries()
    try:
        with Image.open(file) as stored:
            if stored.width * stored.height > MAX_PIXELS:
                size = f"{stored.width}x{stored.height}"
                raise ImageError(f"{size} pixels are too many; make it at most {MAX_PIXELS:,} pixels")
            orientation = _orientation(stored)
            stored.load()
            image = _eight_bits(stored)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            if orientation != 1:
                image = _upright(image, _orientation(stored))  # Pillow has rotated a TIFF in load()
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        raise _no_image(error) from error
    return image if box is None else crop_to_box(image, _upright_box(box, orientation))


def _no_image(error: Exception) -> ImageError:
    """Return what to raise for a file that Pillow cannot read.

    Where Pillow does not know the format, its message only names the open file as a Python object.
    """
    from PIL import UnidentifiedImageError

    reason = "" if isinstance(error, UnidentifiedImageError) else f" ({one_line(error)})"
    return ImageError(f"no image that Pillow reads{reason}")


def _eight_bits(stored: Image) -> Image:
    """Return gray of 16 bits with its upper 8; any other image as it is. Raises ImageError for 32 bits."""
    from PIL import Image

    if stored.mode == "F":
        raise ImageError("floating-point pixels of 32 bits (mode F); save it with 8 bits a channel")
    if not stored.mode.startswith("I"):
        return stored
    # Pillow has no mode of 16 bits for PGM: it scales each maxval to 65535 in mode I
    if stored.mode == "I" and stored.format != "PPM":
        raise ImageError("integer pixels of 32 bits (mode I); save it with 8 bits a channel")
    values: npt.NDArray[Any] = np.asarray(stored).astype(np.uint16)
    if stored.format == "TIFF":
        values = _tiff_range(values, getattr(stored, "tag_v2", {}))
    gray = (values >> 8).astype(np.uint8)
    if "transparency" in stored.info:  # a gray level, of 16 bits
        gray[values == stored.info["transparency"]] = 255
    return Image.fromarray(gray)


def _tiff_range(values: npt.NDArray[Any], tags: Any) -> npt.NDArray[Any]:
    """Bring gray of a TIFF, which Pillow leaves as it is stored, to 0 (black) .. 65535 (white)."""
    if tags.get(_BITS_PER_SAMPLE) == (12,):
        values = values << 4
    return ~values if tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE else values


def _orientation(stored: Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) where there is none, or none that can be read."""
    try:
        value: Any = stored.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # damaged metadata of an image that may be whole
        return 1
    return int(value) if value in range(1, 9) else 1


def _axes(orientation: int) -> tuple[bool, bool, bool]:
    """Return what makes an image upright: swap its axes, then flip it vertically, then horizontally."""
    return orientation >= 5, orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)


def _upright(image: Image, orientation: int) -> Image:
    """Apply an EXIF orientation."""
    from PIL.Image import Transpose

    methods = (Transpose.TRANSPOSE, Transpose.FLIP_TOP_BOTTOM, Transpose.FLIP_LEFT_RIGHT)
    for needed, method in zip(_axes(orientation), methods, strict=True):
        image = image.transpose(method) if needed else image
    return image


def _upright_box(box: Iterable[float], orientation: int) -> tuple[float, float, float, float]:
    """Return where a box of the stored image lies in the upright one."""
    top, left, bottom, right = (float(edge) for edge in box)
    swap, vertical, horizontal = _axes(orientation)
    if swap:
        top, left, bottom, right = left, top, right, bottom
    if vertical:
        top, bottom = 1 - bottom, 1 - top
    if horizontal:
        left, right = 1 - right, 1 - left
    return top, left, bottom, right


@functools.cache
def _silence_libraries() -> None:
    """Keep Pillow and libtiff from writing their own lines on stderr, beside our one for a file.

    libtiff's handlers are of the whole process. Replacing them is safe with several threads that decode;
    redirecting stderr would not be.
    """
    from PIL import _imaging

    warnings.filterwarnings("ignore", module=r"PIL\.")  # large images, odd metadata
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with suppress(OSError, AttributeError):  # libtiff is linked in another way, or absent
        libtiff = ctypes.CDLL(_imaging.__file__)  # finds the symbols of the libraries it is linked with
        libtiff.TIFFSetErrorHandler(None)
        libtiff.TIFFSetWarningHandler(None)
