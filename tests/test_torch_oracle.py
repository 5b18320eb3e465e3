"""The reference itself: torchvision's names, shapes, counts and forward pass.

The expected lists are written down here from the published architecture, without a call into the oracle.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import torch_oracle
from torch_oracle import (
    MODELS,
    BasicBlock,
    Bottleneck,
    OptionA,
    ParameterCount,
    ResNet,
    cnn,
    load_state_dict,
    parameter_count,
    resnet18,
    resnet20,
    resnet101,
    resnet_cifar,
    state_dict,
)

# Parameters: "num_params" in torchvision's documentation. Tensors: without num_batches_tracked.
IMAGENET = {
    # name: (bottleneck, blocks of each stage, parameters with 1,000 classes, tensors)
    "resnet18": (False, [2, 2, 2, 2], 11_689_512, 102),
    "resnet34": (False, [3, 4, 6, 3], 21_797_672, 182),
    "resnet50": (True, [3, 4, 6, 3], 25_557_032, 267),
    "resnet101": (True, [3, 4, 23, 3], 44_549_160, 522),
    "resnet152": (True, [3, 8, 36, 3], 60_192_808, 777),
}
# He et al. 2015, table 6, gives them in millions: 0.27, 0.46, 0.66, 0.85, 1.7. A further block in each of the
# three stages is 97,216 parameters: 18 * (16^2 + 32^2 + 64^2) weights and 4 * (16 + 32 + 64) of batch norm.
CIFAR = {
    "resnet8": (1, 75_290),
    "resnet20": (3, 269_722),
    "resnet32": (5, 464_154),
    "resnet44": (7, 658_586),
    "resnet56": (9, 853_018),
    "resnet110": (18, 1_727_962),
}
THIN: dict[str, Any] = {"width": 4, "stage_sizes": (1, 2, 1, 1)}

Shapes = dict[str, tuple[int, ...]]


def expected_norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (channels,)


def expected_imagenet(bottleneck: bool, counts: list[int], classes: int = 1000, channels: int = 3) -> Shapes:
    """The state dict of torchvision's ResNets, in its order, without num_batches_tracked."""
    shapes: Shapes = {"conv1.weight": (64, channels, 7, 7), **dict(expected_norm("bn1", 64))}
    inputs = 64
    for stage, count in enumerate(counts, start=1):
        narrow = [64, 128, 256, 512][stage - 1]
        wide = 4 * narrow if bottleneck else narrow
        for index in range(count):
            at = f"layer{stage}.{index}"
            if bottleneck:
                kernels = [(narrow, inputs, 1, 1), (narrow, narrow, 3, 3), (wide, narrow, 1, 1)]
            else:
                kernels = [(narrow, inputs, 3, 3), (wide, narrow, 3, 3)]
            for number, kernel in enumerate(kernels, start=1):
                shapes[f"{at}.conv{number}.weight"] = kernel
                shapes.update(expected_norm(f"{at}.bn{number}", kernel[0]))
            if index == 0 and (stage > 1 or bottleneck):
                shapes[f"{at}.downsample.0.weight"] = (wide, inputs, 1, 1)
                shapes.update(expected_norm(f"{at}.downsample.1", wide))
            inputs = wide
    return {**shapes, "fc.weight": (classes, inputs), "fc.bias": (classes,)}


def expected_cifar(n: int, classes: int = 10) -> Shapes:
    """The state dict of the CIFAR family: no shortcut has parameters."""
    shapes: Shapes = {"conv1.weight": (16, 3, 3, 3), **dict(expected_norm("bn1", 16))}
    inputs = 16
    for stage, width in enumerate([16, 32, 64], start=1):
        for index in range(n):
            for number in (1, 2):
                shapes[f"layer{stage}.{index}.conv{number}.weight"] = (width, inputs, 3, 3)
                shapes.update(expected_norm(f"layer{stage}.{index}.bn{number}", width))
                inputs = width
    return {**shapes, "fc.weight": (classes, 64), "fc.bias": (classes,)}


def count_of(shapes: Shapes) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if "running" not in name)


