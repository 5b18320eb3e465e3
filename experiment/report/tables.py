"""Tables of classes from predictions: precision, recall, F1, and the pairs most often confused."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from experiment.files.predictions import Predictions

MOST_PAIRS = 15


class ClassRow(NamedTuple):
    """One class of the test set; a ratio is NaN where there is nothing to divide by."""

    name: str
    examples: int
    recall: float  # of those that are of the class, the share recognized
    precision: float  # of those predicted to be of the class, the share that is
    f1: float
    taken_for: str  # the class most often predicted instead, or ""


class Confused(NamedTuple):
    """Examples of one class that were taken for another."""

    true: str
    predicted: str
    errors: int
    share: float  # of the examples of the true class


def confusion(predictions: Predictions) -> npt.NDArray[np.int64]:
    """Return the number of examples of class i that were predicted as class j, [classes, classes]."""
    k = len(predictions.class_names)
    pairs = predictions.labels.astype(np.int64) * k + predictions.predictions
    return np.bincount(pairs, minlength=k * k).reshape(k, k)


def class_table(predictions: Predictions) -> list[ClassRow]:
    """A row for each class, in their order."""
    matrix = confusion(predictions)
    hits, labels, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore"):
        recall, precision, f1 = hits / labels, hits / predicted, 2 * hits / (labels + predicted)
    errors = matrix - np.diag(hits)
    most = errors.argmax(1)
    names = predictions.class_names
    taken_for = [names[j] if row[j] else "" for row, j in zip(errors, most, strict=True)]
    numbers = (column.tolist() for column in (labels, recall, precision, f1))
    return [ClassRow(*row) for row in zip(names, *numbers, taken_for, strict=True)]


def most_confused(predictions: Predictions) -> list[Confused]:
    """The pairs of classes with the most errors, from the most on."""
    matrix = confusion(predictions)
    labels = matrix.sum(1)
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:MOST_PAIRS]
    names = predictions.class_names
    return [
        Confused(names[i], names[j], int(matrix[i, j]), float(matrix[i, j] / labels[i]))
        for i, j in zip(*np.unravel_index(order, matrix.shape), strict=True)
        if matrix[i, j]
    ]
