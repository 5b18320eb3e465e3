"""Causes of departures: right hypothesis for each fault, none for an unrelated difference.

PyTorch is the truth: every form in NumPy equals its function, and faults are made with it where it can.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from parity.causes import Departure
from parity.causes.search import find_cause, known_form
from parity.trace import Value

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape)


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def stage(
    operation: str, inputs: Any, parameters: Any = None, output: Any = None, theirs: Any = None, **more: Any
) -> Departure:
    """A departure of an output."""
    inputs = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    output, theirs = (np.asarray(a, np.float64) for a in (output, theirs))
    values = {
        name: Value(name, operation, array, where="port.py:41")
        for name, array in (("a", output), ("b", theirs))
    }
    attributes = more.pop("attributes", {})
    reference = Value("a", operation, output, attributes=attributes)
    fields: dict[str, Any] = {
        "what": "output",
        "reference": reference,
        "candidate": values["b"],
        "segment": (values["b"],),
        "inputs": {f"x{i}": np.asarray(a) for i, a in enumerate(inputs)},
        "parameters": parameters or {},
        "state": {},
        "output": output,
        "candidate_output": theirs,
        "gradient": None,
        "result": output,
        "candidate_result": theirs,
        "result_name": "a",
        "noise": 1e-15,
        "train": False,
    }
    return Departure(**{**fields, **more})


X = normal(2, 6, 8, 8)
W, B = normal(6, 6, 3, 3), normal(6)


def conv(x: Any = X, w: Any = W, b: Any = B, **options: Any) -> np.ndarray:
    return F.conv2d(tensor(x), tensor(w), None if b is None else tensor(b), **options).numpy()


def padded(x: np.ndarray, before: int, behind: int, mode: str = "constant") -> np.ndarray:
    return np.pad(x, ((0, 0), (0, 0), (before, behind), (before, behind)), mode=mode)


CONV = {"conv.weight": W, "conv.bias": B}
STRIDED = {"stride": (2, 2), "padding": (1, 1)}
PLAIN = {"stride": 1, "padding": 1}
CONVOLUTIONS = {
    "same-padding": (STRIDED, conv(padded(X, 0, 1), stride=2)),
    "padding": (PLAIN, conv(padded(X, 2, 0))),
    "padding-mode": (PLAIN, conv(padded(X, 1, 1, "reflect"))),
    "dilation": (PLAIN, conv(dilation=2, padding=2)),
    "kernel-flipped": (PLAIN, conv(w=W[..., ::-1, ::-1], padding=1)),
    "kernel-transposed": (PLAIN, conv(w=W.swapaxes(2, 3), padding=1)),
    "kernel-transposed ": (PLAIN, conv(w=W.swapaxes(0, 1), padding=1)),
    "missing-bias": (PLAIN, conv(b=None, padding=1)),
    "bias-twice": (PLAIN, conv(b=2 * B, padding=1)),
    "channels-reversed": (PLAIN, conv(X[:, ::-1], padding=1)),
    "norm-activation-order": (PLAIN, conv(np.maximum(X, 0), padding=1)),
    "activation": (PLAIN, np.maximum(conv(padding=1), 0)),
    "residual-added": (PLAIN, conv(padding=1) + X),
    "constant-factor": (PLAIN, 0.125 * conv(padding=1)),
}


@pytest.mark.parametrize("id_", CONVOLUTIONS)
def test_convolution(id_: str) -> None:
    options, theirs = CONVOLUTIONS[id_]
    departure = stage("conv2d", X, CONV, conv(**options), theirs, attributes=options)
    cause = find_cause(departure)
    assert cause is not None
    assert cause.id == id_.strip(), cause.sentence


def test_sentence_gives_the_line_and_what_to_write() -> None:
    cause = find_cause(
        stage("conv2d", X, CONV, conv(**STRIDED), conv(padded(X, 0, 1), stride=2), attributes=STRIDED)
    )
    assert cause is not None
    expected = (
        "port.py:41 pads 0 before and 1 behind (SAME), the reference 1 and 1: write padding=((1, 1), (1, 1))"
    )
    assert cause.sentence == expected


def test_two_faults_at_once() -> None:
    theirs = conv(padded(X, 0, 1), b=None, stride=2)
    cause = find_cause(stage("conv2d", X, CONV, conv(**STRIDED), theirs, attributes=STRIDED))
    assert cause is not None
    assert "SAME" in cause.sentence
    assert "bias" in cause.sentence
