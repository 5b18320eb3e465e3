"""The cross-entropy of a softmax, which networks are trained to minimize."""

from __future__ import annotations

from typing import Any

import numpy as np

from numpy_ref.layers.module import Array


def check_labels(label: Array, num_classes: int, examples: int) -> Array:
    """Return labels [N] as an array.

    Raises ValueError that names the shape, the type or the first wrong label. NumPy would take -1 for the
    last class, and a column [N, 1] or one-hot rows for more examples.
    """
    label = np.asarray(label)
    if label.shape != (examples,):
        hint = "; of one-hot rows take label.argmax(1)" if label.shape == (examples, num_classes) else ""
        raise ValueError(f"labels must have shape ({examples},), one class each, got {label.shape}{hint}")
    if label.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got {label.dtype}")
    if examples and not 0 <= label.min() <= label.max() < num_classes:
        index = int(np.argmax((label < 0) | (label >= num_classes)))
        raise ValueError(f"label {index} is {label[index]}, where classes are 0 to {num_classes - 1}")
    return label


def cross_entropy(logits: Array, label: Array, batch_size: int | None = None) -> tuple[Any, Array]:
    """Mean over the batch of -log softmax(logits [N, C])[label [N]], and its gradient [N, C].

    If the N examples are only a part of the batch, `batch_size` is that of the whole batch, and the loss is
    their contribution to its mean.

    With p = softmax(z): -log p_label = -z_label + log sum_k exp(z_k), whose derivative by z_k is p_k, less 1
    where k is the label. The largest logit is subtracted before exp: p stays the same, and nothing overflows.

    Raises ValueError for labels that are not N integers in range(C), and for a batch of 0 examples.
    """
    logits = np.asarray(logits)
    logits = logits.astype(np.promote_types(logits.dtype, np.float32), copy=False)
    label = check_labels(label, logits.shape[1], len(logits))
    n = len(logits) if batch_size is None else batch_size
    if n < 1:
        raise ValueError("the mean loss of a batch of 0 examples is not defined")
    shifted = logits - logits.max(1, keepdims=True)
    exponentials = np.exp(shifted)
    total = exponentials.sum(1, keepdims=True)
    at_label = np.arange(len(logits)), label
    loss = (np.log(total[:, 0]) - shifted[at_label]).sum() / n
    dlogits = exponentials / total
    dlogits[at_label] -= 1
    dlogits /= n
    return loss, dlogits
