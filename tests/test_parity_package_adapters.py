"""Adapters of `parity` for PyTorch, NumPy and functions: values, gradients, replacement, nothing changed."""

from __future__ import annotations

import copy
import gc
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import numpy_ref
import torch_oracle
from numpy_ref import layers as numpy_layers
from numpy_ref.state_dict import to_torch_layout
from parity.compare import compare
from parity.function_adapter import function_model
from parity.numpy_adapter import numpy_model
from parity.torch_adapter import torch_model
from parity.trace import Model, ParityError, Trace, Value


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        y += x
        return self.relu(y)


class Net(nn.Module):
    """In-place operations, a module used twice, functions, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))
        self.fc = nn.Linear(4, 5)
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.block = Block()
        self.stem.weight.requires_grad_(False)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        x = F.avg_pool2d(self.block(x), 2, count_include_pad=False)
        return {"features": x, "logits": self.fc(x.mean((2, 3)))}


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 3, 8, 8))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def full_trace(model: Model, inputs, **options) -> Trace:
    """A float64 run with gradients, for cotangents that differ between elements."""
    outputs = model.run(inputs, float64=True).outputs
    rng = np.random.default_rng(1)
    cotangents = {name: rng.normal(size=array.shape) for name, array in outputs.items()}
    return model.run(inputs, float64=True, cotangents=cotangents, **options)


def loss_of(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum whose gradients `full_trace` gives."""
    rng = np.random.default_rng(1)
    return torch.stack([(t * torch.tensor(rng.normal(size=t.shape))).sum() for t in outputs.values()]).sum()


def by_name(trace: Trace) -> dict[str, Value]:
    values = {value.name: value for value in trace.values}
    assert len(values) == len(trace.values)
    return values


def close(actual: np.ndarray | None, expected: torch.Tensor | np.ndarray | None) -> None:
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    assert actual is not None
    assert expected is not None
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_torch_values_are_in_order_with_names_and_attributes(net: Net, image: np.ndarray) -> None:
    trace = torch_model(net).run(image)
    assert [(v.name, v.operation, v.inputs, v.is_module) for v in trace.values] == [
        ("stem", "conv2d", ("input",), True),
        ("relu", "relu", ("stem",), False),
        ("block.conv", "conv2d", ("relu",), True),
        ("block.bn", "batch_norm", ("block.conv",), True),
        ("block.relu", "relu", ("block.bn",), True),
        ("block.add", "add", ("block.relu", "relu"), False),
        ("block.relu.2", "relu", ("block.add",), True),
        ("avg_pool2d", "avg_pool2d", ("block.relu.2",), False),
        ("mean", "mean", ("avg_pool2d",), False),
        ("fc", "linear", ("mean",), True),
    ]
    values = by_name(trace)
    assert values["stem"].parameters == ("stem.weight", "stem.bias")
    assert values["stem"].attributes.items() >= {"stride": (2, 2), "padding": (1, 1), "groups": 1}.items()
    assert values["block.bn"].attributes.items() >= {"eps": 1e-3, "momentum": 0.1, "training": True}.items()
    assert values["avg_pool2d"].attributes.items() >= {"kernel_size": 2, "count_include_pad": False}.items()
    assert values["mean"].attributes.items() >= {"dim": (2, 3), "keepdim": False}.items()
    lines = Path(__file__).read_text("utf-8").splitlines()
    for name, line in (("stem", "x = F.relu(self.stem(x), inplace=True)"), ("block.add", "y += x")):
        number = 1 + next(index for index, text in enumerate(lines) if text.strip() == line)
        assert values[name].where == f"test_parity_package_adapters.py:{number}"
    assert trace.output_values == {"output.features": "avg_pool2d", "output.logits": "fc"}
    assert list(trace.parameters) == [
        *("stem.weight", "stem.bias", "block.conv.weight", "block.bn.weight", "block.bn.bias"),
        *("fc.weight", "fc.bias", "unused"),
    ]
    assert list(trace.state) == ["block.bn.running_mean", "block.bn.running_var"]
    assert {v.value.dtype for v in trace.values} == {np.dtype(np.float32)}
    assert trace.parameter_gradients == trace.input_gradients == {}
    assert all(value.gradient is None for value in trace.values)


