"""The built-in emoji drawings: their contents, the separation of the splits, and the difficulty of the task."""

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from triptych.data.builtin.emoji import ASSETS, EmojiSource, emoji
from triptych.errors import TriptychError

COUNTS = {"fluent-3d": 1015, "noto": 1032, "noto-v1": 779, "twemoji": 1032}


@pytest.fixture(scope="module")
def train() -> EmojiSource:
    return emoji("train")


@pytest.fixture(scope="module")
def test() -> EmojiSource:
    return emoji("test")


def test_counts(train: EmojiSource, test: EmojiSource):
    everything = emoji("all")
    assert {s.name: len(s.cells) for s in everything.styles} == COUNTS
    assert (len(train), len(test), len(everything)) == (2826, 1032, 3858)
    assert len(train.classes) == len(set(train.classes)) == 1032
    assert {k: len(set(v)) for k, v in train.groupings.items()} == {"subgroup": 65, "group": 6}
    assert set(test.labels) == set(train.labels) == set(range(1032))  # each class occurs in both splits


def test_splits_share_classes_and_no_style(train: EmojiSource, test: EmojiSource):
    everything = emoji("all")
    assert train.classes == test.classes == everything.classes
    assert train.groupings == test.groupings == everything.groupings
    assert not {s.family for s in train.styles} & {s.family for s in test.styles}
    assert not {e.id for e in train} & {e.id for e in test}
    assert len({e.id for e in everything}) == len(everything)


def test_each_subgroup_belongs_to_one_group(train: EmojiSource):
    group_of: dict[str, set[str]] = {}
    for subgroup, group in zip(train.groupings["subgroup"], train.groupings["group"], strict=True):
        group_of.setdefault(subgroup, set()).add(group)
    assert all(len(groups) == 1 for groups in group_of.values())


def test_an_example(test: EmojiSource):
    apple = test[test.classes.index("red apple")]  # the test style has each class once, in class order
    assert (apple.id, apple.caption) == ("twemoji/1f34e", "red apple, twemoji style")
    assert apple.label is not None
    assert test.groupings["subgroup"][apple.label] == "food-fruit"
    assert test.groupings["group"][apple.label] == "food-drink"
    assert test.concepts[apple.label].emoji == "\N{RED APPLE}"
    assert "fruit" in test.concepts[apple.label].tags
    image = np.asarray(apple.image)
    assert image.shape == (64, 64, 4)
    assert image.dtype == np.uint8
    red, green, blue, alpha = image[40, 32]
    assert alpha == 255
    assert red > 150 > max(green, blue)
    assert image[0, 0, 3] == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        apple.label = 0  # type: ignore[misc]


def test_no_cell_is_empty_or_a_black_box():
    for example in emoji("all"):
        image = np.asarray(example.image)
        drawn = image[..., 3] > 127
        assert 0.05 < drawn.mean() <= 1, example.id
        assert not (drawn.mean() > 0.7 and image[drawn][:, :3].mean() < 16), example.id


def test_indexing(train: EmojiSource):
    assert train[-1].id == train[len(train) - 1].id
    assert [example.label for example in train] == train.labels.tolist()
    with pytest.raises(IndexError, match="2826 examples"):
        train[len(train)]
    image = np.asarray(train[0].image)
    image[:] = 0  # an example belongs to the caller: changing it does not change the source
    assert np.asarray(train[0].image).any()


def test_background(test: EmojiSource):
    on_green = emoji("test", background=(0, 255, 0))
    pasted, cut = np.asarray(on_green[0].image), np.asarray(test[0].image)
    assert pasted.shape == (64, 64, 3)
    assert (pasted[cut[..., 3] == 0] == (0, 255, 0)).all()
    assert (pasted[cut[..., 3] == 255] == cut[cut[..., 3] == 255][:, :3]).all()
    assert on_green.fingerprint != test.fingerprint


