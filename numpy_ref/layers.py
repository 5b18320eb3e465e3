"""The layers of a ResNet in plain NumPy, forward and backward by hand: NHWC arrays, PyTorch's conventions.

Every layer has `forward(x, train=False) -> y` and `backward(dy) -> dx`. `dy` is the gradient of a loss L with
respect to the output, dL/dy; `dx` is dL/dx; the gradients of the parameters are added to their `.grad`. What
backward needs is kept from the last forward until `forget()`; inside `no_grad()` nothing is kept. So a layer
serves one thread at a time.

These are the readable forms. `fast.py` has the same layers in the forms that training uses; the tests hold
them equal. The derivations use one rule, the chain rule: dL/da = sum over all b that a enters, dL/db * db/da.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Pair = tuple[int, int]


SHORT = 1024  # terms of a sum that float32 adds one by one with an error of some 1e-6 at most


def pair(name: str, value: int | Pair, least: int = 1) -> Pair:
    """Return (height, width) from one integer for both, or one for each.

    Raises ValueError that names the argument if one is not an integer of at least `least`.
    """
    values = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(values) != 2 or not all(isinstance(v, int | np.integer) and v >= least for v in values):
        hint = "; kernel_size // 2 keeps the size at stride 1" if name == "padding" else ""
        raise ValueError(f"{name} must be an integer from {least} on or a pair of them, got {value!r}{hint}")
    return int(values[0]), int(values[1])


def sum_type(dtype: np.dtype[Any], terms: int) -> np.dtype[Any]:
    """Return the type in which to add up so many numbers along an axis that is not the last.

    NumPy adds these one after the other, so that the error grows with their number: in float32 a mean of
    16 x 224 x 224 values is off by 4e-5, their variance by 4e-4. From `SHORT` terms on it is float64.
    """
    return np.promote_types(dtype, np.float64 if terms > SHORT else np.float32)


def promote(x: Array, weight: Array) -> Array:
    """Return x in the type of its products with `weight`, in the machine's byte order; itself if it has that.

    A product of a float16 input and a float16 gradient would be added up in float16.
    """
    return x.astype(np.result_type(x, weight), copy=False)


def draw(
    rng: np.random.Generator | None,
    distribution: str,
    shape: tuple[int, ...],
    scale: float,
    dtype: npt.DTypeLike,
) -> Array:
    """`scale` times random float32 numbers: "normal" ones, or "uniform" ones in [-1, 1).

    Each call draws from the next child of `rng`, as `jax_resnet.layers.draw` does: both engines' networks of
    seed s start from the same weights, bit for bit. Without `rng` they are zeros, to be loaded. Raises
    TypeError for a seed: layers that are made with the same seed would start with the same numbers.
    """
    if rng is None:
        return np.zeros(shape, dtype)
    if not isinstance(rng, np.random.Generator):
        raise TypeError(
            f"rng must be a generator that all layers share, such as np.random.default_rng(0), or None for "
            f"zeros, got {rng!r}"
        )
    (child,) = rng.spawn(1)
    if distribution == "normal":
        values = child.standard_normal(shape, np.float32)
    else:
        values = 2 * child.random(shape, np.float32) - 1
    values *= np.float32(scale)
    return values.astype(dtype, copy=False)


class Parameter:
    """A trainable array and, in place, the gradient of the loss with respect to it.

    Args:
        value: the array, of a floating type. It becomes the parameter's own, not a copy, unless it is
            read-only, not C-contiguous (Fortran order, a transposed kernel, a slice) or not in the machine's
            byte order.

    Attributes:
        trainable: False holds it where it is: layers add no gradient and optimizers pass it over.

    Raises:
        ValueError: if the array is of another type, such as complex128.
    """

    def __init__(self, value: npt.ArrayLike) -> None:
        self.trainable = True
        self._grad: Array | None = None
        self._is_zero = True  # whatever _grad holds
        self.value = value

    @property
    def value(self) -> Array:
        """The array: C-contiguous and writeable. Another one that is assigned is taken as in `__init__`."""
        return self._value

    @value.setter
    def value(self, value: npt.ArrayLike) -> None:
        array = np.asarray(value)
        if array.dtype.kind != "f":
            hint = "; make the real and the imaginary part two parameters" if array.dtype.kind == "c" else ""
            raise ValueError(f"a parameter must be of a floating type, got {array.dtype}{hint}")
        self._value = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
        if self._grad is not None and (self._grad.shape, self._grad.dtype) != (array.shape, array.dtype):
            self._grad, self._is_zero = None, True

    @property
    def grad(self) -> Array:
        """dL/dvalue, of the shape and type of `value`: the sum of all backward passes since `zero_grad`."""
        gradient = self._place()
        if self._is_zero:
            gradient.fill(0)
            self._is_zero = False
        return gradient

    def zero_grad(self) -> None:
        """Let the next gradient replace the sum; nothing is written until then."""
        self._is_zero = True

    def add_grad(self, gradient: Array) -> None:
        """grad += gradient. Raises ValueError if it is not of the shape of `value`."""
        if np.shape(gradient) != self.value.shape:
            raise ValueError(
                f"a gradient of shape {np.shape(gradient)} for a parameter of shape {self.value.shape}"
            )
        self.add_written(lambda out: np.copyto(out, gradient))

    def add_grad_product(self, a: Array, b: Array) -> None:
        """grad += a @ b, where the product's elements are those of `value` in order."""
        self.add_written(lambda out: np.matmul(a, b, out=out.reshape(a.shape[0], b.shape[1])))

    def add_written(self, write: Callable[[Array], Any]) -> None:
        """grad += what `write(out)` writes into an array like `value`: into `grad` itself while that is 0."""
        if not self.trainable:
            return
        if self._is_zero:
            write(self._place())
            self._is_zero = False
        else:
            out = np.empty_like(self.value)
            write(out)
            self._place()[...] += out

    def keep_grad_in(self, place: Array) -> None:
        """Let `grad` be this array from now on; whatever it holds is overwritten.

        Raises ValueError unless it is C-contiguous and of the shape of `value`.
        """
        if place.shape != self.value.shape or not place.flags.c_contiguous:
            raise ValueError(f"a gradient must be a C-contiguous array of shape {self.value.shape}")
        self._grad, self._is_zero = place, True

    def _place(self) -> Array:
        if self._grad is None:
            self._grad = np.empty_like(self.value)
        return self._grad

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_grad": None, "_is_zero": True}


