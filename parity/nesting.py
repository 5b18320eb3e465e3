"""Names of the arrays in nested inputs and outputs, for adapters that have no tree library of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from parity.trace import Inputs


def named_leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what tuples, lists, mappings and dataclasses contain, but None: "output.0", "output.logits"."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, tuple | list):
        items = [(str(index), value) for index, value in enumerate(tree)]
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        items = [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    else:
        if tree is not None:
            yield name, tree
        return
    for key, value in items:
        yield from named_leaves(value, f"{name}.{key}")


def arguments(inputs: Inputs, convert: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, each converted."""
    if isinstance(inputs, Mapping):
        return (), {str(name): convert(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(convert(value) for value in inputs), {}
    return (convert(inputs),), {}


def named_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name: "input" for a single one, else "input.0", "input.1", or "input.mask"."""
    if len(args) == 1 and not kwargs:
        return {"input": args[0]}
    positional = {f"input.{index}": value for index, value in enumerate(args)}
    return positional | {f"input.{name}": value for name, value in kwargs.items()}


def is_plain(value: Any) -> bool:
    """True for numbers, words, None, and tuples and lists of them."""
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def unique_name(name: str, taken: set[str]) -> str:
    """Return the name, or "name.2", "name.3", ... if it is taken, and add it to `taken`."""
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}.{count}"
    taken.add(unique)
    return unique
