"""Activations and softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from scipy import special

from parity.causes import Departure
from parity.causes.stage import Change, Form, attribute, first_input, number, solve
from parity.trace import Array

Function = Callable[..., Array]


def _leaky_relu(x: Array, slope: float = 0.01) -> Array:
    return np.where(x > 0, x, slope * x)


def _elu(x: Array, slope: float = 1.0) -> Array:
    return np.where(x > 0, x, slope * np.expm1(np.minimum(x, 0)))


def _softplus(x: Array, beta: float = 1.0) -> Array:
    return np.asarray(np.logaddexp(0, beta * x) / beta)


FUNCTIONS: dict[str, Function] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * special.ndtr(x),
    "gelu-tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu-sigmoid": lambda x: x * special.expit(1.702 * x),
    "silu": lambda x: x * special.expit(x),
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "selu": lambda x: 1.0507009873554805 * _elu(x, 1.6732632423543772),
    "celu": lambda x, slope=1.0: np.maximum(x, 0) + slope * np.expm1(np.minimum(x, 0) / slope),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hardtanh": lambda x, low=-1.0, high=1.0: np.clip(x, low, high),
    "hardsigmoid-0.2": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "softplus": _softplus,
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "sigmoid": special.expit,
    "tanh": np.tanh,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "logsigmoid": lambda x: -np.logaddexp(0, -x),
    "relu-squared": lambda x: np.maximum(x, 0) ** 2,
    "exp": np.exp,
    "erf": special.erf,
    "square": np.square,
    "absolute value": np.abs,
    "identity": lambda x: x,
}
"""float64 functions; `erf` is exact, as everywhere."""

ALIASES = {"logistic": "sigmoid", "swish": "silu", "hard_swish": "hardswish", "hard_silu": "hardswish"}
ALIASES |= {
    "hard_sigmoid": "hardsigmoid",
    "hard_tanh": "hardtanh",
    "leakyrelu": "leaky_relu",
    "logsigmoid": "logsigmoid",
}
ALIASES |= {"log_sigmoid": "logsigmoid", "abs": "absolute value", "soft_sign": "softsign"}
_SOLVED = {
    "leaky_relu": ("slope", "slope"),
    "elu": ("alpha", "slope"),
    "celu": ("alpha", "slope"),
    "softplus": ("beta", "beta"),
}


def name_of(departure: Departure) -> str | None:
    """The reference's activation, if it is one."""
    name = departure.reference.operation.lower().rstrip("_")
    name = ALIASES.get(name, name)
    approximate = attribute(departure, "approximate", default="none")
    if name == "gelu" and approximate in ("tanh", True):
        return "gelu-tanh"
    if name in ("hardtanh", "clamp", "clip"):
        limits = attribute(departure, "min_val", "min"), attribute(departure, "max_val", "max")
        return "relu6" if limits == (0, 6) else "relu" if limits == (0, None) else "hardtanh"
    return name if name in FUNCTIONS else None


def arguments_of(departure: Departure, name: str) -> dict[str, float]:
    """Slope or steepness of the reference's activation."""
    if name == "hardtanh":
        low, high = attribute(departure, "min_val", "min"), attribute(departure, "max_val", "max")
        return {key: float(v) for key, v in (("low", low), ("high", high)) if v is not None}
    if name not in _SOLVED:
        return {}
    value = attribute(departure, "negative_slope", "alpha", "beta")
    return {} if value is None else {_SOLVED[name][1]: float(value)}


def apply(x: Array, name: str, **arguments: float) -> Array:
    """The activation of that name."""
    if name == "softmax":
        return softmax(x, int(arguments["axis"]))
    with np.errstate(all="ignore"):  # scores may be infinite
        return FUNCTIONS[name](x, **arguments)