def test_torch_values_and_gradients_are_those_of_autograd(net: Net, image: np.ndarray) -> None:
    trace = full_trace(torch_model(net), image)
    twin = copy.deepcopy(net).double().requires_grad_(True)
    x = torch.tensor(image, requires_grad=True)
    values = {"stem": twin.stem(x)}
    values["relu"] = values["stem"].relu()
    values["block.conv"] = twin.block.conv(values["relu"])
    values["block.bn"] = twin.block.bn(values["block.conv"])
    values["block.relu"] = values["block.bn"].relu()
    values["block.add"] = values["block.relu"] + values["relu"]
    values["block.relu.2"] = values["block.add"].relu()
    values["avg_pool2d"] = F.avg_pool2d(values["block.relu.2"], 2)
    values["mean"] = values["avg_pool2d"].mean((2, 3))
    values["fc"] = twin.fc(values["mean"])
    loss = loss_of({"features": values["avg_pool2d"], "logits": values["fc"]})
    gradients = torch.autograd.grad(loss, list(values.values()), retain_graph=True)
    assert [value.name for value in trace.values] == list(values)
    for value, tensor, gradient in zip(trace.values, values.values(), gradients, strict=True):
        close(value.value, tensor)
        close(value.gradient, gradient)
    close(trace.input_gradients["input"], torch.autograd.grad(loss, x, retain_graph=True)[0])
    loss.backward()
    for name, parameter in twin.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        close(trace.parameter_gradients[name], expected)
    for name in trace.state:
        close(trace.state[name], twin.get_buffer(name))


@pytest.mark.parametrize("name", ["stem", "relu", "block.add", "block.relu.2", "fc"])
def test_torch_replacement_is_exact_and_local(net: Net, image: np.ndarray, name: str) -> None:
    model = torch_model(net)
    before = by_name(full_trace(model, image))
    other = np.random.default_rng(2).normal(size=before[name].value.shape)
    other.flat[0] = 0.0
    trace = full_trace(torch_model(net), image, replace={name: other})
    names = list(before)
    for value in trace.values[: names.index(name) + 1]:
        np.testing.assert_array_equal(value.value, before[value.name].value)
    after = by_name(trace)
    follows = {
        "stem": "relu",
        "relu": "block.conv",
        "block.add": "block.relu.2",
        "block.relu.2": "avg_pool2d",
    }
    if name == "fc":
        np.testing.assert_array_equal(trace.outputs["output.logits"], other)
        return
    tensor = torch.tensor(other)
    expected = {
        "relu": tensor.relu(),
        "block.relu.2": tensor.relu(),
        "block.conv": copy.deepcopy(net).double().block.conv(tensor),
        "avg_pool2d": F.avg_pool2d(tensor, 2),
    }[follows[name]]
    close(after[follows[name]].value, expected)
    if name == "relu":  # it is read by block.add too
        close(after["block.add"].value, after["block.relu"].value + other)
    replaced_by_itself = full_trace(model, image, replace={n: v.value for n, v in before.items()})
    for value in replaced_by_itself.values:
        close(value.gradient, before[value.name].gradient)


def test_torch_gradient_replacement_is_local(net: Net, image: np.ndarray) -> None:
    model = torch_model(net)
    before = full_trace(model, image)
    other = np.random.default_rng(2).normal(size=by_name(before)["block.add"].value.shape)
    trace = full_trace(model, image, replace_gradients={"block.add": other})
    old, new = by_name(before), by_name(trace)
    for name in ("fc", "mean", "avg_pool2d", "block.relu.2", "block.add"):
        np.testing.assert_array_equal(new[name].gradient, old[name].gradient)
    close(new["block.relu"].gradient, other)
    np.testing.assert_array_equal(
        trace.parameter_gradients["fc.weight"], before.parameter_gradients["fc.weight"]
    )
    assert np.abs(trace.input_gradients["input"] - before.input_gradients["input"]).max() > 1e-3


