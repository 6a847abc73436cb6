"""Tables of other programs that label the images of a folder, and test sets without labels."""

import logging

import numpy as np
import pytest
from PIL import Image

from triptych.data.open import open_source, train_and_eval


@pytest.fixture
def write(tmp_path):
    """A function that writes a text, or a small image, at each path."""

    def write(*images: str, **texts: str):
        for number, path in enumerate(images):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), number * 10, np.uint8)).save(tmp_path / path)
        for path, text in texts.items():
            (tmp_path / path).write_text(text)
        return tmp_path

    return write


def labels_of(source):
    return {source[i].id.rpartition("/")[2]: source.classes[source[i].label] for i in range(len(source))}


FLAT = tuple(f"images/{n}.png" for n in "abcd")
EXPECTED = {"a.png": "cat", "b.png": "dog", "c.png": "cat", "d.png": "dog"}
TABLES = {
    "Kaggle, names without suffix": ("labels.csv", "id,breed\na,cat\nb,dog\nc,cat\nd,dog\n"),
    "names with suffix": ("train.csv", "filename,label\na.png,cat\nb.png,dog\nc.png,cat\nd.png,dog\n"),
    "semicolons": ("list.csv", "File;Class;Year\na.png;cat;1\nb.png;dog;2\nc.png;cat;3\nd.png;dog;4\n"),
    "tabs, no head": (
        "list.txt",
        "images/a.png\tcat\nimages/b.png\tdog\nimages/c.png\tcat\nimages/d.png\tdog\n",
    ),
    "one column for each class": (
        "images/_classes.csv",
        "filename, cat, dog\na.png, 1, 0\nb.png, 0, 1\nc.png, 1, 0\nd.png, 0, 1\n",
    ),
    "fractions": ("gt.csv", "image,cat,dog\na,1.0,0.0\nb,0.0,1.0\nc,1.0,0.0\nd,0.0,1.0\n"),
    "Label Studio": (
        "project-1.csv",
        "image,id,choice\n/data/upload/1/a.png,1,cat\n/data/upload/1/b.png,2,dog\n"
        "/data/upload/1/c.png,3,cat\n/data/upload/1/d.png,4,dog\n",
    ),
    "metadata.csv with another name of the column": (
        "metadata.csv",
        "image,class\na,cat\nb,dog\nc,cat\nd,dog\n",
    ),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_labels_from_a_table(write, table):
    folder = write(*FLAT, **dict([table]), **{"sample_submission.csv": "id,label\na,0\nb,0\n"})
    assert labels_of(open_source(folder)) == EXPECTED


def test_a_column_can_be_chosen(write, caplog):
    table = "image_id,dx,sex\na,cat,f\nb,dog,f\nc,cat,m\nd,dog,m\n"
    folder = write("x_part_1/a.png", "x_part_1/b.png", "x_part_2/c.png", "x_part_2/d.png", **{"m.csv": table})
    with caplog.at_level(logging.WARNING):
        assert open_source(folder).labels is None
    assert "each of the columns dx, sex" in caplog.text
    assert labels_of(open_source(folder, label_column="dx")) == EXPECTED


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("test.csv", "ClassId,Path\nn2,test/1.png\nn1,test/2.png\n"),
        ("solution.csv", "ImageId,PredictionString\n1,n2 0 0 9 9\n2,n1 1 1 2 2 n1 3 3 4 4\n"),
        ("test/val_annotations.txt", "1.png\tn2\t0\t0\n2.png\tn1\t0\t0\n"),
    ],
)
def test_an_evaluation_split_without_class_folders(write, file, text):
    folder = write(
        "train/n1/1.png", "train/n2/2.png", "test/images/1.png", "test/images/2.png", **{file: text}
    )
    training, evaluation = train_and_eval(folder)
    assert training.classes == evaluation.classes == ("n1", "n2")
    assert labels_of(evaluation) == {"1.png": "n2", "2.png": "n1"}


def test_a_test_split_without_labels_is_not_evaluated_on(write, caplog):
    images = (f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(10))
    folder = write(*images, "test1/0.png", "test1/1.png")
    with caplog.at_level(logging.WARNING):
        training, evaluation = train_and_eval(folder)
    assert (len(training), len(evaluation)) == (18, 2)
    assert "has no labels; 0.1 of the training data" in caplog.text
    assert open_source(folder, "test").labels is None


def test_a_column_of_splits(write):
    table = "file_name,label,split\na.png,cat,train\nb.png,dog,train\nc.png,dog,valid\n"
    folder = write("a.png", "b.png", "c.png", **{"metadata.csv": table})
    assert labels_of(open_source(folder, "val")) == {"c.png": "dog"}
    assert len(open_source(folder, "train")) == 2


def test_splits_below_classes_and_parts(write):
    folder = write(
        *(f"part {n}/{c}/{s}/{n}{s}.png" for n in "12" for c in ("cat", "dog") for s in ("train", "test"))
    )
    training, evaluation = train_and_eval(folder)
    assert training.classes == ("cat", "dog")
    assert (len(training), len(evaluation)) == (4, 4)
    assert set(labels_of(evaluation)) == {"1test.png", "2test.png"}


def test_classes_of_an_evaluation_split_that_nothing_trains(write, caplog):
    with caplog.at_level(logging.WARNING):
        open_source(write("train/Cat/1.png", "train/Dog/1.png", "val/Cat/1.png", "val/dog/2.png"))
    assert "the split val has classes that train lacks: dog" in caplog.text


def test_a_caption_is_no_table(write):
    folder = write("images/a.png", "images/b.png", **{"images/a.txt": "a.png, b.png\na, b\n"})
    source = open_source(folder)
    assert source.labels is None
    assert source[0].caption == "a.png, b.png"
