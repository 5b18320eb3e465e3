"""Layers that the ResNets need besides those of `torch.nn`: padded convolutions and the two shortcuts.

The reference adds no arithmetic of its own but a mean over groups: the layers are PyTorch's, `nn.BatchNorm2d`
among them (epsilon 1e-5, momentum 0.1; it normalizes with the biased variance, stores the unbiased one, and
in training raises ValueError when a channel has a single value).
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["projection", "option-A"]


def conv(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, bias: bool) -> nn.Conv2d:
    """Return a square convolution of odd size, padded equally on all sides: stride 1 keeps H and W."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)


def norm(channels: int, batch_norm: bool, group: int | None = None) -> nn.Module:
    """Return batch norm, perhaps over groups; or the identity, which adds no name to the state dict."""
    if not batch_norm:
        return nn.Identity()
    return nn.BatchNorm2d(channels) if group is None else GroupedBatchNorm2d(channels, group)


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """PyTorch's batch norm, in training of each `group` consecutive examples by themselves.

    The groups share weight and bias. The running statistics move once, by PyTorch's rule, toward the mean
    over the groups of their means and of their unbiased variances.

    Args:
        channels: those of the images.
        group: examples in a group, 1 or more.
        eps, momentum: as of `nn.BatchNorm2d`.
    """

    def __init__(self, channels: int, group: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps, momentum)
        if group < 1:
            raise ValueError(f"a group of batch norm must have 1 or more examples, got {group}")
        self.group, self.rate = group, momentum

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same. Raises ValueError in training unless B is a multiple of the group."""
        if not self.training:
            return super().forward(x)
        if not len(x) or len(x) % self.group:
            raise ValueError(
                f"batch norm over groups of {self.group} examples needs a multiple of them, got {len(x)}"
            )
        outputs, means, variances = [], [], []
        for start in range(0, len(x), self.group):
            images = x[start : start + self.group]
            mean, var = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
            # With a momentum of 1 the running statistics become those of these images
            y = F.batch_norm(
                images, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps
            )
            outputs.append(y)
            means.append(mean)
            variances.append(var)
        buffers = dict(self.named_buffers())
        for name, of_groups in (("running_mean", means), ("running_var", variances)):
            buffers[name].mul_(1 - self.rate).add_(torch.stack(of_groups).mean(0), alpha=self.rate)
        buffers["num_batches_tracked"].add_(1)
        return torch.cat(outputs)


class OptionA(nn.Module):
    """Option A of He et al. 2015 (arXiv 1512.03385, sections 3.3 and 4.2): the identity and zero channels.

        y[:, before + c, i, j] = x[:, c, stride * i, stride * j],  0 in the other channels
        before = (out_channels - in_channels) // 2

    The paper leaves open where the zeros go. The published CIFAR checkpoints were trained with half of them
    before and half after; of an odd number, the larger half is after.

    Args:
        in_channels, out_channels: channels before and after.
        stride: every stride-th row and column is kept, from the first.

    Raises:
        ValueError: out_channels is below in_channels.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"option A cannot reduce {in_channels} channels to {out_channels}")
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


def make_shortcut(
    kind: Shortcut,
    in_channels: int,
    out_channels: int,
    *,
    stride: int,
    batch_norm: bool,
    group: int | None = None,
) -> nn.Module | None:
    """Return the layers of the shortcut where the shape changes; elsewhere None, as in torchvision."""
    if kind not in get_args(Shortcut):
        raise ValueError(f"shortcut must be one of {get_args(Shortcut)}, not {kind!r}")
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "option-A":
        return OptionA(in_channels, out_channels, stride=stride)
    projection = conv(in_channels, out_channels, 1, stride=stride, bias=not batch_norm)
    return nn.Sequential(projection, norm(out_channels, batch_norm, group))
