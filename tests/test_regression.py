"""`tests.regression` finds each kind of difference and names it; each mutant of the parity suite applies."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parity.mutants import MUTANTS, ROOT, Mutant
from tests.regression import Outcome, compare

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
BEFORE = Outcome({"fc.weight": WEIGHT, "fc.bias": np.zeros(2, np.float32)}, [b"a", b"b"])


def test_equal_outcomes() -> None:
    tensors = {name: array.copy() for name, array in BEFORE.tensors.items()}
    assert compare(BEFORE, Outcome(tensors, [b"a", b"b"])) == []


@pytest.mark.parametrize(
    ("tensors", "metrics", "words"),
    [
        ({"fc.weight": np.nextafter(WEIGHT, 9)}, [b"a", b"b"], "1 of 2 tensors differ, the first: fc.weight"),
        ({"fc.bias": np.array([0.0, -0.0], np.float32)}, [b"a", b"b"], "fc.bias: by 0.0e+00"),
        ({"fc.weight": WEIGHT.astype(np.float64)}, [b"a", b"b"], "float64[2, 3], not float32[2, 3]"),
        ({"fc.weight": WEIGHT.T.copy()}, [b"a", b"b"], "float32[3, 2], not float32[2, 3]"),
        ({"mu": WEIGHT}, [b"a", b"b"], "mu is new"),
        ({}, [b"a", b"c"], "metrics.jsonl differs from line 2 on: c, not b"),
        ({}, [b"a"], "metrics.jsonl has 1 lines, not 2"),
    ],
)
def test_a_difference_is_named(tensors: dict[str, np.ndarray], metrics: list[bytes], words: str) -> None:
    (line,) = compare(BEFORE, Outcome({**BEFORE.tensors, **tensors}, metrics))
    assert words in line


def test_a_missing_tensor_is_named() -> None:
    assert compare(BEFORE, Outcome({"fc.weight": WEIGHT}, BEFORE.metrics)) == ["fc.bias is gone"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place(mutant: Mutant) -> None:
    """The text that `tests.parity.mutants` replaces occurs once in its file."""
    assert (ROOT / mutant.file).read_text().count(mutant.right) == 1
    assert mutant.wrong != mutant.right
