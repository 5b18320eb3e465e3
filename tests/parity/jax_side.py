"""A case in the JAX engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import jax_resnet
from jax_resnet import layers, resnet
from jax_resnet.losses import cross_entropy
from jax_resnet.optimizers import make_optimizer, state_to_dict
from jax_resnet.state_dict import load_state_dict, to_torch_layout
from tests.helpers.comparing import quick_jit
from tests.parity.case import CLASSES, Case, Inputs, Results, group
from tests.parity.trajectory import run_engine


class Function(nnx.Module):
    """A function of arrays as a module."""

    def __init__(self, function: Callable[..., jax.Array], **options: Any) -> None:
        self.function = partial(function, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """function(x)."""
        return self.function(x)


class Conv2d(nnx.Module):
    """`layers.conv2d` with sides that differ; the engine's own layer has square kernels only."""

    def __init__(self, weight: tuple[int, ...], stride: Any, padding: Any, bias: bool, dtype: Any) -> None:
        self.weight = nnx.Param(jnp.zeros(weight, dtype))
        self.bias = nnx.Param(jnp.zeros(weight[-1], dtype)) if bias else None
        self.stride, self.padding = stride, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, I] to [N, OH, OW, O]."""
        y = layers.conv2d(x, self.weight[...], self.stride, self.padding)
        return y if self.bias is None else y + self.bias[...]


class Stage(nnx.List):
    """The blocks of a stage, one after another, as the network runs them."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, I] to [N, H', W', O]."""
        for block in self:
            x = resnet.run_block(block, x)
        return x


def avg_pool2d(x: jax.Array, *, kernel_size: Any, stride: Any, padding: Any) -> jax.Array:
    """Mean over windows, in which the padding counts as zeros."""
    (kh, kw), (sh, sw), (ph, pw) = map(_pair, (kernel_size, stride, padding))
    padded = jnp.pad(x, ((0, 0), (ph, ph), (pw, pw), (0, 0)))
    return lax.reduce_window(padded, 0.0, lax.add, (1, kh, kw, 1), (1, sh, sw, 1), "VALID") / (kh * kw)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _convolution(channels: int, options: dict[str, Any], kit: dict[str, Any]) -> nnx.Module:
    window = {name: options.get(name, default) for name, default in (("stride", 1), ("padding", 0))}
    kernel, out, bias = options["kernel_size"], options["out_channels"], options["bias"]
    if all(isinstance(side, int) for side in (kernel, *window.values())):
        return layers.Conv2d(channels, out, kernel, **window, bias=bias, **kit)
    sides = {name: _pair(value) for name, value in window.items()}
    return Conv2d((*_pair(kernel), channels, out), **sides, bias=bias, dtype=kit["dtype"])


def build(case: Case) -> nnx.Module:
    """The module, with whatever weights it begins with."""
    options, channels = dict(case.options), case.shape[-1]
    kit: dict[str, Any] = {"rngs": nnx.Rngs(0), "dtype": jnp.dtype(case.precision)}
    match case.kind:
        case "conv":
            return _convolution(channels, options, kit)
        case "linear":
            return layers.Linear(channels, **options, **kit)
        case "batch_norm":
            return layers.BatchNorm(channels, **options, dtype=kit["dtype"])
        case "option_a":
            return layers.OptionA(channels, **options)
        case "stage" | "network":
            network, stage = getattr(jax_resnet, options.pop("model")), options.pop("stage", None)
            in_channels = options.pop("in_channels", channels)
            model = network(num_classes=CLASSES, in_channels=in_channels, **options, **kit)
            return model if stage is None else Stage(getattr(model, stage))
    functions: dict[str, Callable[..., jax.Array]] = {
        "max_pool": layers.max_pool2d,
        "avg_pool": avg_pool2d,
        "global_avg_pool": layers.global_average_pool,
        "relu": layers.relu,
        "sigmoid": jax.nn.sigmoid,
        "flatten": lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1),
        "loss": lambda x: x,
    }
    return Function(functions[case.kind], **options)


