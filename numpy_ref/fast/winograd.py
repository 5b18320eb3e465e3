"""Winograd's convolution F(2x2, 3x3): Lavin & Gray 2016, arXiv 1509.09308.

2x2 outputs of a 3x3 kernel depend on a tile of 4x4 pixels. Direct, they take 36 products for each pair of
channels; between transformed tiles and transformed kernels only 16: y = A'[(G g G') * (B' d B)]A. A tile is
a column of 16 numbers here, and a transform is linear, a matrix product; so every step of backward is the
product with the transpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from numpy_ref.fast.algorithm import Algorithm
from numpy_ref.fast.blocks import even_blocks
from numpy_ref.layers import Array
from numpy_ref.memory import empty

# G and A' of equation 7, for both axes at once
KERNEL_TRANSFORM, OUTPUT_TRANSFORM = (
    np.kron(matrix, matrix)
    for matrix in (
        np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
        np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    )
)


class Winograd(Algorithm):
    """A 3x3 convolution with stride 1 and padding 1, by products of transformed tiles and kernels."""

    def forward(self, x: Array, y: Array) -> list[list[Array]]:
        """Save the transformed tiles with `keep_patches`, else nothing but x."""
        kernels, saved_tiles = self._transformed_kernels(), []
        for part in even_blocks(len(x), 4 * x.nbytes):
            tiles = transformed_tiles(x[part])
            outputs = transform(OUTPUT_TRANSFORM, product(tiles, kernels))
            for corner, values in corners(y[part], outputs):
                corner[...] = values
            if self.keep_patches:
                saved_tiles.append(tiles)
        return [saved_tiles]

    def backward(self, x: Array, saved: list[list[Array]], dy: Array, dx: Array | None) -> None:
        """The steps of forward from last to first, each with the transpose of its matrix."""
        (saved_tiles,), kernels = saved, self._transformed_kernels()
        dkernels = np.zeros(())
        for index, part in enumerate(even_blocks(len(x), 4 * x.nbytes)):
            tiles = saved_tiles[index] if self.keep_patches else transformed_tiles(x[part])
            doutputs = empty((4, tiles.shape[1], dy.shape[-1]), dy.dtype)
            doutputs.fill(0)  # where a tile reaches over the edge
            for corner, values in corners(dy[part], doutputs):
                values[...] = corner
            dproducts = transform(OUTPUT_TRANSFORM.T, doutputs)
            dpart = product(tiles.swapaxes(1, 2), dproducts)
            dkernels = dpart if index == 0 else np.add(dkernels, dpart, out=dpart)
            if dx is not None:
                add_tiles(product(dproducts, kernels.swapaxes(1, 2)), dx[part])
        self.weight.add_grad_product(KERNEL_TRANSFORM.T.astype(dy.dtype), dkernels.reshape(16, -1))

    def _transformed_kernels(self) -> Array:
        """G g G': [16, I, O]."""
        return transform(KERNEL_TRANSFORM, self.weight.value.reshape(9, *self.weight.value.shape[2:]))


def transform(matrix: Array, a: Array) -> Array:
    """Return matrix [P, Q] @ a [Q, M, C]: [P, M, C]."""
    out = empty((len(matrix), *a.shape[1:]), a.dtype)
    np.matmul(matrix.astype(a.dtype), a.reshape(len(a), -1), out=out.reshape(len(out), -1))
    return out


def product(a: Array, b: Array) -> Array:
    """Return a [16, P, Q] @ b [16, Q, R]."""
    return np.matmul(a, b, out=empty((len(a), a.shape[1], b.shape[2]), a.dtype))


def corners(y: Array, outputs: Array) -> Iterator[tuple[Array, Array]]:
    """For each of the 2x2 outputs of all tiles, its places in y [N, H, W, O] and in outputs [4, T, O]."""
    n, h, w, o = y.shape
    outputs = outputs.reshape(2, 2, n, -(-h // 2), -(-w // 2), o)
    for i, j in np.ndindex(2, 2):
        corner = y[:, i::2, j::2]
        yield corner, outputs[i, j, :, : corner.shape[1], : corner.shape[2]]


# The transform of the pixels has two numbers a row, each 1 or -1: sums and differences, first along one axis,
# then along the other, take 0.7 of the time of the product with a 16x16 matrix.


def transformed_tiles(x: Array) -> Array:
    """B' d B of the T = N * TH * TW tiles of x [N, H, W, I]: [16, T, I]."""
    n, h, w, c = x.shape
    padded = zero_padded_like(x)
    padded[:, 1 : h + 1, 1 : w + 1] = x
    half = empty((4, n, -(-h // 2), *padded.shape[2:]), x.dtype)
    transform_pixels(tile_pixels(padded, 1), half)
    tiles = empty((4, 4, n, -(-h // 2), -(-w // 2), c), x.dtype)
    transform_pixels(tile_pixels(half, 3), tiles.swapaxes(0, 1))
    return tiles.reshape(16, -1, c)


def add_tiles(dtiles: Array, dx: Array) -> None:
    """Write into dx [N, H, W, I] the sum of the gradients of the tiles [16, T, I]: tiles overlap."""
    n, h, w, c = dx.shape
    dpadded = zero_padded_like(dx)
    dhalf = empty((4, n, -(-h // 2), *dpadded.shape[2:]), dx.dtype)
    dhalf.fill(0)
    dtiles = dtiles.reshape(4, 4, n, -(-h // 2), -(-w // 2), c)
    transform_pixels_backward(dtiles.swapaxes(0, 1), tile_pixels(dhalf, 3))
    transform_pixels_backward(dhalf, tile_pixels(dpadded, 1))
    dx[...] = dpadded[:, 1 : h + 1, 1 : w + 1]


def zero_padded_like(x: Array) -> Array:
    """Zeros for x [N, H, W, C] with a border of 1 pixel, 2 after odd sizes: [N, 2 TH + 2, 2 TW + 2, C]."""
    n, h, w, c = x.shape
    padded = empty((n, h + h % 2 + 2, w + w % 2 + 2, c), x.dtype)
    padded.fill(0)
    return padded


def tile_pixels(a: Array, axis: int) -> list[Array]:
    """Pixel 0 of every tile, pixel 1, 2 and 3, along an axis of 2 T + 2 pixels; views of T pixels.

    Tiles are 4 pixels long and start at every second pixel.
    """
    before = (slice(None),) * axis
    return [a[(*before, slice(i, i + a.shape[axis] - 3, 2))] for i in range(4)]


def transform_pixels(d: Sequence[Array], out: Array) -> None:
    """Write into out [4, ...] B' d, the third matrix of equation 7 times pixels 0 to 3 of the tiles."""
    np.subtract(d[0], d[2], out=out[0])
    np.add(d[1], d[2], out=out[1])
    np.subtract(d[2], d[1], out=out[2])
    np.subtract(d[1], d[3], out=out[3])


def transform_pixels_backward(dout: Array, dd: Sequence[Array]) -> None:
    """Add B dout, with dout [4, ...], to dd, the gradients of the pixels."""
    inner = empty(dout.shape[1:], dout.dtype)
    dd[0] += dout[0]
    dd[3] -= dout[3]
    np.subtract(dout[1], dout[2], out=inner)
    dd[1] += np.add(inner, dout[3], out=inner)
    np.add(dout[1], dout[2], out=inner)
    dd[2] += np.subtract(inner, dout[0], out=inner)
