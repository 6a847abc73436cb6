"""Read folders of images and folders of masks, paired by file name: images/ and masks/, mmsegmentation, ADE20K,
Cityscapes and PASCAL VOC."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from triptych.data.sources.folders import (
    ID_COLUMN,
    find_images,
    has_images,
    list_visible,
    make_table,
    metadata_file,
    read_text,
)
from triptych.data.sources.label_maps import ADE20K
from triptych.data.sources.splits import SPLITS, split_folders, split_notes
from triptych.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "img_dir", "leftimg8bit")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "annotation", "ann_dir", "gt", "gtfine")
# Folders of PASCAL VOC. The second one with masks adds those of SBD to the first.
VOC_IMAGES, VOC_MASKS = "JPEGImages", ("SegmentationClass", "SegmentationClassAug")
# Endings that the name of a mask adds to that of its image. In Cityscapes they replace IMAGE_ENDING.
ENDINGS = (
    *("_mask", "-mask", "_masks", "_label", "_labels", "_seg", "_gt", "_L"),
    *("_gtFine_labelTrainIds", "_gtFine_labelIds"),
)
IMAGE_ENDING = "_leftImg8bit"


def dataset_root(folder: Path) -> Path:
    """Return the folder that a data set is in: the folder itself, or the one that an archive wrapped into it.

    Goes down while a folder contains a single folder and no data next to it, to where there are splits, images and
    masks, a metadata file or several folders of images: photos/animals/cat and photos/animals/dog are two classes, not
    one. Goes down to ADE20K or PASCAL VOC as well.

    Raises:
        DataError: several subfolders hold a PASCAL VOC.
    """
    if (folder / ADE20K).is_dir():
        return folder / ADE20K
    within = [path for path in list_visible(folder) if (path / VOC_IMAGES).is_dir()]
    if len(within) > 1:
        raise DataError(f"{folder} holds {' and '.join(path.name for path in within)}; give one of them")
    if within:
        return within[0]
    inside = folder
    while not (_has_layout(inside) or has_images(inside)):
        folders = [path for path in list_visible(inside) if path.is_dir()]
        if len(folders) != 1:
            return folder
        (inside,) = folders
    return inside if _has_layout(inside) else folder


def log_layout(folder: Path, root: Path) -> None:
    """Log where the data in a folder was found, and which folders were taken for splits or left out."""
    if root != folder and root.name != ADE20K and not (root / VOC_IMAGES).is_dir():
        log.warning("the data in %s is read from %s", folder, root.relative_to(folder))
    for note in split_notes(root):
        log.warning(note)


def _has_layout(folder: Path) -> bool:
    """Return whether a folder has splits, images and masks, metadata or several classes."""
    if split_folders(folder) or metadata_file(folder) or _sides_by_split(folder):
        return True
    classes = (path for path in list_visible(folder) if path.is_dir() and has_images(path))
    return next(classes, None) is not None and next(classes, None) is not None


def read_pairs(folder: Path) -> "dict[str, Dataset] | None":
    """Read a folder of images and masks as a table for each split; None if the folder has another layout.

    Splits may be above or below: train/images or images/train. In the latter case the masks of all splits may be in one
    folder. The table of a split without masks has no mask column.

    Raises:
        DataError: an image has no mask, or two masks.
    """
    if (voc := _read_voc(folder)) is not None:
        return voc
    sides = _sides_by_split(folder)
    if sides is None or not any(masks is not None for _, masks in sides.values()):
        return None
    return {split: _pair(images, masks, folder) for split, (images, masks) in sides.items()}


def _sides_by_split(folder: Path) -> dict[str, tuple[Path, Path | None]] | None:
    if (images := _first_folder(folder, IMAGE_FOLDERS)) is not None:
        masks = _first_folder(folder, MASK_FOLDERS)
        if masks is None:
            return None
        if splits := split_folders(images):
            masked = split_folders(masks)
            return {split: (path, masked.get(split) if masked else masks) for split, path in splits.items()}
        return {"": (images, masks)}
    sides = {}
    for split, below in split_folders(folder).items():
        images = _first_folder(below, IMAGE_FOLDERS)
        if images is None:
            return None
        sides[split] = (images, _first_folder(below, MASK_FOLDERS))
    return sides or None


def _read_voc(folder: Path) -> "dict[str, Dataset] | None":
    """Read PASCAL VOC, whose splits are lists of names in ImageSets/Segmentation; None if it is another data set."""
    mask_folders = [folder / name for name in VOC_MASKS if (folder / name).is_dir()]
    if not (mask_folders and (folder / VOC_IMAGES).is_dir()):
        return None
    images = {Path(parts[-1]).stem: path for path, parts in find_images(folder / VOC_IMAGES)}
    masks = {name: path for below in reversed(mask_folders) for name, path in _masks_by_key(below).items()}
    lists = folder / "ImageSets" / "Segmentation"
    splits = {"": sorted(images.keys() & masks.keys())}
    if lists.is_dir() and (files := [path for path in list_visible(lists) if path.suffix == ".txt"]):
        splits = {SPLITS.get(file.stem, file.stem): _read_list(file) for file in files}
    result = {}
    for split, names in splits.items():
        where = f" of split {split}" if split else ""
        if not names:
            raise DataError(f"{folder} holds no images{where} that have masks; add them")
        if lacking := next((name for name in names if name not in images), None):
            raise DataError(
                f"{folder / VOC_IMAGES} has no image {lacking}{where}; add it or remove it from the list"
            )
        columns = {
            "image": [images[name] for name in names],
            ID_COLUMN: [f"{VOC_IMAGES}/{name}" for name in names],
        }
        if any(name in masks for name in names):  # the test set's are not published
            if lacking := next((name for name in names if name not in masks), None):
                raise DataError(
                    f"{mask_folders[0]} has no mask of {lacking}{where}; add it or remove it from the list"
                )
            columns["mask"] = [masks[name] for name in names]
        result[split] = make_table(columns, masks="mask" if "mask" in columns else None)
    return result


def _read_list(file: Path) -> list[str]:
    """Read the names of images, one per line. If a line has the paths of image and mask, the first one counts."""
    return [Path(line.split()[0]).stem for line in read_text(file).splitlines() if line.strip()]


def _first_folder(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Return the first subfolder with one of these names (in any letter case) that holds images; None if there is
    none."""
    by_name = {path.name.lower(): path for path in list_visible(folder) if path.is_dir()}
    result = (by_name[name] for name in names if name in by_name)
    return next((path for path in result if next(find_images(path), None)), None)


