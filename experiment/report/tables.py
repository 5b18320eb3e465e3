"""What predictions say of the classes: who is taken for whom, and how well each is found."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from experiment.files.predictions import Predictions

MOST_PAIRS = 15


class ClassRow(NamedTuple):
    """One class of the test set; a ratio is not-a-number where there is nothing to divide by."""

    name: str
    examples: int
    recall: float  # of those that are of the class, the share found
    precision: float  # of those said to be, the share that is
    f1: float
    taken_for: str  # the class most often said instead, or ""


class Confused(NamedTuple):
    """Examples of one class that were taken for another."""

    true: str
    predicted: str
    errors: int
    share: float  # of the examples of the true class


def confusion(found: Predictions) -> npt.NDArray[np.int64]:
    """How many examples of class i were taken for class j, [classes, classes]."""
    k = len(found.class_names)
    pairs = found.labels.astype(np.int64) * k + found.predictions
    return np.bincount(pairs, minlength=k * k).reshape(k, k)


def class_table(found: Predictions) -> list[ClassRow]:
    """A row for each class, in their order."""
    matrix = confusion(found)
    hits, labels, predictions = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore"):
        recall, precision, f1 = hits / labels, hits / predictions, 2 * hits / (labels + predictions)
    errors = matrix - np.diag(hits)
    most = errors.argmax(1)
    return [
        ClassRow(
            name,
            int(labels[i]),
            float(recall[i]),
            float(precision[i]),
            float(f1[i]),
            found.class_names[most[i]] if errors[i, most[i]] else "",
        )
        for i, name in enumerate(found.class_names)
    ]


def most_confused(found: Predictions) -> list[Confused]:
    """The pairs of classes with the most errors, from the most on."""
    matrix = confusion(found)
    labels = matrix.sum(1)
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:MOST_PAIRS]
    names = found.class_names
    return [
        Confused(names[i], names[j], int(matrix[i, j]), float(matrix[i, j] / labels[i]))
        for i, j in zip(*np.unravel_index(order, matrix.shape), strict=True)
        if matrix[i, j]
    ]
