"""Comparisons of arrays and what else tests of two implementations share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import parity


def assert_close(name: str, actual: Any, expected: Any, tolerance: float) -> None:
    """Fail unless `actual` has the shape of `expected` and each element is within `tolerance` of its scale.

    The scale is the largest magnitude in `expected`, or 1 where all of it is zero. The message names the
    tensor, the index and the error. A non-finite value on either side fails.
    """
    assert np.size(expected), f"{name}: nothing to compare in shape {np.shape(expected)}"
    first = parity.compare_tensors({name: expected}, {name: actual}, tolerance).first_difference
    assert first is None, f"{name}: {first.distance}; {first.cause}"


def largest_error(actual: Any, expected: Any) -> float:
    """The error that `assert_close` measures; infinite for another shape or non-finite values."""
    (tensor,) = parity.compare_tensors({"": expected}, {"": actual}, 0.0).tensors
    return tensor.error


def assert_all_close(
    what: str, actual: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float
) -> None:
    """`assert_close` for every name of two mappings, which must have the same names."""
    assert set(actual) == set(expected), f"{what}: names differ by {sorted(set(actual) ^ set(expected))}"
    for name, value in expected.items():
        assert_close(f"{what} {name}", actual[name], value, tolerance)


def assert_all_near(
    what: str, actual: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float
) -> None:
    """Fail unless the distance of all tensors together, as one vector, is within `tolerance` of their length.

    For low precision, in which a tensor of sums that nearly cancel has hardly a digit of its own.
    """
    assert {k: np.shape(v) for k, v in actual.items()} == {k: np.shape(v) for k, v in expected.items()}, what
    away = {k: np.linalg.norm(np.asarray(actual[k], np.float64) - np.asarray(v)) for k, v in expected.items()}
    distance = math.hypot(*away.values()) / math.hypot(*(np.linalg.norm(v) for v in expected.values()))
    worst = max(away, key=lambda name: away[name])
    assert distance <= tolerance, (
        f"{what}: off by {distance:.2e} of its length, where {tolerance:.0e} is allowed; most in {worst}"
    )


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """A float64 state dict in which nothing is 0 or 1, so that no term can be left out unnoticed."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes.items():
        drawn = rng.normal(size=shape) / math.sqrt(math.prod(shape[1:]))
        state[name] = 0.5 + np.abs(drawn) if name.endswith("running_var") else drawn
    return state


def quick_jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` for functions that run once: compiled on a CPU in half the time, to slower code."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=quick, **options)


def nchw(x: Any) -> np.ndarray:
    """[N, H, W, C] to PyTorch's [N, C, H, W]; arrays without height and width unchanged."""
    x = np.asarray(x)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x


def nhwc(x: Any) -> np.ndarray:
    """The inverse of `nchw`."""
    x = np.asarray(x)
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x
