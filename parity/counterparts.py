"""Find the candidate's possible counterparts of a value that departs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from parity.axes import best_axes, departing_axes, squeeze
from parity.trace import Array, Trace, Value, stage_parameters

_UNLIKE = 0.4  # values less like each other than this are tried only if they are of one kind


def by_parameters(
    value: Value,
    reference: Trace,
    trace: Trace,
    matched: tuple[set[str], set[str]],
    free: Sequence[Value],
    owners: Mapping[str, str],
) -> tuple[list[Value], set[str]]:
    """Return the free values that may be the counterpart, and the name of the likeliest, by parameters.

    A value is left out if it reads more parameters than `value`, some of them those of other unpaired values.
    The likeliest is the first that reads exactly the same parameters, else the first that reads only some of
    them. `matched` has the names of the paired values of both.
    """
    wanted = stage_parameters(reference, value.name, matched[0])
    shape = sorted(squeeze(value.value).shape)
    done = {p for value in reference.values if value.name in matched[0] for p in value.parameters}
    possible: list[Value] = []
    more: list[Value] = []
    same: set[str] = set()
    some: set[str] = set()
    for other in free:
        if sorted(squeeze(other.value).shape) != shape:
            continue
        read = stage_parameters(trace, other.name, matched[1])
        known_as = {owners[name] for name in read if name in owners}
        foreign = known_as - set(wanted) - done
        if len(read) > len(wanted) and foreign:
            of_one = len({name.rpartition(".")[0] for name in foreign}) == 1
            more += [other] if of_one and wanted and set(wanted) <= known_as else []
            continue
        possible.append(other)
        known = len(set(wanted) & known_as)
        if wanted and known == len(read) == len(wanted) and not same:
            same = {other.name}
        elif read and known == len(read) and not some:
            some = {other.name}
    if more and not same and not some:  # one other operation was applied before this one
        return [*possible, more[0]], {more[0].name}
    return possible, same or some


def parameter_owners(reference: Trace, candidate: Trace) -> dict[str, str]:
    """{candidate's parameter: the reference's parameter that alone has its numbers, in any order}."""

    def numbers(array: Array) -> bytes:
        return np.sort(array, axis=None).tobytes()

    names: dict[bytes, list[str]] = {}
    for name, array in reference.parameters.items():
        names.setdefault(numbers(array), []).append(name)
    found = {name: names.get(numbers(array), []) for name, array in candidate.parameters.items()}
    return {name: owners[0] for name, owners in found.items() if len(owners) == 1}


def find_choices(
    value: Value,
    free: Sequence[Value],
    output: str | None,
    orders: Sequence[Mapping[int, tuple[int, ...]]],
    readers: set[str],
    sources: set[str],
) -> list[tuple[Value, tuple[int, ...]]]:
    """The values that may be the counterpart of one that departs: of its kind, or like it.

    The counterpart of an output is known: `output`. `orders` are the orders of axes by their number: the
    usual one, then that of what `value` is made from; of two the one that makes it likelier. `readers` read
    the same parameters. Where nothing is of its kind or like it and it is made from several values, it is one
    that reads one of `sources`, their counterparts.
    """
    fits = []
    for other in free:
        if best_axes(value.value, other.value) is not None:
            options = [departing_axes(value.value, other.value, order) for order in orders]
            likely = [(_unlikeness(value.value, other.value, axes), axes) for axes in options]
            unlikeness, axes = min(likely, key=lambda one: one[0])
            fits.append((unlikeness, other, axes))
    if any(fit[1].name == output for fit in fits):
        return [fit[1:] for fit in fits if fit[1].name == output]
    near = sorted(fits, key=lambda fit: fit[0])
    near = [fit for fit in near if fit[0] < _UNLIKE]
    kind = [fit for fit in fits if family(fit[1].operation) == family(value.operation)][:2]
    names = {fit[1].name for fit in kind}
    after = [fit for fit in fits if names & set(fit[1].inputs)][:2]  # the bias is added to a product
    reads = [fit for fit in fits if fit[1].name in readers]
    ordered = (*reads, *after[:1], *kind[:1], *near[:3], *after[1:], *kind[1:])
    chosen = {fit[1].name: fit[1:] for fit in ordered}
    if chosen or len(sources) < 2:
        return list(chosen.values())
    return [fit[1:] for fit in fits if sources & set(fit[1].inputs)][:2]


_FAMILIES = {
    "convolution": ("conv",),
    "product": ("linear", "dense", "matmul", "addmm", "mm", "bmm", "dot_general", "einsum", "__matmul__"),
    "normalization": ("norm",),
    "pooling": ("pool", "reduce_window"),
    "mean": ("mean", "reduce_sum"),
    "activation": ("relu", "gelu", "silu", "swish", "elu", "sigmoid", "logistic", "tanh", "softplus", "max"),
    "softmax": ("softmax",),
    "order": ("flatten", "reshape", "view", "transpose", "permute", "ravel"),
    "sum": ("add", "__add__", "__iadd__", "__radd__"),
}


def family(operation: str) -> str:
    """The kind of an operation, the same in all frameworks as far as names tell."""
    name = operation.lower()
    for family, words in _FAMILIES.items():
        if any(word == name or (len(word) > 3 and word in name) for word in words):
            return family
    return name


def _unlikeness(a: Array, b: Array, axes: tuple[int, ...]) -> float:
    """Half of 1 - cosine plus half of the relative distance, limited to 1."""
    x, y = squeeze(a).reshape(-1), squeeze(b).transpose(axes).reshape(-1)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return 2.0
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    cosine = float(x @ y) / norm if norm else 0.0
    distance = float(np.linalg.norm(x - y)) / (float(np.linalg.norm(x)) or 1.0)
    return 0.5 * (1 - cosine) + 0.5 * min(distance, 1.0)
