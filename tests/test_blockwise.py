"""The blockwise strategy of a CPU computes what a whole step does."""

from __future__ import annotations

import runpy
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jax_resnet.step import eval_step
from jax_resnet.strategies import blockwise
from jax_resnet.strategies.accumulate import Accumulated
from jax_resnet.strategies.blockwise import Blockwise, compiler_options
from jax_resnet.strategies.whole import Whole
from tests.helpers.comparing import assert_all_close, assert_close, quick_jit
from tests.helpers.jax_engine import FIELDS, THIN, assert_same_bits, flat, make_batches, make_engine, train
from tests.tolerances import FLOAT64_NETWORK

if jax.default_backend() != "cpu":
    pytest.skip("other back ends compile a step as one", allow_module_level=True)

LEVEL = {"xla_backend_optimization_level": 1}
LIBRARIES = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}


def whole_engine(model: str = "resnet18", **options: Any) -> Any:
    """An engine as other back ends have it."""
    engine: Any = make_engine(model, **options)
    assert isinstance(engine._strategy, Blockwise)
    engine._strategy = engine.whole()
    engine._strategy.compiled = quick_jit(engine._step, donate_argnums=0)
    engine._eval_step = quick_jit(partial(eval_step, engine.network))
    return engine


@pytest.mark.parametrize(
    ("model", "options"),
    [
        *(
            pytest.param("resnet18", {"optimizer": name}, marks=() if name == "adam" else pytest.mark.slow)
            for name in FIELDS
        ),
        ("resnet50", {"optimizer": "sgd", "model_options": {**THIN["resnet50"], "batch_norm": False}}),
        ("resnet8", {"optimizer": "amsbound"}),
    ],
    ids=[*FIELDS, "no-batch-norm", "cifar"],
)
def test_blockwise_steps_equal_whole_steps(model, options):
    """The three of the default run have other moments and other blocks each."""
    batches = make_batches(4)
    engines = make_engine(model, **options), whole_engine(model, **options)
    (state, actual_metrics), (whole_state, expected_metrics) = (
        train(engine, engine.init(), batches) for engine in engines
    )
    states = state, whole_state
    for step, metrics in enumerate(expected_metrics):
        assert actual_metrics[step].keys() == metrics.keys()
        for name, value in metrics.items():
            assert_close(f"{name} of step {step}", actual_metrics[step][name], value, FLOAT64_NETWORK)
    tree, expected_tree = (flat(e.to_tree(s)) for e, s in zip(engines, states, strict=True))
    assert_all_close("state", tree, expected_tree, FLOAT64_NETWORK)
    logits, expected = (next(iter(e.evaluate(s, batches))) for e, s in zip(engines, states, strict=True))
    assert_close("logits in evaluation", logits, expected, FLOAT64_NETWORK)


def test_steps_at_the_level_of_users_equal_those_at_the_level_of_the_tests(monkeypatch):
    """The tests set a level in XLA_FLAGS; without it these functions have their own."""
    options = {"width": 4, "stage_sizes": (1,)}
    monkeypatch.setenv("XLA_FLAGS", "")
    module = runpy.run_path(blockwise.__file__)
    assert module["jit_for_cpu"].keywords == {"compiler_options": {**LEVEL, **LIBRARIES}}
    engine: Any = make_engine(model_options=options)
    with engine._precision():
        blocks = module["Blocks"](engine._build(rngs=nnx.Rngs(0)), engine.network)
    engine._strategy = module["Blockwise"](blocks, engine.optimizer, engine._placement)
    engines, batches = (engine, make_engine(model_options=options)), make_batches(2)
    metrics, expected = (train(each, each.init(), batches)[1] for each in engines)
    for found, wanted in zip(metrics, expected, strict=True):
        assert_all_close("metrics", found, wanted, FLOAT64_NETWORK)


@pytest.mark.parametrize("dropped", [False, True])
def test_remat_saves_the_inputs_of_the_blocks_alone_and_changes_no_bit(monkeypatch, dropped):
    batches = make_batches(3)
    plain, twice = make_engine(), make_engine(remat=True)
    if dropped:
        factors = np.random.default_rng(0).integers(2, size=(len(batches[0]["label"]), plain.num_blocks))
        batches = [{**batch, "drop_path": factors * 2.0} for batch in batches]
    (state, metrics), (other, found) = (train(engine, engine.init(), batches) for engine in (plain, twice))
    assert_same_bits(flat(twice.to_tree(other)), flat(plain.to_tree(state)))
    for step, expected in zip(found, metrics, strict=True):
        assert_same_bits(step, expected)

    saved: list[int] = []
    forward = blockwise._forward

    def counted(*args: Any) -> Any:
        result = forward(*args)
        saved.append(sum(array.nbytes for array in jax.live_arrays()))
        return result

    monkeypatch.setattr(blockwise, "_forward", counted)
    peaks = []
    for engine in (plain, twice):
        train(engine, engine.init(), batches[:1])
        peaks.append(max(saved) - saved[0])
        saved.clear()
    assert peaks[1] < 0.8 * peaks[0]


def test_float32_stays_float32():
    engine = make_engine(precision="float32")
    state, (metrics,) = train(engine, engine.init(), make_batches(1))
    floats = [a for a in (*jax.tree.leaves(state), *metrics.values()) if np.issubdtype(a.dtype, np.floating)]
    assert {a.dtype for a in floats} == {np.dtype(np.float32)}


def test_blocks_of_a_kind_share_compiled_functions():
    engine: Any = make_engine(model_options={"width": 4, "stage_sizes": (3, 1)})
    train(engine, engine.init(), make_batches(2))
    assert len(engine._strategy._blocks.blocks) == 6  # stem, three blocks that are alike, another, head
    assert engine._strategy._backward._cache_size() == 4


def test_the_state_that_went_in_is_donated_but_for_its_counters():
    engine = make_engine()
    before = engine.init()
    batches = make_batches(1)
    train(engine, before, batches)
    moments = [a for a in jax.tree.leaves(before.opt_state) if a.ndim]
    assert all(a.is_deleted() for a in (*before.params.values(), *moments))
    assert not before.step.is_deleted()


def test_the_first_nonfinite_step_is_counted():
    engine = make_engine()
    batches = make_batches(3)
    batches[1]["image"][0, 0, 0, 0] = np.nan
    state, metrics = train(engine, engine.init(), batches)
    assert np.isfinite(metrics[0]["loss"])
    assert not np.isfinite(metrics[1]["grad_norm"])
    assert engine.first_nonfinite_step(state) == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {**LEVEL, **LIBRARIES}),
        ("--xla_cpu_enable_fast_math=false", {**LEVEL, **LIBRARIES}),
        ("--xla_backend_optimization_level=0", LIBRARIES),
        ("--xla_cpu_experimental_ynn_fusion_type=", LEVEL),
    ],
)
def test_options_that_users_set_are_left_alone(flags, expected, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert compiler_options() == expected


@pytest.mark.parametrize(
    ("options", "kind"), [({"accumulate": 2}, Accumulated), ({"freeze_backbone": True}, Whole)]
)
def test_what_needs_a_whole_step_has_it(options, kind):
    engine: Any = make_engine(**options)
    assert isinstance(engine._strategy, kind)
