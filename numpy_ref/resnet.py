"""ResNets in plain NumPy: the ImageNet family, the CIFAR family, and a small CNN to show how the parts work.

He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385. Inputs are [N, H, W, C] with
H and W of 32 or more, outputs logits [N, num_classes]. The same names stand in `jax_resnet/resnet.py` and
`torch_oracle/resnet.py`; state dicts carry torchvision's names and layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from numpy_ref import fast as fast_layers
from numpy_ref import layers as plain_layers
from numpy_ref.layers import (
    Array,
    BatchNorm,
    Flatten,
    GlobalAvgPool2d,
    Layer,
    Linear,
    NoNorm,
    OptionA,
    ReLU,
    Sequential,
    no_grad,
)

Norm = BatchNorm | NoNorm


class _Kit:
    """Makes the layers of one network: all of one type, plain or fast, with batch norm or without."""

    def __init__(
        self, *, rng: np.random.Generator | None, dtype: npt.DTypeLike, fast: bool, batch_norm: bool = True
    ) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise ValueError(f"dtype must be float32 or float64, not {self.dtype}")
        forms: Any = fast_layers if fast else plain_layers
        self.conv = partial(forms.Conv2d, bias=not batch_norm, rng=rng, dtype=dtype)
        self.norm = partial(forms.BatchNorm, dtype=dtype) if batch_norm else _no_norm
        self.max_pool = forms.MaxPool2d
        self.linear = partial(Linear, rng=rng, dtype=dtype)

    def shortcut(self, kind: str, in_channels: int, out_channels: int, stride: int) -> Layer | None:
        """What stands on the short path where the shape changes; elsewhere nothing, as in torchvision."""
        if kind not in ("projection", "option-A"):
            raise ValueError(f'shortcut must be "projection" or "option-A", not {kind!r}')
        if stride == 1 and in_channels == out_channels:
            return None
        if kind == "option-A":
            return OptionA(in_channels, out_channels, stride=stride)
        return Sequential(self.conv(in_channels, out_channels, 1, stride=stride), self.norm(out_channels))


def _no_norm(num_features: int, *, relu: bool = False) -> NoNorm:
    return NoNorm(relu=relu)


class _Block(Layer):
    """A residual branch, and a shortcut round it that joins the sum inside the branch's last norm."""

    downsample: Layer | None

    def branch(self) -> list[tuple[Layer, Norm]]:
        """The pairs of convolution and norm on the residual branch, in order."""
        raise NotImplementedError

    @property
    def last_norm(self) -> Norm:
        """The batch norm that ends the residual branch."""
        return self.branch()[-1][1]

    def forward(self, x: Array, train: bool = False) -> Array:
        """y = relu(branch(x) + shortcut(x)); the norms hold the ReLUs, the last one the sum."""
        shortcut = x if self.downsample is None else self.downsample.forward(x, train)
        *inner, (conv, norm) = self.branch()
        y = x
        for inner_conv, inner_norm in inner:
            y = inner_norm.forward(inner_conv.forward(y, train), train)
        return norm.forward(conv.forward(y, train), train, shortcut)

    def backward(self, dy: Array) -> Array:
        """x enters y by two ways, so dL/dx is the sum of what comes back on each."""
        for conv, norm in reversed(self.branch()):
            dy = conv.backward(norm.backward(dy))
        dshortcut = self.last_norm.dshortcut
        assert dshortcut is not None
        dy += dshortcut if self.downsample is None else self.downsample.backward(dshortcut)
        return dy


class BasicBlock(_Block):
    """Two 3x3 convolutions and a shortcut (figure 5, left). [N, H, W, I] to [N, H', W', width]."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        kit: _Kit,
        *,
        stride: int = 1,
        shortcut: str = "projection",
        stride_in_1x1: bool = False,
    ) -> None:
        self.conv1 = kit.conv(in_channels, width, 3, stride=stride, padding=1)
        self.bn1 = kit.norm(width, relu=True)
        self.conv2 = kit.conv(width, width, 3, padding=1)
        self.bn2 = kit.norm(width, relu=True)
        self.downsample = kit.shortcut(shortcut, in_channels, width, stride)

    def branch(self) -> list[tuple[Layer, Norm]]:
        """conv1, bn1, ReLU, conv2, bn2."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (figure 5, right). [N, H, W, I] to [.., 4 * width].

    The stride sits on the 3x3 (v1.5, torchvision's) or, with `stride_in_1x1`, on the first 1x1 (the paper's).
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        kit: _Kit,
        *,
        stride: int = 1,
        shortcut: str = "projection",
        stride_in_1x1: bool = False,
    ) -> None:
        out_channels = width * self.expansion
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = kit.conv(in_channels, width, 1, stride=stride1)
        self.bn1 = kit.norm(width, relu=True)
        self.conv2 = kit.conv(width, width, 3, stride=stride2, padding=1)
        self.bn2 = kit.norm(width, relu=True)
        self.conv3 = kit.conv(width, out_channels, 1)
        self.bn3 = kit.norm(out_channels, relu=True)
        self.downsample = kit.shortcut(shortcut, in_channels, out_channels, stride)

    def branch(self) -> list[tuple[Layer, Norm]]:
        """conv1, bn1, ReLU, conv2, bn2, ReLU, conv3, bn3."""
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


