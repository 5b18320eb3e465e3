"""The row of programs that a CPU trains with computes what one program does."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.comparing import assert_all_close, assert_close, quick_jit
from tests.test_loop import FIELDS, THIN, flat, make_batches, make_engine, train
from tests.tolerances import FLOAT64_NETWORK

if jax.default_backend() != "cpu":
    pytest.skip("other back ends have one program", allow_module_level=True)


def in_one_program(model: str = "resnet18", **options: Any) -> Any:
    """An engine as other back ends have it."""
    engine: Any = make_engine(model, **options)
    assert engine._train_step == engine._step_blockwise
    engine._train_step = quick_jit(engine._step, donate_argnums=0)
    engine._eval_step = quick_jit(engine._logits)
    return engine


@pytest.mark.parametrize(
    ("model", "options"),
    [
        *(("resnet18", {"optimizer": name}) for name in FIELDS),
        ("resnet50", {"model_options": {**THIN["resnet50"], "batch_norm": False}}),
        ("resnet20", {"optimizer": "sgdbound"}),
    ],
    ids=[*FIELDS, "no-batch-norm", "cifar"],
)
def test_a_row_of_programs_makes_the_steps_of_one(model, options):
    batches = make_batches(4)
    engines = make_engine(model, **options), in_one_program(model, **options)
    (state, found), (one, wanted) = (train(engine, engine.init(), batches) for engine in engines)
    for step, row in enumerate(wanted):
        assert found[step].keys() == row.keys()
        for name, value in row.items():
            assert_close(f"{name} of step {step}", found[step][name], value, FLOAT64_NETWORK)
    found_tree, wanted_tree = (flat(e.to_tree(s)) for e, s in zip(engines, (state, one), strict=True))
    assert_all_close("state", found_tree, wanted_tree, FLOAT64_NETWORK)
    logits, expected = (
        next(iter(e.evaluate(s, batches))) for e, s in zip(engines, (state, one), strict=True)
    )
    assert_close("logits in evaluation", logits, expected, FLOAT64_NETWORK)


def test_float32_stays_float32():
    engine = make_engine(precision="float32")
    state, (metrics,) = train(engine, engine.init(), make_batches(1))
    floats = [a for a in (*jax.tree.leaves(state), *metrics.values()) if np.issubdtype(a.dtype, np.floating)]
    assert {a.dtype for a in floats} == {np.dtype(np.float32)}


def test_blocks_of_a_kind_share_a_program():
    engine: Any = make_engine(model_options={"width": 4, "stage_sizes": (3, 1)})
    train(engine, engine.init(), make_batches(2))
    assert len(engine._blockwise._parts) == 6  # stem, three blocks that are alike, another, head
    assert engine._blockwise._backward._cache_size() == 4


def test_what_went_in_is_gone_but_the_counts():
    engine = make_engine()
    before = engine.init()
    batches = make_batches(1)
    train(engine, before, batches)
    moments = [a for a in jax.tree.leaves(before["optimizer"]) if a.ndim]
    assert all(a.is_deleted() for a in (*before["params"].values(), *moments))
    assert not before["step"].is_deleted()


def test_the_first_nonfinite_step_is_told():
    engine = make_engine()
    batches = make_batches(3)
    batches[1]["image"][0, 0, 0, 0] = np.nan
    state, metrics = train(engine, engine.init(), batches)
    assert np.isfinite(metrics[0]["loss"])
    assert not np.isfinite(metrics[1]["grad_norm"])
    assert engine.first_nonfinite_step(state) == 2


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"remat": True}, {"freeze_backbone": True}])
def test_what_needs_one_program_has_it(options):
    engine: Any = make_engine(**options)
    assert engine._train_step != engine._step_blockwise
