"""A check of a layer's `backward` by central differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from numpy_ref.layers import Array, Layer, no_grad

STEP = 1e-6  # in float64 the differences lose about 1e-10 to rounding, and less to curvature
SMALLEST_SCALE = 1e-2  # of a tensor whose gradients are all about 0, such as a bias before batch norm


def check_gradients(layer: Layer, x: npt.ArrayLike, train: bool = True, *, tolerance: float = 1e-6) -> float:
    """Compare `backward` with central differences, for every element of the input and of every parameter.

    With L = sum(dy * forward(x)) for a fixed random dy, `backward` must give dL/da for every number a:

        dL/da = (L(a + h) - L(a - h)) / 2h + O(h^2),   h = 1e-6

    Two forward passes for each number: use a small layer. Parameters and running statistics are restored,
    and gradients are set to 0. Frozen parameters are not compared. At a kink (ReLU at 0, equal values in a
    max-pooling window) there is no derivative, and the check may fail: choose another x, such as noise.

    Args:
        layer: with parameters of float64, such as `Linear(3, 2, rng=rng, dtype=np.float64)`.
        x: an input of any shape that the layer takes; converted to float64.
        train: the mode of `forward`; batch norm has another gradient in each.
        tolerance: the largest error allowed, relative to the largest gradient of the same array.

    Returns:
        The largest relative error.

    Raises:
        ValueError: names the array and the index of the worst error, and both gradients. Also for a layer of
            another type than float64, an output that is random, gradients of a wrong shape, and a `backward`
            that changes dy.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> check_gradients(Linear(3, 2, rng=rng, dtype=np.float64), rng.normal(size=(4, 3))) < 1e-6
        True

    Source: Goodfellow, Bengio, Courville 2016, "Deep Learning", section 11.5, debugging strategies.
    """
    x = np.array(x, np.float64)
    for name, parameter in layer.named_parameters().items():
        if parameter.value.dtype != np.float64:
            hint = "make the layer with dtype=np.float64"
            raise ValueError(f"{name} is {parameter.value.dtype}, too coarse for differences: {hint}")
    with _restored(layer):
        actual, dy = _analytic(layer, x, train)

        def loss() -> float:
            with no_grad():
                return float((layer.forward(x, train) * dy).sum())

        arrays = {"x": x, **{name: layer.named_parameters()[name].value for name in actual if name != "x"}}
        worst = 0.0
        for name, array in arrays.items():
            expected = _differences(loss, array)
            worst = max(worst, _compare(name, actual[name], expected, tolerance))
    return worst


@contextmanager
def _restored(layer: Layer) -> Iterator[None]:
    """Restore the running statistics afterwards, free what was saved, and set the gradients to 0."""
    variables, parameters = layer.variables(), layer.named_parameters()
    before = {name: np.copy(a) for name, a in variables.items() if isinstance(a, np.ndarray)}
    try:
        yield
    finally:
        for name, array in before.items():
            np.copyto(variables[name], array)  # type: ignore[arg-type]
        for parameter in parameters.values():
            parameter.zero_grad()
        layer.free_saved()


def _analytic(layer: Layer, x: Array, train: bool) -> tuple[dict[str, Array], Array]:
    """Return the gradients by `backward`, {"x" or the parameter's name: array}, and the dy they are for."""
    y = layer.forward(x, train)
    if y.dtype != np.float64:
        raise ValueError(f"the output is {y.dtype}, too coarse for differences: compute in float64")
    dy = np.random.default_rng(0).normal(size=y.shape)
    y, passed = y.copy(), dy.copy()
    if not np.array_equal(layer.forward(x, train), y, equal_nan=True):
        raise ValueError(
            "two forward passes of one x differ: give the layer the same random numbers each time"
        )
    for parameter in layer.parameters():
        parameter.zero_grad()
    gradients = {"x": np.array(layer.backward(passed))}
    if not np.array_equal(passed, dy):
        raise ValueError("backward changed dy, which belongs to its caller")
    if gradients["x"].shape != x.shape:
        raise ValueError(f"backward returned shape {gradients['x'].shape} for x of shape {x.shape}")
    named = layer.named_parameters().items()
    return gradients | {name: p.grad.copy() for name, p in named if p.trainable}, dy


def _differences(loss: Callable[[], float], array: Array) -> Array:
    """Return d loss / d array; each element is changed and restored."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        middle = array[index]
        try:
            array[index] = middle + STEP
            above = loss()
            array[index] = middle - STEP
            gradient[index] = (above - loss()) / (2 * STEP)
        finally:
            array[index] = middle
    return gradient


def _compare(name: str, actual: Array, expected: Array, tolerance: float) -> float:
    """Return the largest error relative to the largest gradient. Raises ValueError above the tolerance."""
    if expected.size == 0:
        return 0.0
    error = np.abs(actual - expected) / max(np.abs(expected).max(), SMALLEST_SCALE)
    index = np.unravel_index(np.argmax(error), error.shape)  # argmax takes NaN for the largest
    largest = float(error[index])
    if not largest <= tolerance:
        place = ", ".join(str(i) for i in index)
        raise ValueError(
            f"gradient of {name}[{place}]: backward gives {actual[index]:.6g}, central differences "
            f"{expected[index]:.6g}; relative error {largest:.1e}, tolerance {tolerance:.0e}"
        )
    return largest
