"""`parity.compare`: a small network and its ports, right and with one fault each; saved references."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import parity
from experiment.__main__ import main as experiment
from parity.__main__ import main

X = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
NHWC = X.transpose(0, 2, 3, 1)


class Net(torch.nn.Module):
    """Convolution with stride, batch norm, a shortcut around a convolution with GELU, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.bn = torch.nn.BatchNorm2d(6)
        self.conv2 = torch.nn.Conv2d(6, 6, 3, padding=1)
        self.fc = torch.nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv1(x)))
        x = x + F.gelu(self.conv2(x))
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def make_reference() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        for name in ("weight", "bias"):
            torch.nn.init.normal_(getattr(net.bn, name), 1.0, 0.3)
    return net


def weights(net: Net) -> dict[str, np.ndarray]:
    """OIHW to HWIO, [out, in] to [in, out]."""
    order: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        4: lambda a: a.transpose(2, 3, 1, 0),
        2: np.transpose,
    }
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    return {name: order.get(a.ndim, np.asarray)(a) for name, a in arrays.items()}


def exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


@jax.custom_vjp
def wrong_gelu(x: jax.Array) -> jax.Array:
    """GELU with half its derivative."""
    return exact_gelu(x)


wrong_gelu.defvjp(lambda x: (exact_gelu(x), x), lambda x, g: (jax.vjp(exact_gelu, x)[1](g)[0] / 2,))


def port(fault: str = "") -> Callable[[Any, Any, Any], Any]:
    """The same network in JAX, with running statistics as state."""

    def conv(x: Any, w: Any, stride: int, padding: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=numbers)

    def f(p: Any, state: Any, x: Any) -> Any:
        one = ((1, 1), (1, 1))
        x = conv(x, p["conv1.weight"], 2, "SAME" if fault == "same-padding" else one) + p["conv1.bias"]
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        n = x.size // x.shape[-1]
        share = 0.9 if fault == "momentum-convention" else 0.1
        state = {
            "mean": state["mean"] + share * (mean - state["mean"]),
            "var": state["var"] + share * (var * n / (n - 1) - state["var"]),
        }
        if fault == "batch-statistics-constant":
            mean, var = jax.lax.stop_gradient((mean, var))
        x = (x - mean) / jnp.sqrt(var + (1e-3 if fault == "epsilon" else 1e-5))
        x = jnp.maximum(x * p["bn.weight"] + p["bn.bias"], 0)
        y = conv(x, p["conv2.weight"], 1, one) + p["conv2.bias"]
        y = y.astype(jnp.bfloat16).astype(y.dtype) if fault == "bfloat16-cast" else y
        wrong = fault == "wrong-custom-derivative"
        x = x + (wrong_gelu(y) if wrong else jax.nn.gelu(y, approximate=fault == "gelu-tanh"))
        return x.mean((1, 2)) @ p["fc.weight"] + p["fc.bias"], state

    return f


def candidate(fault: str = "", net: Net | None = None, **changed: np.ndarray) -> parity.Model:
    from parity.jax_adapter import jax_model

    state = {"mean": np.zeros(6, np.float32), "var": np.ones(6, np.float32)}
    return jax_model(port(fault), {**weights(net or make_reference()), **changed}, state)


def reference(net: Net | None = None) -> parity.Model:
    from parity.torch_adapter import torch_model

    return torch_model(net or make_reference())


def test_a_right_port_agrees_and_everything_stays_as_it_was() -> None:
    net = make_reference()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    random_state, x64 = torch.random.get_rng_state(), jax.config.jax_enable_x64  # type: ignore[attr-defined]
    report = parity.compare(reference(net), candidate(net=net), X, NHWC)
    assert report.agrees, str(report)
    assert [stage.value.name for stage in report.stages] == [
        *("conv1", "bn", "relu", "conv2", "gelu", "add", "mean", "fc")
    ]
    compared = {(tensor.what, tensor.reference) for tensor in report.tensors}
    assert {("parameter gradient", name) for name, _ in net.named_parameters()} <= compared
    assert {("input gradient", "input"), ("statistics", "bn.running_var")} <= compared
    assert not report.unmatched
    assert "The models agree" in str(report)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert net.training
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert jax.config.jax_enable_x64 == x64  # type: ignore[attr-defined]


