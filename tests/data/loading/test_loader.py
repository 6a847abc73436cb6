"""The loader: order, resuming at any batch with any number of workers, damaged images, the cache."""

import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triptych.data.config import DataConfig
from triptych.data.example import Example
from triptych.data.images import decode
from triptych.data.loading import loader as module
from triptych.data.loading.batch_order import DividedOrder, EpochOrder
from triptych.data.loading.loader import Loader, make_loader
from triptych.data.resizing import Resize, resize_crop
from triptych.data.source import Source
from triptych.errors import TriptychError

SIZE = Resize(size=(7, 5))


class Numbers(Source):
    """n gray images, the i-th of value i; the damaged ones are truncated."""

    def __init__(self, count: int, damaged: tuple[int, ...] = (), labeled: bool = True, size=(6, 9)):
        self.count, self.damaged, self.labeled, self.size = count, damaged, labeled, size
        self.requested: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        self.requested.append(index)
        file = io.BytesIO()
        Image.new("L", (self.size[1], self.size[0]), index % 256).save(file, "PNG")
        content = file.getvalue()
        if index in self.damaged:
            content = content[: len(content) // 2]
        return Example(content, index % 3 if self.labeled else None, f"gray {index}", f"n/{index}.png")


def loader_of(source, *, train=True, seed=0, **config) -> Loader:
    config = {"batch_size": 4, "workers": 0, "cache": "off", **config}
    return make_loader(source, DataConfig(**config), SIZE, train=train, seed=seed)


def ids(batches) -> list[list[str]]:
    return [batch["id"] for batch in batches]


def test_a_batch():
    batch = next(iter(loader_of(Numbers(10), train=False)))
    assert batch["image"].shape == (4, 3, 7, 5)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous()
    assert [int(image.max()) for image in batch["image"]] == [0, 1, 2, 3]
    assert batch["label"].tolist() == [0, 1, 2, 0]
    assert batch["label"].dtype == torch.int64
    assert batch["caption"] == ["gray 0", "gray 1", "gray 2", "gray 3"]
    assert batch["id"] == ["n/0.png", "n/1.png", "n/2.png", "n/3.png"]
    assert batch["aspect"].tolist() == [1.5] * 4
    assert batch["bad"] == {}


def test_evaluation_yields_each_example_once_in_order():
    loader = loader_of(Numbers(10), train=False, eval_batch_size=3)
    assert len(loader) == 4
    for _ in range(2):
        assert [int(i[2:-4]) for batch in ids(loader) for i in batch] == list(range(10))
    assert [len(b["id"]) for b in loader] == [3, 3, 3, 1]


def test_evaluation_follows_the_preprocessing():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)

    class One(Numbers):
        def __getitem__(self, index):
            return Example(image, 0, None, "one")

    preprocess = Resize(size=(8, 8), crop=0.8, mode="crop", interpolation="lanczos")
    config = DataConfig(workers=0)
    batch = next(iter(make_loader(One(1), config, preprocess, train=False)))
    expected = resize_crop(decode(image), (8, 8), 0.8, "crop", "lanczos")
    assert np.array_equal(batch["image"][0].permute(1, 2, 0), expected)
    batch = next(iter(make_loader(One(1), config, preprocess, train=True, batch_size=1)))
    assert batch["image"].shape == (1, 3, 9, 9)  # 8/7 of the size
    batch = next(
        iter(
            make_loader(One(1), DataConfig(workers=0, load_size=(4, 6)), preprocess, train=True, batch_size=1)
        )
    )
    assert batch["image"].shape == (1, 3, 4, 6)


# --------------------------------------------------------------------------------------------------- order


@given(count=st.integers(1, 60), size=st.integers(1, 20), shuffle=st.booleans(), epoch=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_orders(count, size, shuffle, epoch):
    batches = EpochOrder(count, size, 3, shuffle=shuffle).batches(epoch)
    again = EpochOrder(count, size, 3, shuffle=shuffle)
    assert len(again) == len(batches)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again.batches(epoch), strict=True))
    rows = np.concatenate(batches)
    if not shuffle:
        assert sorted(rows) == list(range(count))
    else:
        assert all(len(batch) == size for batch in batches)
        counts = np.bincount(rows, minlength=count)
        if count >= size:
            assert counts.max() == 1  # each example at most once, and all except the remainder
            assert count - counts.sum() < size
        else:
            assert counts.max() - counts.min() <= 1  # examples are repeated


