"""A ResNet-20 that others trained on CIFAR-10 gives the same answers in every implementation.

The file is loaded as it is, with `linear.*` for `fc.*`. The images are the `cifar10` test set in
THREEWAY_DATA_DIR. They are JPEG re-encoded: the network classifies 81.03 % of them correctly, and 91.73 % of
the original ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import jax_resnet
import numpy_ref
import torch_oracle
from experiment.__main__ import main
from experiment.data.tfds import tfds_dataset
from experiment.files import weights
from tests.helpers.comparing import assert_all_close, assert_close, nchw
from tests.tolerances import FLOAT32_TRAINED

CORRECT = 8_103  # of 10,000, measured with PyTorch; images between two classes may go either way
MARGIN = 1e-3  # below it, the best logit less the second, rounding decides which is the best
BATCH = 500
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, with which it was trained

Weights = dict[str, np.ndarray]


class Images(NamedTuple):
    image: np.ndarray  # uint8 [N, 32, 32, 3]
    label: np.ndarray  # int32 [N]


@pytest.fixture(scope="module")
def folder(data_dir: Path) -> Path:
    """Where the trained networks are."""
    path = data_dir.parent / "checkpoints"
    if not (path / "resnet20-12fca82f.safetensors").is_file():
        pytest.skip("no checkpoints/resnet20-12fca82f.safetensors beside THREEWAY_DATA_DIR")
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Weights:
    return weights.load(folder / "resnet20-12fca82f.safetensors")


@pytest.fixture(scope="module")
def images(data_dir: Path) -> Images:
    """Every image of the test set, decoded by Pillow."""
    if not (data_dir / "cifar10").is_dir():
        pytest.skip("no cifar10 in the directory that THREEWAY_DATA_DIR names")
    test = tfds_dataset("cifar10", str(data_dir), None).test
    assert test is not None
    batch = test.read(np.arange(len(test)))
    return Images(batch["image"], batch["label"])


def batches(images: Images) -> list[np.ndarray]:
    return np.split(images.image, range(BATCH, len(images.image), BATCH))


@pytest.fixture(scope="module")
def expected(trained: Weights, images: Images) -> np.ndarray:
    """The reference's logits [N, 10]."""
    model = torch_oracle.resnet20(10).eval()
    torch_oracle.load_state_dict(model, trained)
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    with torch.no_grad():
        normalized = ((image.astype(np.float32) / 255 - mean) / std for image in batches(images))
        return np.concatenate([model(torch.from_numpy(nchw(x))).numpy() for x in normalized])


def engine_logits(package: Any, model: Any, trained: Weights, images: Images) -> np.ndarray:
    """An engine's logits [N, 10], from uint8 images, as its `evaluate` computes them."""
    package.load_state_dict(model, trained)
    state_dict = package.state_dict(model)
    engine = package.Engine(
        model="resnet20",
        model_options={},
        num_classes=10,
        image_shape=images.image.shape[1:],
        mean=MEAN,
        std=STD,
        optimizer="sgd",
        optimizer_options={},
        learning_rate=lambda step: 0.1,
    )
    tree = engine.to_tree(engine.init())
    tree |= {part: {name: state_dict[name] for name in tree[part]} for part in ("params", "batch_stats")}
    with jax.default_matmul_precision("highest"):  # on a GPU float32 would otherwise be TF32
        logits = engine.evaluate(engine.from_tree(tree), [{"image": image} for image in batches(images)])
        return np.concatenate(list(logits))


def assert_correct(logits: np.ndarray, images: Images) -> None:
    correct = int((logits.argmax(1) == images.label).sum())
    assert abs(correct - CORRECT) <= 2


@pytest.mark.slow
def test_pytorch_classifies_the_known_number_correctly(expected: np.ndarray, images: Images) -> None:
    assert_correct(expected, images)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["numpy", "jax"])
def test_an_engine_gives_the_logits_of_pytorch(
    framework: str, trained: Weights, images: Images, expected: np.ndarray
) -> None:
    if framework == "numpy":
        logits = engine_logits(numpy_ref, numpy_ref.resnet20(10, rng=None), trained, images)
    else:
        logits = engine_logits(jax_resnet, jax_resnet.resnet20(10, rngs=nnx.Rngs(0)), trained, images)
    assert_correct(logits, images)
    # Absolute here, which is stricter: the largest is 38
    assert_close("logits", logits, expected, FLOAT32_TRAINED / float(np.abs(expected).max()))
    second, first = np.sort(expected, axis=1)[:, -2:].T
    clear = first - second > MARGIN
    assert clear.mean() > 0.99
    others = np.flatnonzero(clear & (logits.argmax(1) != expected.argmax(1)))
    assert others.size == 0, f"another class for the images {others[:10]}"


def test_the_authors_own_file_is_converted_to_the_same_tensors(
    folder: Path, trained: Weights, tmp_path: Path
) -> None:
    """A pickle with `state_dict`, and the prefix `module.` before every name."""
    target = tmp_path / "converted.safetensors"
    assert main(["convert", str(folder / "resnet20-12fca82f.th"), str(target)]) == 0
    converted = weights.load(target)
    assert len(converted) == 97
    assert {array.dtype for array in converted.values()} == {np.dtype(np.float32)}
    assert_all_close("converted", converted, trained, 0)


def test_the_networks_are_as_large_as_the_file(trained: Weights) -> None:
    numbers = sum(array.size for name, array in trained.items() if "running" not in name)
    assert numbers == 269_722
    model = numpy_ref.resnet20(10, rng=None)
    assert numpy_ref.parameter_count(model).total == numbers
    assert jax_resnet.parameter_count(jax_resnet.resnet20(10, rngs=nnx.Rngs(0))).total == numbers
