"""Lists the files of a data folder by part and class, without opening any; the layouts: `data.folder`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiment.errors import UserError, first_of, one_line

VALIDATION = ("val", "validation")

SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"})
"""Hidden files and folders of other systems, in small letters; those of Unix begin with a dot."""


class ImageFile(NamedTuple):
    """A file of a class.

    Attributes:
        name: its path relative to the data folder, with `/`.
        label: the class's number.
        size: in bytes.
        times: when its contents, and its entry in the file system, last changed, in nanoseconds.
        fault: why it cannot be an image, where its name or its kind already shows that; else None.
    """

    name: str
    label: int
    size: int = 0
    times: tuple[int, int] = (0, 0)
    fault: str | None = None


Folders = dict[str, list[ImageFile]]
"""The files of each part: `train`, and `val` and `test` where there is one."""


def list_files(root: Path) -> tuple[tuple[str, ...], Folders]:
    """Return the names of the classes, and the files of each part, without opening any.

    Raises:
        UserError: the folder is absent, unreadable or of another layout; names that are not UTF-8; links that
            lead in a circle.
    """
    if not root.is_dir():
        fault = "is a file" if root.is_file() else "does not exist"
        raise UserError(f"--data-dir: {root} {fault}; name the folder of the images")
    splits = [name for name in ("train", *VALIDATION, "test") if _has_folders(root / name)]
    if splits and splits[0] != "train":
        raise UserError(
            f"--data-dir: {root} has {' and '.join(splits)}, and no train with a folder for each class; "
            "add it, or name a folder of classes"
        )
    if set(VALIDATION) <= set(splits):
        raise UserError(f"--data-dir: {root} has {' and '.join(VALIDATION)}; move one of them away")
    folders = {part: root / part for part in splits} or {"train": root}
    classes = {part: _class_names(folder) for part, folder in folders.items()}
    names = classes["train"]
    if len(names) < 2:
        there = f"only one class, {one_line(names[0])}" if names else "no class"
        raise UserError(
            f"--data-dir: {folders['train']} has {there}: put the images of each class into a folder of its "
            "own there, two classes or more"
        )
    for part, others in classes.items():
        if different := sorted(set(others) ^ set(names)):
            here, there = ("train", part) if different[0] in names else (part, "train")
            raise UserError(
                f"--data-dir: {root}: the class {one_line(different[0])} is in {here}, not in {there}; "
                "give every part the same classes"
            )
    parts = {
        part: [
            file
            for label, name in enumerate(names)
            for file in _files(root, f"{part}/{name}" if splits else name, label)
        ]
        for part in folders
    }
    for part, files in parts.items():
        check_classes(root, part, files, names)
    return names, parts


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """Return what a folder holds, sorted by name, hidden files left out. Raises UserError if unreadable."""
    try:
        with os.scandir(folder) as entries:
            shown = [e for e in entries if e.name[0] != "." and e.name.lower() not in SYSTEM_FILES]
    except OSError as error:
        raise UserError(
            f"--data-dir: {one_line(folder)} cannot be read ({error.strerror}); make it readable"
        ) from None
    return sorted(shown, key=lambda entry: entry.name)


def _has_folders(folder: Path) -> bool:
    """True for a folder that has folders in it: a part with classes, and no class that is named like one."""
    return folder.is_dir() and any(entry.is_dir() for entry in _visible(folder))


def _class_names(folder: Path) -> tuple[str, ...]:
    """The folders in a folder, sorted. Raises UserError for a name that is not UTF-8: JSON cannot hold it."""
    names = tuple(entry.name for entry in _visible(folder) if entry.is_dir())
    for name in names:
        if not _is_utf8(name):
            raise UserError(f"--data-dir: {folder}: the name {name!r} is not UTF-8; rename it")
    return names


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _files(root: Path, folder: str, label: int) -> list[ImageFile]:
    """Return all files of a class, those of nested folders too, in the order of torchvision's ImageFolder.

    `folder` is the class's, relative to `root`.
    """
    files = [_image_file(name, status, label) for name, status in _walk(root, folder)]
    return sorted(files, key=lambda file: file.name.rpartition("/"))


def _walk(root: Path, folder: str) -> Iterator[tuple[str, os.stat_result | None]]:
    """Yield the name, relative to `root`, and the status of everything below a folder that is no folder.

    The status is None for a link that leads nowhere.

    Raises:
        UserError: a link leads back to a folder that it lies in.
    """
    status = os.stat(root / folder)
    waiting = [(folder, {(status.st_dev, status.st_ino)})]
    while waiting:
        folder, above = waiting.pop()
        for entry in _visible(root / folder):
            name = f"{folder}/{entry.name}"
            try:
                status = entry.stat()
            except OSError:
                yield name, None
                continue
            if not stat.S_ISDIR(status.st_mode):
                yield name, status
                continue
            inode = status.st_dev, status.st_ino
            if inode in above:
                raise UserError(
                    f"--data-dir: {one_line(root / name)} leads back to a folder that it lies in; "
                    "remove that link"
                )
            waiting.append((name, above | {inode}))


def _image_file(name: str, status: os.stat_result | None, label: int) -> ImageFile:
    if status is None:
        return ImageFile(name, label, fault="a link that leads nowhere")
    if not stat.S_ISREG(status.st_mode):
        return ImageFile(name, label, fault="no regular file (a FIFO, socket or device)")
    if not _is_utf8(name):
        return ImageFile(name, label, fault="its name is not UTF-8; rename it")
    return ImageFile(name, label, status.st_size, (status.st_mtime_ns, status.st_ctime_ns))


def check_classes(root: Path, part: str, files: Sequence[ImageFile], class_names: Sequence[str]) -> None:
    """Raise UserError if a class of a part has no images."""
    present = {file.label for file in files}
    empty = [one_line(name) for label, name in enumerate(class_names) if label not in present]
    if empty:
        raise UserError(
            f"--data-dir: {root}: no image of {first_of(empty, 3, ', ')} in the {part} part; add images, or "
            "move the folder of that class away"
        )
