"""Resizing: where the pixels of the new grid lie in the old one, and what is between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from parity.causes import Departure
from parity.causes.stage import Change, Form, attribute, first_input
from parity.trace import Array

_GRIDS = {
    "half": "pixel centers aligned (half-pixel)",
    "corners": "corner pixels aligned (align_corners=True)",
    "asymmetric": "the first pixels aligned (index * scale)",
}
_KERNELS = {"nearest": "nearest neighbor, rounded down", "round": "nearest neighbor, rounded half up"}
_KERNELS |= {"even": "nearest neighbor, rounded half to even", "down": "nearest neighbor, rounded half down"}
_KERNELS |= {"linear": "linear", "cubic": "cubic (a = -0.75)", "keys": "cubic (a = -0.5)"}


def matrix(
    old: int, new: int, grid: str, kernel: str, antialias: bool, clamp: bool, scale: float | None = None
) -> Array:
    """The weights [new, old] of one axis.

    Args:
        grid: a key of `_GRIDS`; kernel: of `_KERNELS`.
        clamp: repeat the border; else weights outside are left out and the others made to sum to 1.
        scale: old pixels in a new one; old / new if None.
    """
    scale = old / new if scale is None else scale
    i = np.arange(new)
    position = {"half": (i + 0.5) * scale - 0.5, "asymmetric": i * scale}.get(grid)
    if position is None:
        position = i * (old - 1) / max(new - 1, 1)
    if kernel in ("nearest", "round", "even", "down"):
        index = {
            "nearest": np.floor(position + 1e-12),
            "round": np.floor(position + 0.5),
            "even": np.round(position),
            "down": np.ceil(position - 0.5),
        }[kernel]
        return np.asarray(np.eye(old)[np.clip(index, 0, old - 1).astype(int)])
    if kernel == "linear" and clamp:
        position = np.maximum(position, 0)
    wide = max(scale, 1.0) if antialias else 1.0
    border = 0 if antialias or not clamp else 3
    taps = np.arange(-border, old + border)
    weights = _kernel(np.abs(position[:, None] - taps) / wide, kernel)
    result = np.zeros((new, old))
    for column, tap in enumerate(np.clip(taps, 0, old - 1)):
        result[:, tap] += weights[:, column]
    return np.asarray(result / result.sum(1, keepdims=True))


def _kernel(t: Array, kernel: str) -> Array:
    if kernel == "linear":
        return np.asarray(np.maximum(1 - t, 0))
    a = -0.75 if kernel == "cubic" else -0.5
    inner = ((a + 2) * t - (a + 3)) * t * t + 1
    outer = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, inner, np.where(t < 2, outer, 0.0))


def resize(
    x: Array,
    shape: tuple[int, ...],
    grid: str,
    kernel: str,
    antialias: bool,
    clamp: bool,
    scales: tuple[float | None, ...],
) -> Array:
    """Resize the last axes of x to `shape`."""
    for axis, (new, scale) in enumerate(zip(shape, scales, strict=True), x.ndim - len(shape)):
        weights = matrix(x.shape[axis], new, grid, kernel, antialias, clamp, scale)
        x = np.moveaxis(np.moveaxis(x, axis, -1) @ weights.T, -1, axis)
    return x


def forms(departure: Departure) -> Iterator[Form]:
    """PyTorch's `interpolate`."""
    x = first_input(departure)
    if x is None or x.ndim < 3 or x.ndim != departure.output.ndim:
        return
    mode = str(attribute(departure, "mode", "method", default="nearest"))
    kernel = "nearest" if "nearest" in mode else "cubic" if "cubic" in mode else "linear"
    kernel = "round" if mode == "nearest-exact" else kernel
    antialias = bool(attribute(departure, "antialias", default=False))
    kernel = "keys" if kernel == "cubic" and antialias else kernel
    grid = "corners" if attribute(departure, "align_corners", default=False) else "half"
    grid = "asymmetric" if kernel == "nearest" else grid
    for last in (False, True):
        view = (lambda y: np.moveaxis(y, -1, 1)) if last else np.asarray
        moved, out = view(x), view(departure.output)
        shape = out.shape[2:]
        scales: tuple[float | None, ...] = (None,) * len(shape)
        factor = attribute(departure, "scale_factor")
        if factor is not None and not attribute(departure, "recompute_scale_factor", default=False):
            factors = factor if isinstance(factor, tuple | list) else [factor] * len(shape)
            scales = tuple(1 / float(f) for f in factors)
        knobs: dict[str, Any] = {
            "x": moved,
            "shape": shape,
            "grid": grid,
            "kernel": kernel,
            "antialias": antialias,
        }
        knobs |= {"clamp": True, "scales": scales}
        yield Form(resize, knobs, lambda target, knobs=knobs: _changes(knobs), view, per_example=True)  # type: ignore[misc]


def _changes(knobs: dict[str, Any]) -> Iterable[Change]:
    own = (knobs["grid"], knobs["kernel"], knobs["antialias"], True)
    words = _words(*own)
    every = itertools.product(_GRIDS, _KERNELS, (False, True), (True, False))
    for other in sorted(every, key=lambda o: sum(a != b for a, b in zip(o, own, strict=True))):
        if other == own:
            continue
        grid, kernel, antialias, clamp = other
        if (antialias or not clamp) and kernel in ("nearest", "round", "even", "down"):
            continue
        nearest = {"nearest", "round", "even", "down"}
        if antialias != own[2]:
            id_ = "resize-antialias"
        elif (kernel in nearest) != (own[1] in nearest):
            id_ = "resize-kernel"
        elif grid != own[0] and "corners" in (grid, own[0]):
            id_ = "resize-align-corners"
        elif grid != own[0] or kernel in nearest:
            id_ = "resize-half-pixel"
        else:
            id_ = "resize-kernel"
        changed = {
            "grid": grid,
            "kernel": kernel,
            "antialias": antialias,
            "clamp": clamp,
            "scales": (None,) * len(knobs["shape"]),
        }
        yield Change(id_, f"resizes by {_words(*other)}", f"by {words}", words, changed)


def _words(grid: str, kernel: str, antialias: bool, clamp: bool) -> str:
    more = ", antialiased" if antialias else ""
    border = "" if clamp else ", weights at the border normalized"
    return f"{_KERNELS[kernel]}, {_GRIDS[grid]}{more}{border}"


def shuffle_forms(departure: Departure) -> Iterator[Form]:
    """Pixel shuffle: which part of the channels is the pixel."""
    x, factor = first_input(departure), attribute(departure, "upscale_factor")
    if x is None or x.ndim != 4 or factor is None:
        return
    r, (n, c, h, w) = int(factor), x.shape

    def compute(x: Array, order: str) -> Array:
        split = {"crs": (c // r**2, r, r), "csr": (c // r**2, r, r), "rsc": (r, r, c // r**2)}[order]
        axes = {"crs": (0, 1, 4, 2, 5, 3), "csr": (0, 1, 4, 3, 5, 2), "rsc": (0, 3, 4, 1, 5, 2)}[order]
        return x.reshape(n, *split, h, w).transpose(axes).reshape(n, c // r**2, h * r, w * r)

    def changes(target: Array) -> Iterable[Change]:
        own = "(channel, row, column)"
        for order, word in (("csr", "(channel, column, row)"), ("rsc", "(row, column, channel)")):
            yield Change(
                "flatten-order", f"splits the channels as {word}", f"as {own}", own, {"order": order}
            )

    yield Form(compute, {"x": x, "order": "crs"}, changes)
