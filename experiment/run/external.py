"""An optimizer from a file of the user's, FILE.py:FUNCTION: config.json identifies it by its content."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.files.run_folder import file_sha256
from experiment.options.config import is_external


def identity(optimizer: str) -> dict[str, str]:
    """Return what config.json keeps of the file: {"optimizer_sha256"}; nothing of another optimizer.

    Raises UserError if it cannot be read.
    """
    path, _, _ = optimizer.rpartition(":")
    if not is_external(optimizer) or path == "optax":
        return {}
    try:
        return {"optimizer_sha256": file_sha256(Path(path))}
    except OSError as error:
        raise UserError(f"--optimizer: {path} cannot be read ({error.strerror}); name another file") from None


def check_unchanged(optimizer: str, resolved: Mapping[str, Any]) -> None:
    """Raise UserError if the file is another than when the run began.

    Args:
        optimizer: the option.
        resolved: that of config.json.
    """
    if any(resolved.get(name) != value for name, value in identity(optimizer).items()):
        path, _, _ = optimizer.rpartition(":")
        raise UserError(
            f"--optimizer: {path} was changed since the run began; restore it, or start a fresh run"
        )
