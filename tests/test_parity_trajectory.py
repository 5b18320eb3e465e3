"""A hundred steps of a thin ResNet in each engine's own loop and in PyTorch's."""

from __future__ import annotations

import pytest

from experiment.metrics import Metrics
from tests.helpers.comparing import assert_close
from tests.parity import cases
from tests.parity.case import CLASSES, Case, Results, make_inputs
from tests.parity.compare import check
from tests.tolerances import FLOAT64_LAYER, FLOAT64_TRAJECTORY


@pytest.mark.parametrize("case", cases.TRAJECTORIES, ids=lambda case: case.name)
def test_losses_then_parameters_then_statistics_and_metrics(case: Case) -> None:
    inputs = make_inputs(case)
    results = check(case, inputs)
    losses = results["torch"]["loss"]
    assert losses[-8:].mean() < 0.9 * losses[:8].mean()  # it learns

    def metrics(found: Results) -> Metrics:
        total = Metrics(CLASSES)
        for step, logits in enumerate(found["logits"]):
            total.update(logits, inputs["labels"][step % len(inputs["labels"])])
        return total

    expected = metrics(results["torch"])
    for engine in ("numpy", "jax"):
        found = metrics(results[engine])
        assert_close("loss", found.loss_sum, expected.loss_sum, FLOAT64_TRAJECTORY[case.options["optimizer"]])
        assert found.to_json() == {**expected.to_json(), "loss_sum": found.loss_sum}
        assert_close("mean", results[engine]["loss"].mean(), found.compute()["loss"], FLOAT64_LAYER)
