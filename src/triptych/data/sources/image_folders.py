"""Read folders of images: class folders, splits such as train/ and val/, and tables with the labels of images.

The result is a table of `datasets` for each split, whose column "image" holds paths. No image is decoded, so damaged
ones are not reported here, and nothing is cached on disk, so that changes of the folder are noticed.
"""

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.data.image_formats import describe_left_out, is_unreadable_image
from triptych.data.sources.folders import (
    ID_COLUMN,
    are_integers,
    find_images,
    list_visible,
    make_table,
    read_captions,
)
from triptych.data.sources.label_tables import read_label_tables
from triptych.data.sources.mask_names import folder_role
from triptych.data.sources.splits import SPLITS
from triptych.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

# "part_1", "HAM10000_images_part_2", "fold0", "batch 3"
NUMBERED_PART = re.compile(r"(?:.*[ _-])?(?:part|fold|batch|chunk)[ _-]?\d+", re.IGNORECASE)

TABLE_FOLDERS = 20  # of images, in which tables are looked for

Files = list[tuple[str, tuple[str, ...]]]
"""The path of each image, and the parts of its path from the class folder on."""


def read_images(folders: dict[str, Path], places: list[Path]) -> "dict[str, Dataset]":
    """Read the folders of all splits. If images are in subfolders, these are the classes.

    The class of an image is the first folder on the way to it. The sorted classes of all splits are numbered, so that
    class indices agree. A split without class folders has the labels that a table gives it, or none. A text file with
    the name of an image holds its captions.

    Args:
        folders: folder of each split.
        places: folders that may hold tables with labels, in addition to those of the splits.

    Raises:
        DataError: a folder without images, or with images both next to and in class folders.
    """
    files = {split: list(find_images(folder)) for split, folder in folders.items()}
    for split, folder in folders.items():
        if not files[split]:
            _refuse_empty(folder)
    ids = {
        path: (folders[split].name + "/" if split else "") + "/".join(parts)
        for split, of_split in files.items()
        for path, parts in of_split
    }
    files = {split: _below_parts(of_split, folders[split]) for split, of_split in files.items()}
    files = _splits_below_classes(files)
    classes = sorted({parts[0] for of_split in files.values() for _, parts in of_split if len(parts) > 1})
    index = {name: i for i, name in enumerate(classes)}
    _report_unknown_classes(files)
    described = _read_tables(files, [*folders.values(), *places], classes)
    tables = {}
    for split, of_split in files.items():
        stray = next((path for path, parts in of_split if len(parts) == 1), None)
        is_flat = all(len(parts) == 1 for _, parts in of_split)
        if stray and not is_flat:
            raise DataError(
                f"{stray} is next to class folders; move it into one of them or out of the folder"
            )
        columns: dict[str, list[Any]] = {
            "image": [path for path, _ in of_split],
            ID_COLUMN: [ids[path] for path, _ in of_split],
            **described.get(split, {}),
        }
        if classes and not is_flat:
            columns["label"] = [index[parts[0]] for _, parts in of_split]
        elif classes and "label" in columns:
            columns["label"] = [index.get(label, -1) for label in map(str, columns["label"])]
        elif classes:
            log.warning("the split %s has no class folders, so its images have no labels", split)
        if any(captions := read_captions([path for path, _ in of_split])):
            columns["caption"] = captions
        tables[split] = make_table(columns, classes if classes and "label" in columns else None)
    return tables


def _splits_below_classes(files: dict[str, Files]) -> dict[str, Files]:
    """Return the files by split if each class folder is divided into splits, as in cat/train and cat/test."""
    if files.keys() != {""} or not all(len(parts) > 2 for _, parts in files[""]):
        return files
    by_split: dict[str, Files] = {}
    for path, (name, below, *parts) in files[""]:
        by_split.setdefault(SPLITS.get(below.lower(), ""), []).append((path, (name, *parts)))
    if "train" not in by_split or "" in by_split or len(by_split) < 2:
        return files
    log.warning("each class folder is divided into splits: %s", ", ".join(sorted(by_split)))
    return by_split


def _report_unknown_classes(files: dict[str, Files]) -> None:
    classes = {
        split: {parts[0] for _, parts in of_split if len(parts) > 1} for split, of_split in files.items()
    }
    for split, names in classes.items():
        if (unknown := sorted(names - classes.get("train", names))) and classes["train"]:
            log.warning("the split %s has classes that train lacks: %s", split, ", ".join(unknown[:5]))


def _refuse_empty(folder: Path) -> None:
    what = "is empty" if not list_visible(folder) else "holds no images (.jpg, .png, .webp ...)"
    if unreadable := [name for _, _, names in os.walk(folder) for name in names if is_unreadable_image(name)]:
        what = f"holds no images that can be read: {describe_left_out(unreadable)}"
    raise DataError(f"{folder} {what}; give a folder with images, class folders or a metadata.jsonl")


def _below_parts(files: Files, folder: Path) -> Files:
    """Return the files as seen from within folders that are no classes: a single images/, or part_1/ and part_2/."""
    while all(len(parts) > 1 for _, parts in files):
        tops = {parts[0] for _, parts in files}
        (first, *others) = sorted(tops)
        is_images = not others and (folder_role(first) or ("", ""))[1] == "image"
        if not is_images and not all(NUMBERED_PART.fullmatch(name) for name in tops):
            break
        log.warning("%s in %s: not taken for classes", ", ".join(sorted(tops)), folder)
        files = [(path, parts[1:]) for path, parts in files]
    return files


def _read_tables(
    files: dict[str, Files], places: list[Path], classes: list[str]
) -> dict[str, dict[str, list[Any]]]:
    """Return the columns of tables for the splits without class folders."""
    flat = {
        split: [path for path, _ in of_split]
        for split, of_split in files.items()
        if all(len(parts) == 1 for _, parts in of_split)
    }
    inside = sorted({Path(path).parent for paths in flat.values() for path in paths})
    described = read_label_tables([*places, *inside[:TABLE_FOLDERS]], flat, classes)
    columns = list(dict.fromkeys(name for cells in described.values() for name in cells))
    result: dict[str, dict[str, list[Any]]] = {split: {} for split in flat}
    for name in columns:
        if name in ("", "image", ID_COLUMN):
            continue
        texts = [cells[name] for cells in described.values() if name in cells]
        convert = int if are_integers(texts) else str
        for split, paths in flat.items():
            cells = [described.get(path, {}).get(name) for path in paths]
            if any(cell is not None for cell in cells):
                result[split][name] = [None if cell is None else convert(cell) for cell in cells]
    return result