FAULTS = {  # fault: what departs, the reference's stage or tensor
    "same-padding": ("output", "conv1"),
    "epsilon": ("output", "bn"),
    "gelu-tanh": ("output", "gelu"),
    "bfloat16-cast": ("output", "gelu"),
    "momentum-convention": ("statistics", "bn.running_mean"),
    "batch-statistics-constant": ("input gradient", "bn"),
    "wrong-custom-derivative": ("input gradient", "gelu"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_placed_and_its_cause_named(fault: str) -> None:
    difference = parity.compare(reference(), candidate(fault), X, NHWC).first_difference
    assert difference is not None
    assert (difference.what, difference.reference) == FAULTS[fault], str(difference)
    assert difference.cause_id == fault, str(difference)
    if difference.what == "output":
        assert difference.where.startswith("test_parity_package.py:")


def test_weights_are_audited_first() -> None:
    arrays = weights(make_reference())
    square = arrays["conv2.weight"].transpose(0, 1, 3, 2)
    rounded = np.asarray(jnp.asarray(arrays["fc.weight"], jnp.bfloat16), np.float32)
    for changed, identifier in (
        ({"conv2.weight": square}, "kernel-transposed"),
        ({"fc.bias": np.zeros(5, np.float32)}, "weight-not-loaded"),
        ({"fc.weight": rounded}, "weight-of-lower-precision"),
    ):
        difference = parity.compare(reference(), candidate(**changed), X, NHWC).first_difference
        assert difference is not None
        assert (difference.what, difference.reference) == ("parameter", next(iter(changed)))
        assert difference.cause_id == identifier, str(difference)


def test_assert_agrees_gives_the_verdict() -> None:
    parity.assert_agrees(reference(), candidate(), X, NHWC, gradients=False)
    with pytest.raises(
        AssertionError, match=r"(?s)^The models first differ at the output of bn .*epsilon 0\.001"
    ):
        parity.assert_agrees(reference(), candidate("epsilon"), X, NHWC, gradients=False)


def test_a_saved_reference_serves_without_its_framework(tmp_path: Path) -> None:
    parity.save(tmp_path / "reference.safetensors", reference(), X)
    saved = parity.saved_model(tmp_path / "reference.safetensors")
    assert parity.compare(saved, candidate(), X, NHWC).agrees
    difference = parity.compare(saved, candidate("gelu-tanh"), X, NHWC).first_difference
    assert difference is not None
    assert (difference.reference, difference.cause_id) == ("gelu", "gelu-tanh")
    with pytest.raises(parity.ParityError, match="of seed 0: give seed=0"):
        parity.compare(saved, candidate(), X, NHWC, seed=1)
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(parity.ParityError, match="cannot be read"):
        parity.saved_model(tmp_path / "other.safetensors")


def test_a_file_of_two_models_is_compared_and_the_page_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "models.py"
    file.write_text(
        "import numpy as np\nimport parity\n"
        "reference = parity.function_model(lambda x: x * 2)\n"
        "candidate = parity.function_model(lambda x: x * FACTOR)\n"
        "inputs = np.ones((2, 3), np.float32)\nFACTOR = 2\n"
    )
    assert main([str(file)]) == 0
    file.write_text(file.read_text().replace("FACTOR = 2", "FACTOR = 3"))
    assert main([str(file), "--html", str(tmp_path / "page.html")]) == 1
    out = capsys.readouterr().out
    assert "The models first differ at the output: off by 5.0e-01" in out
    assert experiment(["parity", str(file)]) == 1  # the same by the other command
    assert capsys.readouterr().out in out
    assert experiment(["parity", str(file), "--train"]) == 2
    assert "give it no other argument" in capsys.readouterr().err
    page = (tmp_path / "page.html").read_text()
    assert "The models first differ at output" in page
    assert "http" not in page.replace("http-equiv", "")
    (tmp_path / "empty.py").write_text("")
    for argument, fault in (("absent.py", "no such file"), ("empty.py", "does not define reference")):
        assert main([str(tmp_path / argument)]) == 2
        assert fault in capsys.readouterr().err


def test_what_cannot_be_compared_is_said_in_one_paragraph() -> None:
    double = parity.function_model(lambda x: x * 2)
    for other, words in (
        (parity.function_model(lambda x: (x, x)), "gives 1 outputs .* let both return the same"),
        (parity.function_model(lambda x: x[:1]), "which no order of axes makes equal"),
    ):
        with pytest.raises(parity.ParityError, match=words):
            parity.compare(double, other, X)
    with pytest.raises(parity.ParityError, match="the reference itself gives NaN or infinity"):
        parity.compare(parity.function_model(lambda x: x * np.nan), double, X)
    report = parity.compare(double, parity.function_model(lambda x: x * np.nan), X)
    assert not report.agrees


def test_frameworks_are_imported_only_by_their_adapters() -> None:
    code = "import sys, parity; print(sorted({'jax', 'torch', 'flax', 'optax'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_inputs_by_keyword_are_paired_by_name() -> None:
    """JAX sorts a dictionary, PyTorch does not."""

    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
            return x * torch.tanh(by)

    from parity.jax_adapter import jax_model
    from parity.torch_adapter import torch_model

    inputs = {"x": X[0, 0], "by": X[1, 1]}
    port = jax_model(lambda params, *, x, by: x * jnp.tanh(by), {})
    report = parity.compare(torch_model(Scaled()), port, inputs)
    assert report.agrees, str(report)
    gradients = [tensor for tensor in report.tensors if tensor.what == "input gradient"]
    assert [(t.reference, t.candidate) for t in gradients] == [("input.x",) * 2, ("input.by",) * 2]


def test_a_name_that_a_model_does_not_have_is_refused_with_the_nearest() -> None:
    with pytest.raises(parity.ParityError, match=r"names: the reference has no value con1; .* conv1"):
        parity.compare(reference(), candidate(), X, NHWC, names={"con1": "add"})


def test_a_page_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "models.py"
    file.write_text(
        "import numpy as np\nimport parity\nreference = candidate = parity.function_model(np.tanh)\n"
        "inputs = np.ones(3, np.float32)\n"
    )
    assert main([str(file), "--html", str(tmp_path / "absent" / "page.html")]) == 2
    assert "page.html cannot be written (No such file or directory)" in capsys.readouterr().err


def test_recorded_tensors_are_compared_within_the_limits_given(tmp_path: Path) -> None:
    ours = {"stem": np.array([[1.0, -4.0], [0.0, 2.0]]), "zeros": np.zeros(2), "logits": np.array([1, 2])}
    theirs = {name: array.astype(np.float32) for name, array in ours.items()}
    assert parity.compare_tensors(ours, theirs, 0).verdict == "The models agree: 3 tensors."
    theirs["stem"] = ours["stem"] + [[0, 0], [1, 0.5]]
    theirs["zeros"] = np.array([0, 1e-3])  # absolute
    report = parity.compare_tensors(ours, theirs, {"stem": 0.2, "zeros": 1e-2, "logits": 0})
    assert [(t.reference, t.error, t.departs) for t in report.tensors] == [
        ("stem", 0.25, True),
        ("zeros", 1e-3, False),
        ("logits", 0, False),
    ]
    assert str(report.first_difference) == (
        "The models first differ at the tensor stem: off by 2.5e-01 of its largest magnitude, "
        "allowed 2.0e-01, most at [1, 0].\n1.0, not 0.0; the tensor's largest magnitude is 4."
    )
    assert "tensor of zeros: 1.0e-03, allowed 1.0e-02\n" in str(report)
    report.save(tmp_path / "page.html")
    assert "<h2>Tensors</h2>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (None, "tensor a.\nThe candidate has none."),
        (np.zeros((2, 1)), "tensor a.\nShape [2, 1], not [2]."),
        (
            np.array([0, np.nan]),
            "off by inf of its largest magnitude, allowed 1.0e+09, most at [1].\nnan, not 1.0;",
        ),
        (np.array([0, np.inf]), "most at [1].\ninf, not 1.0;"),
    ],
)
def test_recorded_tensors_that_no_limit_allows(tensor: np.ndarray | None, words: str) -> None:
    theirs = {"extra": np.ones(1)} if tensor is None else {"a": tensor}
    report = parity.compare_tensors({"a": np.arange(2.0)}, theirs, 1e9)
    assert words in report.verdict
    assert report.unmatched == (["a"] if tensor is None else [])
    assert ("only the candidate has: extra" in str(report)) == (tensor is None)
    same = {"a": np.array([np.nan])}
    assert not parity.compare_tensors(same, same, 1e9).agrees