def _pair(images: Path, masks: Path | None, root: Path) -> "Dataset":
    image_files = list(find_images(images))
    if not image_files:
        raise DataError(f"{images} holds no images (.jpg, .png, .webp ...); add them or remove the folder")
    columns: dict[str, list[str]] = {
        "image": [path for path, _ in image_files],
        ID_COLUMN: ["/".join((*images.relative_to(root).parts, *parts)) for _, parts in image_files],
    }
    if masks is None:
        return make_table(columns)
    result = _masks_by_key(masks)
    columns["mask"] = of_images = [_mask_of(parts, result) for _, parts in image_files]
    if lacking := [path for (path, _), mask in zip(image_files, of_images, strict=True) if not mask]:
        raise DataError(
            f"{len(lacking)} of {len(image_files)} images have no mask of their name in {masks}, the first of which is "
            f"{lacking[0]}; add the masks or remove the images"
        )
    return make_table(columns, masks="mask")


def _mask_of(parts: tuple[str, ...], masks: dict[str, str]) -> str:
    """Return the path of the mask of an image, "" if there is none."""
    *folders, name = parts
    stem = Path(name).stem
    names = [stem, *(stem.removesuffix(IMAGE_ENDING) + ending for ending in ENDINGS)]
    return next((masks[key] for key in ("/".join((*folders, name)) for name in names) if key in masks), "")


def _masks_by_key(folder: Path) -> dict[str, str]:
    """Return the path of each mask by its path relative to the folder, without suffix. Of Cityscapes, labelTrainIds
    are preferred to labelIds."""
    result: dict[str, str] = {}
    for path, parts in find_images(folder):
        key = "/".join((*parts[:-1], Path(parts[-1]).stem))
        if key in result:
            raise DataError(f"{result[key]} and {path} are masks of the same image; remove one of them")
        result[key] = path
    if any(key.endswith("_labelTrainIds") for key in result):
        result = {key: path for key, path in result.items() if not key.endswith("_labelIds")}
    return result
