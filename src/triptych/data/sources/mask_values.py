"""Decide what the values of masks stand for if no file says it: class numbers, gray levels, or two classes with soft
edges. What is not plain is logged."""

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
from jaxtyping import Int64

from triptych.data.masks import (
    INVALID,
    MAX_MASK_CLASSES,
    NUM_MASK_VALUES,
    VOID,
    LabelMap,
    MaskEncoding,
    MaskFormatError,
    MaskOptions,
    identity_table,
    lookup_table,
    read_mask,
)
from triptych.errors import DataError, TriptychError

log = logging.getLogger(__name__)

Cell = tuple[bytes | str, str]
"""The path or bytes of a mask, and its name in errors."""

TWO_CLASSES = ("background", "foreground")
MAX_SPARSE = (
    64  # distinct values with gaps between them that are taken as classes; more number something else
)
MIN_SOFT = 6  # distinct values between two levels that soft edges have at least
HIGHEST = NUM_MASK_VALUES - 1
OPTIONS = "name the numbers in an id2label.json, or, if there are two classes, set mask_threshold"


@dataclass(frozen=True)
class SoftLevels:
    """The levels that masks with soft edges consist of, apart from a few pixels with values between them."""

    levels: tuple[int, ...]


def count_values(cells: Iterable[Cell]) -> Int64[np.ndarray, "65536"]:
    """Return how many pixels of masks have each value; masks that cannot be read are skipped.

    Raises:
        DataError: a mask holds colors, or a value above 65535.
    """
    counts = np.zeros(NUM_MASK_VALUES, np.int64)
    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
        for part in _batched(cells, 256):
            for of_mask in pool.map(_count_mask, part):
                counts[: len(of_mask)] += of_mask
    return counts


def _count_mask(cell: Cell) -> np.ndarray:
    try:
        values = read_mask(*cell)
    except MaskFormatError:
        raise
    except TriptychError:
        return np.zeros(0, np.int64)  # reported when it is loaded
    if int(values.max(initial=0)) >= NUM_MASK_VALUES:
        raise MaskFormatError(
            f"{cell[1]} holds {values.max()}, but class numbers end at {HIGHEST - 1}; {OPTIONS}"
        )
    return np.bincount(values.ravel())


def _batched(cells: Iterable[Cell], size: int) -> Iterator[list[Cell]]:
    remaining = iter(cells)
    while part := list(islice(remaining, size)):
        yield part


def interpret_values(
    counts: Int64[np.ndarray, "65536"], options: MaskOptions, names: tuple[str, ...] | None, example: str
) -> LabelMap | None:
    """Return the label map of masks with these values; None if `names` fit them as class numbers.

    Args:
        counts: number of pixels of each value.
        options: as in `find_label_map`.
        names: class names in order; None if there are none.
        example: name of a mask, for errors.

    Raises:
        DataError: the values are neither few, nor consecutive, nor those of two classes with soft edges.
    """
    seen = [int(value) for value in np.flatnonzero(counts)]
    two_names = names if names is not None and len(names) == 2 else TWO_CLASSES
    plain = options.ignore_index not in seen[:-1] and not options.reduce_zero_label
    if plain and set(seen) in ({0, VOID}, {0, HIGHEST}):
        return _by_levels(seen, two_names, options)
    soft = find_soft_levels(counts)
    if soft is not None and len(soft.levels) == 2 and (names is None or len(names) == 2):
        return _by_threshold(seen, soft, two_names, options)
    if soft is not None and names is None:
        raise DataError(
            f"the masks, such as {example}, hold {len(seen)} values, most of them in few pixels between "
            f"{_listed(soft.levels)}; save them without smoothed edges: resize with nearest neighbor, no JPEG"
        )
    numbers = _class_numbers(seen, options)
    if names is not None:
        if len(numbers) == len(names) and all(number >= len(names) for number in numbers if number):
            return _in_order(numbers, names, options)
        return None
    return _from_numbers(numbers, options, example)


def find_soft_levels(counts: Int64[np.ndarray, "65536"]) -> SoftLevels | None:
    """Return the levels of masks with soft edges, as smooth drawing, resizing and lossy compression leave them; None if
    the values are anything else.

    The levels are the most frequent values, at least 32 apart. All other values lie between two levels or within 1/16
    of the range of one. Those between have at most a third of the pixels of any level. And there are several values
    next to each level, or values all the way from level to level: class numbers, which start at 0, leave the upper part
    empty or have frequent classes in it.
    """
    seen = np.flatnonzero(counts)
    if len(seen) < MIN_SOFT + 2:
        return None
    low, high = int(seen[0]), int(seen[-1])
    near = (high - low) // 16
    remaining = counts.copy()
    levels: list[int] = []
    while len(levels) < 5:
        level = int(remaining.argmax())
        levels.append(level)
        remaining[max(0, level - near) : level + near + 1] = 0
        if len(levels) > 1 and 3 * int(remaining.max()) <= int(counts[levels[-1]]):
            break
    levels.sort()
    between = np.flatnonzero(remaining)
    if 3 * int(remaining.max()) > min(int(counts[level]) for level in levels):
        return None
    if low < levels[0] - near or high > levels[-1] + near or min(np.diff(levels)) < max(32, 2 * near):
        return None
    around = [((seen >= level - near) & (seen <= level + near)).sum() - 1 for level in levels]
    if min(around) >= 3:  # also of a mild compression, which leaves nothing in the middle
        return SoftLevels(tuple(levels))
    for lower, upper in pairwise(levels):
        bins = np.histogram(between, bins=8, range=(lower + near, upper - near))[0] > 0
        if len(between) < MIN_SOFT or bins.sum() < 4 or not bins[-2:].any():
            return None
    return SoftLevels(tuple(levels))


