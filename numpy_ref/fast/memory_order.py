"""The two orders in which the numbers of images [N, H, W, C] lie in memory.

`NHWC`: channels last, as the shape says; what most algorithms of convolution read.
`HCWN`: a row of the image, its channels, its pixels, the examples; what `row_products` reads.

The shape is [N, H, W, C] in both. Only the strides differ, as with PyTorch's memory formats, so every layer
computes the same from both. The fast ones look at `order_of(x)`, and keep it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from numpy_ref.fast.blocks import blocks, fold_of, fold_sums, repeat, widen
from numpy_ref.layers import Array
from numpy_ref.memory import empty

Shape = tuple[int, ...]


class NHWC:
    """Arrays [..., C] in their own order, seen as wide rows [M, F * C], F pixels side by side.

    An instance serves arrays of one shape. It views them as long rows, and gives the blocks of a view that
    fit the cache, and for each block the sums over all axes but the channels'.

    Attributes:
        width: how many sums `sum` and `dot` return.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape, self.fold = shape, fold_of(shape)
        self.width = self.fold * shape[-1]

    @staticmethod
    def empty(shape: Shape, dtype: np.dtype[np.generic]) -> Array:
        """An array of this shape in this order, not initialized."""
        return empty(shape, dtype)

    @staticmethod
    def ordered(x: Array) -> Array:
        """x in this order, copied only if needed."""
        return np.ascontiguousarray(x)

    def view(self, x: Array) -> Array:
        """x [..., C] as [M, F * C]."""
        return widen(x)[0]

    def restore(self, rows: Array) -> Array:
        """The inverse of `view`."""
        return rows.reshape(self.shape)

    @staticmethod
    def blocks(rows: Array) -> Iterator[slice]:
        """Slices of the first axis of a view that fit the cache."""
        return blocks(rows)

    def spread(self, a: Array) -> Array:
        """a [C] as it is added to a view, or multiplied with it."""
        return repeat(a, self.fold)

    @staticmethod
    def sum(block: Array) -> Array:
        """The sums of a block; `total` makes those of blocks, added up in float64, into [C]."""
        sums: Array = np.ones(len(block), block.dtype) @ block
        return sums

    @staticmethod
    def dot(a: Array, b: Array) -> Array:
        """The sums of a * b."""
        sums: Array = np.einsum("nc,nc->c", a, b)
        return sums

    def total(self, sums: Array) -> Array:
        """Sums [..., F * C] of blocks as [..., C]."""
        return fold_sums(sums, self.fold)

    def factors(self, keep: Array, rows: Array) -> Array:
        """The factors [N] of examples for `scale`: one for each pixel, [M, F]."""
        pixels = rows.size // self.shape[-1]
        return np.repeat(keep.astype(rows.dtype), pixels // len(keep)).reshape(len(rows), -1)

    @staticmethod
    def scale(block: Array, factors: Array, part: slice, out: Array) -> Array:
        """Multiply block `part` of a view by `factors`; return `out`, which may be the block."""
        shape = (*factors[part].shape, -1)
        np.multiply(block.reshape(shape), factors[part][..., None], out=out.reshape(shape))
        return out


class HCWN(NHWC):
    """Images as [H, C, W, N] in memory, seen as [H, C, W * N]."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.width = shape, shape[-1]

    @staticmethod
    def empty(shape: Shape, dtype: np.dtype[np.generic]) -> Array:
        """An array [N, H, W, C] in this order, not initialized."""
        n, h, w, c = shape
        return empty((h, c, w, n), dtype).transpose(3, 0, 2, 1)

    @staticmethod
    def ordered(x: Array) -> Array:
        """x [N, H, W, C] in this order, copied only if needed."""
        return HCWN.array(x).transpose(3, 0, 2, 1)

    @staticmethod
    def array(x: Array) -> Array:
        """x [N, H, W, C] as the array [H, C, W, N] that it is in memory; a copy if it is not."""
        return np.ascontiguousarray(x.transpose(1, 3, 2, 0))

    def view(self, x: Array) -> Array:
        """x [N, H, W, C] as [H, C, W * N]."""
        images = self.array(x)
        return images.reshape(*images.shape[:2], -1)

    def restore(self, rows: Array) -> Array:
        """The inverse of `view`."""
        n, h, w, c = self.shape
        return rows.reshape(h, c, w, n).transpose(3, 0, 2, 1)

    def spread(self, a: Array) -> Array:
        """a [C] as it is added to a view, or multiplied with it: [C, 1]."""
        return a[:, None]

    @staticmethod
    def sum(block: Array) -> Array:
        """The sums [C] of a block."""
        sums: Array = (block @ np.ones(block.shape[-1], block.dtype)).sum(0, np.float64)
        return sums

    @staticmethod
    def dot(a: Array, b: Array) -> Array:
        """The sums [C] of a * b."""
        sums: Array = np.vecdot(a, b).sum(0, np.float64)
        return sums

    def total(self, sums: Array) -> Array:
        """The sums themselves."""
        return sums

    def factors(self, keep: Array, rows: Array) -> Array:
        """The factors [N] of examples for `scale`: one for each column, [W * N]."""
        return np.tile(keep.astype(rows.dtype), rows.shape[-1] // len(keep))

    @staticmethod
    def scale(block: Array, factors: Array, part: slice, out: Array) -> Array:
        """Multiply a block by `factors`; return `out`, which may be the block."""
        return np.multiply(block, factors, out=out)


def order_of(x: Array) -> type[NHWC]:
    """The order of x in memory: `HCWN` if it has that and no other, else `NHWC`."""
    is_hcwn = x.ndim == 4 and x.transpose(1, 3, 2, 0).flags.c_contiguous and not x.flags.c_contiguous
    return HCWN if is_hcwn else NHWC
