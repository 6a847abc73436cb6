"""Streams: equal to sources in memory, in an order independent of processes and workers, in constant memory."""

import io
import itertools
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.data import disk_index
from triptych.data.config import DataConfig
from triptych.data.loading import batch_order as module
from triptych.data.loading.batch_order import DividedOrder, EpochOrder
from triptych.data.loading.loader import make_loader
from triptych.data.loading.permutation import permute
from triptych.data.loading.stream_order import StreamOrder
from triptych.data.open import open_source, train_and_eval
from triptych.data.resizing import Resize
from triptych.data.sources.tar import iter_members
from triptych.data.streaming import parquet as parquet_rows
from triptych.data.streaming.parquet import ParquetRows
from triptych.data.streaming.source import StreamSplit
from triptych.errors import TriptychError

pytestmark = pytest.mark.usefixtures("cache")


# --------------------------------------------------------------------------------------------------- orders


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(count, seed, epoch):
    order = permute(np.arange(count), count, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(count))
    few = np.arange(count)[::7]
    assert np.array_equal(permute(few, count, seed, epoch), order[::7])


def test_permute_mixes():
    order = permute(np.arange(50_000), 50_000, 1, 0)
    assert abs(np.corrcoef(np.arange(50_000), order)[0, 1]) < 0.02
    assert not np.array_equal(order, permute(np.arange(50_000), 50_000, 1, 1))
    # The expected distance of two random positions is a third of the length.
    assert np.abs(np.diff(order)).mean() / 50_000 == pytest.approx(1 / 3, abs=0.01)


def test_large_orders_are_computed(monkeypatch):
    monkeypatch.setattr(module, "MAX_STORED_ROWS", 50)
    order = EpochOrder(103, 10, 3, shuffle=True)
    parts = [DividedOrder(order, rank, 2, within=True).batches(1) for rank in range(2)]
    rows = np.concatenate([batch for part in parts for batch in part])
    assert len(parts[0]) == 10
    assert len(rows) == len(set(rows.tolist())) == 100
    assert all(len(batch) == 5 for part in parts for batch in part)
    assert order.batches(1)[3].tolist() == [*parts[0][3], *parts[1][3]]
    plain = EpochOrder(103, 10, 3, shuffle=False).batches(0)
    assert np.concatenate(list(plain)).tolist() == list(range(103))


def slow_twin(bounds: np.ndarray, seed: int, epoch: int, buffer: int, lanes: int) -> list[int]:
    """Return all rows of an epoch, computed with lists."""
    runs = [list(range(a, b)) for a, b in itertools.pairwise(bounds)]
    order = np.random.default_rng([seed, epoch]).permutation(len(runs))
    remaining = [row for run in order for row in runs[run]]
    lanes = min(lanes, sum(map(bool, runs)))
    window, cut = (
        max(1, buffer // lanes),
        [len(part) for part in np.array_split(np.arange(len(remaining)), lanes)],
    )
    queues = []
    for lane, length in enumerate(cut):
        part, remaining = remaining[:length], remaining[length:]
        mixed = []
        for number, at in enumerate(range(0, length, window)):
            rows = part[at : at + window]
            mixed += [
                rows[i] for i in np.random.default_rng([seed, epoch, lane, number]).permutation(len(rows))
            ]
        queues.append(mixed)
    return [queue[i] for i in range(len(queues[0])) for queue in queues if i < len(queue)]


sizes = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum)