def _class_numbers(seen: list[int], options: MaskOptions) -> list[int]:
    """Return the values that are classes: without ignored ones, among which is 255 unless it is a gray level."""
    void = {options.ignore_index, *([0] if options.reduce_zero_label else [])} - {VOID}
    numbers = [value for value in seen if value not in void]
    if len(numbers) < 2 or not _are_gray_levels(seen):
        numbers = [value for value in numbers if value != VOID]
        if len(numbers) > 2 and numbers[-1] == HIGHEST and numbers[-2] < HIGHEST // 2:
            numbers.pop()  # the void value of 16-bit masks
    return numbers


def _are_gray_levels(values: list[int]) -> bool:
    """Return whether values up to white divide the range evenly, as 0, 128, 255 and 0, 85, 170, 255 do."""
    if not 2 <= len(values) <= 17 or values[-1] not in (VOID, HIGHEST) or 0 < values[0] < 32:
        return False
    even = np.linspace(values[0], values[-1], len(values))
    return even[1] - even[0] >= 15 and bool((np.abs(even - values) <= 1.5).all())


def _from_numbers(numbers: list[int], options: MaskOptions, example: str) -> LabelMap:
    first = int(options.reduce_zero_label)
    if not numbers:
        raise DataError(
            f"the masks, such as {example}, hold no classes; give masks whose classes are numbered from 0"
        )
    span = numbers[-1] + 1 - first
    if 2 * len(numbers) >= span and span <= VOID:  # classes that no mask happens to show keep their numbers
        if span > MAX_SPARSE:
            log.warning(
                "no file names the classes; the masks hold values up to %d: %d classes", numbers[-1], span
            )
        return from_names({i: f"class {i}" for i in range(span)}, options)
    if len(numbers) > MAX_SPARSE:
        raise DataError(
            f"the masks, such as {example}, hold {len(numbers)} distinct values up to {numbers[-1]} (instances, soft "
            f"edges or a photo?), and no file names them; number the classes from 0, {OPTIONS}"
        )
    return _in_order(numbers, tuple(f"class {number - first}" for number in numbers), options)


def _in_order(numbers: list[int], names: tuple[str, ...], options: MaskOptions) -> LabelMap:
    """Return the label map that takes sparse values as classes in their order, and log this."""
    log.warning(
        "the masks hold only the values %s: taken as %d classes in this order (%s); to change this, name the numbers "
        "in an id2label.json",
        _listed(numbers),
        len(numbers),
        ", ".join(names[:3]) + (" ..." if len(names) > 3 else ""),
    )
    return _by_levels(numbers, names, options)


def _by_levels(numbers: list[int], names: tuple[str, ...], options: MaskOptions) -> LabelMap:
    void = {options.ignore_index, VOID, *([0] if options.reduce_zero_label else [])}
    return LabelMap(names, lookup_table(numbers, INVALID, void - set(numbers)))


def _by_threshold(
    seen: list[int], soft: SoftLevels, names: tuple[str, ...], options: MaskOptions
) -> LabelMap:
    low, high = soft.levels
    middle = (low + high) // 2
    log.warning(
        "the masks hold %d values from %d to %d, most pixels being near %d or %d (soft edges): values above %d are "
        "taken as foreground; to change this, set mask_threshold",
        len(seen), seen[0], seen[-1], low, high, middle,
    )  # fmt: skip
    table = identity_table(2)
    table[: middle + 1], table[middle + 1 :] = 0, 1
    if options.ignore_index != VOID:
        table[options.ignore_index] = VOID
    return LabelMap(names, table)


def thresholded(threshold: float, names: tuple[str, ...] | None) -> LabelMap:
    """Return the label map of masks of two classes that a threshold divides.

    Raises:
        DataError: the names are not two.
    """
    if names is not None and len(names) != 2:
        raise DataError(
            f"mask_threshold makes two classes, but {len(names)} are named; name two, or omit mask_threshold"
        )
    return LabelMap(names or TWO_CLASSES, identity_table(2), encoding=MaskEncoding(threshold=threshold))


def from_names(names: dict[int, str], options: MaskOptions) -> LabelMap:
    """Return the label map of named classes. With `reduce_zero_label` name k belongs to mask value k + 1.

    Raises:
        DataError: there are no classes, too many, or numbers above 65534.
    """
    first = int(options.reduce_zero_label)
    last = max(names) + first
    void = {VOID, options.ignore_index}
    if last > VOID:  # then 255 is a class like the others if it has a name
        void = {*(void - {VOID}), HIGHEST}
    numbers = [n + first for n in names if n + first not in void]
    if not 0 < len(numbers) <= MAX_MASK_CLASSES or max(numbers) >= NUM_MASK_VALUES:
        raise DataError(
            f"{len(numbers)} classes are named, up to number {max(names)}; name 1 to {MAX_MASK_CLASSES} classes with "
            f"numbers below {HIGHEST}"
        )
    void = {*void, *range(first), *({VOID} - set(numbers))}
    return LabelMap(tuple(names[n - first] for n in numbers), lookup_table(numbers, INVALID, void))


def _listed(numbers: Iterable[int]) -> str:
    *most, last = map(str, numbers)
    if len(most) > 9:
        return f"{', '.join(most[:6])} ... {last}"
    return f"{', '.join(most)} and {last}" if most else last
