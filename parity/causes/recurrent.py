"""LSTM, GRU and plain recurrent layers, and their cells."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from parity.causes import Departure
from parity.causes.activation import FUNCTIONS
from parity.causes.stage import Change, Form, attribute
from parity.trace import Array

_GATES = {"lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n"), "rnn": ("n",)}


def recur(
    x: Array,
    h: Array,
    c: Array,
    weights: tuple[Array, Array, Array | None, Array | None],
    kind: str,
    order: tuple[int, ...],
    reverse: bool = False,
    sigmoid: str = "sigmoid",
    tanh: str = "tanh",
    reset_first: bool = False,
    share_of_new: bool = False,
    forget: float = 0.0,
    hard: str = "",
) -> Array:
    """The states of one layer.

    Args:
        x: [time, N, in]. h, c: [N, hidden].
        weights: [gates * hidden, in], [gates * hidden, hidden] and both biases or None.
        order: gate k of the equations is part order[k] of the weights.
        reset_first: a GRU's reset gate acts on the state before its product.
        share_of_new: a GRU's update gate is the share of the new state.
        forget: added to an LSTM's forget gate.
        hard: the gate of an LSTM that is a hard sigmoid: "i", "f" or "o".

    Returns:
        [time, N, hidden].
    """
    w_x, w_h, b_x, b_h = weights
    w_x, w_h = (np.concatenate([np.split(w, len(order))[k] for k in order]) for w in (w_x, w_h))
    b_x, b_h = (
        np.zeros(len(w_x)) if b is None else np.concatenate([np.split(b, len(order))[k] for k in order])
        for b in (b_x, b_h)
    )
    gate, squash = FUNCTIONS[sigmoid], FUNCTIONS[tanh]
    states = []
    for step in x[::-1] if reverse else x:
        a = np.split(step @ w_x.T + b_x, len(order), axis=1)
        b = np.split(h @ w_h.T + b_h, len(order), axis=1)
        if kind == "lstm":
            i, f, g, o = (p + q for p, q in zip(a, b, strict=True))
            i, f, o = (
                FUNCTIONS["hardsigmoid"](a) if name == hard else gate(a)
                for name, a in (("i", i), ("f", f + forget), ("o", o))
            )
            c = f * c + i * squash(g)
            h = o * squash(c)
        elif kind == "gru":
            r, z = gate(a[0] + b[0]), gate(a[1] + b[1])
            size = h.shape[1]
            inner = (r * h) @ w_h[2 * size :].T + b_h[2 * size :] if reset_first else r * b[2]
            n = squash(a[2] + inner)
            h = z * n + (1 - z) * h if share_of_new else (1 - z) * n + z * h
        else:
            h = squash(a[0] + b[0])
        states.append(h)
    return np.stack(states[::-1] if reverse else states)


def stopped_gradients(form: Form, dy: Array) -> Iterator[tuple[str, Array]]:
    """Input gradients of an LSTM of one layer of which each step takes the last state for a constant.

    Args:
        dy: the gradient of the output, in the layout of the reference.

    Yields:
        The state, and the gradient in the layout of the reference.
    """
    knobs = form.knobs
    if knobs["kind"] != "lstm" or len(knobs["layers"]) != 1 or dy.ndim != 3:
        return
    w_x, w_h, b_x, b_h = knobs["layers"][0]
    h, c, gate = knobs["h"][0], knobs["c"][0], FUNCTIONS["sigmoid"]
    steps = []
    for x in knobs["x"]:
        a = x @ w_x.T + h @ w_h.T + sum(b for b in (b_x, b_h) if b is not None)
        i, f, g, o = np.split(a, 4, axis=1)
        i, f, g, o, last = gate(i), gate(f), np.tanh(g), gate(o), c
        c = f * c + i * g
        h = o * np.tanh(c)
        steps.append((i, f, g, o, last, np.tanh(c)))
    for words, keep_h, keep_c in (("hidden state", 0, 1), ("cell state", 1, 0), ("state", 0, 0)):
        dh = dc = np.zeros(h.shape)
        dx = []
        for (i, f, g, o, last, squashed), d in zip(steps[::-1], form.view(dy)[::-1], strict=True):
            dh = d + dh
            dc = dc + dh * o * (1 - squashed**2)
            parts = dc * g * i * (1 - i), dc * last * f * (1 - f), dc * i * (1 - g**2)
            da = np.concatenate([*parts, dh * squashed * o * (1 - o)], 1)
            dx.append(da @ w_x)
            dh, dc = keep_h * (da @ w_h), keep_c * dc * f
        yield words, form.view(np.stack(dx[::-1]))


def forms(departure: Departure) -> Iterator[Form]:
    """The layers of PyTorch in one direction, time first or batch first; a cell is a sequence of length 1."""
    name = departure.reference.operation.lower()
    kind = next((kind for kind in _GATES if kind in name), None)
    arrays = list(departure.inputs.values())
    parameters = departure.parameters
    if kind is None or not arrays:
        return
    layers = []
    for layer in itertools.count():
        found = [
            _parameter(parameters, part, layer) for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        if found[0] is None or found[1] is None:
            break
        layers.append((found[0], found[1], found[2], found[3]))
    if not layers:
        return
    hidden, x = layers[0][1].shape[1], arrays[0]
    own = {"kind": kind, "order": tuple(range(len(_GATES[kind]))), "layers": tuple(layers)}
    own["tanh"] = str(attribute(departure, "nonlinearity", default="relu" if "relu" in name else "tanh"))
    for layout in ("cell",) if x.ndim == 2 else ("time", "batch"):
        sequence = x[None] if layout == "cell" else x.swapaxes(0, 1) if layout == "batch" else x
        zero = np.zeros((len(layers), sequence.shape[1], hidden))
        start = [a.reshape(zero.shape) for a in arrays[1:] if a.size == zero.size]
        h, c = [*start, zero, zero][:2]
        knobs = {"x": sequence, "h": h, "c": c, **own}

        def view(y: Array, layout: str = layout) -> Array:
            return y[None] if layout == "cell" else y.swapaxes(0, 1) if layout == "batch" else y

        yield Form(_stack, knobs, lambda target, knobs=knobs: _changes(knobs), view)  # type: ignore[misc]


def _parameter(parameters: Any, part: str, layer: int) -> Array | None:
    pattern = rf"(.*\.)?{part}(_l{layer}{'|' if layer == 0 else ''})"
    return next((a for name, a in parameters.items() if re.fullmatch(pattern, name)), None)


def _stack(x: Array, h: Array, c: Array, layers: Any, **knobs: Any) -> Array:
    for index, weights in enumerate(layers):
        x = recur(x, h[index], c[index], weights, **knobs)
    return x


def _changes(knobs: dict[str, Any]) -> Iterable[Change]:
    kind, own, layers = knobs["kind"], knobs["order"], knobs["layers"]
    gates = _GATES[kind]
    names = ", ".join(gates)
    for order in list(itertools.permutations(own))[1:]:
        words = ", ".join(gates[order.index(k)] for k in own)
        does = f"splits the gates as {words}"
        yield Change("gate-order", does, f"as {names}", f"the order {names}", {"order": order})
    for index, name in ((2, "input"), (3, "recurrent")):
        if layers[0][index] is not None:
            left = tuple(tuple(None if k == index else w for k, w in enumerate(layer)) for layer in layers)
            does = f"leaves the {name} bias out"
            yield Change("missing-bias", does, "adds it", "both biases (or their sum)", {"layers": left})
    does = "reads the sequence from its end"
    yield Change("sequence-reversed", does, "from its beginning", "the sequence in order", {"reverse": True})
    for knob, others in (
        ("sigmoid", ("hardsigmoid", "hardsigmoid-0.2", "tanh")),
        ("tanh", ("relu", "hardtanh", "sigmoid")),
    ):
        for other in others:
            does = f"uses {other}"
            yield Change("activation", does, f"{knobs.get(knob, knob)}", f"{knob}", {knob: other})
    for gate in ("i", "f", "o") if kind == "lstm" else ():
        does, write = f"uses a hard sigmoid for the gate {gate}", "sigmoid"
        yield Change("activation", does, "a sigmoid", write, {"hard": gate})
    if kind == "lstm":
        does, write = "adds 1 to the forget gate", "no forget bias"
        yield Change("forget-bias", does, "does not", write, {"forget": 1.0})
    if kind == "gru":
        does = "applies the reset gate before the product with the state"
        write = "r * (W h + b)"
        yield Change("reset-gate-placement", does, "after it", write, {"reset_first": True})
        does, write = "takes the update gate for the share of the new state", "(1 - z) * n + z * h"
        yield Change("update-gate-convention", does, "of the old", write, {"share_of_new": True})