def test_noise_is_also_that_of_another_order_of_axes_in_memory() -> None:
    seen: list[bool] = []

    class Viewed(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self[0](x)
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x.view(len(x), -1) if self.training else x.flatten(1)  # `view` refuses the other order

    module = Viewed(torch.nn.Conv2d(3, 4, 3))
    for train in (True, False):
        seen.clear()
        model = parity.torch_model(module, train=train)
        assert parity.compare(model, model, X).agrees
        assert True in seen
        assert False in seen


def test_what_has_nothing_in_common_with_the_reference_is_refused() -> None:
    other = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, 7), torch.nn.ReLU(), torch.nn.Linear(7, 5)
    )
    with pytest.raises(parity.ParityError, match=r"nothing in common .*\. Compare a model with a port of it"):
        parity.compare(reference(), parity.function_model(lambda x: x[:, 0, 0, :5]), X)
    first = parity.compare(reference(), parity.torch_model(other), X).first_difference
    assert first is not None
    assert str(first).endswith("The candidate has no parameter like conv1.weight [6, 3, 3, 3]")


def test_a_weight_that_is_not_finite_is_named() -> None:
    net = make_reference()
    with torch.no_grad():
        net.fc.weight[0, 0] = torch.nan
    first = parity.compare(reference(), parity.torch_model(net), X).first_difference
    assert str(first).startswith("The models first differ at the parameter fc.weight, at test_parity")
    assert str(first).endswith(".\nfc.weight is NaN or infinite in 1 of its 30 numbers")


