"""The built-in scenes: their contents, that a scene depends only on its index, and that its mask is exact."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.data.builtin import procedural_backgrounds
from triptych.data.builtin import scenes as module
from triptych.data.builtin.emoji import ASSETS, emoji
from triptych.data.builtin.procedural_backgrounds import random_background
from triptych.data.builtin.scenes import MAX_DRAWINGS, MIN_DRAWINGS, _join_names, scenes
from triptych.data.open import open_source, train_and_eval
from triptych.data.source import Subset
from triptych.errors import TriptychError

GROUPS = ("smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects")


@pytest.fixture(scope="module")
def some():
    return [scenes("train")[i] for i in range(60)]


def test_a_scene():
    source = scenes("test", size=(96, 128))
    scene = source[3]
    assert source.mask_classes == ("background", *GROUPS)
    assert source.classes is source.labels is scene.label is None
    assert scene.image.shape == (96, 128, 3)
    assert scene.mask.shape == (96, 128)
    assert scene.image.dtype == scene.mask.dtype == np.uint8
    assert scene.image.flags.writeable
    assert scene.id == "scenes-test/3"
    assert len(scene.caption.replace(" and ", ", ").split(", ")) == len(scene.boxes)


def test_the_contents_of_scenes(some):
    assert {len(scene.boxes) for scene in some} == set(range(MIN_DRAWINGS, MAX_DRAWINGS + 1))
    shares = np.mean([np.bincount(scene.mask.ravel(), minlength=7) for scene in some], 0) / 128**2
    assert 0.5 < shares[0] < 0.85
    assert shares[1:].min() > 0.015
    assert max(scene.mask.max() for scene in some) == 6


def test_boxes_bound_the_visible_part(some):
    for scene in some:
        for box in scene.boxes:
            inside = scene.mask[box.y0 : box.y1, box.x0 : box.x1] == box.label
            assert inside.sum() >= 20
            # Each edge touches the drawing; another drawing of its group inside the box can only add pixels.
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
        covered = np.zeros((128, 128), bool)
        for box in scene.boxes:
            covered[box.y0 : box.y1, box.x0 : box.x1] = True
        assert not scene.mask[~covered].any()
        centers = [box.x0 + box.x1 for box in scene.boxes]
        assert centers == sorted(centers)  # as in the caption


def test_the_mask_is_exact(monkeypatch):
    """A pixel on black and on white differs by the part that no drawing covers. At least half of each labeled pixel is
    covered."""

    def on(value: int, index: int):
        def plain(rng, size):
            return np.full_like(random_background(rng, size), value)

        monkeypatch.setattr(module, "random_background", plain)
        return scenes("train")[index]

    for index in range(12):
        black, white = on(0, index), on(255, index)
        assert np.array_equal(black.mask, white.mask)
        covered = 255 - (white.image.astype(int) - black.image).max(-1)
        labeled = black.mask > 0
        assert covered[labeled].min() >= 127
        # Elsewhere no drawing covers half of a pixel, but the soft edges of two drawings may.
        assert (covered[~labeled] > 128).mean() < 0.01


@given(index=st.integers(0, 499), seed=st.integers(-(2**70), 2**70))
@settings(max_examples=15)
def test_a_scene_depends_only_on_seed_and_index(index, seed):
    a = scenes("test", seed=seed)
    b = pickle.loads(pickle.dumps(scenes("test", count=index + 1, seed=seed)))
    state = np.random.get_state()[1].copy()
    first = a[index]
    b[0]
    again = b[index]
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.mask, again.mask)
    assert (first.boxes, first.caption) == (again.boxes, again.caption)
    assert np.array_equal(state, np.random.get_state()[1])


def test_scenes_differ(some):
    images = {scene.image.tobytes() for scene in some}
    images |= {scenes("train", seed=1)[0].image.tobytes(), scenes("test")[0].image.tobytes()}
    assert len(images) == len(some) + 2
    backgrounds = [
        random_background(np.random.default_rng([0, split, 0]), (16, 16)) for split in (False, True)
    ]
    assert not np.array_equal(*backgrounds)  # test scenes have backgrounds of their own


def test_splits_have_different_styles():
    train, test = scenes("train"), scenes("test")
    assert {style.name for style in test.drawings.styles} == {"twemoji"}
    assert not {s.family for s in train.drawings.styles} & {s.family for s in test.drawings.styles}
    assert (len(train), len(test)) == (20_000, 500)
    prints = [
        source.fingerprint for source in (train, test, scenes(seed=1), scenes(size=(64, 64)), scenes(count=3))
    ]
    assert len(set(prints)) == 5
    assert train.fingerprint == scenes().fingerprint


def test_scenes_are_opened_by_name(tmp_path):
    train, held = train_and_eval("scenes")
    assert (train.name, held.name) == ("scenes-train", "scenes-test")
    assert open_source("scenes", "eval").name == open_source("scenes", "val").name == "scenes-test"
    (tmp_path / "more").symlink_to(ASSETS)
    assert open_source(f"scenes:{tmp_path / 'more'}")[0].caption == train[0].caption
    assert Subset(train, [5, 2]).mask_classes == train.mask_classes
    assert emoji().mask_classes is None


def test_indexing():
    source = scenes("test", count=4)
    assert [scene.id for scene in source] == [f"scenes-test/{i}" for i in range(4)]
    assert source[-1].id == "scenes-test/3"
    with pytest.raises(IndexError, match="4 scenes"):
        source[4]


@pytest.mark.parametrize("size", [(32, 32), (33, 200), (300, 40)])
def test_odd_sizes(size):
    for scene in scenes("train", count=5, size=size):
        assert scene.image.shape == (*size, 3)
        assert MIN_DRAWINGS <= len(scene.boxes) <= MAX_DRAWINGS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "'dev' of scenes; choose train or test"),
        ({"count": 0}, "at least 1"),
        ({"size": (16, 128)}, "at least 32"),
        ({"root": "/nowhere"}, "make_emoji"),
    ],
)
def test_mistakes_are_explained_in_one_line(arguments, message):
    with pytest.raises(TriptychError, match=message) as caught:
        scenes(**arguments)
    assert "\n" not in str(caught.value)


def test_captions():
    assert _join_names(["red apple"]) == "a red apple"
    assert _join_names(["red apple", "owl"]) == "a red apple and an owl"
    assert _join_names(["scissors", "octopus", "compass"]) == "scissors, an octopus and a compass"


@pytest.mark.parametrize("pattern", ["ramp", "clouds", "stripes", "checks", "blobs", "shapes"])
@pytest.mark.parametrize("size", [(1, 1), (9, 40), (64, 48)])
def test_fields_fill_any_size(pattern, size):
    for seed in range(8):
        field = getattr(procedural_backgrounds, pattern)(np.random.default_rng(seed), size)
        assert field.shape == size
        assert field.dtype == np.float32
        assert np.isfinite(field).all()


def test_backgrounds_vary():
    images = np.stack(
        [random_background(np.random.default_rng(seed), (32, 32)) for seed in range(200)]
    ).astype(int)
    detail = np.abs(np.diff(images, axis=2)).mean((1, 2, 3))
    assert np.percentile(detail, 10) < 4 < 12 < np.percentile(detail, 90)  # from smooth to detailed
    assert images.mean((1, 2)).std(0).min() > 25  # in each color channel


def test_importing_it_does_not_import_torch():
    code = "import sys, triptych.data.builtin.scenes as s; s.scenes()[0]; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