_keeping = ContextVar("_keeping", default=True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Inside, forward keeps nothing for backward, as under `torch.no_grad()`: in this thread (or asynchronous
    task) alone."""
    token = _keeping.set(False)
    try:
        yield
    finally:
        _keeping.reset(token)


def check_channels(x: Array, channels: int, ndim: int | None = None) -> None:
    """Raise ValueError unless the last axis of x is that of the channels, and it has `ndim` axes."""
    if x.ndim and x.shape[-1] == channels and ndim in (None, x.ndim):
        return
    wanted = "[N, H, W, {}]" if ndim == 4 else "[..., {}]" if ndim is None else "[N, {}]"
    hint = ""
    if x.ndim == 4 and x.shape[1] == channels and ndim != 2:
        hint = "; from channels first it is x.transpose(0, 2, 3, 1)"
    raise ValueError(f"expected channels last, {wanted.format(channels)}, got shape {x.shape}{hint}")


class Layer:
    """A function of arrays with parameters, or a tree of such. Attributes that are layers are its parts."""

    _kept: Any = None

    def forward(self, x: Array, train: bool = False) -> Array:
        """The output. `train` is PyTorch's train mode: batch norm uses and learns the batch's statistics."""
        raise NotImplementedError

    def backward(self, dy: Array) -> Array:
        """dL/dx from dL/dy, of the last forward; adds to the gradients of the parameters."""
        raise NotImplementedError

    def __call__(self, x: Array, train: bool = False) -> Array:
        return self.forward(x, train)

    def keep(self, *values: Any) -> None:
        """Keep what backward needs, unless inside `no_grad()`."""
        self._kept = values if _keeping.get() else None

    @property
    def kept(self) -> Any:
        """What the last forward kept. Raises RuntimeError if it kept nothing."""
        if self._kept is None:
            raise RuntimeError(f"{type(self).__name__}.backward needs a forward before it, outside no_grad()")
        return self._kept

    def forget(self) -> None:
        """Let go of what forward kept, here and in every part."""
        self._kept = None
        for _, part in self.parts():
            part.forget()

    def parts(self) -> Iterator[tuple[str, Layer]]:
        """The layers this one is made of, by name, in the order of their making."""
        for name, value in vars(self).items():
            if isinstance(value, Layer):
                yield name, value

    def walk(self) -> Iterator[Layer]:
        """This layer and all it is made of."""
        yield self
        for _, part in self.parts():
            yield from part.walk()

    def variables(self) -> dict[str, Parameter | Array]:
        """Parameters and running statistics by their names in the state dict, such as `layer1.0.bn2.bias`."""
        found: dict[str, Parameter | Array] = {}
        for name, value in vars(self).items():
            if isinstance(value, Parameter) or name.startswith("running_"):
                found[name] = value
        for name, part in self.parts():
            found |= {f"{name}.{inner}": value for inner, value in part.variables().items()}
        return found

    def named_parameters(self) -> dict[str, Parameter]:
        """The parameters by their names in the state dict."""
        return {name: value for name, value in self.variables().items() if isinstance(value, Parameter)}

    def parameters(self) -> list[Parameter]:
        """The parameters, to hand to an optimizer; one that has several names stands there once."""
        return list(dict.fromkeys(self.named_parameters().values()))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_kept", "dshortcut")}


class Sequential(Layer):
    """Layers one after another, given one by one or as a list; their names are "0", "1", ..."""

    def __init__(self, *layers: Layer | list[Layer] | tuple[Layer, ...]) -> None:
        self.layers: list[Layer] = []
        for layer in layers:
            self.layers += layer if isinstance(layer, list | tuple) else [layer]
        for layer in self.layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"Sequential takes layers, got {layer!r}")

    def parts(self) -> Iterator[tuple[str, Layer]]:
        """The layers by their numbers."""
        return ((str(index), layer) for index, layer in enumerate(self.layers))

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def forward(self, x: Array, train: bool = False) -> Array:
        """layers[-1](... layers[0](x))."""
        for layer in self.layers:
            x = layer.forward(x, train)
        return x

    def backward(self, dy: Array) -> Array:
        """The chain rule: the layers' backward passes, last to first."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy


class Linear(Layer):
    """y = x @ weight + bias. `weight` [in, out] and `bias` [out] from PyTorch's uniform(+-1 / sqrt(in))."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rng: np.random.Generator | None,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        bound = 1.0 / math.sqrt(in_features)
        self.weight = Parameter(draw(rng, "uniform", (in_features, out_features), bound, dtype))
        self.bias = Parameter(draw(rng, "uniform", (out_features,), bound, dtype))

    def forward(self, x: Array, train: bool = False) -> Array:
        """x [N, in] to [N, out]."""
        check_channels(x, len(self.weight.value), 2)
        x = promote(x, self.weight.value)
        self.keep(x)
        return x @ self.weight.value + self.bias.value

    def backward(self, dy: Array) -> Array:
        r"""y_nj = sum_i x_ni w_ij + b_j. So, summing over whatever each variable enters:

        dL/dx_ni = sum_j dy_nj w_ij      dx = dy @ weight.T        [N, in]
        dL/dw_ij = sum_n x_ni dy_nj      dweight = x.T @ dy        [in, out]
        dL/db_j  = sum_n dy_nj           dbias = dy summed over n  [out]
        """
        (x,) = self.kept
        self.weight.add_grad_product(x.T, dy)
        self.bias.add_grad(dy.sum(0, sum_type(dy.dtype, len(dy))))
        return dy @ self.weight.value.T


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    """(size + 2 * padding - kernel) // stride + 1, for height and width.

    Raises ValueError if the kernel is larger than the padded picture.
    """
    (h, w), (kh, kw), (sh, sw), (ph, pw) = size, kernel, stride, padding
    if h + 2 * ph < kh or w + 2 * pw < kw:
        raise ValueError(f"a kernel of {kernel} does not fit pictures of {size} padded by {padding}")
    return (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1


def pad2d(x: Array, padding: Pair, value: float = 0.0) -> Array:
    """x [N, H, W, C] with `padding` rows and columns of `value` on each side; a view where there are none."""
    (ph, pw) = padding
    if ph == pw == 0:
        return x
    return np.pad(x, ((0, 0), (ph, ph), (pw, pw), (0, 0)), constant_values=value)


def unpad2d(x: Array, padding: Pair) -> Array:
    """The inverse of `pad2d`, a view."""
    (ph, pw), (_, h, w, _) = padding, x.shape
    return x[:, ph : h - ph, pw : w - pw]


def taps(kernel: Pair, stride: Pair, size: Pair) -> Iterator[tuple[slice, slice]]:
    """For every position (i, j) of the kernel, which rows and columns of the padded picture it meets.

    Output (p, q) reads the picture at (p * stride + i, q * stride + j): for a fixed (i, j) that is one
    strided slice of `size` = (OH, OW) elements.
    """
    (kh, kw), (sh, sw), (oh, ow) = kernel, stride, size
    for i in range(kh):
        for j in range(kw):
            yield slice(i, i + (oh - 1) * sh + 1, sh), slice(j, j + (ow - 1) * sw + 1, sw)


def im2col(x: Array, kernel: Pair, stride: Pair, padding: Pair) -> Array:
    """Every receptive field of x [N, H, W, C] as a row: [N, OH, OW, KH * KW * C]."""
    n, h, w, c = x.shape
    oh, ow = output_size((h, w), kernel, stride, padding)
    padded = pad2d(x, padding)
    columns = np.empty((n, oh, ow, kernel[0] * kernel[1], c), x.dtype)
    for tap, (rows, cols) in enumerate(taps(kernel, stride, (oh, ow))):
        columns[:, :, :, tap] = padded[:, rows, cols]
    return columns.reshape(n, oh, ow, kernel[0] * kernel[1] * c)


def col2im(columns: Array, shape: tuple[int, ...], kernel: Pair, stride: Pair, padding: Pair) -> Array:
    """The transpose of `im2col`: each element of x [N, H, W, C] becomes the sum of all its copies."""
    n, h, w, c = shape
    oh, ow = columns.shape[1:3]
    columns = columns.reshape(n, oh, ow, kernel[0] * kernel[1], c)
    padded = np.zeros((n, h + 2 * padding[0], w + 2 * padding[1], c), columns.dtype)
    for tap, (rows, cols) in enumerate(taps(kernel, stride, (oh, ow))):
        padded[:, rows, cols] += columns[:, :, :, tap]
    return unpad2d(padded, padding)


class Conv2d(Layer):
    """2-d convolution as one matrix product. `weight` [KH, KW, I, O] from He's normal distribution (fan-out,
    as torchvision), `bias` 0.

    Like PyTorch's it is a cross-correlation: the kernel is not turned round. He et al. 2015, arXiv
    1502.01852, equation 14: std = sqrt(2 / (KH * KW * O)).
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
        """x [N, H, W, I] to [N, OH, OW, O].

        y[n, p, q, o] = sum over i, j, c of x[n, p * sh + i - ph, q * sw + j - pw, c] * weight[i, j, c, o],
        zero outside the picture: rows of `im2col(x)` times `weight` as a matrix [KH * KW * I, O].
        """
        check_channels(x, self.weight.value.shape[2], 4)
        columns = im2col(promote(x, self.weight.value), self.kernel, self.stride, self.padding)
        self.keep(x.shape, columns)
        y = columns @ self._matrix
        return y if self.bias is None else y + self.bias.value

    def backward(self, dy: Array) -> Array:
        """y = columns @ matrix is a linear layer over N * OH * OW receptive fields, so (see `Linear`)

            dmatrix  = columns.T @ dy      [KH * KW * I, O]
            dcolumns = dy @ matrix.T       [N * OH * OW, KH * KW * I]

        and an element of x, which im2col copied into several rows, gets the sum of their gradients: col2im.
        """
        shape, columns = self.kept
        rows = dy.reshape(-1, dy.shape[-1])
        self.weight.add_grad_product(columns.reshape(-1, columns.shape[-1]).T, rows)
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
        """x [N, H, W, I] to [N, OH, OW, O]: the kernel meets the window that it lies on."""
        (kh, kw), (sh, sw), weight = self.kernel, self.stride, self.weight.value
        check_channels(x, weight.shape[2], 4)
        oh, ow = output_size(x.shape[1:3], self.kernel, self.stride, self.padding)
        padded = promote(pad2d(x, self.padding), weight)
        self.keep(padded)
        y = np.empty((len(x), oh, ow, weight.shape[-1]), padded.dtype)
        for n in range(len(x)):
            for p in range(oh):
                for q in range(ow):
                    window = padded[n, p * sh : p * sh + kh, q * sw : q * sw + kw]  # [KH, KW, I]
                    y[n, p, q] = np.tensordot(window, weight, 3)
        return y if self.bias is None else y + self.bias.value

    def backward(self, dy: Array) -> Array:
        """Each output sends its gradient back to all that entered it: the window, and the whole kernel."""
        (padded,) = self.kept
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