class InPlace(nn.Module):
    """Changes its input, a view, and a tensor of zeros in place."""

    def forward(self, x):
        x.mul_(2)
        y = x * 3
        half = y[:, :2]
        half.add_(x[:, 2:])
        rows = torch.zeros(3, 4)
        rows[1:] = y.exp()
        first, second, third = rows
        return first + second * third, y


def test_torch_operations_in_place() -> None:
    x = np.random.default_rng(0).normal(size=(2, 4))
    trace = full_trace(torch_model(InPlace()), x)
    leaf = torch.tensor(x, requires_grad=True)
    doubled = leaf * 2
    y = torch.cat([3 * doubled[:, :2] + doubled[:, 2:], 3 * doubled[:, 2:]], 1)
    outputs = {"output.0": y[0].exp() * y[1].exp(), "output.1": y}
    for name, tensor in outputs.items():
        close(trace.outputs[name], tensor)
    close(trace.input_gradients["input"], torch.autograd.grad(loss_of(outputs), leaf)[0])
    close(trace.inputs["input"], x)
    values = by_name(trace)
    close(values["mul"].value, doubled)
    close(values["mul.2"].value, 3 * doubled)
    close(values["copy_slices"].value, y)
    assert values["copy_slices"].inputs[0] == "mul.2"
    assert values["exp"].inputs == ("copy_slices",)
    assert trace.output_values["output.1"] == "copy_slices"
    other = np.random.default_rng(2).normal(size=y.shape)
    replaced = torch_model(InPlace()).run(x, float64=True, replace={"copy_slices": other})
    close(by_name(replaced)["exp"].value, np.exp(other))


class Straight(torch.autograd.Function):
    """Rounds; its derivative is wrong on purpose."""

    @staticmethod
    def forward(ctx, x, scale):
        return torch.round(x) * scale

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient, None


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return Straight.apply(x.exp(), self.scale) * 2


def test_torch_custom_functions_are_values() -> None:
    x = np.random.default_rng(0).normal(size=(2, 4))
    trace = full_trace(torch_model(Rounded()), x)
    assert [(v.name, v.inputs, v.parameters) for v in trace.values] == [
        ("exp", ("input",), ()),
        ("Straight", ("exp",), ("scale",)),
        ("mul", ("Straight",), ()),
    ]
    exp, straight, mul = trace.values
    close(straight.value, np.round(np.exp(x)) * 2)
    close(straight.gradient, 2 * np.asarray(mul.gradient))
    close(exp.gradient, 3 * np.asarray(straight.gradient))
    other = np.ones_like(x)
    replaced = full_trace(torch_model(Rounded()), x, replace={"Straight": other})
    close(replaced.outputs["output"], 2 * other)
    close(by_name(replaced)["exp"].gradient, np.asarray(exp.gradient))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.positions = nn.Parameter(torch.randn(5, 8))

    def forward(self, tokens, mask):
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]
        return self.attention(x, x, x, key_padding_mask=mask)