def shapes_of(model: torch.nn.Module) -> Shapes:
    """Read by PyTorch's own state_dict, which works on the meta device too, where no memory is taken."""
    own = model.state_dict().items()
    return {name: tuple(tensor.shape) for name, tensor in own if not name.endswith("num_batches_tracked")}


def random_state(model: torch.nn.Module, seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict in which nothing is 0 or 1, so that no term can be left out unnoticed."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, value in state_dict(model).items():
        drawn = rng.normal(size=value.shape) / math.sqrt(math.prod(value.shape[1:]))
        state[name] = 0.5 + np.abs(drawn) if name.endswith("running_var") else drawn
    return state


def thin(name: str, **options: Any) -> ResNet:
    """A thin, shallow network of the ImageNet family: float64, evaluation mode, nothing at 0 or 1."""
    model = MODELS[name](5, **THIN, **options).double().eval()
    assert isinstance(model, ResNet)
    load_state_dict(model, random_state(model))
    return model


def random_image(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=shape))


# Names, shapes, counts


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_family_has_torchvisions_names_shapes_and_counts(name: str) -> None:
    bottleneck, counts, published, tensors = IMAGENET[name]
    expected = expected_imagenet(bottleneck, counts)
    assert count_of(expected) == published
    assert len(expected) == tensors
    with torch.device("meta"):
        model = MODELS[name](1000)
    assert list(shapes_of(model).items()) == list(expected.items())
    assert parameter_count(model).total == published


def test_classes_and_channels_change_only_the_ends() -> None:
    with torch.device("meta"):
        model = resnet101(10, 1)
    assert shapes_of(model) == expected_imagenet(True, [3, 4, 23, 3], classes=10, channels=1)


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_family_has_its_names_shapes_and_counts(name: str) -> None:
    n, published = CIFAR[name]
    assert count_of(expected_cifar(n)) == published == 269_722 + (n - 3) * 97_216
    with torch.device("meta"):
        model = MODELS[name](10)
    assert list(shapes_of(model).items()) == list(expected_cifar(n).items())
    assert parameter_count(model).total == published


def test_any_n_makes_a_cifar_network() -> None:
    assert shapes_of(resnet_cifar(1, 7)) == expected_cifar(1, classes=7)
    assert resnet_cifar(2, 3, in_channels=1, width=3).double()(random_image(2, 1, 33, 40)).shape == (2, 3)


def test_the_table_of_models_is_complete() -> None:
    assert set(MODELS) == {*IMAGENET, *CIFAR, "cnn"}
    assert all(MODELS[name] is getattr(torch_oracle, name) for name in MODELS)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])
def test_without_batch_norm_each_convolution_has_a_bias_instead(name: str) -> None:
    with torch.device("meta"):
        with_norm, without = shapes_of(MODELS[name](10)), shapes_of(MODELS[name](10, batch_norm=False))
    expected: Shapes = {}
    for key, shape in with_norm.items():
        if len(shape) == 4:
            expected |= {key: shape, key.replace("weight", "bias"): shape[:1]}
        elif key.startswith("fc."):
            expected[key] = shape
    assert list(without.items()) == list(expected.items())
    assert ("layer2.0.downsample.0.bias" in without) == (name != "resnet20")


