"""The forms of the convolution on a CPU: equal to XLA's own, with all their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_resnet import convolution
from jax_resnet.convolution import Forms, choose_forms, conv2d_cpu, conv2d_lax, conv2d_matmul, conv2d_rows
from tests.helpers.comparing import assert_all_close, quick_jit
from tests.tolerances import BFLOAT16_LAYER, FLOAT32_LAYER, FLOAT64_LAYER

FORMS = [conv2d_lax, conv2d_matmul, conv2d_rows]
# The shapes of x and of the weight, stride, padding
CASES: dict[str, Any] = {
    "1x1": ((2, 5, 4, 3), (1, 1, 3, 5), (1, 1), (0, 0)),
    "1x1 stride 2": ((2, 5, 4, 3), (1, 1, 3, 5), (2, 2), (0, 0)),
    "3x3": ((2, 9, 8, 3), (3, 3, 3, 4), (1, 1), (1, 1)),
    "3x3 stride 2": ((2, 9, 8, 3), (3, 3, 3, 4), (2, 2), (1, 1)),
    "3x3 without padding": ((1, 5, 7, 2), (3, 3, 2, 2), (1, 1), (0, 0)),
    "3x3 of one pixel": ((3, 1, 1, 4), (3, 3, 4, 2), (1, 1), (1, 1)),
    "7x7 stride 2": ((2, 11, 14, 3), (7, 7, 3, 2), (2, 2), (3, 3)),
    "7x7": ((1, 8, 9, 2), (7, 7, 2, 3), (1, 1), (3, 3)),
    "2x4, leftover pixels": ((2, 10, 7, 3), (2, 4, 3, 2), (3, 2), (0, 2)),
}


def arrays(x: tuple[int, ...], weight: tuple[int, ...], dtype: str) -> list[jax.Array]:
    """x, weight and a tangent of each."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in (x, weight, x, weight)]


def parts(function: Callable[..., jax.Array], x: Any, w: Any, dx: Any, dw: Any) -> dict[str, jax.Array]:
    """y, its derivatives in both modes, and second derivatives, of a convolution of x and w."""
    y, tangent = jax.jvp(function, (x, w), (dx, dw))
    by_x, by_weight = jax.vjp(function, x, w)[1](jnp.cos(y))

    def gradient(x: Any, w: Any) -> Any:
        return jax.grad(lambda x, w: jnp.sin(function(x, w)).sum(), (0, 1))(x, w)

    forward_over_reverse = jax.jvp(gradient, (x, w), (dx, dw))[1]
    reverse_over_reverse = jax.vjp(gradient, x, w)[1]((dx, dw))
    batched = jax.vmap(lambda x, w: jax.grad(lambda w: jnp.sin(function(x, w)).sum())(w))
    return {
        "y": y,
        "jvp": tangent,
        "by x": by_x,
        "by weight": by_weight,
        "y, weight alone": jax.jvp(lambda w: function(x, w), (w,), (dw,))[1],
        "vmap": batched(jnp.stack([x, dx]), jnp.stack([w, dw])),
        **dict(zip(("xx", "xw"), forward_over_reverse, strict=True)),
        **dict(zip(("xx again", "xw again"), reverse_over_reverse, strict=True)),
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_convolution(
    form: convolution.Form, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "choose_forms", lambda *_: Forms(form, form, form))
    x, weight, stride, padding = CASES[case]
    for dtype, tolerance in (("float64", FLOAT64_LAYER), ("float32", FLOAT32_LAYER)):
        with jax.enable_x64(dtype == "float64"):
            values = arrays(x, weight, dtype)

            @quick_jit
            def run(*values: jax.Array) -> list[dict[str, jax.Array]]:
                def bound(function: convolution.Form) -> Callable[..., jax.Array]:
                    return lambda x, w: function(x, w, stride, padding)

                return [parts(bound(function), *values) for function in (conv2d_cpu, conv2d_lax)]

            actual, expected = run(*values)
            assert_all_close(f"{case} {dtype}", actual, expected, tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_bfloat16_is_close_to_float32(form: convolution.Form) -> None:
    x, weight, stride, padding = CASES["3x3"]
    values = arrays(x, weight, "bfloat16")[:2]
    run = quick_jit(
        lambda x, w: jax.vjp(lambda x, w: form(x, w, stride, padding), x, w)[1](form(x, w, stride, padding))
    )
    actual = run(*values)
    expected = run(*(value.astype("float32") for value in values))
    assert {str(array.dtype) for array in actual} == {"bfloat16"}
    names = ("by x", "by weight")
    assert_all_close(
        "bfloat16",
        {name: array.astype("float32") for name, array in zip(names, actual, strict=True)},
        dict(zip(names, expected, strict=True)),
        BFLOAT16_LAYER,
    )


@pytest.mark.parametrize(
    ("x", "weight", "stride", "forms"),
    [
        ((128, 32, 32, 16), (3, 3, 16, 16), 1, (conv2d_lax, conv2d_lax, conv2d_rows)),
        ((128, 8, 8, 64), (3, 3, 64, 64), 1, (conv2d_lax, conv2d_lax, conv2d_lax)),
        ((128, 32, 32, 16), (3, 3, 16, 32), 2, (conv2d_lax, conv2d_matmul, conv2d_matmul)),
        ((64, 32, 32, 1), (3, 3, 1, 8), 1, (conv2d_matmul, conv2d_lax, conv2d_rows)),
        ((64, 32, 32, 3), (3, 3, 3, 64), 1, (conv2d_matmul, conv2d_lax, conv2d_lax)),
        ((4, 224, 224, 3), (7, 7, 3, 64), 2, (conv2d_lax, conv2d_lax, conv2d_lax)),
        ((32, 2, 2, 256), (3, 3, 256, 256), 1, (conv2d_matmul, conv2d_matmul, conv2d_matmul)),
        ((4, 56, 56, 64), (1, 1, 64, 256), 1, (conv2d_matmul, conv2d_matmul, conv2d_matmul)),
    ],
)
def test_forms_follow_the_shape(x: Any, weight: Any, stride: int, forms: Any) -> None:
    padding = weight[0] // 2
    assert choose_forms(x, weight, (stride, stride), (padding, padding)) == forms


@pytest.mark.parametrize("form", FORMS)
def test_backward_saves_the_input_and_the_weight_alone(
    form: convolution.Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No patches: the arrays between two compiled functions, as in `blockwise`."""
    monkeypatch.setattr(convolution, "choose_forms", lambda *_: Forms(form, form, form))
    x, weight, stride, padding = CASES["3x3"]
    values = arrays(x, weight, "float32")[:2]
    pullback = quick_jit(lambda x, w: jax.vjp(lambda x, w: conv2d_cpu(x, w, stride, padding), x, w)[1])
    assert {saved.shape for saved in jax.tree.leaves(pullback(*values))} == {x, weight}
