"""NumPy, JAX and PyTorch agree, layer by layer and network by network: each pair, every tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_resnet import layers
from tests.helpers.comparing import assert_all_close, assert_all_near
from tests.parity import cases, jax_side
from tests.parity.case import Case, make_inputs
from tests.parity.compare import check, check_in_float32
from tests.parity.engines import ENGINES, engines_for
from tests.tolerances import BFLOAT16_GRADIENT, BFLOAT16_NETWORK


def table(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@table(cases.LAYERS)
def test_layers(case: Case, precision: str) -> None:
    """float32 against float64 too, of the same numbers."""
    check(replace(case, precision=precision))


@table(cases.SINGLE_VALUES)
def test_batch_norm_over_one_value_is_an_error_in_training_only(case: Case) -> None:
    inputs = make_inputs(case)
    for engine in engines_for(case):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            ENGINES[engine](case, inputs)
    check(replace(case, train=False))


@table(cases.STAGES)
def test_blocks_and_stages(case: Case) -> None:
    check(case)


@table(cases.NETWORKS)
def test_networks(case: Case) -> None:
    results = check(case)
    stages = list(results["torch"])[: list(results["torch"]).index("loss")]
    assert list(results["numpy"])[: len(stages)] == stages  # in this order, too


@pytest.mark.slow
@table(cases.FULL)
def test_networks_at_full_width(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [*cases.SINGLE_PRECISION, pytest.param(cases.FULL[0], marks=pytest.mark.slow)],
    ids=lambda case: case.name,
)
def test_networks_in_float32_are_as_exact_as_pytorchs(case: Case) -> None:
    check_in_float32(case)


def test_networks_in_bfloat16_are_close_to_pytorchs_in_float64() -> None:
    """NumPy has no such type: JAX alone."""
    case = replace(next(case for case in cases.NETWORKS if case.name == "resnet-small-images"), seed=1)
    inputs = make_inputs(replace(case, precision="bfloat16"))
    found, truth = ENGINES["jax"](replace(case, precision="bfloat16"), inputs), ENGINES["truth"](case, inputs)
    for name, array in found.items():
        kept = name == "logits" or name.startswith(("grad.", "after.", "loss", "dx"))
        assert array.dtype == (np.float32 if kept else jax.numpy.bfloat16), name
    gradients = {name for name in truth if name.startswith("grad.")}
    forward = truth.keys() - gradients - {"dx"}
    pick = [{name: each[name] for name in forward} for each in (found, truth)]
    assert_all_close("forward", pick[0], pick[1], BFLOAT16_NETWORK)
    pick = [{name: each[name] for name in gradients} for each in (found, truth)]
    assert_all_near("gradient", pick[0], pick[1], BFLOAT16_GRADIENT)


def test_the_other_convolution_is_another_program() -> None:
    """Else the comparison of JAX's two forms would be one of a form with itself."""
    case = next(case for case in cases.STAGES if case.name == "bottleneck-train")
    graph, state = nnx.split(jax_side.build(replace(case, precision="float32")))
    x = np.zeros(case.shape, np.float32)

    def program(other: bool) -> str:
        def run(state: Any, x: Any) -> Any:  # a new function: JAX would remember the first form's
            model: Any = nnx.merge(graph, state)
            return model(x)

        with jax_side.convolutions(other):
            return str(jax.make_jaxpr(run)(state, x))

    for other in (False, True):
        assert ("conv_general_dilated" in program(other)) == (layers.on_cpu() == other)


# Shapes that hypothesis draws

sizes = st.integers(1, 4)


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """A kernel, stride and padding, and an image that it fits."""
    kernel = (draw(sizes), draw(sizes))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    size = tuple(draw(st.integers(max(1, k - 2 * p), 7)) for k, p in zip(kernel, padding, strict=True))
    options = {"kernel_size": kernel, "stride": (draw(sizes), draw(sizes)), "padding": padding}
    return {"size": size, "options": options}


@settings(max_examples=10)
@given(window=windows(), n=sizes, channels=st.tuples(sizes, sizes), bias=st.booleans())
def test_drawn_convolutions(window: dict[str, Any], n: int, channels: tuple[int, int], bias: bool) -> None:
    options = {"out_channels": channels[1], **window["options"], "bias": bias}
    check(Case("drawn-convolution", "conv", (n, *window["size"], channels[0]), options))


@settings(max_examples=10)
@given(shape=st.tuples(sizes, st.integers(1, 40)), features=sizes)
def test_drawn_linear_layers(shape: tuple[int, int], features: int) -> None:
    check(Case("drawn-linear", "linear", shape, {"out_features": features}))


@settings(max_examples=10)
@given(
    pixels=st.one_of(st.tuples(st.integers(2, 5)), st.tuples(st.integers(2, 4), sizes, sizes)),
    channels=st.integers(1, 70),
    train=st.booleans(),
    eps=st.sampled_from([1e-5, 0.1]),
    momentum=st.floats(0.01, 1),
)
def test_drawn_batch_norms(
    pixels: tuple[int, ...], channels: int, train: bool, eps: float, momentum: float
) -> None:
    options = {"eps": 0.1 if np.prod(pixels) < 4 else eps, "momentum": momentum}
    check(Case("drawn-batch-norm", "batch_norm", (*pixels, channels), options, train, values="shifted"))


@settings(max_examples=10)
@given(window=windows(), n=sizes, channels=sizes, values=st.sampled_from(["normal", "ties", "negative"]))
def test_drawn_poolings(window: dict[str, Any], n: int, channels: int, values: str) -> None:
    """JAX pools by square windows only, so both kinds are drawn at once."""
    square = {name: sides[0] for name, sides in window["options"].items()}
    shape = (n, *(max(side, square["kernel_size"]) for side in window["size"]), channels)
    for options in (window["options"], square):
        check(Case("drawn-max-pool", "max_pool", shape, options, values=values))


@settings(max_examples=10)
@given(n=sizes, classes=st.integers(1, 9), values=st.sampled_from(["normal", "large"]))
def test_drawn_losses(n: int, classes: int, values: str) -> None:
    check(Case("drawn-loss", "loss", (n, classes), values=values))
