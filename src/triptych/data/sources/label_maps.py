"""Find the label map of masks: that of a known data set, of a file with class names, or of the values in the masks.

Known are ADE20K as in the scene parsing benchmark (0 is "other", 150 classes from 1), Cityscapes (`labelIds`, 19 of
which are used for training, or `labelTrainIds`) and PASCAL VOC.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from triptych.data.masks import (
    INVALID,
    MAX_MASK_CLASSES,
    NUM_MASK_VALUES,
    VOID,
    Color,
    LabelMap,
    MaskFormatError,
    identity_table,
    lookup_table,
    read_mask,
    read_palette,
)
from triptych.data.sources.folders import read_text
from triptych.errors import DataError, TriptychError

Cell = tuple[bytes | str, str]
"""The path or bytes of a mask, and its name in errors."""

CLASS_NAME_FILES = ("classes.txt", "class_names.txt", "labels.json", "id2label.json")
ADE20K = "ADEChallengeData2016"

# Id, name, color of the training classes: Cordts et al. 2016; github.com/mcordts/cityscapesScripts, helpers/labels.py
CITYSCAPES: tuple[tuple[int, str, Color], ...] = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)

# Everingham et al. 2010. They apply to its own file names only: others use its layout with classes of their own.
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *(
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
)
VOC_IMAGE_PATH = re.compile(r"VOC20\d\d/.*/(20\d\d_)?\d{6}\.png")


def find_label_map(
    cells: Callable[[], Iterable[Cell]],
    folder: Path,
    ignore_index: int = VOID,
    reduce_zero_label: bool = False,
) -> LabelMap:
    """Find the label map of the masks of a data set.

    If there are no class names, or at most two, all masks are read once: the largest value is the last class, and masks
    that hold only 0 and 255 have the classes background and foreground. More than 255 classes need names, since such
    values could also number instances.

    Args:
        cells: returns the masks of all splits; may be called several times.
        folder: folder of the data, which may contain a file with class names.
        ignore_index: a value that is ignored, in addition to 255. If there are classes with numbers above 255, then
            255 is a class like the others, and 65535 is ignored.
        reduce_zero_label: ignore 0 and take 1 as the first class.

    Raises:
        DataError: masks hold colors, or values above 254 without class names; or a file of class names cannot be read.
    """
    first = next(iter(cells()))
    if known := _published_label_map(Path(first[1]), folder):
        known = _without_value(known, ignore_index)
        return known if known.colors else _with_palette(known, first)
    named = read_class_names(folder)
    if named is not None and len(named) > 2:
        label_map = _from_names(named, ignore_index, reduce_zero_label)
    else:
        seen = _scan_values(cells())
        if not seen:
            read_mask(*first)  # raises why it cannot be read
        if seen <= {0, VOID} and VOID in seen and ignore_index == VOID and not reduce_zero_label:
            table = np.full_like(identity_table(1), INVALID)
            table[[0, VOID]] = 0, 1
            two = (
                tuple(named.values())
                if named is not None and len(named) == 2
                else ("background", "foreground")
            )
            label_map = LabelMap(two, table)
        elif named is not None:
            label_map = _from_names(named, ignore_index, reduce_zero_label)
        else:
            label_map = _from_values(seen - {VOID, ignore_index}, ignore_index, reduce_zero_label, first[1])
    return _with_palette(label_map, first)


def _published_label_map(mask: Path, folder: Path) -> LabelMap | None:
    """Return the label map of a known data set, recognized by the path of a mask; None if it is not one."""
    names, colors = tuple(name for _, name, _ in CITYSCAPES), tuple(color for *_, color in CITYSCAPES)
    if mask.stem.endswith("_labelTrainIds"):
        return LabelMap(names, identity_table(len(names)), colors)
    if mask.stem.endswith("_labelIds"):
        return LabelMap(names, lookup_table([number for number, *_ in CITYSCAPES]), colors)
    if ADE20K in mask.parts or mask.name.startswith(("ADE_train_", "ADE_val_")):
        names = _object_names(folder / "objectInfo150.txt") or tuple(f"class {i}" for i in range(150))
        return LabelMap(names, identity_table(len(names), reduce_zero_label=True))
    if VOC_IMAGE_PATH.search(mask.as_posix()) and read_class_names(folder) is None:
        return LabelMap(VOC, identity_table(len(VOC)))
    return None


def _without_value(label_map: LabelMap, number: int) -> LabelMap:
    """Return the label map in which a value is ignored and its class, if it has one, is removed."""
    k, table = int(label_map.table[number]), label_map.table.copy()
    table[number] = VOID
    if not 0 <= k < len(label_map.classes):
        return replace(label_map, table=table)
    table[(table > k) & (table < VOID)] -= 1
    colors = label_map.colors and (*label_map.colors[:k], *label_map.colors[k + 1 :])
    return LabelMap((*label_map.classes[:k], *label_map.classes[k + 1 :]), table, colors)


def _object_names(file: Path) -> tuple[str, ...] | None:
    """Read the first name of each class from ADE20K's table of names ("building, edifice"); None if it is missing."""
    if not file.is_file():
        return None
    rows = [line.split("\t") for line in read_text(file).splitlines()[1:] if line.strip()]
    return tuple(row[-1].partition(",")[0].strip() for row in rows)


