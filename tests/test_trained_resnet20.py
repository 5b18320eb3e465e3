"""A ResNet-20 that others trained on CIFAR-10 gives the same answers in every implementation.

The file is loaded as it is, with `linear.*` for `fc.*`. The pictures are a fifth of the `cifar10` test set of
THREEWAY_DATA_DIR, or, among the slow tests, all of it. Its pixels are JPEG re-encoded: the network knows
81.03 % of them, and 91.73 % of the original ones.
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
from tests.comparing import assert_all_close, assert_close, nchw
from tests.tolerances import FLOAT32_TRAINED

RIGHT = {10_000: 8_103, 2_000: 1_631}  # found with PyTorch; pictures between two classes may go either way
MARGIN = 1e-3  # below it, the best logit less the second, rounding decides which is the best
BATCH = 500
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, with which it was trained

Weights = dict[str, np.ndarray]


class Pictures(NamedTuple):
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


ALL = pytest.param(1, marks=pytest.mark.slow, id="all")
A_FIFTH = pytest.param(5, id="a-fifth")


@pytest.fixture(scope="module", params=[A_FIFTH, ALL])
def pictures(data_dir: Path, request: pytest.FixtureRequest) -> Pictures:
    """Every first or fifth picture of the test set, decoded by Pillow."""
    if not (data_dir / "cifar10").is_dir():
        pytest.skip("no cifar10 in the directory that THREEWAY_DATA_DIR names")
    test = tfds_dataset("cifar10", str(data_dir), None).test
    batch = test.read(np.arange(0, len(test), request.param))
    return Pictures(batch["image"], batch["label"])


def batches(pictures: Pictures) -> list[np.ndarray]:
    return np.split(pictures.image, range(BATCH, len(pictures.image), BATCH))


@pytest.fixture(scope="module")
def expected(trained: Weights, pictures: Pictures) -> np.ndarray:
    """The judge's logits [N, 10]."""
    model = torch_oracle.resnet20(10).eval()
    torch_oracle.load_state_dict(model, trained)
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    with torch.no_grad():
        normalised = ((image.astype(np.float32) / 255 - mean) / std for image in batches(pictures))
        return np.concatenate([model(torch.from_numpy(nchw(x))).numpy() for x in normalised])


def engine_logits(package: Any, model: Any, trained: Weights, pictures: Pictures) -> np.ndarray:
    """An engine's logits [N, 10], by its own way of evaluating: from pictures of uint8."""
    package.load_state_dict(model, trained)
    state_dict = package.state_dict(model)
    engine = package.Engine(
        model="resnet20",
        model_options={},
        num_classes=10,
        image_shape=pictures.image.shape[1:],
        mean=MEAN,
        std=STD,
        optimizer="sgd",
        optimizer_options={},
        learning_rate=lambda step: 0.1,
    )
    tree = engine.to_tree(engine.init())
    tree |= {part: {name: state_dict[name] for name in tree[part]} for part in ("params", "batch_stats")}
    with jax.default_matmul_precision("highest"):  # on a GPU float32 would otherwise be TF32
        found = engine.evaluate(engine.from_tree(tree), [{"image": image} for image in batches(pictures)])
        return np.concatenate(list(found))


def assert_right(logits: np.ndarray, pictures: Pictures) -> None:
    right = int((logits.argmax(1) == pictures.label).sum())
    assert abs(right - RIGHT[len(logits)]) <= 2


def test_the_judge_knows_as_many_as_is_known_of_it(expected: np.ndarray, pictures: Pictures) -> None:
    assert_right(expected, pictures)


@pytest.mark.parametrize("framework", ["numpy", "jax"])
def test_an_engine_knows_as_many_and_gives_the_judges_logits(
    framework: str, trained: Weights, pictures: Pictures, expected: np.ndarray
) -> None:
    if framework == "numpy":
        logits = engine_logits(numpy_ref, numpy_ref.resnet20(10, rng=None), trained, pictures)
    else:
        logits = engine_logits(jax_resnet, jax_resnet.resnet20(10, rngs=nnx.Rngs(0)), trained, pictures)
    assert_right(logits, pictures)
    # Absolute here, which is stricter: the largest is 38
    assert_close("logits", logits, expected, FLOAT32_TRAINED / float(np.abs(expected).max()))
    second, first = np.sort(expected, axis=1)[:, -2:].T
    clear = first - second > MARGIN
    assert clear.mean() > 0.99
    others = np.flatnonzero(clear & (logits.argmax(1) != expected.argmax(1)))
    assert others.size == 0, f"another class for the pictures {others[:10]}"


def test_the_authors_own_file_is_converted_to_the_same_tensors(
    folder: Path, trained: Weights, tmp_path: Path
) -> None:
    """A pickle with `state_dict`, and the prefix `module.` before every name."""
    target = tmp_path / "converted.safetensors"
    assert main(["convert", str(folder / "resnet20-12fca82f.th"), str(target)]) == 0
    found = weights.load(target)
    assert len(found) == 97
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert_all_close("converted", found, trained, 0)


def test_the_networks_are_as_large_as_the_file(trained: Weights) -> None:
    numbers = sum(array.size for name, array in trained.items() if "running" not in name)
    assert numbers == 269_722
    model = numpy_ref.resnet20(10, rng=None)
    assert numpy_ref.parameter_count(model).total == numbers
    assert jax_resnet.parameter_count(jax_resnet.resnet20(10, rngs=nnx.Rngs(0))).total == numbers
