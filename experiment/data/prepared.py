"""Where TFDS has prepared a data set, and the command that prepares one.

`python -m experiment prepare NAME --data-dir DIR` makes them; nothing here writes to the disk. Every message
about missing or damaged data names that command.
"""

import difflib
import re
import shlex
from pathlib import Path
from typing import Any

from experiment.data.builtin import BUILTIN
from experiment.errors import UserError, one_line
from experiment.options.paths import local_path
from experiment.program import command

VERSION = r"\d+\.\d+\.\d+"


def prepare_command(name: str, data_dir: str | None) -> str:
    """Return the command that downloads and prepares a data set."""
    directory = "" if data_dir is None else f" --data-dir {shlex.quote(data_dir)}"
    return f"{command('prepare')} {name}{directory}"


def check_name(name: str) -> None:
    """Raise UserError unless `name` is a TFDS name: NAME, and where needed /CONFIG and :VERSION behind it."""
    if re.fullmatch(r"[a-z][a-z0-9_]*(/\w[\w.+-]*)?(:" + VERSION + ")?", name, re.ASCII):
        return
    raise UserError(
        f"--dataset {name!r} is not a TFDS name (lower-case letters, digits and _, no path; where needed "
        "then /CONFIG and a version such as :1.0.0): use one like mnist, or digits, synthetic or folder"
    )


def plain_name(name: str) -> str:
    """Return a TFDS name without configuration and version."""
    return re.split("[/:]", name)[0]


def prepared_choices(name: str, data_dir: str | None) -> str:
    """Name the prepared configurations and versions of a data set; empty if there are none."""
    root = data_root(data_dir)
    try:
        found = [path.parent.relative_to(root) for path in (root / plain_name(name)).rglob("features.json")]
    except OSError:  # a folder that cannot be read
        found = []
    choices = sorted(
        f"{'/'.join(path.parts[:-1])}:{path.name}"
        for path in found
        if re.fullmatch(VERSION, path.name) and len(path.parts) < 4
    )
    return ", ".join(choices)


def check_known(name: str) -> None:
    """Raise UserError unless TFDS knows how to prepare a data set of that name."""
    import tensorflow_datasets as tfds

    name = plain_name(name)
    known = tfds.list_builders(with_community_datasets=False)
    if name not in known:
        close = difflib.get_close_matches(name, [*BUILTIN, *known])
        hint = (
            f"did you mean {' or '.join(close)}?" if close else "use digits, synthetic, mnist, cifar10, ..."
        )
        raise UserError(f"--dataset {name}: TFDS knows no data set of that name; {hint}")


def find_prepared(name: str, data_dir: str | None) -> Any | None:
    """Return the TFDS builder of a data set that is prepared in `data_dir`, or None.

    Args:
        name: a TFDS name.
        data_dir: the TFDS data directory; None is TFDS' own default.

    Raises:
        UserError: it is no such name; its description cannot be read; its files are of a format that allows
            no random access.
    """
    check_name(name)
    import tensorflow_datasets as tfds

    directory = data_root(data_dir)
    try:
        # From files only: the builder that TFDS has code for may want TensorFlow, or another version.
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=directory)
        formats = {file_format.value for file_format in builder.info.available_file_formats()}
    except tfds.core.registered.DatasetNotFoundError:
        return None
    except Exception as error:  # whatever the readers of damaged JSON raise
        raise UserError(
            f"--data-dir: the description of {name} in {directory / plain_name(name)} cannot be read "
            f"({one_line(error)}){prepare_again(name, data_dir)}"
        ) from error
    if "array_record" not in formats:
        raise UserError(
            f"--data-dir: {name} in {builder.data_dir} is in the format {', '.join(sorted(formats))}, not "
            f"array_record; prepare it in another directory: `{prepare_command(name, 'DIR')}`"
        )
    builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    return builder


def data_root(data_dir: str | None) -> Path:
    """Return the TFDS data directory that `--data-dir` names: None is TFDS' own default."""
    import tensorflow_datasets as tfds

    directory = tfds.core.constants.DATA_DIR if data_dir is None else data_dir
    return Path(local_path("--data-dir", directory))


def prepare_again(name: str, data_dir: str | None) -> str:
    """The remedy for a data set whose files are missing or damaged; it deletes nothing."""
    return f"; move that folder away and run `{prepare_command(name, data_dir)}`"


def check_prepared(name: str, data_dir: str | None) -> Any:
    """Return the builder of `find_prepared`.

    Raises UserError if there is none: TFDS does not know the data set, or it is not prepared.
    """
    if (builder := find_prepared(name, data_dir)) is not None:
        return builder
    root, command = data_root(data_dir), prepare_command(name, data_dir)
    if choices := prepared_choices(name, data_dir):
        raise UserError(
            f"--dataset {name}: --data-dir {root} has {choices}; name one of these, or run `{command}`"
        )
    check_known(name)
    where = f"{root}" if root.is_dir() else f"{root} (which does not exist)"
    raise UserError(
        f"--dataset {name} is not prepared in --data-dir {where}: run `{command}`, "
        "or name the directory that has it"
    )
