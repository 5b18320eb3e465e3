"""Which examples are training, validation and test: by the set's own parts, else by the seed."""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from experiment.data.types import Dataset, Source
from experiment.errors import UserError
from experiment.options.config import Config

Split = Literal["train", "val", "test"]
Part = tuple[Source, npt.NDArray[np.int64]]
"""A source, and the indices [n] of its examples that belong to the part."""

VAL_FRACTION: float = Config.val_fraction
TEST_FRACTION = 0.1
"""The default of --test-fraction, of a set that has nothing but examples to train on."""


def split_parts(
    name: str,
    dataset: Dataset,
    seed: int,
    train_subset: float,
    val_fraction: float,
    test_fraction: float | None,
) -> dict[Split, Part]:
    """Return the sources and sorted indices of training, validation and test.

    A test part that is held out does not depend on the seed, so that runs of several seeds are tested alike.
    """
    pool = np.arange(len(dataset.train))
    if dataset.test is not None:
        if test_fraction is not None:
            raise UserError(f"--test-fraction: {name} has a test part; leave the flag out")
        test: Part = dataset.test, np.arange(len(dataset.test))
    else:
        fraction = TEST_FRACTION if test_fraction is None else test_fraction
        order, size = np.random.default_rng(0).permutation(pool), max(1, round(len(pool) * fraction))
        if size >= len(pool):
            raise UserError(f"--test-fraction {fraction:g} leaves no example to train on; use a smaller one")
        test, pool = (dataset.train, np.sort(order[:size])), np.sort(order[size:])
    if dataset.val is None:
        train, val = (pool[part] for part in split_indices(len(pool), seed, train_subset, val_fraction))
        return {"train": (dataset.train, train), "val": (dataset.train, val), "test": test}
    if val_fraction not in (0, VAL_FRACTION):
        raise UserError(
            f"--val-fraction: {name} has a validation part; leave the flag out, or give 0 to do without it"
        )
    train, _ = split_indices(len(pool), seed, train_subset, 0.0)
    val = np.arange(len(dataset.val) if val_fraction else 0)
    return {"train": (dataset.train, pool[train]), "val": (dataset.val, val), "test": test}


def split_indices(
    size: int, seed: int, train_subset: float, val_fraction: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the sorted indices of the training and of the validation part."""
    used = np.random.default_rng(seed).permutation(size)[: max(1, round(size * train_subset))]
    val_size = max(1, round(len(used) * val_fraction)) if val_fraction else 0
    if val_size >= len(used):
        raise UserError(
            f"--train-subset {train_subset:g} and --val-fraction {val_fraction:g} leave no example to train "
            "on; use a larger subset or a smaller fraction"
        )
    # Sorted, because files are read fastest from front to back; training is shuffled anyway.
    return np.sort(used[val_size:]), np.sort(used[:val_size])


def stratified_split(
    labels: npt.NDArray[np.integer], test_fraction: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the indices of the training and of the test part, with each class in both in proportion.

    They are those of scikit-learn's `train_test_split(..., stratify=labels, random_state=0)`.
    """
    generator = np.random.RandomState(0)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    sizes = np.array([len(indices) for indices in members])
    test_size = math.ceil(test_fraction * len(labels))
    train_sizes = _proportional(sizes, len(labels) - test_size, generator)
    test_sizes = _proportional(sizes - train_sizes, test_size, generator)
    train, test = [], []
    for indices, train_count, test_count in zip(members, train_sizes, test_sizes, strict=True):
        shuffled = indices[generator.permutation(len(indices))]
        train.append(shuffled[:train_count])
        test.append(shuffled[train_count : train_count + test_count])
    return generator.permutation(np.concatenate(train)), generator.permutation(np.concatenate(test))


def _proportional(
    sizes: npt.NDArray[np.int64], count: int, generator: np.random.RandomState
) -> npt.NDArray[np.int64]:
    """Return how many of each class of these sizes are drawn so that it is `count` in all.

    Numbers are rounded down. The classes with the largest remainders then get one more, equal ones by chance.
    """
    exact = sizes / sizes.sum() * count
    drawn = np.floor(exact)
    remainders = exact - drawn
    for remainder in np.unique(remainders)[::-1]:
        missing = int(count - drawn.sum())
        if missing == 0:
            break
        equal = np.flatnonzero(remainders == remainder)
        drawn[generator.choice(equal, min(len(equal), missing), replace=False)] += 1
    numbers: npt.NDArray[np.int64] = drawn.astype(np.int64)
    return numbers
