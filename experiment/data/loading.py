"""Splits by seed, shuffling and batches: everything between a source of images and an engine.

    data = load("mnist", data_dir="...", batch_size=128, seed=0)
    for batch in data.train_batches(start_step=0):  # endless
        ...  # {"image": uint8 [128, 32, 32, 1], "label": int32 [128]}

Images stay uint8: the engines compute (x / 255 - mean) / std with `data.mean` and `data.std`, the same for
training, validation and test. For the same data and options, training batch k and its augmentation depend
only on the seed and k: to resume, the step is enough, and the number of threads changes only the speed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiment.data import folder
from experiment.data.augmentation import Augmentation, fill_color
from experiment.data.builtin import BUILTIN, CACHE_BYTES, no_boxes
from experiment.data.drop_path import DropPath
from experiment.data.mixing import Mixing
from experiment.data.splitting import Part, Split, split_parts
from experiment.data.tfds import tfds_dataset
from experiment.data.types import Batch, Dataset, Labels, Pixels, Size, Source
from experiment.engines import core_count
from experiment.errors import UserError, first_of
from experiment.options.config import check_image_size, check_limits
from experiment.processes import SINGLE_PROCESS, ProcessInfo

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALL_IMAGE = 64 * 64
"""One thread reads fastest up to this many pixels: the work is Python's, and a second one only waits for its
lock. On two cores a first pass over MNIST took 7,900 images/s with one thread and 5,300 with two. Larger
images are decoded and resized outside of the lock: 500x375 JPEGs to 224x224, 520 a second with one thread,
850 with two."""

_MOST_THREADS = 16  # each may hold a batch of large images


@dataclass(frozen=True, eq=False, kw_only=True)
class Data(Dataset):
    """A data set, split and ready to be read in batches. Made by `load`."""

    name: str
    train_size: int
    val_size: int
    test_size: int
    batch_size: int
    seed: int
    augmentation: Augmentation
    parts: Mapping[Split, Part] = field(repr=False)
    place: ProcessInfo = SINGLE_PROCESS  # of several processes each reads its rows of a training batch
    mixing: Mixing | None = None  # adds "label2", int32 [N], and "lam", float64 [N]
    drop_path: DropPath | None = None  # adds "drop_path", float64 [N, blocks], to training batches

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def steps_per_epoch(self) -> int:
        """Training batches an epoch; what is left over is dropped, and drawn again in the next epoch."""
        return self.train_size // self.batch_size

    def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield training batches `start_step`, `start_step` + 1, ... without end.

        Each epoch of `steps_per_epoch` batches is a new permutation: no example comes twice in it. Of several
        processes each yields its share of the rows, so that together they are the batch of one.

        Raises:
            ValueError: `start_step` is negative.
            UserError: while iterating, when a file turns out to be damaged.
        """
        if start_step < 0:
            raise ValueError(f"start_step must not be negative: {start_step}")
        source, indices = self.parts["train"]

        def read(step: int, positions: npt.NDArray[np.int64]) -> Batch:
            epoch, examples = step // self.steps_per_epoch, indices[positions]
            augmented = partial(self.augmentation.batch, source, epoch=epoch)
            if self.mixing is None:
                batch = augmented(examples)
            else:
                batch = self.mixing.batch(augmented, indices, examples, epoch)
            return {**batch, **self._drop_path(examples, epoch)}

        return self._prefetched(self._order().map_with_index(read)[start_step:])

    def train_draws(self, labels: Labels, start_step: int = 0) -> Iterator[Batch]:
        """Yield what `train_batches` is made of, for an engine that holds the images of `held`.

        Args:
            labels: of all of them, [M].
            start_step: as in `train_batches`.

        Yields:
            {"index": int32 [N] into `held`, "label": int32 [N], "shift": int32 [N, 2], "flip": bool [N]}, and
            "drop_path" as `train_batches` has it
        """
        _, indices = self.parts["train"]

        def draw(step: int, positions: npt.NDArray[np.int64]) -> Batch:
            epoch = step // self.steps_per_epoch
            drawn = self.augmentation.draws(indices[positions], epoch)
            drawn |= self._drop_path(indices[positions], epoch)
            return {"index": positions.astype(np.int32), "label": labels[positions], **drawn}

        return self._prefetched(self._order().map_with_index(draw)[start_step:])

    def _drop_path(self, examples: npt.NDArray[np.int64], epoch: int) -> Batch:
        """The factors of the residual branches of the examples [N]; nothing without stochastic depth."""
        return {} if self.drop_path is None else {"drop_path": self.drop_path.factors(examples, epoch)}

    def held(self) -> Batch | None:
        """All training images, uint8 [M, H, W, C], and labels [M]; None if a device cannot hold them, or if
        training does more than shift and flip."""
        source, indices = self.parts["train"]
        size = len(indices) * int(np.prod(self.image_shape))
        moves_only = self.augmentation.moves_only and self.mixing is None
        return source.read(indices) if moves_only and size <= CACHE_BYTES else None

    def class_weights(self) -> tuple[float, ...]:
        """A weight for each class k, n / (K n_k): of n training examples n_k are of class k, one of K.

        Rare classes count more, and the mean over the training examples is 1: scikit-learn's "balanced".

        Raises:
            UserError: a class has no training example.
        """
        source, indices = self.parts["train"]
        counts = np.bincount(source.labels(indices), minlength=self.num_classes)
        if not counts.all():
            absent = first_of([self.class_names[k] for k in np.flatnonzero(counts == 0)], 3)
            raise UserError(
                f"--class-weights: the training part has no example of {absent}; use a larger "
                "--train-subset, or leave the flag out"
            )
        return tuple((self.train_size / (self.num_classes * counts)).tolist())

    def _order(self) -> Any:
        """The positions [N] of the examples of each training batch, endless: a Grain MapDataset."""
        import grain

        rows = self.place.rows(self.batch_size)
        return (
            grain.MapDataset.range(self.train_size)
            .seed(self.seed)
            .shuffle()
            .batch(self.batch_size, drop_remainder=True)
            .repeat()
            .map(lambda positions: positions[rows])
        )

    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """Yield every example of a part exactly once, in a fixed order; the last batch may be short.

        An empty part (validation at `val_fraction` 0) yields nothing.

        Raises:
            UserError: while iterating, when a file turns out to be damaged.
        """
        return self._eval_part(split, batch_size, lambda source, indices: source.read(indices))

    def eval_images(
        self, split: Split, change: Callable[["Image"], Pixels], batch_size: int
    ) -> Iterator[tuple[list[Pixels], Labels]]:
        """Yield `change(image)` for every image of a part, each once, in a fixed order, and labels [N].

        `change` gets the images before they are resized; its results may differ in shape.
        """

        def read(source: Source, indices: npt.NDArray[np.int64]) -> tuple[list[Pixels], Labels]:
            images, labels = source.images(indices)
            return [change(image) for image in images], labels

        return self._eval_part(split, batch_size, read)

    def _eval_part(self, split: Split, batch_size: int, read: Callable[..., Any]) -> Iterator[Any]:
        """Yield read(source, indices [N]) for all examples of a part, in a fixed order."""
        import grain

        source, indices = self.parts[split]
        if not len(indices):
            return iter(())
        batches = grain.MapDataset.range(len(indices)).batch(batch_size)
        return self._prefetched(batches.map(lambda positions: read(source, indices[positions])))

    def _prefetched(self, batches: Any) -> Iterator[Any]:
        """Yield the batches of a Grain MapDataset in order, the next ones being read meanwhile."""
        import grain

        height, width, _ = self.image_shape
        threads = 1 if height * width <= _SMALL_IMAGE else min(core_count(), _MOST_THREADS)
        iterator = iter(batches.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=threads + 1)))
        try:
            yield from iterator
        finally:
            iterator.close()