def read_class_names(folder: Path) -> dict[int, str] | None:
    """Read class names by number from classes.txt (one per line, from 0), or from labels.json or id2label.json (a list,
    or an object that maps names to numbers or numbers to names); None if there is no such file.

    Raises:
        DataError: the file cannot be read, has no names, or has the same name for two classes.
    """
    file = next((folder / name for name in CLASS_NAME_FILES if (folder / name).is_file()), None)
    if file is None:
        return None
    if file.suffix == ".txt":
        names = dict(enumerate(line.strip() for line in read_text(file).splitlines() if line.strip()))
    else:
        names = _json_names(file)
    if not names:
        raise DataError(f"{file} names no classes; write one name per line, or remove the file")
    if len(set(names.values())) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise DataError(f"{file} names two classes {twice!r}; give each a different name")
    return names


def _json_names(file: Path) -> dict[int, str]:
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


def _from_names(names: dict[int, str], ignore_index: int, reduce_zero_label: bool) -> LabelMap:
    """Return the label map of named classes. With `reduce_zero_label` name k belongs to mask value k + 1."""
    first = int(reduce_zero_label)
    last = max(names) + first
    void = {VOID, ignore_index}
    if last > VOID:  # then 255 is a class like the others if it has a name
        void = {*(void - {VOID}), NUM_MASK_VALUES - 1}
    numbers = [n + first for n in names if n + first not in void]
    if not 0 < len(numbers) <= MAX_MASK_CLASSES or max(numbers) >= NUM_MASK_VALUES:
        raise DataError(
            f"{len(numbers)} classes are named, up to number {max(names)}; name 1 to {MAX_MASK_CLASSES} classes with "
            f"numbers below {NUM_MASK_VALUES - 1}"
        )
    void = {*void, *range(first), *({VOID} - set(numbers))}
    return LabelMap(tuple(names[n - first] for n in numbers), lookup_table(numbers, INVALID, void))


def _from_values(seen: set[int], ignore_index: int, reduce_zero_label: bool, example: str) -> LabelMap:
    count = max(seen, default=-1) + 1 - reduce_zero_label
    if count < 1:
        raise DataError(
            f"the masks, such as {example}, hold no classes; give masks whose classes are numbered from 0"
        )
    if count > VOID:
        raise DataError(
            f"the masks, such as {example}, hold values up to {max(seen)}, but without class names at most {VOID - 1} "
            "is allowed; number the classes from 0, or name them in a classes.txt"
        )
    return _from_names({i: f"class {i}" for i in range(count)}, ignore_index, reduce_zero_label)


def _with_palette(label_map: LabelMap, first: Cell) -> LabelMap:
    """Return the label map with the palette of the first mask, if that has one."""
    try:
        palette = read_palette(*first)
    except MaskFormatError:
        raise
    except TriptychError:
        return label_map  # a damaged mask is reported when it is loaded
    numbers = [int(np.flatnonzero(label_map.table == k)[0]) for k in range(len(label_map.classes))]
    if palette is None or max(numbers) >= len(palette):
        return label_map
    return replace(label_map, colors=tuple(palette[number] for number in numbers))


def _scan_values(cells: Iterable[Cell]) -> set[int]:
    """Return the values that occur in masks; those that cannot be read are skipped."""
    seen: set[int] = set()
    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
        for part in _batched(cells, 256):
            for values in pool.map(_numbers, part):
                seen |= values
    return seen


def _numbers(cell: Cell) -> set[int]:
    try:
        values = read_mask(*cell)
    except MaskFormatError:
        raise
    except TriptychError:
        return set()  # reported when it is loaded
    if int(values.max(initial=0)) < NUM_MASK_VALUES:
        return set(np.flatnonzero(np.bincount(values.ravel())).tolist())
    return set(np.unique(values).tolist())


def _batched(cells: Iterable[Cell], size: int) -> Iterator[list[Cell]]:
    remaining = iter(cells)
    while part := list(islice(remaining, size)):
        yield part
