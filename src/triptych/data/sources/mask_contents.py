"""Find folders of masks by what is in them: files of the same names as those of another folder, with one channel and
few values, as in x/ and y/, data/ and labels/, img/ and masks_machine/, also within each of several folders."""

from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from triptych.data.image_formats import PILLOW_FORMATS, is_image_name
from triptych.data.masks import GRAY_MODES
from triptych.data.sources.folders import has_images, list_visible
from triptych.data.sources.mask_names import folder_role

SAMPLE = 4  # files of each folder that are opened
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
    names = {path: {file.stem for file in list_visible(path) if is_image_name(file.name)} for path in folders}
    masks = [path for path in folders if len(names[path]) > 1 and _look_like_masks(path)]
    if len(masks) > 1:  # masks_machine/ rather than an image folder of few values
        masks = [path for path in masks if (folder_role(path.name, loose=True) or ("", ""))[1] == "mask"]
    if len(masks) != 1:
        return []
    (mask,) = masks
    images = [
        path
        for path in folders
        if path != mask
        and len(names[path] & names[mask]) * 10 >= len(names[path]) * 9
        and (folder_role(path.name, loose=True) or ("", ""))[1] != "mask"
        and not _look_like_masks(path)
    ]
    return [(images[0], mask)] if len(images) == 1 else []


def _look_like_masks(folder: Path) -> bool:
    files = [path for path in list_visible(folder) if is_image_name(path.name)][:SAMPLE]
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
