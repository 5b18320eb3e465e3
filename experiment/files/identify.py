"""Which network a state dict belongs to: model, classes, channels and variants, from names and shapes."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
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
PARTS = {f"{kind}{i}" for kind in ("conv", "bn") for i in (1, 2, 3)} | {"downsample"}  # of a block
PART_NAMES = {"se": "SE modules", "aa": "anti-aliasing filters", "shortcut": "shortcuts"}
HEAD_NAMES = ("fc", "linear")  # the last layer: torchvision's name, and that of many CIFAR checkpoints
LISTED = 4  # how many single tensors `summary` names

# Blocks of each stage.
CIFAR = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}


@dataclass(frozen=True)
class Network:
    """A network in plain values, as the builders of all three implementations take them."""

    model: str
    num_classes: int
    in_channels: int
    image_size: tuple[int, int]  # the usual size of its images; for a `cnn`, the required size
    options: dict[str, Any]

    @property
    def usual_width(self) -> int:
        """The number of channels after the stem that a model of this name has."""
        return 8 if self.model == "cnn" else 16 if self.model in CIFAR else 64

    def __str__(self) -> str:
        """In words: the model, classes, channels, and options that are not the model's own."""
        usual = {"width": self.usual_width, "batch_norm": True, "small_images": False, "stride_in_1x1": False}
        special = [f"{name} {value}" for name, value in self.options.items() if usual.get(name) != value]
        sizes = f"{self.num_classes} classes", f"{self.in_channels} channels"
        return ", ".join([self.model, *sizes, *special])


def torchvision_name(name: str) -> str:
    """Return torchvision's name of a tensor: `fc.*` for `linear.*`, any other as it is."""
    head, dot, rest = name.partition(".")
    return HEAD_NAMES[0] + dot + rest if head in HEAD_NAMES else name


def identify(shapes: Shapes, model: str | None = None, *, stride_in_1x1: bool = False) -> Network:
    """The network whose state dict has tensors of these shapes.

    Args:
        shapes: {name: shape}; `linear.*` is read as `fc.*`.
        model: the model's name, where it is known; the list of blocks is then not looked at.
        stride_in_1x1: the place of a bottleneck's stride, which no tensor shows.

    Raises:
        UserError: the tensors are those of no network that this project knows; what it lacks is named (SE
            modules, grouped or wider convolutions).
    """
    shapes = {torchvision_name(name): shape for name, shape in shapes.items()}
    model, options = _recognize(shapes) if model is None else (model, {})
    _check_blocks(shapes)
    first = "conv.weight" if model == "cnn" else "conv1.weight"
    kernel, head = _shape(shapes, first, 4), _shape(shapes, "fc.weight", 2)
    options["width"] = kernel[0]
    if model == "cnn":
        side = math.isqrt(head[1] // kernel[0])
        if side * side * kernel[0] != head[1]:
            raise UserError(f"fc.weight has {head[1]} columns, of no square image of {kernel[0]} channels")
        size = options["image_size"] = (side, side)
    else:
        options["batch_norm"] = "bn1.weight" in shapes
        size = (224, 224) if kernel[2] == 7 else (32, 32)
        if model not in CIFAR:
            options |= {"small_images": kernel[2] == 3, "stride_in_1x1": stride_in_1x1}
    return Network(model, head[0], kernel[1], size, options)


def summary(names: Iterable[str]) -> str:
    """Summarize tensor names: whole blocks, parts that recur in blocks, other tensors by name.

    `layer1.0.se.fc1.weight`, `layer1.1.se.fc1.weight`, ... are "SE modules (se) in 8 blocks".
    """
    single: list[str] = []
    blocks: dict[tuple[int, int], dict[str, set[str]]] = {}  # of each block {part: names in it}
    for name in names:
        if match := re.match(r"layer(\d+)\.(\d+)\.(\w+)\.?(.*)", name):
            block = blocks.setdefault((int(match[1]), int(match[2])), {})
            block.setdefault(match[3], set()).add(match[4])
        else:
            single.append(name)
    whole: list[str] = []
    blocks_of_part: dict[str, list[str]] = {}
    for (stage, index), parts in sorted(blocks.items()):
        if all("weight" in parts.get(conv, ()) for conv in ("conv1", "conv2")):  # no block is without them
            whole.append(f"layer{stage}.{index}")
            continue
        for part, leaves in sorted(parts.items()):
            label = part if leaves == {"weight"} or len(leaves) > 1 else f"{part}.{min(leaves)}"
            label = f"{PART_NAMES[part]} ({part})" if part in PART_NAMES else label
            blocks_of_part.setdefault(label, []).append(f"layer{stage}.{index}")
    phrases = [*single[:LISTED], *([f"{len(single) - LISTED} more"] if len(single) > LISTED else [])]
    if whole:
        phrases.append(f"{len(whole)} whole blocks ({whole[0]} to {whole[-1]})" if whole[1:] else whole[0])
    parts_of_place: dict[str, list[str]] = {}
    for part, places in blocks_of_part.items():
        parts_of_place.setdefault(" ".join(places), []).append(part)
    for place, labels in parts_of_place.items():
        count = place.count(" ") + 1
        phrases.append(f"{' and '.join(labels)} in {place if count == 1 else f'{count} blocks'}")
    return ", ".join(phrases)


def _check_blocks(shapes: Shapes) -> None:
    """Raise UserError for blocks of ResNets that this project does not have."""
    parts = {name: match[1] for name in shapes if (match := re.match(r"layer\d+\.\d+\.(\w+)", name))}
    foreign = [name for name, part in parts.items() if part not in PARTS]
    if foreign:
        raise UserError(f"it has {summary(foreign)}, which no network here has")
    stem, first, second = (
        shapes.get(name, ()) for name in ("conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight")
    )
    if len(second) == 4 and 0 < second[1] != second[0]:
        groups = second[0] // second[1]
        raise UserError(f"its convolutions have {groups} groups (ResNeXt), which no network here has")
    if stem and first and first[0] != stem[0] > 0:
        times = first[0] / stem[0]
        raise UserError(f"its blocks are {times:g} times as wide as its stem, as in no network here")


def _shape(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that every network has."""
    shape = shapes.get(name)
    if shape is None or len(shape) != ndim or 0 in shape:
        fault = "missing" if shape is None else f"of shape {list(shape)}"
        raise UserError(f"{name} is {fault}: these are not the weights of a network that is known here")
    return shape


def _recognize(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """The model by its list of blocks, and `stage_sizes` where no model has that list."""
    if "conv.weight" in shapes and "conv1.weight" not in shapes:
        return "cnn", {}
    _shape(shapes, "conv1.weight", 4)
    matches = (re.match(r"layer(\d+)\.(\d+)\.", name) for name in shapes)
    blocks = {(int(match[1]), int(match[2])) for match in matches if match}
    count = Counter(stage for stage, _ in blocks)
    stages, sizes = sorted(count), tuple(count[stage] for stage in sorted(count))
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
