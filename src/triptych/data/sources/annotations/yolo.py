"""Read the text files of YOLO segmentation (https://docs.ultralytics.com/datasets/segment/) as semantic masks.

    data.yaml, images/train/*.jpg + labels/train/*.txt          (Ultralytics)
    data.yaml, train/images/*.jpg + train/labels/*.txt          (Roboflow)
    images/*.jpg + labels/*.txt

A line is the class and a polygon in fractions of width and height: 0 x0 y0 x1 y1 x2 y2 ... An image without a file, or
with an empty one, shows nothing. Class 0 of the masks is the background, and the classes follow in the order of
data.yaml. Small objects lie over large ones.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triptych.data.drawn_masks import Shape, describe, polygons
from triptych.data.sources.annotations import AnnotatedTables
from triptych.data.sources.annotations.files import make_mask_table
from triptych.data.sources.folders import find_images, list_visible, read_text
from triptych.data.sources.splits import split_folders
from triptych.errors import DataError

log = logging.getLogger(__name__)

SPLIT_KEYS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
BOX = 5  # numbers in the line of a box
FEW_TEXTS = 50  # that are looked at without a data.yaml


def find(folder: Path) -> dict[str, list[Path]]:
    """Return the folders of images of each split; {} if this is another layout."""
    content = read_data_yaml(folder)
    if content is not None:
        from_yaml = {
            split: paths
            for key, split in SPLIT_KEYS.items()
            if (paths := _image_folders(content.get(key), content.get("path"), folder))
        }
        if from_yaml:
            return from_yaml
    folders = _by_layout(folder)
    if content is None and not any(_hold_polygons(path) for paths in folders.values() for path in paths):
        return {}
    return folders


def read_data_yaml(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's data.yaml, or of another yaml file with names and splits; None without one.

    Raises:
        DataError: data.yaml cannot be read.
    """
    import yaml

    candidates = [path for path in list_visible(folder) if path.suffix.lower() in (".yaml", ".yml")]
    for file in sorted(candidates, key=lambda path: path.stem not in ("data", "dataset")):
        try:
            content = yaml.safe_load(read_text(file))
        except yaml.YAMLError as problem:
            if file.stem in ("data", "dataset"):
                raise DataError(
                    f"{file} cannot be read ({str(problem).splitlines()[0]}); repair it"
                ) from problem
            continue
        if isinstance(content, dict) and "names" in content and any(key in content for key in SPLIT_KEYS):
            return content
    return None


def _image_folders(entry: Any, root: Any, folder: Path) -> list[Path]:
    """Return the folders that an entry of data.yaml names. Its paths are relative to `path` or to its own folder, and
    often from another computer: then the end of the path counts."""
    entries = entry if isinstance(entry, list) else [entry] if isinstance(entry, str) else []
    result = []
    for name in map(str, entries):
        parts = [part for part in Path(name.replace("\\", "/")).parts if part not in ("..", ".", "/")]
        places = [folder / str(root or "") / name, folder / name]
        places += [folder.joinpath(*parts[at:]) for at in range(len(parts))]
        if place := next((place for place in places if place.is_dir()), None):
            result.append(place)
    return result


def _by_layout(folder: Path) -> dict[str, list[Path]]:
    images, labels = folder / "images", folder / "labels"
    if images.is_dir() and labels.is_dir():
        return {split: [path] for split, path in (split_folders(images) or {"": images}).items()}
    splits = split_folders(folder)
    return {
        split: [path / "images"]
        for split, path in splits.items()
        if (path / "images").is_dir() and (path / "labels").is_dir()
    }


def _hold_polygons(images: Path) -> bool:
    """Return whether one of the first text files next to images holds polygons."""
    texts: list[Path] = []
    for _, names in _walk(label_folder(images)):
        texts.extend(names[: FEW_TEXTS - len(texts)])
    return any(_is_polygon(line.split()) for file in texts for line in read_text(file).splitlines())


