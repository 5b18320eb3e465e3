"""`python -m experiment prepare NAME --data-dir DIR`: download a TFDS data set, once, as array_record files.

Most of TFDS' builders need TensorFlow for this, and only for this. It is the extra `prepare`, best in a
virtual environment of its own: training and reading never import it.
"""

import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Any

from experiment.data.builtin import BUILTIN
from experiment.data.prepared import check_known, data_root, find_prepared, prepare_command
from experiment.errors import UserError, named_line, one_line
from experiment.options.command_line import Parser
from experiment.program import command, install_command

ENVIRONMENT = ".venv-prepare"


def install() -> str:
    """Return the command that makes the environment for preparing data."""
    return f"python -m venv {ENVIRONMENT} && {ENVIRONMENT}/bin/{install_command('prepare')}"


def main(argv: Sequence[str]) -> int:
    """Prepare one data set; return 0, also when there is nothing left to do.

    TFDS writes into a directory with another name and renames it at the end, so that an interruption never
    leaves something that looks complete. The next run keeps only finished downloads.

    Raises:
        UserError: an unknown name, TensorFlow is missing, or the download or the preparation failed.
    """
    parser = Parser(
        prog=command("prepare"),
        description="Download a TFDS data set and write it as array_record files, which training reads.",
        epilog=f"Needs TensorFlow, in an environment of its own: {install()}",
    )
    parser.add_argument("name", metavar="NAME", help="a TFDS name: mnist, cifar10, ..., NAME/CONFIG:VERSION")
    parser.add_data_dir("where to put it (default: TFDS' own)")
    options = parser.parse_args(argv)
    name, data_dir = options.name, options.data_dir

    if name in (*BUILTIN, "folder"):
        print(f"{name} needs no preparation")
        return 0
    builder = find_prepared(name, data_dir)
    if builder is not None:
        print(f"{name} {builder.version} is already prepared in {builder.data_dir}")
        return 0
    check_known(name)
    if importlib.util.find_spec("tensorflow") is None:
        prepare = f"{ENVIRONMENT}/bin/{prepare_command(name, data_dir)}"
        raise UserError(f"preparing {name} needs TensorFlow: run `{install()} && {prepare}`")
    builder = _prepare(name, data_dir)
    sizes = ", ".join(f"{split} {info.num_examples}" for split, info in builder.info.splits.items())
    print(f"{name} {builder.version} is prepared in {builder.data_dir}: {sizes}")
    return 0


def _prepare(name: str, data_dir: str | None) -> Any:
    """Download and write; return the TFDS builder."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read at the import
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it logs each of its retries
    import tensorflow_datasets as tfds

    root = data_root(data_dir)
    manual = root / "downloads" / "manual"
    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
        if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS or manual.is_dir():
            builder.download_and_prepare()
            return builder
    except Exception as error:  # builders fail in many ways: network, disk, a changed web page, ...
        raise UserError(f"{name} could not be prepared: {named_line(error)}") from error
    raise UserError(
        f"{name} has to be downloaded by hand: put its files into {manual} and run this command again "
        f"({one_line(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)})"
    )