def test_parameter_count_tells_trainable_from_frozen() -> None:
    model = resnet20(10)
    assert parameter_count(model) == ParameterCount(total=269_722, trainable=269_722, frozen=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("fc.")
    assert parameter_count(model) == (269_722, 650, 269_072)


# The forward pass


def reference_forward(state: dict[str, np.ndarray], x: torch.Tensor, *, v1: bool = False) -> torch.Tensor:
    """torchvision's ResNet in evaluation mode, transcribed with functions from its published description."""
    weights = {name: torch.from_numpy(value) for name, value in state.items()}

    def conv_norm(x: torch.Tensor, conv: str, norm: str, stride: int = 1) -> torch.Tensor:
        kernel = weights[f"{conv}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding={1: 0, 3: 1, 7: 3}[kernel.shape[-1]])
        mean, variance, weight, bias = (
            weights[f"{norm}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias

    x = F.max_pool2d(F.relu(conv_norm(x, "conv1", "bn1", 2)), 3, 2, 1)
    for at in sorted({name.rpartition(".conv")[0] for name in weights if name.startswith("layer")} - {""}):
        stride = 2 if at.endswith(".0") and at != "layer1.0" else 1
        bottleneck = f"{at}.conv3.weight" in weights
        strides = [1, stride, 1] if bottleneck else [stride, 1]
        if bottleneck and v1:
            strides = [stride, 1, 1]
        y = x
        for number, each in enumerate(strides, start=1):
            y = conv_norm(y, f"{at}.conv{number}", f"{at}.bn{number}", each)
            y = F.relu(y) if number < len(strides) else y
        if f"{at}.downsample.0.weight" in weights:
            x = conv_norm(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
        x = F.relu(x + y)
    return x.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


@pytest.mark.parametrize(
    ("name", "v1"),
    [("resnet18", False), ("resnet50", False), ("resnet50", True)],
    ids=["18", "50-v1.5", "50-v1"],
)
def test_forward_is_torchvisions(name: str, v1: bool) -> None:
    model = thin(name, stride_in_1x1=v1)
    x = random_image(2, 3, 47, 66)
    # Both are the same operations in float64; only the order inside a sum may differ.
    torch.testing.assert_close(
        model(x), reference_forward(random_state(model), x, v1=v1), rtol=1e-12, atol=1e-12
    )


def test_stride_placement_changes_values_but_no_name_and_no_shape() -> None:
    v1, v15 = thin("resnet50", stride_in_1x1=True), thin("resnet50")
    assert shapes_of(v1) == shapes_of(v15)
    x = random_image(1, 3, 65, 65)
    ours, theirs = v1.stages(x), v15.stages(x)
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}
    torch.testing.assert_close(ours["layer1"], theirs["layer1"])  # its stride is 1, wherever it stands
    assert (ours["layer2"] - theirs["layer2"]).abs().max() > 1e-3


def test_stages_come_in_order_with_any_size_and_any_channels() -> None:
    model = thin("resnet50", in_channels=5)
    outputs = model.stages(random_image(2, 5, 33, 71))
    # 33 -> 17 -> 9 and 71 -> 36 -> 18 in the stem; every later stage takes the half, rounded up
    assert [(name, *output.shape) for name, output in outputs.items()] == [
        ("stem", 2, 4, 9, 18),
        ("layer1", 2, 16, 9, 18),
        ("layer2", 2, 32, 5, 9),
        ("layer3", 2, 64, 3, 5),
        ("layer4", 2, 128, 2, 3),
        ("pool", 2, 128),
        ("logits", 2, 5),
    ]
    torch.testing.assert_close(model(random_image(2, 5, 33, 71)), outputs["logits"], rtol=0, atol=0)


def test_small_images_keep_their_size_in_the_stem() -> None:
    model = thin("resnet18", small_images=True)
    assert shapes_of(model)["conv1.weight"] == (4, 3, 3, 3)
    outputs = model.stages(random_image(1, 3, 32, 35))
    assert outputs["stem"].shape == (1, 4, 32, 35)
    assert outputs["layer4"].shape == (1, 32, 4, 5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])
def test_without_batch_norm_every_gradient_is_finite_even_at_batch_1(name: str) -> None:
    options = {"width": 4} if name == "resnet20" else THIN
    model = MODELS[name](3, batch_norm=False, **options).double()
    model(random_image(1, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_batch_norm_over_one_value_is_refused_in_training_only() -> None:
    model = resnet18(3, **THIN)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.zeros(1, 3, 32, 32))
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_running_statistics_take_a_tenth_of_the_unbiased_ones_of_the_batch() -> None:
    model = resnet20(3, width=2).double()
    x = random_image(2, 3, 32, 32)
    convolved = model.conv1(x).detach().transpose(0, 1).flatten(1)
    model.train()(x)
    state = state_dict(model)
    np.testing.assert_allclose(state["bn1.running_mean"], 0.1 * convolved.mean(1), rtol=1e-12)
    unbiased = convolved.var(1, unbiased=True)
    np.testing.assert_allclose(state["bn1.running_var"], 0.9 + 0.1 * unbiased, rtol=1e-12)


def test_option_a_by_hand() -> None:
    x = torch.arange(1.0, 31.0).reshape(
        1, 2, 3, 5
    )  # rows of 1..5, 6..10, 11..15; then 16..20, 21..25, 26..30
    first, second = [[1, 3, 5], [11, 13, 15]], [[16, 18, 20], [26, 28, 30]]
    zeros = [[0, 0, 0], [0, 0, 0]]
    even = torch.tensor([[zeros, first, second, zeros]], dtype=torch.float32)
    odd = torch.tensor([[zeros, first, second, zeros, zeros]], dtype=torch.float32)
    torch.testing.assert_close(OptionA(2, 4, stride=2)(x), even, rtol=0, atol=0)
    torch.testing.assert_close(OptionA(2, 5, stride=2)(x), odd, rtol=0, atol=0)
    torch.testing.assert_close(OptionA(2, 2, stride=1)(x), x, rtol=0, atol=0)


def test_option_a_block_adds_the_padded_identity() -> None:
    block = BasicBlock(2, 4, stride=2, shortcut="option-A").eval()
    torch.nn.init.zeros_(block.conv2.weight)  # the long path is then zero: what is left is relu(shortcut)
    x = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    out = block(x)
    torch.testing.assert_close(out[:, 1:3], x[:, :, ::2, ::2].relu())
    assert not out[:, [0, 3]].any()


def test_cnn_flattens_channels_first() -> None:
    model = cnn(2, 1, image_size=(2, 3), width=2).double()
    assert list(shapes_of(model).items()) == [
        ("conv.weight", (2, 1, 3, 3)),
        ("conv.bias", (2,)),
        ("fc.weight", (2, 12)),
        ("fc.bias", (2,)),
    ]
    kernel = np.zeros((2, 1, 3, 3))
    kernel[0, 0, 1, 1], kernel[1, 0, 1, 2] = 1, 10  # the image itself; ten times its right neighbor
    digits = np.stack([np.arange(12.0), np.zeros(12)])
    load_state_dict(
        model,
        {
            "conv.weight": kernel,
            "conv.bias": np.array([0.0, -25.0]),
            "fc.weight": digits,
            "fc.bias": np.array([0.5, 7]),
        },
    )
    outputs = model.stages(torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]], dtype=torch.float64))
    assert list(outputs) == ["conv", "logits"]
    assert outputs["conv"].tolist() == [[[[1, 2, 3], [4, 5, 6]], [[0, 5, 0], [25, 35, 0]]]]
    # (0*1 + 1*2 + 2*3 + 3*4 + 4*5 + 5*6) + (7*5 + 9*25 + 10*35) + 0.5
    assert outputs["logits"].tolist() == [[70 + 610 + 0.5, 7]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "tiny"}, "stem must be one of .* not 'tiny'"),
        ({"shortcut": "A"}, "shortcut must be one of .* not 'A'"),
        ({"stage_sizes": ()}, "stage_sizes"),
        ({"stage_sizes": (1, 0)}, "stage_sizes"),
    ],
)
def test_unknown_parts_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**{"block": Bottleneck, "stage_sizes": (1,), "num_classes": 2, **options})


