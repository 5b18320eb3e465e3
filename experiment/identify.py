"""Which network a state dict belongs to: model, classes, channels and variants, from names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiment.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]

IMAGENET = {  # name: (has bottlenecks, blocks of each stage)
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}
# Blocks of each stage.
CIFAR = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}


@dataclass(frozen=True)
class Network:
    """A network in plain values, as the builders of all three rooms take them."""

    model: str
    num_classes: int
    in_channels: int
    image_size: tuple[int, int]  # what pictures of it usually have; of a `cnn`, what they must have
    options: dict[str, Any]

    def __str__(self) -> str:
        """In words: the model, classes, channels, and options that are not the model's own."""
        usual = {"width": 8 if self.model == "cnn" else 16 if self.model in CIFAR else 64, "batch_norm": True}
        usual |= {"small_images": False, "stride_in_1x1": False}
        special = [f"{name} {value}" for name, value in self.options.items() if usual.get(name) != value]
        return ", ".join(
            [self.model, f"{self.num_classes} classes", f"{self.in_channels} channels", *special]
        )


def identify(shapes: Shapes, model: str | None = None, *, stride_in_1x1: bool = False) -> Network:
    """The network whose state dict has tensors of these shapes.

    Args:
        shapes: {name: shape}; `linear.*` is read as `fc.*`.
        model: the model's name, where it is known; the list of blocks is then not looked at.
        stride_in_1x1: of the two places of a bottleneck's stride the first; no tensor tells which.

    Raises:
        UserError: the tensors are those of no network that this project knows.
    """
    shapes = {re.sub(r"^linear\.", "fc.", name): shape for name, shape in shapes.items()}
    if model is None:
        model, options = _recognise(shapes)
    else:
        options = {}
    first = "conv.weight" if model == "cnn" else "conv1.weight"
    kernel, head = _shape(shapes, first, 4), _shape(shapes, "fc.weight", 2)
    options["width"] = kernel[0]
    if model == "cnn":
        side = math.isqrt(head[1] // kernel[0])
        if side * side * kernel[0] != head[1]:
            raise UserError(f"fc.weight has {head[1]} columns, of no square picture of {kernel[0]} channels")
        size = options["image_size"] = (side, side)
    else:
        options["batch_norm"] = "bn1.weight" in shapes
        size = (224, 224) if kernel[2] == 7 else (32, 32)
        if model not in CIFAR:
            options |= {"small_images": kernel[2] == 3, "stride_in_1x1": stride_in_1x1}
    return Network(model, head[0], kernel[1], size, options)


def _shape(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that every network has."""
    shape = shapes.get(name)
    if shape is None or len(shape) != ndim:
        found = "missing" if shape is None else f"of shape {list(shape)}"
        raise UserError(f"{name} is {found}: these are not the weights of a network that is known here")
    return shape


def _recognise(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """The model by its list of blocks, and `stage_sizes` where no model has that list."""
    if "conv.weight" in shapes and "conv1.weight" not in shapes:
        return "cnn", {}
    _shape(shapes, "conv1.weight", 4)
    blocks = [
        tuple(map(int, found.groups()))
        for name in shapes
        if (found := re.match(r"layer(\d+)\.(\d+)\.", name))
    ]
    stages = sorted({stage for stage, _ in blocks})
    sizes = tuple(len({index for stage, index in blocks if stage == each}) for each in stages)
    if not sizes or stages != list(range(1, len(sizes) + 1)):
        raise UserError("there are no residual blocks layer1.0, ...: give the model with --model")
    bottleneck = "layer1.0.conv3.weight" in shapes
    if len(sizes) > 1 and not any(name.startswith("layer2.0.downsample.") for name in shapes):
        for model, n in CIFAR.items():
            if sizes == (n, n, n) and not bottleneck:
                return model, {}
        raise UserError(
            f"stages of {', '.join(map(str, sizes))} blocks without downsample.* are no network of the CIFAR "
            f"family ({', '.join(CIFAR)}): give the model with --model"
        )
    for model, known in IMAGENET.items():
        if known == (bottleneck, sizes):
            return model, {}
    return "resnet50" if bottleneck else "resnet18", {"stage_sizes": sizes}
