"""The losses that training minimizes.

`cross_entropy` of integer labels is the plain one. The others take targets, a distribution over the classes
for each example: smoothed labels, and labels of mixed images. `Loss` chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Mean over the batch of -log softmax(logits [N, C])[label [N]]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


def soft_targets(
    label: jax.Array,
    num_classes: int,
    *,
    label_smoothing: float = 0.0,
    label2: jax.Array | None = None,
    lam: jax.Array | None = None,
    dtype: Any = None,
) -> jax.Array:
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
        >>> print(soft_targets(jnp.array([0]), 2, label_smoothing=0.2))
        [[0.9 0.1]]
        >>> print(soft_targets(jnp.array([0]), 2, label2=jnp.array([1]), lam=jnp.array([0.75])))
        [[0.75 0.25]]
    """
    target = jax.nn.one_hot(label, num_classes, dtype=dtype)
    if label2 is not None and lam is not None:
        share = lam.astype(target.dtype)[:, None]
        target = share * target + (1 - share) * jax.nn.one_hot(label2, num_classes, dtype=dtype)
    return (1 - label_smoothing) * target + label_smoothing / num_classes


def soft_cross_entropy(
    logits: jax.Array, target: jax.Array, class_weights: jax.Array | None = None
) -> jax.Array:
    """Mean over the batch of -sum_c w_c q_c log softmax(z)_c.

    As PyTorch's `CrossEntropyLoss(weight)` of class probabilities.

    Args:
        logits: z, [N, C].
        target: q, [N, C]; see `soft_targets`.
        class_weights: w, [C]; None is 1 for each class.

    Examples:
        >>> print(soft_cross_entropy(jnp.zeros((1, 2)), jnp.array([[0.75, 0.25]])))
        0.6931472
    """
    weighted = target if class_weights is None else target * class_weights
    return -(weighted * jax.nn.log_softmax(logits)).sum(1).mean()


def binary_cross_entropy(
    logits: jax.Array, target: jax.Array, class_weights: jax.Array | None = None
) -> jax.Array:
    """Mean over batch and classes of w_c (-q_c log s(z_c) - (1 - q_c) log(1 - s(z_c))).

    As PyTorch's `BCEWithLogitsLoss(weight)`: each class is a yes or no of its own, with the sigmoid
    s(z) = 1 / (1 + exp(-z)) ("ResNet strikes back", arXiv 2110.00476, section 2).

    Args:
        logits: z, [N, C].
        target: q, [N, C]; see `soft_targets`.
        class_weights: w, [C]; None is 1 for each class.

    Examples:
        >>> print(binary_cross_entropy(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])))
        0.6931472
    """
    terms = optax.sigmoid_binary_cross_entropy(logits, target)
    return (terms if class_weights is None else class_weights * terms).mean()


@dataclass(frozen=True)
class Loss:
    """The loss of a batch: the mean of a function of each example alone.

    So the value does not depend on how a batch is divided into micro-batches or among devices.

    Attributes:
        kind: "cross-entropy" or "bce".
        label_smoothing: see `soft_targets`.
        class_weights: a factor for each class, [C]; None is 1. The sum is divided by the number of examples,
            not by their weights: PyTorch's `CrossEntropyLoss(weight)` does so for probabilities, and divides
            by the weights for integer labels.

    Raises:
        ValueError: an unknown kind, or a label smoothing out of range.

    Examples:
        >>> print(Loss("bce", label_smoothing=0.1)(jnp.zeros((1, 2)), {"label": jnp.array([0])}))
        0.6931472
    """

    kind: str = "cross-entropy"
    label_smoothing: float = 0.0
    class_weights: Sequence[float] | jax.Array | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("cross-entropy", "bce"):
            raise ValueError(f"unknown loss {self.kind!r}; choose cross-entropy or bce")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")

    def __call__(self, logits: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
        """Return the loss.

        Args:
            logits: [N, C].
            batch: {"label": int [N]}, and for mixed images "label2" and "lam"; see `soft_targets`.
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
            dtype=logits.dtype,
        )
        weights = None if self.class_weights is None else jnp.asarray(self.class_weights, logits.dtype)
        function = binary_cross_entropy if self.kind == "bce" else soft_cross_entropy
        return function(logits, target, weights)


PLAIN = Loss()
"""Cross-entropy of integer labels."""


def labels_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that a loss takes."""
    return {name: batch[name] for name in ("label", "label2", "lam") if name in batch}