@given(count=st.integers(1, 60), size=st.integers(1, 20), world=st.integers(1, 4), shuffle=st.booleans())
@settings(max_examples=100, deadline=None)
def test_processes_share_each_batch_or_take_turns(count, size, world, shuffle):
    order = EpochOrder(count, size, 3, shuffle=shuffle)
    batches = order.batches(1)
    parts = [DividedOrder(order, rank, world, within=True) for rank in range(world)]
    assert {len(part) for part in parts} == {len(order)}
    for batch, *shares in zip(batches, *(part.batches(1) for part in parts), strict=True):
        assert np.array_equal(np.concatenate(shares), batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    turns = [DividedOrder(order, rank, world, within=False) for rank in range(world)]
    assert [len(turn) for turn in turns] == [len(turn.batches(1)) for turn in turns]
    for number, batch in enumerate(batches):
        assert np.array_equal(turns[number % world].batches(1)[number // world], batch)


def test_a_divided_loader_yields_empty_batches():
    """Otherwise processes would iterate over different numbers of batches."""
    loader = loader_of(Numbers(5), train=False, batch_size=2)
    loader.divide(1, 2, within=True)
    assert [len(batch["id"]) for batch in loader] == [1, 1, 0]


def test_epochs_and_seeds_differ():
    loader = loader_of(Numbers(12))
    epochs = [ids(loader) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    assert ids(loader_of(Numbers(12))) == epochs[0]
    assert ids(loader_of(Numbers(12), seed=1)) != epochs[0]
    assert loader.epoch == 3


def test_an_abandoned_iteration_does_not_advance_the_loader():
    loader = loader_of(Numbers(12))
    first = next(iter(loader))["id"]
    assert ids(loader)[0] == first


def test_loading_does_not_use_the_global_rng():
    state = torch.random.get_rng_state()
    ids(loader_of(Numbers(12)))
    assert torch.equal(state, torch.random.get_rng_state())


# -------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize("train", [True, False])
def test_a_run_resumes_after_any_batch(cache, train):
    def fresh():
        return loader_of(Numbers(22), train=train, cache=cache)

    uninterrupted = fresh()
    expected = [ids(uninterrupted) for _ in range(3)]
    per_epoch = len(expected[0])
    for done in range(2 * per_epoch + 1):
        first, state = fresh(), None
        count = 0
        while count < done:
            for _ in first:
                count += 1
                state = first.state_dict()
                if count == done:
                    break
        second = fresh()
        second.load_state_dict(state or first.state_dict())
        assert second.state_dict() == (state or {"epoch": 0, "batch": 0})
        rest = [batch for _ in range(3) for batch in ids(second)]
        assert rest[: 3 * per_epoch - done] == [b for epoch in expected for b in epoch][done:]


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 0), (1, 2)])
def test_a_run_resumes_with_other_workers(before, after):
    def pixels(batches):
        return [batch["image"].clone() for batch in batches]

    expected = pixels(loader_of(Numbers(30), workers=0))
    first = loader_of(Numbers(30), workers=before)
    steps = iter(first)
    for _ in range(3):
        next(steps)
    state = first.state_dict()
    assert state == {"epoch": 0, "batch": 3}
    second = loader_of(Numbers(30), workers=after)
    second.load_state_dict(state)
    rest = pixels(second)
    assert len(rest) == 4
    assert all(torch.equal(a, b) for a, b in zip(rest, expected[3:], strict=True))
    if after:  # the next epoch, by the same workers
        assert ids(second) == [ids(e) for e in [loader_of(Numbers(30))] for _ in range(2)][1]
    del steps, first, second


def test_a_loader_can_go_back():
    loader = loader_of(Numbers(12))
    first = ids(loader)
    loader.load_state_dict({"epoch": 0, "batch": 1})
    assert ids(loader) == first[1:]


def test_a_state_of_other_data_is_refused():
    with pytest.raises(TriptychError, match="batch 9 of an epoch of 3"):
        loader_of(Numbers(12)).load_state_dict({"epoch": 0, "batch": 9})


# --------------------------------------------------------------------------------------------- damaged images


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_damaged_images_are_skipped_and_listed(workers, cache):
    loader = loader_of(Numbers(10, damaged=(1, 4, 5, 6, 7)), train=False, workers=workers, cache=cache)
    for _ in range(2):
        batches = list(loader)
        assert [b["id"] for b in batches] == [["n/0.png", "n/2.png", "n/3.png"], ["n/8.png", "n/9.png"]]
        assert [len(b["image"]) for b in batches] == [3, 2]
        assert [b["label"].tolist() for b in batches] == [[0, 2, 0], [2, 0]]
    assert list(loader.bad) == ["n/1.png", "n/4.png", "n/5.png", "n/6.png", "n/7.png"]
    assert all("n/1.png" in why for why in [loader.bad["n/1.png"]])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_damaged_images_can_stop_the_run(workers, cache):
    loader = loader_of(Numbers(10, (6,)), train=False, workers=workers, cache=cache, on_bad_image="fail")
    with pytest.raises(TriptychError) as caught:
        list(loader)
    assert "n/6.png is damaged" in str(caught.value)
    assert "on_bad_image" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_bad_image(tmp_path: Path):
    class Missing(Numbers):
        def __getitem__(self, index):
            return (
                Example(tmp_path / "gone.png", 0, None, "gone") if index == 1 else super().__getitem__(index)
            )

    loader = loader_of(Missing(3), train=False)
    assert ids(loader) == [["n/0.png", "n/2.png"]]
    assert "does not exist" in loader.bad["gone"]


# ----------------------------------------------------------------------------------------------------- cache


def test_small_data_sets_are_decoded_once():
    source = Numbers(10)
    loader = loader_of(source, train=False, cache="auto")
    first, count = ids(loader), len(source.requested)
    assert ids(loader) == first
    assert len(source.requested) == count
    cached, plain = list(loader), list(loader_of(Numbers(10), train=False))
    for a, b in zip(cached, plain, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])
        assert torch.equal(a["aspect"], b["aspect"])
        assert (a["id"], a["caption"]) == (b["id"], b["caption"])


