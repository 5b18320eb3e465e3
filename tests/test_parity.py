"""NumPy, JAX and PyTorch agree, layer by layer and network by network: each pair, every tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity import cases
from tests.parity.case import Case, make_inputs
from tests.parity.compare import check
from tests.parity.engines import ENGINES, engines_for


def table(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@table(cases.LAYERS)
def test_layers(case: Case, precision: str) -> None:
    """float32 against float64 too, of the same numbers."""
    check(replace(case, precision=precision))


@table(cases.SINGLE_VALUES)
@pytest.mark.parametrize("engine", engines_for(cases.SINGLE_VALUES[0]))
def test_batch_norm_over_one_value_is_an_error_in_training_only(case: Case, engine: str) -> None:
    inputs = make_inputs(case)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ENGINES[engine](case, inputs)
    check(replace(case, train=False))


@table(cases.STAGES)
def test_blocks_and_stages(case: Case) -> None:
    check(case)


@table(cases.NETWORKS)
def test_networks(case: Case) -> None:
    check(case)


sizes = st.integers(1, 4)
