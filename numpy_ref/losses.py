"""The losses that training minimizes, each with its gradient by the logits.

`cross_entropy` of integer labels is the plain one (`layers/loss.py`). The others take targets, a distribution
over the classes for each example: smoothed labels, and labels of mixed images. `Loss` chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from numpy_ref.layers.loss import cross_entropy as cross_entropy
from numpy_ref.layers.module import Array


def soft_targets(
    label: Array,
    num_classes: int,
    *,
    label_smoothing: float = 0.0,
    label2: Array | None = None,
    lam: Array | None = None,
    dtype: Any = np.float64,
) -> Array:
    """Return the targets [N, C]: a distribution over the classes for each example.

        q = lam * onehot(label) + (1 - lam) * onehot(label2)     the label alone without `label2`
        q' = (1 - s) * q + s / C                                 smoothed by s

    Args:
        label: int [N], in range(num_classes).
        num_classes: C.
        label_smoothing: s, in [0, 1): Szegedy et al. 2015, arXiv 1512.00567, section 7.
        label2, lam: the other label of a mixed image, int [N], and the share of `label`, [N], in [0, 1]:
            mixup (Zhang et al. 2017, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899).
        dtype: of the result.

    Examples:
        >>> soft_targets(np.array([0]), 2, label_smoothing=0.2)
        array([[0.9, 0.1]])
        >>> soft_targets(np.array([0]), 2, label2=np.array([1]), lam=np.array([0.75]))
        array([[0.75, 0.25]])
    """
    onehot = np.eye(num_classes, dtype=dtype)
    target = onehot[label]
    if label2 is not None and lam is not None:
        share = np.asarray(lam, dtype)[:, None]
        target = share * target + (1 - share) * onehot[label2]
    return np.asarray((1 - label_smoothing) * target + label_smoothing / num_classes, dtype)


def soft_cross_entropy(
    logits: Array, target: Array, class_weights: Array | None = None, *, batch_size: int | None = None
) -> tuple[Any, Array]:
    """Mean over the batch of -sum_c w_c q_c log softmax(z)_c, and its gradient [N, C].

    As PyTorch's `CrossEntropyLoss(weight)` of class probabilities. With p = softmax(z) and
    log p_c = z_c - log sum_k exp(z_k), whose derivative by z_k is [c = k] - p_k:

        dL/dz_k = (p_k * sum_c w_c q_c - w_k q_k) / N

    Args:
        logits: z, [N, C].
        target: q, [N, C]; see `soft_targets`.
        class_weights: w, [C]; None is 1 for each class.
        batch_size: of the whole batch, if the N examples are a part of it.

    Examples:
        >>> loss, dlogits = soft_cross_entropy(np.zeros((1, 2)), np.array([[0.75, 0.25]]))
        >>> round(float(loss), 4), dlogits
        (0.6931, array([[-0.25,  0.25]]))
    """
    logits = as_float(logits)
    n = len(logits) if batch_size is None else batch_size
    weighted = target if class_weights is None else target * class_weights
    shifted = logits - logits.max(1, keepdims=True)
    exponentials = np.exp(shifted)
    total = exponentials.sum(1, keepdims=True)
    loss = (weighted * (np.log(total) - shifted)).sum() / n
    dlogits = (exponentials / total * weighted.sum(1, keepdims=True) - weighted) / n
    return loss, dlogits


def binary_cross_entropy(
    logits: Array, target: Array, class_weights: Array | None = None, *, batch_size: int | None = None
) -> tuple[Any, Array]:
    """Mean over batch and classes of w_c (-q_c log s(z_c) - (1 - q_c) log(1 - s(z_c))), and its gradient.

    As PyTorch's `BCEWithLogitsLoss(weight)`: each class is a yes or no of its own, with the sigmoid
    s(z) = 1 / (1 + exp(-z)) ("ResNet strikes back", arXiv 2110.00476, section 2). -log s(z) is
    log(1 + exp(-z)), and -log(1 - s(z)) is z + log(1 + exp(-z)). So the bracket is
    (1 - q) z + log(1 + exp(-z)), and its derivative by z is s(z) - q:

        dL/dz_c = w_c (s(z_c) - q_c) / (N C)

    log(1 + exp(-z)) is computed as max(-z, 0) + log(1 + exp(-|z|)), which does not overflow.

    Args:
        logits: z, [N, C].
        target: q, [N, C]; see `soft_targets`.
        class_weights: w, [C]; None is 1 for each class.
        batch_size: of the whole batch, if the N examples are a part of it.

    Examples:
        >>> loss, dlogits = binary_cross_entropy(np.zeros((1, 2)), np.array([[1.0, 0.0]]))
        >>> round(float(loss), 4), dlogits
        (0.6931, array([[-0.25,  0.25]]))
    """
    logits = as_float(logits)
    n, num_classes = logits.shape
    count = (n if batch_size is None else batch_size) * num_classes
    weight = np.ones(num_classes, logits.dtype) if class_weights is None else class_weights
    small = np.exp(-np.abs(logits))  # at most 1
    terms = (1 - target) * logits + np.maximum(-logits, 0) + np.log1p(small)
    sigmoid = np.where(logits >= 0, 1, small) / (1 + small)
    return (weight * terms).sum() / count, weight * (sigmoid - target) / count


def as_float(logits: Array) -> Array:
    """Logits of float32 or wider."""
    logits = np.asarray(logits)
    return logits.astype(np.promote_types(logits.dtype, np.float32), copy=False)


@dataclass(frozen=True)
class Loss:
    """The loss of a batch: the mean of a function of each example alone.

    So the value does not depend on how a batch is divided among processes.

    Attributes:
        kind: "cross-entropy" or "bce".
        label_smoothing: see `soft_targets`.
        class_weights: a factor for each class, [C]; None is 1. The sum is divided by the number of examples,
            not by their weights: PyTorch's `CrossEntropyLoss(weight)` does so for probabilities, and divides
            by the weights for integer labels.

    Raises:
        ValueError: an unknown kind, or a label smoothing out of range.

    Examples:
        >>> loss, dlogits = Loss("bce", label_smoothing=0.1)(np.zeros((1, 2)), {"label": np.array([0])})
        >>> dlogits.round(4)
        array([[-0.225,  0.225]])
    """

    kind: str = "cross-entropy"
    label_smoothing: float = 0.0
    class_weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("cross-entropy", "bce"):
            raise ValueError(f"unknown loss {self.kind!r}; choose cross-entropy or bce")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")

    def __call__(
        self, logits: Array, batch: Mapping[str, Array], batch_size: int | None = None
    ) -> tuple[Any, Array]:
        """Return the loss and its gradient [N, C].

        Args:
            logits: [N, C].
            batch: {"label": int [N]}, and for mixed images "label2" and "lam"; see `soft_targets`.
            batch_size: of the whole batch, if the N examples are a part of it.
        """
        plain = self.kind == "cross-entropy" and not self.label_smoothing and self.class_weights is None
        if plain and "label2" not in batch:
            return cross_entropy(logits, batch["label"], batch_size)
        logits = as_float(logits)
        target = soft_targets(
            batch["label"],
            logits.shape[1],
            label_smoothing=self.label_smoothing,
            label2=batch.get("label2"),
            lam=batch.get("lam"),
            dtype=logits.dtype,
        )
        weights = None if self.class_weights is None else np.asarray(self.class_weights, logits.dtype)
        function = binary_cross_entropy if self.kind == "bce" else soft_cross_entropy
        return function(logits, target, weights, batch_size=batch_size)


PLAIN = Loss()
"""Cross-entropy of integer labels."""
