"""metrics.jsonl: one JSON object a line, appended as training goes, cut back to a checkpoint on resume.

{"split": "train" | "val" | "test", "scope": "step" | "epoch", "step": int, "epoch": int, "loss": ..., ...};
null stands for a number that is not finite.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.files.run_folder import finite
from experiment.reading import checked_json, open_no_link, read_bytes

NAME = "metrics.jsonl"
KINDS = {"split": str, "scope": str, "step": int}
GRADIENT_NORM = "grad_norm/"
"""The start of a name in a step's line; a parameter's name follows, with --log-gradients."""
Line = dict[str, Any]


class MetricsLog:
    """The lines of `path`, and the length and SHA-256 of what is written so far.

    The lines hold nothing that depends on the clock, so that a resumed run writes the same bytes as one that
    was never stopped.
    """

    def __init__(self, path: Path, *, length: int = 0, sha256: str | None = None) -> None:
        """Open `path` for appending after its first `length` bytes; whatever follows them is cut off.

        Raises UserError if those bytes are not the ones with the hash `sha256`.
        """
        self._hash = hashlib.sha256(unchanged_start(path, length, sha256))
        self.length = length
        self._file = open(path, "ab", opener=open_no_link)  # noqa: SIM115 - closed by close()
        self._file.truncate(length)

    def append(self, line: Line) -> None:
        """Write one line. NaN and infinity become null: JSON has no word for them."""
        content = (json.dumps(finite(line)) + "\n").encode()
        self._file.write(content)
        self._hash.update(content)
        self.length += len(content)

    def sync(self) -> dict[str, Any]:
        """Bring every line to the disk; return {"length", "sha256"} of the file for a checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"length": self.length, "sha256": self._hash.hexdigest()}

    def flush(self) -> None:
        """Hand the lines to the operating system, so that a reader sees them."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def unchanged_start(path: Path, length: int = 0, sha256: str | None = None) -> bytes:
    """Return the first `length` bytes of `path`. Raises UserError if their hash is not `sha256`."""
    if not length:
        return b""
    try:
        start = read_bytes(path)[:length]
    except FileNotFoundError:
        start = b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore the file") from None
    if hashlib.sha256(start).hexdigest() != sha256:
        raise UserError(
            f"{path}: its first {length} bytes were changed since the checkpoint; restore the file"
        )
    return start


def read(path: Path, split: str | None = None, scope: str | None = None) -> Iterator[Line]:
    """Yield the whole lines of a file, of one split and scope if they are given; none if it is absent."""
    return select(parse(raw_lines(path)), split, scope)


def to_csv(path: Path) -> str:
    """Return the lines of a file as CSV: a column for each name, in the order in which the names occur."""
    lines = list(read(path))
    table = io.StringIO()
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(table, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return table.getvalue()


def select(lines: Iterable[Line], split: str | None, scope: str | None = None) -> Iterator[Line]:
    """Yield the lines of a split and a scope; None stands for any."""
    return (line for line in lines if split in (None, line["split"]) and scope in (None, line["scope"]))


def best(lines: Iterable[Line]) -> Line | None:
    """Return the first line with the lowest validation loss, or None if no such loss is finite."""
    finite_ones = (line for line in select(lines, "val") if line.get("loss") is not None)
    return min(finite_ones, key=lambda line: line["loss"], default=None)


def raw_lines(path: Path) -> list[bytes]:
    """Return the lines of a file as they are; none if it is absent."""
    return path.read_bytes().splitlines() if path.is_file() else []


def parse(lines: Iterable[bytes]) -> Iterator[Line]:
    """Yield the lines that are whole: the last one of a run that was killed, or goes on, may not be."""
    for text in lines:
        try:
            line = checked_json(text)
        except ValueError:
            continue
        if (
            isinstance(line, dict)
            and all(isinstance(line.get(name), kind) for name, kind in KINDS.items())
            and all(v is None or isinstance(v, int | float) for k, v in line.items() if k not in KINDS)
        ):
            yield line
