"""Train a ResNet with JAX or with NumPy.

    python train.py                                             # ResNet-101 on handwritten digits, Adam
    python train.py --optimizer adabound --seed 1
    python train.py --framework numpy                           # the same, from scratch in NumPy
    python train.py --dataset mnist --data-dir DIR --model resnet18 --epochs 1
    python train.py --recipe cifar10-resnet20 --data-dir DIR    # the options of recipes/cifar10-resnet20.toml
    python train.py --run-dir runs/mine --resume                # continue, bit for bit

Everything the run writes is under --run-dir: config.json, metrics.jsonl, summary.json, weights, checkpoints,
report/index.html and TensorBoard files. Exit status: 0 done; 1 the run failed, and what was saved is named;
2 a mistake in the flags; 128 + n a signal.
"""

import gc
import sys
from collections.abc import Sequence

from experiment.options.command_line import parse
from experiment.options.recipes import with_recipe
from experiment.options.resolving import refuse_unused, resolve
from experiment.processes import leave
from experiment.program import label
from experiment.run import session, signals
from experiment.run.console import exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    # JAX and the tracing of a network make a million objects that stay. Scanning them for garbage again and
    # again takes a tenth of the time to the first step.
    gc.set_threshold(100_000)
    arguments = list(sys.argv[1:] if argv is None else argv)
    status = exit_status(lambda: _train(arguments), label(), "interrupted before the run began")
    leave(status)
    return status


def _train(argv: list[str]) -> int:
    given = parse(argv)
    if not given.get("resume"):
        refuse_unused(given, resolve(with_recipe(given)))
    with signals.interruptible():
        return session.start(given, argv).status
