"""Images inside other files: tar shards, parquet files, data sets of the hub."""

import json
import tarfile

import pytest

from triptych.data.open import open_source, train_and_eval
from triptych.errors import DataError

pytestmark = pytest.mark.usefixtures("cache")


# ---------------------------------------------------------------------------------------------------- shards


def test_shards(tmp_path, png, values, shard):
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


def test_shards_with_text_and_json(tmp_path, png, shard):
    files = {"a.png": png(1), "a.json": json.dumps({"label": "cat", "caption": "a cat", "box": [1]}).encode()}
    source = open_source(shard(tmp_path / "a.tar", files))
    assert source.classes == ("cat",)
    assert source[0].caption == "a cat"
    source = open_source(shard(tmp_path / "b.tar", {"a.png": png(1), "a.txt": "ein Hündchen\n".encode()}))
    assert source.classes is None
    assert source[0].caption == "ein Hündchen"


def test_shards_in_splits(tmp_path, png, shard):
    for name in ("train-000.tar", "train-001.tar", "val-000.tar"):
        shard(tmp_path / name, {"a.png": png(len(name)), "a.cls": b"0"})
    assert [len(part) for part in train_and_eval(tmp_path)] == [2, 1]
    for name in ("train", "test"):
        shard(tmp_path / "folders" / name / "0.tar", {f"{name}.png": png()})
    assert open_source(tmp_path / "folders", "test")[0].id == "0.tar/test"


def test_shards_with_several_images(tmp_path, png, values, refusal, shard):
    path = shard(tmp_path / "a.tar", {"a.jpg": png(1), "a.seg.png": png(2)})
    assert "image_column" in refusal(path)
    assert values(open_source(path, image_column="jpg")) == [1]
    assert values(open_source(path, image_column="seg.png")) == [2]


def test_bad_shards(tmp_path, png, refusal, shard):
    intact = shard(tmp_path / "a.tar", {"a.png": png(), "a.cls": b"1", "b.png": png(), "b.cls": b"0"})
    (tmp_path / "cut.tar").write_bytes(intact.read_bytes()[:2000])
    (tmp_path / "text.tar").write_text("hello" * 200)
    assert "cut.tar is not an intact, uncompressed tar file" in refusal(tmp_path / "cut.tar")
    assert "text.tar is not an intact, uncompressed tar file" in refusal(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as tar:
        tar.add(intact, "a.png")
    assert "uncompressed" in refusal(tmp_path / "z.tar.gz")
    assert "holds no images" in refusal(shard(tmp_path / "none.tar", {"a.txt": b"x"}))
    assert "b.cls in" in refusal(shard(tmp_path / "l.tar", {"b.png": png(), "b.cls": b"dog"}))
    assert "b.json in" in refusal(shard(tmp_path / "j.tar", {"b.png": png(), "b.json": b"{"}))
    assert "1 of 2 examples have no label" in refusal(
        shard(tmp_path / "m.tar", {"a.png": png(), "b.png": png(), "b.cls": b"1"})
    )
    source = open_source(intact)
    intact.write_bytes(intact.read_bytes()[:600])
    with pytest.raises(DataError, match="shorter"):
        source[1]


# --------------------------------------------------------------------------------------------------- parquet


def test_parquet_with_structs_bytes_and_paths(tmp_path, png, put, values, parquet):
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
    put(tmp_path / "files" / "p.png", 9)
    assert values(open_source(parquet(tmp_path / "c.parquet", {"image": ["files/p.png"]}))) == [9]


def test_parquet_written_by_datasets(tmp_path, png, values, refusal):
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "fine": datasets.ClassLabel(names=["a", "b"]),
            "coarse": datasets.ClassLabel(names=["c"]),
        }
    )
    rows = {"image": [{"bytes": png(3), "path": None}] * 2, "fine": [1, 0], "coarse": [0, 0]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.to_parquet(tmp_path / "x.parquet")
    assert "fine, coarse" in refusal(tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet", label_column="fine")
    assert source.classes == ("a", "b")
    assert values(source) == [3, 3]
    dataset.save_to_disk(tmp_path / "saved")
    assert open_source(tmp_path / "saved", label_column="fine").labels.tolist() == [1, 0]


def test_parquet_in_splits_as_on_the_hub(tmp_path, png, values, parquet):
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", {"image": [png(1)], "label": ["x"]})
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", {"image": [png(2)], "label": ["z"]})
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", {"image": [png(3)], "label": ["z"]})
    train, held = train_and_eval(tmp_path)
    assert (values(train), values(held)) == ([1, 2], [3])
    assert train.classes == held.classes == ("x", "z")


def test_changed_parquet_files_are_noticed(tmp_path, png, values, parquet):
    path = parquet(tmp_path / "a.parquet", {"image": [png(1)], "label": ["x"]})
    before = open_source(path)
    parquet(path, {"image": [png(5), png(6)], "label": ["y", "z"]})
    after = open_source(path)
    assert values(after) == [5, 6]
    assert after.fingerprint != before.fingerprint


def test_bad_parquet(tmp_path, png, values, refusal, shard, parquet):
    (tmp_path / "t.parquet").write_text("no")
    assert "not a parquet file" in refusal(tmp_path / "t.parquet")
    (tmp_path / "u.parquet").write_bytes(b"PAR1" + b"x" * 100)
    assert "u.parquet cannot be read" in refusal(tmp_path / "u.parquet")
    assert "no column was recognized as images; the columns are a, b" in refusal(
        parquet(tmp_path / "v.parquet", {"a": [1], "b": ["x"]})
    )
    two = parquet(tmp_path / "w.parquet", {"left": [png(1)], "right": [png(2)]})
    assert "left, right could hold the image" in refusal(two)
    assert values(open_source(two, image_column="right")) == [2]
    mixed = shard(tmp_path / "m" / "a.tar", {"a.png": png()}).parent
    parquet(mixed / "b.parquet", {"image": [png()]})
    assert "only .tar or only .parquet" in refusal(str(mixed / "*.*"))


# -------------------------------------------------------------------------------------------------------- hub


def test_an_unreachable_hub_is_reported_in_one_line(capfd, refusal):
    message = refusal("some-org/some-data")
    assert "some-org/some-data" in message
    assert "http://127.0.0.1:9" in message
    out = capfd.readouterr()
    assert out.out + out.err == ""


def test_a_hub_dataset(monkeypatch, tmp_path, png, values):
    import datasets

    from triptych.data.sources import parquet_and_hub

    calls = []

    def load(path, config):
        calls.append((path, config, datasets.config.HF_HUB_OFFLINE))
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
    monkeypatch.setattr(parquet_and_hub, "_can_reach", lambda endpoint: True)
    train, held = train_and_eval("org/pets:small")
    assert calls == [("org/pets", "small", False)]
    assert train.classes == ("p", "q")
    assert values(held) == [4]
    hidden = open_source("org/pets", "test")
    assert hidden.labels is None
    assert values(hidden) == [5]

    monkeypatch.setattr(parquet_and_hub, "_can_reach", lambda endpoint: False)
    assert values(open_source("org/pets")) == [4]  # from the cache
    assert calls[-1] == ("org/pets", None, True)
    assert datasets.config.HF_HUB_OFFLINE is False
