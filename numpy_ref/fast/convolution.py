"""The fast convolution: a choice between five algorithms, each in its own file."""

from __future__ import annotations

from numpy_ref import layers
from numpy_ref.fast.algorithm import Algorithm
from numpy_ref.fast.blocks import sum_pixels
from numpy_ref.fast.im2col import Im2col
from numpy_ref.fast.memory_order import HCWN, NHWC, order_of
from numpy_ref.fast.pointwise import Pointwise
from numpy_ref.fast.row_products import RowProducts
from numpy_ref.fast.shifted import Shifted
from numpy_ref.fast.taps import share_inside
from numpy_ref.fast.winograd import Winograd
from numpy_ref.layers import Array, Pair, check_channels, output_size, promote

# The limits of `choose_algorithm`, which says where they come from
NARROW, NARROW_IN_ORDER, ROW_IMAGES = 32, 64, 8
WINOGRAD_CHANNELS, WINOGRAD_PIXELS = 64, 200
SHIFTED_SHARE = 0.5


def choose_algorithm(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: Pair,
    padding: Pair,
    order: type[NHWC] = NHWC,
) -> type[Algorithm]:
    """Return the fastest algorithm for images [N, H, W, I] and a kernel [KH, KW, I, O]: the first that fits.

    N counts the images of this process, which takes a part of the batch; `order` is that of x in memory.

    - `Pointwise` for 1x1 kernels without padding: the patches are the pixels, so there is nothing to copy.
    - `RowProducts` for 3x3 kernels of narrow layers, given `ROW_IMAGES` images: both numbers of channels are
      at most `NARROW`, or at most `NARROW_IN_ORDER` if x is in the order that it needs. Forward and backward
      took 0.43 of the time of `Im2col` for 64 @ 32x32x16, 0.69 for 16x16x32, and 1.00 of the time of
      `Winograd` for 8x8x64 (AVX2; with AVX-512 0.49, 0.63 and 0.72; one thread, 30 November 2026). It calls
      NumPy for each row: for 4 @ 32x32x16 it took 1.25 of the time.
    - `Winograd` for 3x3 kernels with stride 1 and padding 1, given `WINOGRAD_CHANNELS` channels and
      `WINOGRAD_PIXELS` pixels, N H W. It saves 20 of 36 products, and has to transform the kernels in every
      step, whatever the number of pixels. Forward and backward took 0.70 of the time of `Im2col` for
      2 @ 28x28x128, 0.77 for 14x14x256, and 0.98 for 4 @ 6x6x256, 144 pixels, which is left to `Im2col`
      (25 and 26 November 2026).
    - `Shifted` where at most half of the products of `Im2col` would meet the image, the others its padding:
      on 2x2 images, four of nine taps of a padded 3x3 kernel. It took 0.16 of the processor time of `Im2col`
      for 16 @ 1x1x512 and 0.6 for 16 @ 2x2x512 (28 November 2026, one thread, on a busy machine). Half is a
      cautious limit: at 4x4, 0.69 of the products inside, it took 0.7 to 0.8.
    - `Im2col` for all else.

    Examples:
        >>> choose_algorithm((16, 32, 32, 16), (3, 3, 16, 16), (1, 1), (1, 1)).__name__
        'RowProducts'
        >>> choose_algorithm((16, 32, 32, 64), (3, 3, 64, 64), (1, 1), (1, 1)).__name__
        'Winograd'
    """
    n, h, w, _ = x_shape
    kh, kw, in_channels, out_channels = weight_shape
    size, kernel = (h, w), (kh, kw)
    if kernel == (1, 1) and padding == (0, 0):
        return Pointwise
    narrow = NARROW_IN_ORDER if order is HCWN else NARROW
    if (
        kernel == (3, 3)
        and padding == (1, 1)
        and max(in_channels, out_channels) <= narrow
        and n >= ROW_IMAGES
    ):
        return RowProducts
    fits_winograd = (kernel, stride, padding) == ((3, 3), (1, 1), (1, 1))
    if fits_winograd and min(in_channels, out_channels) >= WINOGRAD_CHANNELS and n * h * w >= WINOGRAD_PIXELS:
        return Winograd
    out_size = output_size(size, kernel, stride, padding)
    if share_inside(kernel, stride, padding, size, out_size) <= SHIFTED_SHARE:
        return Shifted
    return Im2col


class Conv2d(layers.Conv2d):
    """`layers.Conv2d` by the algorithm that suits the shapes.

    Attributes:
        keep_patches: save the patches of the images for backward, instead of making them again.
        needs_dx: if False, backward returns zeros for dL/dx: training has no use for that of the images.
    """

    keep_patches = False
    needs_dx = True

    def forward(self, x: Array, train: bool = False) -> Array:
        """Map x [N, H, W, I] to [N, OH, OW, O]."""
        weight = self.weight.value
        check_channels(x, weight.shape[2], 4)
        size = output_size(x.shape[1:3], self.kernel, self.stride, self.padding)
        choice = choose_algorithm(x.shape, weight.shape, self.stride, self.padding, order_of(x))
        x = choice.order.ordered(promote(x, weight))
        y = choice.order.empty((len(x), *size, weight.shape[-1]), x.dtype)
        algorithm = choice(self.weight, self.stride, self.padding, keep_patches=self.keep_patches)
        saved = algorithm.forward(x, y)
        if self.bias is not None:
            y += self.bias.value
        self.save_for_backward(algorithm, x, *saved)
        return y

    def backward(self, dy: Array) -> Array:
        """Return dL/dx, by the algorithm that forward took."""
        algorithm: Algorithm
        algorithm, x, *saved = self.saved
        dy = algorithm.order.ordered(promote(dy, x))
        if self.bias is not None:
            self.bias.add_grad(sum_pixels(dy))
        dx = algorithm.order.empty(x.shape, x.dtype)
        if not self.needs_dx:
            dx.fill(0)
        algorithm.backward(x, saved, dy, dx if self.needs_dx else None)
        return dx
