"""Ports from other packages against PyTorch, at random weights: the table of docs/comparing_models.md.

    pip install dm-haiku keras equinox flaxmodels transformers==4.44.2    # beside this project
    python -m benchmarks.real_ports                                       # all of them: half an hour
    python -m benchmarks.real_ports --only haiku-eval bert                # some

The packages are no dependencies of the project. Nothing is downloaded: all weights are random.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["KERAS_BACKEND"] = "jax"

import jax
import numpy as np
import torch
from torch import nn

import parity
import torch_oracle
from parity.report import Report
from parity.trace import Inputs, Model

Arrays = dict[str, Any]
Port = tuple[Model, Model, Inputs, Inputs]
"""Reference, candidate, and what each is given."""
Make = Callable[..., Port]

NARROW = 8  # channels of the thin ResNets
BLOCKS = (1, 2, 1, 1)


def package(name: str) -> Any:
    """Import a package that is no dependency of the project."""
    return importlib.import_module(name)


def randomize(network: nn.Module) -> nn.Module:
    """Draw all batch norms at random: at their initial values, 0 and 1, nothing shows which is which."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            for tensor, center in (
                (module.weight, 1.0),
                (module.bias, 0.0),
                (module.running_mean, 0.0),
                (module.running_var, 2.0),
            ):
                tensor.data = center + 0.2 * torch.randn(tensor.shape, generator=generator)
    return network


def thin_resnet(*, stem: int = NARROW, **options: Any) -> nn.Module:
    """A ResNet of 5 blocks; `stem` is the width of the first convolution."""
    torch.manual_seed(0)
    network = torch_oracle.ResNet(torch_oracle.Bottleneck, BLOCKS, 10, width=NARROW, **options)
    if stem != NARROW:
        network.conv1, network.bn1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem)
        block: Any = network.get_submodule("layer1.0")
        block.conv1, block.downsample[0] = (nn.Conv2d(stem, c, 1, bias=False) for c in (NARROW, 4 * NARROW))
    return randomize(network)