def test_torch_attention_is_opened_and_infinities_are_replaced_exactly() -> None:
    torch.manual_seed(0)
    module = Attention().eval()
    inputs = {
        "tokens": np.array([[1, 2, 0], [3, 4, 5]], np.int32),
        "mask": np.array([[False, False, True]] * 2),
    }
    trace = full_trace(torch_model(module), inputs)
    assert not trace.inputs
    values = by_name(trace)
    assert values["embed"].inputs == ("input.tokens",)
    assert values["add"].parameters == ("positions",)
    softmax, scores = values["attention.softmax"], values["attention.baddbmm"]
    assert softmax.attributes["dim"] == -1
    close(softmax.value, torch.softmax(torch.tensor(scores.value), -1))
    assert np.isneginf(scores.value).any()
    expected = copy.deepcopy(module).double()(torch.tensor(inputs["tokens"]), torch.tensor(inputs["mask"]))
    for name, tensor in zip(("output.0", "output.1"), expected, strict=True):
        close(trace.outputs[name], tensor)
    assert trace.output_values["output.0"] == "attention.output.0"
    again = full_trace(torch_model(module), inputs, replace={"attention.baddbmm": scores.value})
    for value in again.values:
        np.testing.assert_array_equal(value.value, values[value.name].value)
        if value.gradient is not None:
            close(value.gradient, np.asarray(values[value.name].gradient))


class Mixed(nn.Module):
    """Casts to float32, and has a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = torch.tensor([0.1, 0.2, 0.3])

    def forward(self, x):
        return F.linear(x.float(), torch.eye(3, dtype=torch.float32) * self.constant).to(torch.float32)


def test_torch_float64_twin_is_float64_throughout() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3))
    trace = torch_model(Mixed()).run(x, float64=True)
    assert [(v.operation, v.value.dtype) for v in trace.values] == [("linear", np.dtype(np.float64))]
    close(trace.outputs["output"], x * np.array([0.1, 0.2, 0.3], np.float32).astype(np.float64))


@pytest.mark.parametrize("precision", ["float64", "bfloat16", "float16"])
def test_torch_precision_is_that_of_the_parameters(precision: str) -> None:
    model = torch_model(nn.Linear(3, 2).to(getattr(torch, precision)))
    assert model.precision() == precision
    trace = model.run(np.ones((1, 3), np.float32))
    stored = {"bfloat16": "float32"}.get(precision, precision)
    assert trace.outputs["output"].dtype == trace.parameters["weight"].dtype == stored


@dataclass
class Result:
    logits: torch.Tensor
    states: tuple[torch.Tensor, ...]
    ids: torch.Tensor
    nothing: None = None


class Structured(nn.Module):
    def forward(self, a, b):
        return Result(a + b, (a, b * 2), b.argmax())


def test_torch_inputs_and_outputs_have_names() -> None:
    a, b = np.ones(3), np.arange(3.0)
    trace = torch_model(Structured()).run((a, torch.tensor(b)))
    assert list(trace.inputs) == ["input.0", "input.1"]
    assert trace.output_values == {"output.logits": "add", "output.states.0": "", "output.states.1": "mul"}
    close(trace.outputs["output.states.1"], (b * 2).astype(np.float32))


def test_torch_train_overrides_the_mode(net: Net, image: np.ndarray) -> None:
    running = by_name(torch_model(net, train=False).run(image))["block.bn"]
    assert running.attributes["training"] is False
    assert net.training
    net.block.eval()
    assert by_name(torch_model(net).run(image))["block.bn"].attributes["training"] is False


def state_of_torch(module: nn.Module) -> dict[str, Any]:
    """Everything that a run could change."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "versions": [t._version for t in [*module.parameters(), *module.buffers()]],
        "gradients": [(p.requires_grad, p.grad) for p in module.parameters()],
        "modes": [part.training for part in module.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
        "inplace": [m.inplace for m in module.modules() if isinstance(m, nn.ReLU)],
        "random": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.default_rng(0).bit_generator.state,
        "default": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_torch_leaves_everything_as_it_was_found(net: Net, image: np.ndarray, fails: bool) -> None:
    net.fc.weight.grad = torch.full((5, 4), 7.0)
    net.fc.register_forward_hook(lambda module, args, output: output * 2)
    inputs = torch.tensor(image)
    before, kept = state_of_torch(net), inputs.clone()
    with torch.no_grad():
        if fails:
            with pytest.raises(ParityError):
                torch_model(net, train=False).run(image[:, :1], float64=True)
        else:
            trace = full_trace(torch_model(net), inputs)
            assert trace.output_values["output.logits"] == "fc"
            assert by_name(trace)["fc"].operation == "mul"
            close(trace.outputs["output.logits"], 2 * by_name(trace)["fc.linear"].value)
        assert not torch.is_grad_enabled()
    after = state_of_torch(net)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, dict) and name == "tensors":
            assert all(torch.equal(t, after[name][key]) for key, t in value.items())
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]), name
        else:
            assert value == after[name], name
    assert torch.equal(inputs, kept)
    assert not inputs.requires_grad


