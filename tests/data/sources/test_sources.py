"""Layouts of a user's images, and a one-line error for each mistake in them."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.data.config import DataConfig
from triptych.data.loading.loader import make_loader
from triptych.data.open import open_source, train_and_eval
from triptych.data.resizing import Resize
from triptych.data.sources.splits import choose_held_out
from triptych.errors import DataError

# -------------------------------------------------------------------------------------------- class folders


@pytest.fixture
def pets(tmp_path: Path, put) -> Path:
    for number, name in enumerate(["dog/1.png", "cat/2.PNG", "cat/deep/3.png", "bird/1.webp", "cat/1.png"]):
        put(tmp_path / "pets" / name, number)
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("x")
    put(tmp_path / "pets" / ".ipynb_checkpoints" / "1.png")
    put(tmp_path / "pets" / "cat" / "._1.png")
    return tmp_path / "pets"


def test_class_folders(pets, values):
    source = open_source(pets)
    assert source.classes == ("bird", "cat", "dog")
    assert [source[i].id for i in range(5)] == [
        "bird/1.webp",
        "cat/1.png",
        "cat/2.PNG",
        "cat/deep/3.png",
        "dog/1.png",
    ]
    assert [source[i].label for i in range(5)] == [0, 1, 1, 1, 2] == source.labels.tolist()
    assert values(source) == [3, 4, 1, 2, 0]
    assert source[0].caption is None
    assert source.groupings == {}


def test_a_source_can_be_sent_to_a_worker(pets):
    source = pickle.loads(pickle.dumps(open_source(pets)))
    assert source[1].id == "cat/1.png"
    loader = make_loader(source, DataConfig(workers=2, cache="off"), Resize(size=(4, 5)), train=False)
    (batch,) = loader
    assert batch["image"][:, 0, 0, 0].tolist() == [3, 4, 1, 2, 0]


def test_a_relative_path_and_a_home_path(pets, monkeypatch, values):
    monkeypatch.chdir(pets.parent)
    assert values(open_source("pets")) == [3, 4, 1, 2, 0]
    monkeypatch.setenv("HOME", str(pets.parent))
    assert values(open_source("~/pets")) == [3, 4, 1, 2, 0]


def test_a_changed_folder_changes_the_fingerprint(pets, put):
    before = open_source(pets)
    assert before.fingerprint == open_source(pets).fingerprint
    put(pets / "cat" / "9.png")
    after = open_source(pets)
    assert len(after) == len(before) + 1
    assert after.fingerprint != before.fingerprint
    (pets / "cat" / "9.png").rename(pets / "dog" / "9.png")
    assert open_source(pets).fingerprint != after.fingerprint


def test_a_damaged_file_is_reported_when_it_is_decoded(pets):
    (pets / "cat" / "1.png").write_bytes(b"")
    source = open_source(pets)
    assert len(source) == 5
    loader = make_loader(source, DataConfig(workers=0), Resize(size=(4, 5)), train=False)
    assert sum(len(batch["id"]) for batch in loader) == 4
    assert list(loader.bad) == ["cat/1.png"]


def test_a_folder_without_classes_has_no_labels(tmp_path, put):
    put(tmp_path / "a.png")
    source = open_source(tmp_path)
    assert source.classes is None
    assert source.labels is None
    assert source[0].label is None


def test_linked_class_folders_are_followed(pets, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "cat").symlink_to(pets / "cat")
    assert open_source(tmp_path / "some").classes == ("cat",)


def test_splits_have_the_same_classes(tmp_path, put, refusal):
    for name in (
        "train/b/1.png",
        "train/c/1.png",
        "train/b/2.png",
        "validation/c/1.png",
        "validation/a/1.png",
    ):
        put(tmp_path / name)
    put(tmp_path / "docs" / "logo.png")  # a further folder does not hide the splits
    train, val = open_source(tmp_path), open_source(tmp_path, "val")
    assert train.classes == val.classes == ("a", "b", "c")
    assert train.labels.tolist() == [1, 1, 2]
    assert val.labels.tolist() == [0, 2]
    assert val[0].id == "validation/a/1.png"
    assert open_source(tmp_path, "valid")[0].id == open_source(tmp_path, "eval")[0].id == val[0].id
    assert train.fingerprint != val.fingerprint
    assert [len(part) for part in train_and_eval(tmp_path)] == [3, 2]
    assert "no split 'test'; it has train, val" in refusal(tmp_path, "test")


def test_a_class_may_be_called_train(tmp_path, put):
    for name in ("train/1.png", "car/1.png", "bus/1.png"):
        put(tmp_path / name)
    assert open_source(tmp_path).classes == ("bus", "car", "train")


def test_only_a_training_split(tmp_path, put):
    for name in ("train/a/1.png", "train/b/1.png", "train/b/2.png"):
        put(tmp_path / name)
    train, held = train_and_eval(tmp_path, 0.4)
    assert train.classes == held.classes == ("a", "b")
    assert len(train) + len(held) == 3


def test_bad_folders(tmp_path, pets, put, refusal):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    assert "empty is empty" in refusal(tmp_path / "empty")
    assert "text holds no images" in refusal(tmp_path / "text")
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "does not exist" in refusal("nowhere")
    assert "a file of unknown type" in refusal(pets / "dog" / "1.png")
    put(pets / "stray.png")
    assert "stray.png is next to class folders" in refusal(pets)
    assert "it has no splits" in refusal(put(tmp_path / "flat" / "a.png").parent, "val")


@pytest.mark.skipif(os.name == "nt", reason="Windows names are UTF-16")
def test_file_names_that_are_not_utf8_are_reported(tmp_path, png, refusal):
    path = os.fsencode(tmp_path) + b"/\xff.png"
    try:
        with open(path, "wb") as file:
            file.write(png())
    except OSError:
        pytest.skip("the file system refuses such names")
    assert "not UTF-8" in refusal(tmp_path)


# ------------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_with_labels_and_captions(tmp_path, name, values, metadata):
    rows = [
        {"file_name": "b.png", "label": "dog", "text": "a dog"},
        {"file_name": "sub/a.png", "label": "cat", "text": "a cat"},
        {"file_name": "c.png", "label": "dog", "text": "two dogs"},
    ]
    folder = metadata(tmp_path / "meta", rows, name)
    for spec in (folder, folder / name):
        source = open_source(spec)
        assert source.classes == ("cat", "dog")
        assert source.labels.tolist() == [1, 0, 1]
        assert [source[i].caption for i in range(3)] == ["a dog", "a cat", "two dogs"]
        assert source[1].id == "sub/a.png"
        assert values(source) == [0, 1, 2]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_with_numbers(tmp_path, name, metadata):
    rows = [{"file_name": f"{i}.png", "class": label} for i, label in enumerate((2, 0, 2))]
    source = open_source(metadata(tmp_path, rows, name))
    assert source.classes == ("0", "1", "2")
    assert source.labels.tolist() == [2, 0, 2]


def test_metadata_of_captions_only(tmp_path, metadata):
    source = open_source(metadata(tmp_path, [{"file_name": "a.png", "caption": ["one", "two"]}]))
    assert source.classes is None
    assert source[0].caption == "one"


def test_metadata_in_splits(tmp_path, metadata):
    metadata(tmp_path / "train", [{"file_name": "a.png", "label": "y"}, {"file_name": "b.png", "label": "z"}])
    metadata(tmp_path / "test", [{"file_name": "a.png", "label": "z"}])
    train, held = train_and_eval(tmp_path)
    assert train.classes == held.classes == ("y", "z")
    assert held.labels.tolist() == [1]
    assert held[0].id == "test/a.png"


def test_columns_can_be_chosen_and_must_be_when_in_doubt(tmp_path, refusal, metadata):
    rows = [{"file_name": "a.png", "class": "x", "category": "y", "title": "hello", "size": 3}]
    folder = metadata(tmp_path, rows)
    message = refusal(folder)
    assert "class, category" in message
    assert "label_column" in message
    source = open_source(folder, label_column="category", caption_column="title")
    assert source.classes == ("y",)
    assert source[0].caption == "hello"
    assert "no column 'breed' for the label; the columns are class, category, title, size" in refusal(
        folder, label_column="breed"
    )


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"name": "a.png"}], "no column file_name"),
        ([{"file_name": "a.png", "label": "x"}, {"file_name": "b.png"}], "1 of 2 examples have no label"),
        ([{"file_name": "a.png", "label": -3}], "label -3 of a.png"),
        ([{"file_name": "a.png", "label": 5_000_000}], "goes up to 5000000"),
        ([{"file_name": "a.png", "label": 1}, {"file_name": "b.png", "label": "x"}], "mixes int and str"),
        ([{"file_name": "a.png", "label": 0.5}], "integers or text"),
        ([{"file_name": "a.png", "label": 1}, {"label": 1}], "no file_name in row 2"),
    ],
)
def test_bad_metadata(tmp_path, rows, what, refusal, metadata):
    options = {"label_column": "label"} if "label" in rows[0] else {}
    assert what in refusal(metadata(tmp_path, rows), **options)


def test_broken_metadata(tmp_path, refusal):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"file_name": \n')
    assert "line 2 is not JSON" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("[1]\n")
    assert "line 1 is '[1]'" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("")
    assert "no rows" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe{")
    assert "UTF-8" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "la\\u0000bel": "x"}\n')
    assert "NUL character; rename the column" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "la\0bel": "x"}\n')
    assert "NUL character" in refusal(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name\n")
    assert "both" in refusal(tmp_path)


# --------------------------------------------------------------------------------------------------- emoji


def test_the_emoji():
    train, held = train_and_eval("emoji")
    assert (train.name, held.name) == ("emoji-train", "emoji-test")
    assert open_source("emoji").name == "emoji-train"
    assert open_source("emoji", "eval").name == open_source("emoji", "test").name == "emoji-test"


# ------------------------------------------------------------------------------------------------ held out


@given(
    labels=st.lists(st.integers(0, 6), min_size=2, max_size=80),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 10),
)
@settings(max_examples=80, deadline=None)
def test_the_held_out_fraction_is_balanced_and_leaves_each_class(labels, fraction, seed):
    labels = np.array(labels)
    held = choose_held_out(len(labels), labels, fraction, seed)
    assert np.array_equal(held, choose_held_out(len(labels), labels, fraction, seed))
    assert held.any()
    if len(np.unique(labels)) < len(labels):
        assert set(labels[~held]) == set(labels)
    counts = np.bincount(labels)
    for label in np.unique(labels):
        assert abs(held[labels == label].sum() - fraction * counts[label]) <= 2
        assert held[labels == label].any() or counts[label] == 1 or len(labels) == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_rare_class_is_held_out_and_the_others_as_before(seed):
    labels = np.repeat([0, 1], [100, 2])
    held = choose_held_out(102, labels, 0.1, seed)
    assert held[labels == 1].sum() == 1
    assert held[labels == 0].sum() in (9, 10)


def test_the_total_that_is_held_out_is_the_fraction():
    assert choose_held_out(700, np.repeat(np.arange(50), 14), 0.1, 0).sum() == 70
    assert choose_held_out(100, np.repeat(np.arange(50), 2), 0.1, 0).sum() == 50
    assert choose_held_out(100, None, 0.1, 0).sum() == 10
    assert (choose_held_out(100, None, 0.1, 0) != choose_held_out(100, None, 0.1, 1)).any()


def test_a_seeded_split_is_the_same_each_time(pets):
    first, second = train_and_eval(pets, 0.2, 3), train_and_eval(pets, 0.2, 3)
    assert [p.fingerprint for p in first] == [p.fingerprint for p in second]
    train, held = first
    both = sorted([train[i].id for i in range(len(train))] + [held[i].id for i in range(len(held))])
    assert both == sorted(open_source(pets)[i].id for i in range(5))
    assert train.fingerprint != held.fingerprint
    assert train.labels.tolist() == [train[i].label for i in range(len(train))]


def test_one_image_cannot_be_split(tmp_path, put):
    put(tmp_path / "a" / "1.png")
    with pytest.raises(DataError, match="one image"):
        train_and_eval(tmp_path)