Block = type[BasicBlock] | type[Bottleneck]


class Network(Layer):
    """Layers one after another, from pictures to logits, in stages that have names.

    Attributes:
        dtype: of every array.
        frozen: how many layers of the body, from the first, are held: see `freeze_backbone`.
    """

    dtype: np.dtype[Any]
    frozen = 0

    def body(self) -> Iterator[tuple[str, Layer]]:
        """The layers in order, each with the name of the stage it belongs to."""
        raise NotImplementedError

    def stages(self, x: Array, train: bool = False) -> dict[str, Array]:
        """The output of every stage, in order."""
        out = {}
        x = np.asarray(x, self.dtype)
        for stage, layer in self.body():
            x = out[stage] = layer.forward(x, train)
        return out

    def freeze_backbone(self) -> None:
        """Hold everything but the head `fc`: those layers always compute as in evaluation, keep nothing for
        backward, and have no part in it."""
        for name, parameter in self.named_parameters().items():
            parameter.trainable = name.startswith("fc.")
        self.frozen = len(list(self.body())) - 1

    def trained_layers(self) -> list[Layer]:
        """The layers of the body that are not held, in order."""
        return [layer for _, layer in self.body()][self.frozen :]

    def forward(self, x: Array, train: bool = False) -> Array:
        """Pictures [N, H, W, C] to logits [N, num_classes]."""
        x = np.asarray(x, self.dtype)
        for _, layer in islice(self.body(), self.frozen):
            with no_grad():
                x = layer.forward(x)
        for layer in self.trained_layers():
            x = layer.forward(x, train)
        return x

    def backward(self, dy: Array, done: Callable[[Layer], object] = lambda layer: None) -> Array:
        """dL/dlogits [N, num_classes] to dL/dx [N, H, W, C], or to that of the first layer that is not held.

        Layers forget their forward pass on the way. `done(layer)` is called when backward needs nothing of a
        layer of the body any more and its gradients are complete.
        """
        for layer in reversed(self.trained_layers()):
            dy = layer.backward(dy)
            layer.forget()
            done(layer)
        return dy


class ResNet(Network):
    """A stem, three or four stages of residual blocks, global average pooling and a linear layer (table 1).

    Args:
        block: BasicBlock or Bottleneck.
        stage_sizes: how many blocks each stage has; stage s is width * 2**s wide, and all but the first halve
            height and width.
        num_classes: the number of logits.
        in_channels: channels of the pictures.
        width: channels of the stem and base width of the first stage.
        stem: "imagenet", a 7x7 convolution and 3x3 max-pooling, both of stride 2; or "small", a 3x3
            convolution of stride 1.
        shortcut: "projection" (1x1 convolution, option B) or "option-A", where shapes differ.
        stride_in_1x1: the paper's place of a bottleneck's stride.
        batch_norm: without it, every convolution has a bias.
        residual_scale: the initial weight of the batch norm that ends each block. 1 is torchvision's; a
            small one lets blocks start close to their shortcuts (De & Smith 2020, arXiv 2002.10444).
        rng: source of the initial weights; `default_rng(s)` gives those of `nnx.Rngs(s)` in JAX, None zeros.
        dtype: float32 or float64, of every array.
        fast: False takes the readable layers of `layers.py` in place of those of `fast.py`.
        keep_columns: whether fast convolutions keep their columns for backward: much more memory.
    """

    def __init__(
        self,
        block: Block,
        stage_sizes: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        *,
        width: int = 64,
        stem: str = "imagenet",
        shortcut: str = "projection",
        stride_in_1x1: bool = False,
        batch_norm: bool = True,
        residual_scale: float = 1.0,
        rng: np.random.Generator | None,
        dtype: npt.DTypeLike = np.float32,
        fast: bool = True,
        keep_columns: bool = False,
    ) -> None:
        if stem not in ("imagenet", "small"):
            raise ValueError(f'stem must be "imagenet" or "small", not {stem!r}')
        if not stage_sizes or min(stage_sizes) < 1:
            raise ValueError(f"stage_sizes must be positive numbers of blocks, not {stage_sizes!r}")
        kit = _Kit(rng=rng, dtype=dtype, fast=fast, batch_norm=batch_norm)
        kernel, stride, padding = (7, 2, 3) if stem == "imagenet" else (3, 1, 1)
        self.dtype, self.num_stages = kit.dtype, len(stage_sizes)
        self.conv1 = kit.conv(in_channels, width, kernel, stride=stride, padding=padding)
        self.bn1 = kit.norm(width, relu=True)
        self.maxpool = kit.max_pool(3, stride=2, padding=1) if stem == "imagenet" else None
        channels = width
        for stage, size in enumerate(stage_sizes):
            stage_width, blocks = width * 2**stage, []
            for index in range(size):
                step = 2 if stage > 0 and index == 0 else 1
                options: Any = {"stride": step, "shortcut": shortcut, "stride_in_1x1": stride_in_1x1}
                blocks.append(block(channels, stage_width, kit, **options))
                channels = stage_width * block.expansion
                norm = blocks[-1].last_norm
                if isinstance(norm, BatchNorm):
                    norm.weight.value *= norm.weight.value.dtype.type(residual_scale)
            setattr(self, f"layer{stage + 1}", Sequential(*blocks))
        for layer in self.walk():
            if isinstance(layer, fast_layers.Conv2d):
                layer.keep_columns = keep_columns
        self.pool = GlobalAvgPool2d()
        self.fc = kit.linear(channels, num_classes)

    def body(self) -> Iterator[tuple[str, Layer]]:
        """See `Network`; the stages are stem, layer1, layer2, ..., pool and logits."""
        yield "stem", self.conv1
        yield "stem", self.bn1
        if self.maxpool is not None:
            yield "stem", self.maxpool
        for stage in range(1, self.num_stages + 1):
            for block in getattr(self, f"layer{stage}"):
                yield f"layer{stage}", block
        yield "pool", self.pool
        yield "logits", self.fc


