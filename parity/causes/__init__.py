"""Why a stage departs: variants of the reference's operation, tried on the reference's own input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from parity.trace import Array, Value


@dataclass(frozen=True)
class Departure:
    """All that is known about a stage that departs. Arrays are float64.

    Attributes:
        what: "output", "input gradient", "parameter gradient" or "statistics".
        reference: the reference's stage, with its attributes.
        candidate: the candidate's stage; its arrays as the candidate has them.
        segment: the candidate's operations from the matched values before it up to it, in order.
        inputs: what the reference's operation reads, by name, in the reference's layout.
        parameters: the reference's parameters that it reads, by name.
        state: the reference's state (running statistics) of the module before the run, by name; may be empty.
        output: the reference's output.
        candidate_output: the candidate's output, made from the reference's inputs, in the axis order of the
            reference.
        gradient: the gradient of the stage's output, the reference's, used for both models.
        result, candidate_result: for "input gradient", "parameter gradient" and "statistics": the tensor that
            differs, of both, in the axis order of the reference; for "output" the outputs again.
        result_name: its name in the reference ("fc.weight", "bn1.running_var").
        noise: relative error that two right evaluations can have; a variant fits if it is about as close.
        train: the reference normalizes with statistics of the batch.
        readers: the operations that read the reference's output; None if that is unknown.
    """

    what: str
    reference: Value
    candidate: Value
    segment: tuple[Value, ...]
    inputs: Mapping[str, Array]
    parameters: Mapping[str, Array]
    state: Mapping[str, Array]
    output: Array
    candidate_output: Array
    gradient: Array | None
    result: Array
    candidate_result: Array
    result_name: str
    noise: float
    train: bool
    readers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Cause:
    """The variant that makes both agree.

    Attributes:
        id: a short name: "same-padding", "epsilon", "gelu-tanh".
        sentence: what the candidate does, what the reference does, and what to write where.
        error: how far the variant is from the candidate, relative.
        place: the value at which the models differ, where that is one that the stage reads.
    """

    id: str
    sentence: str
    error: float
    place: str = ""
