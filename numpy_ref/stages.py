"""The output of every stage of a network. The same function stands in `jax_resnet/stages.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy_ref.layers import Array, no_grad
from numpy_ref.resnet import MODELS
from numpy_ref.state_dict import load_state_dict


def run_stages(
    model: str,
    weights: Mapping[str, Array],
    image: Array,
    num_classes: int,
    *,
    train: bool = False,
    precision: str = "float32",
    **options: Any,
) -> dict[str, Array]:
    """Return the output of every stage, in order: stem, layer1, ..., pool [N, C], logits [N, num_classes].

    Args:
        model: name in `MODELS`.
        weights: a state dict under torchvision's names, in PyTorch's layout.
        image: [N, H, W, C], normalized.
        num_classes: number of logits.
        train: use the batch's statistics in batch norm, instead of the running ones.
        precision: "float32" or "float64".
        options: keyword arguments of the model's builder.

    Returns:
        {stage: array}, feature maps as [N, H', W', C'].

    Raises:
        ValueError: if the state dict does not fit; lists the names.
    """
    network = MODELS[model](num_classes, image.shape[-1], **options, rng=None, dtype=precision)
    load_state_dict(network, weights)
    with no_grad():
        return network.stages(image, train)
