"""Metrics against scikit-learn, which has its own code for each of them."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from experiment.metrics import Metrics, cross_entropy
from tests.tolerances import FLOAT64_LAYER


def make_batch(n, num_classes, seed, dtype=np.float32, classes_used=None):
    """Logits and labels that agree more often than chance; with `classes_used`, some classes never occur."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes_used or num_classes, n).astype(np.int32)
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), label] += 1.0
    if classes_used:
        logits[:, classes_used:] -= 100  # never predicted either
    return logits.astype(dtype), label


def softmax(logits):
    z = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def by_scikit_learn(logits, label):
    """The four numbers. Among equal logits the lowest class goes first, as in argmax; scikit-learn's top k
    has the highest first, hence the reversal.
    """
    num_classes = logits.shape[1]
    prediction = logits.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sklearn.exceptions.UndefinedMetricWarning)  # top 5 of 5 classes
        return {
            "loss": sklearn.metrics.log_loss(label, softmax(logits), labels=range(num_classes)),
            "accuracy": sklearn.metrics.accuracy_score(label, prediction),
            "f1": sklearn.metrics.f1_score(label, prediction, average="macro"),
            "top5": sklearn.metrics.top_k_accuracy_score(
                num_classes - 1 - label, logits[:, ::-1], k=5, labels=range(num_classes)
            ),
        }


def totals(logits, label, cuts=()):
    metrics = Metrics(logits.shape[1])
    for part in np.split(np.arange(len(label)), cuts):
        if len(part):
            metrics.update(logits[part], label[part])
    return metrics


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("n", "num_classes", "classes_used"),
    [(60, 10, None), (7, 10, None), (1, 10, None), (60, 100, None), (60, 5, None), (60, 6, 4), (60, 10, 4)],
)
def test_agrees_with_scikit_learn(n, num_classes, classes_used, dtype):
    logits, label = make_batch(n, num_classes, seed=n + num_classes, dtype=dtype, classes_used=classes_used)
    expected = by_scikit_learn(logits, label)
    assert totals(logits, label).compute() == pytest.approx(expected, rel=FLOAT64_LAYER)


def test_top5_of_fewer_than_five_classes_is_certain():
    logits, label = make_batch(20, 3, seed=0)
    assert totals(logits, label).compute()["top5"] == 1.0


def test_f1_averages_over_the_classes_that_occur():
    """Worked out by hand."""
    # Class 0: one hit, two labels, one prediction; class 1: one hit, one label, two predictions; no class 2.
    logits = np.eye(3)[[0, 1, 1]]
    assert totals(logits, np.array([0, 0, 1])).compute()["f1"] == pytest.approx(2 / 3, rel=FLOAT64_LAYER)
    # Class 2 occurs as a prediction only, and counts as 0.
    logits = np.eye(3)[[0, 1, 1, 2]]
    expected = (1 / 2 + 2 / 3 + 0) / 3
    assert totals(logits, np.array([0, 0, 1, 0])).compute()["f1"] == pytest.approx(
        expected, rel=FLOAT64_LAYER
    )


def test_ties_go_to_the_lowest_class_in_top_1_and_top_5_alike():
    """A network that says the same of every class knows nothing: its top 5 of 10 must not read 100 %."""
    logits, label = np.zeros((20, 10), np.float32), np.arange(20, dtype=np.int32) % 10
    assert totals(logits, label).compute() == pytest.approx(by_scikit_learn(logits, label), rel=FLOAT64_LAYER)
    assert totals(logits, label).compute()["top5"] == 0.5
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 3, (200, 10)).astype(np.float32)  # three values: full of ties
    label = rng.integers(0, 10, 200).astype(np.int32)
    assert totals(logits, label).compute() == pytest.approx(by_scikit_learn(logits, label), rel=FLOAT64_LAYER)


def test_logits_that_are_not_numbers_are_no_hit_in_the_top_5():
    logits = np.full((4, 10), np.nan, np.float32)
    result = totals(logits, np.arange(4, 8)).compute()
    assert result["top5"] == result["accuracy"] == 0
    assert math.isnan(result["loss"])


@given(cuts=st.lists(st.integers(0, 60), max_size=8), seed=st.integers(0, 1000))
def test_any_partition_into_batches_gives_the_same_totals(cuts, seed):
    logits, label = make_batch(60, 10, seed)
    whole, parts = totals(logits, label), totals(logits, label, sorted(cuts))
    for name, value in vars(whole).items():
        if name == "loss_sum":  # the only sum of floats
            assert parts.loss_sum == pytest.approx(value, rel=FLOAT64_LAYER)
        else:
            np.testing.assert_array_equal(getattr(parts, name), value, err_msg=name)


def test_a_loss_that_is_known_is_weighted_by_the_size_of_its_batch():
    logits, label = make_batch(10, 10, seed=1)
    metrics = Metrics(10)
    metrics.update(logits[:8], label[:8], loss=1.0)
    metrics.update(logits[8:], label[8:], loss=2.0)
    assert metrics.compute()["loss"] == pytest.approx(1.2, rel=FLOAT64_LAYER)


def test_nothing_added_gives_nothing():
    assert Metrics(10).compute() == {}


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0, 1e30])
def test_cross_entropy_of_any_size_of_logits(size):
    logits, label = make_batch(30, 10, seed=2)
    logits *= np.float32(size)
    z = logits.astype(np.longdouble)
    expected = np.mean(np.logaddexp.reduce(z, axis=1) - z[np.arange(30), label])
    assert cross_entropy(logits, label) == pytest.approx(float(expected), rel=FLOAT64_LAYER)


@given(seed=st.integers(0, 1000))
def test_through_json_and_back_to_the_last_bit(seed):
    logits, label = make_batch(23, 7, seed)
    metrics = totals(logits, label, [5, 11])
    read = Metrics.from_json(json.loads(json.dumps(metrics.to_json())))
    assert vars(read).keys() == vars(metrics).keys()
    for name, value in vars(metrics).items():
        assert type(getattr(read, name)) is type(value), name
        np.testing.assert_array_equal(getattr(read, name), value, err_msg=name)
    more_logits, more_label = make_batch(9, 7, seed + 1)
    metrics.update(more_logits, more_label)
    read.update(more_logits, more_label)
    assert read.compute() == metrics.compute()  # goes on from there as if never written down
