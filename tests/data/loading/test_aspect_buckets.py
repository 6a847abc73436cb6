"""Aspect-ratio buckets: their shapes, the assignment of images, and batches of one shape each."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from triptych.data.images import read_image_size
from triptych.data.loading.aspect_buckets import BucketedDataset, BucketOrder, assign_buckets, bucket_shapes
from triptych.data.open import open_source
from triptych.errors import ConfigError


@given(
    rows=st.integers(2, 20),
    columns=st.integers(2, 20),
    unit=st.sampled_from([1, 8, 16]),
    count=st.integers(1, 12),
)
def test_shapes_are_multiples_of_about_the_same_area(rows, columns, unit, count):
    size = (rows * unit, columns * unit)
    shapes = bucket_shapes(size, count, unit)
    assert 1 <= len(shapes) <= count
    assert len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % unit == width % unit == 0
        assert height > 0
        assert width > 0
        # Rounding changes a side by at most half a unit.
        short = min(height, width)
        assert height * width <= rows * columns * unit**2 * (1 + unit / short) ** 2 + 1e-9
    if count > 2:
        aspects = [width / height for height, width in shapes]
        assert aspects == sorted(aspects)


def test_the_usual_shapes():
    assert bucket_shapes((64, 64), 5, 8) == ((88, 48), (80, 56), (64, 64), (56, 80), (48, 88))
    assert bucket_shapes((64, 64), 1, 8) == ((64, 64),)
    with pytest.raises(ConfigError, match="60 x 64 cannot have buckets; make both sides multiples of 8"):
        bucket_shapes((60, 64), 3, 8)


def test_images_go_to_the_nearest_aspect(tmp_path):
    sizes = {"a": (40, 40), "b": (80, 30), "c": (30, 80), "d": (41, 40)}  # width, height
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (80, 30)).save(tmp_path / "e.jpg", exif=turned)
    (tmp_path / "f.png").write_bytes(b"nothing")
    source = open_source(tmp_path)
    shapes = ((88, 48), (64, 64), (48, 88))
    assert assign_buckets(source, shapes).tolist() == [1, 2, 0, 1, 0, 0]
    assert read_image_size(str(tmp_path / "e.jpg")) == (80, 30)
    assert read_image_size(b"nothing") is None


@given(
    buckets=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    size=st.integers(1, 9),
    epoch=st.integers(0, 3),
)
def test_batches_have_one_bucket_and_depend_only_on_the_epoch(buckets, size, epoch):
    buckets = np.array(buckets)
    for shuffle in (True, False):
        order = BucketOrder(buckets, size, 5, shuffle=shuffle)
        batches = order.batches(epoch)
        assert len(batches) == len(order)
        again = BucketOrder(buckets, size, 5, shuffle=shuffle).batches(epoch)
        assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
        assert all(len(set(buckets[batch])) == 1 for batch in batches)
        rows = np.concatenate(batches)
        assert len(set(rows)) == len(rows)
        if not shuffle:
            assert sorted(rows) == list(range(len(buckets)))
        else:
            for number in np.unique(buckets):
                own = [len(batch) for batch in batches if buckets[batch[0]] == number]
                count = (buckets == number).sum()
                assert set(own) == ({size} if count >= size else {count})


def test_epochs_differ():
    order = BucketOrder(np.arange(40) % 2, 4, 0, shuffle=True)
    first, second = ([batch.tolist() for batch in order.batches(epoch)] for epoch in (0, 1))
    assert first != second


def test_rows_refer_to_the_full_source():
    class Part:
        def __init__(self, rows):
            self.rows = rows

        def __getitems__(self, indices):
            return {"row": list(indices), "value": [int(self.rows[i]) * 10 for i in indices]}

    dataset = BucketedDataset(np.array([0, 1, 0, 1, 1]), lambda number, rows: Part(rows))
    batch = dataset.__getitems__([4, 1])
    assert batch == {"row": [4, 1], "value": [40, 10]}