def test_option_a_cannot_drop_channels() -> None:
    with pytest.raises(ValueError, match="8 channels to 4"):
        OptionA(8, 4, stride=1)


# What the weights begin as


@pytest.mark.parametrize("name", ["resnet50", "resnet32"])
def test_weights_begin_as_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    drawn = np.zeros(2)  # sums of squares, and numbers
    for key, value in state_dict(MODELS[name](10)).items():
        if value.ndim == 4:
            scaled = value * math.sqrt(value.shape[0] * value.shape[2] * value.shape[3] / 2)
            assert scaled.std() == pytest.approx(1, abs=6 / math.sqrt(value.size)), key
            drawn += (scaled**2).sum(), value.size
        elif key.startswith("fc."):
            bound = 1 / math.sqrt(2048 if name == "resnet50" else 64)
            assert np.abs(value).max() <= bound
            assert np.abs(value).max() > 0.7 * bound
        else:
            begins = 1.0 if key.endswith(("weight", "running_var")) else 0.0
            assert (value == begins).all(), key
    assert drawn[0] / drawn[1] == pytest.approx(1, abs=0.01)


def test_biases_of_convolutions_begin_at_zero() -> None:
    state = state_dict(resnet18(3, batch_norm=False, **THIN)) | state_dict(cnn(3))
    biases = [name for name in state if name.endswith("bias") and name != "fc.bias"]
    assert len(biases) == 1 + 5 * 2 + 3 + 1
    assert not any(state[name].any() for name in biases)


