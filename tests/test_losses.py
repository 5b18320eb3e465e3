"""The losses of the three implementations: equal to each other, to PyTorch's own, and to values by hand."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor

import jax_resnet.losses
import numpy_ref.losses
import torch_oracle.losses
from experiment.data.loading import load
from experiment.errors import UserError
from tests.helpers.comparing import assert_close
from tests.tolerances import FLOAT64_LAYER

RNG = np.random.default_rng(3)
LOGITS = 3 * RNG.standard_normal((6, 5))
WEIGHTS = (0.5, 2.0, 1.0, 0.25, 3.0)
LABELS: dict[str, np.ndarray] = {"label": np.array([0, 4, 2, 2, 1, 3], np.int32)}
MIXED: dict[str, np.ndarray] = {
    **LABELS,
    "label2": np.array([3, 4, 0, 1, 1, 2], np.int32),
    "lam": RNG.random(6),
}

Options = tuple[str, float, tuple[float, ...] | None]
EVERY = list(itertools.product(("cross-entropy", "bce"), (0.0, 0.1), (None, WEIGHTS)))


def of_numpy(options: Options, batch: dict[str, np.ndarray], logits: np.ndarray = LOGITS) -> tuple[Any, Any]:
    return numpy_ref.losses.Loss(*options)(logits, batch)


def of_jax(options: Options, batch: dict[str, np.ndarray]) -> tuple[Any, Any]:
    with jax.enable_x64(True):
        loss = jax_resnet.losses.Loss(*options)
        return jax.jit(jax.value_and_grad(lambda z: loss(z, batch)))(jnp.asarray(LOGITS))


def of_torch(loss: Any, *targets: Any) -> tuple[Any, Any]:
    logits = torch.from_numpy(LOGITS).requires_grad_()
    value = loss(logits, *targets)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def tensors(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    arrays = {name: torch.from_numpy(array) for name, array in batch.items()}
    return {name: array if array.is_floating_point() else array.long() for name, array in arrays.items()}


def assert_equal(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    assert_close("loss", found[0], expected[0], FLOAT64_LAYER)
    assert_close("gradient", found[1], expected[1], FLOAT64_LAYER)


@pytest.mark.parametrize("batch", [LABELS, MIXED], ids=["labels", "mixed"])
@pytest.mark.parametrize("options", EVERY, ids=str)
def test_loss_and_gradient_of_the_three_are_equal(options: Options, batch: dict[str, np.ndarray]) -> None:
    expected = of_torch(torch_oracle.losses.Loss(*options), tensors(batch))
    assert_equal(of_numpy(options, batch), expected)
    assert_equal(of_jax(options, batch), expected)


@pytest.mark.parametrize(("smoothing", "weights"), [(0.1, None), (0.0, WEIGHTS), (0.1, WEIGHTS)])
def test_cross_entropy_is_pytorchs_of_integer_labels(smoothing: float, weights: Any) -> None:
    """PyTorch divides by the labels' weights; we divide by the number of examples."""
    label = torch.from_numpy(LABELS["label"]).long()
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    own = torch.nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
    loss, gradient = of_torch(own, label)
    ratio = 1.0 if weight is None else float(weight[label].mean())
    assert_equal(of_numpy(("cross-entropy", smoothing, weights), LABELS), (loss * ratio, gradient * ratio))


def test_cross_entropy_is_pytorchs_of_probabilities() -> None:
    """Smoothed by PyTorch, too."""
    shares = tensors(MIXED)
    target = torch_oracle.losses.soft_targets(shares["label"], 5, label2=shares["label2"], lam=shares["lam"])
    own = torch.nn.CrossEntropyLoss(torch.tensor(WEIGHTS, dtype=torch.float64), label_smoothing=0.2)
    assert_equal(of_numpy(("cross-entropy", 0.2, WEIGHTS), MIXED), of_torch(own, target))


def test_bce_is_pytorchs() -> None:
    onehot = torch.nn.functional.one_hot(torch.from_numpy(LABELS["label"]).long(), 5).double()
    own = torch.nn.BCEWithLogitsLoss(torch.tensor(WEIGHTS, dtype=torch.float64))
    assert_equal(of_numpy(("bce", 0.0, WEIGHTS), LABELS), of_torch(own, onehot))


def test_values_by_hand() -> None:
    """Logits of log 1 and log 3: probabilities 1/4 and 3/4, sigmoids 1/2 and 3/4."""
    logits, batch = np.log([[1.0, 3.0]]), {"label": np.array([1])}
    loss, gradient = of_numpy(("cross-entropy", 0.2, None), batch, logits)  # target 0.1, 0.9
    assert loss == pytest.approx(0.1 * np.log(4) + 0.9 * np.log(4 / 3), rel=1e-15)
    np.testing.assert_allclose(gradient, [[0.25 - 0.1, 0.75 - 0.9]], rtol=1e-14)
    loss, gradient = of_numpy(("bce", 0.0, (1.0, 2.0)), batch, logits)
    assert loss == pytest.approx((np.log(2) + 2 * np.log(4 / 3)) / 2, rel=1e-15)
    np.testing.assert_allclose(gradient, [[0.5 / 2, 2 * (0.75 - 1) / 2]], rtol=1e-14)
    mixed = {**batch, "label2": np.array([0]), "lam": np.array([0.7])}
    loss, _ = of_numpy(("cross-entropy", 0.0, None), mixed, logits)
    assert loss == pytest.approx(0.7 * np.log(4 / 3) + 0.3 * np.log(4), rel=1e-15)


@pytest.mark.parametrize("options", [("bce", 0.1, WEIGHTS), ("cross-entropy", 0.1, WEIGHTS)])
def test_parts_of_a_batch_add_up(options: Options) -> None:
    loss, gradient = of_numpy(options, MIXED)
    parts = [
        numpy_ref.losses.Loss(*options)(LOGITS[part], {k: v[part] for k, v in MIXED.items()}, 6)
        for part in (slice(0, 2), slice(2, 6))
    ]
    assert_equal((sum(part for part, _ in parts), np.concatenate([g for _, g in parts])), (loss, gradient))


@pytest.mark.parametrize("options", [("bce", 0.0, None), ("cross-entropy", 0.1, None)])
def test_extreme_logits_overflow_nothing(options: Options) -> None:
    logits = np.array([[1e4, -1e4, 0.0]])
    with np.errstate(all="raise", under="ignore"):
        loss, gradient = of_numpy(options, {"label": np.array([1])}, logits)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    data = load("digits", data_dir=None, batch_size=8, seed=1, train_subset=0.1)
    source, indices = data.parts["train"]
    label = source.labels(indices)
    np.testing.assert_array_equal(label, source.read(indices)["label"])
    expected = compute_class_weight("balanced", classes=np.arange(10), y=label)
    np.testing.assert_allclose(data.class_weights(), expected, rtol=1e-15)
    assert np.mean(np.array(data.class_weights())[label]) == pytest.approx(1)


def test_a_class_without_examples_has_no_weight() -> None:
    data = load("digits", data_dir=None, batch_size=2, seed=1, train_subset=0.005)
    with pytest.raises(UserError, match="--class-weights: the training part has no example of"):
        data.class_weights()


@pytest.mark.parametrize("package", [jax_resnet.losses, numpy_ref.losses, torch_oracle.losses])
def test_a_loss_that_cannot_be_is_refused(package: Any) -> None:
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        package.Loss("hinge")
    with pytest.raises(ValueError, match="label_smoothing"):
        package.Loss(label_smoothing=1.0)
