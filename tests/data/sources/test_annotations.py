"""COCO json, YOLO segmentation text and labelme json: layouts, and masks equal to pycocotools' and labelme's."""

import base64
import importlib.metadata
import importlib.util
import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.data import drawn_masks
from triptych.data.config import DataConfig
from triptych.data.loading.loader import make_loader
from triptych.data.masks import read_mask
from triptych.data.open import open_source, train_and_eval
from triptych.data.resizing import Resize
from triptych.errors import DataError

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of pycocotools
]

HEIGHT, WIDTH = 30, 40
SQUARE = [5.0, 5.0, 15.0, 5.0, 15.0, 15.0, 5.0, 15.0]
TRIANGLE = [10.0, 10.0, 30.0, 10.0, 20.0, 25.0]


def put_image(path: Path, value: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path, **options)


def put_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def polygon_by_pycocotools(*rings: list[float], size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    mask = pytest.importorskip("pycocotools.mask")
    parts = mask.frPyObjects(list(rings), *map(int, size))
    return mask.decode(mask.merge(parts)).astype(bool)


# --------------------------------------------------------------------------------------------------- shapes


@pytest.mark.proves("Data", "polygons and run lengths of COCO", by="pycocotools")
@pytest.mark.parametrize("rounding", [0, 1, 5])
def test_polygons_are_filled_as_by_pycocotools(rounding):
    rng = np.random.default_rng(rounding)
    for _ in range(300):
        height, width = map(int, rng.integers(3, 60, 2))
        corners = (rng.random((rng.integers(3, 9), 2)) * 1.5 - 0.25) * [width, height]
        ring = np.round(corners, rounding).ravel().tolist()
        shape = drawn_masks.polygons(7, [ring])
        mask = read_mask(drawn_masks.describe([shape], size=(height, width), order="area"), "m")
        assert np.array_equal(mask == 7, polygon_by_pycocotools(ring, size=(height, width)))


@pytest.mark.proves("Data", "polygons and run lengths of COCO", by="pycocotools")
def test_run_lengths_are_decoded_as_by_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for density in (0.01, 0.5, 0.97, 0.0, 1.0):
        mask = (rng.random((50, 37)) < density).astype(np.uint8)
        text = coco.encode(np.asfortranarray(mask))["counts"].decode()
        columns = mask.T.ravel()
        changes = np.flatnonzero(np.diff(columns)) + 1
        counts = np.diff([0, *changes, len(columns)]).tolist()
        counts = [0, *counts] if columns[0] else counts
        assert drawn_masks.parse_run_lengths(text) == counts
        assert (
            coco.decode(coco.frPyObjects({"counts": counts, "size": [50, 37]}, 50, 37)).tolist()
            == mask.tolist()
        )
        for encoded in (text, counts):
            shape = drawn_masks.run_lengths(3, encoded, (50, 37))
            drawn = read_mask(drawn_masks.describe([shape], size=(50, 37), order="area"), "m")
            assert np.array_equal(drawn == 3, mask)


@pytest.fixture(scope="module")
def labelme_shapes():
    """labelme's own module of shapes, without its windows."""
    try:
        file = importlib.metadata.distribution("labelme").locate_file("labelme/utils/shape.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("labelme is not installed (pip install --no-deps labelme)")
    spec = importlib.util.spec_from_file_location("labelme_shape", str(file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("labelme", "labelme._label_file"):
            stub = types.ModuleType(name)
            stub.ShapeDict = dict  # type: ignore[attr-defined]
            patch.setitem(sys.modules, name, stub)
        spec.loader.exec_module(module)
    return module


@pytest.mark.proves("Data", "shapes of labelme", by="labelme")
def test_shapes_are_drawn_as_by_labelme(labelme_shapes):
    rng = np.random.default_rng(0)
    corners = {"polygon": 5, "rectangle": 2, "circle": 2, "line": 2, "linestrip": 4, "point": 1}
    for _ in range(40):
        shapes = []
        for number, (shape_type, count) in enumerate(corners.items(), 1):
            points = (rng.random((count, 2)) * [WIDTH + 10, HEIGHT + 10] - 5).round(1).tolist()
            shapes.append({"label": str(number), "points": points, "shape_type": shape_type})
        rng.shuffle(shapes)
        names = {shape["label"]: int(shape["label"]) for shape in shapes}
        expected, _ = labelme_shapes.shapes_to_label((HEIGHT, WIDTH), shapes, names)
        ours = [drawn_masks.labelme(int(s["label"]), s["shape_type"], s["points"]) for s in shapes]
        drawn = read_mask(drawn_masks.describe(ours, size=(HEIGHT, WIDTH), order="listed"), "m")
        assert np.array_equal(drawn, expected)


# ----------------------------------------------------------------------------------------------------- COCO


def coco(*annotations: dict, names: tuple[str, ...] = ("1.jpg",), **more) -> dict:
    sizes = {"height": HEIGHT, "width": WIDTH}
    return {
        "info": {},
        "images": [{"id": 10 + i, "file_name": name, **sizes} for i, name in enumerate(names)],
        "annotations": [{"id": i, "image_id": 10, **annotation} for i, annotation in enumerate(annotations)],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        **more,
    }  # fmt: skip


CAR = {"category_id": 3, "segmentation": [SQUARE]}
DOG = {"category_id": 18, "segmentation": [TRIANGLE]}


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/instances_default.json", "images/default"),
        ("annotations/instances_default.json", "images"),
        ("_annotations.coco.json", "."),
        ("annotations.json", "images"),
        ("labels.json", "data"),
        ("result.json", "deep/down/below"),
    ],
)
def test_layouts_of_coco(tmp_path, file, folder):
    put_json(tmp_path / file, coco(CAR, DOG))
    put_image(tmp_path / folder / "1.jpg")
    source = open_source(tmp_path)
    assert source.mask_classes == ("background", "car", "dog")
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[polygon_by_pycocotools(TRIANGLE)] = 2
    expected[polygon_by_pycocotools(SQUARE)] = 1  # smaller, so it is on top
    assert np.array_equal(source[0].mask, expected)
    assert source[0].mask.dtype == np.uint8
    assert open_source(tmp_path / file)[0].mask.tolist() == source[0].mask.tolist()


@pytest.mark.parametrize("layout", ["roboflow", "coco"])
def test_splits_of_coco(tmp_path, layout):
    for split, annotation in (("train", CAR), ("valid", DOG)):
        year = "" if layout == "roboflow" else "2017"
        place = (
            f"{split}/_annotations.coco.json"
            if layout == "roboflow"
            else f"annotations/instances_{split}2017.json"
        )
        content = coco(annotation)
        content["categories"].append({"id": 0, "name": "things", "supercategory": "none"})
        for category in content["categories"][:2]:
            category["supercategory"] = "things"
        put_json(tmp_path / place, content)
        put_json(tmp_path / "annotations" / f"captions_{split}2017.json", {"info": {}, "annotations": [{}]})
        put_image(tmp_path / f"{split}{year}" / "1.jpg")
    train, held = train_and_eval(tmp_path)
    assert train.mask_classes == held.mask_classes == ("background", "car", "dog")
    assert set(np.unique(train[0].mask)) == {0, 1}
    assert set(np.unique(held[0].mask)) == {0, 2}


def test_objects_of_several_parts_run_lengths_and_crowds(tmp_path):
    everywhere = [0, HEIGHT * WIDTH]
    crowd = {"category_id": 18, "iscrowd": 1, "segmentation": {"counts": everywhere, "size": [HEIGHT, WIDTH]}}
    parts = {"category_id": 3, "segmentation": [SQUARE, [20.0, 20.0, 30.0, 20.0, 30.0, 28.0]]}
    box = {"category_id": 3, "bbox": [0, 0, 5, 5], "segmentation": []}
    put_json(tmp_path / "a.json", coco(parts, crowd, box, names=("1.jpg", "2.jpg")))
    for name in ("1.jpg", "2.jpg"):
        put_image(tmp_path / name)
    source = open_source(tmp_path)
    car = polygon_by_pycocotools(SQUARE) | polygon_by_pycocotools([20.0, 20.0, 30.0, 20.0, 30.0, 28.0])
    assert np.array_equal(source[0].mask, np.where(car, 1, 2))
    assert not source[1].mask.any()


def test_options_of_masks_apply_to_annotations(tmp_path):
    put_json(tmp_path / "a.json", coco(CAR))
    put_image(tmp_path / "1.jpg")
    source = open_source(tmp_path, reduce_zero_label=False, ignore_index=0)
    assert source.mask_classes == ("car", "dog")
    assert set(np.unique(source[0].mask)) == {0, 255}


def test_annotations_reach_the_batch(tmp_path):
    names = tuple(f"{i}.png" for i in range(4))
    annotations = [{**CAR, "image_id": 10 + i} for i in range(4)]
    content = coco(names=names)
    content["annotations"] = [{"id": i, **annotation} for i, annotation in enumerate(annotations)]
    put_json(tmp_path / "a.json", content)
    for name in names:
        put_image(tmp_path / name)
    source = open_source(tmp_path)
    loader = make_loader(
        source, DataConfig(workers=2, batch_size=4), Resize(size=(HEIGHT, WIDTH)), train=False
    )
    (batch,) = loader
    assert "mask" in batch
    assert batch["mask"].sum() == 4 * polygon_by_pycocotools(SQUARE).sum()
    assert source.fingerprint == open_source(tmp_path).fingerprint


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"images": [{"id": 1}]}, "an image without file_name, id, height or width"),
        ({"categories": None}, "no list of categories"),
        (
            {"images": [{"id": [], "file_name": "1.jpg", "height": 3, "width": 3}]},
            "has the id [], but ids are numbers",
        ),
        ({"categories": [{"id": 3}]}, "a category without id or name"),
        (
            {"categories": [{"id": 4, "name": "x"}]},
            "an object of category 3, which is not among its categories",
        ),
        (
            {"annotations": [{**CAR, "image_id": 10, "segmentation": [[1, 2, 3]]}]},
            "odd number of coordinates",
        ),
        ({"annotations": [{**CAR, "image_id": 10, "segmentation": [["a"] * 6]}]}, "is malformed"),
        (
            {"images": [{"id": 1, "file_name": "no.jpg", "height": 3, "width": 3}]},
            "1 of 1 images that {} lists do not exist, the first of which is no.jpg",
        ),
    ],
)
def test_mistakes_in_coco(tmp_path, refusal, change, what):
    put_json(tmp_path / "a.json", coco(CAR, **change))
    put_image(tmp_path / "1.jpg")
    assert what.format(tmp_path / "a.json") in refusal(tmp_path)


