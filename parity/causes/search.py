"""The search for a cause: which variant of the reference's operation gives the candidate's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from parity.causes import Cause, Departure, activation, convolution, linear, normalization, pooling
from parity.causes.stage import Form, distance, first_input, number
from parity.trace import Array

_TOLERANCE = 10.0  # a variant fits if its error is at most this many times the noise, or 1e-9
_FORMS: tuple[tuple[str, Callable[[Departure], Iterator[Form]]], ...] = (
    ("conv", convolution.forms),
    ("pool", pooling.forms),
    ("reduce_window", pooling.forms),
    ("mean", pooling.forms),
    ("softmax", activation.softmax_forms),
    ("norm", normalization.forms),
    ("linear", linear.forms),
    ("dense", linear.forms),
    ("dot_general", linear.forms),
    ("matmul", linear.forms),
    ("add", linear.sums),
    ("flatten", linear.permutations),
    ("reshape", linear.permutations),
    ("transpose", linear.permutations),
    ("permute", linear.permutations),
    ("", activation.forms),
)


def find_cause(departure: Departure) -> Cause | None:
    """Return the variant that explains a departure; None if no known one does."""
    if departure.what == "output":
        return _variant(departure) or _factor(departure)
    if departure.what == "statistics":
        return _statistics(departure)
    return _gradient(departure)


def find_precision(departure: Departure, native: Array) -> Cause | None:
    """Return the precision to which a stage rounds, where the float64 twins agree.

    Args:
        departure: of the twins.
        native: the candidate's output in its own precision, made from the reference's inputs.
    """
    before = float(np.abs(native - departure.output).max())
    places: list[tuple[float, str, str]] = []
    for name, rounded in _ROUNDINGS.items():
        places.append((float(np.abs(rounded(departure.output) - native).max()), name, "its output"))
        for form in _forms(departure):
            if distance(form.result(), form.view(departure.output)) > _limit(departure):
                continue
            arrays = {
                k: rounded(v)
                for k, v in form.knobs.items()
                if isinstance(v, np.ndarray) and v.dtype.kind == "f"
            }
            for knobs, where in (
                ({k: v for k, v in arrays.items() if k == "x"}, "its input"),
                (arrays, "its operands"),
            ):
                result = form.result(knobs)
                if result.shape != form.view(native).shape:
                    continue
                for array in (result, rounded(result)):
                    places.append((float(np.abs(array - form.view(native)).max()), name, where))
    if not places:
        return None
    error, name, where = min(places, key=lambda place: place[0])
    if error > before / 4:
        return None
    identifier = {"bfloat16": "bfloat16-cast", "float16": "float16-cast", "TF32": "tf32"}[name]
    remedy = 'jax.default_matmul_precision("highest")' if name == "TF32" else "float32 there"
    sentence = f"{_place(departure)} rounds {where} to {name}, the reference does not: use {remedy}."
    return Cause(identifier, sentence, error)


def _forms(departure: Departure) -> Iterator[Form]:
    name = departure.reference.operation.lower()
    for word, forms in _FORMS:
        if word in name:
            yield from forms(departure)


def _limit(departure: Departure) -> float:
    return max(_TOLERANCE * departure.noise, 1e-9)


def _place(departure: Departure) -> str:
    """The candidate's line, or its stage."""
    return departure.candidate.where or departure.candidate.name


def _variant(departure: Departure) -> Cause | None:
    """Try each change of each form that gives the reference's own output."""
    limit = _limit(departure)
    fits: list[tuple[int, float, Cause]] = []
    for form in _forms(departure):
        if distance(form.result(), form.view(departure.output)) > limit:
            continue
        target = departure.candidate_output
        target = form.view(target) if target.ndim == departure.output.ndim else target
        for change in form.changes(target):
            error = distance(form.result(change.knobs), target)
            if error <= limit:
                sentence = f"{_place(departure)} {change.does}, the reference: {change.reference}; write {change.write}."
                fits.append((len(change.knobs), error, Cause(change.id, sentence, error)))
    return min(fits, key=lambda fit: fit[:2])[2] if fits else None


def _factor(departure: Departure) -> Cause | None:
    """A constant factor or offset between both."""
    a, b = departure.output.reshape(-1), departure.candidate_output.reshape(-1)
    if a.shape != b.shape or not a.size:
        return None
    square = float(a @ a)
    factor = float(a @ b) / square if square else 0.0
    if factor and distance(factor * a, b) <= _limit(departure):
        sentence = f"The candidate's {departure.candidate.name} is {number(factor)} times the reference's."
        identifier = (
            "attention-scale" if departure.reference.operation in ("div", "mul") else "constant-factor"
        )
        return Cause(identifier, sentence, distance(factor * a, b))
    return None


