"""Attention: scale, mask, order of the heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from parity.causes import Departure
from parity.causes.activation import softmax
from parity.causes.stage import Change, Form, attribute, first_input, number, solve
from parity.trace import Array

_NUMBERS = [sign * value for sign in (-1.0, 1.0) for value in np.geomspace(1e-3, 1e9, 25).tolist()]


def attend(q: Array, k: Array, v: Array, scale: float, mask: Array | None = None, axis: int = -1) -> Array:
    """softmax(scale q k^T + mask) v, of [..., length, features]."""
    scores = scale * (q @ k.swapaxes(-1, -2))
    return np.asarray(softmax(scores if mask is None else scores + mask, axis) @ v)


def causal(rows: int, columns: int, offset: int = 0, value: float = -np.inf) -> Array:
    """A mask that is added: 0 where column <= row + offset, else `value`."""
    visible = np.arange(columns) <= np.arange(rows)[:, None] + offset
    return np.where(visible, 0.0, value)


def forms(departure: Departure) -> Iterator[Form]:
    """`scaled_dot_product_attention`, heads before length as in PyTorch or after it as in JAX."""
    arrays = list(departure.inputs.values())
    if len(arrays) == 1:
        arrays *= 3
    if len(arrays) == 2:
        arrays.append(arrays[1])
    if len(arrays) < 3 or arrays[0].ndim < 3:
        return
    for swap in (False, True):
        q, k, v = (a.swapaxes(-2, -3) if swap else a for a in arrays[:3])
        mask = arrays[3] if len(arrays) > 3 else None
        if attribute(departure, "is_causal", default=False):
            mask = causal(q.shape[-2], k.shape[-2])
        scale = float(attribute(departure, "scale", default=q.shape[-1] ** -0.5))

        def changes(
            target: Array,
            q: Array = q,
            k: Array = k,
            v: Array = v,
            mask: Array | None = mask,
            scale: float = scale,
        ) -> Iterable[Change]:
            value = solve(lambda s: attend(q, k, v, s, mask), target, np.geomspace(1e-4, 1e2, 31).tolist())
            if value is not None:
                does = f"scales the scores by {number(value)}{_meaning(value, q)}"
                own = f"by {number(scale)}{_meaning(scale, q)}"
                yield Change("attention-scale", does, own, f"scale={number(scale)}", {"scale": value})
            yield from _masks(q, k, v, mask, scale, target)
            does, write = "normalizes over the queries", "a softmax over the keys"
            yield Change("softmax-axis", does, "over the keys", write, {"axis": -2})
            yield Change(
                "operands-exchanged", "exchanges keys and values", "does not", "q, k, v", {"k": v, "v": k}
            )
            yield Change(
                "operands-exchanged", "exchanges queries and keys", "does not", "q, k, v", {"q": k, "k": q}
            )

        knobs = {"q": q, "k": k, "v": v, "scale": scale, "mask": mask}
        yield Form(attend, knobs, changes, lambda y, s=swap: y.swapaxes(-2, -3) if s else y)  # type: ignore[misc]


def _masks(q: Array, k: Array, v: Array, mask: Array | None, scale: float, target: Array) -> Iterator[Change]:
    """No mask, causal ones, and other numbers for what is hidden."""
    for offset in (0, 1, -1):
        does = "hides later positions" + (f", {offset} further" if offset else " (causal)")
        other = causal(q.shape[-2], k.shape[-2], offset)
        yield Change("causal-mask", does, "does not so", "the reference's mask", {"mask": other})
    if mask is None:
        return
    yield Change("mask-missing", "has no mask", "hides positions", "the mask", {"mask": None})
    hidden = mask < -50
    if not hidden.any():
        return
    inverted = np.where(hidden, 0.0, -np.inf)
    yield Change("mask-inverted", "hides what it should show", "hides the rest", "~mask", {"mask": inverted})
    does, write = "adds a mask of 0 and 1", "True for what is seen, or -inf"
    for one in (hidden, ~hidden):
        yield Change("mask-value", does, "hides positions", write, {"mask": one.astype(float)})

    def filled(number: float) -> Array:
        return attend(q, k, v, scale, np.where(hidden, number, mask))

    value = solve(filled, target, np.linspace(-40, 10, 51).tolist())
    if value is not None:
        does = f"adds {number(value)} where the mask hides"
        write = "-inf, or -1e9"
        yield Change(
            "mask-value", does, "hides these positions", write, {"mask": np.where(hidden, value, mask)}
        )


def _meaning(scale: float, q: Array) -> str:
    """A scale in terms of head size d."""
    size = q.shape[-1]
    words = {1.0: " (none)", size**-0.5: " (1 / sqrt(d))", 1 / size: " (1 / d)", size**0.5: " (sqrt(d))"}
    heads = q.shape[-3] if q.ndim > 3 else 1
    words |= {(size * heads) ** -0.5: " (1 / sqrt(all features))"} if heads > 1 else {}
    return next((word for value, word in words.items() if abs(scale / value - 1) < 1e-9), "")


def mask_forms(departure: Departure) -> Iterator[Form]:
    """`masked_fill` or `where`: the mask is where the output is not the input."""
    x, output = first_input(departure), departure.output
    if x is None or x.shape != output.shape or not (x != output).any():
        return
    hidden = x != output
    values = np.unique(output[hidden])
    if len(values) != 1:
        return

    def compute(x: Array, hidden: Array, value: float) -> Array:
        return np.where(hidden, value, x)

    def changes(target: Array) -> Iterable[Change]:
        write = "the mask as it is"
        yield Change(
            "mask-inverted", "fills what the mask shows", "what it hides", write, {"hidden": ~hidden}
        )
        yield Change(
            "mask-missing", "fills nothing", "what the mask hides", write, {"hidden": hidden & False}
        )
        if target.shape == output.shape:
            for part, inverted in ((hidden, False), (~hidden, True)):
                found = np.unique(target[part])
                if len(found) == 1 and (found[0] != values[0] or inverted):
                    id_ = "mask-inverted" if inverted else "mask-value"
                    does = f"fills {'what the mask shows' if inverted else 'it'} with {number(found[0])}"
                    knobs = {"value": float(found[0]), "hidden": part}
                    yield Change(id_, does, f"with {number(values[0])}", f"{number(values[0])}", knobs)

    yield Form(compute, {"x": x, "hidden": hidden, "value": float(values[0])}, changes)


def hidden_scores(scores: Array, masked: Array) -> Array | None:
    """A mask of the scores that one common value replaced; None if there is no such value."""
    if scores.shape != masked.shape:
        return None
    hidden = np.asarray(scores != masked)
    return hidden if hidden.any() and len(np.unique(masked[hidden])) == 1 else None


def softmax_variants(
    scores: Array, masked: Array, axis: int, target: Array | None
) -> Iterator[tuple[str, Array, str]]:
    """Wrong variants of a softmax of masked scores: id, result, and the rest of the sentence.

    Args:
        scores: before the mask. masked: with it.
        axis: of the softmax.
        target: the candidate's result, if that is known.
    """
    hidden = hidden_scores(scores, masked)
    if hidden is None:
        return
    plain = softmax(scores, axis)
    does = "sets weights to 0 after the softmax, so that they no longer sum to 1: mask the scores with -inf"
    yield "mask-after-softmax", np.where(hidden, 0, plain), does
    does = (
        "hides what the mask shows, the reference the rest: write ~mask, or the arguments of where exchanged"
    )
    yield "mask-inverted", softmax(np.where(hidden, scores, -1e30), axis), does
    yield "mask-missing", plain, "does not mask the scores: mask them"
    if scores.ndim > 1 and scores.shape[-1] == scores.shape[-2]:
        turned = softmax(np.where(hidden.swapaxes(-1, -2), -1e30, scores), axis)
        yield "mask-inverted", turned, "hides queries, the reference keys: write the mask along the last axis"
    for other in range(scores.ndim):
        if other != axis % scores.ndim:
            does = (
                f"normalizes along axis {other}, the reference along {axis % scores.ndim}: write axis={axis}"
            )
            yield "softmax-axis", softmax(np.where(hidden, -1e30, scores), other), does
    if target is not None and target.shape == scores.shape:
        shown = np.broadcast_to((~hidden).any(axis, keepdims=True), hidden.shape)
        with np.errstate(all="ignore"):
            logs = np.log(target)
            offset = np.where(hidden, -np.inf, logs - scores).max(axis, keepdims=True)
        for verb, rest in (("fills hidden scores with", 0.0), ("adds to hidden scores", scores)):
            values = (logs - offset - rest)[hidden & shown]
            if values.size and np.isfinite(values).all() and np.ptp(values) < 1e-6 * np.abs(values).max():
                value = float(f"{np.median(values):.6g}")
                does = f"{verb} {number(value)}, which is not small enough: write -inf"
                yield "mask-value", softmax(np.where(hidden, value + rest, scores), axis), does