def test_damaged_and_ambiguous_coco(tmp_path, refusal):
    put_image(tmp_path / "1.jpg")
    (tmp_path / "a.json").write_text('{"images": [')
    assert "a.json cannot be read" in refusal(tmp_path)
    for name in ("a.json", "b.json"):
        put_json(tmp_path / name, coco(CAR))
    assert "could both hold the annotations; give one of them" in refusal(tmp_path)
    assert len(open_source(tmp_path / "b.json")) == 1


def test_run_lengths_of_another_size(tmp_path):
    wrong = {"category_id": 3, "segmentation": {"counts": [5, 4], "size": [3, 3]}}
    put_json(tmp_path / "a.json", coco(wrong))
    put_image(tmp_path / "1.jpg")
    with pytest.raises(DataError, match=r"cover 9 pixels of 3 x 3, but the image has 40 x 30"):
        open_source(tmp_path)[0]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"segmentation": [[0, 0, 1e12, 0, 5, 5]]}, r"a polygon has the coordinate 1e\+12"),
        ({"segmentation": {"counts": "zz", "size": [HEIGHT, WIDTH]}}, "run lengths of an annotation"),
        ({"segmentation": {"counts": ["x"], "size": [HEIGHT, WIDTH]}}, "an annotation of .* is damaged"),
    ],
)
def test_shapes_that_cannot_be_drawn(tmp_path, change, what):
    put_json(tmp_path / "a.json", coco({"category_id": 3, **change}))
    put_image(tmp_path / "1.jpg")
    with pytest.raises(DataError, match=what):
        open_source(tmp_path)[0]