def check_count(n: int) -> None:
    """Raise ValueError unless batch norm has the values per channel that training needs."""
    if n <= 1:
        raise ValueError(f"batch norm needs more than 1 value per channel in training, got {n}")


class BatchNorm(Layer):
    """Batch normalisation over every axis but the last (Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1),
    and what follows it in a ResNet: the sum with a shortcut, and ReLU.

    y = (x - mean) / sqrt(var + eps) * weight + bias [+ shortcut] [, positive part]. In training, mean and
    (biased) var are those of the batch, and the running statistics move by PyTorch's rule, with the
    *unbiased* variance: running = (1 - momentum) * running + momentum * batch. Else the running statistics
    are used.
    """

    dshortcut: Array | None = None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        relu: bool = False,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self.weight = Parameter(np.ones(num_features, dtype))
        self.bias = Parameter(np.zeros(num_features, dtype))
        self.running_mean = np.zeros(num_features, dtype)
        self.running_var = np.ones(num_features, dtype)
        self.eps, self.momentum, self.relu = eps, momentum, relu

    def forget(self) -> None:
        """Let go of what forward and backward kept."""
        super().forget()
        self.dshortcut = None

    def forward(self, x: Array, train: bool = False, shortcut: Array | None = None) -> Array:
        """x [..., C], and a shortcut of its shape, to that shape.

        Raises ValueError in training when a channel has a single value, as PyTorch does, or none.
        """
        check_channels(x, len(self.weight.value))
        rows = promote(x.reshape(-1, x.shape[-1]), self.weight.value)
        mean, inverse_std = self._statistics(rows, train)
        normalised = (rows - mean) * inverse_std
        y = normalised * self.weight.value + self.bias.value
        if shortcut is not None:
            y += shortcut.reshape(y.shape)
        if self.relu:
            np.maximum(y, 0, out=y)
        self.keep(normalised, inverse_std, y if self.relu else None, train)
        return y.reshape(x.shape)

    def _statistics(self, rows: Array, train: bool) -> tuple[Array, Array]:
        """Mean and 1 / sqrt(var + eps), [C] each; in training the batch's, which the running ones note."""
        if train:
            check_count(len(rows))
            mean = rows.mean(0, np.float64).astype(rows.dtype)
            var = np.square(rows - mean).mean(0, np.float64).astype(rows.dtype)
            return self._learn(mean, var, len(rows))
        return self.running_mean, 1 / np.sqrt(self.running_var + self.eps)

    def _learn(self, mean: Array, var: Array, n: int) -> tuple[Array, Array]:
        """Note the batch's statistics in the running ones."""
        for running, batch in ((self.running_mean, mean), (self.running_var, var * (n / (n - 1)))):
            running *= 1 - self.momentum
            running += self.momentum * batch
        return mean, 1 / np.sqrt(var + self.eps)

    def backward(self, dy: Array) -> Array:
        r"""dL/dx; the shortcut's gradient is then in `dshortcut`.

        ReLU passes the gradient where y > 0; the sum hands it to both of its terms. Then, for one channel,
        with n values x_i, the normalised z_i = (x_i - mean) * s, s = 1 / sqrt(var + eps), y_i = w z_i + b:

            dL/dw = sum_i dy_i z_i        dL/db = sum_i dy_i        dz_i = w dy_i

        x_i enters z_i itself, and every z_k through mean and var, which are differentiated through:

            dmean/dx_i = 1 / n
            dvar/dx_i  = 2 (x_i - mean) / n           (the terms from mean cancel: sum_k (x_k - mean) = 0)
            ds/dx_i    = -s^3 / 2 * dvar/dx_i = -s^2 z_i / n
            dz_k/dx_i  = s [k = i] - s / n - (x_k - mean) s^2 z_i / n = s ([k = i] - 1 / n - z_k z_i / n)

            dL/dx_i = sum_k dz_k dz_k/dx_i = w s (dy_i - dL/db / n - z_i dL/dw / n)

        In evaluation mean and var are constants, and dL/dx_i = w s dy_i.
        """
        z, inverse_std, y, train = self.kept
        d = dy.reshape(z.shape)
        if y is not None:
            d = d * (y > 0)
        self.dshortcut = d.reshape(dy.shape)
        dweight, dbias = (terms.sum(0, np.float64).astype(z.dtype) for terms in (d * z, d))
        self.weight.add_grad(dweight)
        self.bias.add_grad(dbias)
        scale = self.weight.value * inverse_std
        if train:
            d = d - (dbias + z * dweight) / len(z)
        return np.asarray((scale * d).reshape(dy.shape))


