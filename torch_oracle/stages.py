"""The output of each stage of a network. The same function is in `jax_resnet/stages.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from torch_oracle.resnet import MODELS
from torch_oracle.state_dict import Array, load_state_dict


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
    """Return the output of every stage, in order: stem, layer1, ..., pool [N, C] and logits [N, num_classes].

    Args:
        model: name in `MODELS`.
        weights: a state dict under torchvision's names.
        image: [N, H, W, C], normalized; NHWC as in both engines.
        num_classes: number of logits.
        train: batch norm uses the batch's statistics instead of the running ones.
        precision: "float32" or "float64".
        options: keyword arguments of the model's builder.

    Returns:
        {stage: array}, maps as [N, H', W', C'].

    Raises:
        ValueError: the state dict does not fit; it lists the names.
    """
    network = MODELS[model](num_classes, image.shape[-1], **options).to(getattr(torch, precision))
    load_state_dict(network, weights)
    x = torch.from_numpy(np.ascontiguousarray(image.astype(precision).transpose(0, 3, 1, 2)))
    with torch.no_grad():
        stages = network.train(train).stages(x)
    return {
        name: (stage.permute(0, 2, 3, 1) if stage.ndim == 4 else stage).numpy()
        for name, stage in stages.items()
    }
