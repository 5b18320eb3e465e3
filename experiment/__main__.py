"""`python -m experiment COMMAND ...`: work on data sets and on completed runs."""

import importlib
import signal
import sys
from collections.abc import Sequence

from experiment.errors import UserError
from experiment.run.console import prepare_streams, release_streams

COMMANDS = {
    "compare": "runs side by side: curves over one another, results, differences of their options",
    "convert": "weights from PyTorch's files (.pth, .ckpt, .pth.tar, ...) to safetensors, or back",
    "evaluate": "test a completed run: one crop, ten crops, or whole images at several scales",
    "parity": "one network in NumPy, JAX and PyTorch: the first stage at which two of them depart",
    "predict": "the most likely classes of images in files, by a completed run",
    "study": "optimizers x seeds by a TOML file: tuned alike, compared with intervals",
    "prepare": "download a TFDS data set and bring it into the form that training reads",
    "report": "a page of a run, finished or not: curves, classes, mistakes, samples",
}
"""Each command, a module of `experiment.commands` with a `main(argv) -> int`, and its line of help."""


def main(argv: Sequence[str]) -> int:
    """Run one command; return its exit status: 0, 2 for a user's mistake, 1 for a failure of the system.

    Mistakes and failures are one line on stderr. 141 is the status of a program whose reader has gone.
    """
    usage = "\n".join(
        [
            "usage: python -m experiment COMMAND ...",
            "",
            *(f"  {name:<10} {text}" for name, text in COMMANDS.items()),
            "",
            "`python -m experiment COMMAND --help` lists its arguments.",
        ]
    )
    name, *rest = argv or ["--help"]
    prepare_streams()
    try:
        if name in ("-h", "--help"):
            print(usage, flush=True)
            return 0
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
        status: int = importlib.import_module(f"experiment.commands.{name}").main(rest)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        return 128 + signal.SIGPIPE
    except (OSError, MemoryError) as error:
        print(f"error: {str(error) or 'out of memory'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        release_streams()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