def test_styles_are_chosen_by_name(train: EmojiSource):
    noto = emoji("train", styles=["noto"])
    assert [s.name for s in noto.styles] == ["noto"]
    assert len(noto) == COUNTS["noto"]
    assert noto.classes == train.classes
    either_order = emoji("train", styles=["noto", "fluent-3d"]), emoji("train", styles="fluent-3d,noto")
    assert either_order[0].fingerprint == either_order[1].fingerprint != noto.fingerprint


def test_fingerprint_is_stable(train: EmojiSource, test: EmojiSource):
    # Pinned, since resumed runs and published results refer to these pixels.
    assert train.fingerprint == "58dc0aa0706c177d1b5c182a96835e2d"
    assert test.fingerprint == "966fd14bdcd0d5061eff3629d066c005"
    assert pickle.loads(pickle.dumps(train)).fingerprint == train.fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"styles": ["notto"]}, "'notto'.*noto"),
        ({"styles": ["twemoji"]}, "belongs to split 'test', not 'train'.*fluent-3d"),
        ({"styles": []}, "list of emoji styles is empty"),
        ({"split": "val"}, "'val'.*train, test, all"),
        ({"root": "/nowhere"}, "/nowhere.*make_emoji"),
        ({"background": (0, 0, 300)}, "0 to 255"),
    ],
)
def test_mistakes_are_explained_in_one_line(arguments: dict, message: str):
    with pytest.raises(TriptychError, match=message) as caught:
        emoji(**arguments)
    assert "\n" not in str(caught.value)


def test_a_damaged_folder_is_explained(tmp_path):
    (tmp_path / "emoji.json").write_text("[]")
    with pytest.raises(TriptychError, match="not an emoji table"):
        emoji(root=tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "emoji.json").write_bytes((ASSETS / "emoji.json").read_bytes())
    source = emoji("test", root=other)
    with pytest.raises(TriptychError, match=r"twemoji\.webp are missing"):
        source[0]
    (other / "twemoji.webp").write_bytes((ASSETS / "twemoji.webp").read_bytes()[:5000])
    with pytest.raises(TriptychError, match="cannot be decoded"):
        source[0]


def test_a_style_may_draw_a_concept_twice(tmp_path):
    table = json.loads((ASSETS / "emoji.json").read_bytes())
    twemoji = next(style for style in table["styles"] if style["name"] == "twemoji")
    twemoji["cells"][1] = twemoji["cells"][0]
    (tmp_path / "emoji.json").write_text(json.dumps(table))
    (tmp_path / "twemoji.webp").write_bytes((ASSETS / "twemoji.webp").read_bytes())
    source = emoji("test", root=tmp_path)
    assert [source[i].id for i in range(2)] == ["twemoji/1f600", "twemoji/1f600-2"]


def test_importing_it_does_not_import_torch():
    code = "import sys, triptych.data.builtin.emoji; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sizes():
    files = {path.name: path.stat().st_size / 1e6 for path in sorted(ASSETS.iterdir())}
    print({name: round(size, 2) for name, size in files.items()})
    assert set(files) == {"emoji.json", *(f"{style}.webp" for style in COUNTS)}
    assert 6 <= sum(files.values()) <= 8


def test_nearest_neighbor_floor(train: EmojiSource, test: EmojiSource):
    """Accuracy of the nearest neighbor of 16 x 16 raw pixels on the held-out style, which a network has to beat."""

    def pixels(source: EmojiSource) -> np.ndarray:
        images = np.stack([np.asarray(example.image) for example in source]).astype(np.float32) / 255
        pasted = images[..., :3] * images[..., 3:] + (1 - images[..., 3:])
        return pasted.reshape(len(source), 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(source), -1)

    a, b = pixels(train), pixels(test)
    nearest = train.labels[((a**2).sum(1) - 2 * b @ a.T).argmin(1)]
    floor = {"concept": (nearest == test.labels).mean()}
    for name, coarser in train.groupings.items():
        names = np.array(coarser)
        floor[name] = (names[nearest] == names[test.labels]).mean()
    print({name: round(float(value), 3) for name, value in floor.items()})
    assert 0.32 < floor["concept"] < 0.39
    assert 0.41 < floor["subgroup"] < 0.48
    assert 0.54 < floor["group"] < 0.62
