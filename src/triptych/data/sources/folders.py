"""Folders of pictures: class folders, train/ and val/ within, or a metadata file that names each picture.

Everything becomes a table of `datasets` by split: column "image" holds paths, nothing is decoded, and a
damaged picture is not noticed here. Nothing is cached on disk: a changed folder is seen at the next call.
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for names in (
        ("apng", "avif", "bmp", "dib", "gif", "icns", "ico", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg"),
        ("mpo", "pbm", "pcx", "pgm", "png", "pnm", "ppm", "qoi", "sgi", "tif", "tiff", "webp"),
    )
    for name in names
)
ID_COLUMN = "__id__"  # our column: what each example is called
METADATA = ("metadata.jsonl", "metadata.csv")
# What a column of masks is called, where its type or its values say that it holds pictures.
MASK_NAMES = (
    *("mask", "masks", "mask_file_name", "mask_path", "segmentation_mask", "semantic_mask", "semantic_map"),
    *("segmentation", "segmentation_map", "annotation", "annotations", "annotation_file_name"),
    *("seg", "gt", "label", "labels"),
)


def list_visible(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without what systems leave behind: .DS_Store, __MACOSX and the like."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX")))
    except OSError as problem:
        raise UserError(f"{folder} cannot be read ({problem.strerror}); check its permissions") from problem


def metadata_file(folder: Path) -> Path | None:
    """The folder's metadata.jsonl or metadata.csv."""
    result = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(result) > 1:
        raise UserError(f"{folder} holds both {METADATA[0]} and {METADATA[1]}; remove one of them")
    return result[0] if result else None


def read_images(folders: dict[str, Path]) -> "dict[str, Dataset]":
    """Tables of split folders with images: by class folder, where there are any; class indices agree.

    The class is the folder right below, however deep the picture lies; classes of all splits are sorted. A text file
    beside a picture and called as it is holds its captions.

    Raises:
        UserError: no pictures at all, or some beside class folders.
    """
    files = {split: list(find_images(folder)) for split, folder in folders.items()}
    for split, folder in folders.items():
        if not files[split]:
            what = "is empty" if not list_visible(folder) else "holds no images (.jpg, .png, .webp ...)"
            raise UserError(
                f"{folder} {what}; give a folder with pictures, class folders or a metadata.jsonl"
            )
    classes = sorted({parts[0] for paths in files.values() for _, parts in paths if len(parts) > 1})
    tables = {}
    for split, paths in files.items():
        prefix = "" if split == "" else folders[split].name + "/"
        stray = next((path for path, parts in paths if len(parts) == 1), None)
        if classes and stray:
            raise UserError(f"{stray} lies beside class folders; move it into one of them, or out")
        columns: dict[str, list[Any]] = {
            "image": [path for path, _ in paths],
            ID_COLUMN: [prefix + "/".join(parts) for _, parts in paths],
        }
        if classes:
            index = {name: i for i, name in enumerate(classes)}
            columns["label"] = [index[parts[0]] for _, parts in paths]
        if any(captions := read_captions([path for path, _ in paths])):
            columns["caption"] = captions
        tables[split] = make_table(columns, classes or None)
    return tables


