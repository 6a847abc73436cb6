"""Files that name the classes of masks, by number or by color, next to the data.

classes.txt, class_names.txt      a name per line, from 0
labels.json, id2label.json        ["sky", ...], {"sky": 0, ...} or {"0": "sky", ...}
dataset.json                      {"labels": {"sky": 0, ...}}         (nnU-Net)
_classes.csv                      Pixel Value, Class                (Roboflow)
class_dict.csv                    name, r, g, b                     (any name; any order of columns)
labelmap.txt                      label:color_rgb:parts:actions     (CVAT)
label_colors.txt                  64 128 64 Animal                  (CamVid)
palette.json                      {"sky": [70, 130, 180], ...}
"""

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from triptych.data.masks import Color
from triptych.data.sources.folders import list_visible, read_text
from triptych.errors import DataError

NAME_FILES = ("classes.txt", "class_names.txt", "labels.json", "id2label.json")
NNUNET_FILE = "dataset.json"
COLOR_FILES = ("labelmap.txt", "label_colors.txt", "palette.json")
NAME_COLUMNS = ("name", "class", "class_name", "label", "class_names", "category")
RGB_COLUMNS = (("r", "red"), ("g", "green"), ("b", "blue"))
CAMVID_LINE = re.compile(r"\s*(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\S.*)")


@dataclass(frozen=True)
class NamedClasses:
    """The classes that a file names.

    Attributes:
        names: name of each class by its number in masks.
        colors: color of each class, in the order of the names; None if the file has no colors.
        file: the file.
    """

    names: dict[int, str]
    colors: tuple[Color, ...] | None
    file: Path


def read_class_file(folder: Path, palette: Path | None = None) -> NamedClasses | None:
    """Read the class names of a data set; None if no file has any.

    Args:
        folder: folder of the data. Files in it are preferred to those in its subfolders.
        palette: file to read in place of those.

    Raises:
        DataError: a file cannot be read, names no classes, or names one twice; or the subfolders disagree.
    """
    if palette is not None:
        classes = _read_colors(palette) if palette.is_file() else None
        if classes is None:
            raise DataError(
                f"{palette} does not exist or has no colors; give a file with the columns name, r, g, b"
            )
        return classes
    if not folder.is_dir():
        return None
    if classes := _read_in(folder, NAME_FILES):
        return classes
    folders = [path for path in list_visible(folder) if path.is_dir()]
    below = [classes for path in folders if (classes := _read_in(path, NAME_FILES[:2]))]
    for other in below[1:]:
        if (other.names, other.colors) != (below[0].names, below[0].colors):
            raise DataError(f"{below[0].file} and {other.file} name different classes; make them equal")
    return below[0] if below else None


def _read_in(folder: Path, name_files: tuple[str, ...]) -> NamedClasses | None:
    if file := next((folder / name for name in name_files if (folder / name).is_file()), None):
        return _checked(_read_names(file), None, file)
    if (file := folder / NNUNET_FILE).is_file() and (names := _read_nnunet(file)):
        return _checked(names, None, file)
    tables = [path for path in list_visible(folder) if path.suffix.lower() == ".csv" and path.is_file()]
    for file in (*(folder / name for name in COLOR_FILES), *filter(_names_colors, tables)):
        if file.is_file() and (classes := _read_colors(file)):
            return classes
    return None


def _names_colors(file: Path) -> bool:
    """Return whether the first line of a table, which may be large and about anything, names what is needed."""
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        head = {column.strip().lower() for column in lines.readline(10_000).split(",")}
    return "pixel value" in head or all(head.intersection(names) for names in RGB_COLUMNS)


def _read_names(file: Path) -> dict[int, str]:
    if file.suffix == ".txt":
        return dict(enumerate(line.strip() for line in read_text(file).splitlines() if line.strip()))
    try:
        content = json.loads(read_text(file))
        if isinstance(content, list):
            return dict(enumerate(map(str, content)))
        pairs = [(k, v) if str(k).lstrip("-").isdecimal() else (v, k) for k, v in content.items()]
        return {number: str(name) for number, name in sorted((int(k), v) for k, v in pairs) if number >= 0}
    except (ValueError, TypeError, AttributeError) as problem:
        raise DataError(
            f'{file} cannot be read ({problem}); write ["name", ...] or {{"0": "name", ...}}'
        ) from problem