class NoNorm(Layer):
    """What stands in a batch norm's place in a network without: y = x [+ shortcut] [, positive part]."""

    dshortcut: Array | None = None

    def __init__(self, *, relu: bool = False) -> None:
        self.relu = relu

    def forget(self) -> None:
        """Let go of what forward and backward kept."""
        super().forget()
        self.dshortcut = None

    def forward(self, x: Array, train: bool = False, shortcut: Array | None = None) -> Array:
        """x and a shortcut of its shape to that shape."""
        y = x if shortcut is None else x + shortcut
        if self.relu:
            y = np.maximum(y, 0)
        self.keep(y)
        return y

    def backward(self, dy: Array) -> Array:
        """Where y > 0, dy goes to both terms of the sum; the shortcut's is in `dshortcut` too."""
        (y,) = self.kept
        self.dshortcut = dy * (y > 0) if self.relu else dy
        return self.dshortcut


class ReLU(Layer):
    """y = max(x, 0)."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """x of any shape to the same shape."""
        y = np.maximum(x, 0)
        self.keep(y)
        return y

    def backward(self, dy: Array) -> Array:
        """dy/dx is 1 where x > 0, else 0 (at the kink too, as in PyTorch); y > 0 is the same as x > 0."""
        (y,) = self.kept
        return np.asarray(dy * (y > 0))


class Sigmoid(Layer):
    """y = 1 / (1 + exp(-x))."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """x of any shape to the same shape; exp only of numbers that are not positive cannot overflow."""
        small = np.exp(-np.abs(x))
        y = np.where(x >= 0, 1 / (1 + small), small / (1 + small))
        self.keep(y)
        return y

    def backward(self, dy: Array) -> Array:
        """dy/dx = exp(-x) / (1 + exp(-x))^2 = y (1 - y)."""
        (y,) = self.kept
        return np.asarray(dy * y * (1 - y))


class Flatten(Layer):
    """[N, H, W, C] to [N, C * H * W], in the order PyTorch flattens [N, C, H, W]."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """Channels outermost."""
        self.keep(x.shape)
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2)).reshape(len(x), math.prod(x.shape[1:]))

    def backward(self, dy: Array) -> Array:
        """The same elements in their old places."""
        ((n, h, w, c),) = self.kept
        return np.ascontiguousarray(dy.reshape(n, c, h, w).transpose(0, 2, 3, 1))


class Pool2d(Layer):
    """What the two poolings share."""

    def __init__(
        self, kernel_size: int | Pair, *, stride: int | Pair | None = None, padding: int | Pair = 0
    ) -> None:
        self.kernel, self.padding = pair("kernel_size", kernel_size), pair("padding", padding, 0)
        self.stride = self.kernel if stride is None else pair("stride", stride)
        if any(2 * p > k for p, k in zip(self.padding, self.kernel, strict=True)):
            raise ValueError(f"padding {self.padding} is more than half of the kernel {self.kernel}")

    def _taps(self, x: Array) -> tuple[Pair, list[tuple[slice, slice]]]:
        size = output_size(x.shape[1:3], self.kernel, self.stride, self.padding)
        return size, list(taps(self.kernel, self.stride, size))


class MaxPool2d(Pool2d):
    """Maximum over windows; the padding never wins, and of equal values the first in reading order does."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """x [N, H, W, C] to [N, OH, OW, C]. A NaN in a window is its maximum, as in PyTorch."""
        (oh, ow), slices = self._taps(x)
        padded = pad2d(x, self.padding, -np.inf)
        y = np.full((len(x), oh, ow, x.shape[-1]), -np.inf, x.dtype)
        winner = np.zeros(y.shape, np.uint8 if len(slices) <= 256 else np.int64)
        for tap, (rows, cols) in enumerate(slices):
            candidate = padded[:, rows, cols]
            better = (candidate > y) | np.isnan(candidate)
            np.copyto(y, candidate, where=better)
            winner[better] = tap
        self.keep(x.shape, winner, slices)
        return y

    def backward(self, dy: Array) -> Array:
        """y is a copy of the window's winner, so dy goes to it alone; where windows overlap, the sum does."""
        (n, h, w, c), winner, slices = self.kept
        dpadded = np.zeros((n, h + 2 * self.padding[0], w + 2 * self.padding[1], c), dy.dtype)
        for tap, (rows, cols) in enumerate(slices):
            dpadded[:, rows, cols] += dy * (winner == tap)
        return unpad2d(dpadded, self.padding)