def test_large_data_sets_are_not_cached(monkeypatch):
    monkeypatch.setattr(module, "CACHE_BYTES", 10 * 3 * 7 * 5 - 1)
    source = Numbers(10)
    loader = loader_of(source, train=False, cache="auto")
    assert ids(loader) == ids(loader)
    assert source.requested.count(9) == 2


def test_the_cache_fills_over_shuffled_epochs():
    source, plain = Numbers(11), Numbers(11)
    cached, off = loader_of(source, cache="on"), loader_of(plain)
    for _ in range(6):
        for a, b in zip(cached, off, strict=True):
            assert a["id"] == b["id"]
            assert torch.equal(a["image"], b["image"])
    assert max(source.requested.count(i) for i in range(1, 11)) == 1
    assert len(plain.requested) > 40


# ---------------------------------------------------------------------------------------------------- sources


def test_training_repeats_examples_of_a_source_smaller_than_a_batch():
    for cache in ("on", "off"):
        loader = loader_of(Numbers(3), batch_size=8, cache=cache)
        assert len(loader) == 1
        (batch,) = loader
        assert len(batch["id"]) == len(batch["image"]) == 8
        assert set(batch["id"]) == {"n/0.png", "n/1.png", "n/2.png"}


def test_unlabeled_sources_have_labels_of_minus_one():
    batch = next(iter(loader_of(Numbers(5, labeled=False))))
    assert batch["label"].tolist() == [-1] * 4


def test_alpha_is_kept_for_rgba_arrays_and_on_demand():
    rgba = np.zeros((7, 5, 4), np.uint8)

    class Clear(Numbers):
        def __getitem__(self, index):
            image = rgba if self.labeled else Image.fromarray(rgba)
            return Example(image, 0, None, str(index))

    assert next(iter(loader_of(Clear(5), train=False)))["image"].shape == (4, 4, 7, 5)
    shown = next(iter(loader_of(Clear(5, labeled=False), train=False)))["image"]
    assert shown.shape == (4, 3, 7, 5)
    assert shown.min() == 255
    transparent = next(iter(loader_of(Clear(5, labeled=False), train=False, keep_alpha=True)))["image"]
    assert transparent.shape == (4, 4, 7, 5)
    assert transparent.max() == 0


