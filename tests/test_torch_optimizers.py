"""The reference's optimizers: against the published algorithm in NumPy, and as PyTorch's own are used.

What the two engines make of the same gradients is compared in the parity suite.
"""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LinearLR, SequentialLR, StepLR

import torch_oracle
from tests.helpers.comparing import assert_close
from tests.helpers.published_adabound import FINAL_LR, PEAK, SHAPES, STEPS, problem, published, warmup_cosine
from torch_oracle import OPTIMIZERS, AdaBound, AdaBoundW, AMSBound, SGDBound, make_optimizer

BOUNDED = [AdaBound, AMSBound, AdaBoundW]
FLOAT64 = 1e-12  # of a tensor's largest magnitude: 2,000 steps that each round a few times


Parameters = dict[str, torch.nn.Parameter]


def tensors(params: dict[str, np.ndarray]) -> Parameters:
    return {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in params.items()}


def take_steps(
    optimizer: torch.optim.Optimizer, parameters: Parameters, steps: range, scale: float = 1
) -> None:
    """Steps with gradients that are a function of the step alone."""
    for step in steps:
        rng = np.random.default_rng(step)
        for parameter in parameters.values():
            parameter.grad = torch.from_numpy(scale * rng.normal(size=tuple(parameter.shape)))
        optimizer.step()


def values(parameters: Parameters) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}


# The published algorithm


@pytest.mark.parametrize(
    ("optimizer", "weight_decay", "as_published"),
    [
        (AdaBound, 0.0, {}),
        (AdaBound, 5e-4, {"l2": 5e-4}),
        (AMSBound, 0.0, {}),
        (AMSBound, 5e-4, {"l2": 5e-4}),
        (AdaBoundW, 0.0, {}),
        (AdaBoundW, 0.05, {"decoupled": 0.05}),
    ],
)
def test_equals_the_published_algorithm(
    optimizer: type[AdaBound], weight_decay: float, as_published: dict[str, float]
) -> None:
    params, grads = problem()
    rates = warmup_cosine()
    parameters = tensors(params)
    tested = optimizer(parameters.values(), PEAK, FINAL_LR, weight_decay=weight_decay)
    for step, rate in enumerate(rates):
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(grads[name][step])
        tested.param_groups[0]["lr"] = rate
        tested.step()
    hits = np.zeros(3, int)
    for name in SHAPES:
        ams = optimizer is AMSBound
        expected, hit = published(params[name], grads[name], rates, PEAK, amsbound=ams, **as_published)
        hits += hit
        state = tested.state[parameters[name]]
        assert state.pop("step") == STEPS
        keys = {"exp_avg": "mu", "exp_avg_sq": "nu", **({"max_exp_avg_sq": "nu_max"} if ams else {})}
        assert state.keys() == keys.keys()
        assert_close(name, parameters[name].detach(), expected["params"], FLOAT64)
        for key, moment in keys.items():
            assert_close(f"{key} of {name}", state[key], expected[moment], FLOAT64)
        if ams:
            assert (expected["nu_max"] > 1.5 * expected["nu"]).mean() > 0.5, "the maximum hardly mattered"
    assert (hits > 0.1 * hits.sum()).all(), f"lower, inside, upper: {hits}"


@pytest.mark.parametrize("optimizer", BOUNDED)
def test_the_first_step_by_hand(optimizer: type[AdaBound]) -> None:
    """Of three numbers one is at the upper bound, one inside, one at the lower bound."""
    gradients = [1e-6, -0.5, 30.0]
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    parameter.grad = torch.tensor(gradients, dtype=torch.float64)
    b1, b2, gamma, eps, decay = 0.8, 0.96, 0.25, 0.01, 0.125
    tested = optimizer([parameter], 0.5, 2.0, b1=b1, b2=b2, gamma=gamma, eps=eps, weight_decay=decay)
    tested.step()
    for found, g in zip(parameter.tolist(), gradients, strict=True):
        l2 = 0 if optimizer is AdaBoundW else decay
        g = g + l2 * 1.0
        unclipped = 0.5 * 0.2 / 0.2 / (0.2 * abs(g) + eps)  # sqrt(1 - b2) = 0.2 = 1 - b1
        size = min(max(unclipped, 2.0 * (1 - 1 / 1.25)), 2.0 * (1 + 1 / 0.25))
        decoupled = 0.5 * decay * 1.0 if optimizer is AdaBoundW else 0
        assert found == pytest.approx(1 - size * 0.2 * g - decoupled, rel=1e-12)


# The learning rate, and the groups


@pytest.mark.parametrize("gradient", [1e-7, 1e3], ids=["upper", "lower"])
def test_a_scheduler_moves_the_rate_and_the_bounds(gradient: float) -> None:
    """A clipped number moves by bound * mu, where the bound closes on final_lr * lr / base_lr."""
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    tested = AdaBound([parameter], lr=2e-3, final_lr=0.5, gamma=0.01)
    warmup = LinearLR(tested, start_factor=0.25, total_iters=3)
    schedule = SequentialLR(tested, [warmup, StepLR(tested, step_size=2, gamma=0.1)], milestones=[3])
    mu, rates = 0.0, []
    for t in range(1, 8):
        before, rate = parameter.item(), tested.param_groups[0]["lr"]
        rates.append(rate)
        parameter.grad = torch.full_like(parameter, gradient)
        tested.step()
        schedule.step()
        mu = 0.9 * mu + 0.1 * gradient
        closing = 1 + 1 / (0.01 * t) if gradient < 1 else 1 - 1 / (0.01 * t + 1)
        expected = -(0.5 * rate / 2e-3) * closing * mu
        assert parameter.item() - before == pytest.approx(expected, rel=1e-9), f"step {t}"
    assert rates == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3, 2e-4, 2e-4])


@pytest.mark.parametrize("optimizer", [*BOUNDED, SGDBound])
def test_a_rate_that_is_a_tensor_does_what_a_number_does(optimizer: type[AdaBound]) -> None:
    """A scheduler changes it in place; the rate that `final_lr` goes with stays."""
    ends = []
    for rate in (2e-3, torch.tensor(2e-3, dtype=torch.float64), np.float64(2e-3)):
        parameters = tensors({"w": np.ones(3)})
        tested = optimizer(parameters.values(), rate, gamma=0.5)  # type: ignore[arg-type]
        schedule = StepLR(tested, step_size=1, gamma=0.1)
        for step in range(4):
            take_steps(tested, parameters, range(step, step + 1))
            schedule.step()
        assert tested.param_groups[0]["base_lr"] == pytest.approx(2e-3, rel=1e-12)
        ends.append(values(parameters)["w"])
    for end in ends[1:]:
        assert_close("w", end, ends[0], FLOAT64)


def test_each_group_has_its_own_arguments() -> None:
    start = {"a": np.ones((3, 2)), "b": np.ones(4)}
    together, apart = tensors(start), tensors(start)
    own = {"lr": 1e-2, "final_lr": 1.0, "weight_decay": 0.1, "b1": 0.5, "gamma": 0.1}
    groups: list[dict[str, Any]] = [{"params": [together["a"]]}, {"params": [together["b"]], **own}]
    take_steps(AdaBound(groups, 1e-3), together, range(20))
    # the gradients are drawn in order, a before b, so that each sees its own again
    one, other = AdaBound([apart["a"]], 1e-3), AdaBound([apart["b"]], **own)
    take_steps(one, apart, range(20))
    assert_close("a", apart["a"].detach(), together["a"].detach(), 0)
    take_steps(other, apart, range(20))
    assert_close("b", apart["b"].detach(), together["b"].detach(), 0)


def test_base_lr_defaults_to_each_groups_rate() -> None:
    first, second, third = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], "lr": 0.5}]
    tested = AdaBound(groups, 1e-3)
    tested.add_param_group({"params": [third], "lr": 0.25, "base_lr": 4.0})
    assert [group["base_lr"] for group in tested.param_groups] == [1e-3, 0.5, 4.0]


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    parameters = tensors({"moved": np.ones(2), "held": np.ones(2)})
    tested = AdaBoundW(parameters.values(), 0.1, weight_decay=0.5)
    parameters["moved"].grad = torch.ones(2, dtype=torch.float64)
    tested.step()
    assert not tested.state[parameters["held"]]
    assert parameters["held"].tolist() == [1, 1]
    assert (parameters["moved"] != 1).all()


def test_a_closure_is_evaluated_with_gradients() -> None:
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    tested = AdaBound([parameter])

    def closure() -> float:
        tested.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss.item()

    assert tested.step(closure) == 9
    assert parameter.item() < 3
    assert tested.step() is None


# Saving and resuming


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumed_from_a_state_dict_goes_on_bit_for_bit(name: str) -> None:
    """Through a file, as one would do it."""
    options: dict[str, Any] = {"weight_decay": 0.01, "base_lr": 0.02, "gamma": 0.05}
    whole = tensors(problem()[0])
    optimizer = make_optimizer(name, whole.values(), 0.01, **options)
    take_steps(optimizer, whole, range(10))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    parameters = tensors(values(whole))
    take_steps(optimizer, whole, range(10, 20), scale=0.1)

    resumed = make_optimizer(name, parameters.values(), 0.5)  # of which nothing may be left
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    take_steps(resumed, parameters, range(10, 20), scale=0.1)
    for key, value in values(whole).items():
        assert_close(key, values(parameters)[key], value, 0)


def test_a_copy_of_a_state_dict_is_not_moved_by_further_steps() -> None:
    parameters = tensors(problem()[0])
    tested = AMSBound(parameters.values())
    take_steps(tested, parameters, range(3))
    kept = copy.deepcopy(tested.state_dict())
    take_steps(tested, parameters, range(3, 5))
    assert [state["step"] for state in kept["state"].values()] == [3] * len(SHAPES)
    assert [state["step"] for state in tested.state.values()] == [5] * len(SHAPES)