@given(
    sizes=sizes,
    world=st.integers(1, 4),
    workers=st.integers(1, 4),
    batch=st.integers(1, 24),
    buffer=st.integers(1, 60),
    lanes=st.integers(1, 12),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_lanes(sizes, world, workers, batch, buffer, lanes, epoch):
    """Each example occurs once per epoch, in the order of the slow twin, for any number of processes and workers."""
    bounds = np.cumsum([0, *sizes])
    if bounds[-1] < batch:
        with pytest.raises(TriptychError, match="fewer than a batch"):
            StreamOrder(bounds, batch, 5)
        return
    order = StreamOrder(bounds, batch, 5, buffer=buffer, lanes=lanes)
    expected = slow_twin(bounds, 5, epoch, buffer, lanes)
    assert sorted(expected) == list(range(bounds[-1]))
    assert len(order) == len(expected) // batch
    lane_of = {row: place % order.lanes for place, row in enumerate(expected)}
    parts = [DividedOrder(order, rank, world, within=True).batches(epoch) for rank in range(world)]
    readers: dict[int, set[tuple[int, int]]] = {}
    for number in range(len(order)):
        batch_rows = expected[number * batch :][:batch]
        shares = [part[number] for part in parts]
        assert np.concatenate(shares).tolist() == sorted(batch_rows, key=lambda row: lane_of[row])
        for rank, rows in enumerate(shares):
            for worker, part in enumerate(np.array_split(rows, workers)):
                for row in part.tolist():
                    readers.setdefault(lane_of[row], set()).add((rank, worker))
    if batch % order.lanes == order.lanes % (world * workers) == 0:  # then each lane has one reader
        assert all(len(lane_readers) == 1 for lane_readers in readers.values())


@given(count=st.integers(2, 200), step=st.integers(2, 12), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_one_of_n_is_held_out(count, step, seed):
    step = min(step, count)

    class Full(list):
        classes = groupings = mask_classes = mask_colors = hold = None
        bounds = np.array([0, count // 3, count // 2, count])

    full = Full(range(count))
    held, rest = StreamSplit(full, step, seed), StreamSplit(full, step, seed, others=True)
    rows = [held[i] for i in range(len(held))]
    blocks = [row // step for row in rows]
    assert blocks in (
        list(range(count // step)),
        list(range(-(-count // step))),
    )  # a last block that is smaller may have none
    assert [rest[i] for i in range(len(rest))] == [row for row in full if row not in rows]
    for part in (held, rest):
        assert part.bounds.tolist() == [
            sum(int(part.row(i)) < bound for i in range(len(part))) for bound in full.bounds
        ]


def test_held_out_examples_have_each_class():
    class Full(list):
        classes = groupings = mask_classes = mask_colors = hold = None
        bounds = np.array([0, 20_000])

    held = StreamSplit(Full(range(20_000)), 10, 0)
    shares = np.bincount(held.row(np.arange(len(held))) % 10, minlength=10)  # classes in turn
    assert shares.min() > 150
    assert shares.max() < 250


# -------------------------------------------------------------------------------------------------- sources


def same(spec, splits=(None, "eval"), **columns) -> None:
    """Check that a stream and a table of the same data are equal."""
    for split in splits:
        table, stream = (open_source(spec, split, stream=streamed, **columns) for streamed in (False, True))
        assert len(table) == len(stream)
        for name in ("classes", "mask_classes", "mask_colors"):
            assert getattr(table, name) == getattr(stream, name)
        assert (stream.labels is None) == (table.labels is None)
        if table.labels is not None:
            assert stream.labels.tolist() == table.labels.tolist()
        assert (stream.captions is None) == (table.captions is None)
        if table.captions is not None:
            assert list(stream.captions) == table.captions
        for row in range(len(table)):
            a, b = table[row], stream[row]
            assert (a.image, a.label, a.caption, a.id) == (b.image, b.label, b.caption, b.id)
            assert a.mask is b.mask is None or np.array_equal(a.mask, b.mask)
        assert stream.fingerprint == open_source(spec, split, stream=True, **columns).fingerprint


def test_streamed_shards_are_the_same(tmp_path, png, shard):
    long = "a folder with a long name/" * 6 + "x.png"
    for name, files in {
        "train-0.tar": {"b.png": png(1), "b.cls": b"1", "b.txt": b"one", "a.jpg": png(2), "a.cls": b"0"},
        "train-1.tar": {long: png(3), long[:-3] + "cls": b"2", long[:-3] + "txt": b"three", "readme": b""},
        "val-0.tar": {"ä/c.png": png(4), "ä/c.cls": b"3", "ä/c.txt": "vür".encode()},
    }.items():
        shard(tmp_path / name, files)
    same(tmp_path)
    same(str(tmp_path / "train-*.tar"), splits=(None,))
    assert [len(part) for part in train_and_eval(tmp_path, stream=True)] == [3, 1]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "forms" / f"{form}.tar"
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w", format=form) as tar:
            tar.addfile(tarfile.TarInfo("folder/"))
            for name in ("short.png", "p" * 90 + "/" + "n" * 90 + ".png"):
                info = tarfile.TarInfo(name)
                info.size = len(png(7))
                tar.addfile(info, io.BytesIO(png(7)))
        with tarfile.open(path) as tar:
            expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
        assert [tuple(member) for member in iter_members(path)] == expected


def test_streamed_shards_with_json_and_masks(tmp_path, png, shard):
    files = {}
    for name, label in (("a", "dog"), ("b", "cat"), ("c", "dog")):
        files |= {
            f"{name}.png": png(1),
            f"{name}.json": f'{{"label": "{label}", "text": "a {label}"}}'.encode(),
        }
    same(shard(tmp_path / "a.tar", files))
    masks = {"a.jpg": png(1), "a.seg.png": png(0), "b.jpg": png(2), "b.seg.png": png(1)}
    path = shard(tmp_path / "masks" / "m.tar", masks)
    with pytest.raises(TriptychError, match="several images"):
        open_source(path, stream=True)
    same(path, image_column="jpg")


def test_streamed_parquet_is_the_same(tmp_path, png, parquet):
    import datasets

    struct = [{"bytes": png(i), "path": f"{i}.png"} for i in range(5)]
    for name, part in (("train-0", slice(0, 2)), ("train-1", slice(2, 4)), ("test-0", slice(4, 5))):
        parquet(
            tmp_path / "data" / f"{name}.parquet",
            {"image": struct[part], "label": list("xzyxa")[part], "text": list("abcde")[part]},
        )
    same(tmp_path)
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(200)], "label": [1, 0] * 100}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.to_parquet(tmp_path / "x.parquet", batch_size=90)
    source = open_source(tmp_path / "x.parquet", stream=True)
    assert source.bounds.tolist() == [0, 90, 180, 200]
    assert source.classes == ("b", "a")
    same(tmp_path / "x.parquet")
    hidden = parquet(tmp_path / "h.parquet", {"image": struct, "label": [-1] * 5})
    assert open_source(hidden, stream=True).labels is None


def test_streamed_folders_are_the_same(tmp_path, put):
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            put(tmp_path / "a" / split / ("cat", "dog")[i % 2] / f"{i}.png", i)
            (tmp_path / "a" / split / ("cat", "dog")[i % 2] / f"{i}.txt").write_text("one\n\ntwo\n")
    same(tmp_path / "a")
    for i in range(3):
        put(tmp_path / "b" / "deep" / f"{i}.png", i)
    same(tmp_path / "b" / "deep")
    before = open_source(tmp_path / "b", stream=True).fingerprint
    put(tmp_path / "b" / "deep" / "new.png")
    assert open_source(tmp_path / "b", stream=True).fingerprint != before


def test_a_stream_without_splits_is_split(tmp_path, png, shard):
    shard(
        tmp_path / "a.tar",
        {f"{i:02}.{end}": b for i in range(25) for end, b in (("png", png(i)), ("cls", b"1"))},
    )
    train, held = train_and_eval(tmp_path, 0.2, 7, stream=True)
    assert [int(held[i].id[-2:]) // 5 for i in range(len(held))] == list(range(5))
    assert len(train) == 20
    assert {train[i].id for i in range(20)}.isdisjoint(held[i].id for i in range(5))
    assert held.labels.tolist() == [1] * 5
    assert train.fingerprint != held.fingerprint


# --------------------------------------------------------------------------------------------------- loader


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """60 images with values and labels 0 to 59, in two parquet files with row groups of 8."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    folder = tmp_path_factory.mktemp("numbers")
    for part in range(2):
        files = []
        for i in range(30 * part, 30 * part + 30):
            file = io.BytesIO()
            Image.new("L", (4, 4), i).save(file, "PNG")
            files.append(file.getvalue())
        table = pyarrow.table({"image": files, "label": range(30 * part, 30 * part + 30)})
        pyarrow.parquet.write_table(table, folder / f"{part}.parquet", row_group_size=8)
    return folder


def loader_of(source, **config):
    config = {
        "batch_size": 4,
        "workers": 0,
        "cache": "off",
        "stream": True,
        "lanes": 8,
        "shuffle_buffer": 32,
        **config,
    }
    size = Resize(size=(4, 4))
    return make_loader(source, DataConfig(**config), size, train=True, seed=3)


def labels(batches) -> list[list[int]]:
    return [batch["label"].tolist() for batch in batches]


def test_streams_resume_at_any_batch_with_any_workers(numbers):
    source = open_source(numbers, stream=True)
    uninterrupted = loader_of(source)
    epochs = [labels(uninterrupted), labels(uninterrupted)]
    assert all(sorted(itertools.chain(*epoch)) == list(range(60)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    for at in range(16):
        loader = loader_of(source)
        loader.load_state_dict({"epoch": 1, "batch": at})
        assert labels(loader) == epochs[1][at:]
    shared = [loader_of(source) for _ in range(2)]
    for rank, loader in enumerate(shared):
        loader.divide(rank, 2, within=True)
    assert [a + b for a, b in zip(*map(labels, shared), strict=True)] == epochs[0]
    loader = loader_of(source, workers=2)
    loader.load_state_dict({"epoch": 1, "batch": 7})
    batches = list(loader)
    assert labels(batches) == epochs[1][7:]
    assert all(b["image"][:, 0, 0, 0].tolist() == b["label"].tolist() == b["row"] for b in batches)


def test_a_row_group_is_read_once(numbers, monkeypatch):
    """One process reads each row group once, although the rows of a window are requested in random order."""
    read = []
    original = ParquetRows._read
    monkeypatch.setattr(parquet_rows, "_BLOCK", 2)
    monkeypatch.setattr(ParquetRows, "_read", lambda self, group: read.append(group) or original(self, group))
    source = open_source(numbers, stream=True)
    for lanes, buffer in ((1, 8), (4, 16), (4, 32)):
        order = StreamOrder(source.bounds, 4, 3, buffer=buffer, lanes=lanes)
        source = open_source(numbers, stream=True)
        source.hold(order.buffered_rows(1), order.window)
        read.clear()
        assert sorted(source[row].label for batch in order.batches(0) for row in batch) == list(range(60))
        assert len(read) <= 8 + lanes - 1  # row groups, and again those that two lanes share


def test_damage_stops_a_stream(tmp_path, png, shard, numbers, parquet):
    files = {f"{i:02}.{end}": b for i in range(8) for end, b in (("png", png(i)), ("cls", b"1"))}
    path = shard(tmp_path / "s" / "a.tar", files)

    def refused(what, **more) -> str:
        with pytest.raises(TriptychError) as caught:
            list(loader_of(what, **more))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    source = open_source(path, stream=True)
    content, elsewhere = path.read_bytes(), pickle.dumps(source)
    path.unlink()
    assert source[7].id == "a.tar/07"  # an open file can still be read
    source = pickle.loads(elsewhere)
    assert "a.tar cannot be read (No such file or directory); it could be read before" in refused(source)
    path.write_bytes(content[:-512])
    assert "a.tar has changed since it was opened" in refused(source, workers=1)
    path.write_bytes(content[:2600])
    with pytest.raises(
        TriptychError, match=r"a.tar is not an intact, uncompressed tar file.*truncated within"
    ):
        open_source(path, stream=True)
    path.write_bytes(content[:2048])
    with pytest.raises(TriptychError, match="truncated"):
        open_source(path, stream=True)
    path.write_bytes(content[:1500] + b"?" + content[1501:])
    for stream in (False, True):
        with pytest.raises(TriptychError, match="its header at byte 1024 is damaged"):
            open_source(path, stream=stream)
    copy = tmp_path / "p" / "a.parquet"
    copy.parent.mkdir()
    copy.write_bytes((numbers / "0.parquet").read_bytes())
    source = open_source(copy, stream=True)
    copy.unlink()
    assert "a.parquet cannot be read" in refused(source)
    copy.write_bytes(b"PAR1 and no more")
    with pytest.raises(TriptychError, match="cannot be read as parquet"):
        open_source(copy, stream=True)


def test_data_that_cannot_be_streamed(tmp_path, refusal, metadata, parquet, png, shard, put):
    assert "built in" in refusal("emoji", stream=True)
    assert "cannot be streamed" in refusal(metadata(tmp_path / "m", [{"file_name": "a.png"}]), stream=True)
    assert "only local files" in refusal("org/name", stream=True)
    unlabeled = {"a.png": png(), "a.cls": b"1", "b.png": png()}
    assert "1 of 2 examples have no label" in refusal(shard(tmp_path / "l.tar", unlabeled), stream=True)
    assert "holds the label -2" in refusal(
        parquet(tmp_path / "n.parquet", {"image": [png()], "label": [-2]}), stream=True
    )
    put(tmp_path / "f" / "cat" / "a.png")
    put(tmp_path / "f" / "b.png")
    assert "is next to class folders" in refusal(tmp_path / "f", stream=True)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refusal(tmp_path / "empty", stream=True)


def test_an_index_is_built_once(tmp_path, png, shard, monkeypatch):
    path = shard(tmp_path / "a.tar", {"a.png": png(1)})
    built = []
    original = disk_index.DiskIndex.build
    monkeypatch.setattr(
        disk_index.DiskIndex, "build", lambda self, *args: built.append(self.folder) or original(self, *args)
    )
    before = open_source(path, stream=True)
    assert open_source(path, stream=True).fingerprint == before.fingerprint
    assert len(built) == 1
    shard(path, {"b.png": png(2), "c.png": png(3)})
    assert [open_source(path, stream=True)[1].id, len(built)] == ["a.tar/c", 2]


PROGRAM = """
import sys
from triptych.data.config import DataConfig
from triptych.data.resizing import Resize
from triptych.data.loading.loader import make_loader
from triptych.data.open import train_and_eval

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

for spec in sys.argv[1:]:
    train, held = train_and_eval(spec, 0.1, stream=True)
    assert train.fingerprint and len(train.classes) == 10
    config = DataConfig(batch_size=64, workers=0, cache="off", stream=True)
    loader = make_loader(train, config, Resize(size=(4, 4)), train=True)
    next(iter(loader))
    next(iter(make_loader(held, config, Resize(size=(4, 4)), train=False)))
    print(len(train) + len(held), peak())
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the operating system does not report peak memory"
)
def test_memory_does_not_grow_with_the_number(tmp_path, png, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files = [tmp_path / f"{count}.parquet" for count in (20_000, 200_000)]
    for file, count in zip(files, (20_000, 200_000), strict=True):
        images = pyarrow.DictionaryArray.from_arrays(
            np.arange(count, dtype=np.int32) % 10, [png(i) for i in range(10)]
        )
        table = pyarrow.table({"image": images.cast(pyarrow.binary()), "label": np.arange(count) % 10})
        pyarrow.parquet.write_table(table, file, row_group_size=5000)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, files)], capture_output=True, text=True, check=True
    )
    (few, before), (many, after) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert (few, many) == (20_000, 200_000)
    assert (
        after - before < 12
    )  # MB; the row numbers alone would take 5 as Python integers, and names 15 or more
