"""The positions of a kernel, each with the outputs and inputs that it connects."""

from __future__ import annotations

from collections.abc import Iterator

from numpy_ref.layers import Pair

Tap = tuple[int, tuple[slice, slice], tuple[slice, slice]]  # number, outputs, inputs


def clipped_taps(kernel: Pair, stride: Pair, padding: Pair, size: Pair, out_size: Pair) -> Iterator[Tap]:
    """For every position of the kernel that meets the image: its number, the outputs, and their inputs.

    As `layers.taps`, for the image without its padding: outputs whose tap lies in the padding are left out.
    """

    def along(k: int, axis: int) -> tuple[slice, slice]:
        s, p, n, out = stride[axis], padding[axis], size[axis], out_size[axis]
        first = max(0, -((k - p) // s))  # the first o with o * s + k - p >= 0
        count = max(0, min(out, (n - 1 - k + p) // s + 1) - first)
        start = first * s + k - p
        return slice(first, first + count), slice(start, start + max(0, (count - 1) * s + 1), s)

    for i in range(kernel[0]):
        (out_rows, rows) = along(i, 0)
        for j in range(kernel[1]):
            (out_cols, cols) = along(j, 1)
            if out_rows.start < out_rows.stop and out_cols.start < out_cols.stop:
                yield i * kernel[1] + j, (out_rows, out_cols), (rows, cols)


def share_inside(kernel: Pair, stride: Pair, padding: Pair, size: Pair, out_size: Pair) -> float:
    """The share of all (output, tap) pairs that read the image, not its padding."""
    inside = 0
    for _, (rows, cols), _ in clipped_taps(kernel, stride, padding, size, out_size):
        inside += (rows.stop - rows.start) * (cols.stop - cols.start)
    return inside / (kernel[0] * kernel[1] * out_size[0] * out_size[1])
