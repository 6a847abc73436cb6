"""Every way a user's pictures can lie about, and one clear line for every way they can be wrong."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triptych.data.config import DataConfig
from triptych.data.images import Resize, decode
from triptych.data.loader import make_loader
from triptych.data.sources import open_source, train_and_eval
from triptych.data.splits import held_back
from triptych.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of `datasets` that nobody else uses, and no hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def put(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value))
    return path


def values(source) -> list[int]:
    """The red of each picture, decoded."""
    return [int(decode(source[i].image)[0, 0, 0]) for i in range(len(source))]


def refusal(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_source(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------- class folders


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for number, name in enumerate(["dog/1.png", "cat/2.PNG", "cat/deep/3.png", "bird/1.webp", "cat/1.png"]):
        put(tmp_path / "pets" / name, number)
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("x")
    put(tmp_path / "pets" / ".ipynb_checkpoints" / "1.png")
    put(tmp_path / "pets" / "cat" / "._1.png")
    return tmp_path / "pets"


def test_class_folders(pets):
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


def test_a_source_travels_to_a_worker(pets):
    source = pickle.loads(pickle.dumps(open_source(pets)))
    assert source[1].id == "cat/1.png"
    loader = make_loader(source, DataConfig(workers=2, cache="off"), Resize(size=(4, 5)), train=False)
    (batch,) = loader
    assert batch["image"][:, 0, 0, 0].tolist() == [3, 4, 1, 2, 0]


def test_a_relative_path_and_a_home_path(pets, monkeypatch):
    monkeypatch.chdir(pets.parent)
    assert values(open_source("pets")) == [3, 4, 1, 2, 0]
    monkeypatch.setenv("HOME", str(pets.parent))
    assert values(open_source("~/pets")) == [3, 4, 1, 2, 0]


def test_a_changed_folder_is_seen_and_changes_the_fingerprint(pets):
    before = open_source(pets)
    assert before.fingerprint == open_source(pets).fingerprint
    put(pets / "cat" / "9.png")
    after = open_source(pets)
    assert len(after) == len(before) + 1
    assert after.fingerprint != before.fingerprint
    (pets / "cat" / "9.png").rename(pets / "dog" / "9.png")
    assert open_source(pets).fingerprint != after.fingerprint


def test_a_damaged_file_among_many_is_found_when_it_is_decoded(pets):
    (pets / "cat" / "1.png").write_bytes(b"")
    source = open_source(pets)
    assert len(source) == 5
    loader = make_loader(source, DataConfig(workers=0), Resize(size=(4, 5)), train=False)
    assert sum(len(batch["id"]) for batch in loader) == 4
    assert list(loader.bad) == ["cat/1.png"]


def test_a_folder_without_classes_has_no_labels(tmp_path):
    put(tmp_path / "a.png")
    source = open_source(tmp_path)
    assert source.classes is None
    assert source.labels is None
    assert source[0].label is None


def test_linked_class_folders_are_followed(pets, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "cat").symlink_to(pets / "cat")
    assert open_source(tmp_path / "some").classes == ("cat",)


def test_splits_agree_in_their_classes(tmp_path):
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


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train/1.png", "car/1.png", "bus/1.png"):
        put(tmp_path / name)
    assert open_source(tmp_path).classes == ("bus", "car", "train")


def test_only_a_training_split(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "train/b/2.png"):
        put(tmp_path / name)
    train, held = train_and_eval(tmp_path, 0.4)
    assert train.classes == held.classes == ("a", "b")
    assert len(train) + len(held) == 3


def test_bad_folders(tmp_path, pets):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    assert "empty is empty" in refusal(tmp_path / "empty")
    assert "text holds no images" in refusal(tmp_path / "text")
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "does not exist" in refusal("nowhere")
    assert "no known kind" in refusal(pets / "dog" / "1.png")
    put(pets / "stray.png")
    assert "stray.png lies beside class folders" in refusal(pets)
    assert "it has no splits" in refusal(put(tmp_path / "flat" / "a.png").parent, "val")


@pytest.mark.skipif(os.name == "nt", reason="Windows names are UTF-16")
def test_names_that_are_not_text_are_named(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.png"
    try:
        with open(path, "wb") as file:
            file.write(png())
    except OSError:
        pytest.skip("the file system refuses such names")
    assert "not UTF-8" in refusal(tmp_path)


# ------------------------------------------------------------------------------------------------- metadata


def metadata(folder: Path, rows: list[dict], name: str = "metadata.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith("csv"):
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    for number, row in enumerate(rows):
        if row.get("file_name"):
            put(folder / str(row["file_name"]), number)
    return folder


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_with_labels_and_captions(tmp_path, name):
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
def test_metadata_with_numbers(tmp_path, name):
    rows = [{"file_name": f"{i}.png", "class": label} for i, label in enumerate((2, 0, 2))]
    source = open_source(metadata(tmp_path, rows, name))
    assert source.classes == ("0", "1", "2")
    assert source.labels.tolist() == [2, 0, 2]


def test_metadata_of_captions_only(tmp_path):
    source = open_source(metadata(tmp_path, [{"file_name": "a.png", "caption": ["one", "two"]}]))
    assert source.classes is None
    assert source[0].caption == "one"


def test_metadata_in_splits(tmp_path):
    metadata(tmp_path / "train", [{"file_name": "a.png", "label": "y"}, {"file_name": "b.png", "label": "z"}])
    metadata(tmp_path / "test", [{"file_name": "a.png", "label": "z"}])
    train, held = train_and_eval(tmp_path)
    assert train.classes == held.classes == ("y", "z")
    assert held.labels.tolist() == [1]
    assert held[0].id == "test/a.png"


def test_columns_can_be_chosen_and_must_be_when_in_doubt(tmp_path):
    rows = [{"file_name": "a.png", "class": "x", "category": "y", "title": "hello", "size": 3}]
    folder = metadata(tmp_path, rows)
    message = refusal(folder)
    assert "class, category" in message
    assert "label_column" in message
    source = open_source(folder, label_column="category", caption_column="title")
    assert source.classes == ("y",)
    assert source[0].caption == "hello"
    assert "no column 'kind' for the label; the data has class, category, title, size" in refusal(
        folder, label_column="kind"
    )


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"name": "a.png"}], "no column file_name"),
        ([{"file_name": "a.png", "label": "x"}, {"file_name": "b.png"}], "1 of 2 examples have no label"),
        ([{"file_name": "a.png", "label": -3}], "label -3 of a.png"),
        ([{"file_name": "a.png", "label": 5_000_000}], "goes up to 5000000"),
        ([{"file_name": "a.png", "label": 1}, {"file_name": "b.png", "label": "x"}], "mixes int and str"),
        ([{"file_name": "a.png", "label": 0.5}], "whole numbers or text"),
        ([{"file_name": "a.png", "label": 1}, {"label": 1}], "no file_name in row 2"),
    ],
)
def test_bad_metadata(tmp_path, rows, what):
    options = {"label_column": "label"} if "label" in rows[0] else {}
    assert what in refusal(metadata(tmp_path, rows), **options)


def test_broken_metadata(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"file_name": \n')
    assert "line 2 is not JSON" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("[1]\n")
    assert "line 1 is '[1]'" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("")
    assert "no rows" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe{")
    assert "UTF-8" in refusal(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name\n")
    assert "both" in refusal(tmp_path)


# ---------------------------------------------------------------------------------------------------- shards


def shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_shards(tmp_path):
    shard(
        tmp_path / "s-0.tar", {"a.png": png(1), "a.cls": b"1", "b.jpg": png(2), "b.cls": b"0", "readme": b""}
    )
    shard(tmp_path / "s-1.tar", {"x/c.v2.png": png(3), "x/c.cls": b"2\n"})
    for spec in (tmp_path, str(tmp_path / "*.tar")):
        source = open_source(spec)
        assert values(source) == [1, 2, 3]
        assert source.classes == ("0", "1", "2")
        assert source.labels.tolist() == [1, 0, 2]
        assert [source[i].id for i in range(3)] == ["s-0.tar/a", "s-0.tar/b", "s-1.tar/x/c"]
    assert values(open_source(tmp_path / "s-1.tar")) == [3]
    before = source.fingerprint
    shard(tmp_path / "s-1.tar", {"c.png": png(3), "c.cls": b"1"})
    assert open_source(tmp_path).fingerprint != before


def test_shards_with_text_and_json(tmp_path):
    files = {"a.png": png(1), "a.json": json.dumps({"label": "cat", "caption": "a cat", "box": [1]}).encode()}
    source = open_source(shard(tmp_path / "a.tar", files))
    assert source.classes == ("cat",)
    assert source[0].caption == "a cat"
    source = open_source(shard(tmp_path / "b.tar", {"a.png": png(1), "a.txt": "ein Hündchen\n".encode()}))
    assert source.classes is None
    assert source[0].caption == "ein Hündchen"


def test_shards_in_splits(tmp_path):
    for name in ("train-000.tar", "train-001.tar", "val-000.tar"):
        shard(tmp_path / name, {"a.png": png(len(name)), "a.cls": b"0"})
    assert [len(part) for part in train_and_eval(tmp_path)] == [2, 1]
    for name in ("train", "test"):
        shard(tmp_path / "folders" / name / "0.tar", {f"{name}.png": png()})
    assert open_source(tmp_path / "folders", "test")[0].id == "0.tar/test"


def test_shards_with_several_images(tmp_path):
    path = shard(tmp_path / "a.tar", {"a.jpg": png(1), "a.seg.png": png(2)})
    assert "image_column" in refusal(path)
    assert values(open_source(path, image_column="jpg")) == [1]
    assert values(open_source(path, image_column="seg.png")) == [2]


def test_bad_shards(tmp_path):
    whole = shard(tmp_path / "a.tar", {"a.png": png(), "a.cls": b"1", "b.png": png(), "b.cls": b"0"})
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.tar").write_text("hello" * 200)
    assert "cut.tar is no intact uncompressed tar" in refusal(tmp_path / "cut.tar")
    assert "text.tar is no intact uncompressed tar" in refusal(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as tar:
        tar.add(whole, "a.png")
    assert "uncompressed" in refusal(tmp_path / "z.tar.gz")
    assert "holds no images" in refusal(shard(tmp_path / "none.tar", {"a.txt": b"x"}))
    assert "b.cls in" in refusal(shard(tmp_path / "l.tar", {"b.png": png(), "b.cls": b"dog"}))
    assert "b.json in" in refusal(shard(tmp_path / "j.tar", {"b.png": png(), "b.json": b"{"}))
    assert "1 of 2 examples have no label" in refusal(
        shard(tmp_path / "m.tar", {"a.png": png(), "b.png": png(), "b.cls": b"1"})
    )
    source = open_source(whole)
    whole.write_bytes(whole.read_bytes()[:600])
    with pytest.raises(UserError, match="shorter"):
        source[1]


# --------------------------------------------------------------------------------------------------- parquet


def parquet(path: Path, columns: dict) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_with_structs_bytes_and_paths(tmp_path):
    struct = [{"bytes": png(1), "path": "a.png"}, {"bytes": png(2), "path": None}]
    source = open_source(
        parquet(tmp_path / "a.parquet", {"image": struct, "label": [1, 0], "text": ["x", "y"]})
    )
    assert values(source) == [1, 2]
    assert source.labels.tolist() == [1, 0]
    assert source[1].caption == "y"
    assert "a.png" in source[0].id
    assert values(open_source(parquet(tmp_path / "b.parquet", {"photo_data": [png(7)], "label": ["x"]}))) == [
        7
    ]
    put(tmp_path / "pictures" / "p.png", 9)
    assert values(open_source(parquet(tmp_path / "c.parquet", {"image": ["pictures/p.png"]}))) == [9]


def test_parquet_written_by_datasets(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "fine": datasets.ClassLabel(names=["a", "b"]),
            "coarse": datasets.ClassLabel(names=["c"]),
        }
    )
    rows = {"image": [{"bytes": png(3), "path": None}] * 2, "fine": [1, 0], "coarse": [0, 0]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.to_parquet(tmp_path / "x.parquet")
    assert "fine, coarse" in refusal(tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet", label_column="fine")
    assert source.classes == ("a", "b")
    assert values(source) == [3, 3]
    whole.save_to_disk(tmp_path / "saved")
    assert open_source(tmp_path / "saved", label_column="fine").labels.tolist() == [1, 0]


def test_parquet_in_splits_as_on_the_hub(tmp_path):
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", {"image": [png(1)], "label": ["x"]})
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", {"image": [png(2)], "label": ["z"]})
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", {"image": [png(3)], "label": ["z"]})
    train, held = train_and_eval(tmp_path)
    assert (values(train), values(held)) == ([1, 2], [3])
    assert train.classes == held.classes == ("x", "z")


def test_changed_parquet_is_seen(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"image": [png(1)], "label": ["x"]})
    before = open_source(path)
    parquet(path, {"image": [png(5), png(6)], "label": ["y", "z"]})
    after = open_source(path)
    assert values(after) == [5, 6]
    assert after.fingerprint != before.fingerprint


def test_bad_parquet(tmp_path):
    (tmp_path / "t.parquet").write_text("no")
    assert "not a parquet file" in refusal(tmp_path / "t.parquet")
    (tmp_path / "u.parquet").write_bytes(b"PAR1" + b"x" * 100)
    assert "u.parquet cannot be read" in refusal(tmp_path / "u.parquet")
    assert "no column holds images; the data has a, b" in refusal(
        parquet(tmp_path / "v.parquet", {"a": [1], "b": ["x"]})
    )
    two = parquet(tmp_path / "w.parquet", {"left": [png(1)], "right": [png(2)]})
    assert "left, right could hold the image" in refusal(two)
    assert values(open_source(two, image_column="right")) == [2]
    mixed = shard(tmp_path / "m" / "a.tar", {"a.png": png()}).parent
    parquet(mixed / "b.parquet", {"image": [png()]})
    assert "only .tar or only .parquet" in refusal(str(mixed / "*.*"))


# ------------------------------------------------------------------------------------------------- hub, emoji


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(capfd):
    message = refusal("some-org/some-data")
    assert "some-org/some-data" in message
    assert "http://127.0.0.1:9" in message
    out = capfd.readouterr()
    assert out.out + out.err == ""


def test_a_hub_dataset(monkeypatch, tmp_path):
    import datasets

    from triptych.data import tables

    asked = []

    def load(path, config):
        asked.append((path, config, datasets.config.HF_HUB_OFFLINE))
        features = datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=["p", "q"])}
        )
        part = {"img": [{"bytes": png(4), "path": None}], "label": [1]}
        hidden = {"img": [{"bytes": png(5), "path": None}], "label": [-1]}
        return datasets.DatasetDict(
            {
                "train": datasets.Dataset.from_dict(part, features=features),
                "validation": datasets.Dataset.from_dict(part, features=features),
                "test": datasets.Dataset.from_dict(hidden, features=features),
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(tables, "_can_reach", lambda endpoint: True)
    train, held = train_and_eval("org/pets:small")
    assert asked == [("org/pets", "small", False)]
    assert train.classes == ("p", "q")
    assert values(held) == [4]
    hidden = open_source("org/pets", "test")
    assert hidden.labels is None
    assert values(hidden) == [5]

    monkeypatch.setattr(tables, "_can_reach", lambda endpoint: False)
    assert values(open_source("org/pets")) == [4]  # from the cache
    assert asked[-1] == ("org/pets", None, True)
    assert datasets.config.HF_HUB_OFFLINE is False


def test_the_emoji():
    train, held = train_and_eval("emoji")
    assert (train.name, held.name) == ("emoji-train", "emoji-test")
    assert open_source("emoji").name == "emoji-train"
    assert open_source("emoji", "eval").name == open_source("emoji", "test").name == "emoji-test"


# ----------------------------------------------------------------------------------------------- held back


@given(
    labels=st.lists(st.integers(0, 6), min_size=2, max_size=80),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 10),
)
@settings(max_examples=80, deadline=None)
def test_the_share_held_back_is_even_and_leaves_every_class(labels, fraction, seed):
    labels = np.array(labels)
    held = held_back(len(labels), labels, fraction, seed)
    assert np.array_equal(held, held_back(len(labels), labels, fraction, seed))
    assert held.any()
    if len(np.unique(labels)) < len(labels):
        assert set(labels[~held]) == set(labels)
    counts = np.bincount(labels)
    for label in np.unique(labels):
        assert abs(held[labels == label].sum() - fraction * counts[label]) <= 2


def test_what_is_held_back_in_sum_is_the_share():
    labels = np.repeat(np.arange(50), 2)
    assert held_back(100, labels, 0.1, 0).sum() == 10
    assert held_back(100, None, 0.1, 0).sum() == 10
    assert (held_back(100, None, 0.1, 0) != held_back(100, None, 0.1, 1)).any()


def test_a_seeded_split_is_the_same_each_time(pets):
    first, second = train_and_eval(pets, 0.2, 3), train_and_eval(pets, 0.2, 3)
    assert [p.fingerprint for p in first] == [p.fingerprint for p in second]
    train, held = first
    together = sorted([train[i].id for i in range(len(train))] + [held[i].id for i in range(len(held))])
    assert together == sorted(open_source(pets)[i].id for i in range(5))
    assert train.fingerprint != held.fingerprint
    assert train.labels.tolist() == [train[i].label for i in range(len(train))]


def test_one_image_cannot_be_split(tmp_path):
    put(tmp_path / "a" / "1.png")
    with pytest.raises(UserError, match="one image"):
        train_and_eval(tmp_path)
