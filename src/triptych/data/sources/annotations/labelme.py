"""Read the json files of labelme (https://github.com/wkentaro/labelme), one for each image, as semantic masks.

    x.jpg + x.json in one folder, also below train/ and val/, or images/ + annotations/ by the path in each file

Class 0 is the background, and the labels follow: those of labels.txt in its order, else all in alphabetical order.
Shapes are drawn in the order of the file and as labelme draws them, with Pillow's ImageDraw. Pixels labeled
"__ignore__" are ignored.
"""

import logging
import os
from pathlib import Path
from typing import Any

from triptych.data.drawn_masks import Shape, describe, labelme
from triptych.data.masks import void_label
from triptych.data.sources.annotations import AnnotatedTables
from triptych.data.sources.annotations.files import (
    ImageFinder,
    json_files,
    make_mask_table,
    nearby_folders,
    parse_json,
    starts_with_key,
)
from triptych.data.sources.folders import find_images, read_lines
from triptych.data.sources.splits import split_folders
from triptych.errors import DataError

log = logging.getLogger(__name__)

LABELME_KEYS = ("version", "flags", "shapes", "imagePath")
LABEL_FILES = ("labels.txt", "classes.txt", "class_names.txt")
BACKGROUND, IGNORED = ("background", "_background_"), "__ignore__"
CORNERS = {"rectangle": 2, "circle": 2, "line": 2, "linestrip": 2, "mask": 2, "point": 1, "points": 1}


def find(folder: Path) -> list[Path]:
    """Return the first of the folders with json files of labelme that are near; [] if there is none."""
    for below in nearby_folders(folder):
        file = next(json_files(below), None)
        if file is not None and starts_with_key(file, LABELME_KEYS) and _is_labelme(parse_json(file)):
            return [below]
    return []


def _is_labelme(content: Any) -> bool:
    shapes = content.get("shapes") if isinstance(content, dict) else None
    return isinstance(shapes, list) and all(isinstance(s, dict) for s in shapes) and "imagePath" in content


def read(folder: Path) -> AnnotatedTables | None:
    """Read a folder of labelme's json files and images; None if it has another layout.

    Raises:
        DataError: a file is damaged or malformed, or an image is missing.
    """
    if not find(folder):
        return None
    splits = split_folders(folder) or {"": folder}
    files = {split: _read_files(below) for split, below in splits.items()}
    labels = {
        str(s.get("label"))
        for of_split in files.values()
        for _, content in of_split
        for s in content["shapes"]
    }
    classes = _classes(folder, labels)
    numbers = {name: k for k, name in enumerate(classes)}
    numbers |= {IGNORED: void_label(len(classes)), **dict.fromkeys(BACKGROUND, 0)}
    tables = {}
    for split, of_split in files.items():
        if of_split:
            images, masks = _images_and_masks(of_split, numbers, splits[split])
            tables[split] = make_mask_table(images, masks, folder)
    return AnnotatedTables(tables, classes)


def _read_files(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    result = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.lower().endswith(".json") or name.startswith("."):
                continue
            content = parse_json(file := Path(root, name))
            if _is_labelme(content):
                content.pop("imageData", None)  # the image in base64
                result.append((file, content))
    return result


def _classes(folder: Path, labels: set[str]) -> tuple[str, ...]:
    known = {IGNORED, *BACKGROUND}
    file = next((folder / name for name in LABEL_FILES if (folder / name).is_file()), None)
    if file is None:
        return "background", *sorted(labels - known)
    listed = [name for name in dict.fromkeys(read_lines(file)) if name not in known]
    if unknown := sorted(labels.difference(listed, known)):
        raise DataError(f"{file} does not list the label {unknown[0]!r}, which shapes have; add it")
    return "background", *listed


def _images_and_masks(
    files: list[tuple[Path, dict[str, Any]]], numbers: dict[str, int], folder: Path
) -> tuple[list[Path], list[bytes]]:
    images, masks = [], []
    for file, content in files:
        finder = ImageFinder([file.parent], folder)
        name = str(content["imagePath"])
        path = finder.find(name) or finder.find(file.with_suffix(Path(name).suffix).name)
        if path is None:
            raise DataError(f"{file} is of the image {name}, which does not exist; put it next to the file")
        height, width = content.get("imageHeight"), content.get("imageWidth")
        size = (int(height), int(width)) if isinstance(height, int) and isinstance(width, int) else None
        shapes = [_shape(shape, numbers, file) for shape in content["shapes"]]
        images.append(path)
        masks.append(describe(shapes, size=size, image=str(path), order="listed"))
    unlabeled = sum(1 for _ in find_images(folder)) - len(images)
    if unlabeled > 0:
        log.warning("%d images in %s have no labelme file and are left out", unlabeled, folder)
    return images, masks


def _shape(shape: dict[str, Any], numbers: dict[str, int], file: Path) -> Shape:
    shape_type = shape.get("shape_type") or "polygon"
    try:
        points = [[float(x), float(y)] for x, y in shape["points"]]
        if len(points) < CORNERS.get(shape_type, 3):
            raise ValueError(f"{shape_type} with {len(points)} points")
        return labelme(numbers[str(shape["label"])], shape_type, points, shape.get("mask"))
    except (KeyError, ValueError, TypeError) as problem:
        raise DataError(f"a shape of {file} is malformed ({problem}); correct or remove it") from problem
