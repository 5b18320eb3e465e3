"""Every optimizer in NumPy, JAX and PyTorch: 1,000 steps of one sequence of gradients, under a schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from experiment.run.schedules import make_schedule
from tests.helpers.comparing import assert_close
from tests.parity import cases
from tests.parity.case import Case
from tests.parity.compare import check
from tests.tolerances import FLOAT64_OPTIMIZER

MOMENTS = {
    **dict.fromkeys(("adam", "adabound", "adaboundw", "adamw"), ("mu", "nu")),
    **dict.fromkeys(("amsbound", "amsgrad"), ("mu", "nu", "nu_max")),
    "sgdbound": ("mu",),
    "sgd": ("trace",),
}


@pytest.mark.parametrize("case", cases.OPTIMIZERS, ids=lambda case: case.name)
def test_parameters_and_moments(case: Case) -> None:
    for found in check(case).values():
        fields = {name.partition(".")[0] for name in found}
        assert fields == {"value", *MOMENTS[case.options["optimizer"]]}


SCHEDULES: list[Any] = [
    ({"name": "cosine"}, lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 200)),
    (
        {"name": "multistep", "milestones": (60, 61, 150), "factor": 0.3},
        lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [60, 61, 150], 0.3),
    ),
    (
        {"name": "constant", "warmup_steps": 40},
        lambda optimizer: lr_scheduler.LinearLR(optimizer, 1 / 41, total_iters=40),
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), SCHEDULES, ids=[ours["name"] for ours, _ in SCHEDULES])
def test_schedules_are_pytorchs(ours: dict[str, Any], theirs: Any) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    scheduler, rates = theirs(optimizer), []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    schedule = make_schedule(lr=0.7, length=200, **ours)
    assert_close("rates", [schedule(step) for step in range(200)], np.array(rates), FLOAT64_OPTIMIZER)
