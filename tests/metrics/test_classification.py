"""Metrics of a data set, against the functions of torchmetrics and for any division into batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from triptych.errors import ConfigError, DataError, TriptychError
from triptych.metrics.classification import ClassificationMetrics, most_confused

GROUPS = {"half": tuple("aaabbbb"), "third": ("x", "y", "z", "x", "y", "z", "x")}


def samples(count=53, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator) + torch.nn.functional.one_hot(labels, classes)
    return logits, labels


def figures(logits, labels, cuts=(), groupings=GROUPS):
    metrics = ClassificationMetrics(logits.shape[1], groupings)
    for part_logits, part_labels in zip(
        torch.tensor_split(logits, cuts), torch.tensor_split(labels, cuts), strict=True
    ):
        metrics.update(part_logits, part_labels)
    return metrics.compute()


def assert_identical(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_equal_to_torchmetrics():
    logits, labels = samples()
    got = figures(logits, labels)
    assert got["count"] == 53
    assert got["top1"] == pytest.approx(multiclass_accuracy(logits, labels, 7, average="micro").item())
    assert got["top5"] == pytest.approx(
        multiclass_accuracy(logits, labels, 7, average="micro", top_k=5).item()
    )
    np.testing.assert_array_equal(got["confusion"], multiclass_confusion_matrix(logits, labels, 7).numpy())
    per_class = multiclass_accuracy(logits, labels, 7, average="none").numpy()
    np.testing.assert_allclose(got["per_class"], per_class, rtol=1e-6)
    assert got["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())


def test_groupings_sum_probabilities():
    """Class 0 has the largest probability, but the other group has the larger sum."""
    logits = torch.tensor([[0.4, 0.3, 0.3]]).log()
    got = figures(logits, torch.tensor([0]), groupings={"kind": ("a", "b", "b")})
    assert got["top1"] == 1.0
    assert got["kind"] == 0.0


@given(cuts=st.lists(st.integers(0, 53), max_size=8).map(sorted))
@settings(max_examples=30, deadline=None)
def test_any_split_into_batches_is_identical(cuts):
    logits, labels = samples()
    assert_identical(figures(logits, labels), figures(logits, labels, cuts))


@given(order=st.permutations(range(23)))
@settings(max_examples=20, deadline=None)
def test_order_does_not_matter(order):
    logits, labels = samples(23)
    assert_identical(figures(logits, labels), figures(logits[list(order)], labels[list(order)]))


def test_processes_add_up():
    """Merging two accumulators, as torchmetrics does between processes, gives the metrics of all images."""
    logits, labels = samples()
    expected = figures(logits, labels)
    one, two = ClassificationMetrics(7, GROUPS), ClassificationMetrics(7, GROUPS)
    one.update(logits[:20], labels[:20])
    two.update(logits[20:], labels[20:])
    one.merge_state(two)
    assert_identical(expected, one.compute())


def test_few_classes():
    logits, labels = samples(classes=2)
    assert figures(logits, labels, groupings=None)["top5"] == 1.0
    one = figures(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), groupings=None)
    assert one["top1"] == one["top5"] == 1.0


def test_ties_go_to_the_lower_index_and_nan_never_wins():
    logits = torch.tensor([[1.0, 1.0], [1.0, 1.0], [math.nan, 0.0]])
    got = figures(logits, torch.tensor([0, 1, 0]), groupings=None)
    assert got["confusion"].tolist() == [[1, 1], [1, 0]]
    assert got["top1"] == pytest.approx(1 / 3)
    assert math.isnan(got["loss"])


def test_an_unseen_class_is_not_a_number():
    got = figures(torch.eye(3)[:2], torch.tensor([0, 1]), groupings=None)
    assert got["mean_per_class"] == 1.0
    assert math.isnan(got["per_class"][2])
    assert got["per_class_count"].tolist() == [1, 1, 0]


def test_reset_forgets():
    logits, labels = samples()
    metrics = ClassificationMetrics(7, GROUPS)
    metrics.update(logits, labels)
    metrics.reset()
    metrics.update(logits[:9], labels[:9])
    assert_identical(metrics.compute(), figures(logits[:9], labels[:9]))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 7), torch.tensor([0, 7]), "label 7 is outside the 7 classes 0..6"),
        (torch.zeros(2, 7), torch.tensor([0, -1]), "label -1 is outside"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), r"logits are \(2, 3\)"),
        (torch.zeros(2, 7), torch.tensor([0]), r"labels \(1,\), which must be"),
    ],
)
def test_bad_batches_are_named(logits, labels, message):
    with pytest.raises(TriptychError, match=message):
        ClassificationMetrics(7).update(logits, labels)


def test_bad_groupings_are_named():
    with pytest.raises(ConfigError, match="names 2 classes, which must be 3"):
        ClassificationMetrics(3, {"kind": ("a", "b")})
    with pytest.raises(ConfigError, match="the name of a metric"):
        ClassificationMetrics(2, {"loss": ("a", "b")})


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_seen():
    with pytest.raises(DataError, match="no labeled image"):
        ClassificationMetrics(3).compute()


def test_many_classes_have_no_confusion_matrix():
    assert figures(torch.zeros(1, 5000), torch.tensor([3]), groupings=None)["confusion"] is None


def test_most_confused():
    assert most_confused(np.array([[5, 2, 0], [1, 9, 3], [0, 0, 4]]), top=2) == [(1, 2, 3), (0, 1, 2)]
    assert most_confused(np.eye(3, dtype=int)) == []