class Drops(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Dropout(p))

    def forward(self, x):
        return F.dropout(self.inner(x), 0.0) * 2


def test_torch_dropout_is_refused_in_words_unless_it_is_off() -> None:
    x = np.ones((2, 3))
    with pytest.raises(
        ParityError, match=r"inner\.1 draws random numbers \(dropout\).*module\.eval\(\).*p to 0"
    ):
        torch_model(Drops(0.5)).run(x)
    for model in (torch_model(Drops(0.0)), torch_model(Drops(0.5), train=False)):
        assert [value.name for value in model.run(x).values] == ["inner.0", "mul"]


def test_torch_errors_are_one_paragraph(net: Net) -> None:
    with pytest.raises(ParityError, match=r"does not run on these inputs: RuntimeError: .*channels") as error:
        torch_model(net).run(np.ones((2, 1, 8, 8)))
    assert "\n" not in str(error.value)
    vars(net)["lock"] = threading.Lock()
    with pytest.raises(ParityError, match="Net cannot be copied"):
        torch_model(net).run(np.ones((2, 3, 8, 8)))


def channels_first(array: np.ndarray | None) -> np.ndarray:
    assert array is not None
    return array.transpose(0, 3, 1, 2) if array.ndim == 4 else array


class Various(nn.Module):
    """Functions of all kinds: builtins wrapped in Python, unused results, axes as arguments."""

    def forward(self, x):
        first, _ = x.chunk(2, 1)
        largest = (x**2).topk(2).values
        return first.permute(1, 0), largest / 2, 1 - F.pad(x, (1, 1)), torch.einsum("ij,kj->ik", x, x)


