"""Optimizers, schedules and training loops compared: pairs that agree, and pairs with a known cause."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from parity.optimizers import FACTOR, compare_optimizers
from parity.trace import ParityError
from parity.training import compare_schedules, compare_training


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def masked_adamw(p):
    groups = [
        {"params": [x for x in p if x.ndim > 1], "weight_decay": 0.01},
        {"params": [x for x in p if x.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, 1e-3)


def sgd_and_step_lr(p):
    optimizer = torch.optim.SGD(p, 0.1)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5)


def rmsprop_and_step_lr(p):
    optimizer = torch.optim.RMSprop(p, 1e-3, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.3)


def halving(count):
    return 0.1 * 0.5 ** (count // 20)


def adam(p):
    return torch.optim.Adam(p, 1e-3)


def hand_written_adam(eps_beside_uncorrected_root):
    """Adam as (init, update), whose settings no one can read: b2 and eps are to be found from its steps."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, zeros, jnp.zeros([], jnp.int32)

    def update(gradients, state, params):
        m, v, t = state
        t = t + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradients)
        v = jax.tree.map(lambda v, g: 0.98 * v + 0.02 * g * g, v, gradients)
        correction = jnp.sqrt(1 - 0.98**t)

        def direction(m, v):
            if eps_beside_uncorrected_root:
                root = (jnp.sqrt(v) + 1e-7) / correction
            else:
                root = jnp.sqrt(v) / correction + 1e-7
            return -1e-3 * m / (1 - 0.9**t) / root

        return jax.tree.map(direction, m, v), (m, v, t)

    return SimpleNamespace(init=init, update=update)