def load(
    name: str,
    *,
    data_dir: str | None,
    batch_size: int,
    seed: int,
    train_subset: float = 1.0,
    val_fraction: float = 0.1,
    test_fraction: float | None = None,
    skip_bad: bool = False,
    image_size: Size | None = None,
    resize: Sequence[int] = (),
    grayscale: bool = False,
    crop_to_bbox: bool = False,
    mean_only: bool = False,
    augment: str = "none",
    randaugment: tuple[int, ...] = (),
    random_erase: float = 0.0,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    eval_size: Size | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> Data:
    """Open a data set and split it.

    The training split is permuted by the seed; its first `train_subset` is kept, and of that the first
    `val_fraction` is validation and the rest training. The same seed gives the same parts; which examples are
    test depends on no argument but `test_fraction`. Fractions are rounded to whole examples, and a part that
    is asked for has at least one.

    Args:
        name: `digits`, `synthetic`, `folder`, or a TFDS name.
        data_dir: the folder of images, or the TFDS data directory; None is TFDS' own default.
        batch_size: examples a training batch.
        seed: 0 .. 2**32 - 1; fixes the split and the order.
        train_subset: the fraction of the training split to use, in (0, 1].
        val_fraction: the fraction of that to keep for validation, in [0, 1). A folder with `val` and `test`
            has its own validation part; 0 leaves that out.
        test_fraction: the fraction of the training split to hold out for the test, in (0, 1), of a set
            without a test part. None is a tenth.
        skip_bad: of a folder, pass over files that are no images.
        image_size: height and width in pixels, each at least 32; None is the data set's default.
        resize: the shorter side before the image is cropped to `image_size`; two numbers are the range it is
            drawn from for training. Empty: the smallest that covers it.
        grayscale: images of one channel from a set of color.
        crop_to_bbox: only the part of an image inside its bounding box.
        mean_only: the engines subtract the mean and do not divide by the standard deviation.
        augment: one of `config.AUGMENTATIONS`.
        randaugment: number and magnitude of RandAugment's operations; empty is none.
        random_erase: the probability of `augmentation.random_erase`.
        mixup_alpha, cutmix_alpha: see `mixing.Mixing`; 0 is off.
        eval_size: height and width of validation and test images, which `resize` does not change then; None
            is `image_size`.
        recorded: what config.json of a run holds of its data: a folder's size, mean and deviation.

    Raises:
        UserError: an unknown name; data that is not prepared or is damaged; features that do not fit; a size
            under 32, or larger than `resize`; no boxes, or no color, where they are needed; fractions that
            leave nothing to train on; a batch larger than the training part. Nothing is created on disk.
    """
    check_limits("--train-subset", train_subset, above=0, most=1)
    check_limits("--val-fraction", val_fraction, least=0, below=1)
    check_limits("--seed", seed, least=0, most=2**32 - 1)
    if test_fraction is not None:
        check_limits("--test-fraction", test_fraction, above=0, below=1)
    dataset = open_dataset(
        name,
        data_dir,
        image_size,
        min(resize, default=None),
        grayscale=grayscale,
        crop_to_bbox=crop_to_bbox,
        skip_bad=skip_bad,
        holds_out=test_fraction is not None,
        recorded=recorded,
    )
    parts = split_parts(name, dataset, seed, train_subset, val_fraction, test_fraction)
    train, val, test = (indices for _, indices in parts.values())
    if dataset.measure is not None:
        mean, std = dataset.measure(train)
        dataset = replace(dataset, mean=mean, std=std, measure=None)
    size = dataset.image_shape[:2]
    # The data sets that are gray already are drawn on black: MNIST, Fashion-MNIST, digits
    fill = fill_color(dataset.mean, drawn_on_black=len(dataset.mean) == 1 and not grayscale)
    if augment == "crop-flip-pca" and dataset.image_shape[2] == 1:
        raise UserError("--augment: crop-flip-pca changes colors, and the images are gray; use crop-flip")
    if not 1 <= batch_size <= len(train):
        raise UserError(
            f"--batch-size {batch_size}: the training part of {name} has {len(train)} examples; "
            f"use 1 to {len(train)}, or a larger --train-subset"
        )
    if mean_only:
        dataset = replace(dataset, std=(1.0,) * len(dataset.std))
    if eval_size is not None:
        shape = (*eval_size, dataset.image_shape[2])
        evaluated = open_dataset(
            name,
            data_dir,
            eval_size,
            grayscale=grayscale,
            crop_to_bbox=crop_to_bbox,
            skip_bad=skip_bad,
            holds_out=test_fraction is not None,
            recorded={"image_shape": shape, "mean": dataset.mean, "std": dataset.std},
        )
        others = split_parts(name, evaluated, seed, train_subset, val_fraction, test_fraction)
        parts = {**others, "train": parts["train"]}
    augmentation = Augmentation(
        augment,
        seed,
        size,
        (min(resize), max(resize)) if resize else None,
        fill,
        randaugment,
        random_erase,
        fill_color(dataset.mean),
    )
    mixes = bool(mixup_alpha or cutmix_alpha)
    return Data(
        **vars(dataset),
        name=name,
        train_size=len(train),
        val_size=len(val),
        test_size=len(test),
        batch_size=batch_size,
        seed=seed,
        augmentation=augmentation,
        parts=parts,
        mixing=Mixing(mixup_alpha, cutmix_alpha, seed) if mixes else None,
    )


def open_dataset(
    name: str,
    data_dir: str | None,
    image_size: Size | None,
    resize: int | None = None,
    *,
    grayscale: bool = False,
    crop_to_bbox: bool = False,
    skip_bad: bool = False,
    holds_out: bool = False,
    recorded: Mapping[str, Any] | None = None,
) -> Dataset:
    """Open a data set by the name that `--dataset` takes, unsplit; the arguments are those of `load`.

    `holds_out` is True if a test part will be taken from the training split.
    """
    if image_size is not None:
        check_image_size(*image_size)
    if name not in (*BUILTIN, folder.NAME):
        return tfds_dataset(
            name,
            data_dir,
            image_size,
            resize,
            grayscale=grayscale,
            crop_to_bbox=crop_to_bbox,
            holds_out=holds_out,
        )
    if crop_to_bbox:
        raise UserError(no_boxes(name))
    if name == folder.NAME:
        return folder.folder_dataset(
            data_dir, image_size, resize, grayscale=grayscale, skip_bad=skip_bad, recorded=recorded
        )
    return BUILTIN[name](image_size, resize, grayscale=grayscale)
