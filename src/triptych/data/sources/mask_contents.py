"""Find folders of masks by what is in them: files of the same names as those of another folder, with one channel and
few values, as in x/ and y/, data/ and labels/, img/ and masks_machine/, also within each of several folders."""

from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from triptych.data.image_formats import PILLOW_FORMATS, is_image_name
from triptych.data.masks import GRAY_MODES
from triptych.data.sources.folders import has_images, list_visible
from triptych.data.sources.mask_names import may_be_mask, pair_key

OPENED = 4  # files of each folder that are opened
FEW_VALUES = 32
MAX_DEPTH = 2
MAX_FOLDERS = 50  # more are classes
MAX_SIDE = 20_000

Pairs = list[tuple[Path, Path]]


def find_mask_folders(folder: Path, depth: int = MAX_DEPTH) -> Pairs:
    """Return the folders of images and of their masks in a folder or in each of its subfolders; [] if there are
    none."""
    folders = [path for path in list_visible(folder) if path.is_dir()]
    if not 1 <= len(folders) <= MAX_FOLDERS:
        return []
    filled = [path for path in folders if has_images(path)]
    if filled:
        return _pair_of(filled)
    if depth == 0:
        return []
    below = {path: find_mask_folders(path, depth - 1) for path in folders}
    lacking = [path for path, pairs in below.items() if not pairs]
    if any(_holds_images(path) for path in lacking):
        return []
    return [pair for pairs in below.values() for pair in pairs]


def _holds_images(folder: Path) -> bool:
    return any(is_image_name(path.name) for path in islice(folder.rglob("*"), 1000))


def _pair_of(folders: list[Path]) -> Pairs:
    """Return the one folder of images and the one of masks among folders; [] unless there are exactly two such."""
    files = {path: [f.name for f in list_visible(path) if is_image_name(f.name)] for path in folders}
    keys = {path: {pair_key(name).key for name in names} for path, names in files.items()}
    photos = [path for path in folders if not _is_called_mask(path) and not _look_like_masks(path)]
    masks = [path for path in folders if len(files[path]) > 1 and _look_like_masks(path)]
    if len(masks) > 1 or not masks:  # masks_machine/ rather than others of few values; or masks of colors
        named = [path for path in masks or folders if _is_called_mask(path)]
        masks = [path for path in named if masks or all(pair_key(n).role == "mask" for n in files[path])]
    if len(masks) != 1:
        return []
    (mask,) = masks
    images = [path for path in photos if len(keys[path] & keys[mask]) * 10 >= len(keys[path]) * 9]
    return [(images[0], mask)] if len(images) == 1 else []


def _is_called_mask(folder: Path) -> bool:
    return may_be_mask(folder.name)


def _look_like_masks(folder: Path) -> bool:
    files = [path for path in list_visible(folder) if is_image_name(path.name)][:OPENED]
    return bool(files) and all(map(_looks_like_mask, files))


def _looks_like_mask(file: Path) -> bool:
    """Return whether a file has one channel or a palette, few values, and a lossless format."""
    try:
        with Image.open(file, formats=PILLOW_FORMATS) as image:
            if (
                image.format in ("JPEG", "MPO")
                or image.mode not in (*GRAY_MODES, "P")
                or max(image.size) > MAX_SIDE
            ):
                return False
            return len(np.unique(np.asarray(image))) <= FEW_VALUES
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
