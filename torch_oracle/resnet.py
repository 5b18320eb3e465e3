"""ResNets in plain PyTorch: the ImageNet family, the CIFAR family, and a small CNN to show the parts in use.

    basic block       y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))                   figure 5
    bottleneck        y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)) figure 5
    ImageNet family   7x7 stem, max pooling; four stages of widths w, 2w, 4w, 8w, w = 64        table 1
    CIFAR family      3x3 stem; three stages of widths w, 2w, 4w, w = 16; 6n + 2 layers         section 4.2

He, Zhang, Ren, Sun 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385. Images are
[N, C, H, W] (NHWC in both engines) with H and W of 32 or more, logits [N, num_classes]. The same names are in
`jax_resnet/resnet.py` and `numpy_ref/resnet.py`; a state dict has torchvision's names and layout.

Weights start as torchvision's do. Convolutions: He's normal distribution, fan-out (arXiv 1502.01852, equation
14); their biases, where they have any, zero. Batch norm: weight 1, bias 0. The linear layer: weight and bias
uniform within +-1/sqrt(inputs), PyTorch's default. `torch.manual_seed` fixes what is drawn.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from torch_oracle.layers import Shortcut, conv, make_shortcut, norm

Stem = Literal["imagenet", "small"]


def _initialize(model: nn.Module) -> None:
    """Draw the convolutions as torchvision does; batch norm and the linear layer start as torchvision's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ResidualBlock(nn.Module):
    """y = relu(branch(x) + shortcut(x))."""

    downsample: nn.Module | None

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch."""
        raise NotImplementedError

    def shortcut(self, x: Tensor) -> Tensor:
        """`downsample` where the shape changes; elsewhere the identity. [N, I, H, W] -> [N, O, H', W']."""
        return x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """y = relu(branch(x) + shortcut(x)); with stochastic depth relu(keep * branch(x) + shortcut(x)).

        Args:
            x: [N, I, H, W].
            keep: [N], the factor of each example's branch: 0 drops it (Huang et al. 2016, arXiv 1603.09382).
        """
        if keep is not None:
            kept = keep.to(x.dtype)[:, None, None, None]
            return F.relu(kept * self.branch(x) + self.shortcut(x))
        return F.relu(self.branch(x) + self.shortcut(x))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut. [N, I, H, W] -> [N, width, ceil(H / stride), ceil(W / stride)].

    Args:
        in_channels: channels of the input.
        width: channels of the convolutions; the output has `expansion` times as many.
        stride: of the block, on both of its paths.
        shortcut: where the shape changes: `projection` (the paper's option B) or `option-A`.
        stride_in_1x1: changes nothing here: without a 1x1 convolution, v1 and v1.5 are one.
        batch_norm: False leaves the norms out and gives the convolutions biases.
        batch_norm_group: the number of consecutive examples that batch norm takes its statistics over in
            training, see `layers.GroupedBatchNorm2d`; a batch is a multiple of it. None: the whole batch.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        shortcut: Shortcut = "projection",
        stride_in_1x1: bool = False,
        batch_norm: bool = True,
        batch_norm_group: int | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 3, stride=stride, bias=not batch_norm)
        self.bn1 = norm(width, batch_norm, batch_norm_group)
        self.conv2 = conv(width, width, 3, bias=not batch_norm)
        self.bn2 = norm(width, batch_norm, batch_norm_group)
        self.downsample = make_shortcut(
            shortcut, in_channels, width, stride=stride, batch_norm=batch_norm, group=batch_norm_group
        )

    @property
    def last_norm(self) -> nn.Module:
        """The batch norm that ends the residual branch."""
        return self.bn2

    def branch(self, x: Tensor) -> Tensor:
        """bn2(conv2(relu(bn1(conv1(x)))))."""
        x = F.relu(self.bn1(self.conv1(x)))
        y: Tensor = self.bn2(self.conv2(x))
        return y


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions and a shortcut. [N, I, H, W] -> [N, 4 * width, ceil(H / stride), ...].

    Arguments as `BasicBlock`, but for

    stride_in_1x1: True strides the first 1x1, as the paper does (v1), and leaves three of four inputs unread;
        False the 3x3, as torchvision does (v1.5).
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        shortcut: Shortcut = "projection",
        stride_in_1x1: bool = False,
        batch_norm: bool = True,
        batch_norm_group: int | None = None,
    ) -> None:
        super().__init__()
        out_channels = width * self.expansion
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv(in_channels, width, 1, stride=stride1, bias=not batch_norm)
        self.bn1 = norm(width, batch_norm, batch_norm_group)
        self.conv2 = conv(width, width, 3, stride=stride2, bias=not batch_norm)
        self.bn2 = norm(width, batch_norm, batch_norm_group)
        self.conv3 = conv(width, out_channels, 1, bias=not batch_norm)
        self.bn3 = norm(out_channels, batch_norm, batch_norm_group)
        self.downsample = make_shortcut(
            shortcut, in_channels, out_channels, stride=stride, batch_norm=batch_norm, group=batch_norm_group
        )

    @property
    def last_norm(self) -> nn.Module:
        """The batch norm that ends the residual branch."""
        return self.bn3

    def branch(self, x: Tensor) -> Tensor:
        """bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x))))))))."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        y: Tensor = self.bn3(self.conv3(x))
        return y


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """A stem, stages `layer1`, `layer2`, ... of residual blocks, global average pooling, one linear layer.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        stage_sizes: blocks of each stage. Each but the first halves the image and doubles the width.
        num_classes: outputs of `fc`.
        in_channels: channels of the image.
        width: that of the stem and of the first stage's blocks.
        stem: `imagenet`, a 7x7 convolution and 3x3 max pooling, both of stride 2; or `small`, a 3x3
            convolution of stride 1.
        shortcut, stride_in_1x1, batch_norm, batch_norm_group: see the blocks.
        residual_scale: the initial weight of the batch norm that ends each block. 1 is torchvision's; a
            small one lets blocks start close to their shortcuts (De & Smith 2020, arXiv 2002.10444).

    Raises:
        ValueError: an unknown stem or shortcut; no stage, or one without blocks; groups without batch norm.
    """

    def __init__(
        self,
        block: Block,
        stage_sizes: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        *,
        width: int = 64,
        stem: Stem = "imagenet",
        shortcut: Shortcut = "projection",
        stride_in_1x1: bool = False,
        batch_norm: bool = True,
        batch_norm_group: int | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if stem not in get_args(Stem):
            raise ValueError(f"stem must be one of {get_args(Stem)}, not {stem!r}")
        if not stage_sizes or min(stage_sizes) < 1:
            raise ValueError(f"stage_sizes must be positive numbers of blocks, not {stage_sizes!r}")
        if batch_norm_group is not None and not batch_norm:
            raise ValueError("batch_norm_group needs batch_norm")

        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = conv(in_channels, width, kernel, stride=stride, bias=not batch_norm)
        self.bn1 = norm(width, batch_norm, batch_norm_group)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        make = partial(
            block,
            shortcut=shortcut,
            stride_in_1x1=stride_in_1x1,
            batch_norm=batch_norm,
            batch_norm_group=batch_norm_group,
        )
        features = width
        for stage, size in enumerate(stage_sizes):
            stage_width, layer = width * 2**stage, nn.Sequential()
            for index in range(size):
                layer.append(make(features, stage_width, stride=2 if stage > 0 and index == 0 else 1))
                features = stage_width * block.expansion
            self.add_module(f"layer{stage + 1}", layer)
        self.fc = nn.Linear(features, num_classes)
        _initialize(self)
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck) and isinstance(module.last_norm, nn.BatchNorm2d):
                nn.init.constant_(module.last_norm.weight, residual_scale)

    @property
    def num_blocks(self) -> int:
        """Number of residual blocks."""
        return sum(isinstance(module, ResidualBlock) for module in self.modules())

    def stages(self, x: Tensor, keep: Tensor | None = None) -> dict[str, Tensor]:
        """Every stage's output, in order, for comparing stage by stage.

        Args:
            x: [N, in_channels, H, W]
            keep: as in `forward`.

        Returns:
            `stem` (after its pooling), `layer1`, `layer2`, ... each [N, C, H', W'], `pool` [N, C] and
            `logits` [N, num_classes].
        """
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        outputs, block_number = {"stem": x}, 0
        for name, layer in self.named_children():
            if name.startswith("layer"):
                if keep is None:
                    x = layer(x)
                else:
                    for block in layer.children():
                        x = block(x, keep[:, block_number])
                        block_number += 1
                outputs[name] = x
        outputs["pool"] = x.mean(dim=(2, 3))
        outputs["logits"] = self.fc(outputs["pool"])
        return outputs

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """[N, in_channels, H, W] -> logits [N, num_classes].

        Args:
            x: the images.
            keep: stochastic depth in training: the factor of each residual branch, [N, num_blocks], such as
                `[[1, 0, 1 / (1 - p)]]`; see `ResidualBlock`. None keeps every branch.
        """
        return self.stages(x, keep)["logits"]


class CNN(nn.Module):
    """One 3x3 convolution with bias, ReLU, and one linear layer over all its outputs.

    Args:
        num_classes: outputs of `fc`.
        in_channels: channels of the image.
        image_size: its height and width, which the linear layer fixes.
        width: channels of the convolution.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        image_size: tuple[int, int] = (32, 32),
        width: int = 8,
    ) -> None:
        super().__init__()
        self.conv = conv(in_channels, width, 3, bias=True)
        self.fc = nn.Linear(width * image_size[0] * image_size[1], num_classes)
        _initialize(self)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """`conv` (after the ReLU) [N, width, H, W] and `logits` [N, num_classes].

        The columns of `fc.weight` run over (channel, row, column), whatever an engine's own layout.
        """
        x = F.relu(self.conv(x))
        return {"conv": x, "logits": self.fc(x.flatten(start_dim=1))}

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, *image_size] -> logits [N, num_classes]."""
        return self.stages(x)["logits"]


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
    stem: Stem = "small" if small_images else "imagenet"
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
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "cnn": cnn,
}
