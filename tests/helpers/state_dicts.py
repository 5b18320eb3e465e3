"""Names and shapes of the tensors of networks."""

from __future__ import annotations

import re
from typing import Any

import torch

import torch_oracle


def shapes_of(model: str, classes: int = 7, channels: int = 3, **options: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = torch_oracle.MODELS[model](classes, channels, **options)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def with_se(model: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a network with squeeze and excitation, as timm names them."""
    shapes = shapes_of(model)
    for name in list(shapes):
        if re.fullmatch(r"layer\d+\.\d+\.conv2\.weight", name):
            block = name.removesuffix("conv2.weight")
            for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                shapes[f"{block}se.{part}"] = (4,)
    return shapes
