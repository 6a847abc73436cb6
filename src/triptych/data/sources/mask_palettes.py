"""Masks whose palettes differ, as GIF writers and drawing programs order the colors of each file differently."""

import logging
from collections.abc import Callable, Iterable

from triptych.data.masks import Color, LabelMap, MaskEncoding, MaskFormatError, identity_table, used_colors
from triptych.data.sources.mask_values import MAX_SPARSE, TWO_CLASSES, Cell
from triptych.errors import TriptychError

MANY = 1000  # masks whose palettes agree; the others are not looked at

log = logging.getLogger(__name__)


def by_colors_of_palettes(cells: Callable[[], Iterable[Cell]]) -> LabelMap | None:
    """Return the label map whose classes are the colors of the palettes, from dark to bright; None if the first mask
    has no palette, or an index has the same color in all masks, so that indices are class numbers.

    Raises:
        DataError: there are too many colors.
    """
    colors: dict[int, Color] = {}
    distinct: set[Color] = set()
    differ = False
    name = ""
    for number, (source, name) in enumerate(cells()):
        if number == MANY and not differ:
            return None
        try:
            used = used_colors(source, name)
        except MaskFormatError:
            raise
        except TriptychError:
            continue  # reported when it is loaded
        if used is None and not colors:
            return None
        for index, color in (used or {}).items():
            differ |= colors.setdefault(index, color) != color
            distinct.add(color)
    if not differ:
        return None
    if len(distinct) > MAX_SPARSE:
        raise MaskFormatError(
            f"the palettes of the masks, such as {name}, differ and have {len(distinct)} colors; write a "
            "class_dict.csv with the columns name, r, g, b of the classes"
        )
    ordered = tuple(sorted(distinct, key=lambda color: (_luma(color), color)))
    is_gray = all(len(set(color)) == 1 for color in ordered)
    names = tuple(f"color {red} {green} {blue}" for red, green, blue in ordered)
    names = TWO_CLASSES if is_gray and len(ordered) == 2 else names
    log.warning(
        "the palettes of the masks differ from file to file: taken as %d classes by color (%s); to name them, write a "
        "class_dict.csv with the columns name, r, g, b",
        len(ordered),
        ", ".join(map(str, ordered[:4])),
    )
    return LabelMap(names, identity_table(len(ordered)), ordered, MaskEncoding(colors=ordered))


def _luma(color: Color) -> float:
    """Return the luma (ITU-R BT.601)."""
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue
