"""Layouts of images and masks that people have, paired by the names of files and folders, and files of colors."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.data.open import open_source, train_and_eval
from triptych.data.sources.mask_names import folder_role, pair_key

pytestmark = pytest.mark.usefixtures("cache")

BLACK, RED, GREEN = (0, 0, 0), (128, 0, 0), (0, 128, 0)


@pytest.fixture
def tree(tmp_path):
    """Write files by path: an image of a number, a mask of a class number, a mask of colors, or text."""

    def write(files: dict[str, int | str | list[tuple[int, int, int]]]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content)
            elif isinstance(content, list):
                Image.fromarray(np.array(content, np.uint8).reshape(1, -1, 3).repeat(4, 0)).save(path)
            else:
                Image.new("L", (5, 4), content).save(path)
        return tmp_path

    return write


def classes_of(source) -> list[int]:
    return [int(source[i].mask[0, 0]) for i in range(len(source))]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}.jpg", "{}_mask.png"),
        ("{}.jpg", "{}_segmentation.png"),
        ("{}.jpg", "{}-seg.png"),
        ("img_{}.jpg", "mask_{}.png"),
        ("image{}.jpg", "mask{}.png"),
        ("{}_image.png", "{}_label.png"),
        ("{}_sat.jpg", "{}_mask.png"),
        ("{}.jpg", "{}_mask.jpg.png"),
        ("img_{}.jpg", "img_{}_mask.png"),
        ("IMG_{}.JPG", "IMG_{}_GT.png"),
        ("case {}.png", "case {}_mask.png"),
        ("{}.jpg", "{}.jpg.png"),
        ("{}.png", "{}_L.png"),
        ("x_jpg.rf.0{}f.jpg", "x_jpg.rf.0{}f_mask.png"),
    ],
)
def test_masks_next_to_images_and_in_folders(tree, tmp_path, image, mask, values):
    for folders in (("", ""), ("images/", "masks/"), ("train/", "train/")):
        root = tmp_path / (folders[0].strip("/") or "flat")
        tree({f"{root.name}/{folders[0]}{image.format(i)}": i for i in (1, 2, 3)})
        tree({f"{root.name}/{folders[1]}{mask.format(i)}": i for i in (1, 2, 3)})
        source = open_source(root)
        assert len(source) == 3
        assert classes_of(source) == [1, 2, 3]
        assert [abs(value - i) < 2 for value, i in zip(values(source), (1, 2, 3), strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("train", "train_labels"),
        ("train", "trainannot"),
        ("train", "train_masks"),
        ("train_images", "train_masks"),
        ("images_train", "masks_train"),
        ("imgs", "segmentations"),
        ("images", "ground truth"),
        ("images", "annotations/trimaps"),
        ("RGB", "SegmentationMasks"),
        ("ISIC2018_Task1_Training_Input", "ISIC2018_Task1_Training_GroundTruth"),
    ],
)
def test_folders_of_images_and_of_masks(tree, images, masks):
    root = tree({f"{images}/{i}.png": 0 for i in (1, 2)} | {f"{masks}/{i}.png": i for i in (1, 2)})
    assert classes_of(open_source(root)) == [1, 2]


def test_splits_with_folders_of_labels(tree, caplog):
    names = {"train": 1, "val": 2, "test": 3}
    files = {f"{split}/{i}.png": 0 for split, i in names.items()}
    root = tree(files | {f"{split}_labels/{i}_L.png": i for split, i in names.items() if split != "test"})
    train, held = train_and_eval(root)
    assert (classes_of(train), classes_of(held)) == ([1], [2])
    assert open_source(root, "test").mask_classes is None
    assert "train: images from train, masks from train_labels" in caplog.text


def test_an_image_without_mask_and_with_two(tree, refusal, tmp_path):
    files: dict = {f"{i}.jpg": 0 for i in range(5)} | {f"{i}_mask.png": 1 for i in range(4)}
    root = tree(files)
    message = refusal(root)
    assert "1 of 5 images have no mask" in message
    assert "4.jpg" in message
    tree({"4_mask.png": 1, "4_mask_1.png": 1})
    assert "are masks of the same image; merge them" in refusal(root)


def test_class_folders_next_to_masks_stay_labels(tree):
    files = {f"{name}/{name} ({i}).png": 0 for name in ("benign", "malignant") for i in (1, 2)}
    root = tree(files | {name.replace(").png", ")_mask.png"): 1 for name in files})
    source = open_source(root)
    assert source.classes == ("benign", "malignant")
    assert len(source.mask_classes) == 2
    assert len(source) == 4


def test_names_that_only_look_like_masks(tree, tmp_path):
    root = tree({f"{name}/{name}_{i}.jpg": 0 for name in ("with_mask", "label") for i in range(3)})
    assert open_source(root).mask_classes is None
    assert open_source(root).classes == ("label", "with_mask")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cat.jpg", ("cat", "")),
        ("cat_mask.png", ("cat", "mask")),
        ("cat.jpg.png", ("cat", "mask")),
        ("img_7_mask.png", ("7", "mask")),
        ("img7.png", ("7", "image")),
        ("imagine.png", ("imagine", "")),
        ("masked.png", ("masked", "")),
        ("21_manual1.gif", ("21", "mask")),
        ("21_training.tif", ("21", "image")),
    ],
)
def test_keys_of_names(name, key):
    assert pair_key(name) == key


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train_labels", ("train", "mask")),
        ("valannot", ("val", "mask")),
        ("masks-test", ("test", "mask")),
        ("images", ("", "image")),
        ("valid", ("val", "")),
        ("dogs", None),
        ("image_of_dogs", None),
    ],
)
def test_roles_of_folders(name, role):
    assert folder_role(name) == role


# ---------------------------------------------------------------------------------------------------- colors


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("class_dict.csv", "name,r,g,b\nVoid,0,0,0\nCar,128,0,0\nTree,0,128,0\n"),
        ("colors.csv", " r, g, b, class_name\n0, 0, 0, Void\n128, 0, 0, Car\n0, 128, 0, Tree"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nVoid:0,0,0::\nCar:128,0,0::\nTree:0,128,0::\n"),
        ("label_colors.txt", "0 0 0\tVoid\n128 0 0\tCar\n0 128 0\tTree\n"),
        ("palette.json", '{"Void": [0, 0, 0], "Car": [128, 0, 0], "Tree": [0, 128, 0]}'),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_colors_named_by_a_file(tree, tmp_path, refusal, file, content, elsewhere):
    place = "elsewhere/" if elsewhere else "data/"
    tree({"data/images/1.png": 0, "data/masks/1.png": [BLACK, RED, GREEN, RED, BLACK], place + file: content})
    options = {"mask_palette": str(tmp_path / place / file)} if elsewhere else {}
    source = open_source(tmp_path / "data", **options)
    assert source.mask_classes == ("Void", "Car", "Tree")
    assert source.mask_colors == (BLACK, RED, GREEN)
    assert source[0].mask[0].tolist() == [0, 1, 2, 1, 0]
    ignored = open_source(tmp_path / "data", ignore_index=0, **options)
    assert ignored.mask_classes == ("Car", "Tree")
    assert ignored[0].mask[0].tolist() == [255, 0, 1, 0, 255]
    tree({"data/masks/1.png": [BLACK, RED, (3, 4, 5), RED, BLACK]})
    assert "holds the color (3, 4, 5) in 20.0% of its pixels" in refusal(tmp_path / "data", **options)


def test_palettes_and_numbers_with_a_file_of_colors(tree, tmp_path):
    root = tree(
        {"images/1.png": 0, "masks/1.png": 2, "class_dict.csv": "name,r,g,b\na,9,9,9\nb,8,0,0\nc,0,8,0\n"}
    )
    source = open_source(root)
    assert classes_of(source) == [2]  # grayscale of class numbers
    assert source.mask_colors == ((9, 9, 9), (8, 0, 0), (0, 8, 0))
    image = Image.fromarray(np.array([[5, 3, 3, 5, 3]] * 4, np.uint8)).convert("P")
    image.putdata([5, 3, 3, 5, 3] * 4)
    image.putpalette([n for i in range(6) for n in ({5: (9, 9, 9), 3: (0, 8, 0)}.get(i, (i, 1, 1)))])
    image.save(tmp_path / "masks" / "1.png")
    assert open_source(root)[0].mask[0].tolist() == [0, 2, 2, 0, 2]


@pytest.mark.proves("Data", "masks of CVAT, Roboflow and CamVid", by="names")
def test_cvat(tree, tmp_path):
    root = tree(
        {
            "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:128,0,0::\ntree:0,128,0::\n",
            "ImageSets/Segmentation/default.txt": "1\n2\n",
            "JPEGImages/1.png": 0,
            "JPEGImages/2.png": 0,
            "SegmentationClass/1.png": [BLACK, RED, GREEN, RED, BLACK],
            "SegmentationClass/2.png": [BLACK] * 5,
            "SegmentationObject/1.png": [BLACK, (1, 2, 3), (4, 5, 6), RED, BLACK],
        }
    )
    train, held = train_and_eval(root, 0.5)
    assert train.mask_classes == held.mask_classes == ("background", "car", "tree")
    assert open_source(root)[0].mask[0].tolist() == [0, 1, 2, 1, 0]
    assert not open_source(root)[1].mask.any()


@pytest.mark.proves("Data", "masks of CVAT, Roboflow and CamVid", by="names")
def test_roboflow(tree):
    table = "Pixel Value, Class\n0, background\n1, scratch\n2, dent\n"
    files: dict = {}
    for split, number in (("train", 1), ("valid", 2), ("test", 0)):
        name = f"{split}/photo_{number}_jpg.rf.0a1b"
        files |= {f"{name}.jpg": 0, f"{name}_mask.png": number, f"{split}/_classes.csv": table}
    root = tree(files)
    train, held = train_and_eval(root)
    assert train.mask_classes == ("background", "scratch", "dent")
    assert (classes_of(train), classes_of(held), classes_of(open_source(root, "test"))) == ([1], [2], [0])


@pytest.mark.proves("Data", "masks of CVAT, Roboflow and CamVid", by="names")
def test_camvid(tree):
    table = "name,r,g,b\nVoid,0,0,0\nCar,128,0,0\nTree,0,128,0\n"
    files: dict = {"class_dict.csv": table}
    for split, color in (("train", RED), ("val", GREEN)):
        files |= {f"{split}/{split}_1.png": 0, f"{split}_labels/{split}_1_L.png": [color] * 5}
    train, held = train_and_eval(tree(files))
    assert train.mask_classes == ("Void", "Car", "Tree")
    assert (classes_of(train), classes_of(held)) == ([1], [2])


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("class_dict.csv", "name,r,g,b\na,0,0,0\nb,0,0,0\n", "gives two classes the color (0, 0, 0)"),
        ("class_dict.csv", "name,r,g,b\na,0,0\n", "too few cells"),
        ("class_dict.csv", "name,r,g,b\na,x,0,0\n", "no color of three numbers"),
        ("class_dict.csv", "name,r,g,b\na,300,0,0\n", "numbers from 0 to 255"),
        ("class_dict.csv", "name,r,g,b\na,1,0,0\na,2,0,0\n", "names two classes 'a'"),
        ("_classes.csv", "Pixel Value, Class\nx, a\n", "cannot be read"),
        ("palette.json", "{", "cannot be read"),
    ],
)
def test_bad_files_of_colors(tree, refusal, file, content, what):
    root = tree({"images/1.png": 0, "masks/1.png": [RED] * 5, file: content})
    assert what in refusal(root)


def test_tables_about_other_things_do_not_matter(tree):
    root = tree({"images/1.png": 0, "masks/1.png": 1, "stats.csv": "name,score\na,1\n", "big.csv": "\xff\n"})
    assert len(open_source(root).mask_classes) == 2


def test_layouts_of_masks_are_not_streamed(tree, refusal, tmp_path):
    tree({"pairs/images/1.png": 0, "pairs/masks/1.png": 1, "flat/1.jpg": 0, "flat/1_mask.png": 1})
    tree(
        {
            "split/train/1.png": 0,
            "split/train_masks/1.png": 1,
            "voc/JPEGImages/1.png": 0,
            "voc/SegmentationClass/1.png": 1,
        }
    )
    for name in ("pairs", "flat", "split", "voc"):
        assert "images with masks, which cannot be streamed; omit --loading.stream" in refusal(
            tmp_path / name, stream=True
        )


def test_jpeg_masks_next_to_images(tmp_path):
    disk = np.hypot(*(np.mgrid[:64, :64] - 32)) < 20
    for number in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.jpg")
        file = io.BytesIO()
        Image.fromarray(disk.astype(np.uint8) * 255).save(file, "JPEG")
        (tmp_path / f"{number}_mask.jpg").write_bytes(file.getvalue())
    source = open_source(tmp_path, mask_threshold=127)
    assert np.array_equal(source[1].mask, disk)
