"""What the ResNets need beside `torch.nn`: how convolutions pad and have biases, and the two shortcuts.

The judge adds no arithmetic of its own: the layers are PyTorch's, `nn.BatchNorm2d` among them (epsilon 1e-5,
momentum 0.1; it normalises with the biased variance, stores the unbiased one, and in training raises
ValueError when a channel has a single value).
"""

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["projection", "option-A"]


def conv(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, bias: bool) -> nn.Conv2d:
    """A square convolution of odd size, padded alike on all sides: stride 1 keeps H and W."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)


def norm(channels: int, batch_norm: bool) -> nn.Module:
    """Batch norm, or what leaves no name in the state dict."""
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()


class OptionA(nn.Module):
    """Option A of He et al. 2015 (arXiv 1512.03385, sections 3.3 and 4.2): the identity among zero channels.

        y[:, front + c, i, j] = x[:, c, stride * i, stride * j],  0 in the other channels
        front = (out_channels - in_channels) // 2

    The paper leaves open where the zeros go. Half in front and half behind is what the published CIFAR
    checkpoints were trained with; of an odd number, the larger half is behind.

    Arguments:
        in_channels, out_channels: channels before and after.
        stride: every stride-th row and column is kept, from the first.

    Raises:
        ValueError: out_channels is below in_channels; there is no identity to keep.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"option A cannot reduce {in_channels} channels to {out_channels}")
        self.stride = stride
        self.front = (out_channels - in_channels) // 2
        self.behind = out_channels - in_channels - self.front

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, self.front, self.behind))


def make_shortcut(
    kind: Shortcut, in_channels: int, out_channels: int, *, stride: int, batch_norm: bool
) -> nn.Module | None:
    """What stands on the short path where the shape changes; elsewhere nothing, as in torchvision."""
    if kind not in get_args(Shortcut):
        raise ValueError(f"shortcut must be one of {get_args(Shortcut)}, not {kind!r}")
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "option-A":
        return OptionA(in_channels, out_channels, stride=stride)
    projection = conv(in_channels, out_channels, 1, stride=stride, bias=not batch_norm)
    return nn.Sequential(projection, norm(out_channels, batch_norm))
