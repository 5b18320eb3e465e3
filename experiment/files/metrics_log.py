"""metrics.jsonl: one JSON object a line, appended as training goes, cut back to a checkpoint on resume."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.files.run_folder import finite


class History:
    """The lines of `path`, and the length and SHA-256 of what is written so far; `validations` are the
    (step, loss) of those that were there at the start.

    The lines hold nothing that depends on the clock, so that a resumed run writes the same bytes as one that
    was never stopped.
    """

    def __init__(
        self, path: Path, *, length: int = 0, sha256: str | None = None, writes: bool = True
    ) -> None:
        """Open `path` for appending after its first `length` bytes; whatever follows them is cut off.

        Without `writes` nothing is: another process writes the file.

        Raises UserError if those bytes are not the ones with the hash `sha256`.
        """
        kept = unchanged_start(path, length, sha256)
        lines = (json.loads(line) for line in kept.splitlines() if b'"split": "val"' in line)
        self.validations: list[tuple[int, float]] = [
            (line["step"], math.nan if line["loss"] is None else line["loss"]) for line in lines
        ]
        self._hash = hashlib.sha256(kept)
        self.length = length
        self._writes = writes
        self._file = open(path if writes else os.devnull, "ab")  # noqa: SIM115 - closed by close()
        if writes:
            self._file.truncate(length)

    def append(self, line: dict[str, Any]) -> None:
        """Write one line. Not-a-number becomes null: JSON has no word for it."""
        content = (json.dumps(finite(line)) + "\n").encode()
        self._file.write(content)
        self._hash.update(content)
        self.length += len(content)

    def sync(self) -> dict[str, Any]:
        """Bring every line to the disk; returns {"length", "sha256"} of the file for a checkpoint to keep."""
        self._file.flush()
        if self._writes:
            os.fsync(self._file.fileno())
        return {"length": self.length, "sha256": self._hash.hexdigest()}

    def flush(self) -> None:
        """Hand the lines to the operating system, so that a reader sees them."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def unchanged_start(path: Path, length: int = 0, sha256: str | None = None) -> bytes:
    """The first `length` bytes of `path`. Raises UserError if their hash is not `sha256`."""
    if not length:
        return b""
    kept = path.read_bytes()[:length] if path.exists() else b""
    if hashlib.sha256(kept).hexdigest() != sha256:
        raise UserError(
            f"{path}: its first {length} bytes were changed since the checkpoint; restore the file"
        )
    return kept
