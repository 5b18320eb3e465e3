"""Seeds trained together by `vmap` equal seeds trained alone."""

from __future__ import annotations

from threading import BrokenBarrierError, Thread
from typing import Any

import numpy as np
import pytest

from jax_resnet import Engine
from jax_resnet.strategies.vmapped import Rendezvous, VmappedEngines
from tests.helpers.comparing import assert_all_close, assert_close
from tests.helpers.jax_engine import CLASSES, SHAPE, flat, make_batches, make_engine, train

SEEDS = 5
# Five runs beside each other and one after another differ in the order of sums: 20 steps in float64; the
# first three in float32, before it grows.
FLOAT64, FLOAT32 = 1e-10, 1e-5


def make_engines(count: int = SEEDS, model: str = "cnn", **options: Any) -> list[Engine]:
    """Each with a seed of its own; of the CNN, soon compiled, the second has another mean too."""
    return [
        make_engine(
            model,
            "adabound",
            seed=seed,
            mean=(0.45 if (model, seed) == ("cnn", 1) else 0.5, 0.4, 0.3),
            **options,
        )
        for seed in range(count)
    ]


def uint8_batches(steps: int, seed: int) -> list[dict[str, Any]]:
    """Batches of uint8."""
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.integers(0, 256, (8, *SHAPE), np.uint8),
            "label": rng.integers(0, CLASSES, 8).astype(np.int32),
        }
        for _ in range(steps)
    ]


@pytest.mark.parametrize(
    ("model", "precision", "steps", "tolerance"),
    [
        ("cnn", "float64", 20, FLOAT64),
        pytest.param("cnn", "float32", 3, FLOAT32, marks=pytest.mark.slow),
        pytest.param("resnet18", "float64", 20, FLOAT64, marks=pytest.mark.slow),
        pytest.param("resnet18", "float32", 3, FLOAT32, marks=pytest.mark.slow),
    ],
)
def test_five_seeds_together_equal_five_alone(
    model: str, precision: str, steps: int, tolerance: float
) -> None:
    engines = make_engines(model=model, precision=precision)
    batches = [uint8_batches(steps, seed) for seed in range(SEEDS)]
    vmapped = VmappedEngines(engines)
    taken = list(vmapped.train([e.init() for e in engines], zip(*batches, strict=True)))
    losses, stacked = np.array([metrics["loss"] for _, metrics in taken]), taken[-1][0]
    assert len(set(losses[0])) == SEEDS
    for index, engine in enumerate(engines):
        # One compilation for all that have its constants
        program = engine if (model, index) == ("cnn", 1) else engines[0]
        state, alone = train(program, engine.init(), batches[index])
        expected = [float(metrics["loss"]) for metrics in alone]
        assert_close(f"losses of seed {index}", losses[:, index], expected, tolerance)
        if precision == "float64":
            tree, wanted = engine.to_tree(vmapped.one(stacked, index)), engine.to_tree(state)
            assert_all_close("tree", flat(tree), flat(wanted), 1e-8)


def test_drivers_agree_on_the_largest_number() -> None:
    """Each time they ask, so that a signal stops all of them at one step."""
    rendezvous, found = Rendezvous(3), {}

    def drive(index: int) -> None:
        found[index] = [rendezvous.all_reduce_max(index, number) for number in (index, 0, -index)]

    threads = [Thread(target=drive, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [2, 0, 0] for index in range(3)}


def test_drivers_that_meet_see_engines_like_any_other() -> None:
    """In float32 each trains two steps, evaluates, and trains on; one leaves, and the others are told."""
    engines, batches = make_engines(2, precision="float32"), make_batches(4)
    rendezvous, found, told = Rendezvous(2), {}, []

    def drive(index: int, steps: int) -> None:
        proxy = rendezvous.wrap(index, engines[index])
        try:
            for step, (state, metrics) in enumerate(proxy.train(proxy.init(), batches), 1):
                if step == 2:
                    logits = np.concatenate(list(proxy.evaluate(state, batches[:1])))
                    found[index] = float(metrics["loss"]), logits, proxy.to_tree(state)
                    assert proxy.first_nonfinite_step(state) is None
                if step == steps:
                    rendezvous.leave()
                    return
        except BrokenBarrierError:
            told.append(index)

    threads = [Thread(target=drive, args=each) for each in ((0, 4), (1, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [0]
    for index, engine in enumerate(engines):
        state, metrics = train(engine, engine.init(), batches[:2])
        loss, logits, tree = found[index]
        assert loss == pytest.approx(float(metrics[-1]["loss"]), rel=FLOAT32)
        (expected,) = engine.evaluate(state, batches[:1])
        assert_close("logits", logits, expected, 1e-3)
        assert tree["step"] == 2
        assert tree.keys() == engine.to_tree(state).keys()
