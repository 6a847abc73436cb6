"""Read COCO json: polygons, run lengths and crowds of https://cocodataset.org/#format-data as semantic masks.

    annotations/instances_train2017.json + train2017/*.jpg                  (COCO)
    train/_annotations.coco.json + train/*.jpg                              (Roboflow)
    annotations/instances_default.json + images/*.jpg                       (CVAT)
    labels.json + data/*.jpg                                                (FiftyOne)
    anything.json + images of any folder

Class 0 is the background, and the categories follow in the order of their ids. Small objects lie over large ones, and
all of them over crowds.
"""

import logging
from pathlib import Path
from typing import Any

from triptych.data.drawn_masks import Shape, describe, polygons, run_lengths
from triptych.data.sources.annotations import AnnotatedTables
from triptych.data.sources.annotations.files import (
    ImageFinder,
    json_files,
    make_mask_table,
    parse_json,
    starts_with_key,
)
from triptych.data.sources.folders import list_visible
from triptych.data.sources.splits import SPLITS, WORD, split_folders
from triptych.errors import DataError

log = logging.getLogger(__name__)

COCO_KEYS = ("info", "licenses", "images", "annotations", "categories", "type")
ANNOTATION_FOLDERS = ("annotations", "annotation", "labels", "coco")
# Other tasks, whose files lie next to those of instances.
OTHER_TASKS = ("captions", "person_keypoints", "image_info", "panoptic", "stuff", "sem_")


def find(folder: Path) -> dict[str, Path]:
    """Return the COCO json file of each split; {} if there are none.

    Raises:
        DataError: several files for a split.
    """
    splits = split_folders(folder)
    own = {split: _files_in(below) for split, below in splits.items()}
    if any(own.values()):
        return {split: _only(files) for split, files in own.items() if files}
    files = [*_files_in(folder)]
    for path in list_visible(folder):
        if path.is_dir() and path.name.lower() in ANNOTATION_FOLDERS:
            files += _files_in(path)
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    if len(by_split) > 1:
        by_split.pop("", None)
    return {split: _only(of_split) for split, of_split in by_split.items()}


def _files_in(folder: Path) -> list[Path]:
    files = [
        file
        for file in sorted(json_files(folder))
        if not file.name.startswith(OTHER_TASKS) and starts_with_key(file, COCO_KEYS)
    ]
    return [file for file in files if file.name.startswith("instances")] or files


def _split_of(file: Path) -> str:
    splits = {SPLITS[word.lower()] for word in WORD.findall(file.stem) if word.lower() in SPLITS}
    return splits.pop() if len(splits) == 1 else ""


def _only(files: list[Path]) -> Path:
    if len(files) > 1:
        raise DataError(
            f"{files[0]} and {files[1].name} could both hold the annotations; give one of them as the data"
        )
    return files[0]


def read(folder: Path) -> AnnotatedTables | None:
    """Read a folder of COCO json and images; None if it has another layout, or its objects are boxes only.

    Raises:
        DataError: a file is damaged or malformed, or an image is missing.
    """
    files = find(folder)
    return _read_files(files, folder) if files else None


def read_file(file: Path) -> AnnotatedTables:
    """Read one json file, whose images are near it.

    Raises:
        DataError: as `read`, or its objects are boxes only.
    """
    is_apart = file.parent.name.lower() in ANNOTATION_FOLDERS
    annotated = _read_files({"": file}, file.parent.parent if is_apart else file.parent)
    if annotated is None:
        raise DataError(f"{file} holds boxes but no segmentation; give other annotations")
    return annotated


def _read_files(files: dict[str, Path], root: Path) -> AnnotatedTables | None:
    contents = {split: _checked(parse_json(file), file) for split, file in files.items()}
    numbers = _number_categories(contents, files)
    if not any(_is_segmented(content) for content in contents.values()):
        log.warning(
            "%s holds no segmentation, only boxes; its images are read without masks",
            next(iter(files.values())),
        )
        return None
    tables = {}
    for split, content in contents.items():
        images, masks = _images_and_masks(content, numbers, files[split], root)
        tables[split] = make_mask_table(images, masks, root, masked=bool(content["annotations"]))
    return AnnotatedTables(tables, ("background", *dict.fromkeys(name for name, _ in numbers.values())))


def _checked(content: Any, file: Path) -> dict[str, Any]:
    for key in ("images", "annotations", "categories"):
        entries = (
            content.get(key, [] if key == "annotations" else None) if isinstance(content, dict) else None
        )
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{file} has no list of {key}, as COCO's instances have; give another file")
        content[key] = entries
    keys = [
        annotation.get(key) for annotation in content["annotations"] for key in ("image_id", "category_id")
    ]
    keys += [image.get("id") for image in content["images"]]
    if wrong := [key for key in keys if not isinstance(key, int | str | None)]:
        raise DataError(f"{file} has the id {str(wrong[0])[:40]}, but ids are numbers; correct it")
    return content


