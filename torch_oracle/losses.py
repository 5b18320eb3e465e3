"""The losses that training minimizes: PyTorch's own, of integer labels or of targets.

Targets are a distribution over the classes for each example: smoothed labels, and labels of mixed images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over the batch of -log softmax(logits [N, C])[label [N]]."""
    return F.cross_entropy(logits, label)


def soft_targets(
    label: Tensor,
    num_classes: int,
    *,
    label_smoothing: float = 0.0,
    label2: Tensor | None = None,
    lam: Tensor | None = None,
) -> Tensor:
    """Return the targets [N, C], float64: a distribution over the classes for each example.

        q = lam * onehot(label) + (1 - lam) * onehot(label2)     the label alone without `label2`
        q' = (1 - s) * q + s / C                                 smoothed by s

    Args:
        label: int64 [N], in range(num_classes).
        num_classes: C.
        label_smoothing: s, in [0, 1): Szegedy et al. 2015, arXiv 1512.00567, section 7.
        label2, lam: the other label of a mixed image, int64 [N], and the share of `label`, [N], in [0, 1]:
            mixup (Zhang et al. 2017, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899).
    """
    target = F.one_hot(label, num_classes).double()
    if label2 is not None and lam is not None:
        share = lam.double()[:, None]
        target = share * target + (1 - share) * F.one_hot(label2, num_classes).double()
    return (1 - label_smoothing) * target + label_smoothing / num_classes


def soft_cross_entropy(logits: Tensor, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean over the batch of -sum_c w_c q_c log softmax(z)_c; logits z, target q [N, C], weights w [C]."""
    return F.cross_entropy(logits, target, weight=class_weights)


def binary_cross_entropy(logits: Tensor, target: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean over batch and classes of w_c (-q_c log s(z_c) - (1 - q_c) log(1 - s(z_c))), s the sigmoid."""
    return F.binary_cross_entropy_with_logits(logits, target, weight=class_weights)


@dataclass(frozen=True)
class Loss:
    """The loss of a batch: the mean of a function of each example alone.

    Attributes:
        kind: "cross-entropy" or "bce".
        label_smoothing: see `soft_targets`.
        class_weights: a factor for each class, [C]; None is 1. The sum is divided by the number of examples,
            as PyTorch does for probabilities.

    Raises:
        ValueError: an unknown kind, or a label smoothing out of range.
    """

    kind: str = "cross-entropy"
    label_smoothing: float = 0.0
    class_weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("cross-entropy", "bce"):
            raise ValueError(f"unknown loss {self.kind!r}; choose cross-entropy or bce")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")

    def __call__(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss.

        Args:
            logits: [N, C].
            batch: {"label": int64 [N]}, and for mixed images "label2" and "lam"; see `soft_targets`.
        """
        plain = self.kind == "cross-entropy" and not self.label_smoothing and self.class_weights is None
        if plain and "label2" not in batch:
            return cross_entropy(logits, batch["label"])
        target = soft_targets(
            batch["label"],
            logits.shape[1],
            label_smoothing=self.label_smoothing,
            label2=batch.get("label2"),
            lam=batch.get("lam"),
        ).to(logits.dtype)
        weights = None if self.class_weights is None else torch.tensor(self.class_weights, dtype=logits.dtype)
        function = binary_cross_entropy if self.kind == "bce" else soft_cross_entropy
        return function(logits, target, weights)