def test_torch_functions_of_all_kinds() -> None:
    x = np.random.default_rng(0).normal(size=(2, 4))
    trace = full_trace(torch_model(Various()), x)
    values = by_name(trace)
    assert list(values) == ["chunk", "chunk.2", "pow", "topk", "permute", "div", "pad", "rsub", "einsum"]
    told: dict[str, dict[str, Any]] = {
        "pow": {"exponent": 2},
        "topk": {"k": 2, "largest": True},
        "permute": {"dims": (1, 0)},
        "pad": {"pad": (1, 1), "mode": "constant"},
        "einsum": {"args": ("ij,kj->ik",)},
    }
    for name, attributes in told.items():
        assert values[name].attributes.items() >= attributes.items()
    assert values["chunk.2"].gradient is None
    leaf = torch.tensor(x, requires_grad=True)
    loss = loss_of({f"output.{index}": tensor for index, tensor in enumerate(Various()(leaf))})
    close(trace.input_gradients["input"], torch.autograd.grad(loss, leaf)[0])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_torch_checkpointing_is_refused_in_words() -> None:
    with pytest.raises(
        ParityError, match=r"inner is computed again in the backward pass .*checkpointing off"
    ):
        full_trace(torch_model(Checkpointed()), np.ones((2, 4)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_torch_weights_made_from_parameters(norm) -> None:
    module = nn.Sequential(norm(nn.Linear(4, 3)))
    x = np.random.default_rng(0).normal(size=(2, 4))
    trace = full_trace(torch_model(module), x)
    (value,) = trace.values
    assert set(value.parameters) == set(trace.parameters) == {name for name, _ in module.named_parameters()}
    twin = copy.deepcopy(trace.parameters)
    scale, direction, bias = (
        next(a for name, a in twin.items() if name.endswith(ends))
        for ends in (("_g", "original0"), ("_v", "original1"), "bias")
    )
    weight = scale * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    close(value.value, x @ weight.T + bias)


def numpy_network(fast: bool) -> numpy_ref.resnet.ResNet:
    return numpy_ref.resnet8(3, rng=np.random.default_rng(0), fast=fast)


@pytest.mark.parametrize(("fast", "train"), [(True, True), (False, False)])
def test_numpy_agrees_with_torch(fast: bool, train: bool) -> None:
    x = np.random.default_rng(1).normal(size=(2, 32, 32, 3))
    network = numpy_network(fast)
    module = torch_oracle.resnet8(3)
    module.load_state_dict(
        {n: torch.tensor(a) for n, a in numpy_ref.state_dict(network).items()}, strict=False
    )
    a = full_trace(numpy_model(network, train=train), x)
    b = full_trace(torch_model(module, train=train), x.transpose(0, 3, 1, 2))
    assert {v.value.dtype for v in a.values} == {np.dtype(np.float64)}
    shared = {name for name in by_name(a).keys() & by_name(b).keys() if "relu" not in name}
    assert {"conv1", "layer1.0.conv1", "layer1.0.conv2", "layer3.0.conv2", "fc"} <= shared
    for name in sorted(shared):
        one, two = by_name(a)[name], by_name(b)[name]
        if one.operation == "BatchNormAddRelu":
            continue
        np.testing.assert_allclose(channels_first(one.value), two.value, rtol=1e-8, atol=1e-8)
        assert two.gradient is not None
        np.testing.assert_allclose(channels_first(one.gradient), two.gradient, rtol=1e-8, atol=1e-8)
    dx = channels_first(a.input_gradients["input"])
    np.testing.assert_allclose(dx, b.input_gradients["input"], rtol=1e-8, atol=1e-8)
    assert a.parameter_gradients.keys() == b.parameter_gradients.keys()
    for name, gradient in a.parameter_gradients.items():
        expected = b.parameter_gradients[name]
        actual = to_torch_layout(gradient)
        np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-7)
    assert a.state.keys() == b.state.keys()
    for name, array in a.state.items():
        np.testing.assert_allclose(array, b.state[name], rtol=1e-10)


def test_numpy_replacement_is_local_and_nothing_changes() -> None:
    x = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    network = numpy_network(fast=False)
    state, copied = numpy_ref.state_dict(network), x.copy()
    attributes = [set(vars(layer)) for layer in network.walk()]
    model = numpy_model(network, train=True)
    before = full_trace(model, x)
    old = by_name(before)
    other = np.random.default_rng(2).normal(size=old["layer1.0.bn1"].value.shape)
    trace = full_trace(model, x, replace={"layer1.0.bn1": other}, replace_gradients={"fc": np.ones((2, 3))})
    new = by_name(trace)
    np.testing.assert_array_equal(new["layer1.0.bn1"].value, old["layer1.0.bn1"].value)
    np.testing.assert_array_equal(new["layer1.0.relu1"].value, np.maximum(other, 0))
    close(new["fc"].gradient, np.asarray(old["fc"].gradient))
    close(trace.parameter_gradients["fc.bias"], np.full(3, 2.0))
    assert old["conv1"].attributes.items() >= {"stride": (1, 1), "padding": (1, 1)}.items()
    assert old["layer1.0.bn1"].attributes["training"] is True
    assert old["conv1"].where.startswith("convolution.py:")
    assert old["layer1.0.bn1"].inputs == ("layer1.0.conv1",)
    np.testing.assert_array_equal(x, copied)
    assert [set(vars(layer)) for layer in network.walk()] == attributes
    for name, array in numpy_ref.state_dict(network).items():
        np.testing.assert_array_equal(array, state[name])
    for name, array in before.state_before.items():
        np.testing.assert_array_equal(array, state[name])
        assert (before.state[name] != array).any()
    assert list(before.state_before) == list(before.state) != []
    assert not any(parameter.grad.any() for parameter in network.parameters())


class Plain:
    """A layer that knows nothing of this project: no `train`, no names."""

    def __init__(self) -> None:
        self.inner = [Scale(2.0), Scale(3.0)]

    def forward(self, x):
        for layer in self.inner:
            x = layer.forward(x)
        return x + 1

    def backward(self, dy):
        for layer in reversed(self.inner):
            dy = layer.backward(dy)
        return dy

    def parameters(self):
        return [layer.factor for layer in self.inner]


class Factor:
    def __init__(self, value: float) -> None:
        self.value, self.grad = np.array([value], np.float32), None


class Scale:
    def __init__(self, value: float) -> None:
        self.factor = Factor(value)

    def forward(self, x):
        self.x = x
        return x * self.factor.value

    def backward(self, dy):
        self.factor.grad = self.factor.grad + (dy * self.x).sum()
        return dy * self.factor.value


def test_numpy_layers_of_anyone() -> None:
    trace = numpy_model(Plain()).run(
        np.array([1.0, 2.0]), float64=True, cotangents={"output": np.array([1.0, 10.0])}
    )
    assert [(v.name, v.operation, v.inputs, v.parameters) for v in trace.values] == [
        ("inner.0", "Scale", ("input",), ("inner.0.factor",)),
        ("inner.1", "Scale", ("inner.0",), ("inner.1.factor",)),
        ("Plain", "Plain", ("input",), ()),
    ]
    assert trace.output_values == {"output": "Plain"}
    close(trace.outputs["output"], np.array([7.0, 13.0]))
    close(trace.input_gradients["input"], np.array([6.0, 60.0]))
    close(trace.parameter_gradients["inner.0.factor"], np.array([63.0]))
    close(trace.parameter_gradients["inner.1.factor"], np.array([42.0]))
    with pytest.raises(ParityError, match=r"forward, backward and parameters, got Factor; .*function_model"):
        numpy_model(Factor(1.0))
    with pytest.raises(ParityError, match="does not run on these inputs: ValueError: expected channels last"):
        numpy_model(numpy_layers.BatchNorm(3)).run(np.ones((2, 4)))


def test_function_model_has_outputs_alone() -> None:
    model = function_model(lambda x, tokens: {"sum": x + 1, "tensor": torch.tensor(x), "tokens": tokens})
    assert (model.framework, model.records) == ("function", False)
    for float64, dtype in ((False, np.float32), (True, np.float64)):
        trace = model.run({"x": np.ones(3), "tokens": np.arange(3)}, float64=float64)
        assert trace.output_values == {"output.sum": "", "output.tensor": ""}
        assert {array.dtype for array in trace.outputs.values()} == {np.dtype(dtype)}
        assert list(trace.inputs) == ["input.x"]
    with pytest.raises(ParityError, match="the function does not run on these inputs: TypeError"):
        model.run(np.ones(3))


class Small(nn.Module):
    """A convolution, batch norm, ReLU, a gate, a head; the backward pass with one fault."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.fault = fault

    def forward(self, x):
        x = self.conv(x)
        x = self._norm_of_constants(x) if self.fault == "batch-statistics-constant" else self.bn(x)
        x = StraightThrough.apply(x) if self.fault == "wrong-custom-derivative" else F.relu(x)
        x = (x.detach() if self.fault == "stop-gradient" else x).mean((2, 3))
        gate = torch.sigmoid(x)
        return self.fc(x * (gate.detach() if self.fault == "stop-gradient of a gate" else gate))

    def _norm_of_constants(self, x):
        mean, var, unbiased = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False), x.var((0, 2, 3))
        for name, batch in (("running_mean", mean), ("running_var", unbiased)):
            self.bn.get_buffer(name).lerp_(batch.detach(), 0.1)
        scale = self.bn.weight / (var.detach() + self.bn.eps).sqrt()
        rows = (x - mean.detach()[:, None, None]) * scale[:, None, None]
        return rows + self.bn.bias[:, None, None]


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, dy):
        return dy


class ConstantStatistics(numpy_layers.BatchNorm):
    def backward(self, dy):
        super().backward(dy)
        return dy * self.weight.value * self.saved[1]


class StraightReLU(numpy_layers.ReLU):
    def backward(self, dy):
        return dy


class StoppedReLU(numpy_layers.ReLU):
    def backward(self, dy):
        return np.zeros_like(dy)


class Gate(numpy_layers.Layer):
    """x * sigmoid(x)."""

    def __init__(self) -> None:
        self.sigmoid = numpy_layers.Sigmoid()

    def forward(self, x, train=False):
        gate = self.sigmoid.forward(x, train)
        self.save_for_backward(x, gate)
        return x * gate

    def backward(self, dy):
        x, gate = self.saved
        return dy * gate + self.sigmoid.backward(dy * x)


NUMPY_FAULTS: dict[str, dict[str, type[numpy_layers.Layer]]] = {
    "batch-statistics-constant": {"norm": ConstantStatistics},
    "wrong-custom-derivative": {"relu": StraightReLU},
    "stop-gradient": {"relu": StoppedReLU},
}


def numpy_port(module: Small, norm: Any = numpy_layers.BatchNorm, relu: Any = numpy_layers.ReLU) -> Model:
    conv = numpy_layers.Conv2d(3, 4, 3, bias=True, rng=None)
    head = numpy_layers.Linear(4, 5, rng=None)
    port = numpy_layers.Sequential(conv, norm(4), relu(), numpy_layers.GlobalAvgPool2d(), Gate(), head)
    own = {"0": "conv", "1": "bn", "5": "fc"}
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    names = {name: ".".join([own[name[0]], name[2:]]) for name in numpy_ref.state_dict(port)}
    numpy_ref.load_state_dict(port, {name: state[theirs] for name, theirs in names.items()})
    return numpy_model(port, train=True)


CASES = [(adapter, fault) for adapter in ("torch", "numpy") for fault in ("", *NUMPY_FAULTS)]


@pytest.mark.parametrize(("adapter", "fault"), [*CASES, ("torch", "stop-gradient of a gate")])
def test_a_fault_of_the_backward_pass_alone_is_placed(adapter: str, fault: str) -> None:
    """Those of JAX, Linen and NNX are in the labeled set."""
    torch.manual_seed(0)
    reference = Small()
    x = np.random.default_rng(0).normal(size=(4, 3, 6, 6)).astype(np.float32)
    if adapter == "torch":
        faulty = Small(fault)
        faulty.load_state_dict(reference.state_dict())
        first = compare(torch_model(reference), torch_model(faulty), x).first_difference
    else:
        port = numpy_port(reference, **NUMPY_FAULTS.get(fault, {}))
        first = compare(torch_model(reference), port, x, x.transpose(0, 2, 3, 1)).first_difference
    if not fault:
        assert first is None
        return
    places = {"batch-statistics-constant": "bn", "wrong-custom-derivative": "relu", "stop-gradient": "relu"}
    assert first is not None
    assert (first.what, first.cause_id) == ("input gradient", fault.removesuffix(" of a gate"))
    assert first.reference == places.get(fault, "sigmoid") or fault == "stop-gradient"
    assert first.where.startswith("test_parity_package_adapters.py:")


def test_a_run_of_pytorch_keeps_no_tensor_alive() -> None:
    """A hook that holds the recorder is a cycle that Python's garbage collector does not see."""

    def alive() -> int:
        gc.collect()
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

    model = torch_model(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()))
    x, values = np.ones((2, 3), np.float32), {"0": np.ones((2, 4))}
    ones = {"output": np.ones((2, 4))}
    model.run(x, cotangents=ones, replace=values, replace_gradients=values)
    before = alive()
    model.run(x, cotangents=ones, replace=values, replace_gradients=values)
    assert alive() == before
