"""Find the label map of masks: that of a known data set, of a file with class names, or of the values in the masks.

Known are ADE20K as in the scene parsing benchmark (0 is "other", 150 classes from 1), Cityscapes (`labelIds`, 19 of
which are used for training, or `labelTrainIds`) and PASCAL VOC.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from triptych.data.masks import (
    VOID,
    Color,
    LabelMap,
    MaskEncoding,
    MaskFormatError,
    MaskOptions,
    identity_table,
    lookup_table,
    read_mask,
    read_palette,
    uses_colors,
)
from triptych.data.sources.class_files import NamedClasses, read_class_file
from triptych.data.sources.folders import read_text
from triptych.data.sources.mask_palettes import by_colors_of_palettes
from triptych.data.sources.mask_values import Cell, count_values, from_names, interpret_values, thresholded
from triptych.errors import TriptychError

SAMPLE = 16  # masks that are read to see whether they hold colors, and the numbers of the named classes
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
    cells: Callable[[], Iterable[Cell]], folder: Path, options: MaskOptions | None = None
) -> LabelMap:
    """Find the label map of the masks of a data set.

    If there are no class names, or at most two, all masks are read once. Values from 0 up are class numbers, and the
    largest is the last class; 0 and 255 alone are background and foreground; few values with gaps between them are
    classes in their order; and values between two levels are the soft edges of two classes. All but the first two are
    logged. More than 255 classes need names, since such values could also number instances.

    Args:
        cells: returns the masks of all splits; may be called several times.
        folder: folder of the data, which may contain a file with class names (`triptych.data.sources.class_files`).
        options: what the user says about masks. If there are classes with numbers above 255, then 255 is a class like
            the others, and 65535 is ignored.

    Raises:
        DataError: masks hold colors or values whose meaning is unknown; or a file of class names cannot be read.
    """
    options = options or MaskOptions()
    first = next(iter(cells()))
    palette = Path(options.palette) if options.palette is not None else None
    named = read_class_file(folder, palette)
    if options.threshold is not None:
        return thresholded(options.threshold, tuple(named.names.values()) if named else None)
    if palette is None and (known := _published_label_map(Path(first[1]), folder, named)):
        known = _without_value(known, options.ignore_index)
        return known if known.colors else _with_palette(known, first)
    if named is not None and named.colors is not None and _hold_colors(cells(), named.colors):
        return _from_colors(named, named.colors, options)
    if named is None and (by_color := by_colors_of_palettes(cells)):
        return by_color
    if named is not None and len(named.names) > 2:
        label_map = from_names(named.names, options)
        if not _fits(label_map, cells()):
            names = tuple(named.names.values())
            label_map = interpret_values(count_values(cells()), options, names, first[1]) or label_map
    else:
        counts = count_values(cells())
        if not counts.any():
            read_mask(*first)  # raises why it cannot be read
        names = None if named is None else tuple(named.names.values())
        label_map = interpret_values(counts, options, names, first[1])
        label_map = label_map or from_names(named.names if named else {}, options)
    if named is not None and named.colors is not None and len(named.colors) == len(label_map.classes):
        return replace(label_map, colors=named.colors)
    return _with_palette(label_map, first)


def named_label_map(classes: tuple[str, ...], options: MaskOptions) -> LabelMap:
    """Return the label map of masks that hold the indices of these classes, as annotation files describe them."""
    return from_names(dict(enumerate(classes)), options)


def _hold_colors(cells: Iterable[Cell], colors: tuple[Color, ...]) -> bool:
    """Return whether the first masks hold colors, or palettes with the given colors, in place of numbers."""
    known = set(colors)
    for cell in islice(cells, SAMPLE):
        try:
            if uses_colors(*cell, known):
                return True
        except MaskFormatError:
            raise
        except TriptychError:
            continue  # reported when it is loaded
    return False


def _from_colors(named: NamedClasses, colors: tuple[Color, ...], options: MaskOptions) -> LabelMap:
    label_map = from_names(named.names, options)
    remaining = tuple(colors[k] for k, name in named.names.items() if name in label_map.classes)
    return replace(label_map, colors=remaining, encoding=MaskEncoding(colors=colors))


def _fits(label_map: LabelMap, cells: Iterable[Cell]) -> bool:
    """Return whether the first masks hold only values that the label map has classes for."""
    for cell in islice(cells, SAMPLE):
        try:
            values = read_mask(*cell)
        except MaskFormatError:
            raise
        except TriptychError:
            continue  # reported when it is loaded
        if int(values.max(initial=0)) >= len(label_map.table) or (label_map.table[values] < 0).any():
            return False
    return True


def _published_label_map(mask: Path, folder: Path, named: NamedClasses | None) -> LabelMap | None:
    """Return the label map of a known data set, recognized by the path of a mask; None if it is not one."""
    names, colors = tuple(name for _, name, _ in CITYSCAPES), tuple(color for *_, color in CITYSCAPES)
    if mask.stem.endswith("_labelTrainIds"):
        return LabelMap(names, identity_table(len(names)), colors)
    if mask.stem.endswith("_labelIds"):
        return LabelMap(names, lookup_table([number for number, *_ in CITYSCAPES]), colors)
    if ADE20K in mask.parts or mask.name.startswith(("ADE_train_", "ADE_val_")):
        names = _object_names(folder / "objectInfo150.txt") or tuple(f"class {i}" for i in range(150))
        return LabelMap(names, identity_table(len(names), reduce_zero_label=True))
    if VOC_IMAGE_PATH.search(mask.as_posix()) and named is None:
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
