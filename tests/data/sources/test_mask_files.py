"""Masks as other programs save them: TIFF of NumPy's types, GIF and palettes that differ, fields of view."""

import io
import logging

import numpy as np
import pytest
import tifffile
from PIL import Image

from triptych.data.masks import read_mask
from triptych.data.open import open_source, train_and_eval
from triptych.data.sources.mask_folders import dataset_root
from triptych.errors import DataError

SHAPES = np.zeros((12, 10), np.uint8)
SHAPES[2:5, 3:7], SHAPES[6:9, 1:4] = 1, 2


def write(folder, **masks):
    """Write an image for each mask: an array, an image, or None for none."""
    for number, (path, mask) in enumerate(masks.items()):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (10, 12), (number, 50, 9)) if mask is None else mask
        image.save(file)
    return folder


@pytest.mark.parametrize(
    "dtype",
    [
        "bool",
        "uint8",
        "int16",
        "uint16",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "float16",
        "float32",
        "float64",
    ],
)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_numbers_of_any_type_that_tifffile_writes(dtype, compression, tmp_path):
    numbers = SHAPES.astype(dtype)
    file = tmp_path / "m.tif"
    tifffile.imwrite(file, numbers, compression=compression)
    stored = tifffile.imread(file)
    assert np.array_equal(read_mask(file, "m"), stored)
    assert np.array_equal(read_mask(file.read_bytes(), "m"), stored)


def test_a_mask_whose_zero_is_white_keeps_the_stored_numbers():
    file = io.BytesIO()
    tifffile.imwrite(file, SHAPES * 100, photometric="miniswhite")
    assert np.array_equal(read_mask(file.getvalue(), "m"), SHAPES * 100)


def palette_image(numbers, colors):
    image = Image.fromarray(numbers).convert("L")
    image.putpalette([channel for color in colors for channel in color])
    return image


def test_palettes_that_differ_are_read_by_color(tmp_path, caplog):
    colors = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    order = np.array([2, 0, 1])
    masks = {
        "masks/a.png": palette_image(SHAPES, colors),
        "masks/b.png": palette_image(np.argsort(order).astype(np.uint8)[SHAPES], [colors[k] for k in order]),
    }
    with caplog.at_level(logging.WARNING):
        source = open_source(write(tmp_path, **masks, **{"images/a.png": None, "images/b.png": None}))
    assert "palettes of the masks differ" in caplog.text
    assert source.mask_colors == tuple(colors)
    assert np.array_equal(source[0].mask, SHAPES)
    assert np.array_equal(source[1].mask, SHAPES)


def test_gif_masks_one_of_which_is_white_throughout(tmp_path):
    white = Image.new("L", (10, 12), 255)
    masks = {
        "train_masks/a_mask.gif": Image.fromarray((SHAPES > 0) * np.uint8(255)),
        "train_masks/b_mask.gif": white.convert("P"),
    }
    source = open_source(write(tmp_path, **masks, **{"train/a.jpg": None, "train/b.jpg": None}))
    assert source.mask_classes == ("background", "foreground")
    assert np.array_equal(source[0].mask, SHAPES > 0)
    assert (source[1].mask == 1).all()


def test_fields_of_view_are_no_masks(tmp_path):
    vessels, view = Image.fromarray(SHAPES * 127), Image.new("L", (10, 12), 255)
    files = {
        **{f"DRIVE/training/images/{n}_training.tif": None for n in "123"},
        **{f"DRIVE/training/1st_manual/{n}_manual1.gif": vessels for n in "123"},
        **{f"DRIVE/training/mask/{n}_training_mask.gif": view for n in "123"},
        "DRIVE/test/images/4_test.tif": None,
        "DRIVE/test/mask/4_test_mask.gif": view,
    }
    folder = write(tmp_path, **files)
    assert open_source(folder, "test").mask_classes is None
    training, evaluation = train_and_eval(folder)
    assert (len(training), len(evaluation)) == (2, 1)
    assert (evaluation[0].mask > 0).sum() == (SHAPES > 0).sum()
    other = tmp_path / "HRF"
    write(
        other,
        **{"images/01_h.jpg": None, "manual1/01_h.tif": vessels, "mask/01_h_mask.tif": view},
    )
    assert (open_source(other)[0].mask > 0).sum() == (SHAPES > 0).sum()


def test_folders_without_images_do_not_hide_the_data(tmp_path):
    write(tmp_path, **{"food/images/pie/1.png": None, "food/images/soup/2.png": None})
    (tmp_path / "food/meta").mkdir()
    assert dataset_root(tmp_path) == tmp_path / "food/images"
    assert open_source(tmp_path).classes == ("pie", "soup")