def forms(departure: Departure) -> Iterator[Form]:
    """The activation."""
    x, name = first_input(departure), name_of(departure)
    if x is None or name is None:
        return
    own = arguments_of(departure, name)

    def compute(x: Array, function: tuple[str, dict[str, float]]) -> Array:
        return apply(x, function[0], **function[1])

    def changes(target: Array) -> Iterable[Change]:
        reference = _words(name, own)
        for other in FUNCTIONS:
            if other != name:
                yield _change(other, {}, reference, name)
        for axis in range(x.ndim):
            knobs = {"function": ("softmax", {"axis": axis})}
            yield Change("activation", f"uses softmax along axis {axis}", reference, reference, knobs)
        for other, (_, argument) in _SOLVED.items():
            grid = np.concatenate([-np.geomspace(1e-3, 1, 4), np.geomspace(1e-4, 10, 21)]).tolist()
            grid = [g for g in grid if g > 0 or argument == "slope"]
            value = solve(lambda v, o=other, a=argument: apply(x, o, **{a: v}), target, grid)  # type: ignore[misc]
            if value is not None:
                yield _change(other, {argument: value}, reference, name)

    yield Form(compute, {"x": x, "function": (name, own)}, changes)


def _words(name: str, arguments: dict[str, float]) -> str:
    words = {
        "gelu": "the exact GELU (erf)",
        "gelu-tanh": "the tanh approximation of GELU",
        "identity": "no activation",
    }
    words["gelu-sigmoid"] = "the sigmoid approximation of GELU (quick GELU)"
    named = ((_SOLVED[name][0] if name in _SOLVED else key, v) for key, v in arguments.items())
    value = "".join(f" with {key} {number(v)}" for key, v in named)
    return words.get(name, name.replace("_", " ")) + value


def _change(name: str, arguments: dict[str, float], reference: str, base: str) -> Change:
    id_ = "activation"
    if name == base:
        id_ = "activation-slope"
    elif {name, base} == {"gelu", "gelu-tanh"}:
        id_ = "gelu-tanh"
    elif arguments and {name, base} == {"leaky_relu", "relu"}:
        id_ = "activation-slope"
    advice = {"gelu": "approximate=False", "gelu-tanh": "approximate=True"}.get(base, reference)
    advice = advice if "gelu" in name else reference
    return Change(id_, f"uses {_words(name, arguments)}", reference, advice, {"function": (name, arguments)})


def softmax(
    x: Array,
    axis: int | tuple[int, ...],
    log: bool = False,
    scale: float = 1.0,
    more: float = 0.0,
    sums: Array | float = 1.0,
) -> Array:
    """Softmax or its logarithm along an axis.

    Args:
        more: added to the sum of exponentials: 0, or 1 for "softmax one".
        sums: what the result adds up to.
    """
    x = x * scale
    top = x.max(axis=axis, keepdims=True)
    total = np.exp(x - top).sum(axis=axis, keepdims=True)
    total = total + more * np.exp(-top) if more else total
    logs = x - top - np.log(total)
    return np.asarray(logs if log else np.exp(logs) * sums)


def softmax_forms(departure: Departure) -> Iterator[Form]:
    """Softmax; its axis is tried if the reference does not name one."""
    x = first_input(departure)
    if x is None:
        return
    log = "log" in departure.reference.operation.lower()
    given = attribute(departure, "dim", "axis")
    for axis in [int(given) % x.ndim] if isinstance(given, int) else reversed(range(x.ndim)):

        def changes(target: Array, axis: int = axis) -> Iterable[Change]:
            every: list[Any] = [other for other in range(x.ndim) if other != axis]
            every += [tuple(range(1, x.ndim)), tuple(range(x.ndim))]
            for other in every:
                yield Change(
                    "softmax-axis",
                    f"normalizes along axis {other}",
                    f"along {axis}",
                    f"axis={axis}",
                    {"axis": other},
                )
            words = ("log-softmax", "softmax") if not log else ("softmax", "log-softmax")
            yield Change("log-softmax", f"computes {words[0]}", words[1], words[1], {"log": not log})
            sums = target.sum(axis, keepdims=True)
            if not log and ((sums > 0) & (sums < 1 + 1e-9)).all():
                does, write = (
                    "hides positions after the softmax (sums below 1)",
                    "-inf for these scores before it",
                )
                yield Change("mask-after-softmax", does, "before it", write, {"sums": sums})
            does = "adds 1 to the sum of exponentials"
            yield Change("softmax-sum", does, "does not", "a plain softmax", {"more": 1.0})
            value = solve(lambda v: softmax(x, axis, log, v), target, np.geomspace(1e-3, 1e3, 25).tolist())
            if value is not None:
                does = f"multiplies the scores by {number(value)}"
                yield Change(
                    "attention-scale", does, "does not", "scores without this factor", {"scale": value}
                )

        yield Form(softmax, {"x": x, "axis": axis, "log": log}, changes)