def find_images(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Path and parts below the folder of each picture, in sorted order."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                path = Path(root, name)
                if not _is_utf8(path):
                    raise UserError(f"{str(path)!r} has a name that is not UTF-8; rename it")
                yield str(path), path.relative_to(folder).parts


def read_captions(paths: list[str]) -> list[list[str] | None]:
    """Of each picture NAME.png the lines of NAME.txt (or NAME.caption), each a caption; None where there is no such
    file."""
    texts: dict[str, str] = {}
    for folder in {os.path.dirname(path) for path in paths}:
        for name in sorted(os.listdir(folder), reverse=True):  # .txt stands above .caption
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in (".txt", ".caption"):
                texts[os.path.join(folder, stem)] = os.path.join(folder, name)
    result: list[list[str] | None] = []
    for path in paths:
        text = texts.get(os.path.splitext(path)[0])
        result.append(None if text is None else read_lines(Path(text)))
    return result


def read_lines(text: Path) -> list[str]:
    """The captions in a file of them: its lines, without the empty ones."""
    return [line.strip() for line in read_text(text).splitlines() if line.strip()]


def _is_utf8(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def read_metadata(file: Path, prefix: str = "", mask_column: str | None = None) -> "Dataset":
    """The table of one metadata file. Column file_name becomes "image"; the others stay, the user chooses.

    A column of masks, the asked or one called so, names pictures too: its paths start where the file lies.

    Raises:
        UserError: an unreadable line, a row or a file without file_name, no rows.
    """
    rows = _csv_rows(file) if file.suffix.lower() == ".csv" else _jsonl_rows(file)
    if not rows:
        raise UserError(
            f"{file} has no rows; write one for each image, with file_name and a label or caption"
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    if "file_name" not in names:
        raise UserError(f"{file} has no column file_name, which names each image; it has {', '.join(names)}")
    columns = {name: [row.get(name) for row in rows] for name in names}
    paths = columns.pop("file_name")
    if None in paths or "" in paths:
        at = next(i for i, path in enumerate(paths) if not path)
        raise UserError(f"{file} has no file_name in row {at + 1}; give it one or remove the row")
    columns = {name: values for name, values in columns.items() if all(map(_is_plain, values))}
    columns["image"] = [str(file.parent / str(path)) for path in paths]
    columns[ID_COLUMN] = [prefix + str(path) for path in paths]
    masks = next(
        (n for n in (mask_column, *MASK_NAMES) if n in columns and _are_image_paths(columns[n])), None
    )
    if masks is not None:
        columns[masks] = [str(file.parent / path) if path else None for path in columns[masks]]
    return make_table(columns, masks=masks)


def _are_image_paths(values: list[Any]) -> bool:
    paths = [value for value in values if value]
    return bool(paths) and all(
        isinstance(path, str) and os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES for path in paths
    )


def _is_plain(value: Any) -> bool:
    """One value, or a list of captions; boxes and other structures are not for us."""
    return isinstance(value, str | int | float | bool | None) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )


def _jsonl_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise UserError(f"{file} line {number} is not JSON ({problem}); repair it") from problem
        if not isinstance(row, dict):
            raise UserError(f"{file} line {number} is {line[:40]!r}, and must be an object such as {{...}}")
        rows.append(row)
    return rows


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a CSV; a column whose every value is a whole number becomes one."""
    rows = [
        {name: value for name, value in row.items() if name is not None}
        for row in csv.DictReader(read_text(file).splitlines(keepends=True))
    ]
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        if name != "file_name" and all(value and value.lstrip("-").isdecimal() for value in values):
            for row in rows:
                row[name] = int(row[name])
    return rows


def read_text(file: Path) -> str:
    """What a file of UTF-8 holds.

    Raises:
        UserError: it cannot be read; names it.
    """
    try:
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{file} cannot be read ({problem}); save it as UTF-8 text") from problem


def make_table(
    columns: dict[str, list[Any]], classes: list[str] | None = None, masks: str | None = None
) -> "Dataset":
    """An in-memory table of `datasets`, its "image" and column `masks` undecoded, its "label" named by `classes`.

    Raises:
        UserError: a column of mixed kinds.
    """
    import datasets
    import pyarrow

    fixed: dict[str, Any] = {"image": datasets.Image(decode=False)}
    if masks is not None:
        fixed[masks] = datasets.Image(decode=False)
    if classes is not None:
        fixed["label"] = datasets.ClassLabel(names=classes)
    plain = {name: _check_types(name, values) for name, values in columns.items() if name not in fixed}
    features = datasets.Features.from_arrow_schema(pyarrow.table(plain).schema)
    features.update({name: feature for name, feature in fixed.items() if name in columns})
    return datasets.Dataset.from_dict({**columns, **plain}, features=features)


def _check_types(name: str, values: list[Any]) -> list[Any]:
    types = {type(value) for value in values if value is not None}
    if types == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(types) > 1:
        mixed = " and ".join(sorted(value_type.__name__ for value_type in types))
        raise UserError(f"column {name} mixes {mixed}; use one kind throughout")
    return values
