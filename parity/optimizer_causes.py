"""Why two optimizers differ: equations of SGD, Adam, RMSprop and Adagrad, fitted to the steps of each.

`Update` is one parametrized update. `explain` finds the `Update` that reproduces the reference to noise, then
the fewest changes to it that reproduce the candidate to noise, and names them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parity.trace import Array


@dataclass(frozen=True)
class Update:
    """p_t = p_{t-1} - lr_t d_t, with d_t made from the gradient g_t, t from 1. The code is in `run`.

    Attributes:
        clip: "none", "norm" (of all gradients together) or "value": to at most `max_norm`.
        decay: "none"; "coupled" g += wd p; "decoupled" d += wd p; "unscaled" p -= wd p, without the rate.
        mask: "all" parameters decay, or "matrices", those of two axes and more.
        first: "none"; "sum" m = b1 m + g; "ema" m = b1 m + (1 - b1) g; "dampened" m = g in the first step,
            then m = b1 m + (1 - dampening) g.
        after: m is the average of g divided by its root (RMSprop), not of g (Adam).
        rate_inside: m also takes in the rate, m = b1 m + lr d: another step as soon as the rate changes.
        nesterov: "none"; "plain" b1 m + g in place of m; "scheduled", NAdam's b1 that grows with t.
        correct1, correct2: division of m by 1 - b1^t, of v by 1 - b2^t.
        second: "none"; "ema" v = b2 v + (1 - b2) g^2; "sum" v = v + g^2. v begins at `initial`.
        centered: v - (average of g)^2 in place of v.
        maximum: "none"; "raw" max of v, then corrected; "corrected" max of the corrected v; "uncorrected" max
            of v, never corrected.
        eps_place: "outside" sqrt(v) + eps; "inside" sqrt(v + eps); "uncorrected" (sqrt(v) + eps) with the
            correction of v taken afterwards.
        eps_root: sqrt(v + eps_root) + eps.
    """

    clip: str = "none"
    decay: str = "none"
    mask: str = "all"
    first: str = "none"
    after: bool = False
    rate_inside: bool = False
    nesterov: str = "none"
    correct1: bool = False
    correct2: bool = False
    second: str = "none"
    centered: bool = False
    maximum: str = "none"
    eps_place: str = "outside"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    initial: float = 0.0
    weight_decay: float = 1e-2
    max_norm: float = 1.0
    dampening: float = 0.5

    def numbers(self) -> list[str]:
        """The numbers that have an effect."""
        used = {
            "b1": self.first != "none",
            "b2": self.second == "ema",
            "eps": self.second != "none",
            "eps_root": self.eps_root > 0,
            "initial": self.initial > 0,
            "weight_decay": self.decay != "none",
            "max_norm": self.clip != "none",
            "dampening": self.first == "dampened",
        }
        return [name for name, use in used.items() if use]

    def neighbors(self) -> Iterator[Update]:
        """Updates that differ in one field of the equation and mean something else."""
        for name, values in OPTIONS.items():
            for value in values:
                if value != getattr(self, name) and (name not in NEEDS or NEEDS[name](self)):
                    change: dict[str, Any] = {name: value}
                    yield replace(self, **change)


OPTIONS: dict[str, tuple[Any, ...]] = {
    "eps_place": ("outside", "inside", "uncorrected"),
    "decay": ("none", "decoupled", "coupled", "unscaled"),
    "mask": ("all", "matrices"),
    "maximum": ("none", "raw", "corrected", "uncorrected"),
    "nesterov": ("none", "plain", "scheduled"),
    "first": ("none", "sum", "ema", "dampened"),
    "correct1": (False, True),
    "correct2": (False, True),
    "initial": (0.0, 0.1),
    "eps_root": (0.0, 1e-8),
    "clip": ("none", "norm", "value"),
    "centered": (False, True),
    "second": ("none", "ema", "sum"),
    "after": (False, True),
    "rate_inside": (False, True),
}

NEEDS: dict[str, Callable[[Update], bool]] = {
    "eps_place": lambda u: u.second != "none",
    "mask": lambda u: u.decay != "none",
    "maximum": lambda u: u.second == "ema",
    "nesterov": lambda u: u.first != "none",
    "correct1": lambda u: u.first == "ema",
    "correct2": lambda u: u.second == "ema",
    "initial": lambda u: u.second != "none",
    "eps_root": lambda u: u.second != "none" and u.eps_place != "inside",
    "centered": lambda u: u.second == "ema",
    "after": lambda u: u.first != "none" and u.second != "none",
    "rate_inside": lambda u: (
        u.first == "sum" and (u.after or u.second == "none") and u.nesterov != "scheduled"
    ),
}

ADAM = Update(first="ema", second="ema", correct1=True, correct2=True)
BASES = {
    "Adam": ADAM,
    "AdamW": replace(ADAM, decay="decoupled"),
    "SGD": Update(),
    "SGD with momentum": Update(first="sum"),
    "RMSprop": Update(second="ema", b2=0.9),
    "RMSprop with momentum": Update(second="ema", b2=0.9, first="sum", after=True),
    "Adagrad": Update(second="sum", eps=1e-10),
    "AMSGrad": replace(ADAM, maximum="raw"),
    "NAdam": replace(ADAM, nesterov="scheduled"),
    "Adam without bias correction": Update(first="ema", second="ema"),
}


@dataclass(frozen=True)
class Evidence:
    """A short run of one optimizer: values [P], gradients [T, P], path and tolerance [T + 1, P], axes [P]."""

    values: Array
    gradients: Array
    path: Array
    tolerance: Array
    ndims: Array


@dataclass
class State:
    """Averages of one run, each [P]."""

    m: Array
    v: Array
    v_max: Array
    average: Array
    product: float = 1.0


def root(u: Update, g: Array, state: State, t: int) -> Array | float:
    """The denominator of the step: the root of the second moment and eps."""
    if u.second == "none":
        return 1.0
    state.v = u.b2 * state.v + (1 - u.b2) * g * g if u.second == "ema" else state.v + g * g
    correction = 1 - u.b2**t if u.correct2 else 1.0
    v = state.v / correction
    if u.maximum != "none":
        state.v_max = np.maximum(state.v_max, v if u.maximum == "corrected" else state.v)
        v = state.v_max / correction if u.maximum == "raw" else state.v_max
    if u.centered:
        state.average = u.b2 * state.average + (1 - u.b2) * g
        v = v - state.average**2
    if u.eps_place == "inside":
        return np.sqrt(v + u.eps)
    eps = u.eps / math.sqrt(1 - u.b2**t) if u.eps_place == "uncorrected" and u.second == "ema" else u.eps
    return np.sqrt(v + u.eps_root) + eps


def momentum(u: Update, s: Array, state: State, t: int) -> Array:
    """The average of s, the gradient or the gradient divided by its root."""
    if u.first == "none":
        return s
    k = {"sum": 1.0, "ema": 1 - u.b1, "dampened": 1.0 if t == 1 else 1 - u.dampening}[u.first]
    state.m = u.b1 * state.m + k * s
    now, following = (1 - u.b1**t, 1 - u.b1 ** (t + 1)) if u.correct1 else (1.0, 1.0)
    if u.nesterov == "none":
        return state.m / now
    if u.nesterov == "plain":
        return k * s / now + u.b1 * state.m / following
    b_t, b_next = (u.b1 * (1 - 0.5 * 0.96 ** (0.004 * step)) for step in (t, t + 1))  # NAdam, Dozat 2016
    state.product = float(np.float32(state.product) * np.float32(b_t))  # PyTorch holds it in float32
    now, following = 1 - state.product, 1 - state.product * b_next
    return np.asarray((1 - b_t) * s / now + b_next * state.m / following)


def run(u: Update, data: Evidence, rates: Array | str) -> tuple[Array, Array]:
    """The path [T + 1, P] of an update and its rates [T].

    `rates` are given, or found from the path of `data`: "constant", from the first step that moves; "free",
    from each step. A rate is the least-squares solution of step = lr d, coordinates in units of their noise.
    """
    p = data.values
    state = State(np.zeros_like(p), np.full_like(p, u.initial), np.zeros_like(p), np.zeros_like(p))
    decays = u.weight_decay * (data.ndims > 1) if u.mask == "matrices" else u.weight_decay
    rate, path, used = 0.0, [p], []
    for t, g in enumerate(data.gradients, 1):
        if u.clip == "norm":
            g = g * min(1.0, u.max_norm / max(float(np.linalg.norm(g)), 1e-300))
        elif u.clip == "value":
            g = np.clip(g, -u.max_norm, u.max_norm)
        if u.decay == "coupled":
            g = g + decays * p
        fixed: Array | float = decays * p if u.decay == "unscaled" else 0.0
        source = g / root(u, g, state, t) if u.after else g
        if u.rate_inside:  # m = b1 m + lr s; p -= m, or with Nesterov b1 m + lr s
            carried = u.b1 * state.m
            d = source if u.nesterov == "none" else (1 + u.b1) * source
            fixed = fixed + (carried if u.nesterov == "none" else u.b1 * carried)
        else:
            d = momentum(u, source, state, t)
            if not u.after:
                d = d / root(u, g, state, t)
        if u.decay == "decoupled":
            d = d + decays * p
        if not isinstance(rates, str):
            rate = float(rates[t - 1])
        elif rates == "free" or rate == 0:
            x, y = d / data.tolerance[t], (p - fixed - data.path[t]) / data.tolerance[t]
            rate = float(x @ y / (x @ x)) if x.any() else rate
        if u.rate_inside:
            state.m = carried + rate * source
        p = p - fixed - rate * d
        path.append(p)
        used.append(rate)
    return np.stack(path), np.array(used)


RATES = ("b1", "b2")


@dataclass(frozen=True)
class Fit:
    """An update whose path is that of an optimizer, to noise."""

    update: Update
    rates: Array


def reproduce(update: Update, data: Evidence, rates: Array | str) -> Fit | None:
    """The fit if every coordinate at every step is within the tolerance."""
    with np.errstate(all="ignore"):
        path, used = run(update, data, rates)
    same = (np.abs(path - data.path) <= data.tolerance) | (np.isnan(path) & np.isnan(data.path))
    return Fit(update, used) if same.all() else None


def fit_numbers(update: Update, data: Evidence, rates: Array | str) -> tuple[float, Update]:
    """The numbers of an update that come closest, by least squares, and the distance that is left."""
    from scipy.optimize import least_squares

    names = update.numbers()
    movement = np.abs(data.path - data.values).max(axis=0) + 1e3 * data.tolerance.max(axis=0) + 1e-30

    def at(x: Array) -> Update:  # a decay rate b as log(1 - b), another number as its logarithm
        values: dict[str, Any] = {}
        for name, y in zip(names, x, strict=True):
            values[name] = 1 - math.exp(min(max(y, -11), -1e-3)) if name in RATES else math.exp(min(y, 60))
        return replace(update, **values)

    def residuals(x: Array) -> Array:
        with np.errstate(all="ignore"):
            path, _ = run(at(x), data, rates)
            error = np.nan_to_num((path - data.path) / movement, nan=1e3)
        return np.asarray(np.clip(error, -1e3, 1e3)).ravel()

    if not names:
        return float(np.abs(residuals(np.zeros(0))).max()), update
    start = [
        math.log(max(1 - getattr(update, n) if n in RATES else getattr(update, n), 1e-12)) for n in names
    ]
    best = least_squares(
        residuals, start, method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=12 * (len(names) + 1)
    )
    fitted = at(best.x)
    digits: dict[str, Any] = {n: float(f"{getattr(fitted, n):.6g}") for n in names}
    rounded = replace(fitted, **digits)
    if reproduce(rounded, data, rates):
        fitted = rounded
    return float(np.sqrt(np.mean(best.fun**2))), fitted


def changed(old: Update, new: Update) -> list[str]:
    """The fields that differ and have an effect."""
    names = [n for n in OPTIONS if n not in NEEDS or NEEDS[n](new) or NEEDS[n](old)]
    numbers = [n for n in new.numbers() if n not in OPTIONS and n in old.numbers()]  # both sides have them
    return [n for n in [*names, *numbers] if getattr(old, n) != getattr(new, n)]


def simplify(fit: Fit, wanted: Update, data: Evidence) -> Fit:
    """The same fit, with fields of `wanted` where they fit as well."""
    for name in [*OPTIONS, *fit.update.numbers()]:
        if getattr(fit.update, name) != getattr(wanted, name):
            change: dict[str, Any] = {name: getattr(wanted, name)}
            other = replace(fit.update, **change)
            fit = reproduce(other, data, fit.rates) or fit
    return fit


def relation(reference: Array, candidate: Array) -> tuple[str, float]:
    """How the candidate's rates follow from the reference's: "same", "later", "earlier", "scaled" or "other".

    The second value is the factor of "scaled". A shifted exponential is scaled too: it counts as shifted.
    """

    def close(a: Array, b: Array) -> bool:
        return np.allclose(a, b, rtol=1e-7, atol=1e-9 * float(np.abs(reference).max()))

    if close(candidate, reference):
        return "same", 1.0
    if len(reference) > 2 and close(candidate[1:], reference[:-1]):
        return "later", 1.0
    if len(reference) > 2 and close(candidate[:-1], reference[1:]):
        return "earlier", 1.0
    ratio = float(candidate @ reference / max(float(reference @ reference), 1e-300))
    return ("scaled", ratio) if close(candidate, ratio * reference) else ("other", 1.0)


def search(starts: Sequence[Update], data: Evidence, depth: int, wanted: Fit | None = None) -> Fit | None:
    """The fit that is the fewest changes away from `starts`: each update first as is, then refitted.

    Each further round takes the neighbors of the two updates that came closest. `wanted` is the fit of the
    reference, if it is known: its rates are tried first, and rates unrelated to them last.
    """
    modes: list[Array | str] = ["constant", "free"] if wanted is None else [wanted.rates, "constant", "free"]

    def fits(update: Update, mode: Array | str) -> Fit | None:
        fit = reproduce(update, data, mode)
        if fit and wanted and relation(wanted.rates, fit.rates)[0] == "other":
            return None
        return simplify(fit, wanted.update, data) if fit and wanted else fit

    frontier = list(starts)
    for changes in range(depth + 1):
        exact = modes if wanted or len(starts) == 1 else modes[:1]
        for mode, update in itertools.product(exact, frontier):
            if fit := fits(update, mode):
                return fit
        fitted: list[tuple[float, Update]] = []
        for mode in modes if changes == 0 else modes[:1]:
            results = [(update, *fit_numbers(update, data, mode)) for update in frontier]
            found = [fit for _, _, update in results if (fit := fits(update, mode))]
            if found:
                return min(found, key=lambda fit: len(changed(starts[0], fit.update)))
            fitted += [(distance, update) for update, distance, _ in results]
        closest = [update for _, update in sorted(fitted, key=lambda pair: pair[0])[:2]]
        frontier = list(dict.fromkeys(near for update in closest for near in update.neighbors()))
    return next((fit for update in starts if (fit := reproduce(update, data, "free"))), None)


def explain(
    short: tuple[Evidence, Evidence],
    long: tuple[Evidence, Evidence],
    hints: tuple[list[Update], list[Update]],
) -> tuple[Fit, Fit, tuple[Array, Array]] | None:
    """The fits of the reference and of the candidate, and the rates that differ; None if there is no fit.

    Args:
        short: a run of each in which every variant shows.
        long: a run of each in which they depart; it shows rates that differ later than the short one.
        hints: guesses of each; empty for none.
    """
    reference = search(hints[0] or list(BASES.values()), short[0], 2 if hints[0] else 1)
    if reference is None:
        return None
    candidate = search([reference.update, *hints[1]], short[1], 2, reference)
    if candidate is None:
        return None
    rates = reference.rates, candidate.rates
    if not changed(reference.update, candidate.update) and relation(*rates)[0] == "same":
        fits = [reproduce(reference.update, data, "free") for data in long]
        if fits[0] is None or fits[1] is None:
            return None
        rates = fits[0].rates, fits[1].rates
    return reference, candidate, rates
