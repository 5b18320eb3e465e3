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


def prepare_command(name: str, data_dir: str | None) -> str:
    """Return the command that downloads and prepares a data set."""
    directory = "" if data_dir is None else f" --data-dir {shlex.quote(data_dir)}"
    return f"{command('prepare')} {name}{directory}"


def check_name(name: str, data_dir: str | None) -> None:
    """Raise UserError unless `name` is a plain TFDS name: no path, configuration, version or argument."""
    if re.fullmatch(r"[a-z][a-z0-9_]*", name):
        return
    plain = re.match(r"([a-z][a-z0-9_]*)[/:]", name)
    configs = prepared_configs(plain[1], data_dir) if plain else ""
    raise UserError(
        f"--dataset {name!r} is not a plain TFDS name (lower-case letters, digits and _; no path, "
        f"configuration or version): use one like mnist, or digits, or synthetic{configs and f'; {configs}'}"
    )


def prepared_configs(name: str, data_dir: str | None) -> str:
    """Name the configurations of a data set that are prepared in `data_dir`; empty if there is none."""
    try:
        files = list((data_root(data_dir) / name).glob("*/*/features.json"))
    except OSError:  # a folder that cannot be read
        files = []
    names = ", ".join(sorted({path.parts[-3] for path in files}))
    return names and f"of the configurations of {name} ({names}) only TFDS' default one can be used"


def check_known(name: str) -> None:
    """Raise UserError unless TFDS knows how to prepare a data set of that name."""
    import tensorflow_datasets as tfds

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
        name: a plain TFDS name.
        data_dir: the TFDS data directory; None is TFDS' own default.

    Raises:
        UserError: the name is another; its description cannot be read; its files are of a format that allows
            no random access.
    """
    check_name(name, data_dir)
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
            f"--data-dir: the description of {name} in {directory / name} cannot be read "
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
    if configs := prepared_configs(name, data_dir):
        raise UserError(
            f"--dataset {name}: {configs}, and --data-dir {root} does not have that: run `{command}`, or use "
            "another data set"
        )
    check_known(name)
    where = f"{root}" if root.is_dir() else f"{root} (which does not exist)"
    raise UserError(
        f"--dataset {name} is not prepared in --data-dir {where}: run `{command}`, "
        "or name the directory that has it"
    )