RIGHT = {
    "adam": (adam, optax.adam(1e-3)),
    "adamw": (optax.adamw(1e-3, weight_decay=0.01), lambda p: torch.optim.AdamW(p, 1e-3)),
    "adamw mask": (masked_adamw, optax.adamw(1e-3, weight_decay=0.01, mask=matrices)),
    "sgd nesterov": (
        optax.sgd(0.1, 0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    ),
    "rmsprop": (
        lambda p: torch.optim.RMSprop(p, 1e-3, centered=True, momentum=0.9),
        optax.rmsprop(1e-3, 0.99, eps_in_sqrt=False, centered=True, momentum=0.9),
    ),
    "step schedule": (sgd_and_step_lr, optax.sgd(optax.exponential_decay(0.1, 20, 0.5, staircase=True))),
    "a hand-written one": (
        lambda p: torch.optim.Adam(p, 1e-3, betas=(0.9, 0.98), eps=1e-7),
        hand_written_adam(eps_beside_uncorrected_root=False),
    ),
}

WRONG = {
    "amsgrad": (
        lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
        optax.amsgrad(1e-3),
        ["maximum of v after its bias is corrected, the reference", "optax has no argument"],
    ),
    "amsgrad in PyTorch": (
        optax.amsgrad(1e-3),
        lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
        ["maximum of v before its bias is corrected and corrects the maximum", "PyTorch has no argument"],
    ),
    "rmsprop": (
        lambda p: torch.optim.RMSprop(p, 1e-3),
        optax.rmsprop(1e-3),
        ["eps inside the root", "`optax.rmsprop(..., eps_in_sqrt=False)`", "b2 = 0.9,", "decay=0.99"],
    ),
    "rmsprop's initial moment": (
        lambda p: torch.optim.RMSprop(p, 1e-3),
        optax.rmsprop(1e-3, 0.99, eps_in_sqrt=False, initial_scale=1.0),
        ["begins v at 1, the reference begins v at 0", "`optax.rmsprop(..., initial_scale=0)`"],
    ),
    "rmsprop's momentum and rate": (
        rmsprop_and_step_lr,
        optax.rmsprop(lambda t: 1e-3 * 0.3 ** (t // 5), 0.99, eps_in_sqrt=False, momentum=0.9),
        ["takes the learning rate into the momentum"],
    ),
    "adamw's default decay": (
        lambda p: torch.optim.AdamW(p, 1e-3),
        optax.adamw(1e-3),
        ["weight_decay = 0.0001, the reference has weight_decay = 0.01", "`weight_decay=0.01`"],
    ),
    "decay of norms": (
        masked_adamw,
        optax.adamw(1e-3, weight_decay=0.01),
        ["decays every parameter, norms and biases too", "mask=lambda params"],
    ),
    "coupled decay": (
        lambda p: torch.optim.Adam(p, 1e-3, weight_decay=0.01),
        optax.adamw(1e-3, weight_decay=0.01),
        ["decoupled weight decay", "`optax.chain(optax.add_decayed_weights(0.01), ...)`"],
    ),
    "coupled decay in PyTorch": (
        optax.adamw(1e-3, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, 1e-3, weight_decay=0.01),
        ["adds weight decay to the gradient", "`torch.optim.AdamW(..., weight_decay=0.01)`"],
    ),
    "decay without the rate": (
        lambda p: torch.optim.AdamW(p, 1e-3),
        optax.chain(optax.adam(1e-3), optax.add_decayed_weights(-0.01)),
        ["weight decay without the learning rate", "`optax.adamw(..., weight_decay=0.01)`"],
    ),
    "nesterov": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        optax.sgd(0.1, 0.9),
        ["no Nesterov momentum", "`nesterov=True`"],
    ),
    "dampening": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5),
        optax.sgd(0.1, 0.9),
        ["sums gradients", "the reference dampens momentum"],
    ),
    "averaged momentum": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.1)),
        ["m = b1 m + (1 - b1) g, the reference sums gradients"],
    ),
    "adagrad": (
        lambda p: torch.optim.Adagrad(p, 0.1),
        optax.adagrad(0.1),
        [
            "eps inside the root",
            "begins v at 0.1",
            "initial_accumulator_value=0)",
            "eps = 1e-07",
            "eps=1e-10",
        ],
    ),
    "eps_root": (adam, optax.adam(1e-3, eps_root=1e-8), ["eps_root = 1e-08", "`eps_root=0`"]),
    "nadam": (lambda p: torch.optim.NAdam(p, 1e-3), optax.nadam(1e-3), ["NAdam's b1 that grows with t"]),
    "clip": (
        lambda p: torch.optim.SGD(p, 0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        ["clips the norm of all gradients to 1", "no clipping"],
    ),
    "rate": (adam, lambda p: torch.optim.Adam(p, 1e-4), ["learning rate is 0.1 times the reference's"]),
    "schedule": (
        sgd_and_step_lr,
        optax.sgd(lambda t: halving(t + 1)),
        ["one step ahead of the reference's: off by one"],
    ),
    "sign": (adam, lambda p: torch.optim.Adam(p, 1e-3, maximize=True), ["opposite direction"]),
    "bias correction": (
        adam,
        optax.chain(optax.scale_by_rms(0.999, eps_in_sqrt=False), optax.scale(-1e-3)),
        ["has no momentum", "does not correct the bias of v"],
    ),
    "hand-written": (
        adam,
        hand_written_adam(eps_beside_uncorrected_root=True),
        ["eps beside the uncorrected root", "b2 = 0.98", "eps = 1e-07"],
    ),
    "0 / 0": (adam, optax.adam(1e-3, eps=0.0), ["eps = 0, the reference has eps = 1e-08", "`eps=1e-08`"]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_equal_optimizers_agree(name: str) -> None:
    reference, candidate = RIGHT[name]
    report = compare_optimizers(reference, candidate, steps=1000 if name == "adamw" else 40)
    assert report.agrees, report
    assert set(report.largest) == {"steady", "sparse", "exploding", "zero"}
    # correct pairs are well below the limit
    assert all(ratio < FACTOR / 4 for _, ratio in report.largest.values()), report
    assert "agree" in str(report)


@pytest.mark.parametrize("name", WRONG)
def test_the_cause_of_a_difference_is_named(name: str) -> None:
    reference, candidate, words = WRONG[name]
    report = compare_optimizers(reference, candidate, steps=1000 if name == "amsgrad in PyTorch" else 30)
    assert not report.agrees
    first = report.first_difference
    assert first is not None
    assert first.error > FACTOR * first.noise
    for word in words:
        assert word in str(first.cause), report
    assert str(first.cause) in str(report)


def test_no_cause_is_named_for_an_unknown_optimizer() -> None:
    report = compare_optimizers(lambda p: torch.optim.Adadelta(p, 1e-3), optax.adam(1e-3), steps=5)
    assert report.first_difference is not None
    assert report.first_difference.cause is None
    assert "no variant" in str(report)


def test_the_first_step_and_coordinate_are_right() -> None:
    parameters = {"a": np.ones(2), "b": {"w": np.ones((2, 3))}}

    def late(p):  # from step 7 on one coordinate gets another step
        steps = iter(range(100))
        sgd = torch.optim.SGD(p, 0.1)

        def step():
            sgd.step()
            with torch.no_grad():
                p[1][1, 2] += 1e-9 * (next(steps) >= 6)

        return SimpleNamespace(step=step)

    report = compare_optimizers(lambda p: torch.optim.SGD(p, 0.1), late, steps=12, parameters=parameters)
    first = report.first_difference
    assert first is not None
    assert (first.step, first.parameter, first.coordinate) == (7, "b.w", (1, 2))
    assert first.error == pytest.approx(1e-9, rel=1e-5)


def test_everything_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state(), torch.get_default_dtype(), jnp.ones(1, float).dtype
    numpy_state = str(np.random.get_state())  # noqa: NPY002

    def noisy(p):
        torch.rand(3)
        return torch.optim.SGD(p, 0.1)

    compare_optimizers(noisy, optax.sgd(0.1), steps=2)
    with pytest.raises(ParityError):
        compare_optimizers(noisy, optax.adam, steps=2)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1:] == (torch.get_default_dtype(), jnp.ones(1, float).dtype)
    assert numpy_state == str(np.random.get_state())  # noqa: NPY002


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (3, "is a int: neither a PyTorch factory"),
        (torch.optim.SGD([torch.zeros(1)], 0.1), "Give a factory"),
        (optax.adam, "call it first"),
        (lambda p: None, "has no `step()`"),
        (lambda p: torch.optim.SGD(p, -1.0), "factory fails on a list of tensors: Invalid learning rate"),
        (lambda p: torch.optim.LBFGS(p), "fails at step 1"),
        (optax.polyak_sgd(), "init or update fails"),
    ],
)
def test_bad_input_is_one_clear_paragraph(candidate, words: str) -> None:
    with pytest.raises(ParityError) as error:
        compare_optimizers(optax.sgd(0.1), candidate, steps=2)
    assert words in str(error.value)
    assert str(error.value).startswith("The candidate")


