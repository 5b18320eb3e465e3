"""Where the float64 twins agree: which precision a stage rounds to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from parity.causes import Cause, Departure, normalization
from parity.causes.stage import Form
from parity.trace import Array


def _fraction(array: Array, bits: int) -> Array:
    """Round to nearest, ties to even, with that many bits after the leading one; any exponent."""
    mantissa, exponent = np.frexp(np.asarray(array, np.float64))
    return np.asarray(np.ldexp(np.round(np.ldexp(mantissa, bits + 1)), exponent - bits - 1))


def _half(array: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float64).astype(np.float16).astype(np.float64)


ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "float32": lambda array: _fraction(array, 23),
    "float16": _half,
    "TF32": lambda array: _fraction(array, 10),
    "bfloat16": lambda array: _fraction(array, 7),
}
IDS = {"float32": "float32-cast", "float16": "float16-cast", "TF32": "tf32", "bfloat16": "bfloat16-cast"}
SHARE = 0.2  # a rounding explains a departure if at most this share of its root mean square is left
_CANCELED = 16 * 2.0**-24  # of the mean square: what the difference of mean square and squared mean loses


def rounded_to(departure: Departure, native: Array, form: Form | None) -> Cause | None:
    """The rounding that explains most of the error of `native`, the candidate's output in its own precision.

    Its numbers are compared, not its code: sums in another order differ by their own rounding, and a number
    in the middle falls to either side, so the root mean square of the error counts.
    """
    recorded = {name for value in departure.segment for name in value.attributes.get("rounded", ())}
    view = form.view if form is not None else np.asarray
    truth, theirs = view(departure.output), view(native)
    before = size(theirs - truth)
    if not np.isfinite(before) or before == 0:
        return None
    here = departure.candidate.where or departure.candidate.name
    if form is not None and _variance_canceled(theirs, form, before):
        does = (
            "computes its variance in float32 as E[x^2] - E[x]^2, which loses digits where the mean is large"
        )
        write = "E[(x - E[x])^2] (use_fast_variance=False)"
        return Cause("fast-variance", f"{here} {does}: write {write}", before)
    tried: list[tuple[float, str, str]] = []
    for name, rounding in ROUNDINGS.items():
        with np.errstate(all="ignore"):
            places = {"its output": rounding(truth)}
        if form is not None:
            arrays = {
                k: rounding(v)
                for k, v in form.knobs.items()
                if isinstance(v, np.ndarray) and v.dtype.kind == "f"
            }
            products = {k: v for k, v in arrays.items() if k != "bias"}
            weights = {k: v for k, v in products.items() if k != "x"}
            places["its input"] = form.result({k: v for k, v in arrays.items() if k == "x"})
            if weights and "x" in arrays:
                places["its weights"] = form.result(weights)
            if "fixed" in form.knobs and form.knobs["fixed"] is None and form.knobs["groups"] is None:
                places["its variance"] = form.result({"fixed": normalization.rounded(form, rounding)})
            places["its operands"] = form.result(products)
            places["its operands and its output"] = rounding(places["its operands"])
            if form.knobs.get("bias") is not None:
                product = form.result({**products, "bias": None})
                bias = rounding(places["its operands"] - product)
                places["its operands, its product and its output"] = rounding(rounding(product) + bias)
        for place, result in places.items():
            # A unit of TF32 rounds all that it multiplies, and nothing else, unless the code says so.
            single = "TF32" in recorded and "output" not in place
            if result.shape == truth.shape and (name != "TF32" or place == "its operands" or single):
                tried.append((size(theirs - result), name, place))
    coarse = _grid_of(theirs, truth)
    if coarse:
        # All its numbers are on the coarse grid: the precision is certain, only the places are open.
        tried = [t for t in tried if t[1] == coarse and t[2] != "its operands"]
    else:
        # The fractions of both are alike; a product of float16 gives float16.
        tried = [t for t in tried if t[1] != "float16" or t[2] != "its operands"]
    if not tried:
        return None
    left, name, place = min(tried, key=lambda t: (t[0], t[1] not in recorded))  # both have 10 bits
    if not left <= (1.0 if coarse else SHARE) * before:
        return None
    write = (
        'jax.default_matmul_precision("highest")'
        if name == "TF32"
        else f"the reference's precision, not {name}"
    )
    sentence = f"{here} rounds {place} to {name}, the reference does not: write {write}"
    return Cause(IDS[name], sentence, left)


def _variance_canceled(theirs: Array, form: Form, before: float) -> bool:
    """True if another variance explains a normalization, off by what E[x^2] - E[x]^2 loses in float32.

    The variance of each channel is found from the numbers themselves, by least squares.
    """
    knobs = form.knobs
    if "eps" not in knobs or knobs.get("fixed") is not None or knobs.get("groups") is not None:
        return False
    x, axes, weight, bias = knobs["x"], knobs["axes"], knobs["weight"], knobs["bias"]
    mean, square = x.mean(axes, keepdims=True), np.square(x).mean(axes, keepdims=True)
    scaled = (x - mean) * (1.0 if weight is None else weight)
    shift = 0.0 if bias is None else bias
    with np.errstate(all="ignore"):
        inverse = (scaled * (theirs - shift)).sum(axes, keepdims=True) / np.square(scaled).sum(
            axes, keepdims=True
        )
        lost = np.abs(1 / np.square(inverse) - knobs["eps"] - x.var(axes, keepdims=True))
        left = size(theirs - (scaled * inverse + shift))
    return bool(left <= SHARE * before and (lost <= _CANCELED * square).all())


def _grid_of(theirs: Array, truth: Array) -> str:
    """The precision that holds all of these numbers, but not those of the reference."""
    for name in ("bfloat16", "float16"):
        rounding = ROUNDINGS[name]
        if (
            theirs.size > 8
            and np.array_equal(rounding(theirs), theirs)
            and not np.array_equal(rounding(truth), truth)
        ):
            return name
    return ""


def size(array: Array) -> float:
    """The root mean square."""
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.mean(np.square(array))))
