"""Read images and masks that are paired by file name: images/ and masks/, train/ and train_labels/, x.jpg and
x_mask.png in one folder, mmsegmentation, ADE20K, Cityscapes and PASCAL VOC."""

import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.data.sources.annotations import find_annotations
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
from triptych.data.sources.mask_contents import find_mask_folders
from triptych.data.sources.mask_names import Role, folder_role, may_be_mask, pair_key
from triptych.data.sources.splits import SPLITS, split_folders, split_notes
from triptych.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

# For errors: what data of segmentation may look like.
MASK_LAYOUTS = (
    "images/ and masks/, x.jpg and x_mask.png, train/ and train_masks/, COCO json, YOLO segmentation text, labelme "
    "json, ADE20K, Cityscapes, PASCAL VOC, masks of CVAT and Roboflow, and tables with a column of masks"
)
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "img_dir", "leftimg8bit")
# Those of DRIVE and HRF come first: there, mask/ holds the field of view.
MASK_FOLDERS = (
    "1st_manual",
    "manual1",
    "manual",
    "masks",
    "mask",
    "labels",
    "label",
    "annotations",
    "annotation",
    "ann_dir",
    "gt",
    "gtfine",
)
# Folders of PASCAL VOC. The second one with masks adds those of SBD to the first; the third one is labelme's.
VOC_IMAGES, VOC_MASKS = "JPEGImages", ("SegmentationClass", "SegmentationClassAug", "SegmentationClassPNG")
# Endings that the name of a mask adds to that of its image. In Cityscapes they replace IMAGE_ENDING.
ENDINGS = (
    *("_mask", "-mask", "_masks", "_label", "_labels", "_seg", "_gt", "_L"),
    *("_gtFine_labelTrainIds", "_gtFine_labelIds"),
)
IMAGE_ENDING = "_leftImg8bit"
FIRST_CHANNEL = "_0000"  # that nnU-Net adds to the names of images
FEW_FILES, FEW_FOLDERS = 2000, 20  # that are looked at where reading all would take long

PathAndParts = tuple[str, tuple[str, ...]]
"""The path of an image, and its parts relative to a folder, as `find_images` yields them."""
Roles = list[tuple[tuple[str, Role], Path]]
"""Folders with the split and the role that their names show."""
Sides = dict[str, tuple[Path, Path | None]]
"""The folders of images and of masks of each split."""


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
        if len(folders) > 1:  # such as meta/ and LICENSES/
            folders = [path for path in folders if next(find_images(path), None)]
        if len(folders) != 1:
            return folder
        (inside,) = folders
    return inside if _has_layout(inside) else folder


def log_layout(folder: Path, root: Path) -> None:
    """Log where the data in a folder was found, and which folders were taken for splits or left out."""
    if root != folder and root.name != ADE20K and not (root / VOC_IMAGES).is_dir():
        log.warning("the data in %s is read from %s", folder, root.relative_to(folder))
    if _first_folder(root, _roles(root), IMAGE_FOLDERS) is None and (siblings := _sibling_folders(root)):
        for split, (images, masks) in siblings.items():
            log.warning(
                "%s: images from %s, masks from %s",
                split or "data",
                images.name,
                masks.name if masks else "nowhere",
            )
        return
    for note in split_notes(root):
        log.warning(note)


def _has_layout(folder: Path) -> bool:
    """Return whether a folder has splits, images and masks, annotations, metadata or several classes."""
    if metadata_file(folder) or _sides_by_split(folder) or find_annotations(folder) or split_folders(folder):
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
    if (sides := _sides_by_split(folder)) is not None:
        if not any(masks is not None for _, masks in sides.values()):
            return None
        return {split: _pair([(images, masks)], folder) for split, (images, masks) in sides.items()}
    splits = split_folders(folder) or {"": folder}
    nested = {split: find_mask_folders(below) for split, below in splits.items()}
    if any(nested.values()):
        images, masks = next(pairs[0] for pairs in nested.values() if pairs)
        log.warning(
            "images are read from folders such as %s, masks from %s",
            images.relative_to(folder),
            masks.relative_to(folder),
        )
        return {split: _pair([*pairs] or [(splits[split], None)], folder) for split, pairs in nested.items()}
    mixed = {split: read_mixed(below, f"{below.name}/" if split else "") for split, below in splits.items()}
    tables = {split: table for split, table in mixed.items() if table is not None}
    return tables if any("mask" in table.features for table in tables.values()) else None


def has_masks(folder: Path) -> bool:
    """Return whether a folder has a layout of images and masks. Of large folders it looks at the first files."""
    sides = _sides_by_split(folder)
    if _voc_masks(folder) or (sides is not None and any(masks for _, masks in sides.values())):
        return True
    if sides is not None:
        return False
    folders = list(split_folders(folder).values()) or [folder]
    if any(find_mask_folders(below) for below in folders):
        return True
    return any(
        _pairs_within(list(islice(find_images(below), FEW_FILES)))[1]
        for below in (*folders, *(path for top in folders for path in islice(list_visible(top), FEW_FOLDERS)))
        if below.is_dir() and has_images(below)
    )


