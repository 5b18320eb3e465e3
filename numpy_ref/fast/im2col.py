"""Convolution as the matrix product of `layers.Conv2d`, a block of images at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from numpy_ref.fast.algorithm import Algorithm
from numpy_ref.fast.blocks import even_blocks
from numpy_ref.fast.taps import clipped_taps
from numpy_ref.layers import Array
from numpy_ref.memory import empty, empty_like


class Im2col(Algorithm):
    """y = patches @ matrix; the patches of a block of images are made while it is in the cache."""

    def forward(self, x: Array, y: Array) -> list[list[Array]]:
        """Save the patches with `keep_patches`, else nothing but x."""
        saved_patches = []
        for part in self._blocks(y):
            patches = self._patches(x[part], y[part])
            np.matmul(patches, self._matrix(), out=y[part].reshape(-1, y.shape[-1]))
            if self.keep_patches:
                saved_patches.append(patches)
        return [saved_patches]

    def backward(self, x: Array, saved: list[list[Array]], dy: Array, dx: Array | None) -> None:
        """dmatrix = patches.T @ dy, dpatches = dy @ matrix.T; each pixel gets the sum over its copies."""
        (saved_patches,) = saved
        taps = list(clipped_taps(self.kernel, self.stride, self.padding, x.shape[1:3], dy.shape[1:3]))
        if dx is not None:
            dx.fill(0)
        for index, part in enumerate(self._blocks(dy)):
            patches = saved_patches[index] if self.keep_patches else self._patches(x[part], dy[part])
            rows = dy[part].reshape(-1, dy.shape[-1])
            self.weight.add_grad_product(patches.T, rows)
            if dx is None:
                continue
            dpatches = empty_like(patches) if self.keep_patches else patches
            np.matmul(rows, self._matrix().T, out=dpatches)
            dpatches = dpatches.reshape(*dy[part].shape[:3], math.prod(self.kernel), x.shape[-1])
            for tap, out, inner in taps:
                dx[part, *inner] += dpatches[:, *out, tap]

    def _matrix(self) -> Array:
        """The weight as a matrix [KH * KW * I, O], a view."""
        return self.weight.value.reshape(-1, self.weight.value.shape[-1])

    def _blocks(self, y: Array) -> Iterator[slice]:
        """Slices of the batch, each of images whose patches make a block."""
        return even_blocks(len(y), y.nbytes // y.shape[-1] * len(self._matrix()))

    def _patches(self, x: Array, y: Array) -> Array:
        """`layers.im2col` as a matrix. The pixels of a kernel's row are neighbors in the image, too."""
        n, h, w, c = x.shape
        (kh, kw), (sh, sw), (ph, pw) = self.kernel, self.stride, self.padding
        if (ph, pw) != (0, 0):
            padded = empty((n, h + 2 * ph, w + 2 * pw, c), x.dtype)
            padded.fill(0)
            padded[:, ph : ph + h, pw : pw + w] = x
            x = padded
        x = np.ascontiguousarray(x)  # a copy, if x is a view such as every other pixel
        (bn, bh, bw, bc) = x.strides
        patches = empty((n, *y.shape[1:3], kh, kw * c), x.dtype)
        overlapping = np.ndarray(patches.shape, x.dtype, x, 0, (bn, sh * bh, sw * bw, bh, bc))
        np.copyto(patches, overlapping)
        return patches.reshape(-1, kh * kw * c)
