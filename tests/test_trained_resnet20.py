"""A ResNet-20 that others trained on CIFAR-10 gives the same answers in every implementation.

The file is loaded as it is, with `linear.*` for `fc.*`. The pictures are the `cifar10` test set of
THREEWAY_DATA_DIR, whose pixels are JPEG re-encoded: the network knows 81.03 % of them, and 91.73 % of the
original ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import jax_resnet
import numpy_ref
import torch_oracle
from experiment import weights
from experiment.__main__ import main
from experiment.tfds_source import tfds_dataset
from jax_resnet.state_dict import apply, split
from tests.comparing import assert_all_close, assert_close, nchw
from tests.tolerances import FLOAT32_TRAINED

RIGHT = 8_103  # of 10,000, found with PyTorch elsewhere; pictures between two classes may go either way
MARGIN = 1e-3  # below it, the best logit less the second, rounding decides which is the best
BATCH = 500

Weights = dict[str, np.ndarray]


class Pictures(NamedTuple):
    image: np.ndarray  # float32 [10000, 32, 32, 3], normalised
    label: np.ndarray  # int32 [10000]


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
def pictures(data_dir: Path) -> Pictures:
    """The test set, decoded by Pillow; normalised with ImageNet's constants, as for the training."""
    if not (data_dir / "cifar10").is_dir():
        pytest.skip("no cifar10 in the directory that THREEWAY_DATA_DIR names")
    test = tfds_dataset("cifar10", str(data_dir), None).test
    batch = test.read(np.arange(len(test)))
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    return Pictures((batch["image"].astype(np.float32) / 255 - mean) / std, batch["label"])


def batches(pictures: Pictures) -> list[np.ndarray]:
    return np.split(pictures.image, range(BATCH, len(pictures.image), BATCH))


@pytest.fixture(scope="module")
def expected(trained: Weights, pictures: Pictures) -> np.ndarray:
    """The judge's logits [10000, 10]."""
    model = torch_oracle.resnet20(10).eval()
    torch_oracle.load_state_dict(model, trained)
    with torch.no_grad():
        return np.concatenate([model(torch.from_numpy(nchw(image))).numpy() for image in batches(pictures)])


def numpy_logits(trained: Weights, pictures: Pictures) -> np.ndarray:
    model = numpy_ref.resnet20(10, rng=None)
    numpy_ref.load_state_dict(model, trained)
    with numpy_ref.no_grad():
        return np.concatenate([model.forward(image) for image in batches(pictures)])


def jax_logits(trained: Weights, pictures: Pictures) -> np.ndarray:
    model = jax_resnet.resnet20(10, rngs=nnx.Rngs(0))
    jax_resnet.load_state_dict(model, trained)
    parts = split(model)
    run = jax.jit(partial(apply, parts.eval))
    with jax.default_matmul_precision("highest"):  # on a GPU float32 would otherwise be TF32
        logits = [run(parts.params, parts.batch_stats, image)[0] for image in batches(pictures)]
    return np.concatenate([np.asarray(each) for each in logits])


def test_the_judge_knows_as_many_as_is_known_of_it(expected: np.ndarray, pictures: Pictures) -> None:
    assert len(expected) == 10_000
    assert abs(int((expected.argmax(1) == pictures.label).sum()) - RIGHT) <= 2


@pytest.mark.parametrize("logits_of", [numpy_logits, jax_logits], ids=["numpy", "jax"])
def test_an_engine_knows_as_many_and_gives_the_judges_logits(
    logits_of: Callable[..., np.ndarray], trained: Weights, pictures: Pictures, expected: np.ndarray
) -> None:
    logits = logits_of(trained, pictures)
    assert abs(int((logits.argmax(1) == pictures.label).sum()) - RIGHT) <= 2
    # Absolute here, which is stricter: the largest is 38
    assert_close("logits", logits, expected, FLOAT32_TRAINED / float(np.abs(expected).max()))
    second, first = np.sort(expected, axis=1)[:, -2:].T
    clear = first - second > MARGIN
    assert clear.sum() > 9_900
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