def _sides_by_split(folder: Path) -> Sides | None:
    """Return the folders of images and of masks of each split; None if the folder is not divided like that."""
    roles = _roles(folder)
    images, masks = (_first_folder(folder, roles, names) for names in (IMAGE_FOLDERS, MASK_FOLDERS))
    if images is not None:
        if masks is None:
            return None
        if splits := split_folders(images):
            masked = split_folders(masks)
            return {split: (path, masked.get(split) if masked else masks) for split, path in splits.items()}
        return {"": (images, masks)}
    if (siblings := _sibling_folders(folder)) is not None:
        return siblings
    sides = {}
    for split, below in split_folders(folder).items():
        inside = _roles(below)
        images = _first_folder(below, inside, IMAGE_FOLDERS)
        if images is None:
            return None
        sides[split] = (images, _first_folder(below, inside, MASK_FOLDERS))
    return _of_one_name(sides) or None


def _of_one_name(sides: Sides) -> Sides:
    """Return the sides without masks of a split that lie in another folder than those of "train", which has that one,
    too: mask/ of DRIVE's test set holds the field of view."""
    _, trained = sides.get("train", (None, None))
    if trained is None:
        return sides
    others = {path.name for path in list_visible(trained.parent)} - {trained.name}
    return {
        split: (images, None if masks is not None and masks.name in others else masks)
        for split, (images, masks) in sides.items()
    }


def _roles(folder: Path, *, loose: bool = False) -> Roles:
    """Return the split and the role of each subfolder whose name has one."""
    folders = [path for path in list_visible(folder) if path.is_dir()]
    return [(role, path) for path in folders if (role := folder_role(path.name, loose=loose))]


def _sibling_folders(folder: Path) -> Sides | None:
    """Return the sides of train/ and train_labels/, of train_images/ and train_masks/, or of train/, val/ and masks/;
    None if there are no such folders, or their files do not belong together."""
    roles = _roles(folder, loose=True)
    sides: Sides = {}
    for (split, role), path in roles:
        if role == "mask" or not (split or role):
            continue
        own = next((masks for key, masks in roles if key == (split, "mask")), None)
        shared = next((masks for key, masks in roles if key == ("", "mask")), None)
        if split not in sides or role == "image":
            sides[split] = (path, own or shared)
    masked = [(images, masks) for images, masks in sides.values() if masks is not None]
    return sides if masked and all(_belong_together(*pair) for pair in masked) else None


def _belong_together(images: Path, masks: Path) -> bool:
    """Return whether at least half of the first images have a mask."""
    files = [parts for _, parts in islice(find_images(images), FEW_FILES)]
    index = MaskIndex(masks)
    return bool(files) and 2 * sum(bool(mask) for mask in index.masks_of(files)) >= len(files)


def read_mixed(folder: Path, prefix: str) -> "Dataset | None":
    """Read a folder in which each image lies next to its mask, as a table; None if there are no images.

    If all images are in subfolders, these are their classes, too.

    Raises:
        DataError: some images have no mask, but at least half of them do; or an image has two.
    """
    files = list(find_images(folder))
    if not files:
        return None
    images, masks = _pairs_within(files)
    columns: dict[str, Any] = {
        "image": [path for path, _ in images],
        ID_COLUMN: [prefix + "/".join(parts) for _, parts in images],
    }
    if not masks:
        return make_table(columns)
    columns["mask"] = [masks.get(path, "") for path, _ in images]
    _need_masks(columns["image"], columns["mask"], folder)
    classes = sorted({parts[0] for _, parts in images})
    if all(len(parts) > 1 for _, parts in images):
        columns["label"] = [classes.index(parts[0]) for _, parts in images]
        return make_table(columns, classes, masks="mask")
    return make_table(columns, masks="mask")


def _pairs_within(files: list[PathAndParts]) -> tuple[list[PathAndParts], dict[str, str]]:
    """Divide the files of one folder into images, and the mask of each image by the path of both; {} if fewer than
    half of the images have one, so that the names mean something else."""
    if 3 * sum(may_be_mask(parts[-1]) for _, parts in files) < len(files):
        return files, {}
    keys = {path: (parts[:-1], *pair_key(parts[-1])) for path, parts in files}
    images = {(folder, key): path for path, (folder, key, role) in keys.items() if role != "mask"}
    masks: dict[str, str] = {}
    used: set[str] = set()
    for path, (folder, key, role) in keys.items():
        if role != "mask" or (folder, key) not in images:
            continue
        image = images[folder, key]
        if image in masks:
            raise DataError(
                f"{masks[image]} and {path} are masks of the same image; merge them or remove one of them"
            )
        masks[image] = path
        used.add(path)
    others = [(path, parts) for path, parts in files if path not in used]
    return (others, masks) if 2 * len(masks) >= len(others) else (files, {})