def _walk(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield (
            root,
            [Path(root, name) for name in sorted(names) if name.endswith(".txt") and name != "classes.txt"],
        )


def _is_polygon(words: list[str]) -> bool:
    if len(words) <= BOX + 1 or len(words) % 2 == 0 or not words[0].isdecimal():
        return False
    try:
        return all(-0.5 <= float(word) <= 1.5 for word in words[1:])
    except ValueError:
        return False


def label_folder(images: Path) -> Path:
    """Return the folder of the texts: the last folder named images is named labels instead, as in Ultralytics."""
    parts = list(images.parts)
    at = next((i for i in reversed(range(len(parts))) if parts[i] == "images"), None)
    return images if at is None else Path(*parts[:at], "labels", *parts[at + 1 :])


def read(folder: Path) -> AnnotatedTables | None:
    """Read a folder of YOLO segmentation; None if it has another layout, or its objects are boxes only.

    Raises:
        DataError: a line is malformed or a box, or a class has no name.
    """
    splits = find(folder)
    if not splits:
        return None
    tables, lines, classes = {}, 0, 0
    shapes_of_splits: dict[str, tuple[list[Path], list[list[Shape]]]] = {}
    boxes: list[str] = []
    for split, folders in splits.items():
        images = [Path(path) for place in folders for path, _ in find_images(place)]
        shapes = [_read_shapes(_text_of(path, folders), boxes) for path in images]
        shapes_of_splits[split] = images, shapes
        lines += sum(map(len, shapes))
        classes = max([classes, *(shape["number"] for of_image in shapes for shape in of_image)])
    if not lines:
        log.warning(
            "%s holds no polygons%s; its images are read without masks",
            folder,
            ", only boxes" if boxes else "",
        )
        return None
    if boxes:
        raise DataError(
            f"{boxes[0]} is a box, and other lines are polygons; segmentation needs polygons throughout"
        )
    for split, (images, shapes) in shapes_of_splits.items():
        masks = [
            describe(of_image, image=str(path), order="area")
            for path, of_image in zip(images, shapes, strict=True)
        ]
        masked = split == "" or any(map(len, shapes)) or not split.startswith("test")
        tables[split] = make_mask_table(images, masks, folder, masked=masked)
    return AnnotatedTables(tables, ("background", *_class_names(folder, classes)))


def _text_of(image: Path, folders: list[Path]) -> Path:
    place = next(place for place in folders if place in image.parents)
    return (label_folder(place) / image.relative_to(place)).with_suffix(".txt")


def _read_shapes(file: Path, boxes: list[str]) -> list[Shape]:
    """Read the polygons of an image; add the place of a box to `boxes`."""
    if not file.is_file():
        return []
    shapes = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            label, ring = int(words[0]), [float(word) for word in words[1:]]
            if label < 0 or len(ring) % 2 or len(ring) < 4:
                raise ValueError("a class and pairs of coordinates are needed")
        except ValueError as problem:
            raise DataError(
                f"{file} line {number} is malformed ({problem}); write: class x0 y0 x1 y1 ..."
            ) from problem
        if len(words) == BOX:
            boxes.append(f"{file} line {number}")
        else:
            shapes.append(polygons(label + 1, [ring], relative=True))
    return shapes


def _class_names(folder: Path, highest: int) -> list[str]:
    """Return the names of classes from data.yaml or classes.txt, else "class 0" and so on."""
    content = read_data_yaml(folder)
    if content is not None:
        names = content["names"]
        try:
            listed = (
                {int(k): str(v) for k, v in names.items()}
                if isinstance(names, dict)
                else dict(enumerate(names))
            )
        except (ValueError, TypeError) as problem:
            raise DataError(
                f"the names in data.yaml of {folder} are not a list or numbers; correct them"
            ) from problem
    else:
        file = next(
            (p for p in (folder / "classes.txt", folder / "labels" / "classes.txt") if p.is_file()), None
        )
        listed = dict(enumerate(read_text(file).split("\n"))) if file else {}
        listed = {number: name.strip() for number, name in listed.items() if name.strip()}
    if listed and highest > max(listed) + 1:
        raise DataError(
            f"class {highest - 1} of an object in {folder} has no name; {len(listed)} classes are named"
        )
    count = max(highest, *(number + 1 for number in listed)) if listed else highest
    return [str(listed.get(number, f"class {number}")) for number in range(count)]
