"""Metrics of sets of masks, against a slow loop over pixels, torchmetrics, and for any division into batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

from triptych.errors import DataError, TriptychError
from triptych.metrics.segmentation import SegmentationMetrics


def samples(count=9, classes=5, size=(6, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(classes, (count, *size), generator=generator)
    logits = torch.randn(count, classes, *size, generator=generator)
    logits += torch.nn.functional.one_hot(masks, classes).permute(0, 3, 1, 2)
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = 255
    return logits, masks.to(torch.uint8)


def figures(predicted, masks, cuts=(), classes=5):
    metrics = SegmentationMetrics(classes)
    parts = zip(torch.tensor_split(predicted, cuts), torch.tensor_split(masks, cuts), strict=True)
    for part_predicted, part_masks in parts:
        metrics.update(part_predicted, part_masks)
    return metrics.compute()


def assert_identical(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_equal_to_a_slow_loop():
    logits, masks = samples()
    got, guess = figures(logits, masks), logits.argmax(1)
    pairs = [(int(t), int(p)) for t, p in zip(masks.flatten(), guess.flatten(), strict=True) if t != 255]
    assert got["count"] == len(pairs)
    assert got["pixel_accuracy"] == sum(t == p for t, p in pairs) / len(pairs)
    ious, accuracies = [], []
    for k in range(5):
        both = sum(t == k and p == k for t, p in pairs)
        ious.append(both / sum(t == k or p == k for t, p in pairs))
        accuracies.append(both / sum(t == k for t, p in pairs))
        for j in range(5):
            assert got["confusion"][k, j] == sum(pair == (k, j) for pair in pairs)
    assert got["per_class_iou"].tolist() == ious
    assert got["per_class_accuracy"].tolist() == accuracies
    assert got["miou"] == pytest.approx(sum(ious) / 5, rel=1e-14)
    assert got["mean_accuracy"] == pytest.approx(sum(accuracies) / 5, rel=1e-14)
    assert got["confusion"].dtype == np.int64


def test_equal_to_torchmetrics():
    logits, masks = samples()
    got, masks = figures(logits, masks), masks.long()
    expected = multiclass_confusion_matrix(logits, masks, 5, ignore_index=255)
    np.testing.assert_array_equal(got["confusion"], expected.numpy())
    per_class = multiclass_jaccard_index(logits, masks, 5, average="none", ignore_index=255)
    np.testing.assert_allclose(got["per_class_iou"], per_class.numpy(), rtol=1e-6)


@given(cuts=st.lists(st.integers(0, 9), max_size=6).map(sorted), order=st.permutations(range(9)))
def test_batches_and_order_do_not_matter(cuts, order):
    logits, masks = samples()
    assert_identical(figures(logits, masks), figures(logits[list(order)], masks[list(order)], cuts))


def test_labels_do_as_well_as_logits():
    logits, masks = samples()
    for dtype in (torch.int64, torch.uint8):
        assert_identical(figures(logits, masks), figures(logits.argmax(1).to(dtype), masks.long()))


def test_processes_add_up():
    logits, masks = samples()
    one, two = SegmentationMetrics(5), SegmentationMetrics(5)
    one.update(logits[:2], masks[:2])
    two.update(logits[2:], masks[2:])
    one.merge_state(two)
    assert_identical(figures(logits, masks), one.compute())
    one.reset()
    one.update(logits, masks)
    assert_identical(figures(logits, masks), one.compute())


def test_absent_classes_are_not_numbers():
    """Class 2 is only predicted: its IoU is 0 and counts. Class 3 does not occur."""
    got = figures(torch.tensor([[[0, 1, 2]]]), torch.tensor([[[0, 1, 1]]]), classes=4)
    np.testing.assert_array_equal(got["per_class_iou"], [1, 0.5, 0, math.nan])
    np.testing.assert_array_equal(got["per_class_accuracy"], [1, 0.5, math.nan, math.nan])
    assert got["miou"] == 0.5
    assert got["mean_accuracy"] == 0.75
    assert got["per_class_count"].tolist() == [1, 2, 0, 0]


def test_what_is_ignored_may_be_predicted_as_anything():
    got = figures(torch.tensor([[[0, 9]]]), torch.tensor([[[0, 255]]]), classes=2)
    assert (got["count"], got["pixel_accuracy"]) == (1, 1.0)
    metrics = SegmentationMetrics(2, ignore_index=0)
    metrics.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1]]]))
    assert metrics.compute()["count"] == 1


@pytest.mark.parametrize(
    ("predicted", "mask", "message"),
    [
        (
            torch.zeros(1, 3, 2, 2),
            torch.tensor([[[0, 1], [2, 3]]]),
            "mask has 3, which is outside the 3 classes 0..2",
        ),
        (torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 1], [2, -1]]]), "mask has -1"),
        (torch.full((1, 2, 2), 7), torch.zeros(1, 2, 2, dtype=torch.uint8), "prediction has 7"),
        (torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8), r"must be \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 2, 3), torch.zeros(1, 2, 2, dtype=torch.uint8), "must have the same shape"),
    ],
)
def test_bad_batches_are_named(predicted, mask, message):
    with pytest.raises(TriptychError, match=message) as caught:
        SegmentationMetrics(3).update(predicted, mask)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_seen():
    with pytest.raises(DataError, match="no labeled pixel"):
        SegmentationMetrics(3).compute()
