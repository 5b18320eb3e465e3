"""`python -m experiment predict IMAGE ...`: the most likely classes of images, by the released network.

`predict RUN IMAGE ...` uses a completed run. The released network, in weights/, knows handwritten digits.
"""

import argparse
import csv
import glob
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from experiment.data.augmentation import fill_color
from experiment.data.builtin import fit_to
from experiment.data.images import read_image
from experiment.data.types import Fit, Pixels
from experiment.engines import core_count
from experiment.errors import UserError
from experiment.files.run_folder import write_file
from experiment.metrics import softmax
from experiment.options.command_line import Parser
from experiment.options.config import check_limits
from experiment.program import command, found, shipped
from experiment.run.completed_run import CompletedRun, add_run, open_run

RELEASED = shipped("weights") / "digits-resnet8"

SUFFIXES = (".csv", ".json")

Prediction = tuple[Path, list[tuple[str, float]]]
"""A file, and its most likely classes with their probabilities, the most likely first."""


def main(argv: Sequence[str]) -> int:
    """Print the classes of each image with their probabilities, or write them to a file.

    Images are read, and classified, a batch at a time.

    Returns:
        0; 1 if files that are no images were passed over.

    Raises:
        UserError: no completed run, or no file that is an image.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    _check(options)
    paths = [path for given in options.images for path in _files(given)]
    run = open_run(options.run, which=options.weights, framework=options.framework)
    bad: list[str] = []
    predictions = _predictions(run, paths, options.batch_size or run.config.eval_batch_size, options.top, bad)
    if options.out is None:
        for path, classes in predictions:
            print(path)
            for name, probability in classes:
                print(f"  {probability:.4f}  {name}")
    else:
        rows = list(predictions)
        if rows:
            _write(options.out, rows)
            print(f"{options.out}: {len(rows)} images")
    if len(bad) == len(paths):
        raise UserError(
            bad[0] if len(bad) == 1 else f"none of the {len(bad)} files is an image: {bad[0]}, ..."
        )
    for line in bad:
        print(f"passed over: {line}", file=sys.stderr)
    return 1 if bad else 0


def _parser() -> Parser:
    parser = Parser(
        prog=command("predict"),
        usage="%(prog)s [options] IMAGE ...\n       %(prog)s [options] RUN IMAGE ...",
        description="Print the most likely classes of images, of any format that Pillow reads, by a "
        "completed run, or without RUN by the network of handwritten digits in weights/ (light on black). "
        "Images are brought to the run's size as its test images were; a run with --crop-to-bbox expects "
        "the object alone. Files that are no images are passed over and named at the end; the exit status is "
        "then 1.",
    )
    add_run(parser)
    parser.add_path(
        "images",
        metavar="IMAGE",
        any_bytes=True,
        nargs="*",
        help="a file, a folder, or a pattern",
    )
    parser.add_argument("--top", type=int, metavar="N", default=5, help="how many classes (default 5)")
    parser.add_path(
        "--out", metavar="FILE", any_bytes=True, help="write a .csv or .json file instead of printing"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at a time (default: the run's)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Treat RUN as an image if it is no run. Raise UserError, where possible, before anything is opened."""
    check_limits("--top", options.top, least=1)
    if options.batch_size is not None:
        check_limits("--batch-size", options.batch_size, least=1)
    if options.out is not None:
        if options.out.suffix not in SUFFIXES:
            raise UserError(f"--out: {options.out} must end in {' or '.join(SUFFIXES)}; name another file")
        if options.out.is_dir() or not options.out.parent.is_dir():
            raise UserError(f"--out: {options.out} cannot be written; name a file in a folder that exists")
    first: Path = found(options.run)
    is_pattern = not first.exists() and glob.has_magic(str(first))
    if not first.exists() and not is_pattern:
        raise UserError(f"{first}: not found; name the folder of a run, or image files")
    if first.is_file() or is_pattern:
        options.run, options.images = RELEASED, [first, *options.images]
    elif not options.images and (first / "config.json").exists():
        raise UserError(f"IMAGE: name image files after the run {first}")
    elif not options.images:
        options.run, options.images = RELEASED, [first]
    options.images = [found(path) for path in options.images]


def _files(given: Path) -> list[Path]:
    """Return the files that an argument names: itself, those in a folder and below it, or those of a pattern.

    Hidden files and what is no regular file are left out of folders. Raises UserError if there is none.
    """
    if given.is_dir():
        inside = []
        for folder, folders, names in os.walk(given):
            folders[:] = sorted(name for name in folders if name[0] != ".")  # goes on with these
            inside += [Path(folder, name) for name in sorted(names) if name[0] != "."]
        if not (inside := [path for path in inside if path.is_file()]):
            raise UserError(f"{given}: is a folder without files; name image files, or a folder of them")
        return inside
    if given.exists():
        return [given]
    if not glob.has_magic(str(given)):
        raise UserError(f"{given}: not found")
    matches = [Path(name) for name in sorted(glob.glob(str(given), recursive=True))]
    if not (matches := [path for path in matches if path.is_file()]):
        raise UserError(f"{given}: no file matches this pattern")
    return matches


def _predictions(
    run: CompletedRun, paths: Sequence[Path], size: int, top: int, bad: list[str]
) -> Iterator[Prediction]:
    """Yield the `top` classes of each image; add a line to `bad` for each file that is none."""
    height, width, channels = run.image_shape
    fit = fit_to(
        (height, width),
        min(run.config.resize, default=None),
        fill_color(run.resolved["mean"]) if run.config.crop_to_bbox else None,
    )
    names: list[str] = run.resolved["class_names"]
    good: list[Path] = []  # those that were read and not yet classified

    def batches() -> Iterator[Pixels]:
        images: list[Pixels] = []
        for path, image in _read(paths, channels, fit):
            if isinstance(image, str):
                bad.append(image)
                continue
            good.append(path)
            images.append(image)
            if len(images) == size:
                yield np.stack(images)
                images.clear()
        if images:
            yield np.stack(images)

    for logits in run.logits(batches()):
        for row in softmax(logits):
            order = np.argsort(-row, kind="stable")[:top]
            yield good.pop(0), [(names[index], float(row[index])) for index in order]


def _read(paths: Sequence[Path], channels: int, fit: Fit) -> Iterator[tuple[Path, Pixels | str]]:
    """Yield the pixels of each file, or the line that says why it cannot be used, in order."""

    def read(path: Path) -> Pixels | str:
        try:
            return fit(read_image(path, channels))
        except UserError as error:
            return str(error)

    threads = min(core_count(), 16)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(paths), 4 * threads):  # no more than these are in memory
            chunk = paths[start : start + 4 * threads]
            yield from zip(chunk, pool.map(read, chunk), strict=True)


def _write(path: Path, rows: Sequence[Prediction]) -> None:
    """Write predictions, whole or not at all: a row or an object for each image."""
    if path.suffix == ".json":
        objects = [
            {"file": str(file), "classes": [{"class": name, "probability": p} for name, p in classes]}
            for file, classes in rows
        ]
        text = json.dumps(objects, indent=2) + "\n"
    else:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        ranks = range(1, len(rows[0][1]) + 1)
        writer.writerow(["file", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))])
        for file, classes in rows:
            writer.writerow([str(file), *(value for pair in classes for value in pair)])
        text = buffer.getvalue()
    try:
        write_file(path, text.encode(errors="surrogateescape"))
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written ({error.strerror}); name another file") from None
