"""Which network a state dict belongs to, told by names and shapes; and safetensors files as they come."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from experiment.errors import UserError
from experiment.files import weights
from experiment.files.identify import CIFAR, IMAGENET, Shapes, identify, summary
from experiment.options.config import MODELS
from tests.helpers.state_dicts import shapes_of, with_se


def assert_builds(shapes: Shapes, **arguments: Any) -> None:
    """What was identified has the very tensors that it was identified by."""
    network = identify(shapes, **arguments)
    assert shapes_of(network.model, network.num_classes, network.in_channels, **network.options) == shapes


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_told_by_its_tensors(model: str, channels: int) -> None:
    shapes = shapes_of(model, 11, channels)
    network = identify(shapes)
    assert (network.model, network.num_classes, network.in_channels) == (model, 11, channels)
    assert network.image_size == ((224, 224) if model in IMAGENET else (32, 32))
    assert str(network) == f"{model}, 11 classes, {channels} channels" + (
        ", image_size (32, 32)" if model == "cnn" else ""
    )
    assert_builds(shapes)


def test_every_model_of_the_command_line_has_a_family() -> None:
    assert {*IMAGENET, *CIFAR, "cnn"} == set(MODELS)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("resnet50", {"width": 8}, "resnet50, 7 classes, 3 channels, width 8"),
        ("resnet34", {"batch_norm": False}, "resnet34, 7 classes, 3 channels, batch_norm False"),
        ("resnet18", {"small_images": True}, "resnet18, 7 classes, 3 channels, small_images True"),
        ("resnet18", {"stage_sizes": (1, 2)}, "resnet18, 7 classes, 3 channels, stage_sizes (1, 2)"),
        ("resnet50", {"stage_sizes": (1,)}, "resnet50, 7 classes, 3 channels, stage_sizes (1,)"),
        (
            "resnet32",
            {"width": 4, "batch_norm": False},
            "resnet32, 7 classes, 3 channels, width 4, batch_norm False",
        ),
        (
            "cnn",
            {"width": 3, "image_size": (40, 40)},
            "cnn, 7 classes, 3 channels, width 3, image_size (40, 40)",
        ),
    ],
)
def test_variants_are_told_too(model: str, options: dict[str, Any], words: str) -> None:
    shapes = shapes_of(model, **options)
    assert_builds(shapes)
    assert str(identify(shapes)) == words


def test_the_place_of_the_stride_is_told_by_no_tensor() -> None:
    shapes = shapes_of("resnet50")
    assert shapes == shapes_of("resnet50", stride_in_1x1=True)
    assert identify(shapes).options["stride_in_1x1"] is False
    assert identify(shapes, stride_in_1x1=True).options["stride_in_1x1"] is True


def test_linear_is_read_as_fc() -> None:
    shapes = {name.replace("fc.", "linear."): shape for name, shape in shapes_of("resnet20").items()}
    assert identify(shapes).model == "resnet20"


def test_a_given_model_is_taken() -> None:
    """Its weights then fit or do not, which whoever loads them says by name."""
    network = identify(shapes_of("resnet18"), "resnet50")
    assert network.model == "resnet50"
    assert "stage_sizes" not in network.options


def without(shapes: Shapes, *names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.startswith(names)}


def changed(model: str, names: str, factors: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of a network with more output channels, and fewer input channels, in some convolutions."""
    more, fewer = factors
    return {
        name: (shape[0] * more, shape[1] // (32 if fewer > 1 else 1), *shape[2:])
        if re.fullmatch(names, name)
        else shape
        for name, shape in shapes_of(model).items()
    }


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], ""),
        (["conv.weight", "fc.bias"], "conv.weight, fc.bias"),
        ([f"a{i}" for i in range(6)], "a0, a1, a2, a3, 2 more"),
        (["layer1.0.se.fc1.bias", "layer1.0.se.fc2.bias"], "SE modules (se) in layer1.0"),
        ([name for name in with_se("resnet18") if ".se." in name], "SE modules (se) in 8 blocks"),
        ([n for n in shapes_of("resnet50") if ".downsample" in n], "downsample in 4 blocks"),
        (
            [n for n in shapes_of("resnet50") if re.search(r"layer.*[nv]3\.|^fc", n)],
            "fc.weight, fc.bias, bn3 and conv3 in 16 blocks",
        ),
        (
            sorted(shapes_of("resnet101").keys() - shapes_of("resnet50").keys()),
            "17 whole blocks (layer3.6 to layer3.22)",
        ),
        ([n for n in shapes_of("resnet20") if n.startswith("layer1.2")], "layer1.2"),
    ],
)
def test_a_list_of_names_is_a_phrase(names: list[str], words: str) -> None:
    assert summary(names) == words


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "conv1.weight is missing"),
        ({"transformer.weight": (3, 3)}, "conv1.weight is missing"),
        (without(shapes_of("resnet18"), "fc"), "fc.weight is missing"),
        (without(shapes_of("resnet18"), "layer"), "no residual blocks .*--model"),
        (without(shapes_of("resnet18"), "layer2"), "no residual blocks .*--model"),
        ({**shapes_of("resnet18"), "conv1.weight": (64, 3)}, r"conv1.weight is of shape \[64, 3\]"),
        (without(shapes_of("resnet20"), "layer1.2", "layer2.2", "layer3.2"), "stages of 2, 2, 2 .*--model"),
        (without(shapes_of("resnet50"), "layer2.0.downsample"), "stages of 3, 4, 6, 3 .*--model"),
        ({**shapes_of("cnn"), "fc.weight": (7, 8 * 6)}, "fc.weight has 48 columns"),
        (with_se("resnet18"), r"it has SE modules \(se\) in 8 blocks, which no network here has"),
        (
            changed("resnet50", r"(layer.*conv2\.weight)", (1, 4)),
            r"32 groups \(ResNeXt\), .* no network here",
        ),
        (changed("resnet50", r"(layer.*conv1\.weight)", (2, 1)), r"2 times as wide as its stem"),
    ],
)
def test_what_is_no_known_network_is_refused(shapes: Shapes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        identify(shapes)
    assert "\n" not in str(caught.value)


# The files


def test_every_type_of_number_is_read(tmp_path: Path) -> None:
    """bfloat16 too, which NumPy has not."""
    drawn = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    floats = {
        str(kind): drawn.to(kind) for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    others = {"count": torch.tensor(2**40), "int32": torch.tensor([-3], dtype=torch.int32)}
    others |= {
        str(kind): torch.tensor([3]).to(kind)
        for kind in (torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64)
    }
    others |= {"bytes": torch.tensor([255], dtype=torch.uint8), "mask": torch.tensor([True, False])}
    save_file({**floats, **others, "nothing": torch.zeros(0, 3)}, tmp_path / "a.safetensors")
    found = weights.load(tmp_path / "a.safetensors")
    assert found.keys() == {*floats, *others, "nothing"}
    for name, tensor in floats.items():
        np.testing.assert_array_equal(found[name], tensor.double().numpy(), err_msg=name)
    assert found["torch.bfloat16"].dtype == np.float32
    for name, tensor in others.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
        assert found[name].dtype == tensor.numpy().dtype
    assert found["nothing"].shape == (0, 3)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    state: dict[str, np.ndarray] = {
        "fc.weight": np.random.default_rng(0).normal(size=(2, 3)),
        "fc.bias": np.ones(2, np.float32),
    }
    weights.save(tmp_path / "a.safetensors", state, {"step": 3})
    found = weights.load(tmp_path / "a.safetensors")
    for name, array in state.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be read .No such file"):
        weights.load(path)
    path.write_bytes(b"hello world")
    with pytest.raises(UserError, match=r"a\.safetensors: no safetensors file.*experiment convert"):
        weights.load(path)
    save_file({"odd": torch.zeros(2, dtype=torch.complex64)}, path)
    with pytest.raises(UserError, match=r"a\.safetensors: odd is of type C64"):
        weights.load(path)


def test_two_names_that_would_be_one_are_refused(tmp_path: Path) -> None:
    state = {"conv.bias": torch.ones(1), "_orig_mod.conv.bias": torch.ones(1)}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: it holds conv.bias twice"):
        weights.load_network(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "names", [[], ["n_averaged"], ["odd\nname", "conv.bias"], ["module.a.b", "module.c.d"]]
)
def test_of_an_unknown_network_no_name_is_lost(names: list[str]) -> None:
    found = weights.network_names(dict.fromkeys(names, (1,)))
    assert sorted(found.values()) == sorted(names)
    assert list(found) == [name.removeprefix("module.") for name in names]


def test_the_names_of_an_unknown_network_that_mean_something_stay() -> None:
    names = ["model.embed.weight", "model.layers.0.weight", "backbone.weight"]
    assert list(weights.network_names(dict.fromkeys(names, (1, 2)))) == names