# Loading


def test_a_state_dict_is_a_copy_without_counts_of_batches() -> None:
    model = resnet20(10, width=2)
    before = state_dict(model)
    kept = {name: value.copy() for name, value in before.items()}
    assert not any("num_batches_tracked" in name for name in before)
    assert all(type(value) is np.ndarray and value.dtype == np.float32 for value in before.values())
    model(torch.ones(2, 3, 32, 32)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(np.array_equal(before[name], kept[name]) for name in kept)
    assert not np.array_equal(state_dict(model)["bn1.running_mean"], kept["bn1.running_mean"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loading_is_in_place_and_exact(dtype: torch.dtype) -> None:
    model = resnet20(10, width=2).to(dtype)
    parameter = dict(model.named_parameters())["layer1.0.conv1.weight"]
    wanted = {name: value.astype(str(dtype).split(".")[1]) for name, value in random_state(model).items()}
    load_state_dict(model, wanted)
    assert dict(model.named_parameters())["layer1.0.conv1.weight"] is parameter
    assert parameter.requires_grad
    for name, value in state_dict(model).items():
        assert value.dtype == wanted[name].dtype
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)


def test_loading_reads_linear_as_fc_and_ignores_counts_of_batches() -> None:
    model = resnet20(10, width=2)
    state = random_state(model)
    renamed = {name.replace("fc.", "linear."): value for name, value in state.items()}
    load_state_dict(model, renamed | {"bn1.num_batches_tracked": np.array(7)})
    np.testing.assert_array_equal(state_dict(model)["fc.weight"], state["fc.weight"].astype(np.float32))
    with pytest.raises(ValueError, match=r"unexpected: linear\.bias$"):
        load_state_dict(model, state | {"linear.bias": np.zeros(10)})


def test_loading_takes_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="comes with JAX")
    model = cnn(2, image_size=(2, 2))
    state = {name: value.astype(ml_dtypes.bfloat16) for name, value in random_state(model).items()}
    load_state_dict(model, state)
    np.testing.assert_array_equal(state_dict(model)["fc.weight"], state["fc.weight"].astype(np.float32))


def test_loading_lists_every_fault_and_changes_nothing() -> None:
    model = resnet18(3, **THIN)
    before = state_dict(model)
    state = random_state(model)
    del state["bn1.bias"], state["layer2.0.downsample.0.weight"]
    state |= {"layer9.0.conv1.weight": np.zeros(1), "extra": np.zeros(2)}
    state["fc.weight"] = state["fc.weight"].T
    state["conv1.weight"] = state["conv1.weight"].transpose(2, 3, 1, 0)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_state_dict(model, state)
    assert str(caught.value) == (
        "the state dict does not fit the model; missing: bn1.bias, layer2.0.downsample.0.weight; "
        "unexpected: layer9.0.conv1.weight, extra; "
        "shape mismatch: conv1.weight (7, 7, 3, 4) for (4, 3, 7, 7), fc.weight (32, 3) for (3, 32)"
    )
    assert all(np.array_equal(value, before[name]) for name, value in state_dict(model).items())


def test_loading_does_not_guess_at_a_prefix() -> None:
    model = cnn(2)
    state = {f"module.{name}": value for name, value in state_dict(model).items()}
    with pytest.raises(ValueError, match=r"missing: conv\.weight, .*; unexpected: module\.conv\.weight, "):
        load_state_dict(model, state)
