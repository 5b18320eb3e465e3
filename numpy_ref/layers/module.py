"""`Parameter` and `Layer`, of which every layer is made, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Pair = tuple[int, int]

SHORT_SUM = 1024  # terms that float32 adds one by one with a relative error of about 1e-6 at most


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
    """Return the type in which to add up `terms` numbers along an axis that is not the last.

    NumPy adds these one after the other, so the error grows with their number: in float32 a mean of
    16 x 224 x 224 values is off by 4e-5, their variance by 4e-4. Above `SHORT_SUM` terms it is float64.
    """
    return np.promote_types(dtype, np.float64 if terms > SHORT_SUM else np.float32)


def promote(x: Array, weight: Array) -> Array:
    """Return x in the type of its products with `weight` and the machine's byte order, copied only if needed.

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
    """Return `scale` times random float32 numbers: "normal", or "uniform" in [-1, 1).

    Each call draws from the next child of `rng`, as `jax_resnet.layers.draw` does: both engines' networks of
    seed s start from the same weights, bit for bit. Without `rng` the result is zeros, to be loaded. Raises
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
        value: the array, of a floating type. It is used itself, not copied, unless it is read-only, not
            C-contiguous (Fortran order, a transposed kernel, a slice) or not in the machine's byte order.

    Attributes:
        trainable: if False, layers add no gradient and optimizers skip the parameter.

    Raises:
        ValueError: if the array is of another type, such as complex128.
    """

    def __init__(self, value: npt.ArrayLike) -> None:
        self.trainable = True
        self._grad: Array | None = None
        self._is_zero = True  # the gradient is 0, whatever _grad holds
        self.value = value

    @property
    def value(self) -> Array:
        """The array: C-contiguous and writeable. An array that is assigned is treated as in `__init__`."""
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
        gradient = self._storage()
        if self._is_zero:
            gradient.fill(0)
            self._is_zero = False
        return gradient

    def zero_grad(self) -> None:
        """Set the gradient to 0. Nothing is written until the next gradient, which replaces the sum."""
        self._is_zero = True

    def add_grad(self, gradient: Array) -> None:
        """grad += gradient. Raises ValueError unless it has the shape of `value`."""
        if np.shape(gradient) != self.value.shape:
            raise ValueError(
                f"a gradient of shape {np.shape(gradient)} for a parameter of shape {self.value.shape}"
            )
        self.add_written(lambda out: np.copyto(out, gradient))

    def add_grad_product(self, a: Array, b: Array) -> None:
        """grad += a @ b, reshaped to the shape of `value`."""
        self.add_written(lambda out: np.matmul(a, b, out=out.reshape(a.shape[0], b.shape[1])))

    def add_written(self, write: Callable[[Array], Any]) -> None:
        """grad += the array, like `value`, that `write(out)` fills.

        While grad is 0, `out` is grad itself, so that no second array is made.
        """
        if not self.trainable:
            return
        if self._is_zero:
            write(self._storage())
            self._is_zero = False
        else:
            out = np.empty_like(self.value)
            write(out)
            self._storage()[...] += out

    def store_grad_in(self, array: Array) -> None:
        """Use `array` as `grad` from now on; its contents are overwritten.

        Raises ValueError unless it is C-contiguous and of the shape of `value`.
        """
        if array.shape != self.value.shape or not array.flags.c_contiguous:
            raise ValueError(f"a gradient must be a C-contiguous array of shape {self.value.shape}")
        self._grad, self._is_zero = array, True

    def _storage(self) -> Array:
        if self._grad is None:
            self._grad = np.empty_like(self.value)
        return self._grad

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_grad": None, "_is_zero": True}


