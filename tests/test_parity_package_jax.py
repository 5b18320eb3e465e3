"""The JAX adapters of `parity`: parameters by their place, float64 twins, statistics of the right layer."""

from __future__ import annotations

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import parity


@pytest.mark.parametrize("count", [3, 11])
def test_parameters_keep_their_order_whatever_their_names(count: int) -> None:
    """Sorted by name, "10" comes before "2", and an Equinox module's fields are not sorted at all."""
    rng = np.random.default_rng(0)
    matrices = [rng.standard_normal((i + 1, i + 2), np.float32) for i in range(count)]

    def product(matrices: list[jax.Array], x: jax.Array) -> jax.Array:
        for matrix in matrices:
            x = x @ matrix
        return x

    model = parity.jax_model(product, matrices)
    module = torch.nn.Sequential(*(torch.nn.Linear(i + 1, i + 2, bias=False) for i in range(count)))
    with torch.no_grad():
        for layer, matrix in zip(module, matrices, strict=True):
            layer.get_parameter("weight").copy_(torch.tensor(matrix.T))
    assert parity.compare(parity.torch_model(module), model, np.ones((2, 1), np.float32)).agrees


def test_a_parameter_may_be_called_value() -> None:
    arrays = {"kernel": np.eye(3, dtype=np.float32), "value": {"kernel": 2 * np.eye(3, dtype=np.float32)}}
    model = parity.jax_model(lambda p, x: x @ p["kernel"] @ p["value"]["kernel"], arrays)
    trace = model.run(np.ones((2, 3), np.float32))
    assert set(trace.parameters) == {"kernel", "value.kernel"}
    assert np.array_equal(trace.outputs["output"], np.full((2, 3), 2.0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_of_a_layer_of_fixed_precision_has_a_float64_twin(dtype: Any) -> None:
    """`jax.nn.relu` has a derivative of its own, traced in the precision of what it is given."""
    layer = nnx.Linear(3, 4, dtype=dtype, rngs=nnx.Rngs(0))

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.layer = layer

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.relu(self.layer(x))

    x = np.random.default_rng(0).standard_normal((2, 3), np.float32)
    trace = parity.nnx_model(Net()).run(x, float64=True, cotangents={"output": np.ones((2, 4))})
    assert layer.bias is not None
    kernel, bias = (np.asarray(a[...], np.float64) for a in (layer.kernel, layer.bias))
    expected = x.astype(np.float64) @ kernel + bias
    assert np.abs(trace.outputs["output"] - np.maximum(expected, 0)).max() < 1e-14
    assert np.abs(trace.input_gradients["input"] - (expected > 0) @ kernel.T).max() < 1e-14


def test_statistics_are_paired_by_their_layer() -> None:
    """Linen sorts modules by name, so that the second batch norm's statistics come first here."""
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))

    class Inner(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.BatchNorm(False, momentum=0.1, epsilon=1e-5)(linen.Dense(4)(x))

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Inner(name="A")(linen.BatchNorm(False, momentum=0.1, epsilon=1e-5)(x))

    x = np.random.default_rng(0).standard_normal((8, 4), np.float32) * 2 + 1
    variables = Net().init(jax.random.key(0), x)
    variables["params"]["A"]["Dense_0"] = {
        "kernel": module[1].get_parameter("weight").detach().numpy().T,
        "bias": module[1].get_parameter("bias").detach().numpy(),
    }
    models = parity.torch_model(module.train()), parity.linen_model(Net(), variables)
    first = parity.compare(*models, x).first_difference
    assert first is not None
    assert (first.reference, first.candidate) == ("0.running_mean", "batch_stats.BatchNorm_0.mean")
    assert first.cause_id == "momentum-convention"


def test_named_scopes_are_the_modules_of_a_function() -> None:
    """Libraries without an adapter name their modules with them; one line of the user's runs them all."""

    def layer(name: str, w: jax.Array, x: jax.Array) -> jax.Array:
        with jax.named_scope(name):
            return jax.jit(jnp.tanh)(x @ w)

    def f(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        with jax.named_scope("net/~"):
            for name, w in params.items():
                x = layer(name, w, x)
        return x

    params = {"first": np.eye(3, dtype=np.float32), "second": 2 * np.eye(3, dtype=np.float32)}
    values = parity.jax_model(f, params).run(np.ones((2, 3), np.float32)).values
    names = [f"net.{layer}.{kind}" for layer in params for kind in ("dot_general", "tanh")]
    assert [value.name for value in values] == names
    assert [value.where for value in values] == [""] * 4


@pytest.mark.parametrize("steps", [1, 1000])
def test_of_two_running_averages_the_one_that_departs_is_reported(steps: int) -> None:
    """One module may store the sum and the corrected average made from it, which evaluation reads."""
    module = torch.nn.BatchNorm1d(5, affine=False).train()
    means = np.arange(5, dtype=np.float32)
    assert module.running_mean is not None
    assert module.running_var is not None
    module.running_mean.copy_(torch.from_numpy(means))

    def f(params: Any, state: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, Any]:
        mean, var = x.mean(0), x.var(0)
        biased = {"mean.raw": mean, "var.raw": var * len(x) / (len(x) - 1)}
        after = {name: 0.9 * state[name] + 0.1 * new for name, new in biased.items()}
        after |= {name.replace("raw", "used"): a / (1 - 0.9**steps) for name, a in after.items()}
        return (x - mean) / jnp.sqrt(var + 1e-5), after

    names = ("mean.raw", "mean.used", "var.raw", "var.used")
    state = {name: means if name.startswith("mean") else np.ones(5, np.float32) for name in names}
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    report = parity.compare(parity.torch_model(module), parity.jax_model(f, {}, state), x)
    departing = {tensor.candidate for tensor in report.tensors if tensor.departs}
    assert departing == ({"mean.used", "var.used"} if steps == 1 else set())


def test_parameters_with_the_same_numbers_are_told_apart() -> None:
    """Biases that are 0, each added to what comes before it: their values match one operation early."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
    params: dict[str, Any] = {}
    for name, layer in module.named_children():
        torch.nn.init.zeros_(layer.get_parameter("bias"))
        kernel = layer.get_parameter("weight").detach().numpy().T
        params[f"z{9 - int(name)}"] = {"kernel": kernel, "offset": np.zeros(4, np.float32)}

    def f(params: dict[str, Any], x: jax.Array) -> jax.Array:
        for name in sorted(params, reverse=True):
            x = x @ params[name]["kernel"] + params[name]["offset"]
        return x

    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    report = parity.compare(parity.torch_model(module), parity.jax_model(f, params), x)
    assert report.agrees, report.verdict
    names = {match.reference: match.candidate for match in report.weights.matches}
    assert all(names[f"{i}.bias"] == f"z{9 - i}.offset" for i in range(4))


def test_a_counter_made_from_a_python_integer_stays_one_in_float64() -> None:
    """Such an integer has the default type, which is another one where float64 is enabled."""

    def f(params: Any, state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        after = state + 1
        if after.dtype != state.dtype:
            raise TypeError(f"{state.dtype} became {after.dtype}")
        return 2 * x, after

    trace = parity.jax_model(f, {}, jnp.asarray(0)).run(np.ones(3, np.float32), float64=True)
    assert np.array_equal(trace.outputs["output"], np.full(3, 2.0))


def test_of_many_parameters_without_a_counterpart_the_first_are_named() -> None:
    module = torch.nn.Linear(3, 3, bias=False)
    params = {"w": module.weight.detach().numpy().T}
    params |= {f"b{i}": np.full(3, i, np.float32) for i in range(20)}
    model = parity.jax_model(lambda p, x: x @ p["w"], params)
    report = parity.compare(parity.torch_model(module), model, np.ones((2, 3), np.float32))
    assert report.agrees
    (note,) = report.notes
    assert note.endswith("and 12 more.")


def test_a_padding_row_has_no_gradient() -> None:
    module = torch.nn.Embedding(6, 4, padding_idx=2)
    torch.nn.init.normal_(module.weight)
    table = {"table": module.weight.detach().numpy()}
    model = parity.jax_model(lambda p, ids: p["table"][ids], table)
    report = parity.compare(parity.torch_model(module), model, np.array([[0, 2, 5, 2]]))
    first = report.first_difference
    assert first is not None
    assert (first.reference, first.cause_id) == ("weight", "padding-row")
    assert first.cause is not None
    assert "row 2" in first.cause


def test_normalization_with_the_updated_running_statistics_is_named() -> None:
    norm = torch.nn.BatchNorm1d(5, affine=False)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(1, 2)
    state = {name: getattr(norm, f"running_{name}").numpy().copy() for name in ("mean", "var")}
    module = torch.nn.Sequential(norm).train()

    def f(params: Any, state: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, Any]:
        mean, var = 0.7 * state["mean"] + 0.3 * x.mean(0), 0.7 * state["var"] + 0.3 * x.var(0)
        return (x - mean) / jnp.sqrt(var + 1e-5), {"mean": mean, "var": var}

    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    first = parity.compare(parity.torch_model(module), parity.jax_model(f, {}, state), x).first_difference
    assert first is not None
    assert first.cause_id == "batch-statistics-vs-running"
    assert first.cause is not None
    assert "after the step, 0.7 of which are old" in first.cause


@pytest.mark.parametrize("epsilon", [1e-5, 1.1e-5])
def test_a_variance_that_loses_digits_is_named(epsilon: float) -> None:
    """Only the difference of mean square and squared mean is, not any other variance."""
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(5, track_running_stats=False))

    def f(params: Any, x: jax.Array) -> jax.Array:
        mean = x.mean(0)
        var = jnp.square(x).mean(0) - jnp.square(mean)
        return (x - mean) / jnp.sqrt(var + epsilon) * params["0.weight"] + params["0.bias"]

    params = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    x = (3 + 0.01 * np.random.default_rng(0).normal(size=(7, 5))).astype(np.float32)
    first = parity.compare(parity.torch_model(module), parity.jax_model(f, params), x).first_difference
    assert first is not None
    assert first.cause_id == ("fast-variance" if epsilon == 1e-5 else "epsilon")