def images(side: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Two images, NCHW and NHWC."""
    x = np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(dtype)
    return x, np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def kernel(weight: torch.Tensor) -> np.ndarray:
    """The weight of a convolution or a linear layer in the layout of Flax, Haiku and Keras."""
    array = weight.detach().numpy()
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def norm_arrays(module: nn.BatchNorm2d) -> list[np.ndarray]:
    """Scale, bias, running mean and running variance."""
    assert module.running_mean is not None
    assert module.running_var is not None
    tensors = (module.weight, module.bias, module.running_mean, module.running_var)
    return [tensor.detach().numpy() for tensor in tensors]


def haiku(*, train: bool, side: int, steps: int, unbiased: bool = True) -> Port:
    """Haiku's ResNet (v1), thin.

    Args:
        train: the mode of both.
        side: of the images. At odd sides "SAME" pads both sides alike, as PyTorch does.
        steps: that the moving averages of Haiku have seen. They correct for the first ones.
        unbiased: False lets the reference store the biased variance.
    """
    hk = package("haiku")
    reference = thin_resnet().train(train)
    if not unbiased:
        store_biased_variance(reference)

    def forward(x: Any, is_training: bool) -> Any:
        channels = [4 * NARROW * 2**stage for stage in range(4)]
        config = {"output_channels": NARROW}
        network = hk.nets.ResNet(BLOCKS, 10, channels_per_group=channels, initial_conv_config=config)
        return network(x, is_training)

    network = hk.transform_with_state(forward)
    x, x_nhwc = images(side)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x_nhwc, True))
    params, state = ({path: dict(arrays) for path, arrays in tree.items()} for tree in shapes)
    layers = {"conv1": "conv_0", "conv2": "conv_1", "conv3": "conv_2", "downsample.0": "shortcut_conv"}
    layers |= {"bn1": "batchnorm_0", "bn2": "batchnorm_1", "bn3": "batchnorm_2"}
    layers |= {"downsample.1": "shortcut_batchnorm"}
    top = {"conv1": "initial_conv", "bn1": "initial_batchnorm", "fc": "logits"}

    def path(name: str) -> str:
        if name in top:
            return f"res_net/~/{top[name]}"
        stage, block, layer = name.split(".", 2)
        return f"res_net/~/block_group_{int(stage[-1]) - 1}/~/block_{block}/~/{layers[layer]}"

    for name, module in reference.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            params[path(name)]["w"] = kernel(module.weight)
            if module.bias is not None:
                params[path(name)]["b"] = module.bias.detach().numpy()
        if isinstance(module, nn.BatchNorm2d):
            scale, offset, *statistics = (array.reshape(1, 1, 1, -1) for array in norm_arrays(module))
            params[path(name)] = {"scale": scale, "offset": offset}
            for key, array in zip(("mean_ema", "var_ema"), statistics, strict=True):
                averages = {"hidden": array, "average": array, "counter": np.int32(steps)}
                state[f"{path(name)}/~/{key}"] = averages

    def apply(params: Any, state: Any, x: Any) -> Any:
        return network.apply(params, state, None, x, train)

    return parity.torch_model(reference), parity.jax_model(apply, params, state), x, x_nhwc


def keras(
    *,
    train: bool,
    full: bool = False,
    stride_in_1x1: bool = True,
    eps: float = 1e-5,
    momentum: float = 0.1,
    dtype: str = "float32",
    unbiased: bool = True,
) -> Port:
    """Keras' ResNet on JAX.

    Args:
        train: the mode of both.
        full: `keras.applications.ResNet50`; else the function that builds it, with fewer and thinner blocks.
        stride_in_1x1, eps, momentum: of the reference.
        dtype: of both.
        unbiased: False lets the reference store the biased variance.
    """
    module_of_keras, side = package("keras"), 32
    module_of_keras.config.set_floatx(dtype)
    module_of_keras.config.set_dtype_policy(dtype)
    given: Arrays = {"weights": None, "input_shape": (side, side, 3), "classes": 10}
    given["classifier_activation"] = None
    if full:
        torch.manual_seed(0)
        reference = randomize(torch_oracle.resnet50(10, stride_in_1x1=stride_in_1x1))
        model = module_of_keras.applications.ResNet50(**given)
    else:
        reference = thin_resnet(stem=64, stride_in_1x1=stride_in_1x1)
        builder = package("keras.src.applications.resnet")

        def stages(x: Any) -> Any:
            for stage, blocks in enumerate(BLOCKS):
                size, stride = NARROW * 2**stage, 1 if stage == 0 else 2
                x = builder.stack_residual_blocks_v1(x, size, blocks, stride, name=f"conv{stage + 2}")
            return x

        model = builder.ResNet(stages, preact=False, use_bias=True, **given)
    reference.to(getattr(torch, dtype)).train(train)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = eps, momentum
    if not unbiased:
        store_biased_variance(reference)
    layers = {"conv1": "1_conv", "conv2": "2_conv", "conv3": "3_conv", "downsample.0": "0_conv"}
    layers |= {"bn1": "1_bn", "bn2": "2_bn", "bn3": "3_bn", "downsample.1": "0_bn"}
    top = {"conv1": "conv1_conv", "bn1": "conv1_bn", "fc": "predictions"}

    def path(name: str) -> str:
        if name in top:
            return top[name]
        stage, block, layer = name.split(".", 2)
        return f"conv{int(stage[-1]) + 1}_block{int(block) + 1}_{layers[layer]}"

    # The biases of the convolutions, which the reference does not have, stay 0.
    params = {v.path: np.zeros(v.shape, dtype) for v in model.trainable_variables}
    state = {v.path: np.asarray(v.value) for v in model.non_trainable_variables}
    for name, module in reference.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            params[f"{path(name)}/kernel"] = kernel(module.weight)
            if module.bias is not None:
                params[f"{path(name)}/bias"] = module.bias.detach().numpy()
        if isinstance(module, nn.BatchNorm2d):
            gamma, beta, mean, variance = norm_arrays(module)
            params |= {f"{path(name)}/gamma": gamma, f"{path(name)}/beta": beta}
            state |= {f"{path(name)}/moving_mean": mean, f"{path(name)}/moving_variance": variance}

    def apply(params: Any, state: Any, x: Any) -> Any:
        arrays = (
            [tree[v.path] for v in variables]
            for tree, variables in (
                (params, model.trainable_variables),
                (state, model.non_trainable_variables),
            )
        )
        logits, after = model.stateless_call(*arrays, x, training=train)
        return logits, {v.path: a for v, a in zip(model.non_trainable_variables, after, strict=True)}

    x, x_nhwc = images(side, dtype)
    return parity.torch_model(reference), parity.jax_model(apply, params, state), x, x_nhwc


def store_biased_variance(network: nn.Module) -> None:
    """Let PyTorch's batch norms store the biased variance, as most JAX libraries do."""

    class Biased(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.running_var is not None
            assert self.momentum is not None
            before = self.running_var.clone()
            y = super().forward(x)
            count = x.numel() // x.shape[1]
            new = (self.running_var - (1 - self.momentum) * before) * (count - 1) / count
            self.running_var = (1 - self.momentum) * before + new  # copy_ would disturb the backward pass
            return y

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = Biased


def flaxmodels(*, train: bool, side: int) -> Port:
    """The ResNet-18 of flaxmodels, Flax Linen."""
    torch.manual_seed(0)
    reference = randomize(torch_oracle.resnet18(10)).train(train)
    port = package("flaxmodels").ResNet18("logits", pretrained=None, normalize=False, num_classes=10)
    x, x_nhwc = images(side)
    params: Arrays = {}
    statistics: Arrays = {}
    layers = {"conv1": "Conv_0", "conv2": "Conv_1", "bn1": "BatchNorm_0", "bn2": "BatchNorm_1"}
    layers |= {"downsample.0": "Conv_2", "downsample.1": "BatchNorm_2", "fc": "Dense_0"}
    for name, module in reference.named_modules():
        *block, layer = name.replace("downsample.", "downsample-").split(".")
        place = f"BasicBlock_{2 * (int(block[0][-1]) - 1) + int(block[1])}" if block[1:] else ""
        arrays = params.setdefault(place, {}) if place else params
        averages = statistics.setdefault(place, {}) if place else statistics
        own = layers.get(layer.replace("-", "."), "")
        if isinstance(module, nn.Conv2d | nn.Linear):
            arrays[own] = {"kernel": kernel(module.weight)}
            if module.bias is not None:
                arrays[own]["bias"] = module.bias.detach().numpy()
        if isinstance(module, nn.BatchNorm2d):
            scale, bias, mean, variance = norm_arrays(module)
            arrays[own] = {"scale": scale, "bias": bias}
            averages[own] = {"mean": mean, "var": variance}
    variables = {
        "params": {name: tree for name, tree in params.items() if tree},
        "batch_stats": {name: tree for name, tree in statistics.items() if tree},
    }
    return parity.torch_model(reference), parity.linen_model(port, variables, train=train), x, x_nhwc


def bert(*, attention: str = "eager", padding: bool = True) -> Port:
    """The BERT of transformers in Flax against the one in PyTorch, two layers of 32.

    Args:
        attention: the reference's.
        padding: False removes `padding_idx` from the reference's table of words.
    """
    transformers = package("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        initializer_range=0.2,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    reference = transformers.BertModel(config).eval()
    if not padding:
        reference.embeddings.word_embeddings.padding_idx = None
    port = transformers.FlaxBertModel(config, input_shape=(1, 8))
    convert = package("transformers.modeling_flax_pytorch_utils").convert_pytorch_state_dict_to_flax
    params = convert(reference.state_dict(), port)
    ids = np.random.default_rng(0).integers(0, 50, size=(2, 8))
    mask = np.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
    inputs["position_ids"] = np.broadcast_to(np.arange(8), (2, 8))
    candidate = parity.linen_model(port.module, {"params": params}, head_mask=None, deterministic=True)
    return parity.torch_model(reference), candidate, inputs, None


def of_equinox(module: Any, call: Callable[..., Any]) -> Model:
    """The arrays of an Equinox module are the parameters; `call` takes the module and the inputs."""
    equinox = package("equinox")
    params, static = equinox.partition(module, equinox.is_inexact_array)
    return parity.jax_model(lambda params, *x: call(equinox.combine(params, static), *x), params)


def equinox_cell(kind: str) -> Port:
    """An LSTM or GRU cell of Equinox."""
    equinox = package("equinox")
    torch.manual_seed(0)
    reference: Any = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}[kind](5, 6)
    cell = getattr(equinox.nn, f"{kind}Cell")(5, 6, key=jax.random.key(0))
    weights = [reference.weight_ih.detach().numpy(), reference.weight_hh.detach().numpy()]
    if kind == "LSTM":  # one bias, so that PyTorch's second is 0
        nn.init.zeros_(reference.bias_hh)
        biases = [reference.bias_ih.detach().numpy()]
        names = ["weight_ih", "weight_hh", "bias"]
    else:  # the bias that the reset gate multiplies is apart, of the others there is one
        with torch.no_grad():
            reference.bias_hh[:12] = 0
        biases = [reference.bias_ih.detach().numpy(), reference.bias_hh[12:].detach().numpy()]
        names = ["weight_ih", "weight_hh", "bias", "bias_n"]
    cell = equinox.tree_at(lambda cell: [getattr(cell, name) for name in names], cell, weights + biases)
    rng = np.random.default_rng(0)
    x, h, c = (rng.normal(size=(3, size)).astype(np.float32) for size in (5, 6, 6))
    if kind == "GRU":
        candidate = of_equinox(cell, lambda cell, x, h: jax.vmap(cell)(x, h))
        return parity.torch_model(reference), candidate, (x, h), None

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = reference

        def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
            return self.cell(x, (h, c))

    candidate = of_equinox(cell, lambda cell, x, h, c: jax.vmap(cell)(x, (h, c)))
    return parity.torch_model(Pair()), candidate, (x, h, c), None


def equinox_attention() -> Port:
    """Multi-head attention of Equinox, with biases."""
    equinox = package("equinox")
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(12, 3, batch_first=True)
    nn.init.normal_(reference.in_proj_bias)
    nn.init.normal_(reference.out_proj.bias)
    uses = {f"use_{part}_bias": True for part in ("query", "key", "value", "output")}
    attention = equinox.nn.MultiheadAttention(3, 12, **uses, key=jax.random.key(0))
    kernels = np.split(reference.in_proj_weight.detach().numpy(), 3)
    biases = np.split(reference.in_proj_bias.detach().numpy(), 3)
    parts = ("query_proj", "key_proj", "value_proj", "output_proj")
    attention = equinox.tree_at(
        lambda a: [array for part in parts for array in (getattr(a, part).weight, getattr(a, part).bias)],
        attention,
        [
            array
            for pair in zip(
                [*kernels, reference.out_proj.weight.detach().numpy()],
                [*biases, reference.out_proj.bias.detach().numpy()],
                strict=True,
            )
            for array in pair
        ],
    )

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = reference

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return self.attention(q, k, v, need_weights=False)[0]

    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, length, 12)).astype(np.float32) for length in (4, 5, 5))
    candidate = of_equinox(attention, lambda attention, *x: jax.vmap(attention)(*x))
    return parity.torch_model(Output()), candidate, (q, k, v), None


