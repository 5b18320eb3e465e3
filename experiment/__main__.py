"""`python -m experiment COMMAND ...`, installed `threeway-resnet COMMAND ...`: train; work on runs."""

import importlib
import sys
from collections.abc import Sequence

from experiment.errors import UserError
from experiment.program import command
from experiment.run.console import exit_status

COMMANDS = {
    "train": "train a ResNet with JAX or with NumPy",
    "compare": "runs side by side: curves over one another, results, differences of their options",
    "convert": "weights from PyTorch's files (.pth, .ckpt, .pth.tar, ...) to safetensors, or back",
    "evaluate": "test a completed run: one crop, ten crops, or whole images at several scales",
    "export": "a run's network as ONNX, StableHLO and a PyTorch file, each compared with the run",
    "parity": "one network in NumPy, JAX and PyTorch: the first stage at which two of them depart",
    "predict": "the most likely classes of images in files, by a completed run",
    "study": "optimizers x seeds by a TOML file: tuned alike, compared with intervals",
    "verify": "runs, checkpoints and weights: are they what was written?",
    "prepare": "download a TFDS data set and bring it into the form that training reads",
    "report": "a page of a run, finished or not: curves, classes, mistakes, samples",
}
"""Each command, a module of `experiment.commands` with a `main(argv) -> int`, and its line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status (see `exit_status`)."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        lines = "\n".join(f"  {word:<10} {text}" for word, text in COMMANDS.items())
        print(f"usage: {command('COMMAND')} ...\n\n{lines}\n")
        print(f"`{command('COMMAND')} --help` lists its arguments.", flush=True)
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
    status: int = importlib.import_module(f"experiment.commands.{name}").main(rest)
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    sys.exit(main())
