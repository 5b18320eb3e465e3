"""`python -m experiment convert IN OUT`: weights from PyTorch's files to safetensors, or back.

IN is recognized by its content, OUT by its suffix. Pickles are read without running any code in them
(`torch_oracle/weights.py`).
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from experiment.errors import UserError, first_of
from experiment.files import hub, weights
from experiment.files.run_folder import write_file
from experiment.options.command_line import Parser
from experiment.program import command, install_command

SAFETENSORS = ".safetensors"
TORCH = (".pth", ".pt", ".th", ".pth.tar", ".ckpt", ".bin")
SUFFIXES = (SAFETENSORS, *TORCH)
NAMES = 4  # how many of the tensors that are left out are named


def main(argv: Sequence[str]) -> int:
    """Convert one file; return 0. Nothing is written unless all of it was read.

    Raises:
        UserError: files that are absent, in the way, of an unknown suffix or without a state dict; several
            state dicts; values that no trained network has; PyTorch is missing.
    """
    parser = Parser(
        prog=command("convert"),
        description="Convert weights between PyTorch's files and safetensors files. Names, shapes and types "
        "stay as they are, but for prefixes of wrappers (`module.`, `_orig_mod.`, `model.`, ...), which are "
        "removed.",
        epilog=f"Needs PyTorch, which the extra `test` brings: {install_command('test')}",
    )
    help_in = "the file to read; its content says its kind; or hf://OWNER/NAME"
    help_out = f"the file to write: {', '.join(SUFFIXES)}"
    parser.add_path("source", metavar="IN", any_bytes=True, hub=True, help=help_in)
    parser.add_path("target", metavar="OUT", any_bytes=True, help=help_out)
    key = "which state dict to take, where IN holds several: its key, or the prefix of its names"
    parser.add_argument("--key", metavar="NAME", help=key)
    options = parser.parse_args(argv)
    source, target = hub.local_file(options.source), options.target

    _check(source, target)
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"convert needs PyTorch, which the extra `test` brings: run `{install_command('test')}`"
        )
    import torch_oracle.weights

    try:
        state = torch_oracle.weights.read(source, options.key)
        names = weights.network_names({name: tuple(tensor.shape) for name, tensor in state.items()})
    except (ValueError, OSError, UserError) as error:
        raise UserError(f"{source}: {error}") from None
    network = {name: state[original] for name, original in names.items()}
    for name, tensor in network.items():
        weights.check(source, {name: torch_oracle.weights.to_numpy(tensor)})
    content = torch_oracle.weights.serialize(
        network, as_safetensors=target.name.lower().endswith(SAFETENSORS)
    )
    try:
        write_file(target, content)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    print(f"{target}: {len(network)} tensors, {sum(tensor.numel() for tensor in network.values()):,} numbers")
    if rest := sorted(state.keys() - set(names.values())):
        print(f"left out, as they lie beside the network: {first_of(rest, NAMES, ', ')}")
    return 0


def _check(source: Path, target: Path) -> None:
    """Raise UserError for what is wrong with the names, before a file is opened."""
    if not target.name.lower().endswith(SUFFIXES):
        raise UserError(f"{target}: the suffix must be one of {', '.join(SUFFIXES)}")
    if source.resolve() == target.resolve():
        raise UserError(f"{target}: is the file to be read; give OUT another name")
    if not source.is_file():
        raise UserError(f"{source}: {'is no file' if source.exists() else 'not found'}")
    if target.exists():
        raise UserError(f"{target}: exists; remove it, or give OUT another name")
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}; make it first")
