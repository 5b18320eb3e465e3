"""Forms of the convolution on a CPU; `layers.conv2d` takes them there. On a GPU it is cuDNN's.

A convolution y = f(x, w) is linear in x and in w. It has three parts: y, the derivative by x, and the
derivative by w. No form is fast in all three, so `choose_forms` names one for each part:

    conv2d_lax      XLA's own; fast on large maps, ten times slower than the others on maps of 2x2
    conv2d_matmul   one product with the patches of im2col; fast on small maps, large in memory on large ones
    conv2d_rows     one product for all rows and columns of the kernel, without patches

The derivatives need no formulas. JAX transposes the linear functions f(., w) and f(x, .) in the form that
computes them. The transpose of a form by w is the gradient of the kernel in that form. So forward mode,
reverse mode, their compositions and vmap work as in `conv2d_lax`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

Pair = tuple[int, int]
Shape = tuple[int, ...]
Form = Callable[[jax.Array, jax.Array, Pair, Pair], jax.Array]


def conv2d_lax(x: jax.Array, weight: jax.Array, stride: Pair, padding: Pair) -> jax.Array:
    """The convolution of `layers.conv2d` as XLA's own; on a GPU cuDNN's."""
    (ph, pw) = padding
    return lax.conv_general_dilated(
        x, weight, stride, ((ph, ph), (pw, pw)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def shifted(x: jax.Array, kernel: Pair, stride: Pair, padding: Pair) -> list[jax.Array]:
    """For each of the KH * KW kernel positions, the pixels [N, OH, OW, C] that it meets, as strided slices.

    OH = (H + 2 * padding - KH) // stride + 1, OW likewise.
    """
    (kh, kw), (sh, sw), (ph, pw) = kernel, stride, padding
    x = jnp.pad(x, ((0, 0), (ph, ph), (pw, pw), (0, 0)))
    n, h, w, c = x.shape
    oh, ow = (h - kh) // sh + 1, (w - kw) // sw + 1
    return [
        lax.slice(x, (0, i, j, 0), (n, i + (oh - 1) * sh + 1, j + (ow - 1) * sw + 1, c), (1, sh, sw, 1))
        for i in range(kh)
        for j in range(kw)
    ]


def im2col(x: jax.Array, kernel: Pair, stride: Pair, padding: Pair) -> jax.Array:
    """The patches of x [N, H, W, C], one for each output position: [N, OH, OW, KH * KW * C]."""
    slices = shifted(x, kernel, stride, padding)
    return slices[0] if len(slices) == 1 else jnp.concatenate(slices, axis=-1)


def conv2d_matmul(x: jax.Array, weight: jax.Array, stride: Pair, padding: Pair) -> jax.Array:
    """The convolution of `layers.conv2d` as one matrix product: im2col(x) @ weight as [KH * KW * I, O].

    All patches are rows of one matrix, [N * OH * OW, KH * KW * I]. With N, OH and OW as separate axes XLA
    transposes dL/dy for the gradient of the weight, and the step takes a fifth longer.
    """
    kh, kw, i, o = weight.shape
    patches = im2col(x, (kh, kw), stride, padding)
    rows = patches.reshape(-1, kh * kw * i)
    return (rows @ weight.reshape(kh * kw * i, o)).reshape(*patches.shape[:-1], o)


def conv2d_rows(x: jax.Array, weight: jax.Array, stride: Pair, padding: Pair) -> jax.Array:
    """The convolution of `layers.conv2d` as one product for all KH rows and KW columns of the kernel.

    The KH rows of the image that a kernel meets are concatenated: [N, OH, W, KH * I]. Their product with the
    weight as [KH * I, KW * O] gives KW images, one for each column of the kernel; y is the sum of these
    images, each shifted by its column. So a pixel is copied KH times, not KH * KW times as by `im2col`.
    """
    kh, kw, i, o = weight.shape
    (n, _, w, _), (ph, pw) = x.shape, padding
    slices = shifted(jnp.pad(x, ((0, 0), (0, 0), (pw, pw), (0, 0))), (kh, 1), (stride[0], 1), (ph, 0))
    rows = jnp.concatenate(slices, axis=-1)
    oh, ow = rows.shape[1], (w + 2 * pw - kw) // stride[1] + 1
    matrix = weight.transpose(0, 2, 1, 3).reshape(kh * i, kw * o)
    images = (rows.reshape(-1, kh * i) @ matrix).reshape(n, oh, w + 2 * pw, kw * o)
    columns = [
        lax.slice(
            images,
            (0, 0, j, j * o),
            (n, oh, j + (ow - 1) * stride[1] + 1, (j + 1) * o),
            (1, 1, stride[1], 1),
        )
        for j in range(kw)
    ]
    return sum(columns[1:], columns[0])


class Forms(NamedTuple):
    """The forms of the three parts of a convolution."""

    forward: Form
    by_x: Form
    by_weight: Form


def choose_forms(x: Shape, weight: Shape, stride: Pair, padding: Pair) -> Forms:
    """Choose the forms for arrays of shapes [N, H, W, I] and [KH, KW, I, O]; a function of the shapes alone.

    Milliseconds on two AMD EPYC cores (AVX-512), jax 0.10.2, 30 November 2026, `conv2d_lax`, `conv2d_matmul`
    and, for the kernel, `conv2d_rows`. Each part was compiled alone, with YNNPACK off for products too, and
    with freed memory reused (mallopt), without which all of it is slower, the large patches most:

        batch, map, I, O          y            by x         by w
        128, 32x32, 16, 16    3.1, 12.0    3.1, 5.8    5.8, 12.9, 6.6
        128, 16x16, 32, 32    1.8,  5.5    1.8, 2.9    4.6,  7.8, 3.9
        128, 8x8, 64, 64      1.6,  3.3    1.6, 3.8    1.9,  4.8, 3.8
        64, 32x32, 64, 64    13.8, 30.4   14.3, 16.3  18.4, 40.4, 27.0
        32, 4x4, 128, 128     0.5,  0.6    0.5, 0.6    0.8,  0.7, 0.8
        32, 2x2, 256, 256    24.4,  0.6   24.5, 1.6    0.7,  0.6, 1.1
        64, 32x32, 1, 8       1.9,  0.8                0.6,  0.7, 0.4
        64, 32x32, 3, 64      4.3,  3.2                4.7,  4.0, 6.5
        64, 32x32, 64, 128, 1x1 stride 2
                              1.2,  0.8    1.9, 1.1    5.2,  1.4

    The rows by w are for narrow kernels: on another processor (AVX2) `conv2d_lax` took 230 ms in the first
    line, and about twice the best in the others.
    """
    (_, h, w, _), (kh, kw, i, o) = x, weight
    oh, ow = (h + 2 * padding[0] - kh) // stride[0] + 1, (w + 2 * padding[1] - kw) // stride[1] + 1
    if kh * kw == 1 or oh * ow < 64:
        return Forms(conv2d_matmul, conv2d_matmul, conv2d_matmul)
    if kh * kw > 9:
        return Forms(conv2d_lax, conv2d_lax, conv2d_lax)
    if stride != (1, 1):
        return Forms(conv2d_lax, conv2d_matmul, conv2d_matmul)
    forward = conv2d_matmul if i <= 3 else conv2d_lax  # patches of images with few channels are small
    return Forms(forward, conv2d_lax, conv2d_rows if max(i, o) <= 16 else conv2d_lax)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def conv2d_cpu(x: jax.Array, weight: jax.Array, stride: Pair, padding: Pair) -> jax.Array:
    """The convolution of `layers.conv2d`, each part in the form that `choose_forms` names."""
    return choose_forms(x.shape, weight.shape, stride, padding).forward(x, weight, stride, padding)


@partial(conv2d_cpu.defjvp, symbolic_zeros=True)
def _conv2d_cpu_jvp(
    stride: Pair,
    padding: Pair,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array | SymbolicZero, jax.Array | SymbolicZero],
) -> tuple[jax.Array, jax.Array]:
    """dy = f(dx, w) + f(x, dw), each in a form of its own."""
    (x, weight), (dx, dweight) = primals, tangents
    forms = choose_forms(x.shape, weight.shape, stride, padding)
    y = conv2d_cpu(x, weight, stride, padding)
    parts = []
    if not isinstance(dx, SymbolicZero):
        parts.append(_linear(forms.by_x, dx, weight, stride, padding))
    if not isinstance(dweight, SymbolicZero):
        parts.append(_linear(forms.by_weight, x, dweight, stride, padding))
    # not a sum that starts with zeros: JAX would save them for backward
    return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(0, 3, 4))
def _linear(form: Form, x: jax.Array, weight: jax.Array, stride: Pair, padding: Pair) -> jax.Array:
    """form(x, weight). Without `checkpoint` JAX would save the patches or slices of x for backward."""
    return form(x, weight, stride, padding)
