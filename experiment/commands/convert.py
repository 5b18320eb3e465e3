"""`python -m experiment convert IN OUT`: weights from PyTorch's files to safetensors, or back.

The suffixes say which. Pickles are read without running any code in them (`torch_oracle/weights.py`).
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from experiment.commands.parser import Parser
from experiment.errors import UserError
from experiment.paths import path_type
from experiment.rundir import write_file

SAFETENSORS = ".safetensors"
TORCH = (".pth", ".pt", ".th")
INSTALL = "pip install -c constraints.txt -e '.[test]'"


def main(argv: Sequence[str]) -> int:
    """Convert one file; return 0. Nothing is written unless all of it was read.

    Raises:
        UserError: files that are absent, in the way, of the wrong suffix or without a state dict; PyTorch is
            missing.
    """
    parser = Parser(
        prog="python -m experiment convert",
        description="Convert weights between PyTorch's files and safetensors files. Names, shapes and types "
        "stay as they are, but for the prefix `module.`, which is taken off.",
        epilog=f"Needs PyTorch, which the extra `test` brings: {INSTALL}",
    )
    suffixes = ", ".join(TORCH)
    source_type, target_type = (path_type(name, any_bytes=True) for name in ("IN", "OUT"))
    add = parser.add_argument
    add("source", metavar="IN", type=source_type, help=f"the file to read: {suffixes} or {SAFETENSORS}")
    add("target", metavar="OUT", type=target_type, help="the file to write, of the other kind")
    options = parser.parse_args(argv)
    source, target = options.source, options.target

    _check(source, target)
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"convert needs PyTorch, which the extra `test` brings: run `{INSTALL}`")
    import torch_oracle.weights

    try:
        state = torch_oracle.weights.read(source)
    except (ValueError, OSError) as error:
        raise UserError(f"{source}: {error}") from None
    try:
        write_file(target, torch_oracle.weights.serialize(state, target.suffix))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    print(f"{target}: {len(state)} tensors, {sum(tensor.numel() for tensor in state.values()):,} numbers")
    return 0


def _check(source: Path, target: Path) -> None:
    """Everything that can be told before a file is opened."""
    for path in (source, target):
        if path.suffix not in (SAFETENSORS, *TORCH):
            raise UserError(f"{path}: the suffix must be one of {', '.join((SAFETENSORS, *TORCH))}")
    if source.resolve() == target.resolve():
        raise UserError(f"{target}: is the file to be read; give OUT another name")
    if (source.suffix == SAFETENSORS) == (target.suffix == SAFETENSORS):
        raise UserError(f"{target}: is of the kind of {source}; one of the two must be {SAFETENSORS}")
    if not source.is_file():
        raise UserError(f"{source}: {'is no file' if source.exists() else 'not found'}")
    if target.exists():
        raise UserError(f"{target}: exists; remove it, or give OUT another name")
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}; make it first")
