"""Convolution by one product for each row of the output, without patches: for narrow layers.

A matrix product with few columns is slow, and patches of few channels are many numbers for little
arithmetic. In the order [H, C, W, N] the rows of an image that a kernel meets are neighbors in memory, so
they are a matrix [KH * I, W * N] as they lie. The product with the weights of all columns of the kernel,

    z = weight [KW * O, KH * I] @ rows [KH * I, W * N]

has KW terms of each output, each in the column of the image that it reads. y is their sum, each term shifted
to the column of its output. A column has N numbers of a channel, so a shift is a slice, and what the slice
leaves out is padding. Only products of the definition are computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from numpy_ref.fast.algorithm import Algorithm
from numpy_ref.fast.memory_order import HCWN
from numpy_ref.layers import Array
from numpy_ref.memory import empty


class Tap(NamedTuple):
    """A column of the kernel, with the columns of the output and those of the image that it connects.

    With a stride the columns of the image are counted among every `stride`-th: see `RowProducts._columns`.
    """

    number: int
    outputs: slice
    inputs: slice


class RowProducts(Algorithm):
    """y[row] = the sum of z, shifted. x and y are in the order `HCWN`."""

    order = HCWN

    def forward(self, x: Array, y: Array) -> list[Array]:
        """Save nothing but x."""
        images, out = HCWN.array(x), HCWN.array(y)  # [H, I, W, N], [OH, O, OW, N]
        kernel_height, _, in_channels, out_channels = self.weight.value.shape
        for offset, taps in self._columns(images.shape[2], out.shape[2]):
            columns = self._every_column(images, offset)
            weight = self.weight.value[:, [tap.number for tap in taps]].transpose(1, 3, 0, 2)
            weight = weight.reshape(len(taps) * out_channels, kernel_height * in_channels)
            z = empty((len(taps), out_channels, *columns.shape[2:]), x.dtype)
            shifts = [(tap.inputs, tap.outputs) for tap in taps]
            for row, of_kernel, rows in self._rows(len(images), len(out)):
                of_rows = weight[:, of_kernel.start * in_channels : of_kernel.stop * in_channels]
                np.matmul(of_rows, matrix(columns[rows]), out=matrix(z))
                add_shifted(z, shifts, out[row], overwrite=offset == 0)
        return []

    def backward(self, x: Array, saved: list[Array], dy: Array, dx: Array | None) -> None:
        """Both gradients by the same products, of rows of dy.

        A row of dx gets terms from all rows of dy that read it, which are neighbors, too:
        z = weight [KW * I, KH * O] @ rows of dy [KH * O, OW * N], and its sum is shifted the other way.
        dweight[:, column] is the sum over the rows of (rows of x, shifted) @ (row of dy).T.
        """
        images, douts = HCWN.array(x), HCWN.array(dy)
        self.weight.add_written(lambda dweight: self._write_dweight(images, douts, dweight))
        if dx is not None:
            self._write_dx(douts, HCWN.array(dx))

    def _write_dweight(self, images: Array, douts: Array, dweight: Array) -> None:
        n, dweight[...] = images.shape[3], 0
        for offset, taps in self._columns(images.shape[2], douts.shape[2]):
            columns = self._every_column(images, offset)
            for row, of_kernel, rows in self._rows(len(images), len(douts)):
                inputs, dout = matrix(columns[rows]), matrix(douts[row])
                for tap in taps:
                    product = inputs[:, pixels(tap.inputs, n)] @ dout[:, pixels(tap.outputs, n)].T
                    part = dweight[of_kernel, tap.number]
                    part += product.reshape(part.shape)

    def _write_dx(self, douts: Array, dimages: Array) -> None:
        (kh, kw), (sh, _), (ph, _) = self.kernel, self.stride, self.padding
        in_channels, out_channels = self.weight.value.shape[2:]
        z = empty((kw, in_channels, *douts.shape[2:]), douts.dtype)
        for offset in range(sh):  # image rows with this remainder are read by the same rows of the kernel
            kernel_rows = [i for i in reversed(range(kh)) if (offset + ph - i) % sh == 0]
            weight = self.weight.value[kernel_rows].transpose(1, 2, 0, 3)
            weight = weight.reshape(kw * in_channels, len(kernel_rows) * out_channels)
            for row in range(offset, len(dimages), sh):
                start = (row + ph - kernel_rows[0]) // sh if kernel_rows else 0  # of these rows of the kernel
                first, last = max(0, -start), min(len(kernel_rows), len(douts) - start)
                if first >= last:
                    dimages[row] = 0
                    continue
                of_weight = weight[:, first * out_channels : last * out_channels]
                np.matmul(of_weight, matrix(douts[start + first : start + last]), out=matrix(z))
                self._add_terms(z, dimages[row])

    def _add_terms(self, z: Array, drow: Array) -> None:
        """Write into a row of dx, [I, W, N], the sum of the terms z [KW, I, OW, N], shifted."""
        for offset, taps in self._columns(drow.shape[1], z.shape[2]):
            terms = [z[tap.number] for tap in taps]
            shifts = [(tap.outputs, tap.inputs) for tap in taps]
            add_shifted(terms, shifts, drow[:, offset :: self.stride[1]], overwrite=True)

    def _rows(self, height: int, out_height: int) -> Iterator[tuple[int, slice, slice]]:
        """For each row of the output: its number, and the rows of kernel and image that it reads.

        Rows of the padding are left out.
        """
        for row in range(out_height):
            first = row * self.stride[0] - self.padding[0]
            start = max(0, -first)
            stop = max(start, min(self.kernel[0], height - first))
            yield row, slice(start, stop), slice(first + start, first + stop)

    def _columns(self, width: int, out_width: int) -> Iterator[tuple[int, list[Tap]]]:
        """The columns of an image by their remainder, divided by the stride, with the taps that read them.

        The tap that meets the padding least comes first.
        """
        stride, padding = self.stride[1], self.padding[1]
        for offset in range(stride):
            count, taps = len(range(offset, width, stride)), []
            for number in range(self.kernel[1]):
                shift, remainder = divmod(number - padding - offset, stride)
                if remainder == 0:
                    start, stop = max(0, -shift), max(0, min(out_width, count - shift))
                    if start < stop:
                        taps.append(Tap(number, slice(start, stop), slice(start + shift, stop + shift)))
            yield offset, sorted(taps, key=lambda tap: tap.outputs.start - tap.outputs.stop)

    def _every_column(self, images: Array, offset: int) -> Array:
        """Every `stride`-th column of the images, from `offset`; a copy if the stride is more than 1."""
        return np.ascontiguousarray(images[:, :, offset :: self.stride[1]])


def matrix(a: Array) -> Array:
    """a [.., C, W, N], without gaps, as [.. * C, W * N], a view."""
    return a.reshape(math.prod(a.shape[:-2]), math.prod(a.shape[-2:]))


def pixels(columns: slice, n: int) -> slice:
    """Columns of images as columns of a `matrix`."""
    return slice(columns.start * n, columns.stop * n)


def add_shifted(
    terms: Array | Sequence[Array], shifts: Sequence[tuple[slice, slice]], out: Array, *, overwrite: bool
) -> None:
    """Add to out [C, W, N] each term [C, W', N], from its first slice of columns to its second.

    With `overwrite` the sum replaces what was there.
    """
    pairs = list(zip(terms, shifts, strict=True))
    if overwrite and len(pairs) > 1 and pairs[0][1][1] == slice(0, out.shape[1]):
        (first, (source, _)), (second, (second_source, target)), *pairs = pairs
        whole = first[:, source]
        np.add(whole[:, target], second[:, second_source], out=out[:, target])
        out[:, : target.start], out[:, target.stop :] = whole[:, : target.start], whole[:, target.stop :]
    elif overwrite:
        out.fill(0)
    for term, (source, target) in pairs:
        out[:, target] += term[:, source]
