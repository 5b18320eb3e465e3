"""Files read whole, and JSON checked against a type: the one place where what is on a disk is taken in.

Nothing read from a disk is trusted. A pipe or a device in place of a file would block a command, or never
end. JSON is decoded and checked by msgspec, against the types in `files/schema.py`.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import msgspec

LARGEST_JSON = 1 << 28
"""The most bytes of a JSON file: a run's are a thousand times smaller."""


def check_regular(path: Path) -> int:
    """Return the size of a file in bytes. Raises OSError for what is no regular file, links followed."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return status.st_size


def open_no_link(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=open_no_link)`: not through a link, which may point anywhere."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link; put a file in its place", path) from None
        raise


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file. Raises OSError."""
    check_regular(path)
    return path.read_bytes()


def read_checked_json(path: Path, kind: Any = Any) -> Any:
    """Return the JSON of a file, as dicts and lists; names that `kind` does not have stay in it.

    Args:
        path: the file.
        kind: the type that it must have: a TypedDict of `files/schema.py`, or any other that msgspec knows.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or not of the type; the message says where.
    """
    if check_regular(path) > LARGEST_JSON:
        raise ValueError(f"it is larger than {LARGEST_JSON >> 20} MB")
    return checked_json(path.read_bytes(), kind)


def checked_json(content: bytes, kind: Any = Any) -> Any:
    """Return JSON decoded and checked, as `read_checked_json`. Raises ValueError."""
    try:
        value = msgspec.json.decode(content)
        msgspec.convert(value, kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    return value