def _gradient(departure: Departure) -> Cause | None:
    """A gradient that does not pass, or passes changed."""
    truth, found, place = departure.result, departure.candidate_result, _place(departure)
    if not np.any(found):
        sentence = f"No gradient passes through {place} (a stop_gradient, or a detached value): let it pass."
        return Cause("stop-gradient", sentence, 0.0)
    x = first_input(departure)
    if "norm" in departure.reference.operation.lower() and x is not None and departure.gradient is not None:
        cause = _constant_statistics(departure, x)
        if cause is not None:
            return cause
    a, b = truth.reshape(-1), found.reshape(-1)
    factor = float(a @ b) / float(a @ a) if np.any(a) else 0.0
    if factor and distance(factor * a, b) <= _limit(departure):
        sentence = f"The derivative of {place} is {number(factor)} times the right one: a custom derivative is wrong."
        return Cause("wrong-custom-derivative", sentence, distance(factor * a, b))
    if activation.name_of(departure) is not None:
        sentence = f"The derivative at {place} is not that of {departure.reference.operation}: a custom derivative is wrong."
        return Cause("wrong-custom-derivative", sentence, distance(a, b))
    other = departure.gradient
    if other is not None and other.shape == found.shape and distance(other, found) <= _limit(departure):
        sentence = f"A part of the gradient does not pass through {place} (a stop_gradient): let it pass."
        return Cause("stop-gradient", sentence, 0.0)
    return None


def _constant_statistics(departure: Departure, x: Array) -> Cause | None:
    """Mean, variance or both taken for constants in the backward pass of a normalization."""
    dy = departure.gradient
    assert dy is not None
    for form in normalization.forms(departure):
        if distance(form.result(), departure.output) > _limit(departure):
            continue
        knobs = form.knobs
        axes, channel = knobs["axes"], knobs["channel"]
        shape = [-1 if axis == channel % x.ndim else 1 for axis in range(x.ndim)]
        weight = knobs["weight"]
        g = dy if weight is None else dy * (weight if weight.ndim > 1 else weight.reshape(shape))
        centered = x - x.mean(axes, keepdims=True)
        inverse = 1 / np.sqrt(x.var(axes, keepdims=True) + knobs["eps"])
        by_mean = -g.mean(axes, keepdims=True)
        by_var = -centered * inverse**2 * (g * centered).mean(axes, keepdims=True)
        terms = {
            "mean and variance are constants": g * inverse,
            "the variance is a constant": (g + by_mean) * inverse,
            "the mean is a constant": (g + by_var) * inverse,
        }
        for words, result in terms.items():
            if distance(result, departure.candidate_result) <= _limit(departure):
                sentence = f"In the backward pass of {_place(departure)} {words}: differentiate through the batch statistics."
                return Cause(
                    "batch-statistics-constant", sentence, distance(result, departure.candidate_result)
                )
    return None


def _statistics(departure: Departure) -> Cause | None:
    """Running statistics: the share of the new ones, and which variance they take."""
    old = departure.state.get(departure.result_name)
    truth, found = departure.result, departure.candidate_result
    if old is None or old.shape != found.shape:
        return None
    if distance(found, old) <= _limit(departure):
        sentence = f"The candidate does not update {departure.result_name}: run it in train mode and keep the new state."
        return Cause("statistics-not-updated", sentence, 0.0)
    rate = departure.reference.attributes.get("momentum")
    rate = 0.1 if rate is None else float(rate)
    batch = old + (truth - old) / rate  # what the reference mixed in
    x = first_input(departure)
    count = 0 if x is None else x.size // max(old.size, 1)
    tried = [
        (
            "momentum-convention",
            share,
            batch,
            f"takes {number(share)} of the new statistics, the reference {number(rate)}",
        )
        for share in (1 - rate, 0.01, 0.001, 0.1, 0.9, 0.99)
    ]
    if count > 1 and "var" in departure.result_name:
        does = "stores the biased variance, the reference the unbiased one (n / (n - 1))"
        tried.insert(0, ("biased-running-variance", rate, batch * (count - 1) / count, does))
    for identifier, share, new, does in tried:
        error = distance(old + share * (new - old), found)
        if error <= _limit(departure):
            write = {
                "momentum-convention": f"momentum={number(1 - rate)} where it is the share of the old ones"
            }
            remedy = write.get(identifier, "the unbiased variance into the running statistics")
            return Cause(identifier, f"The candidate {does}; write {remedy}.", error)
    return None


def _bits(array: Array, drop: int) -> Array:
    """float32 with the last `drop` bits of its fraction rounded away, to even."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1)
    even = (bits >> np.uint32(drop)) & np.uint32(1)
    mask = np.uint32(0xFFFFFFFF ^ ((1 << drop) - 1))
    return ((bits + half + even) & mask).view(np.float32).astype(np.float64)


_ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "bfloat16": lambda array: _bits(array, 16),
    "TF32": lambda array: _bits(array, 13),
    "float16": lambda array: np.asarray(array, np.float16).astype(np.float64),
}