def test_boxes_without_segmentation_are_no_masks(tmp_path, caplog):
    put_json(tmp_path / "a.json", coco({"category_id": 3, "bbox": [0, 0, 5, 5]}))
    put_image(tmp_path / "1.jpg")
    assert open_source(tmp_path).mask_classes is None
    assert "holds no segmentation, only boxes" in caplog.text


# ----------------------------------------------------------------------------------------------------- YOLO


def relative(ring: list[float]) -> str:
    sizes = [WIDTH, HEIGHT] * (len(ring) // 2)
    return " ".join(f"{value / size:.6f}" for value, size in zip(ring, sizes, strict=True))


@pytest.mark.proves("Data", "YOLO segmentation: text and data.yaml", by="names")
@pytest.mark.parametrize("layout", ["ultralytics", "roboflow", "flat", "elsewhere"])
def test_layouts_of_yolo(tmp_path, layout):
    places = {
        "ultralytics": {"train": "images/train", "val": "images/val"},
        "roboflow": {"train": "train/images", "val": "valid/images"},
        "flat": {"train": "images"},
        "elsewhere": {"train": "sets/a/images", "val": "sets/b/images"},
    }[layout]
    for number, place in enumerate(places.values()):
        put_image(tmp_path / place / f"{number}.jpg")
        put_image(tmp_path / place / f"empty{number}.jpg")
        text = tmp_path / place.replace("images", "labels") / f"{number}.txt"
        text.parent.mkdir(parents=True)
        text.write_text(f"1 {relative(TRIANGLE)}\n0 {relative(SQUARE)}\n\n")
    if layout == "roboflow":
        (tmp_path / "data.yaml").write_text(
            "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: ['car', 'dog']\n"
        )
    elif layout != "flat":
        paths = "\n".join(f"{split}: {place}" for split, place in places.items())
        (tmp_path / "set.yaml").write_text(f"path: /home/ann/data\n{paths}\nnames:\n  0: car\n  1: dog\n")
    else:
        (tmp_path / "classes.txt").write_text("car\ndog\n")
    source, other = train_and_eval(tmp_path, 0.5)
    assert source.mask_classes == other.mask_classes == ("background", "car", "dog")
    full = source if layout != "flat" else open_source(tmp_path)
    assert len(full) == 2
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[polygon_by_pycocotools(TRIANGLE)] = 2
    expected[polygon_by_pycocotools(SQUARE)] = 1
    assert np.array_equal(full[0].mask, expected)
    assert not full[1].mask.any()


def test_the_size_of_a_yolo_mask_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    put_image(tmp_path / "images" / "1.jpg", size=(HEIGHT, WIDTH), exif=exif)
    text = tmp_path / "labels" / "1.txt"
    text.parent.mkdir()
    text.write_text("0 0 0 0.5 0 0.5 1 0 1")
    mask = open_source(tmp_path)[0].mask
    assert mask is not None
    assert mask.shape == (HEIGHT, WIDTH)
    assert mask[:, :20].all()
    assert not mask[:, 20:].any()


def test_changed_shapes_change_the_fingerprint_and_a_moved_folder_does_not(tmp_path):
    folder = tmp_path / "data"
    put_image(folder / "images" / "1.jpg")
    text = folder / "labels" / "1.txt"
    text.parent.mkdir()
    text.write_text(f"0 {relative(SQUARE)}")
    (folder / "classes.txt").write_text("car\ndog\n")
    before = open_source(folder).fingerprint
    moved = folder.rename(tmp_path / "deeper_and_longer").rename(tmp_path / "data2")
    assert open_source(moved).fingerprint == before
    (moved / "labels" / "1.txt").write_text(f"1 {relative(SQUARE)}")
    assert open_source(moved).fingerprint != before


def test_mistakes_in_yolo(tmp_path, refusal, caplog):
    put_image(tmp_path / "images" / "1.jpg")
    put_image(tmp_path / "images" / "2.jpg")
    texts = tmp_path / "labels" / "1.txt", tmp_path / "labels" / "2.txt"
    texts[0].parent.mkdir()
    texts[0].write_text(f"0 {relative(SQUARE)}")
    for content, what in (
        ("0 0.5 0.5 1 1", "2.txt line 1 is a box, and other lines are polygons"),
        ("\n0 0.1 0.2 0.3 0.4 0.5", "2.txt line 2 is malformed"),
        ("x 0.1 0.2 0.3 0.4 0.5 0.6", "2.txt line 1 is malformed"),
    ):
        texts[1].write_text(content)
        assert what in refusal(tmp_path)
    (tmp_path / "data.yaml").write_text("train: images\nnames: [car]\n")
    texts[1].write_text(f"1 {relative(SQUARE)}")
    assert "class 1 of an object in" in refusal(tmp_path)
    for text in texts:
        text.write_text("0 0.5 0.5 1 1")
    assert open_source(tmp_path).mask_classes is None
    assert "only boxes" in caplog.text
    (tmp_path / "data.yaml").write_text("train: [\n")
    assert "data.yaml cannot be read" in refusal(tmp_path)


# -------------------------------------------------------------------------------------------------- labelme


def labelme(name: str, *shapes: dict, **more) -> dict:
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    return {
        "version": "5.0.1",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": name,
        "imageData": None,
        **size,
        **more,
    }


def outline(label: str, ring: list[float], shape_type: str | None = "polygon", **more) -> dict:
    points = [ring[i : i + 2] for i in range(0, len(ring), 2)]
    return {"label": label, "points": points, "shape_type": shape_type, "group_id": None, **more}


@pytest.mark.parametrize("layout", ["flat", "splits", "folders"])
def test_layouts_of_labelme(tmp_path, layout, labelme_shapes):
    shapes = [outline("dog", TRIANGLE), outline("car", SQUARE)]
    for number, split in enumerate(("train", "val")):
        folder = tmp_path / split if layout == "splits" else tmp_path
        images = folder / "images" if layout == "folders" else folder
        texts = folder / "annotations" if layout == "folders" else folder
        path = f"..\\images\\{number}.jpg" if layout == "folders" else f"{number}.jpg"
        put_image(images / f"{number}.jpg")
        put_json(texts / f"{number}.json", labelme(path, *shapes[number:]))
    source, held = train_and_eval(tmp_path, 0.5)
    assert source.mask_classes == held.mask_classes == ("background", "car", "dog")
    if layout != "splits":
        source = open_source(tmp_path)
    numbers = {"car": 1, "dog": 2}
    expected, _ = labelme_shapes.shapes_to_label((HEIGHT, WIDTH), shapes, numbers)
    assert np.array_equal(source[0].mask, expected)


def test_labels_in_a_list_and_ignored_ones(tmp_path):
    put_image(tmp_path / "1.jpg")
    put_image(tmp_path / "without.jpg")
    shapes = [outline("dog", SQUARE, None), outline("__ignore__", [0, 0, 3, 3], "rectangle")]
    put_json(tmp_path / "1.json", labelme("1.jpg", *shapes, outline("_background_", TRIANGLE)))
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ncar\ndog\n")
    source = open_source(tmp_path)
    assert source.mask_classes == ("background", "car", "dog")
    assert len(source) == 1
    mask = source[0].mask
    assert mask is not None
    assert (mask[0, 0], mask[6, 6], mask[12, 13], mask[29, 0]) == (255, 2, 0, 0)


def test_a_stamp_of_labelme(tmp_path):
    stamp = np.random.default_rng(0).random((6, 8)) < 0.5
    file = io.BytesIO()
    Image.fromarray(stamp).save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    put_image(tmp_path / "1.jpg")
    put_json(tmp_path / "1.json", labelme("1.jpg", outline("dog", [10, 4, 17, 9], "mask", mask=encoded)))
    mask = open_source(tmp_path)[0].mask
    assert mask is not None
    assert np.array_equal(mask[4:10, 10:18], stamp)
    assert mask.sum() == stamp.sum()


def test_mistakes_in_labelme(tmp_path, refusal):
    put_image(tmp_path / "1.jpg")
    put_json(tmp_path / "1.json", labelme("1.jpg", outline("dog", [1, 2, 3, 4])))
    assert "1.json is malformed (polygon with 2 points)" in refusal(tmp_path)
    put_json(tmp_path / "1.json", labelme("1.jpg", outline("dog", SQUARE)))
    put_json(tmp_path / "2.json", labelme("2.jpg", outline("dog", SQUARE)))
    assert "2.json is of the image 2.jpg, which does not exist" in refusal(tmp_path)
    put_json(tmp_path / "2.json", labelme("1.jpg", outline("cat", SQUARE)))
    (tmp_path / "labels.txt").write_text("dog")
    assert "labels.txt does not list the label 'cat'" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["coco", "yolo", "labelme"])
def test_annotations_are_not_streamed(tmp_path, refusal, name):
    put_image(tmp_path / "images" / "1.jpg")
    if name == "coco":
        put_json(tmp_path / "annotations" / "a.json", coco(CAR))
    elif name == "labelme":
        put_json(tmp_path / "images" / "1.json", labelme("1.jpg", outline("dog", SQUARE)))
    else:
        (tmp_path / "labels").mkdir()
        (tmp_path / "labels" / "1.txt").write_text(f"0 {relative(SQUARE)}")
    assert "annotations, which cannot be streamed; omit --loading.stream" in refusal(tmp_path, stream=True)