class AvgPool2d(Pool2d):
    """Mean over windows, in which the padding counts as zeros (PyTorch's `count_include_pad`)."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """x [N, H, W, C] to [N, OH, OW, C]."""
        (oh, ow), slices = self._taps(x)
        padded = pad2d(x, self.padding)
        y = np.zeros((len(x), oh, ow, x.shape[-1]), sum_type(x.dtype, len(slices)))
        for rows, cols in slices:
            y += padded[:, rows, cols]
        y /= len(slices)
        self.keep(x.shape, slices)
        return y.astype(x.dtype, copy=False)

    def backward(self, dy: Array) -> Array:
        """Each of the KH * KW values of a window enters its mean with 1 / (KH * KW)."""
        (n, h, w, c), slices = self.kept
        dpadded = np.zeros((n, h + 2 * self.padding[0], w + 2 * self.padding[1], c), dy.dtype)
        for rows, cols in slices:
            dpadded[:, rows, cols] += dy / len(slices)
        return unpad2d(dpadded, self.padding)


class GlobalAvgPool2d(Layer):
    """Mean over height and width."""

    def forward(self, x: Array, train: bool = False) -> Array:
        """x [N, H, W, C] to [N, C]."""
        self.keep(x.shape)
        mean = x.mean((1, 2), sum_type(x.dtype, x.shape[1] * x.shape[2]))
        return np.asarray(mean, x.dtype if x.dtype.kind == "f" else None)

    def backward(self, dy: Array) -> Array:
        """Each of the H * W values enters with 1 / (H * W)."""
        ((n, h, w, c),) = self.kept
        return np.broadcast_to((dy / (h * w))[:, np.newaxis, np.newaxis], (n, h, w, c)).copy()


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
        """x [N, H, W, I] to [N, ceil(H / stride), ceil(W / stride), O]."""
        self.keep(x.shape)
        return np.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), self.pad))

    def backward(self, dy: Array) -> Array:
        """A copy's gradient goes back to where it was taken from; nothing else of x was read."""
        (shape,) = self.kept
        dx = np.zeros(shape, dy.dtype)
        front = self.pad[0]
        dx[:, :: self.stride, :: self.stride] = dy[..., front : front + shape[-1]]
        return dx