def equinox_batch_norm(*, mode: str, momentum: float = 0.99) -> Port:
    """A convolution and the batch norm of Equinox, in train mode."""
    equinox = package("equinox")
    torch.manual_seed(0)
    reference = randomize(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))
    convolution: Any = reference[0]  # type: ignore[index]
    conv = equinox.nn.Conv2d(3, 4, 3, padding=1, key=jax.random.key(0))
    weight, bias = (array.detach().numpy() for array in (convolution.weight, convolution.bias))
    conv = equinox.tree_at(lambda c: (c.weight, c.bias), conv, (weight, bias.reshape(-1, 1, 1)))
    norm, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(4, "batch", momentum=momentum, mode=mode)
    scale, shift, mean, variance = norm_arrays(reference[1])  # type: ignore[index]
    norm = equinox.tree_at(lambda n: (n.weight, n.bias), norm, (scale, shift))
    averages = (jax.numpy.asarray(mean), jax.numpy.asarray(variance))
    if mode == "ema":
        state = state.set(norm.ema_first_time_index, jax.numpy.asarray(False))
        state = state.set(norm.ema_state_index, averages)
    else:
        state = state.set(norm.batch_counter, jax.numpy.asarray(1_000_000))
        state = state.set(norm.batch_state_index, averages)
    params, static = equinox.partition((conv, norm), equinox.is_inexact_array)

    def apply(params: Any, state: Any, x: Any) -> Any:
        conv, norm = equinox.combine(params, static)
        call = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, state = call(jax.vmap(conv)(x), state)
        return jax.nn.relu(y), state

    x = np.random.default_rng(0).normal(size=(4, 3, 6, 6)).astype(np.float32)
    return parity.torch_model(reference.train()), parity.jax_model(apply, params, state), x, None