_saving = ContextVar("_saving", default=True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Context in which forward saves nothing for backward, as under `torch.no_grad()`.

    It holds for this thread (or asynchronous task) alone.
    """
    token = _saving.set(False)
    try:
        yield
    finally:
        _saving.reset(token)


def check_channels(x: Array, channels: int, ndim: int | None = None) -> None:
    """Raise ValueError unless the last axis of x has `channels` elements, and x has `ndim` axes if given."""
    if x.ndim and x.shape[-1] == channels and ndim in (None, x.ndim):
        return
    shape = "[N, H, W, {}]" if ndim == 4 else "[..., {}]" if ndim is None else "[N, {}]"
    hint = ""
    if x.ndim == 4 and x.shape[1] == channels and ndim != 2:
        hint = "; from channels first it is x.transpose(0, 2, 3, 1)"
    raise ValueError(f"expected channels last, {shape.format(channels)}, got shape {x.shape}{hint}")


class Layer:
    """A function of arrays, perhaps with parameters; attributes that are layers are its parts.

    Attributes:
        has_branch: True for a residual block, whose `forward` takes the factor of its branch.
    """

    has_branch = False
    _saved: Any = None

    def forward(self, x: Array, train: bool = False) -> Array:
        """Return the output. `train` is PyTorch's train mode: batch norm uses the batch's statistics, and
        updates the running ones."""
        raise NotImplementedError

    def backward(self, dy: Array) -> Array:
        """Return dL/dx, given dL/dy for the last forward; add to the gradients of the parameters."""
        raise NotImplementedError

    def __call__(self, x: Array, train: bool = False) -> Array:
        return self.forward(x, train)

    def save_for_backward(self, *values: Any) -> None:
        """Save the values that backward needs, unless inside `no_grad()`."""
        self._saved = values if _saving.get() else None

    @property
    def saved(self) -> Any:
        """The values that the last forward saved. Raises RuntimeError if it saved none."""
        if self._saved is None:
            raise RuntimeError(f"{type(self).__name__}.backward needs a forward before it, outside no_grad()")
        return self._saved

    def free_saved(self) -> None:
        """Free the values that forward saved, here and in every part."""
        self._saved = None
        for _, part in self.parts():
            part.free_saved()

    def parts(self) -> Iterator[tuple[str, Layer]]:
        """The layers that this one is made of, by name, in the order of creation."""
        for name, value in vars(self).items():
            if isinstance(value, Layer):
                yield name, value

    def walk(self) -> Iterator[Layer]:
        """This layer and all its parts, at any depth."""
        yield self
        for _, part in self.parts():
            yield from part.walk()

    def variables(self) -> dict[str, Parameter | Array]:
        """Parameters and running statistics by their names in the state dict, such as `layer1.0.bn2.bias`."""
        variables: dict[str, Parameter | Array] = {}
        for name, value in vars(self).items():
            if isinstance(value, Parameter) or name.startswith("running_"):
                variables[name] = value
        for name, part in self.parts():
            variables |= {f"{name}.{inner}": value for inner, value in part.variables().items()}
        return variables

    def named_parameters(self) -> dict[str, Parameter]:
        """The parameters by their names in the state dict."""
        return {name: value for name, value in self.variables().items() if isinstance(value, Parameter)}

    def parameters(self) -> list[Parameter]:
        """The parameters, for an optimizer; one that has several names is listed once."""
        return list(dict.fromkeys(self.named_parameters().values()))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_saved"}


class Sequential(Layer):
    """Layers one after another, given as arguments or as a list; their names are "0", "1", ..."""

    def __init__(self, *layers: Layer | list[Layer] | tuple[Layer, ...]) -> None:
        self.layers: list[Layer] = []
        for layer in layers:
            self.layers += layer if isinstance(layer, list | tuple) else [layer]
        for layer in self.layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"Sequential takes layers, got {layer!r}")

    def parts(self) -> Iterator[tuple[str, Layer]]:
        """The layers, named by their indices."""
        return ((str(index), layer) for index, layer in enumerate(self.layers))

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def forward(self, x: Array, train: bool = False) -> Array:
        """Return `layers[-1](... layers[0](x))`."""
        for layer in self.layers:
            x = layer.forward(x, train)
        return x

    def backward(self, dy: Array) -> Array:
        """The chain rule: the layers' backward passes, last to first."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy
