"""Layouts of masks: folders, ADE20K, Cityscapes, PASCAL VOC, columns; a one-line error for each mistake in them."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.data.config import DataConfig
from triptych.data.images import UNDO_ORIENTATION
from triptych.data.loading.loader import make_loader
from triptych.data.masks import read_mask
from triptych.data.open import open_source, train_and_eval
from triptych.data.resizing import Resize
from triptych.errors import TriptychError

pytestmark = pytest.mark.usefixtures("cache")


def mask(*numbers: int, mode: str = "L", palette: list[int] | None = None, format: str = "PNG") -> bytes:
    """Return a mask of 5 x 4 pixels, of which the first have these values and the others 0."""
    pixels = np.zeros((4, 5), np.uint16)
    pixels.flat[: len(numbers)] = numbers
    if mode == "I;16":
        image = Image.fromarray(pixels)
    elif mode == "P":
        image = Image.fromarray(pixels.astype(np.uint8)).convert("P")
        image.putdata(pixels.flatten().tolist())
        image.putpalette(palette or [])
    else:
        image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def colors(*pixels: tuple[int, int, int], mode: str = "RGB", format: str = "PNG") -> bytes:
    """Return a mask of 5 x 4 pixels, of which the first have these colors and the others are black."""
    image = Image.new("RGB", (5, 4))
    for at, color in enumerate(pixels):
        image.putpixel((at % 5, at // 5), color)
    file = io.BytesIO()
    image.convert(mode).save(file, format)
    return file.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def head(source, index: int = 0, count: int = 3) -> list[int]:
    """Return the classes of the first pixels of a mask."""
    return source[index].mask.flat[:count].tolist()


@pytest.fixture
def pairs(tmp_path, png):
    """Write images and the given masks; return their folder."""

    def make(*masks: bytes, folder: Path = tmp_path / "data", images="images", mask_folder="masks") -> Path:
        for number, content in enumerate(masks):
            write(folder / images / f"{number}.jpg", png(number))
            write(folder / mask_folder / f"{number}.png", content)
        return folder

    return make


# ------------------------------------------------------------------------------------------------- folders


def test_images_and_masks(pairs, values):
    source = open_source(pairs(mask(0, 1), mask(3, 0, 255), mask()))
    assert source.mask_classes == ("class 0", "class 1", "class 2", "class 3")
    assert source.classes is source.labels is source.mask_colors is None
    assert values(source) == [0, 1, 2]
    assert [head(source, i) for i in range(3)] == [[0, 1, 0], [3, 0, 255], [0, 0, 0]]
    assert source[1].mask.dtype == np.uint8
    assert source[1].mask.shape == (4, 5)
    assert source[1].id == "images/1.jpg"
    assert head(pickle.loads(pickle.dumps(source)), 1) == [3, 0, 255]
    train, held = train_and_eval(pairs(mask(0, 1), mask(3), mask()), 0.4)
    assert train.mask_classes == held.mask_classes == source.mask_classes
    assert len(train) + len(held) == 3


@pytest.mark.parametrize(
    ("images", "mask_folder"), [("img", "labels"), ("Imgs", "Annotations"), ("image", "gt")]
)
def test_other_names(pairs, images, mask_folder):
    assert head(open_source(pairs(mask(2), images=images, mask_folder=mask_folder))) == [2, 0, 0]


@pytest.mark.parametrize("above", [True, False])
def test_splits_may_be_above_or_below(tmp_path, png, above):
    for split, number in (("train", 1), ("val", 2)):
        for name in ("images", "masks"):
            folder = tmp_path / split / name if above else tmp_path / name / split
            write(folder / "deep" / f"{number}.png", png(9) if name == "images" else mask(number))
    write(tmp_path / ("test/images/1.png" if above else "images/test/1.png"), png())
    train, held = train_and_eval(tmp_path)
    assert train.mask_classes == held.mask_classes == ("class 0", "class 1", "class 2")
    assert (head(train), head(held)) == ([1, 0, 0], [2, 0, 0])
    assert held[0].id == ("val/images/deep/2.png" if above else "images/val/deep/2.png")
    test = open_source(tmp_path, "test")
    assert test.mask_classes is test[0].mask is None


def test_the_masks_of_all_splits_may_be_in_one_folder(tmp_path, png):
    for number, split in enumerate(("train", "val")):
        write(tmp_path / "images" / split / f"{split}.jpg", png(number))
        write(tmp_path / "masks" / f"{split}.png", mask(number + 1))
    train, held = train_and_eval(tmp_path)
    assert (head(train), head(held)) == ([1, 0, 0], [2, 0, 0])


def test_masks_may_have_an_ending(tmp_path, png):
    for name in ("a", "b_L"):
        write(tmp_path / "images" / f"{name}.png", png())
    write(tmp_path / "masks" / "a_mask.gif", mask(1, format="GIF", mode="P", palette=[0, 0, 0, 9, 9, 9]))
    write(tmp_path / "masks" / "b_L.png", mask(2))
    write(tmp_path / "masks" / "unused.png", mask(1))
    source = open_source(tmp_path)
    assert [head(source, i, 1) for i in range(2)] == [[1], [2]]


def test_folders_without_masks_are_read_as_images(tmp_path, put):
    for name in ("images/1.png", "dogs/1.png"):
        put(tmp_path / "classes" / name)
    assert open_source(tmp_path / "classes").classes == ("dogs", "images")
    put(tmp_path / "yolo" / "images" / "1.png")
    write(tmp_path / "yolo" / "labels" / "1.txt", "0 0.5 0.5 1 1")
    assert open_source(tmp_path / "yolo").mask_classes is None


def test_a_changed_mask_changes_the_fingerprint(pairs):
    folder = pairs(mask(1), mask(2))
    before = open_source(folder).fingerprint
    assert before == open_source(folder).fingerprint
    assert before != open_source(folder, ignore_index=1).fingerprint
    write(folder / "classes.txt", "a\nb\nc\n")
    assert before != (named := open_source(folder).fingerprint)
    write(folder / "masks" / "1.png", mask(*range(3), *[1, 2] * 5))
    assert named != open_source(folder).fingerprint


# --------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("classes.txt", "sky\nsea\n\nsand\n"),
        ("labels.json", '["sky", "sea", "sand"]'),
        ("labels.json", '{"sky": 0, "sand": 2, "sea": 1}'),
        ("id2label.json", '{"0": "sky", "1": "sea", "2": "sand", "255": "void"}'),
    ],
)
def test_names_next_to_the_data(pairs, file, content):
    folder = pairs(mask(1))
    write(folder / file, content)
    assert open_source(folder).mask_classes == ("sky", "sea", "sand")


def test_numbers_need_not_be_consecutive(pairs):
    folder = pairs(mask(7, 300, 20, *[7] * 17, mode="I;16"))
    write(folder / "id2label.json", '{"300": "far", "7": "near", "20": "between"}')
    source = open_source(folder)
    assert source.mask_classes == ("near", "between", "far")
    assert head(source) == [0, 2, 1]


def test_more_than_255_classes_need_names_and_16_bits(pairs):
    folder = pairs(mask(0, 255, 299, 65535, mode="I;16"), mask(255, 254, 256, mode="I;16"))
    write(folder / "classes.txt", "\n".join(f"name {i}" for i in range(300)))
    source = open_source(folder)
    assert len(source.mask_classes) == 300
    assert head(source, 0, 4) == [0, 255, 299, 65535]  # 255 is a class like the others, 65535 the void
    assert head(source, 1) == [255, 254, 256]
    assert head(open_source(folder, ignore_index=299), 0, 4) == [0, 255, 65535, 65535]
    for cache in ("on", "off"):
        loader = make_loader(
            source,
            DataConfig(workers=0, cache=cache),
            Resize(size=(4, 10), mode="pad"),
            train=False,
        )
        for _ in range(2):
            (batch,) = loader
            assert batch["mask"].dtype == torch.int32
            assert batch["mask"][0, 0].tolist() == [65535, 65535, 0, 255, 299, 65535, 0, 65535, 65535, 65535]
    write(folder / "masks" / "1.png", mask(300, mode="I;16"))
    with pytest.raises(TriptychError, match=r"holds 300, but the 300 classes are numbered 0\.\.299"):
        open_source(folder)[1]


def test_a_palette_gives_colors(pairs):
    palette = [10, 20, 30, 40, 50, 60, 70, 80, 90]
    source = open_source(pairs(mask(1, 2, mode="P", palette=palette)))
    assert head(source) == [1, 2, 0]
    assert source.mask_colors == ((10, 20, 30), (40, 50, 60), (70, 80, 90))
    shifted = open_source(pairs(mask(1, 2, mode="P", palette=palette)), reduce_zero_label=True)
    assert shifted.mask_colors == ((40, 50, 60), (70, 80, 90))


def test_ignored_values(pairs):
    folder = pairs(mask(1, 2, 3), mask(4, 255))
    source = open_source(folder, reduce_zero_label=True)
    assert len(source.mask_classes) == 4
    assert (head(source), head(source, 1)) == ([0, 1, 2], [3, 255, 255])
    source = open_source(folder, ignore_index=4)
    assert source.mask_classes == ("class 0", "class 1", "class 2", "class 3")
    assert (head(source), head(source, 1)) == ([1, 2, 3], [255, 255, 0])
    source = open_source(folder, ignore_index=2)
    assert source.mask_classes == ("class 0", "class 1", "class 3", "class 4")
    assert (head(source), head(source, 1)) == ([1, 255, 2], [3, 255, 0])
    write(folder / "classes.txt", "a\nb\nc\nd")
    source = open_source(folder, reduce_zero_label=True)
    assert source.mask_classes == ("a", "b", "c", "d")
    assert head(source, 1) == [3, 255, 255]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_black_and_white_masks_are_background_and_foreground(pairs, mode):
    folder = pairs(mask(0, 255, mode=mode), mask(mode=mode))
    source = open_source(folder)
    assert source.mask_classes == (("background", "foreground") if mode == "L" else ("class 0", "class 1"))
    assert head(source) == [0, 1, 0]
    write(folder / "classes.txt", "ground\ncrack")
    assert open_source(folder).mask_classes == ("ground", "crack")
    assert head(open_source(folder)) == [0, 1, 0]


# ------------------------------------------------------------------------------------- ADE20K and Cityscapes


@pytest.mark.parametrize("inside", [True, False])
def test_ade20k(tmp_path, png, inside):
    root = tmp_path / "ADEChallengeData2016"
    for folder, short in (("training", "train"), ("validation", "val")):
        write(root / "images" / folder / f"ADE_{short}_00000001.jpg", png())
        write(root / "annotations" / folder / f"ADE_{short}_00000001.png", mask(0, 1, 150))
    train, held = train_and_eval(root if inside else tmp_path)
    assert len(train.mask_classes) == 150
    assert train.mask_classes[:2] == ("class 0", "class 1")
    assert head(train) == head(held) == [255, 0, 149]
    wallless = open_source(root, ignore_index=1)
    assert (wallless.mask_classes[0], head(wallless)) == ("class 1", [255, 255, 148])
    rows = [
        "Idx\tRatio\tTrain\tVal\tStuff\tName",
        *(f"{i}\t0.1\t1\t1\t0\tname {i}, other" for i in range(1, 151)),
    ]
    write(root / "objectInfo150.txt", "\n".join(rows) + "\n")
    assert open_source(root).mask_classes == tuple(f"name {i}" for i in range(1, 151))


@pytest.mark.parametrize("endings", [("labelIds",), ("labelTrainIds",), ("labelIds", "labelTrainIds")])
def test_cityscapes(tmp_path, png, endings):
    numbers = {"labelIds": (7, 33, 1, 255), "labelTrainIds": (0, 18, 255, 255)}
    for split, city in (("train", "aachen"), ("val", "ulm")):
        frame = f"{city}_000000_000019"
        write(tmp_path / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png", png(3))
        for ending in endings:
            write(
                tmp_path / "gtFine" / split / city / f"{frame}_gtFine_{ending}.png",
                mask(*numbers[ending], *[255] * 16),
            )
        write(tmp_path / "gtFine" / split / city / f"{frame}_gtFine_color.png", png())
        write(tmp_path / "gtFine" / split / city / f"{frame}_gtFine_polygons.json", "{}")
    train, held = train_and_eval(tmp_path)
    assert len(train.mask_classes) == len(train.mask_colors) == 19
    assert (train.mask_classes[0], train.mask_classes[18]) == ("road", "bicycle")
    assert train.mask_colors[0] == (128, 64, 128)
    assert head(train, count=4) == head(held, count=4) == [0, 18, 255, 255]
    assert held[0].id == "leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png"
    roadless = open_source(tmp_path, ignore_index=numbers[endings[-1]][0])
    assert (roadless.mask_classes[0], roadless.mask_colors[0]) == ("sidewalk", (244, 35, 232))
    assert head(roadless, count=4) == [255, 17, 255, 255]


# -------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("column", ["mask", "mask_file_name", "trimap"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_masks_in_metadata(tmp_path, metadata, values, name, column):
    rows = [
        {"file_name": "a.png", "label": "x", column: "seg/a.png"},
        {"file_name": "b.png", "label": "y", column: "b_mask.png"},
    ]
    folder = metadata(tmp_path / "train", rows, name)
    write(folder / "seg" / "a.png", mask(1))
    write(folder / "b_mask.png", mask(2))
    options = {"mask_column": column} if column == "trimap" else {}
    for spec in (tmp_path, folder, folder / name):
        source = open_source(spec, **options)
        assert source.mask_classes == ("class 0", "class 1", "class 2")
        assert source.classes == ("x", "y")
        assert values(source) == [0, 1]
        assert [head(source, i, 1) for i in range(2)] == [[1], [2]]


def test_a_text_column_named_mask_holds_no_masks(tmp_path, metadata):
    folder = metadata(tmp_path, [{"file_name": "a.png", "mask": "yes"}, {"file_name": "b.png", "mask": "no"}])
    assert open_source(folder).mask_classes is None
    assert open_source(folder, label_column="mask").classes == ("no", "yes")


def test_a_test_split_may_lack_masks(tmp_path, metadata):
    write(metadata(tmp_path / "train", [{"file_name": "a.png", "seg": "m/a.png"}]) / "m" / "a.png", mask(1))
    metadata(tmp_path / "test", [{"file_name": "a.png"}])
    for options in ({}, {"mask_column": "seg"}):
        train, held = train_and_eval(tmp_path, **options)
        assert train.mask_classes == ("class 0", "class 1")
        assert held.mask_classes is None


@pytest.mark.parametrize("column", ["annotation", "label", "shape"])
def test_masks_in_parquet(tmp_path, parquet, png, values, column):
    struct = [{"bytes": mask(1), "path": "a.png"}, {"bytes": mask(3), "path": None}]
    path = parquet(
        tmp_path / "train.parquet", {"pixels": [png(1), png(2)], column: struct, "text": ["x", "y"]}
    )
    write(tmp_path / "id2label.json", json.dumps({str(i): f"n{i}" for i in range(4)}))
    options = {"mask_column": "shape"} if column == "shape" else {}
    source = open_source(path, **options)
    assert source.mask_classes == ("n0", "n1", "n2", "n3")
    assert values(source) == [1, 2]
    assert [head(source, i, 1) for i in range(2)] == [[1], [3]]
    assert source[1].caption == "y"
    assert source.classes is None


def test_masks_written_by_datasets(tmp_path, png):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "annotation": datasets.Image(), "scene": datasets.Value("string")}
    )
    rows = {
        "image": [{"bytes": png(3), "path": None}] * 2,
        "annotation": [{"bytes": mask(2), "path": None}] * 2,
        "scene": ["a", "b"],
    }
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.to_parquet(tmp_path / "x.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for spec in (tmp_path / "x.parquet", tmp_path / "saved"):
        source = open_source(spec)
        assert source.mask_classes == ("class 0", "class 1", "class 2")
        assert head(source, 1) == [2, 0, 0]


def test_masks_in_shards(tmp_path, shard, png, values):
    files = {"a.jpg": png(1), "a.seg.png": mask(1), "b.jpg": png(2), "b.seg.png": mask(2)}
    source = open_source(shard(tmp_path / "a.tar", files), image_column="jpg", mask_column="seg.png")
    assert values(source) == [1, 2]
    assert [head(source, i, 1) for i in range(2)] == [[1], [2]]


# -------------------------------------------------------------------------------- mmsegmentation and PASCAL VOC


def test_mmsegmentations_folders(tmp_path, png):
    for split, number in (("train", 1), ("val", 2)):
        write(tmp_path / "img_dir" / split / "a.jpg", png(number))
        write(tmp_path / "ann_dir" / split / "a.png", mask(number))
    train, held = train_and_eval(tmp_path)
    assert train.mask_classes == ("class 0", "class 1", "class 2")
    assert (head(train), head(held)) == ([1, 0, 0], [2, 0, 0])


@pytest.fixture
def voc(tmp_path, png):
    """VOCdevkit/VOC2012 with a training, a validation and a test image."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    names = {"train": "2007_000032", "val": "2007_000033", "test": "2008_000001"}
    palette = [n for k in range(256) for n in (k, 255 - k, 7)]
    for number, (split, name) in enumerate(names.items()):
        write(root / "JPEGImages" / f"{name}.jpg", png(number))
        write(root / "ImageSets" / "Segmentation" / f"{split}.txt", f"{name}\n")
        if split != "test":
            write(
                root / "SegmentationClass" / f"{name}.png", mask(20 - number, 255, mode="P", palette=palette)
            )
            write(root / "SegmentationObject" / f"{name}.png", mask(1, mode="P", palette=palette))
    write(root / "ImageSets" / "Segmentation" / "trainval.txt", "2007_000032\n\n2007_000033\n")
    write(root / "ImageSets" / "Main" / "train.txt", "2009_000009\n")
    write(root / "JPEGImages" / "2009_000009.jpg", png(9))
    return root


@pytest.mark.parametrize("inside", [True, False])
def test_pascal_voc(voc, values, inside):
    spec = voc if inside else voc.parent
    train, held = train_and_eval(spec)
    assert (values(train), values(held)) == ([0], [1])
    assert (head(train), head(held)) == ([20, 255, 0], [19, 255, 0])
    assert train.mask_classes[::20] == ("background", "tvmonitor")
    assert train.mask_colors[20] == (20, 235, 7)
    assert train[0].id == "JPEGImages/2007_000032"
    assert values(open_source(spec, "trainval")) == [0, 1]
    assert open_source(spec, "test").mask_classes is None
    things = open_source(spec, ignore_index=0)
    assert (things.mask_classes[0], len(things.mask_classes), head(things)) == (
        "aeroplane",
        20,
        [19, 255, 255],
    )
    assert things.mask_colors[0] == (1, 254, 7)


def test_a_users_data_in_the_layout_of_pascal_voc(voc, tmp_path, refusal, png):
    write(voc / "classes.txt", "\n".join("abcdefghijklmnopqrstuvwx"))
    assert open_source(voc).mask_classes[20] == "u"
    (voc / "classes.txt").unlink()
    own = voc.rename(tmp_path / "own")
    assert open_source(own).mask_classes == ("class 0", "class 19", "class 20")
    for file in (own / "ImageSets" / "Segmentation").iterdir():
        file.unlink()
    assert len(open_source(own)) == 2  # all that have masks
    write(
        own / "ImageSets" / "Segmentation" / "train.txt",
        "/JPEGImages/2007_000032.jpg /SegmentationClass/x.png",
    )
    assert len(open_source(own, "train")) == 1
    write(own / "ImageSets" / "Segmentation" / "val.txt", "2007_000032\n2009_000009\n")
    assert "SegmentationClass has no mask of 2009_000009 of split val" in refusal(own)
    write(own / "ImageSets" / "Segmentation" / "val.txt", "absent\n")
    assert "JPEGImages has no image absent of split val" in refusal(own)
    write(own.parent / "both" / "VOC2007" / "JPEGImages" / "a.jpg", png())
    write(own.parent / "both" / "VOC2012" / "JPEGImages" / "a.jpg", png())
    assert "both holds VOC2007 and VOC2012; give one of them" in refusal(own.parent / "both")


# --------------------------------------------------------------------------------------------- EXIF orientation


def rotated_photo(folder: Path, orientation: int, size: tuple[int, int], mask_upright: bool) -> np.ndarray:
    """Write a photo of four gray squares with an EXIF orientation, and a mask that numbers them; return the upright
    mask."""
    height, width = size
    upright = np.repeat(np.repeat([[0, 1], [2, 3]], height // 2, 0), width // 2, 1).astype(np.uint8)
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    back = undo.get(orientation, UNDO_ORIENTATION.get(orientation))  # the others are their own inverse
    shown = Image.fromarray(upright * 60)
    stored = shown if back is None else shown.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (folder / "images").mkdir(parents=True, exist_ok=True)
    stored.save(folder / "images" / "0.jpg", exif=exif, quality=95)
    labels = Image.fromarray(upright)
    file = io.BytesIO()
    (labels if mask_upright or back is None else labels.transpose(back)).save(file, "PNG")
    write(folder / "masks" / "0.png", file.getvalue())
    write(folder / "classes.txt", "a\nb\nc\nd")
    return upright


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("mask_upright", [True, False])
def test_a_mask_is_oriented_as_its_photo_is_stored_or_upright(tmp_path, orientation, mask_upright):
    upright = rotated_photo(tmp_path, orientation, (48, 64), mask_upright)
    for train in (False, True):
        loader = make_loader(
            open_source(tmp_path),
            DataConfig(workers=0, batch_size=1, load_size=(48, 64)),
            Resize(size=(48, 64)),
            train=train,
        )
        (batch,) = loader
        assert np.array_equal(batch["mask"][0], upright)
        inner = np.s_[4::8, 4::8]  # away from the edges, which the JPEG blurs
        assert np.abs(batch["image"][0, 0].numpy().astype(int) - upright * 60)[inner].max() < 12


@pytest.mark.parametrize(
    ("orientation", "size"), [(2, (48, 64)), (3, (48, 64)), (4, (48, 64)), (6, (48, 48))]
)
def test_a_mask_that_fits_both_orientations_is_refused(tmp_path, orientation, size):
    rotated_photo(tmp_path, orientation, size, True)
    loader = make_loader(
        open_source(tmp_path), DataConfig(workers=0, on_bad_image="fail"), Resize(size=(8, 8)), train=False
    )
    with pytest.raises(
        TriptychError, match=rf"EXIF orientation {orientation}, and its mask fits it with and without"
    ):
        list(loader)


def test_a_rotated_photo_with_a_mask_of_another_size_or_a_rotated_mask(tmp_path, refusal):
    rotated_photo(tmp_path, 6, (48, 64), True)
    write(tmp_path / "masks" / "0.png", mask(1))
    loader = make_loader(
        open_source(tmp_path), DataConfig(workers=0, on_bad_image="fail"), Resize(size=(8, 8)), train=False
    )
    with pytest.raises(TriptychError, match="is 64 x 48 pixels, but its mask is 5 x 4"):
        list(loader)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("L", (64, 48)).save(file, "PNG", exif=exif)
    with pytest.raises(TriptychError, match="the mask m has EXIF orientation 6"):
        read_mask(file.getvalue(), "m")


# -------------------------------------------------------------------------------------------------- errors


def test_an_image_without_mask(pairs, put, refusal):
    folder = pairs(mask(1), mask(1))
    put(folder / "images" / "new.png")
    message = refusal(folder)
    assert "1 of 3 images have no mask" in message
    assert "images/new.png" in message
    write(folder / "masks" / "1.gif", mask(1))
    assert "are masks of the same image" in refusal(folder)


def test_a_row_without_mask(tmp_path, metadata, parquet, png, refusal):
    rows = [{"file_name": "a.png", "mask": "m.png"}, {"file_name": "b.png"}]
    write(metadata(tmp_path / "meta", rows) / "m.png", mask(1))
    assert "1 of 2 examples have no mask in column mask, the first of which is b.png" in refusal(
        tmp_path / "meta"
    )
    path = parquet(tmp_path / "a.parquet", {"image": [png(), png()], "mask": [None, mask(1)]})
    assert "the first of which is row 0" in refusal(path)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (
            colors((9, 0, 0), (0, 8, 0)),
            "0.png has 3 colors ((0, 0, 0), (0, 8, 0), (9, 0, 0)), and what they stand for",
        ),
        (colors((9, 0, 0), mode="RGBA"), "write a class_dict.csv with the columns name, r, g, b"),
        (colors((9, 0, 0), mode="CMYK", format="TIFF"), "0.png has mode CMYK"),
        (mask(3, format="JPEG"), "0.png is a JPEG, whose compression alters class numbers"),
    ],
    ids=["RGB", "RGBA", "CMYK", "JPEG"],
)
def test_masks_that_hold_no_numbers(pairs, refusal, content, what, named):
    folder = pairs(content, mask(1))
    if named:
        write(folder / "classes.txt", "a\nb\nc\nd")
    assert what in refusal(folder)


def test_numbers_outside_the_classes(pairs, refusal):
    folder = pairs(mask(1), mask(2, 9))
    write(folder / "classes.txt", "a\nb\nc")
    source = open_source(folder)
    with pytest.raises(
        TriptychError, match=r"masks/1\.png holds 9, but the 3 classes are numbered 0\.\.2"
    ) as caught:
        source[1]
    assert "\n" not in str(caught.value)
    loader = make_loader(source, DataConfig(workers=0), Resize(size=(4, 5)), train=False)
    assert [batch["mask"][0, 0, 0].item() for batch in loader] == [1]
    assert "masks/1.png holds 9" in next(iter(loader.bad.values()))
    write(folder / "masks" / "0.png", mask(9))
    assert "masks/0.png holds 9" in refusal(
        folder
    )  # the first mask is checked at once, since the others are probably wrong, too
    assert "masks/0.png holds 0, but the 3 classes are numbered 1..3" not in refusal(
        folder, reduce_zero_label=True
    )


def test_damaged_masks_are_skipped_like_damaged_images(pairs):
    folder = pairs(mask(1), mask(2), mask(3))
    write(folder / "masks" / "0.png", mask(1)[:40])
    write(folder / "masks" / "2.png", b"")
    source = open_source(folder)
    assert source.mask_classes == ("class 0", "class 1", "class 2")
    loader = make_loader(source, DataConfig(workers=0), Resize(size=(4, 5)), train=False)
    assert [batch["id"] for batch in loader] == [["images/1.jpg"]]
    assert len(loader.bad) == 2
    write(folder / "masks" / "1.png", b"")
    with pytest.raises(TriptychError, match=r"0\.png is damaged"):
        open_source(folder)


def test_too_many_classes_and_none(pairs, refusal):
    instances = np.arange(26001, 26101, dtype=np.uint16).reshape(10, 10)
    file = io.BytesIO()
    Image.fromarray(instances).save(file, "PNG")
    assert "hold 100 distinct values up to 26100" in refusal(pairs(file.getvalue()))
    assert "hold no classes" in refusal(pairs(mask(*[255] * 20), mask(*[0] * 20)), reduce_zero_label=True)


def test_bad_files_with_class_names(pairs, refusal):
    folder = pairs(mask(1))
    for file, content, what in (
        ("classes.txt", "a\nb\na", "classes.txt names two classes 'a'"),
        ("classes.txt", "\n", "names no classes"),
        ("classes.txt", "\n".join(map(str, range(70_000))), "name 1 to 65535"),
        ("labels.json", "{", "labels.json cannot be read"),
        ("labels.json", '{"a": {"b": 1}}', "labels.json cannot be read"),
        ("labels.json", "3", "labels.json cannot be read"),
    ):
        written = write(folder / file, content)
        assert what in refusal(folder)
        written.unlink()


def test_bad_columns(tmp_path, metadata, refusal):
    folder = metadata(tmp_path, [{"file_name": "a.png", "size": 3}])
    assert "no column 'shape' for the mask; the columns are size, image" in refusal(
        folder, mask_column="shape"
    )
    assert "column size holds" in refusal(folder, mask_column="size")


def test_bad_numbers(tmp_path):
    with pytest.raises(TriptychError, match="ignore_index"):
        DataConfig(ignore_index=-1)
    image = Image.fromarray(np.full((2, 2), -3, np.int32))
    file = io.BytesIO()
    image.save(file, "TIFF")
    with pytest.raises(TriptychError, match="x holds -3"):
        read_mask(file.getvalue(), "x")


# -------------------------------------------------------------------------------------------------- loading


def test_masks_reach_the_batch(pairs):
    source = open_source(pairs(mask(0, 1), mask(3, 0, 255), mask(2)))
    loader = make_loader(source, DataConfig(workers=2, batch_size=3), Resize(size=(4, 5)), train=False)
    (batch,) = loader
    assert torch.equal(batch["mask"], torch.from_numpy(np.stack([source[i].mask for i in range(3)])))
    (train,) = make_loader(
        source, DataConfig(workers=0, batch_size=3, load_size=(8, 10)), Resize(size=(4, 5)), train=True
    )
    assert train["mask"].shape == (3, 8, 10)
    order = [batch["id"].index(name) for name in train["id"]]
    assert torch.equal(train["mask"][:, ::2, ::2], batch["mask"][order])
