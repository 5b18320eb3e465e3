"""Images in folders: `--dataset folder --data-dir DIR`, in the layout of torchvision's ImageFolder.

    DIR/train/CLASS/*.jpg       with `val` (or `validation`) and `test` beside `train`, each with all classes
    DIR/CLASS/*.jpg             one tree of classes, of which a part is held out for the test

`val` alone is the test set, as in copies of ImageNet: it decides nothing, and validation is taken from
`train`. Beside `test` it is validation.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiment.data.builtin import cached, fit_to, identity
from experiment.data.contents import (
    Content,
    Contents,
    Transform,
    is_file_as_listed,
    open_regular,
)
from experiment.data.images import ImageError, decode_image
from experiment.data.listing import VALIDATION, Folders, ImageFile, check_classes, list_files
from experiment.data.types import Batch, Dataset, Fit, Identity, Labels, Size, Statistics
from experiment.errors import UserError, first_of, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "folder"
"""The name that `--dataset` takes."""

LARGEST_DEFAULT = 224
"""The default size of images whose sizes differ, or are larger than this."""

IN_ONE_LINE = 5  # more bad files than these get a line each


class FolderSource:
    """The images of one part. Each file is checked to be as it was listed, and decoded, when it is read."""

    def __init__(self, root: Path, files: Sequence[ImageFile], channels: int, fit: Fit) -> None:
        self._root, self._channels, self._fit = root, channels, fit
        self._names = [file.name for file in files]
        self._labels = np.array([file.label for file in files], np.int32)
        self._listed = np.array([(file.size, file.times[0]) for file in files], np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Return the examples at `indices`.

        Raises:
            UserError: a file is gone, was changed since it was listed, or cannot be read. It names the file.
        """
        images, labels = self.images(indices)
        return {"image": np.stack([self._fit(image) for image in images]), "label": labels}

    def labels(self, indices: npt.NDArray[np.int64]) -> Labels:
        return self._labels[indices]

    def images(self, indices: npt.NDArray[np.int64]) -> tuple[list[Image], Labels]:
        """Return the images at `indices`; raises as `read`."""
        return [self._decode(index) for index in indices.tolist()], self._labels[indices]

    def _decode(self, index: int) -> Image:
        path = os.path.join(self._root, self._names[index])
        try:
            with open_regular(path) as file:
                if is_file_as_listed(os.fstat(file.fileno()), *self._listed[index].tolist()):
                    return decode_image(file, self._channels)
                fault = "was changed since the start; restore it"
        except FileNotFoundError:
            fault = "is gone; it was there at the start; restore it"
        except OSError as error:
            fault = f"cannot be read ({error.strerror}); make it readable"
        except ImageError as error:
            fault = str(error)
        raise UserError(f"--data-dir: {one_line(path)}: {fault}")


def folder_dataset(
    data_dir: str | None,
    image_size: Size | None,
    resize: int | None = None,
    *,
    grayscale: bool = False,
    skip_bad: bool = False,
    recorded: Mapping[str, Any] | None = None,
) -> Dataset:
    """Open a folder of images; on the first time every file is read once, with a progress bar.

    Args:
        data_dir: the folder.
        image_size: height and width, or None for the default: the images' own size if they all have one (no
            side above 224, at least 32), else 224x224.
        resize: the shorter side before the image is cropped to that size; None: what covers it.
        grayscale: images of one channel; else all become RGB.
        skip_bad: go on without the files that are no images.
        recorded: what config.json of a run holds of its data: size, mean and deviation are taken from there,
            and without `skip_bad` no image is decoded.

    Raises:
        UserError: no such folder, or not in this layout; files that are no images; a class without images.
    """
    if data_dir is None:
        raise UserError(f"--dataset {NAME}: name the folder of the images with --data-dir DIR")
    root = Path(data_dir)
    class_names, parts = list_files(root)
    files = [file for listed in parts.values() for file in listed]
    measured = [recorded is None] * len(parts["train"]) + [False] * (len(files) - len(parts["train"]))
    if recorded is not None:
        image_size = (recorded["image_shape"][0], recorded["image_shape"][1])
    decodes, channels = recorded is None or skip_bad, 1 if grayscale else 3
    size, transform, examined = _examine(root, files, measured, image_size, resize, channels, decodes=decodes)
    bad = [f"{_shown(f.name)}: {c}" for f, c in zip(files, examined, strict=True) if isinstance(c, str)]
    if bad and not skip_bad:
        raise UserError(_refusal(root, bad, len(files)))
    contents = {file.name: c for file, c in zip(files, examined, strict=True) if isinstance(c, Content)}
    parts = {part: [file for file in listed if file.name in contents] for part, listed in parts.items()}
    for part, listed in parts.items():
        check_classes(root, part, listed, class_names)
    shape = (*size, channels)
    sources = {p: cached(FolderSource(root, parts[p], channels, transform.fit), shape) for p in parts}
    test, val = _roles(parts)
    statistics: Statistics = ((), ())
    measure = None
    if recorded is not None:
        statistics = tuple(recorded["mean"]), tuple(recorded["std"])
    else:
        sums = np.array([contents[file.name].sums[transform.name] for file in parts["train"]])
        measure = partial(_statistics, sums, size[0] * size[1])
    return Dataset(
        sources["train"],
        sources[test] if test else None,
        class_names,
        shape,
        *statistics,
        _identity(parts, contents, class_names, test),
        val=sources[val] if val else None,
        measure=measure,
        notes=tuple(f"--skip-bad: passed over {line}" for line in bad),
    )


