"""Splits and wrapped folders as archives of Kaggle, Roboflow and others have them."""

import logging

import numpy as np
import pytest
from PIL import Image

from triptych.data.open import open_source, train_and_eval
from triptych.errors import DataError


@pytest.fixture
def write(tmp_path):
    """A function that writes one small image for each path."""

    def write(*paths: str):
        for number, path in enumerate(paths):
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".png":
                Image.fromarray(np.full((4, 4, 3), number * 20, np.uint8)).save(file)
            else:
                file.write_text("text\n")
        return tmp_path

    return write


def classes_of(folder, split=None, **options):
    source = open_source(str(folder), split, **options)
    return list(source.classes), len(source)


LAYOUTS = {
    "set": ("training_set/cat/1.png", "training_set/dog/2.png", "test_set/cat/3.png", "test_set/dog/4.png"),
    "set twice": (
        "training_set/training_set/cat/1.png",
        "training_set/training_set/dog/2.png",
        "test_set/test_set/cat/3.png",
        "test_set/test_set/dog/4.png",
    ),
    "prefix": (
        "seg_train/seg_train/cat/1.png",
        "seg_train/seg_train/dog/2.png",
        "seg_test/seg_test/cat/3.png",
        "seg_test/seg_test/dog/4.png",
        "seg_pred/seg_pred/5.png",
    ),
    "short": ("tr/cat/1.png", "tr/dog/2.png", "te/cat/3.png", "te/dog/4.png"),
    "numbered": ("train/cat/1.png", "train/dog/2.png", "test1/cat/3.png", "test1/dog/4.png"),
    "capitals": ("Training/cat/1.png", "Training/dog/2.png", "Testing/cat/3.png", "Testing/dog/4.png"),
    "camel case": (
        "TrainImages/cat/1.png",
        "TrainImages/dog/2.png",
        "TestImages/cat/3.png",
        "TestImages/dog/4.png",
    ),
    "years": ("train2017/cat/1.png", "train2017/dog/2.png", "val2017/cat/3.png", "val2017/dog/4.png"),
    "other words, equal classes": (
        "my train photos/cat/1.png",
        "my train photos/dog/2.png",
        "test/cat/3.png",
    ),
    "wrapped": (
        "cats_and_dogs/train/cat/1.png",
        "cats_and_dogs/train/dog/2.png",
        "cats_and_dogs/validation/cat/3.png",
    ),
    "wrapped twice": ("a/b/train/cat/1.png", "a/b/train/dog/2.png", "a/b/test/cat/3.png", "a/README.md"),
    "a copy inside": (
        *("train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "chest/train/cat/1.png"),
        *("chest/test/cat/3.png", "__MACOSX/train/x.png"),
    ),
    "roboflow": (
        "train/cat/1.png",
        "train/dog/2.png",
        "valid/cat/3.png",
        "test/dog/4.png",
        "README.roboflow.txt",
    ),
    "an exact name before a longer one": (
        *("Training/cat/1.png", "Training/dog/2.png", "Test/cat/3.png", "test-multiple_fruits/4.png"),
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_no_classes(layout, stream, write):
    folder = write(*LAYOUTS[layout])
    assert classes_of(folder, "train", stream=stream) == (["cat", "dog"], 2)
    train, held_out = train_and_eval(str(folder), stream=stream)
    assert len(train) == 2
    assert len(held_out) in (1, 2)


@pytest.mark.parametrize(
    ("paths", "classes"),
    [
        (("test tube/1.png", "train station/2.png"), ["test tube", "train station"]),
        (("train/1.png", "bus/2.png"), ["bus", "train"]),
        (("animals/cat/1.png", "animals/dog/2.png"), ["cat", "dog"]),
        (("photos/archive/cat/1.png", "photos/archive/dog/2.png", "photos/license.txt"), ["cat", "dog"]),
        (("cat/1.png",), ["cat"]),
        (("cat/a/1.png", "dog/b/2.png"), ["cat", "dog"]),
    ],
)
def test_classes_are_no_splits(paths, classes, write):
    assert classes_of(write(*paths)) == (classes, len(paths) - any(path.endswith(".txt") for path in paths))


def test_what_was_taken_for_splits_is_said(write, caplog):
    folder = write(*LAYOUTS["prefix"])
    with caplog.at_level(logging.WARNING):
        open_source(str(folder), "train")
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} is divided into splits: test from seg_test/seg_test, train from seg_train/seg_train",
        f"seg_pred in {folder} is no split and left out",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        open_source(str(write("x/animals/cat/1.png", "x/animals/dog/2.png") / "x"))
    assert [record.getMessage() for record in caplog.records] == [
        f"the data in {folder / 'x'} is read from animals"
    ]


def test_nothing_is_said_of_plain_splits(write, caplog):
    folder = write("train/a/1.png", "train/b/2.png", "val/a/3.png")
    with caplog.at_level(logging.WARNING):
        open_source(str(folder), "train")
    assert not caplog.records


def test_two_folders_for_one_split_are_refused(write):
    folder = write("train2014/a/1.png", "train2017/a/2.png", "val2017/a/3.png")
    with pytest.raises(DataError, match="train2014 and train2017 are both named like the split 'train'"):
        open_source(str(folder))


def test_images_and_masks_below_a_folder(write):
    folder = write("data/images/1.png", "data/images/2.png")
    (folder / "data/masks").mkdir()
    for name in "12":
        Image.fromarray(np.eye(4, dtype=np.uint8)).save(folder / f"data/masks/{name}.png")
    source = open_source(str(folder))
    assert len(source) == 2
    assert source[0].mask.shape == (4, 4)