def _read_voc(folder: Path) -> "dict[str, Dataset] | None":
    """Read PASCAL VOC, whose splits are lists of names in ImageSets/Segmentation; None if it is another data set."""
    if not (mask_folders := _voc_masks(folder)):
        return None
    images = {Path(parts[-1]).stem: path for path, parts in find_images(folder / VOC_IMAGES)}
    masks = {name: path for below in reversed(mask_folders) for name, path in MaskIndex(below).paths.items()}
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


def _voc_masks(folder: Path) -> list[Path]:
    """Return the folders with masks of PASCAL VOC, [] in other data."""
    if not (folder / VOC_IMAGES).is_dir():
        return []
    return [folder / name for name in VOC_MASKS if (folder / name).is_dir()]


def _first_folder(folder: Path, roles: Roles, names: tuple[str, ...]) -> Path | None:
    """Return the first subfolder with one of these names (in any letter case) that holds images, else one that is
    named similarly; None if there is none."""
    by_name = {path.name.lower(): path for path in list_visible(folder) if path.is_dir()}
    role: Role = "image" if names is IMAGE_FOLDERS else "mask"
    similar = [path for key, path in roles if key == ("", role)]
    result = (*(by_name[name] for name in names if name in by_name), *similar)
    return next((path for path in result if next(find_images(path), None)), None)


def _pair(sides: list[tuple[Path, Path | None]], root: Path) -> "Dataset":
    """Return the table of the images in some folders and their masks; all folders or none of them have masks."""
    columns: dict[str, list[str]] = {"image": [], ID_COLUMN: [], "mask": []}
    for images, masks in sides:
        files = list(find_images(images))
        if not files:
            raise DataError(
                f"{images} holds no images (.jpg, .png, .webp ...); add them or remove the folder"
            )
        paths = [path for path, _ in files]
        columns["image"] += paths
        columns[ID_COLUMN] += ["/".join((*images.relative_to(root).parts, *parts)) for _, parts in files]
        if masks is not None:
            columns["mask"] += (of_images := MaskIndex(masks).masks_of([parts for _, parts in files]))
            _need_masks(paths, of_images, masks)
    if not columns["mask"]:
        del columns["mask"]
        return make_table(columns)
    return make_table(columns, masks="mask")


def _need_masks(images: list[str], masks: list[str], folder: Path) -> None:
    if lacking := [path for path, mask in zip(images, masks, strict=True) if not mask]:
        raise DataError(
            f"{len(lacking)} of {len(images)} images have no mask of their name in {folder}, the first of which is "
            f"{lacking[0]}; add the masks or remove the images"
        )


class MaskIndex:
    """The masks in a folder by the names of their images.

    Of Cityscapes, labelTrainIds are preferred to labelIds.

    Raises:
        DataError: two masks of the same image.
    """

    def __init__(self, folder: Path):
        self.paths: dict[str, str] = {}
        self.similar: dict[tuple[tuple[str, ...], str], str] = {}
        files = list(find_images(folder))
        has_train_ids = any(Path(parts[-1]).stem.endswith("_labelTrainIds") for _, parts in files)
        for path, (*folders, name) in files:
            stem = Path(name).stem
            if has_train_ids and stem.endswith("_labelIds"):
                continue
            key = "/".join((*folders, stem))
            if key in self.paths:
                raise DataError(
                    f"{self.paths[key]} and {path} are masks of the same image; remove one of them"
                )
            self.paths[key] = path
            for within in {tuple(folders), ()}:
                similar = within, pair_key(name).key
                self.similar[similar] = "" if similar in self.similar else path  # "" if it is ambiguous

    def masks_of(self, images: list[tuple[str, ...]]) -> list[str]:
        """Return the path of the mask of each image, "" if there is none.

        Args:
            images: parts of the paths of the images relative to their folder.
        """
        masks = [self._exact(parts) for parts in images]
        similar = ["" if mask else self._similar(parts) for mask, parts in zip(masks, images, strict=True)]
        uses = Counter((*masks, *similar))
        return [
            mask or (other if uses[other] == 1 else "") for mask, other in zip(masks, similar, strict=True)
        ]

    def _exact(self, parts: tuple[str, ...]) -> str:
        *folders, name = parts
        stem = Path(name).stem
        names = [stem, *(stem.removesuffix(IMAGE_ENDING) + ending for ending in ENDINGS)]
        names.append(stem.removesuffix(FIRST_CHANNEL))
        paths = self.paths
        return next(
            (paths[key] for key in ("/".join((*folders, name)) for name in names) if key in paths), ""
        )

    def _similar(self, parts: tuple[str, ...]) -> str:
        key = pair_key(parts[-1]).key
        return self.similar.get((parts[:-1], key)) or self.similar.get(((), key), "")