@contextlib.contextmanager
def convolutions(other: bool) -> Iterator[None]:
    """The form of the convolution that the back end takes, or the other one."""
    if not other:
        yield
        return
    chosen = layers.on_cpu()
    with (
        patch.object(layers, "on_cpu", lambda: not chosen),
        patch.object(
            resnet, "run_block", lambda block, x: block(x)
        ),  # it remembers programs of the first form
    ):
        yield


@partial(quick_jit, static_argnums=(0, 1))
def _forward_and_backward(
    graph: Any, other: bool, params: Any, stats: Any, x: Any, target: Any, keep: Any
) -> Any:
    """One compiled function for all weights and seeds of a case; `graph` and `other` are static."""

    def forward(params: Any, x: jax.Array) -> Any:
        model = nnx.merge(graph, params, stats, copy=True)
        factors = [] if keep is None else [keep]
        outputs = model.stages(x, *factors) if hasattr(model, "stages") else {"y": model(x)}
        *_, last = outputs.values()
        label = jnp.issubdtype(target.dtype, jnp.integer)
        loss = cross_entropy(last, target) if label else (last * target).sum()
        return loss, (outputs, nnx.state(model, nnx.BatchStat))

    return jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)(params, x)


def run(case: Case, inputs: Inputs, *, other_convolution: bool = False) -> Results:
    """Forward, backward and what they leave."""
    exact = jax.default_matmul_precision("highest")  # on a GPU float32 would else be TF32
    with jax.enable_x64(case.precision == "float64"), exact, convolutions(other_convolution):
        if case.kind == "optimizer":
            return run_optimizer(case, inputs)
        if case.kind == "trajectory":
            return run_trajectory(case, inputs)
        model = build(case)
        load_state_dict(model, group(inputs, "state"))
        if case.train:
            model.train()
        else:
            model.eval()
        graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
        (loss, (outputs, after)), (dparams, dx) = _forward_and_backward(
            graph, other_convolution, params, stats, inputs["x"], inputs["target"], inputs.get("keep")
        )
    results = dict(outputs)
    if inputs["target"].dtype.kind == "i":
        results["loss"] = loss
    results["dx"] = dx
    results |= {f"grad.{name}": to_torch_layout(value) for name, value in flat(dparams).items()}
    results |= {f"after.{name}": value for name, value in flat(after).items()}
    return {name: np.asarray(array) for name, array in results.items()}


def flat(state: Any) -> dict[str, jax.Array]:
    """An nnx state by the names of the state dict."""
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


@partial(quick_jit, static_argnums=(0, 1))
def _optimize(
    name: str, nesterov: bool, options: Any, base_lr: Any, state: Any, gradients: Any, rates: Any
) -> Any:
    """All steps; the optimizer is made inside, of traced numbers, as the training step makes it."""

    def step(carry: Any, each: Any) -> Any:
        params, opt_state = carry
        grads, lr = each
        optimizer = make_optimizer(name, lr, base_lr=base_lr, nesterov=nesterov, **options)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (jax.tree.map(jnp.add, params, updates), opt_state), None

    begin = make_optimizer(name, base_lr, base_lr=base_lr, **options).init(state)
    return lax.scan(step, (state, begin), (gradients, rates))[0]


def run_optimizer(case: Case, inputs: Inputs) -> Results:
    """The parameters and every moment after all gradients."""
    options = dict(case.options["optimizer_options"])
    base_lr = options.pop("base_lr", case.options["learning_rate"])
    state, gradients = group(inputs, "state"), group(inputs, "gradients")
    nesterov = options.pop("nesterov", False)
    values, opt_state = _optimize(
        case.options["optimizer"], nesterov, options, base_lr, state, gradients, inputs["rates"]
    )
    results = {f"value.{name}": np.asarray(value) for name, value in values.items()}
    for moment, arrays in state_to_dict(opt_state).items():
        if isinstance(arrays, dict):
            results |= {f"{moment}.{name}": np.asarray(array) for name, array in arrays.items()}
    return results


def run_trajectory(case: Case, inputs: Inputs) -> Results:
    """The engine's own loop."""
    return run_engine(jax_resnet.Engine, case, inputs)
