"""The contents of image files, examined once: SHA-256 sums, image sizes and sums of pixels.

They are kept in a file of the user's cache folder, under the size and the times of each image file, so that a
second start reads no image. A damaged or missing cache costs only time.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from experiment.data.images import ImageError, decode_image, stored_size
from experiment.data.listing import ImageFile
from experiment.data.types import Fit, Pixels, Size
from experiment.engines import cache_directory, can_hold_files, core_count

FORMAT = 1
"""The version of the cache file."""

CHUNK = 1024  # files that are examined between two looks at the progress bar
LARGE_FILE = 2**14
"""Larger files are examined by several threads: reading, hashing and decoding hold no lock of Python's. With
smaller ones threads would wait for that lock."""


@dataclass
class Content:
    """What is known of the contents of a file.

    Attributes:
        sha256: of its bytes.
        image_size: height and width of the upright image; None if it was not decoded.
        sums: for each way to bring it to size and color, the sums of the pixels of each channel and then the
            sums of their squares.
    """

    sha256: str
    image_size: Size | None = None
    sums: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Transform:
    """How images are brought to size and color, and a name for it that stands in the cache."""

    channels: int
    fit: Fit
    name: str


Known = dict[str, tuple[int, tuple[int, int], Content]]
"""By name of a file: its size, its times, and its contents."""


def open_regular(path: str) -> BufferedReader:
    """Open a file for reading. Never waits, as it would for the other end of a FIFO."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def is_file_as_listed(status: os.stat_result, size: int, time: int) -> bool:
    """True if a file still is a regular one of this size and time of its last change."""
    return stat.S_ISREG(status.st_mode) and (status.st_size, status.st_mtime_ns) == (size, time)


def pixel_sums(pixels: Pixels) -> list[int]:
    """The sums of the pixels [H, W, C] of each channel, then the sums of their squares: 2 C numbers."""
    values = pixels.reshape(-1, pixels.shape[-1]).astype(np.uint32)
    sums: list[int] = [*values.sum(0, dtype=np.int64).tolist(), *(values**2).sum(0, dtype=np.int64).tolist()]
    return sums


class Contents:
    """The contents of the files in one data folder, as far as they are known.

    Args:
        root: the data folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._cache = _cache_file(root)
        self._known = _read_cache(self._cache)

    def _find(self, file: ImageFile) -> Content | None:
        """Return what is known of a file, if it has not changed since."""
        entry = self._known.get(file.name)
        return entry[2] if entry is not None and entry[:2] == (file.size, file.times) else None

    def common_size(self, files: Sequence[ImageFile], largest: int) -> Size | None:
        """Return the height and width of all images; None if they differ, or a side is above `largest`."""
        common = None
        for file in files:
            content = self._find(file)
            size = content.image_size if content is not None else None
            if size is None and file.fault is None:
                with (
                    suppress(OSError, ImageError),
                    open_regular(os.path.join(self._root, file.name)) as opened,
                ):
                    size = stored_size(opened)
            if size is None:  # no image; `examine` names it
                continue
            if max(size) > largest or (common is not None and size != common):
                return None
            common = size
        return common

    def examine(
        self, files: Sequence[ImageFile], measured: Sequence[bool], transform: Transform | None
    ) -> list[Content | str]:
        """Return the contents of each file, or in a few words why it cannot be used; reads what is not known.

        Args:
            files: all files of the folder: what is known of others is dropped.
            measured: for each file, True if its pixels are to be summed.
            transform: how images are brought to size before that; None to decode no image.
        """
        from tqdm import tqdm

        results: list[Content | str | None] = [
            self._usable(file, sums, transform) for file, sums in zip(files, measured, strict=True)
        ]
        missing = [index for index, result in enumerate(results) if result is None]
        if missing:
            bytes_each = sum(files[index].size for index in missing) / len(missing)
            threads = min(core_count(), 16) if bytes_each > LARGE_FILE else 1

            def read(index: int) -> Content | str:
                return self._read(files[index], measured[index], transform)

            bar = tqdm(total=len(missing), desc="reading images", unit=" files", disable=None, leave=False)
            try:
                with bar, ThreadPoolExecutor(threads) as pool:
                    for start in range(0, len(missing), CHUNK):
                        chunk = missing[start : start + CHUNK]
                        mapped = map(read, chunk) if threads == 1 else pool.map(read, chunk)
                        for index, result in zip(chunk, mapped, strict=True):
                            results[index] = result
                            bar.update()
            finally:  # also of a pass that was interrupted
                self._remember(files, results)
        complete: list[Content | str] = [result for result in results if result is not None]
        return complete

    def _usable(self, file: ImageFile, sums: bool, transform: Transform | None) -> Content | str | None:
        """Return what is known of a file if that is enough, else None."""
        if file.fault is not None:
            return file.fault
        content = self._find(file)
        if content is None or transform is None:
            return content
        enough = transform.name in content.sums if sums else content.image_size is not None
        return content if enough else None

    def _read(self, file: ImageFile, sums: bool, transform: Transform | None) -> Content | str:
        """Read one file. Called by several threads at once."""
        try:
            with open_regular(os.path.join(self._root, file.name)) as opened:
                if not is_file_as_listed(os.fstat(opened.fileno()), file.size, file.times[0]):
                    return "changes while it is read"
                content = self._find(file) or Content(hashlib.file_digest(opened, "sha256").hexdigest())
                if transform is None:
                    return content
                opened.seek(0)
                image = decode_image(opened, transform.channels)
                content.image_size = (image.height, image.width)
                if sums:
                    content.sums[transform.name] = pixel_sums(transform.fit(image))
                return content
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        except ImageError as error:
            return str(error)

    def _remember(self, files: Sequence[ImageFile], results: Sequence[Content | str | None]) -> None:
        """Add the contents of files to what is known, drop those of other files, and write the cache."""
        known: Known = {}
        for file, result in zip(files, results, strict=True):
            content = result if isinstance(result, Content) else self._find(file)
            if content is not None:
                known[file.name] = (file.size, file.times, content)
        self._known = known
        _write_cache(self._cache, self._known)


def _cache_file(root: Path) -> Path | None:
    """Return the cache file of a data folder; None for a user whose cache folder cannot be written."""
    directory = cache_directory("folders")
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
    return Path(directory) / f"{name}.json" if can_hold_files(directory) else None


def _header() -> dict[str, Any]:
    """What a cache must begin with to be used: another Pillow may decode other pixels."""
    import PIL

    return {"format": FORMAT, "pillow": PIL.__version__}


def _read_cache(path: Path | None) -> Known:
    """Return what a cache holds; nothing if it is absent, damaged or of another version."""
    if path is None:
        return {}
    try:
        stored = json.loads(path.read_bytes())
        if {name: stored[name] for name in _header()} != _header():
            return {}
        return {
            name: (size, (changed, moved), Content(sha256, shape and (shape[0], shape[1]), sums))
            for name, (size, changed, moved, sha256, shape, sums) in stored["files"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return {}


def _write_cache(path: Path | None, known: Known) -> None:
    """Replace the cache, whole or not at all. A disk that is full is ignored."""
    if path is None:
        return
    files = {
        name: [size, *times, content.sha256, content.image_size, content.sums]
        for name, (size, times, content) in known.items()
    }
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                file.write(json.dumps({**_header(), "files": files}))
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
