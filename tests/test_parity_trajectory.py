"""A hundred steps of a thin ResNet in each engine's own loop and in PyTorch's."""

from __future__ import annotations

import pytest

from tests.parity import cases
from tests.parity.case import Case
from tests.parity.compare import check


@pytest.mark.parametrize("case", cases.TRAJECTORIES, ids=lambda case: case.name)
def test_losses_then_parameters_then_statistics(case: Case) -> None:
    check(case)