# Arguments

BAD: dict[str, list[float]] = {
    "lr": [-1e-3, math.inf, math.nan],
    "final_lr": [0.0, -0.1, math.inf, math.nan],
    "base_lr": [0.0, -1e-3],
    "gamma": [0, -1e-3, math.nan],
    "b1": [1.0, -0.1, math.nan],
    "b2": [1, -0.1],
    "eps": [-1e-8, math.nan],
    "weight_decay": [-1e-4, math.nan],
}


@pytest.mark.parametrize("optimizer", BOUNDED)
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_argument_is_named_in_one_line(optimizer: type[AdaBound], name: str, value: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    arguments: dict[str, Any] = {"lr": 1e-3, "base_lr": 1e-3, name: value}
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value}$"):
        optimizer([parameter], **arguments)
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value}$"):
        optimizer([{"params": [parameter], **arguments}])


@pytest.mark.parametrize("optimizer", [*BOUNDED, SGDBound])
def test_complex_parameters_are_refused(optimizer: type[AdaBound]) -> None:
    real, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    message = r"^parameters must be real, one of shape \[2\] is torch\.complex64; use torch\.view_as_real$"
    with pytest.raises(ValueError, match=message):
        optimizer([real, other])
    tested = optimizer([real])
    with pytest.raises(ValueError, match=message):
        tested.add_param_group({"params": [other]})
    assert [group["params"] for group in tested.param_groups] == [[real]]


def test_a_rate_of_zero_needs_a_base_lr() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"^base_lr must be .* got 0"):
        AdaBound([parameter], 0.0)
    AdaBound([parameter], 0.0, base_lr=1e-3)


# The table


def test_the_table_makes_what_its_names_say() -> None:
    made = {name: make_optimizer(name, [torch.nn.Parameter(torch.zeros(1))], 1e-3) for name in OPTIMIZERS}
    assert {name: type(optimizer) for name, optimizer in made.items()} == {
        "adam": torch.optim.Adam,
        "adabound": AdaBound,
        "amsbound": AMSBound,
        "adaboundw": AdaBoundW,
        "amsgrad": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "sgdbound": SGDBound,
    }
    assert [made[name].defaults["amsgrad"] for name in ("adam", "amsgrad")] == [False, True]
    decays = {name: optimizer.defaults["weight_decay"] for name, optimizer in made.items()}
    assert decays == {**dict.fromkeys(OPTIMIZERS, 0.0), "adamw": 0.01}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_hands_every_argument_on(name: str) -> None:
    given: dict[str, Any] = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "momentum": 0.7, "weight_decay": 0.2}
    given |= {"base_lr": 0.3, "final_lr": 0.4, "gamma": 0.5}
    found = make_optimizer(name, [torch.nn.Parameter(torch.zeros(1))], 0.6, **given).defaults
    if "betas" in found:
        found["b1"], found["b2"] = found["betas"]
    common = {"lr": 0.6, "weight_decay": 0.2}
    adam = {key: given[key] for key in ("b1", "b2", "eps")}
    bound = {key: given[key] for key in ("base_lr", "final_lr", "gamma")}
    if name == "sgd":
        expected = {**common, "momentum": 0.7, "dampening": 0, "nesterov": False}
    else:
        expected = {**common, **adam, **(bound if "bound" in name else {})}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adan", {}, "^unknown optimizer 'adan'; choose one of adam, adabound, "),
        *((name, {"weight_decay": -1.0}, "^weight_decay must be .* got -1") for name in OPTIMIZERS),
        *((name, {"b2": 1.0}, "^b2 must be .* got 1") for name in OPTIMIZERS if name != "sgd"),
        ("sgd", {"momentum": math.inf}, "^momentum must be .* got inf"),
        ("amsbound", {"gamma": 0}, "^gamma must be .* got 0"),
    ],
)
def test_the_table_refuses_what_is_out_of_range(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, [torch.nn.Parameter(torch.zeros(1))], 1e-3, **options)
    with pytest.raises(ValueError, match=r"^lr must be .* got inf"):
        make_optimizer("adam", [torch.nn.Parameter(torch.zeros(1))], math.inf)


def test_the_table_ignores_what_an_optimizer_has_no_use_for() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    make_optimizer("sgd", [parameter], 1e-3, b1=2.0, gamma=-1.0, final_lr=-1.0)
    make_optimizer("adam", [parameter], 1e-3, momentum=-1.0, gamma=-1.0)
    make_optimizer("adabound", [parameter], 1e-3, momentum=-1.0)


def test_the_names_of_the_table_are_exported() -> None:
    assert all(getattr(torch_oracle, kind.__name__) is kind for kind in BOUNDED)
