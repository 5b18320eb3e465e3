"""Optimizers beside the table: any transformation of optax, `optax:NAME`, or of a file, `FILE.py:FUNCTION`.

    def make(learning_rate, b1=0.9):  # mine.py, for the name "mine.py:make"
        return optax.chain(optax.trace(b1), optax.scale_by_learning_rate(learning_rate))

The function is called with the rate of a step, a traced scalar, and with keyword arguments, and returns an
`optax.GradientTransformation`. It gets the gradients of all trained parameters, {torchvision name: array},
and so may look at all of them at once. It is called whenever a step is compiled: the structure of its state
must not depend on the rate. The code of a file is run as it is.
"""

from __future__ import annotations

import functools
import inspect
import os
import runpy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

Make = Callable[..., optax.GradientTransformation]


def is_external(name: str) -> bool:
    """True for `optax:NAME` and `FILE.py:FUNCTION`, False for a name of `optimizers.OPTIMIZERS`."""
    return ":" in name


def make_transformation(
    name: str, learning_rate: float | jax.Array, arguments: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Return the optimizer of such a name.

    Args:
        name: `optax:NAME`, where NAME may have dots (`optax:contrib.muon`), or `FILE.py:FUNCTION`.
        learning_rate: that of this step; shape ().
        arguments: the other arguments of the function.

    Raises:
        ValueError: there is no such function, or the file cannot be run.

    Examples:
        >>> lion = make_transformation("optax:lion", 1e-4, {"b1": 0.95})
    """
    return _function(name)(learning_rate, **arguments)


def check_transformation(name: str, arguments: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Raise ValueError, in one line, if a transformation cannot train these parameters. Nothing is computed.

    Args:
        name, arguments: as of `make_transformation`.
        params: {name: array}, or shapes and types.
    """

    make = _function(name)

    def step(lr: jax.Array, params: Any) -> tuple[Any, Any, Any]:
        transformation = make(lr, **arguments)
        state = transformation.init(params)
        return state, *transformation.update(params, state, params)

    try:
        state, updates, new_state = jax.eval_shape(step, jnp.ones(()), dict(params))
    except jax.errors.ConcretizationTypeError:
        reason = "it takes the learning rate for a number of Python; the rate is traced, so use jnp.where"
        raise ValueError(f"{name}: {reason}") from None
    except Exception as error:
        raise ValueError(f"{name}: {_first_line(error)}") from error
    if _shapes(updates) != _shapes(dict(params)):
        raise ValueError(f"{name}: its updates have other names or shapes than the parameters")
    if _described(state) != _described(new_state):
        raise ValueError(f"{name}: a step changes the structure, the shapes or the types of its state")
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)):
        raise ValueError(f"{name}: its state holds a typed key, which no checkpoint can; use a raw key")


def _shapes(tree: Any) -> Any:
    """The structure of a tree, and the shapes of its leaves."""
    return jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)]


def _described(tree: Any) -> Any:
    """The structure of a tree, and the shapes and types of its leaves."""
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def _function(name: str) -> Make:
    """The function of a name."""
    where, _, attributes = name.rpartition(":")
    if where == "optax":
        function: Any = optax
        for attribute in attributes.split("."):
            function = getattr(function, attribute, None)
    else:
        function = _run(where, _modified(where)).get(attributes)
    if not callable(function):
        raise ValueError(f"{name}: {where} has no function {attributes}")
    if where == "optax" and "learning_rate" not in next(iter(inspect.signature(function).parameters), ""):
        raise ValueError(f"{name}: its first argument is no learning rate; name an optimizer, as optax:lion")
    return function


def _modified(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


@functools.cache
def _run(path: str, modified: int) -> dict[str, Any]:
    """The names that a file defines; it is run once, and again when it was modified."""
    try:
        return runpy.run_path(path)
    except Exception as error:
        raise ValueError(f"{path}: cannot be run ({type(error).__name__}: {_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