def test_an_empty_source_is_refused():
    with pytest.raises(TriptychError, match="no images"):
        loader_of(Numbers(0))


@pytest.mark.parametrize("cache", ["on", "off"])
def test_processes_share_each_batch(cache):
    single, *parts = (loader_of(Numbers(25, damaged=(3,)), batch_size=6, cache=cache) for _ in range(3))
    for rank, part in enumerate(parts):
        part.divide(rank, 2, within=True)
    assert len(parts[0]) == math.floor(25 / 6)
    for batch, a, b in zip(ids(single), ids(parts[0]), ids(parts[1]), strict=True):
        assert batch == a + b


# --------------------------------------------------------------------------------------------------- masks


class Masked(Numbers):
    """Images of 9 x 12 random pixels, seeded by their index, whose masks are their red channel."""

    mask_classes = ("a", "b")

    def __init__(self, count: int = 10, wrong: tuple[int, ...] = ()):
        super().__init__(count)
        self.wrong = wrong

    def __getitem__(self, index: int) -> Example:
        image = np.random.default_rng(index).integers(0, 200, (9, 12, 3), dtype=np.uint8)
        mask = image[..., 0].copy()
        return Example(image, None, None, f"m/{index}", mask[:-1] if index in self.wrong else mask)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize("workers", [0, 2])
def test_masks_are_cropped_and_resized_like_their_images(train, cache, workers):
    resize = Resize(size=(8, 8), crop=0.9, mode="crop", interpolation="nearest")
    config = DataConfig(batch_size=4, workers=workers, cache=cache)
    loader = make_loader(Masked(), config, resize, train=train)
    for _ in range(2):
        for batch in loader:
            assert batch["mask"].dtype == torch.uint8
            assert batch["mask"].shape == (len(batch["id"]), *batch["image"].shape[2:])
            assert torch.equal(batch["mask"], batch["image"][:, 0])


def test_the_mask_of_padding_is_void():
    resize = Resize(size=(8, 8), mode="pad", interpolation="nearest", background=(7, 7, 7))
    batch = next(iter(make_loader(Masked(), DataConfig(workers=0), resize, train=False)))
    image, mask = batch["image"][:, 0], batch["mask"]
    assert (mask[:, 0] == 255).all()
    assert (image[:, 0] == 7).all()
    assert torch.equal(mask[:, 1:7], image[:, 1:7])


@pytest.mark.parametrize("cache", ["on", "off"])
def test_masks_of_another_size_are_reported(cache):
    config = DataConfig(batch_size=4, workers=0, cache=cache)
    loader = make_loader(Masked(wrong=(0, 5, 6, 7, 4)), config, SIZE, train=False)
    assert [len(batch["mask"]) for batch in loader] == [3, 2]
    assert "m/5 is 12 x 9 pixels, but its mask is 12 x 8" in loader.bad["m/5"]
    assert "\n" not in loader.bad["m/5"]


def test_an_example_without_its_mask_is_reported():
    class WithoutMasks(Masked):
        def __getitem__(self, index):
            return Example(np.zeros((9, 12, 3), np.uint8), None, None, f"m/{index}")

    loader = loader_of(WithoutMasks(4), train=False)
    assert list(loader) == []
    assert "m/0 has no mask" in loader.bad["m/0"]


def test_batches_of_sources_without_masks_have_none():
    assert "mask" not in next(iter(loader_of(Numbers(4), train=False)))
    assert "mask" not in next(iter(loader_of(Numbers(4), train=False, cache="on")))


def test_a_program_may_end_before_its_loader():
    """Workers ignore SIGTERM, by which the interpreter ends processes that are still alive at exit."""
    program = """
from test_loader import Numbers, loader_of
loader = loader_of(Numbers(12), workers=1)
print(len(list(loader)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parent,
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
