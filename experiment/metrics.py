"""Loss, accuracy, top-5 and macro F1 from logits, accumulated batch by batch; the same for every engine."""

from __future__ import annotations

from typing import Any

import numpy as np


class Metrics:
    """Running totals over examples: a flat dict of small arrays, so that a checkpoint can hold them.

    `f1` is the macro average over the classes that occur among the labels or the predictions, as
    scikit-learn's `f1_score(average="macro")` has it.
    """

    def __init__(self, num_classes: int) -> None:
        self.examples = 0
        self.loss_sum = 0.0
        self.top5 = 0
        self.hits = np.zeros(num_classes, np.int64)  # true positives of each class
        self.labels = np.zeros(num_classes, np.int64)
        self.predictions = np.zeros(num_classes, np.int64)

    def update(self, logits: np.ndarray, label: np.ndarray, loss: float | None = None) -> None:
        """Add a batch: logits [N, classes], label [N]; `loss` is its mean cross-entropy if known already."""
        n, num_classes = logits.shape
        prediction = logits.argmax(1)
        self.examples += n
        self.loss_sum += (cross_entropy(logits, label) if loss is None else loss) * n
        self.hits += np.bincount(label[prediction == label], minlength=num_classes)
        self.labels += np.bincount(label, minlength=num_classes)
        self.predictions += np.bincount(prediction, minlength=num_classes)
        # As in argmax, the lowest class goes first among equals, and NaN counts as larger.
        true, lower = logits[np.arange(n), label][:, None], np.arange(num_classes) < label[:, None]
        ahead = ~(logits <= true) | ((logits == true) & lower)
        self.top5 += int((ahead.sum(1) < 5).sum())

    def compute(self) -> dict[str, float]:
        """{"loss", "accuracy", "f1", "top5"}; empty if nothing was added."""
        if not self.examples:
            return {}
        present = self.labels + self.predictions > 0
        f1 = 2 * self.hits[present] / (self.labels + self.predictions)[present]
        return {
            "loss": self.loss_sum / self.examples,
            "accuracy": float(self.hits.sum() / self.examples),
            "f1": float(f1.mean()),
            "top5": self.top5 / self.examples,
        }

    def to_json(self) -> dict[str, Any]:
        """The totals as plain values; Python's JSON writes floats so that they read back to the same bits."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, totals: dict[str, Any]) -> Metrics:
        """The inverse of `to_json`."""
        metrics = cls(len(totals["hits"]))
        for name, value in totals.items():
            setattr(metrics, name, np.array(value, np.int64) if isinstance(value, list) else value)
        return metrics


def cross_entropy(logits: np.ndarray, label: np.ndarray) -> float:
    """Mean of -log softmax(logits)[label] over a batch, in float64."""
    likelihood = log_softmax(logits)[np.arange(len(label)), label].mean()
    return float(0.0 - likelihood)  # and not -likelihood, which is -0.0 where all are certain


def softmax(logits: np.ndarray) -> np.ndarray:
    """Class probabilities of logits [N, classes], in float64; NaN for a row that is not finite."""
    exponentials = np.exp(_shifted(logits))
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the class probabilities of logits [N, classes], in float64."""
    shifted = _shifted(logits)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def _shifted(logits: np.ndarray) -> np.ndarray:
    """The logits less the largest of their row, so that no exponential overflows."""
    z = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf
        return np.asarray(z - z.max(1, keepdims=True))
