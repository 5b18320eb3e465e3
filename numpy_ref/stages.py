"""What each stage of a network makes of pictures. The same function stands in `jax_resnet/stages.py`."""

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
    """The output of every stage, in order: stem, layer1, ..., pool [N, C] and logits [N, num_classes].

    Args:
        model: name in `MODELS`.
        weights: a state dict under torchvision's names, in PyTorch's layout.
        image: [N, H, W, C], normalised.
        num_classes: number of logits.
        train: batch norm takes the batch's statistics instead of the running ones.
        precision: "float32" or "float64".
        options: keyword arguments of the model's builder.

    Returns:
        {stage: array}, maps as [N, H', W', C'].

    Raises:
        ValueError: the state dict does not fit; it lists the names.
    """
    network = MODELS[model](num_classes, image.shape[-1], **options, rng=None, dtype=precision)
    load_state_dict(network, weights)
    with no_grad():
        return network.stages(image, train)