class CNN(Network):
    """One 3x3 convolution, ReLU, one linear layer. Needs to know the size of its pictures."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        image_size: tuple[int, int] = (32, 32),
        width: int = 8,
        rng: np.random.Generator | None,
        dtype: npt.DTypeLike = np.float32,
        fast: bool = True,
    ) -> None:
        kit = _Kit(rng=rng, dtype=dtype, fast=fast, batch_norm=False)
        self.dtype = kit.dtype
        self.conv = kit.conv(in_channels, width, 3, padding=1)
        self.relu, self.flatten = ReLU(), Flatten()
        self.fc = kit.linear(width * image_size[0] * image_size[1], num_classes)

    def body(self) -> Iterator[tuple[str, Layer]]:
        """See `Network`; the stages are conv and logits."""
        yield "conv", self.conv
        yield "conv", self.relu
        yield "logits", self.flatten
        yield "logits", self.fc


def resnet_imagenet(
    block: Block,
    family_sizes: Sequence[int],
    num_classes: int,
    in_channels: int = 3,
    *,
    stage_sizes: Sequence[int] | None = None,
    small_images: bool = False,
    **options: Any,
) -> ResNet:
    """The ImageNet family (table 1). `stage_sizes` replaces the family's, `small_images` the stem."""
    sizes = family_sizes if stage_sizes is None else stage_sizes
    stem = "small" if small_images else "imagenet"
    return ResNet(block, sizes, num_classes, in_channels, stem=stem, **options)


def resnet_cifar(
    n: int, num_classes: int, in_channels: int = 3, *, width: int = 16, **options: Any
) -> ResNet:
    """The CIFAR family (section 4.2): three stages of `n` basic blocks, option-A shortcuts; 6n + 2 layers."""
    make = partial(ResNet, BasicBlock, (n, n, n), width=width, stem="small", shortcut="option-A")
    return make(num_classes, in_channels, **options)


cnn = CNN
resnet18 = partial(resnet_imagenet, BasicBlock, (2, 2, 2, 2))
resnet34 = partial(resnet_imagenet, BasicBlock, (3, 4, 6, 3))
resnet50 = partial(resnet_imagenet, Bottleneck, (3, 4, 6, 3))
resnet101 = partial(resnet_imagenet, Bottleneck, (3, 4, 23, 3))
resnet152 = partial(resnet_imagenet, Bottleneck, (3, 8, 36, 3))
resnet8 = partial(resnet_cifar, 1)
resnet20 = partial(resnet_cifar, 3)
resnet32 = partial(resnet_cifar, 5)
resnet44 = partial(resnet_cifar, 7)
resnet56 = partial(resnet_cifar, 9)
resnet110 = partial(resnet_cifar, 18)

MODELS: dict[str, Callable[..., ResNet | CNN]] = {
    "resnet101": resnet101,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet152": resnet152,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "cnn": cnn,
}
