"""Convolution: as one matrix product (`Conv2d`), and as its definition has it (`LoopConv2d`).

And the shortcut of the CIFAR family, which is a convolution with a fixed kernel (`OptionA`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from numpy_ref.layers.module import (
    Array,
    Layer,
    Pair,
    Parameter,
    check_channels,
    draw,
    pair,
    promote,
    sum_type,
)


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    """Return (size + 2 * padding - kernel) // stride + 1, for height and width.

    Raises ValueError if the kernel is larger than the padded image.
    """
    (h, w), (kh, kw), (sh, sw), (ph, pw) = size, kernel, stride, padding
    if h + 2 * ph < kh or w + 2 * pw < kw:
        raise ValueError(f"a kernel of {kernel} does not fit images of {size} padded by {padding}")
    return (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1


def pad2d(x: Array, padding: Pair, value: float = 0.0) -> Array:
    """Return x [N, H, W, C] with `padding` rows and columns of `value` on each side; x itself if it is 0."""
    (ph, pw) = padding
    if ph == pw == 0:
        return x
    return np.pad(x, ((0, 0), (ph, ph), (pw, pw), (0, 0)), constant_values=value)


def unpad2d(x: Array, padding: Pair) -> Array:
    """Return x without its padding, the inverse of `pad2d`; a view."""
    (ph, pw), (_, h, w, _) = padding, x.shape
    return x[:, ph : h - ph, pw : w - pw]


def taps(kernel: Pair, stride: Pair, size: Pair) -> Iterator[tuple[slice, slice]]:
    """For every position (i, j) of the kernel, the rows and columns of the padded image that it meets.

    Output (p, q) reads the image at (p * stride + i, q * stride + j): for a fixed (i, j) that is one strided
    slice of `size` = (OH, OW) elements.
    """
    (kh, kw), (sh, sw), (oh, ow) = kernel, stride, size
    for i in range(kh):
        for j in range(kw):
            yield slice(i, i + (oh - 1) * sh + 1, sh), slice(j, j + (ow - 1) * sw + 1, sw)


def im2col(x: Array, kernel: Pair, stride: Pair, padding: Pair) -> Array:
    """Every receptive field of x [N, H, W, C], its patch, as a row: [N, OH, OW, KH * KW * C]."""
    n, h, w, c = x.shape
    oh, ow = output_size((h, w), kernel, stride, padding)
    padded = pad2d(x, padding)
    patches = np.empty((n, oh, ow, kernel[0] * kernel[1], c), x.dtype)
    for tap, (rows, cols) in enumerate(taps(kernel, stride, (oh, ow))):
        patches[:, :, :, tap] = padded[:, rows, cols]
    return patches.reshape(n, oh, ow, kernel[0] * kernel[1] * c)


def col2im(patches: Array, shape: tuple[int, ...], kernel: Pair, stride: Pair, padding: Pair) -> Array:
    """The transpose of `im2col`: each element of x [N, H, W, C] becomes the sum of all its copies."""
    n, h, w, c = shape
    oh, ow = patches.shape[1:3]
    patches = patches.reshape(n, oh, ow, kernel[0] * kernel[1], c)
    padded = np.zeros((n, h + 2 * padding[0], w + 2 * padding[1], c), patches.dtype)
    for tap, (rows, cols) in enumerate(taps(kernel, stride, (oh, ow))):
        padded[:, rows, cols] += patches[:, :, :, tap]
    return unpad2d(padded, padding)


class Conv2d(Layer):
    """2-d convolution as one matrix product. `weight` [KH, KW, I, O] from He's normal distribution (fan-out,
    as torchvision), `bias` 0.

    Like PyTorch's it is a cross-correlation: the kernel is not flipped. He et al. 2015, arXiv 1502.01852,
    equation 14: std = sqrt(2 / (KH * KW * O)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        bias: bool = False,
        rng: np.random.Generator | None,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self.kernel, self.stride = pair("kernel_size", kernel_size), pair("stride", stride)
        self.padding = pair("padding", padding, 0)
        shape = (*self.kernel, in_channels, out_channels)
        std = math.sqrt(2.0 / (self.kernel[0] * self.kernel[1] * out_channels))
        self.weight = Parameter(draw(rng, "normal", shape, std, dtype))
        self.bias = Parameter(np.zeros(out_channels, dtype)) if bias else None

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [N, H, W, I] to [N, OH, OW, O].

        y[n, p, q, o] = sum over i, j, c of x[n, p * sh + i - ph, q * sw + j - pw, c] * weight[i, j, c, o],
        zero outside the image: rows of `im2col(x)` times `weight` as a matrix [KH * KW * I, O].
        """
        check_channels(x, self.weight.value.shape[2], 4)
        patches = im2col(promote(x, self.weight.value), self.kernel, self.stride, self.padding)
        self.save_for_backward(x.shape, patches)
        y = patches @ self._matrix
        return y if self.bias is None else y + self.bias.value

    def backward(self, dy: Array) -> Array:
        """y = patches @ matrix is a linear layer over N * OH * OW receptive fields, so (see `Linear`)

            dmatrix  = patches.T @ dy      [KH * KW * I, O]
            dpatches = dy @ matrix.T       [N * OH * OW, KH * KW * I]

        and an element of x, which im2col copied into several rows, gets the sum of their gradients: col2im.
        """
        shape, patches = self.saved
        rows = dy.reshape(-1, dy.shape[-1])
        self.weight.add_grad_product(patches.reshape(-1, patches.shape[-1]).T, rows)
        if self.bias is not None:
            self.bias.add_grad(rows.sum(0, sum_type(rows.dtype, len(rows))))
        return col2im(dy @ self._matrix.T, shape, self.kernel, self.stride, self.padding)

    @property
    def _matrix(self) -> Array:
        """`weight` as a matrix [KH * KW * I, O], a view."""
        return self.weight.value.reshape(-1, self.weight.value.shape[-1])


class LoopConv2d(Conv2d):
    """The same convolution as the definition has it, a loop over every output: to read, not to train with."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [N, H, W, I] to [N, OH, OW, O]: each output is the kernel times the window under it."""
        (kh, kw), (sh, sw), weight = self.kernel, self.stride, self.weight.value
        check_channels(x, weight.shape[2], 4)
        oh, ow = output_size(x.shape[1:3], self.kernel, self.stride, self.padding)
        padded = promote(pad2d(x, self.padding), weight)
        self.save_for_backward(padded)
        y = np.empty((len(x), oh, ow, weight.shape[-1]), padded.dtype)
        for n in range(len(x)):
            for p in range(oh):
                for q in range(ow):
                    window = padded[n, p * sh : p * sh + kh, q * sw : q * sw + kw]  # [KH, KW, I]
                    y[n, p, q] = np.tensordot(window, weight, 3)
        return y if self.bias is None else y + self.bias.value

    def backward(self, dy: Array) -> Array:
        """Each output passes its gradient to everything that entered it: the window, and the whole kernel."""
        (padded,) = self.saved
        (kh, kw), (sh, sw), weight = self.kernel, self.stride, self.weight.value
        dpadded, dweight = np.zeros_like(padded), np.zeros_like(weight)
        for n, p, q in np.ndindex(dy.shape[:3]):
            window = (n, slice(p * sh, p * sh + kh), slice(q * sw, q * sw + kw))
            dpadded[window] += weight @ dy[n, p, q]  # [KH, KW, I, O] @ [O]
            dweight += padded[window][..., np.newaxis] * dy[n, p, q]
        self.weight.add_grad(dweight)
        if self.bias is not None:
            self.bias.add_grad(dy.sum((0, 1, 2), sum_type(dy.dtype, math.prod(dy.shape[:3]))))
        return unpad2d(dpadded, self.padding)


class OptionA(Layer):
    """The shortcut without parameters of the CIFAR family (He et al. 2015, arXiv 1512.03385, section 3.3,
    option A).

    Takes every `stride`-th row and column, and pads the channels with zeros, half in front and half behind.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        if out_channels < in_channels:
            raise ValueError(f"option A cannot reduce {in_channels} channels to {out_channels}")
        extra = out_channels - in_channels
        self.pad, self.stride = (extra // 2, extra - extra // 2), stride

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [N, H, W, I] to [N, ceil(H / stride), ceil(W / stride), O]."""
        self.save_for_backward(x.shape)
        return np.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), self.pad))

    def backward(self, dy: Array) -> Array:
        """A copy's gradient goes to the element that it copies; no other element of x was read."""
        (shape,) = self.saved
        dx = np.zeros(shape, dy.dtype)
        front = self.pad[0]
        dx[:, :: self.stride, :: self.stride] = dy[..., front : front + shape[-1]]
        return dx