def _number_categories(
    contents: dict[str, dict[str, Any]], files: dict[str, Path]
) -> dict[int, tuple[str, int]]:
    """Return the name and the class number of each category by its id.

    A category that only groups the others, as Roboflow adds one with id 0, is left out if no object is of it.
    """
    names: dict[int, str] = {}
    groups: set[str] = set()
    used = {a.get("category_id") for content in contents.values() for a in content["annotations"]}
    for split, content in contents.items():
        for category in content["categories"]:
            try:
                number, name = int(category["id"]), str(category["name"])
            except (KeyError, ValueError, TypeError) as problem:
                raise DataError(f"{files[split]} has a category without id or name; add them") from problem
            if names.setdefault(number, name) != name:
                raise DataError(
                    f"category {number} is {names[number]!r} in one split and {name!r} in {files[split]}; use the same"
                )
            groups.add(str(category.get("supercategory")))
    listed = [
        number for number in sorted(names) if number in used or names[number] not in groups or number > 0
    ]
    if len({names[number] for number in listed}) < len(listed):
        names = {number: f"{name} {number}" for number, name in names.items()}
    return {number: (names[number], k) for k, number in enumerate(listed, 1)}


def _is_segmented(content: dict[str, Any]) -> bool:
    return any(annotation.get("segmentation") for annotation in content["annotations"])


def _images_and_masks(
    content: dict[str, Any], numbers: dict[int, tuple[str, int]], file: Path, root: Path
) -> tuple[list[Path], list[bytes]]:
    shapes: dict[Any, list[Shape]] = {}
    boxes = 0
    for annotation in content["annotations"]:
        shape = _shape(annotation, numbers, file)
        shapes.setdefault(annotation.get("image_id"), []).extend(shape)
        boxes += not shape
    if boxes:
        log.warning(
            "%d of %d objects in %s have no segmentation and are left out",
            boxes,
            len(content["annotations"]),
            file,
        )
    finder = ImageFinder(_image_folders(file, root), root)
    images, masks, missing = [], [], []
    for image in content["images"]:
        try:
            name, number, size = (
                str(image["file_name"]),
                image["id"],
                (int(image["height"]), int(image["width"])),
            )
        except (KeyError, ValueError, TypeError) as problem:
            raise DataError(
                f"{file} has an image without file_name, id, height or width; add them"
            ) from problem
        path = finder.find(name)
        if path is None:
            missing.append(name)
            continue
        images.append(path)
        masks.append(describe(shapes.get(number, []), size=size, order="area"))
    if missing:
        raise DataError(
            f"{len(missing)} of {len(content['images'])} images that {file} lists do not exist, the first of which is "
            f"{missing[0]}; put them next to it, into images/ or into a folder named like the split"
        )
    return images, masks


def _image_folders(file: Path, root: Path) -> list[Path]:
    """Return the folders that images may lie in, the likeliest first."""
    name = file.stem.removeprefix("instances_")  # "train2017"
    above = file.parent if file.parent == root else file.parent.parent
    tops = dict.fromkeys((file.parent, above, root))
    below = ("", f"images/{name}", name, f"{name}/images", "images", "images/default", "data")
    return [top / folder for top in tops for folder in below]


def _shape(annotation: dict[str, Any], numbers: dict[int, tuple[str, int]], file: Path) -> list[Shape]:
    """Return the shape of an object; [] if it has only a box."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return []
    category = annotation.get("category_id")
    if category not in numbers:
        raise DataError(
            f"{file} has an object of category {category}, which is not among its categories; add it"
        )
    number = numbers[category][1]
    try:
        if isinstance(segmentation, dict):
            counts = segmentation["counts"]
            is_crowd = bool(annotation.get("iscrowd"))
            return [run_lengths(number, counts, segmentation["size"], crowd=is_crowd)]
        rings = [[float(value) for value in ring] for ring in segmentation]
        if any(len(ring) % 2 for ring in rings):
            raise ValueError("a polygon with an odd number of coordinates")
    except (KeyError, ValueError, TypeError) as problem:
        raise DataError(
            f"the segmentation of object {annotation.get('id')} in {file} is malformed ({problem})"
        ) from problem
    return [polygons(number, [ring for ring in rings if len(ring) >= 6])]  # fewer corners cover nothing