def _read_nnunet(file: Path) -> dict[int, str]:
    """Read the names of nnU-Net's dataset.json; {} if the file is another one, or has regions of several labels."""
    try:
        content = json.loads(read_text(file))
    except ValueError:
        return {}
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, dict):
        return {}
    pairs = [(k, v) if str(k).isdecimal() else (v, k) for k, v in labels.items()]
    if not all(str(number).isdecimal() for number, _ in pairs):
        return {}
    return {number: str(name) for number, name in sorted((int(k), v) for k, v in pairs)}


def _read_colors(file: Path) -> NamedClasses | None:
    """Read a file of names and colors, or a table of pixel values; None if its content is something else."""
    text = read_text(file)
    if file.suffix.lower() == ".json":
        return _read_palette_json(text, file)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if file.suffix.lower() == ".csv":
        return _read_csv(lines, file)
    if lines and all(len(line.split(":")) >= 2 for line in lines):
        fields = [line.split(":") for line in lines]
        rows = [(name.strip(), color.split(",")) for name, color, *_ in fields if color.strip()]
    else:
        matches = [CAMVID_LINE.fullmatch(line) for line in lines]
        rows = [(match[4].strip(), match.groups()[:3]) for match in matches if match]
        if len(rows) < len(lines):
            return None
    return _with_colors(rows, file) if rows else None


def _read_csv(lines: list[str], file: Path) -> NamedClasses | None:
    if not lines:
        return None
    head = [column.strip().lower() for column in next(csv.reader(lines[:1]))]
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines[1:])]
    name = next((head.index(column) for column in NAME_COLUMNS if column in head), None)
    if name is None:
        return None
    if "pixel value" in head:
        at = head.index("pixel value")
        try:
            return _checked({int(row[at]): row[name] for row in rows}, None, file)
        except (ValueError, IndexError) as problem:
            raise DataError(
                f"{file} cannot be read ({problem}); write a number and a name per line"
            ) from problem
    channels = [next((head.index(c) for c in (c0, c1) if c in head), None) for c0, c1 in RGB_COLUMNS]
    if None in channels:
        return None
    try:
        return _with_colors(
            [(row[name], [row[at] for at in channels if at is not None]) for row in rows], file
        )
    except IndexError as problem:
        raise DataError(f"{file} has a row with too few cells; write name, r, g, b") from problem


def _read_palette_json(text: str, file: Path) -> NamedClasses | None:
    try:
        content = json.loads(text)
        pairs = content.items() if isinstance(content, dict) else ((c["name"], c["color"]) for c in content)
        return _with_colors([(str(name), color) for name, color in pairs], file)
    except (ValueError, TypeError, KeyError) as problem:
        raise DataError(f'{file} cannot be read ({problem}); write {{"name": [r, g, b], ...}}') from problem


def _with_colors(rows: Iterable[tuple[str, Iterable[str | int]]], file: Path) -> NamedClasses:
    names, colors = [], []
    for name, channels in rows:
        try:
            red, green, blue = (int(channel) for channel in channels)
        except ValueError as problem:
            raise DataError(
                f"{file} gives {name!r} no color of three numbers; write name, r, g, b"
            ) from problem
        if not all(0 <= channel <= 255 for channel in (red, green, blue)):
            raise DataError(
                f"{file} gives {name!r} the color {red}, {green}, {blue}; write numbers from 0 to 255"
            )
        names.append(name)
        colors.append((red, green, blue))
    if len(set(colors)) < len(colors):
        twice = next(color for color in colors if colors.count(color) > 1)
        raise DataError(f"{file} gives two classes the color {twice}; give each a different color")
    return _checked(dict(enumerate(names)), tuple(colors), file)


def _checked(names: dict[int, str], colors: tuple[Color, ...] | None, file: Path) -> NamedClasses:
    if not names:
        raise DataError(f"{file} names no classes; write one name per line, or remove the file")
    if len(set(names.values())) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise DataError(f"{file} names two classes {twice!r}; give each a different name")
    return NamedClasses(names, colors, file)
