"""ResNets in plain NumPy: the ImageNet family, the CIFAR family, and a small CNN to show how the parts work.

He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385. Inputs are [N, H, W, C] with
H and W of 32 or more, outputs logits [N, num_classes]. The same names stand in `jax_resnet/resnet.py` and
`torch_oracle/resnet.py`; state dicts carry torchvision's names and layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from numpy_ref import fast as fast_layers
from numpy_ref.factory import LayerFactory
from numpy_ref.layers import (
    Array,
    BatchNorm,
    Flatten,
    GlobalAvgPool2d,
    Layer,
    ReLU,
    Sequential,
)
from numpy_ref.network import Network


class ResidualBlock(Layer):
    """y = relu(branch(x) + shortcut(x)). With fast layers and batch norm `fast.FusedBlock` does the same."""

    has_branch = True
    downsample: Layer | None
    relu: ReLU

    def branch(self) -> Sequential:
        """The layers of the residual branch."""
        raise NotImplementedError

    @property
    def last_norm(self) -> Layer:
        """The batch norm that ends the residual branch."""
        return self.branch().layers[-1]

    def shortcut(self) -> Sequential:
        """`downsample` where the shape changes; elsewhere no layer, which is the identity."""
        return Sequential() if self.downsample is None else Sequential(self.downsample)

    def forward(self, x: Array, train: bool = False, keep: Array | None = None) -> Array:
        """y = relu(branch(x) + shortcut(x)); with stochastic depth relu(keep * branch(x) + shortcut(x)).

        Args:
            x: [N, H, W, I].
            train: batch norm uses the batch's statistics, dropped examples among them.
            keep: [N], the factor of each example's branch: 0 drops it (Huang et al. 2016, arXiv 1603.09382).
        """
        self.save_for_backward(keep)
        if keep is not None:
            kept = per_example(keep, x)
            return self.relu.forward(
                kept * self.branch().forward(x, train) + self.shortcut().forward(x, train)
            )
        return self.relu.forward(self.branch().forward(x, train) + self.shortcut().forward(x, train))

    def backward(self, dy: Array) -> Array:
        """x enters y on two paths, the branch and the shortcut: dL/dx is the sum of both gradients.

        With sum = keep * branch + shortcut, and keep a constant of each example:

            dL/dshortcut = dL/dsum        dL/dbranch = keep * dL/dsum

        so that nothing flows back through a branch that was dropped.
        """
        dsum = self.relu.backward(dy)
        (keep,) = self.saved
        dbranch = dsum if keep is None else per_example(keep, dsum) * dsum
        return self.branch().backward(dbranch) + self.shortcut().backward(dsum)


def per_example(keep: Array, x: Array) -> Array:
    """The factors [N] of examples in the type of x [N, H, W, C], as [N, 1, 1, 1]."""
    return keep.astype(x.dtype)[:, None, None, None]


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut (figure 5, left). [N, H, W, I] to [N, H', W', width]."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        shortcut: str = "projection",
        stride_in_1x1: bool = False,
        batch_norm: bool = True,
        batch_norm_group: int | None = None,
        rng: np.random.Generator | None,
        dtype: npt.DTypeLike = np.float32,
        fast: bool = True,
    ) -> None:
        fused, group = isinstance(self, fast_layers.FusedBlock), batch_norm_group
        make = LayerFactory(batch_norm=batch_norm, group=group, rng=rng, dtype=dtype, fast=fast, fused=fused)
        self.conv1 = make.conv(in_channels, width, 3, stride=stride, padding=1)
        self.bn1 = make.norm(width)
        self.relu1 = ReLU()
        self.conv2 = make.conv(width, width, 3, padding=1)
        self.bn2 = make.norm(width)
        self.downsample = make.shortcut(shortcut, in_channels, width, stride)
        self.relu = ReLU()

    def branch(self) -> Sequential:
        """bn2(conv2(relu(bn1(conv1(x)))))."""
        return Sequential(self.conv1, self.bn1, self.relu1, self.conv2, self.bn2)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (figure 5, right). [N, H, W, I] to [.., 4 * width].

    The stride sits on the 3x3 (v1.5, torchvision's) or, with `stride_in_1x1`, on the first 1x1 (the paper's).
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        shortcut: str = "projection",
        stride_in_1x1: bool = False,
        batch_norm: bool = True,
        batch_norm_group: int | None = None,
        rng: np.random.Generator | None,
        dtype: npt.DTypeLike = np.float32,
        fast: bool = True,
    ) -> None:
        fused, group = isinstance(self, fast_layers.FusedBlock), batch_norm_group
        make = LayerFactory(batch_norm=batch_norm, group=group, rng=rng, dtype=dtype, fast=fast, fused=fused)
        out_channels = width * self.expansion
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = make.conv(in_channels, width, 1, stride=stride1)
        self.bn1 = make.norm(width)
        self.relu1 = ReLU()
        self.conv2 = make.conv(width, width, 3, stride=stride2, padding=1)
        self.bn2 = make.norm(width)
        self.relu2 = ReLU()
        self.conv3 = make.conv(width, out_channels, 1)
        self.bn3 = make.norm(out_channels)
        self.downsample = make.shortcut(shortcut, in_channels, out_channels, stride)
        self.relu = ReLU()

    def branch(self) -> Sequential:
        """bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x))))))))."""
        reduce = [self.conv1, self.bn1, self.relu1]
        return Sequential(*reduce, self.conv2, self.bn2, self.relu2, self.conv3, self.bn3)


class _FusedBasicBlock(fast_layers.FusedBlock, BasicBlock):
    """`BasicBlock` in the fused form of `fast`."""


class _FusedBottleneck(fast_layers.FusedBlock, Bottleneck):
    """`Bottleneck` in the fused form of `fast`."""


Block = type[BasicBlock] | type[Bottleneck]
FUSED: dict[Block, Block] = {BasicBlock: _FusedBasicBlock, Bottleneck: _FusedBottleneck}


class ResNet(Network):
    """A stem, three or four stages of residual blocks, global average pooling and a linear layer (table 1).

    Args:
        block: BasicBlock or Bottleneck.
        stage_sizes: how many blocks each stage has; stage s is width * 2**s wide, and all but the first halve
            height and width.
        num_classes: the number of logits.
        in_channels: channels of the images.
        width: channels of the stem and base width of the first stage.
        stem: "imagenet", a 7x7 convolution and 3x3 max-pooling, both of stride 2; or "small", a 3x3
            convolution of stride 1.
        shortcut: "projection" (1x1 convolution, option B) or "option-A", where shapes differ.
        stride_in_1x1: the paper's place of a bottleneck's stride.
        batch_norm: without it, every convolution has a bias.
        batch_norm_group: the number of consecutive examples that batch norm takes its statistics over, see
            `layers.BatchNorm`; a batch is a multiple of it. None: the whole batch.
        residual_scale: the initial weight of the batch norm that ends each block. 1 is torchvision's; a
            small one lets blocks start close to their shortcuts (De & Smith 2020, arXiv 2002.10444).
        rng: source of the initial weights; `default_rng(s)` gives those of `nnx.Rngs(s)` in JAX, None zeros.
        dtype: float32 or float64, of every array.
        fast: False takes the readable layers of `numpy_ref.layers` instead of those of `numpy_ref.fast`.
        keep_patches: True saves the patches of fast convolutions for backward: much more memory.
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
        batch_norm_group: int | None = None,
        residual_scale: float = 1.0,
        rng: np.random.Generator | None,
        dtype: npt.DTypeLike = np.float32,
        fast: bool = True,
        keep_patches: bool = False,
    ) -> None:
        if stem not in ("imagenet", "small"):
            raise ValueError(f'stem must be "imagenet" or "small", not {stem!r}')
        if not stage_sizes or min(stage_sizes) < 1:
            raise ValueError(f"stage_sizes must be positive numbers of blocks, not {stage_sizes!r}")
        if batch_norm_group is not None and not batch_norm:
            raise ValueError("batch_norm_group needs batch_norm")
        fused, group = fast and batch_norm, batch_norm_group
        make = LayerFactory(batch_norm=batch_norm, group=group, rng=rng, dtype=dtype, fast=fast, fused=fused)
        kernel, stride, padding = (7, 2, 3) if stem == "imagenet" else (3, 1, 1)
        self.dtype, self.num_stages = make.dtype, len(stage_sizes)
        self.conv1 = make.conv(in_channels, width, kernel, stride=stride, padding=padding)
        self.bn1 = make.norm(width)
        self.relu = None if fused else ReLU()  # a fused norm computes it
        self.maxpool = make.forms.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else None
        block = FUSED.get(block, block) if fused else block
        options: Any = {"shortcut": shortcut, "stride_in_1x1": stride_in_1x1, "batch_norm": batch_norm}
        options |= {"batch_norm_group": batch_norm_group, "rng": rng, "dtype": dtype, "fast": fast}
        channels = width
        for stage, size in enumerate(stage_sizes):
            stage_width, blocks = width * 2**stage, []
            for index in range(size):
                step = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, stage_width, stride=step, **options))
                channels = stage_width * block.expansion
                norm = blocks[-1].last_norm
                if isinstance(norm, BatchNorm):
                    norm.weight.value *= norm.weight.value.dtype.type(residual_scale)
            setattr(self, f"layer{stage + 1}", Sequential(*blocks))
        for layer in self.walk():
            if isinstance(layer, fast_layers.Conv2d):
                layer.keep_patches = keep_patches
        self.pool = GlobalAvgPool2d()
        self.fc = make.linear(channels, num_classes)

    @property
    def num_blocks(self) -> int:
        """Number of residual blocks."""
        return sum(isinstance(layer, ResidualBlock) for _, layer in self.body())

    def body(self) -> Iterator[tuple[str, Layer]]:
        """See `Network`; the stages are stem, layer1, layer2, ..., pool and logits."""
        yield "stem", self.conv1
        yield "stem", self.bn1
        if self.relu is not None:
            yield "stem", self.relu
        if self.maxpool is not None:
            yield "stem", self.maxpool
        for stage in range(1, self.num_stages + 1):
            for block in getattr(self, f"layer{stage}"):
                yield f"layer{stage}", block
        yield "pool", self.pool
        yield "logits", self.fc


class CNN(Network):
    """One 3x3 convolution, ReLU, one linear layer. Needs to know the size of its images."""

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
        make = LayerFactory(batch_norm=False, rng=rng, dtype=dtype, fast=fast)
        self.dtype = make.dtype
        self.conv = make.conv(in_channels, width, 3, padding=1)
        self.relu, self.flatten = ReLU(), Flatten()
        self.fc = make.linear(width * image_size[0] * image_size[1], num_classes)

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