def check_labels(label: Array, num_classes: int, examples: int) -> Array:
    """Return labels [N] as an array. Raises ValueError that names the shape, the type or the first wrong one.

    NumPy would take -1 for the last class, and a column [N, 1] or one-hot rows for more examples.
    """
    label = np.asarray(label)
    if label.shape != (examples,):
        hint = "; of one-hot rows take label.argmax(1)" if label.shape == (examples, num_classes) else ""
        raise ValueError(f"labels must have shape ({examples},), one class each, got {label.shape}{hint}")
    if label.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got {label.dtype}")
    if examples and not 0 <= label.min() <= label.max() < num_classes:
        index = int(np.argmax((label < 0) | (label >= num_classes)))
        raise ValueError(f"label {index} is {label[index]}, where classes are 0 to {num_classes - 1}")
    return label


def cross_entropy(logits: Array, label: Array, batch_size: int | None = None) -> tuple[Any, Array]:
    """Mean over the batch of -log softmax(logits [N, C])[label [N]], and its gradient [N, C].

    Where N examples are only a part of the batch, `batch_size` is that of the whole, and the loss what they
    contribute to it.

    With p = softmax(z): -log p_label = -z_label + log sum_k exp(z_k), whose derivative by z_k is p_k, less 1
    where k is the label. The largest logit is subtracted before exp, which changes nothing but the overflow.

    Raises ValueError for labels that are not N integers in range(C), and for a batch of 0 examples.
    """
    logits = np.asarray(logits)
    logits = logits.astype(np.promote_types(logits.dtype, np.float32), copy=False)
    label = check_labels(label, logits.shape[1], len(logits))
    n = len(logits) if batch_size is None else batch_size
    if n < 1:
        raise ValueError("the mean loss of a batch of 0 examples is not defined")
    shifted = logits - logits.max(1, keepdims=True)
    exponentials = np.exp(shifted)
    total = exponentials.sum(1, keepdims=True)
    picked = np.arange(len(logits)), label
    loss = (np.log(total[:, 0]) - shifted[picked]).sum() / n
    dlogits = exponentials / total
    dlogits[picked] -= 1
    dlogits /= n
    return loss, dlogits