def _examine(
    root: Path,
    files: Sequence[ImageFile],
    measured: Sequence[bool],
    image_size: Size | None,
    resize: int | None,
    channels: int,
    *,
    decodes: bool,
) -> tuple[Size, Transform, list[Content | str]]:
    """Return the size that images are brought to, how, and the contents of the files.

    The default size is assumed from some files. It is known when all have been read, and if it was another,
    they are read again.
    """
    contents = Contents(root)
    some = files[:: 1 + len(files) // 256]
    size = image_size or _default_size(contents, some)
    while True:
        transform = Transform(channels, fit_to(size, resize), f"{size[0]}x{size[1]}x{channels} from {resize}")
        examined = contents.examine(files, measured, transform if decodes else None)
        known = image_size or _default_size(contents, files)
        if known == size:
            return size, transform, examined
        size = known


def _default_size(contents: Contents, files: Sequence[ImageFile]) -> Size:
    """Return the default size for images in these files; see `folder_dataset`."""
    height, width = contents.common_size(files, LARGEST_DEFAULT) or (LARGEST_DEFAULT, LARGEST_DEFAULT)
    return max(height, 32), max(width, 32)


def _roles(parts: Mapping[str, object]) -> tuple[str | None, str | None]:
    """Return which part is the test set, and which is validation; None for one that is taken from `train`."""
    val = next((name for name in VALIDATION if name in parts), None)
    return ("test", val) if "test" in parts else (val, None)


def _shown(name: str) -> str:
    """Return a file's name in one line, bytes that are not UTF-8 as escapes."""
    return one_line(name.encode(errors="backslashreplace").decode())


def _refusal(root: Path, bad: Sequence[str], count: int) -> str:
    """Return the line that refuses a folder with bad files; many of them get a line each before it."""
    what = f"--data-dir: {len(bad)} of the {count} files in {root} cannot be used"
    remedy = "move them away, or add --skip-bad to go on without them"
    if len(bad) <= IN_ONE_LINE:
        return f"{what}: {first_of(bad, IN_ONE_LINE)}; {remedy}"
    for line in bad:
        print(line, file=sys.stderr)
    return f"{what} (named above, each in a line); {remedy}"


def _identity(
    parts: Folders, found: Mapping[str, Content], class_names: Sequence[str], test_part: str | None
) -> Identity:
    """Return the identity of the images: a hash of their names, classes and contents, part by part."""
    sha256 = hashlib.sha256()
    for part, files in parts.items():
        for file in files:
            line = (part, file.name, class_names[file.label], found[file.name].sha256)
            sha256.update("\0".join(line).encode() + b"\n")  # no name holds a null character
    return identity(sha256.hexdigest(), test_split=test_part)


def _statistics(sums: npt.NDArray[np.int64], pixels: int, indices: npt.NDArray[np.int64]) -> Statistics:
    """Return mean and deviation of each channel on the scale 0..1, from integers, so that no order matters.

    A channel that never changes gets the deviation 1: there is nothing to scale.

    Args:
        sums: of each image, the sums of its pixels and then those of their squares [N, 2 C].
        pixels: of an image.
        indices: the images to count.
    """
    count = len(indices) * pixels
    totals = [int(total) for total in sums[indices].sum(0)]
    channels = len(totals) // 2
    mean = tuple(total / (255 * count) for total in totals[:channels])
    # count * sum of squares - (sum)^2, exact in Python's integers, is count^2 times the variance
    spread = [count * totals[channels + c] - totals[c] ** 2 for c in range(channels)]
    std = tuple(value**0.5 / (255 * count) if value else 1.0 for value in spread)
    return mean, std
