"""`python -m experiment evaluate RUN`: loss, top-1, top-5 and macro F1 of a completed run, on either engine.

One crop of each image, as in training's own test; ten crops; or whole images at several scales. Class
probabilities are averaged over crops and scales, as in AlexNet. No crop counts for more because its logits
are large, and the mean is again a distribution, from which the loss is computed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from experiment.data import loading
from experiment.data.augmentation import ten_crops, ten_shifts, whole_image
from experiment.data.loading import Data
from experiment.data.types import Labels, Pixels
from experiment.errors import UserError
from experiment.files import run_folder
from experiment.metrics import Metrics, log_softmax
from experiment.options.command_line import Parser
from experiment.options.config import MIN_IMAGE_SIZE, check_limits
from experiment.program import command
from experiment.run.completed_run import CompletedRun, add_run, open_run

if TYPE_CHECKING:
    from PIL.Image import Image


Views = Callable[["Image"], Pixels]
"""Images [V, H, W, C] to be classified in place of one; they differ in shape from image to image."""

Group = tuple[Sequence[int], np.ndarray, Sequence[int]]
"""Views of one shape, uint8 [N, V, H, W, C], the places of their images in the part, and their labels."""

STRIDE = 32
"""Input pixels per pixel of the last feature map, for most networks. The longer side of a whole image becomes
a multiple of it, so that there are few shapes to compile for."""


def main(argv: Sequence[str]) -> int:
    """Evaluate a run and print its metrics; return 0.

    Raises:
        UserError: no completed run; arguments that do not fit it; data that is missing, damaged or another.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    run = open_run(options.run, which=options.weights, framework=options.framework, data_dir=options.data_dir)
    resize = _resize(options, run)
    changed: dict[str, Any] = {"augment": "none", **({} if resize is None else {"resize": (resize,)})}
    data = loading.load(
        run.config.dataset,
        **(run.config.data_options() | changed),
        recorded=run_folder.recorded_data(run.resolved),
    )
    note = run_folder.check_same_data(run.resolved, data)
    if not len(data.parts[options.split][1]):
        raise UserError(f"--split: the run has no {options.split} part; choose another")
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    pixels = run.image_shape[0] * run.image_shape[1] * (options.batch_size or run.config.eval_batch_size)
    metrics = Metrics(data.num_classes)
    for logits, labels in _scores(options, run, data, resize, pixels):
        metrics.update(logits, labels)
    result = metrics.compute()
    print(f"{options.run}, {options.weights} weights, on {run.engine.device}")
    print(f"{options.split} of {data.name}, {metrics.examples} images, {_what(options, run, resize)}")
    words = "loss {loss:.4f}, top-1 {accuracy:.4f}, top-5 {top5:.4f}, macro F1 {f1:.4f}"
    print(words.format(**result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=command("evaluate"),
        description="Loss, top-1, top-5 and macro F1 of a completed run. Over crops and scales the class "
        "probabilities are averaged.",
    )
    add = parser.add_argument
    add_run(parser)
    add("--split", choices=["test", "val", "train"], default="test", help="default test")
    add("--crops", type=int, choices=[1, 10], default=1, help="10: corners, center, mirrored (default 1)")
    add("--resize", type=int, metavar="N", help="shorter side before a crop (default: the run's)")
    add("--scales", type=int, metavar="N", nargs="+", help="whole images whose shorter sides are these")
    add("--batch-size", type=int, metavar="N", help="images of the run's size (default: the run's)")
    parser.add_data_dir("where TFDS keeps its data (default: the run's)")
    return parser


def _resize(options: argparse.Namespace, run: CompletedRun) -> int | None:
    """The shorter side before a crop, None for the run's own way. Raises UserError for a conflict."""
    if options.batch_size is not None:
        check_limits("--batch-size", options.batch_size, least=1)
    height, width, _ = run.image_shape
    if options.scales:
        for flag, given in (("--crops", options.crops > 1), ("--resize", options.resize is not None)):
            if given:
                raise UserError(f"{flag}: --scales takes whole images; leave one of the two out")
        if min(options.scales) < MIN_IMAGE_SIZE:
            raise UserError(f"--scales: {min(options.scales)} is too small; give at least {MIN_IMAGE_SIZE}")
        if run.config.model == "cnn":
            raise UserError(f"--scales: cnn takes images of {height}x{width} only; use --crops")
        return None
    resize: int | None = options.resize
    if resize is None and options.crops > 1:
        return min(run.config.resize, default=None)
    return resize


def _what(options: argparse.Namespace, run: CompletedRun, resize: int | None) -> str:
    """Describe the views that are taken of an image."""
    if options.scales:
        return f"whole, shorter sides {' '.join(map(str, options.scales))}, probabilities averaged"
    size, resized = "{}x{}".format(*run.image_shape), f" from a shorter side of {resize}" if resize else ""
    if options.crops == 1:
        return f"{size}{resized}"
    return f"10 crops of {size}{resized or ', padded by an eighth'}, probabilities averaged"


def _scores(
    options: argparse.Namespace, run: CompletedRun, data: Data, resize: int | None, pixels: int
) -> Iterator[tuple[np.ndarray, Labels]]:
    """Scores [N, num_classes] whose softmax are the class probabilities, and labels [N]."""
    size = pixels // (run.image_shape[0] * run.image_shape[1])
    if options.crops == 1 and not options.scales:
        for_engine, for_labels = itertools.tee(data.eval_batches(options.split, size))
        logits = run.logits(batch["image"] for batch in for_engine)
        yield from zip(logits, (batch["label"] for batch in for_labels), strict=True)
    else:
        views: list[Views] = [_whole(scale) for scale in options.scales or ()]
        if resize is not None:
            views = [partial(ten_crops, size=run.image_shape[:2], shorter_side=resize)]
        groups = [by_shape(data, options.split, view, pixels) for view in views]
        if not groups:
            groups = [shifts(data, options.split, max(1, size // 10))]
        yield average(run.logits, groups, len(data.parts[options.split][1]), data.num_classes)


def _whole(scale: int) -> Views:
    return lambda image: whole_image(image, scale, STRIDE)[None]


def average(
    logits: Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]],
    views: Sequence[Iterable[Group]],
    count: int,
    num_classes: int,
) -> tuple[np.ndarray, Labels]:
    """Return the log of each image's class probabilities, averaged over all views, and the labels.

    Fully convolutional testing (He et al. 2015, arXiv 1512.03385, section 4.1) is the network on the whole
    image: its average pooling takes a map of any size.

    Args:
        logits: gives the logits [N, num_classes] of batches of images, uint8 [N, H, W, C].
        views: for each way to crop or scale the images, its groups; all ways have the same weight.
        count: how many images there are.
        num_classes: how many classes.

    Returns:
        float64 [N, num_classes], int32 [N].
    """
    total = np.full((count, num_classes), -np.inf)
    labels = np.empty(count, np.int32)
    sizes: dict[tuple[int, ...], int] = {}  # by image shape; smaller batches are padded: JAX compiles each
    for groups in views:
        for places, images, group_labels in groups:
            flat = images.reshape(-1, *images.shape[2:])
            more = max(0, sizes.setdefault(flat.shape[1:], len(flat)) - len(flat))
            padded = np.pad(flat, ((0, more), (0, 0), (0, 0), (0, 0)))
            scores = log_softmax(next(logits([padded]))[: len(flat)]).reshape(*images.shape[:2], -1)
            mean = np.logaddexp.reduce(scores, axis=1) - np.log(images.shape[1])
            total[places] = np.logaddexp(total[places], mean)
            labels[places] = group_labels
    return total - np.log(len(views)), labels


def shifts(data: Data, split: Any, size: int) -> Iterator[Group]:
    """Ten views of each image as the run's own test sees it, of `size` images at a time."""
    place = 0
    for batch in data.eval_batches(split, size):
        images = np.stack([ten_shifts(image, data.augmentation.fill) for image in batch["image"]])
        yield range(place, place + len(images)), images, batch["label"].tolist()
        place += len(images)


def by_shape(data: Data, split: Any, change: Views, pixels: int) -> Iterator[Group]:
    """Yield the views that `change` makes of the images, grouped by shape, about so many pixels at a time."""
    from tqdm import tqdm

    waiting: dict[tuple[int, ...], list[tuple[int, Pixels, int]]] = defaultdict(list)
    place = 0
    bar = tqdm(total=len(data.parts[split][1]), unit=" images", disable=None, leave=False)
    for views, labels in data.eval_images(split, change, batch_size=16):
        for view, label in zip(views, labels, strict=True):
            group = waiting[view.shape]
            group.append((place, view, int(label)))
            place += 1
            if (len(group) + 1) * view.size // view.shape[-1] > pixels:
                yield _stacked(waiting.pop(view.shape))
        bar.update(len(views))
    bar.close()
    for group in waiting.values():
        yield _stacked(group)


def _stacked(group: list[tuple[int, Pixels, int]]) -> Group:
    places, views, labels = zip(*group, strict=True)
    return list(places), np.stack(views), list(labels)