PORTS: dict[str, tuple[str, Make, Mapping[str, Any]]] = {
    "haiku-eval": ("dm-haiku", haiku, {"train": False, "side": 32, "steps": 0}),
    "haiku-odd-eval": ("dm-haiku", haiku, {"train": False, "side": 33, "steps": 0}),
    "haiku-odd-train": ("dm-haiku", haiku, {"train": True, "side": 33, "steps": 0}),
    "haiku-late-train": ("dm-haiku", haiku, {"train": True, "side": 33, "steps": 10_000}),
    "haiku-biased-train": (
        "dm-haiku",
        haiku,
        {"train": True, "side": 33, "steps": 10_000, "unbiased": False},
    ),
    "keras-resnet50-eval": ("keras", keras, {"train": False, "full": True, "stride_in_1x1": False}),
    "keras-eval": ("keras", keras, {"train": False, "stride_in_1x1": False}),
    "keras-v1-eval": ("keras", keras, {"train": False}),
    "keras-float64-eval": ("keras", keras, {"train": False, "dtype": "float64"}),
    "keras-eps-float64-eval": ("keras", keras, {"train": False, "dtype": "float64", "eps": 1.001e-5}),
    "keras-eps-train": ("keras", keras, {"train": True, "eps": 1.001e-5}),
    "keras-momentum-train": ("keras", keras, {"train": True, "eps": 1.001e-5, "momentum": 0.01}),
    "keras-biased-train": (
        "keras",
        keras,
        {"train": True, "eps": 1.001e-5, "momentum": 0.01, "unbiased": False},
    ),
    "flaxmodels-eval": ("flaxmodels", flaxmodels, {"train": False, "side": 32}),
    "flaxmodels-train": ("flaxmodels", flaxmodels, {"train": True, "side": 64}),
    "flaxmodels-small-train": ("flaxmodels", flaxmodels, {"train": True, "side": 32}),
    "bert": ("transformers", bert, {}),
    "bert-sdpa": ("transformers", bert, {"attention": "sdpa"}),
    "bert-no-padding": ("transformers", bert, {"padding": False}),
    "equinox-lstm": ("equinox", equinox_cell, {"kind": "LSTM"}),
    "equinox-gru": ("equinox", equinox_cell, {"kind": "GRU"}),
    "equinox-attention": ("equinox", equinox_attention, {}),
    "equinox-ema-norm": ("equinox", equinox_batch_norm, {"mode": "ema"}),
    "equinox-batch-norm": ("equinox", equinox_batch_norm, {"mode": "batch"}),
}


def compared(name: str) -> Report:
    """Build a port and its reference, and compare them."""
    _, make, options = PORTS[name]
    reference, candidate, inputs, candidate_inputs = make(**options)
    return parity.compare(reference, candidate, inputs, candidate_inputs)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="ports from other packages against PyTorch")
    parser.add_argument("--only", nargs="+", choices=PORTS, default=list(PORTS))
    parser.add_argument("--table", action="store_true", help="print the table of stages too")
    options = parser.parse_args()
    for name in options.only:
        package_name, _, _ = PORTS[name]
        start = time.perf_counter()
        print(f"## {name}: {package_name} {importlib.metadata.version(package_name)}", flush=True)
        try:
            report = compared(name)
        except parity.ParityError as error:
            print(f"refused: {error}")
        else:
            departing = [s.value.name for s in report.stages if s.forward.departs]
            print(str(report) if options.table else report.verdict)
            print(f"stages that depart: {', '.join(departing) or 'none'}")
            tensors = [f"{t.what} of {t.reference}" for t in report.tensors if t.departs]
            print(f"gradients and statistics that depart: {len(tensors)}: {', '.join(tensors[:6])}")
        print(f"{time.perf_counter() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
