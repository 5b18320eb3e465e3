"""The layers that training spends its time in, in fast forms. What they compute, and why, is in `layers.py`.

A ResNet's training step moves more bytes than it multiplies numbers, so these forms touch memory less:

- **Tiles.** A pass over a large array reads it from main memory, slower than the arithmetic by far. Work goes
  by tiles of rows that stay in the processor's cache while all that concerns them is done.
- **Buffers again.** Every large array comes from `memory.empty`.
- **No columns kept.** Convolutions build the columns of `im2col` a tile at a time, and again in backward: a
  copy within the cache is cheaper than to write nine times the picture to memory and to read it back. With
  `keep_columns` they are kept, as in the plain form.
- **Only what meets the picture.** On pictures of a pixel or four, most of a padded kernel lies outside.
- **Fewer products.** Winograd's convolution, where channels and pixels are many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from numpy_ref import layers
from numpy_ref.layers import Array, Pair, check_channels, check_count, output_size, promote
from numpy_ref.memory import empty, empty_like

TILE = 1 << 18  # bytes of one array in a tile: several arrays of a tile fit into a second-level cache
COLUMNS_TILE = 1 << 22  # bytes of columns in a tile: matrix products want many rows


def tiles(rows: Array) -> Iterator[slice]:
    """Slices of the first axis of so many rows as `TILE` bytes hold, at least one."""
    return slices(len(rows), max(1, TILE * len(rows) // max(rows.nbytes, 1)))


def slices(n: int, step: int) -> Iterator[slice]:
    """Slices of range(n), `step` long but for the last."""
    return (slice(i, i + step) for i in range(0, n, step))


def even_tiles(n: int, nbytes: int) -> Iterator[slice]:
    """Even slices of n pictures of `COLUMNS_TILE` bytes, if all take `nbytes`."""
    count = max(1, min(n, math.ceil(nbytes / COLUMNS_TILE)))
    bounds = [n * i // count for i in range(count + 1)]
    return (slice(*each) for each in pairwise(bounds))


# G and A' of Winograd's F(2x2, 3x3), Lavin & Gray 2016, arXiv 1509.09308, equation 7, for both axes
WINOGRAD_KERNEL, WINOGRAD_OUTPUT = (
    np.kron(matrix, matrix)
    for matrix in (
        np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
        np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    )
)
WINOGRAD_CHANNELS, WINOGRAD_ROWS = 64, 200  # from which on it pays, by measurement


def transform(matrix: Array, a: Array) -> Array:
    """matrix [P, Q] @ a [Q, M, C]: [P, M, C]."""
    out = empty((len(matrix), *a.shape[1:]), a.dtype)
    np.matmul(matrix.astype(a.dtype), a.reshape(len(a), -1), out=out.reshape(len(out), -1))
    return out


def product(a: Array, b: Array) -> Array:
    """a [16, P, Q] @ b [16, Q, R]."""
    return np.matmul(a, b, out=empty((len(a), a.shape[1], b.shape[2]), a.dtype))


def zeros_round(x: Array) -> Array:
    """Zeros for x [N, H, W, C] and a pixel all round it, after odd sides two: [N, 2 TH + 2, 2 TW + 2, C]."""
    n, h, w, c = x.shape
    padded = empty((n, h + h % 2 + 2, w + w % 2 + 2, c), x.dtype)
    padded.fill(0)
    return padded


def field_pixels(a: Array, axis: int) -> list[Array]:
    """Along an axis of 2 T + 2 pixels, with fields of 4 two apart: pixel 0 of every field, pixel 1, 2, 3.
    Views of T pixels."""
    before = (slice(None),) * axis
    return [a[(*before, slice(i, i + a.shape[axis] - 3, 2))] for i in range(4)]


def transform_pixels(d: Sequence[Array], out: Array) -> None:
    """B' d, the third matrix of Lavin & Gray's equation 7, of pixels 0 to 3 of fields: [4, ...]."""
    np.subtract(d[0], d[2], out=out[0])
    np.add(d[1], d[2], out=out[1])
    np.subtract(d[2], d[1], out=out[2])
    np.subtract(d[1], d[3], out=out[3])


def transform_pixels_backward(dout: Array, dd: Sequence[Array]) -> None:
    """Add to dd, the gradients of the pixels, B dout, with dout [4, ...]."""
    inner = empty(dout.shape[1:], dout.dtype)
    dd[0] += dout[0]
    dd[3] -= dout[3]
    np.subtract(dout[1], dout[2], out=inner)
    dd[1] += np.add(inner, dout[3], out=inner)
    np.add(dout[1], dout[2], out=inner)
    dd[2] += np.subtract(inner, dout[0], out=inner)


Tap = tuple[int, tuple[slice, slice], tuple[slice, slice]]  # number, outputs, inputs


def clipped_taps(kernel: Pair, stride: Pair, padding: Pair, size: Pair, out_size: Pair) -> Iterator[Tap]:
    """For every position of the kernel that meets the picture: its number, and which outputs read which
    inputs.

    As `layers.taps`, for the picture without its padding: outputs whose tap lies in the padding are left out.
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