NO_MODULE: Any = 3


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (lambda: (make_reference(), reference()), "the reference is a Net: put it into parity.torch_model"),
        (lambda: (reference(), 3), "the candidate is a int: put it into"),
        (
            lambda: (parity.torch_model(NO_MODULE), reference()),
            "torch_model takes a torch.nn.Module, not int",
        ),
        (lambda: (parity.function_model(np.argmax),) * 2, "gives no floating-point number: .* before argmax"),
    ],
)
def test_what_is_no_model_is_refused(models: Callable[[], tuple[Any, Any]], words: str) -> None:
    def compare() -> None:
        left, right = models()
        parity.compare(left, right, X)

    with pytest.raises(parity.ParityError, match=words):
        compare()
    with pytest.raises(parity.ParityError, match="on inputs that are not empty"):
        parity.compare(reference(), reference(), X[:0])


def test_a_single_module_is_a_model() -> None:
    """Its running statistics have no module's name before theirs."""
    left, right = (parity.torch_model(torch.nn.BatchNorm2d(3, momentum=share)) for share in (0.1, 0.9))
    first = parity.compare(left, right, X).first_difference
    assert first is not None
    assert (first.reference, first.cause_id) == ("running_mean", "momentum-convention")


def test_inputs_in_any_memory_order_and_byte_order_are_taken() -> None:
    for x in (X[:, :, ::-1], X.astype(">f4"), np.asfortranarray(X)):
        assert parity.compare(reference(), reference(), x).agrees