def test_bad_steps_and_parameters_are_refused() -> None:
    with pytest.raises(ParityError, match="steps=0: at least 1"):
        compare_optimizers(adam, adam, steps=0)
    with pytest.raises(ParityError, match="mapping of names to arrays"):
        compare_optimizers(adam, adam, parameters={})


def test_schedules() -> None:
    step_lr = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5)  # noqa: E731
    staircase = optax.exponential_decay(0.1, 20, 0.5, staircase=True)
    assert compare_schedules(step_lr, staircase, 100, base_lr=0.1).agrees

    late = compare_schedules(step_lr, lambda t: staircase(max(t - 1, 0)), 100, base_lr=0.1)
    assert late.first_difference == 20
    assert "one step behind" in str(late)

    scaled = compare_schedules(halving, lambda t: 3 * halving(t), 5)
    assert scaled.first_difference == 0
    assert "3 times" in str(scaled)

    other = compare_schedules(halving, lambda t: 0.1, 30)
    assert other.first_difference == 20
    assert "from step 21 on" in str(other)

    single = compare_schedules(halving, lambda t: np.float32(halving(t)), 30)
    assert "float32" in str(single)

    with pytest.raises(ParityError, match="neither a function of the step nor a factory"):
        compare_schedules(halving, 0.1, 3)
    with pytest.raises(
        ParityError, match="The candidate is neither a function of the step, step -> learning"
    ):
        compare_schedules(halving, lambda optimizer: optimizer.absent, 3)


