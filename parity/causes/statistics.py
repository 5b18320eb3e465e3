"""Running statistics after a step: which share of the new, which variance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parity.causes import Departure
from parity.causes.stage import attribute, candidate_word, first_input, number
from parity.trace import Array

Found = tuple[str, Array, str]


def updates(departure: Departure) -> Iterator[Found]:
    """Other updates of the running mean or variance: id, result, and the rest of the sentence.

    The reference's own update is found from its input: new = (1 - rate) old + rate batch.
    """
    old, x = departure.state.get(departure.result_name), first_input(departure)
    if old is None or old.shape != departure.result.shape:
        return
    name = departure.result_name.rpartition(".")[2]
    sentence = (
        f"does not update {departure.result_name}: keep the state that the model returns, and train mode"
    )
    yield "statistics-not-updated", old, sentence
    momentum = attribute(departure, "momentum")
    rates = [0.1, 0.01] if momentum is None else [float(momentum), 1 - float(momentum)]
    for rate, biased, unbiased, mean in _of_batch(x, old.size):
        new = mean if "mean" in name else None
        for share in rates:
            for batch, is_biased in [(new, True)] if new is not None else [(unbiased, False), (biased, True)]:
                if np.allclose((1 - share) * old + share * batch, departure.result, rtol=1e-7, atol=1e-9):
                    other = None if new is not None else unbiased if is_biased else biased
                    yield from _others(departure, old, batch, other, share, is_biased)
                    if new is None:
                        yield from _other_moments(old, biased, mean, share, rate)
                    return


def _of_batch(x: Array | None, channels: int) -> Iterator[tuple[int, Array, Array, Array]]:
    """(number of elements, biased variance, unbiased variance, mean) along each axis of that length."""
    for axis in (1, -1) if x is not None else ():
        assert x is not None
        if x.shape[axis] == channels:
            rows = np.moveaxis(x, axis, 0).reshape(channels, -1)
            count = rows.shape[1]
            var = rows.var(1)
            yield count, var, var * count / max(count - 1, 1), rows.mean(1)


def _others(
    departure: Departure, old: Array, batch: Array, other: Array | None, rate: float, biased: bool
) -> Iterator[Found]:
    name = departure.result_name
    momentum = candidate_word(departure, "momentum")
    own = f"the reference takes {number(rate)} of the new"
    kinds: list[tuple[Array, str, str]] = [(batch, "", "")]
    if other is not None:
        words = ("unbiased (n - 1)", "biased (n)") if biased else ("biased (n)", "unbiased (n - 1)")
        kinds.append(
            (other, f"stores the {words[0]} variance in {name}, the reference the {words[1]} one", words[1])
        )
        yield (
            "biased-running-variance",
            (1 - rate) * old + rate * other,
            f"{kinds[1][1]}: write the {words[1]} variance",
        )
    target = departure.candidate_result
    for new, words_of, _ in kinds:
        more = f" It also {words_of}." if words_of else ""
        swapped = (1 - rate) * new + rate * old
        sentence = (
            f"takes {number(1 - rate)} of the new statistics, {own}: write {momentum}={number(1 - rate)}"
        )
        sentence += f" where it is the share of the old ones, {number(rate)} where of the new" + more
        yield "momentum-convention", swapped, sentence
        twice = (1 - rate) ** 2 * old + (1 - (1 - rate) ** 2) * new
        yield "statistics-updated-twice", twice, f"updates {name} twice in a step, the reference once" + more
        step = new - old
        share = float(np.vdot(step, target - old) / (np.vdot(step, step) or 1.0))
        sentence = (
            f"takes {number(share)} of the new statistics, {own}: change the momentum of the candidate" + more
        )
        yield "momentum", old + share * step, sentence
        yield (
            "statistics-added",
            old + rate * new,
            f"adds to {name} without shrinking the old statistics" + more,
        )


def _other_moments(old: Array, var: Array, mean: Array, rate: float, count: int) -> Iterator[Found]:
    for new, words in ((var + mean**2, "the mean of squares"), (np.sqrt(var), "the standard deviation")):
        yield "wrong-moment", (1 - rate) * old + rate * new, f"stores {words}, the reference the variance"
