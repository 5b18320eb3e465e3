"""`python -m experiment predict IMAGE ...`: the most likely classes of images, by the released network.

`predict RUN IMAGE ...` uses a completed run. The released network, in weights/, knows handwritten digits.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiment.data.augmentation import fill_color
from experiment.data.builtin import fit_to
from experiment.data.images import read_image
from experiment.errors import UserError
from experiment.metrics import softmax
from experiment.options.command_line import Parser
from experiment.options.config import check_limits
from experiment.program import command, found, shipped
from experiment.run.completed_run import add_run, open_run

RELEASED = shipped("weights") / "digits-resnet8"


def main(argv: Sequence[str]) -> int:
    """Print the classes of each image with their probabilities; return 0. All images are read first.

    Raises:
        UserError: no completed run, or a file that is no image, damaged or too large.
    """
    parser = Parser(
        prog=command("predict"),
        usage="%(prog)s [options] IMAGE ...\n       %(prog)s [options] RUN IMAGE ...",
        description="Print the most likely classes of images, of any format that Pillow reads, by a "
        "completed run, or without RUN by the network of handwritten digits in weights/ (light on black). "
        "Images are brought to the run's size as its test images were; a run with --crop-to-bbox expects "
        "the object alone.",
    )
    add_run(parser)
    parser.add_path("images", metavar="IMAGE", any_bytes=True, nargs="*", help="a file")
    parser.add_argument("--top", type=int, metavar="N", default=5, help="how many classes (default 5)")
    options = parser.parse_args(argv)
    _check(options)
    run = open_run(options.run, which=options.weights, framework=options.framework)
    height, width, channels = run.image_shape
    fit = fit_to(
        (height, width),
        min(run.config.resize, default=None),
        fill_color(run.resolved["mean"]) if run.config.crop_to_bbox else None,
    )
    images = np.stack([fit(read_image(path, channels)) for path in options.images])
    size = run.config.eval_batch_size
    batches = (images[start : start + size] for start in range(0, len(images), size))
    probabilities = softmax(np.concatenate(list(run.logits(batches))))
    for path, row in zip(options.images, probabilities, strict=True):
        print(path)
        for index in np.argsort(-row, kind="stable")[: options.top]:
            print(f"  {row[index]:.4f}  {run.resolved['class_names'][index]}")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Treat RUN as an image if it is a file. Raise UserError, where possible, before anything is opened."""
    check_limits("--top", options.top, least=1)
    first: Path = found(options.run)
    if not first.exists():
        raise UserError(f"{first}: not found; name the folder of a run, or image files")
    if first.is_file():
        options.run, options.images = RELEASED, [first, *options.images]
    elif not options.images and (first / "config.json").exists():
        raise UserError(f"IMAGE: name image files after the run {first}")
    elif not options.images:
        options.images = [first]
    options.images = [found(path) for path in options.images]
    for path in options.images:
        if path.is_dir():
            raise UserError(
                f"{path}: is a folder, not an image; name the files in it: {shlex.quote(str(path))}/*"
            )
        if not path.exists():
            raise UserError(f"{path}: not found")