def torch_loop(dtype=torch.float64, lr=0.1, nudge=0.0):
    torch_model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).to(dtype)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for p in torch_model.parameters():
            p.copy_(torch.tensor(rng.normal(size=p.shape) * (1 + nudge)))
    optimizer = torch.optim.SGD(torch_model.parameters(), lr, momentum=0.9)

    def step(batch):
        x, y = (torch.tensor(b, dtype=dtype) for b in batch)
        loss = ((torch_model(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        named = dict(torch_model.named_parameters())
        return {"loss": loss, "grads": {n: p.grad for n, p in named.items()}, "params": named}

    return step


def jax_loop(fault=""):
    rng = np.random.default_rng(0)
    shapes = [(4, 5), (4,), (3, 4), (3,)]
    w1, b1, w2, b2 = (jnp.asarray(rng.normal(size=s)) for s in shapes)
    params = {"first": {"kernel": w1.T, "bias": b1}, "second": {"kernel": w2.T, "bias": b2}}
    optimizer = optax.sgd(0.1, 0.9)
    state = optimizer.init(params)

    def loss_function(params, x, y):
        h = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
        if fault == "stop_gradient":
            h = jax.lax.stop_gradient(h)
        error = h @ params["second"]["kernel"] + params["second"]["bias"] - y
        return (jnp.abs(error) if fault == "loss" else error**2).mean()

    def step(batch):
        nonlocal params, state
        loss, grads = jax.value_and_grad(loss_function)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        if fault == "update":
            updates = jax.tree.map(lambda u: u * 1.01, updates)
        params = optax.apply_updates(params, updates)
        return {"loss": loss, "grads": grads, "params": params}

    return step


BATCHES = [tuple(np.random.default_rng(i).normal(size=(2, 8, k))[0] for k in (5, 3)) for i in range(4)]


def test_equal_training_loops_agree_and_are_matched_by_value() -> None:
    with jax.enable_x64(True):
        report = compare_training(torch_loop(), jax_loop(), BATCHES)
    assert report.agrees, report
    assert report.pairs["params.0.weight"] == "params.first.kernel"
    assert report.pairs["grads.2.bias"] == "grads.second.bias"
    assert len(report.errors) == len(BATCHES)
    assert "agree in 9 tensors" in str(report)


@pytest.mark.parametrize(
    ("fault", "first", "cause"),
    [
        ("loss", "loss", "before any update"),
        ("stop_gradient", "grads.0.weight", "backward pass"),
        ("update", "params.0.weight", "compare_optimizers"),
    ],
)
def test_the_first_tensor_of_training_that_departs(fault: str, first: str, cause: str) -> None:
    with jax.enable_x64(True):
        report = compare_training(torch_loop(), jax_loop(fault), BATCHES)
    difference = report.first_difference
    assert difference is not None
    assert (difference.step, difference.reference) == (1, first), report
    assert cause in str(report)


def test_noise_of_training_comes_from_a_perturbed_loop() -> None:
    bits = 2.0**-52
    with jax.enable_x64(True):
        report = compare_training(torch_loop(), jax_loop(), BATCHES, perturbed=torch_loop(nudge=bits))
    assert report.agrees, report
    report = compare_training(
        torch_loop(torch.float32), torch_loop(torch.float64), BATCHES, perturbed=torch_loop(torch.float32)
    )
    assert report.agrees, report
    report = compare_training(
        torch_loop(), torch_loop(lr=0.1 + 1e-6), BATCHES, perturbed=torch_loop(nudge=bits)
    )
    assert report.first_difference is not None
    assert report.first_difference.reference == "params.0.weight"


def test_training_with_other_batches_nan_and_unmatched_tensors() -> None:
    def reference(batch):
        return {"a": np.array([1.0, np.nan, float(batch)]), "only": np.ones((2, 7))}

    report = compare_training(
        reference, lambda batch: {"a": reference(batch)["a"]}, [1, 2], candidate_batches=[1, 3]
    )
    assert report.first_difference is not None
    assert (report.first_difference.step, report.first_difference.index) == (2, (2,))
    assert report.unmatched == ("only",)
    report = compare_training(reference, lambda batch: {"a": np.ones(3)}, [1])
    assert report.first_difference is not None
    assert report.first_difference.error == np.inf


@pytest.mark.parametrize(
    ("step", "batches", "words"),
    [
        (lambda batch: 1.0, [0], "The candidate's step returns a float"),
        (lambda batch: {}, [0], "returns an empty mapping"),
        (lambda batch: {"x": np.ones((9, 9))}, [0], "nothing in common"),
        (lambda batch: {"a": np.ones(2)}, [], "batches is empty"),
    ],
)
def test_bad_training_steps_are_refused(step, batches, words: str) -> None:
    with pytest.raises(ParityError, match=words):
        compare_training(lambda batch: {"a": np.ones(2)}, step, batches)
