"""Every optimizer in NumPy, JAX and PyTorch: 1,000 steps of one sequence of gradients, under a schedule."""

from __future__ import annotations

import pytest

from tests.parity import cases
from tests.parity.case import Case
from tests.parity.compare import check


@pytest.mark.parametrize("case", cases.OPTIMIZERS, ids=lambda case: case.name)
def test_parameters_and_moments(case: Case) -> None:
    check(case)