PHOTO, MASK = None, Image.fromarray(SHAPES)
COLORED = palette_image(SHAPES, [(0, 0, 0), (255, 0, 0), (0, 255, 0)]).convert("RGB")
BY_CONTENT = {
    "x and y": {"x/{}.png": PHOTO, "y/{}.png": MASK},
    "FiftyOne": {"data/{}.jpg": PHOTO, "labels/{}.png": MASK},
    "Supervisely": {
        "project/ds0/img/{}.jpg": PHOTO,
        "project/ds0/masks_machine/{}.png": MASK,
        "project/ds0/masks_human/{}.png": COLORED,
    },
    "LoveDA": {"Train/Urban/images_png/{}.png": PHOTO, "Train/Urban/masks_png/{}.png": MASK}
    | {"Val/Urban/images_png/9{}.png": PHOTO, "Val/Urban/masks_png/9{}.png": MASK},
    "labelme": {"JPEGImages/{}.jpg": PHOTO, "SegmentationClassPNG/{}.png": MASK},
    "nnU-Net": {"imagesTr/{}_0000.png": PHOTO, "labelsTr/{}.png": MASK, "imagesTs/9{}_0000.png": PHOTO},
    "SUIM": {"train_val/images/{}.jpg": PHOTO, "train_val/masks/{}.bmp": MASK}
    | {"TEST/images/9{}.jpg": PHOTO, "TEST/masks/9{}.bmp": MASK},
}


ISPRS = {"2_Ortho_RGB/top_{}_RGB.tif": PHOTO, "5_Labels_all/top_{}_label.tif": COLORED}


def test_folders_of_colored_masks(tmp_path):
    folder = write(tmp_path, **{path.format(n): mask for n in "123" for path, mask in ISPRS.items()})
    with pytest.raises(DataError, match="write a class_dict"):
        open_source(folder)
    (folder / "class_dict.csv").write_text("name,r,g,b\nbackground,0,0,0\nroof,255,0,0\nlow,0,255,0\n")
    assert np.array_equal(open_source(folder)[0].mask, SHAPES)


@pytest.mark.parametrize(
    ("file", "text", "program"),
    [
        (
            "via_region_data.json",
            '{"a": {"regions": [{"shape_attributes": {"name": "polygon"}}]}}',
            "VGG VIA",
        ),
        ("project.json", '[{"annotations": [{"result": [{"from_name": "label"}]}]}]', "Label Studio"),
        ("ann/1.jpg.json", '{"objects": [{"classTitle": "cat"}]}', "Supervisely"),
        ("annotations.xml", '<annotations><image id="0"> <polygon label="a"/></image></annotations>', "CVAT"),
        ("train.csv", "ImageId,EncodedPixels\n1.jpg,1 3\n", "run lengths"),
    ],
)
def test_annotations_that_are_not_read_are_reported(file, text, program, tmp_path, caplog):
    write(tmp_path, **{f"images/{n}.jpg": PHOTO for n in "123"})
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    with caplog.at_level(logging.WARNING):
        assert open_source(tmp_path).mask_classes is None
    assert "annotations that are not read" in caplog.text
    assert program in caplog.text
    assert "export" in caplog.text


@pytest.mark.parametrize("files", BY_CONTENT.values(), ids=BY_CONTENT)
def test_layouts_of_other_programs(files, tmp_path):
    source = open_source(
        write(tmp_path, **{path.format(n): mask for n in "123" for path, mask in files.items()})
    )
    assert len(source) == 3
    assert source.labels is None
    assert all(np.array_equal(source[i].mask, SHAPES) for i in range(3))


def test_names_of_nnunet(tmp_path):
    folder = write(tmp_path, **{"imagesTr/a_0000.png": PHOTO, "labelsTr/a.png": MASK})
    (folder / "dataset.json").write_text(
        '{"labels": {"background": 0, "tumor": 2, "liver": 1}, "numTraining": 1}'
    )
    assert open_source(folder).mask_classes == ("background", "liver", "tumor")


def test_classes_of_equal_file_names_stay_classes(tmp_path):
    files = {f"{name}/{n}.png": PHOTO for name in ("cat", "dog") for n in "123"}
    assert open_source(write(tmp_path / "photos", **files)).classes == ("cat", "dog")
    digits = {f"{name}/{n}.png": MASK for name in "01" for n in "123"}
    assert open_source(write(tmp_path / "digits", **digits)).classes == ("0", "1")
