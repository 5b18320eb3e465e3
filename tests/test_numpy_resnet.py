"""The networks of the NumPy engine: names, counts, types, initial weights.

Their numbers are compared with JAX's and PyTorch's in `test_parity.py`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jax_resnet
import numpy_ref
import torch_oracle
from numpy_ref import cross_entropy, load_state_dict, parameter_count, state_dict
from numpy_ref.layers import Layer
from tests.helpers.comparing import assert_close, nchw
from tests.tolerances import FLOAT32_NETWORK

THIN: dict[str, Any] = {"width": 4, "stage_sizes": (1, 2, 1, 1)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bottleneck": ("resnet50", THIN),
    "basic": ("resnet18", THIN),
    "stride in 1x1": ("resnet50", {**THIN, "stride_in_1x1": True}),
    "small stem": ("resnet50", {**THIN, "small_images": True}),
    "no batch norm": ("resnet50", {**THIN, "batch_norm": False}),
    "basic, no batch norm": ("resnet18", {**THIN, "batch_norm": False}),
    "cifar": ("resnet20", {"width": 4}),
    "cifar, no batch norm": ("resnet20", {"width": 4, "batch_norm": False}),
    "cnn": ("cnn", {"width": 4, "image_size": (40, 33)}),
}


def build(name: str, classes: int = 5, seed: int = 0, **options: Any) -> Any:
    return numpy_ref.MODELS[name](classes, 3, rng=np.random.default_rng(seed), **options)


@pytest.mark.parametrize("name", numpy_ref.MODELS)
def test_names_shapes_and_counts_are_the_oracles(name):
    classes = 1000 if name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152") else 10
    with torch.device("meta"):
        reference = torch_oracle.MODELS[name](classes, 3)
        expected = {
            key: tuple(tensor.shape)
            for key, tensor in reference.state_dict().items()
            if not key.endswith("num_batches_tracked")
        }
    model = build(name, classes)
    assert {key: array.shape for key, array in state_dict(model).items()} == expected
    assert parameter_count(model).total == torch_oracle.parameter_count(reference).total
    if name == "resnet101":
        assert parameter_count(model).total == 44_549_160
        for parameter in list(model.named_parameters().values())[:-2]:
            parameter.trainable = False
        assert parameter_count(model) == (44_549_160, 2048 * 1000 + 1000, 44_549_160 - 2048 * 1000 - 1000)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_every_array_keeps_the_networks_type(case, fast, dtype, monkeypatch):
    """No silent upcast: whatever a layer takes, gives or keeps."""
    name, options = CASES[case]
    seen: set[str] = set()
    save = Layer.save_for_backward

    def watch(self: Layer, *values: Any) -> None:
        for value in values:
            for array in value if isinstance(value, list) else [value]:
                if isinstance(array, np.ndarray) and array.dtype.kind == "f":
                    seen.add(str(array.dtype))
        save(self, *values)

    monkeypatch.setattr(Layer, "save_for_backward", watch)
    model = build(name, **options, dtype=dtype, fast=fast)
    x = np.random.default_rng(0).normal(size=(2, 40, 33, 3)).astype(np.float16)
    for train in (False, True):
        logits = model.forward(x, train)
        loss, dlogits = cross_entropy(logits, np.array([0, 1]))
        arrays = [logits, loss, dlogits, model.backward(dlogits), *(p.grad for p in model.parameters())]
        seen |= {str(array.dtype) for array in (*arrays, *state_dict(model).values())}
    assert seen == {np.dtype(dtype).name}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20", "cnn"])
def test_initial_weights_are_those_of_the_jax_engine(name):
    """Bit for bit, from the same seed, in either precision."""
    options = {"width": 4} if name in ("resnet20", "cnn") else {**THIN, "residual_scale": 0.2}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            model = jax_resnet.MODELS[name](5, 3, **options, rngs=nnx.Rngs(7), dtype=jnp.dtype(dtype))
            expected = jax_resnet.state_dict(model)
        found = state_dict(build(name, seed=7, **options, dtype=dtype))
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            assert found[key].dtype == array.dtype
            assert found[key].tobytes() == array.tobytes(), key


def test_a_state_dict_that_does_not_fit_changes_nothing():
    model = build("resnet20", width=4)
    before = state_dict(model)
    other = {**state_dict(build("resnet20", width=4, seed=1)), "extra": np.zeros(1)}
    other["bn1.bias"] = np.zeros(5)
    del other["conv1.weight"]
    with pytest.raises(
        ValueError, match=r"bn1.bias has shape \[5\], not \[4\]; missing conv1.weight; unexpected"
    ):
        load_state_dict(model, other)
    for name, array in state_dict(model).items():
        np.testing.assert_array_equal(array, before[name])
    renamed = {name.replace("fc.", "linear."): array + 1 for name, array in before.items()}
    load_state_dict(model, {**renamed, "bn1.num_batches_tracked": np.array(3)})
    np.testing.assert_array_equal(state_dict(model)["fc.weight"], before["fc.weight"] + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": np.float16}, "dtype must be float32 or float64"),
        ({"stem": "large"}, "stem must be"),
        ({"shortcut": "none"}, "shortcut must be"),
        ({"stage_sizes": ()}, "stage_sizes must be"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    arguments = {"block": numpy_ref.BasicBlock, "stage_sizes": (1,), "num_classes": 2, **options}
    with pytest.raises(ValueError, match=message):
        numpy_ref.ResNet(**arguments, rng=np.random.default_rng(0))


def test_backward_forgets_what_forward_kept():
    model = build("resnet20", width=4)
    model.backward(model.forward(np.ones((2, 32, 32, 3)), train=True))
    with pytest.raises(RuntimeError, match="needs a forward"):
        model.backward(np.ones((2, 5), np.float32))


def test_resnet101_in_float32_against_pytorch_in_float64():
    """At full width and depth, in evaluation mode, where no statistics of few values magnify the rounding."""
    model = numpy_ref.resnet101(10, 1, rng=np.random.default_rng(0), residual_scale=0.2)
    reference = torch_oracle.resnet101(10, 1).double().eval()
    torch_oracle.load_state_dict(reference, state_dict(model))
    x = np.random.default_rng(1).normal(size=(2, 32, 32, 1)).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(nchw(x).astype(np.float64)))
    logits = model.forward(x)
    assert math.isfinite(float(logits.sum()))
    assert_close("logits", logits, expected, FLOAT32_NETWORK)