class Conv2d(layers.Conv2d):
    """`layers.Conv2d` in one of four forms, whichever suits the shapes.

    Attributes:
        keep_columns: whether the columns of the pictures are kept for backward, and not made anew.
        needs_dx: whether backward works out dL/dx; where nothing comes before, training has no use for it.
    """

    keep_columns = False
    needs_dx = True

    def forward(self, x: Array, train: bool = False) -> Array:
        """x [N, H, W, I] to [N, OH, OW, O]."""
        weight = self.weight.value
        check_channels(x, weight.shape[2], 4)
        n, h, w, _ = x.shape
        size = output_size((h, w), self.kernel, self.stride, self.padding)
        x = promote(x, weight)
        y = empty((n, *size, weight.shape[-1]), x.dtype)
        if self.kernel == (1, 1) and self.padding == (0, 0):
            self._pointwise(x, y)
        elif self._suits_winograd(x):
            self._by_winograd(x, y)
        else:
            taps = list(clipped_taps(self.kernel, self.stride, self.padding, (h, w), size))
            # The share of all (output, tap) pairs that meet the picture decides
            met = sum((rows.stop - rows.start) * (cols.stop - cols.start) for _, (rows, cols), _ in taps)
            if met <= 0.5 * math.prod(self.kernel) * math.prod(size):
                self._by_taps(x, y, taps)
            else:
                self._by_columns(x, y, taps)
        if self.bias is not None:
            y += self.bias.value
        return y

    def backward(self, dy: Array) -> Array:
        """dL/dx, zeros without `needs_dx`, and the gradients of the parameters, by the form forward took."""
        form, x, *kept = self.kept
        dy = promote(dy, x)
        if self.bias is not None:
            self.bias.add_grad(_sum_pixels(dy))
        dx = empty_like(x)
        form(x, *kept, dy, dx)
        return dx

    # A 1x1 convolution is a linear layer over pixels: a matrix product on a view.

    def _pointwise(self, x: Array, y: Array) -> None:
        (sh, sw) = self.stride
        rows = x[:, ::sh, ::sw].reshape(-1, x.shape[-1])  # a view, unless strided
        np.matmul(rows, self._matrix, out=y.reshape(-1, y.shape[-1]))
        self.keep(self._pointwise_backward, x, rows)

    def _pointwise_backward(self, x: Array, rows: Array, dy: Array, dx: Array) -> None:
        (sh, sw), dy = self.stride, dy.reshape(-1, dy.shape[-1])
        self.weight.add_grad_product(rows.T, dy)
        if not self.needs_dx:
            dx.fill(0)
        elif (sh, sw) == (1, 1):
            np.matmul(dy, self._matrix.T, out=dx.reshape(rows.shape))
        else:
            dx.fill(0)
            inner = dx[:, ::sh, ::sw]
            inner[...] = (dy @ self._matrix.T).reshape(inner.shape)

    # A convolution is the sum of 1x1 convolutions, one for each tap of the kernel, of the shifted picture.
    # Where the picture is not much larger than the padding, only this form spares the products with zero.

    def _by_taps(self, x: Array, y: Array, taps: list[Tap]) -> None:
        y.fill(0)
        weight = self.weight.value.reshape(-1, *self.weight.value.shape[2:])
        for tap, out, inner in taps:
            inputs, outputs = x[:, *inner], y[:, *out]
            outputs += (inputs.reshape(-1, x.shape[-1]) @ weight[tap]).reshape(outputs.shape)
        self.keep(self._by_taps_backward, x, taps)

    def _by_taps_backward(self, x: Array, taps: list[Tap], dy: Array, dx: Array) -> None:
        dx.fill(0)
        weight = self.weight.value.reshape(-1, *self.weight.value.shape[2:])
        for tap, out, inner in taps if self.needs_dx else ():
            inputs, outputs = dx[:, *inner], dy[:, *out]
            inputs += (outputs.reshape(-1, dy.shape[-1]) @ weight[tap].T).reshape(inputs.shape)

        def dweight(flat: Array) -> None:
            each = flat.reshape(weight.shape)
            for missing in set(range(len(each))) - {tap for tap, _, _ in taps}:
                each[missing] = 0
            for tap, out, inner in taps:
                inputs, outputs = x[:, *inner], dy[:, *out]
                np.matmul(inputs.reshape(-1, x.shape[-1]).T, outputs.reshape(-1, dy.shape[-1]), out=each[tap])

        self.weight.add_written(dweight)

    # Winograd's F(2x2, 3x3) (Lavin & Gray 2016, arXiv 1509.09308): of a field of 4x4 pixels, 2x2 outputs of a
    # 3x3 kernel take 36 products a pair of channels, and only 16 between fields and kernels transformed:
    # y = A'[(G g G') * (B' d B)]A. A field is a column of 16 numbers here and a transform one matrix product;
    # so every backward step is the product with the transpose.

    def _suits_winograd(self, x: Array) -> bool:
        """Whether the products saved outweigh the transforms: many channels, and pixels enough for them."""
        rows = math.prod(x.shape[:3])
        square = (self.kernel, self.stride, self.padding) == ((3, 3), (1, 1), (1, 1))
        return square and min(self.weight.value.shape[2:]) >= WINOGRAD_CHANNELS and rows >= WINOGRAD_ROWS

    def _by_winograd(self, x: Array, y: Array) -> None:
        kernels, kept = self._kernels(), []
        for part in even_tiles(len(x), 4 * x.nbytes):
            fields = self._fields(x[part])
            outputs = transform(WINOGRAD_OUTPUT, product(fields, kernels))
            for corner, values in self._corners(y[part], outputs):
                corner[...] = values
            if self.keep_columns:
                kept.append(fields)
        self.keep(self._by_winograd_backward, x, kept)

    def _by_winograd_backward(self, x: Array, kept: list[Array], dy: Array, dx: Array) -> None:
        kernels, dkernels = self._kernels(), np.zeros(())
        for index, part in enumerate(even_tiles(len(x), 4 * x.nbytes)):
            fields = kept[index] if self.keep_columns else self._fields(x[part])
            doutputs = empty((4, fields.shape[1], dy.shape[-1]), dy.dtype)
            doutputs.fill(0)  # where a field reaches over the edge
            for corner, values in self._corners(dy[part], doutputs):
                values[...] = corner
            dproducts = transform(WINOGRAD_OUTPUT.T, doutputs)
            own = product(fields.swapaxes(1, 2), dproducts)
            dkernels = own if index == 0 else np.add(dkernels, own, out=own)
            if self.needs_dx:
                dfields = product(dproducts, kernels.swapaxes(1, 2))
                self._add_fields(dfields, dx[part])
            else:
                dx[part] = 0
        self.weight.add_grad_product(WINOGRAD_KERNEL.T.astype(dy.dtype), dkernels.reshape(16, -1))

    def _kernels(self) -> Array:
        """The kernels, transformed: [16, I, O]."""
        return transform(WINOGRAD_KERNEL, self.weight.value.reshape(9, *self.weight.value.shape[2:]))

    # The pixels' transform is nothing but sums and differences, along rows and then along columns.

    def _fields(self, x: Array) -> Array:
        """The T = N * TH * TW fields of x [N, H, W, I], transformed: [16, T, I]."""
        n, h, w, c = x.shape
        padded = zeros_round(x)
        padded[:, 1 : h + 1, 1 : w + 1] = x
        half = empty((4, n, -(-h // 2), *padded.shape[2:]), x.dtype)
        transform_pixels(field_pixels(padded, 1), half)
        fields = empty((4, 4, n, -(-h // 2), -(-w // 2), c), x.dtype)
        transform_pixels(field_pixels(half, 3), fields.swapaxes(0, 1))
        return fields.reshape(16, -1, c)

    def _add_fields(self, dfields: Array, dx: Array) -> None:
        """Write to dx [N, H, W, I] the sum of the fields' gradients [16, T, I]: fields overlap."""
        n, h, w, c = dx.shape
        dpadded = zeros_round(dx)
        dhalf = empty((4, n, -(-h // 2), *dpadded.shape[2:]), dx.dtype)
        dhalf.fill(0)
        each = dfields.reshape(4, 4, n, -(-h // 2), -(-w // 2), c)
        transform_pixels_backward(each.swapaxes(0, 1), field_pixels(dhalf, 3))
        transform_pixels_backward(dhalf, field_pixels(dpadded, 1))
        dx[...] = dpadded[:, 1 : h + 1, 1 : w + 1]

    def _corners(self, y: Array, outputs: Array) -> Iterator[tuple[Array, Array]]:
        """Where each of the 2x2 outputs of all fields lies in y [N, H, W, O], and in outputs [4, T, O]."""
        n, h, w, o = y.shape
        each = outputs.reshape(2, 2, n, -(-h // 2), -(-w // 2), o)
        for i, j in np.ndindex(2, 2):
            corner = y[:, i::2, j::2]
            yield corner, each[i, j, :, : corner.shape[1], : corner.shape[2]]

    # The matrix product of the plain form, a tile of pictures at a time.

    def _by_columns(self, x: Array, y: Array, taps: list[Tap]) -> None:
        kept = []
        for part in self._tiles(y):
            columns = self._columns(x[part], y[part])
            np.matmul(columns, self._matrix, out=y[part].reshape(-1, y.shape[-1]))
            if self.keep_columns:
                kept.append(columns)
        self.keep(self._by_columns_backward, x, taps, kept)

    def _by_columns_backward(
        self, x: Array, taps: list[Tap], kept: list[Array], dy: Array, dx: Array
    ) -> None:
        dx.fill(0)
        for index, part in enumerate(self._tiles(dy)):
            columns = kept[index] if self.keep_columns else self._columns(x[part], dy[part])
            rows = dy[part].reshape(-1, dy.shape[-1])
            self.weight.add_grad_product(columns.T, rows)
            if not self.needs_dx:
                continue
            dcolumns = empty_like(columns) if self.keep_columns else columns
            np.matmul(rows, self._matrix.T, out=dcolumns)
            each = dcolumns.reshape(*dy[part].shape[:3], math.prod(self.kernel), x.shape[-1])
            for tap, out, inner in taps:
                dx[part, *inner] += each[:, *out, tap]

    def _tiles(self, y: Array) -> Iterator[slice]:
        """Slices of the batch whose columns make a tile."""
        return even_tiles(len(y), y.nbytes // y.shape[-1] * len(self._matrix))

    def _columns(self, x: Array, y: Array) -> Array:
        """`layers.im2col` as a matrix. The pixels of a kernel's row lie side by side in the picture."""
        n, h, w, c = x.shape
        (kh, kw), (sh, sw), (ph, pw) = self.kernel, self.stride, self.padding
        if (ph, pw) != (0, 0):
            padded = empty((n, h + 2 * ph, w + 2 * pw, c), x.dtype)
            padded.fill(0)
            padded[:, ph : ph + h, pw : pw + w] = x
            x = padded
        x = np.ascontiguousarray(x)  # a copy of what is not, such as a view of every other pixel
        (bn, bh, bw, bc) = x.strides
        columns = empty((n, *y.shape[1:3], kh, kw * c), x.dtype)
        fields = np.ndarray(columns.shape, x.dtype, x, 0, (bn, sh * bh, sw * bw, bh, bc))
        np.copyto(columns, fields)
        return columns.reshape(-1, kh * kw * c)


class BatchNorm(layers.BatchNorm):
    """`layers.BatchNorm` by tiles, each pass over memory doing all it can.

    Three passes forward: the mean; x - mean, which is kept in x's place, and its squares; the rest. Two
    backward: the mask of ReLU and both sums; then dx, which is linear in dy and x - mean, with one
    coefficient a channel for each.

    Attributes:
        all_reduce: adds up sums over all parts of a batch that is split between processes; see `parallel.py`.
        keeps_running: whether this process keeps the running statistics.
    """

    all_reduce: Callable[[Array], Array] = staticmethod(lambda sums: sums)
    keeps_running = True

    def forward(self, x: Array, train: bool = False, shortcut: Array | None = None) -> Array:
        """x [..., C], and a shortcut of its shape, to that shape."""
        check_channels(x, len(self.weight.value))
        rows, fold = _wide(promote(x, self.weight.value))
        centred, y = empty_like(rows), empty_like(rows)
        inverse_std, n = self._centre(rows, centred, fold, train)
        scale, offset = _tile(self.weight.value * inverse_std, fold), _tile(self.bias.value, fold)
        added = None if shortcut is None else shortcut.reshape(y.shape)
        zeros = np.zeros(y.shape[1], y.dtype)  # NumPy's maximum with a number is three times slower

        for part in tiles(rows):
            out = np.multiply(centred[part], scale, out=y[part])
            out += offset
            if added is not None:
                out += added[part]
            if self.relu:
                np.maximum(out, zeros, out=out)
        self.keep(centred, inverse_std, y if self.relu else None, n)
        return y.reshape(x.shape)

    def _centre(self, rows: Array, centred: Array, fold: int, train: bool) -> tuple[Array, int]:
        """Write x - mean. Returns 1 / sqrt(var + eps), [C], and in training how many values a channel has."""
        if not train:
            np.subtract(rows, _tile(self.running_mean, fold), out=centred)
            return self._statistics(rows, train)[1], 0
        totals = self.all_reduce(np.append(_fold(_sum(rows, tiles(rows)), fold), len(rows) * fold))
        n = int(totals[-1])
        check_count(n)
        mean = (totals[:-1] / n).astype(rows.dtype)
        wide_mean, squares = _tile(mean, fold), np.zeros(rows.shape[1], np.float64)
        for part in tiles(rows):
            tile = np.subtract(rows[part], wide_mean, out=centred[part])
            squares += np.einsum("nc,nc->c", tile, tile)
        var = (self.all_reduce(_fold(squares, fold)) / n).astype(rows.dtype)
        return self._learn(mean, var, n)[1], n

    def _learn(self, mean: Array, var: Array, n: int) -> tuple[Array, Array]:
        """Note the batch's statistics, unless another process does."""
        if self.keeps_running:
            return super()._learn(mean, var, n)
        return mean, 1 / np.sqrt(var + self.eps)

    def backward(self, dy: Array) -> Array:
        """dL/dx; the shortcut's gradient is then in `dshortcut`."""
        centred, inverse_std, y, n = self.kept
        fold = centred.shape[1] // len(inverse_std)
        d = promote(dy.reshape(centred.shape), centred)
        masked = d if y is None else empty_like(d)
        ones = np.ones(len(d), d.dtype)
        sums = np.zeros((2, d.shape[1]), np.float64)

        for part in tiles(d):
            if y is not None:
                np.multiply(d[part], y[part] > 0, out=masked[part])
            tile = masked[part]
            sums[0] += ones[part] @ tile
            sums[1] += np.einsum("nc,nc->c", tile, centred[part])

        dbias, dscale = sums = _fold(sums, fold)
        self.weight.add_grad(dscale * inverse_std)
        self.bias.add_grad(dbias)
        self.dshortcut = masked.reshape(dy.shape)
        scale, dx = self.weight.value * inverse_std, empty_like(d)
        a = _tile(scale, fold)
        if n:
            # w s (dy - dbias / n - z dweight / n) with z = s (x - mean), as a dy + b (x - mean) + c
            dbias, dscale = self.all_reduce(sums)
            b, c = -scale * inverse_std**2 * dscale / n, -scale * dbias / n
            b, c = _tile(b.astype(d.dtype), fold), _tile(c.astype(d.dtype), fold)
        for part in tiles(d):
            out = np.multiply(masked[part], a, out=dx[part])
            if n:
                linear = centred[part] * b
                linear += c
                out += linear
        return dx.reshape(dy.shape)


def _wide(x: Array) -> tuple[Array, int]:
    """x [..., C] as [M, F * C], F pixels side by side, and F: NumPy is slow at short rows."""
    channels = x.shape[-1]
    pixels, fold = x.size // channels, 1
    while fold * channels < 1024 and pixels % (2 * fold) == 0:
        fold *= 2
    return x.reshape(pixels // fold, fold * channels), fold


def _sum(rows: Array, parts: Iterator[slice]) -> Array:
    """The sum of rows [M, C], float64 [C]: of each part by BLAS, in the type of the rows."""
    ones, sums = np.ones(len(rows), rows.dtype), np.zeros(rows.shape[1], np.float64)
    for part in parts:
        sums += ones[part] @ rows[part]
    return sums


def _sum_pixels(x: Array) -> Array:
    """The sum of x [..., C] over all axes but the last, [C]; of float32 in float64, 128 rows at a time."""
    if x.dtype == np.float64:
        return np.asarray(x.sum(tuple(range(x.ndim - 1))))
    rows, fold = _wide(x)
    return _fold(_sum(rows, slices(len(rows), 128)), fold)


def _tile(a: Array, fold: int) -> Array:
    """a [C] for each of F pixels side by side: [F * C]."""
    return np.concatenate([a] * fold)  # `np.tile` takes as long as an operation on a small tile


def _fold(sums: Array, fold: int) -> Array:
    """The sums [..., F * C] over F pixels side by side: [..., C]."""
    return sums if fold == 1 else np.asarray(sums.reshape(*sums.shape[:-1], fold, -1).sum(-2))


class MaxPool2d(layers.MaxPool2d):
    """`layers.MaxPool2d` by whole-array maxima; the winner is found again in backward."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """x [N, H, W, C] to [N, OH, OW, C]."""
        n, h, w, c = x.shape
        size = output_size((h, w), self.kernel, self.stride, self.padding)
        taps = list(clipped_taps(self.kernel, self.stride, self.padding, (h, w), size))
        y = empty((n, *size, c), x.dtype)
        y.fill(-np.inf)

        for part in tiles(x):
            for _, out, inner in taps:
                largest = y[part, *out]
                np.maximum(largest, x[part, *inner], out=largest)
        self.keep(x, y, taps)
        return y

    def backward(self, dy: Array) -> Array:
        """dL/dx. Whichever tap equals the maximum first takes the gradient, and leaves none for the next."""
        x, y, taps = self.kept
        dx = empty_like(x)

        for part in tiles(x):
            dx[part] = 0
            left = dy[part].copy()
            for _, out, inner in taps:
                taken = left[:, *out] * (x[part, *inner] == y[part, *out])
                dx[part, *inner] += taken
                left[:, *out] -= taken
        return dx
