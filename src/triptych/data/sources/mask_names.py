"""Names of files and folders from which it shows that they hold images or masks, and which belong together."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from triptych.data.image_formats import KNOWN_SUFFIXES
from triptych.data.sources.splits import SPLITS

Role = Literal["image", "mask", ""]

IMAGE_WORD = r"images?|imgs?|im|rgb|photos?|pics?|frames?|inputs?|originals?|leftimg8bit|sat"
MASK_WORD = (
    r"(?:seg|segmentation|semantic|binary|label|png)[ _-]?(?:masks?|maps?|labels?|images?)"
    r"|masks?|labels?|annot(?:ation)?s?|segment(?:ation|ed)?s?|segs?|semantic"
    r"|gts?|gtfine|ground[ _-]?truths?|trimaps?|mattes?|manual1?"
)
SEPARATOR = r"[ _.-]"
SPLIT = "|".join(SPLITS)

Patterns = tuple[tuple[Role, re.Pattern[str]], ...]


def _patterns(template: str, mask_word: str, image_word: str) -> Patterns:
    """Return the pattern of masks and that of images, with the words for them in place of WORD."""
    mask, image = (
        re.compile(template.replace("WORD", f"(?:{word})"), re.IGNORECASE) for word in (mask_word, image_word)
    )
    return ("mask", mask), ("image", image)


# "train_labels", "trainannot", "masks-val", "mask"
FOLDERS = _patterns(rf"(?:({SPLIT}){SEPARATOR}?)?WORD(?:{SEPARATOR}?({SPLIT}))?", MASK_WORD, IMAGE_WORD)
WORDS = (
    # "cat_mask", "cat mask 2": the number counts the masks of an image.
    *_patterns(rf"(?P<key>.+){SEPARATOR}WORD(?:[ _-]\d+)?", f"{MASK_WORD}|l", f"{IMAGE_WORD}|{SPLIT}"),
    # "mask_7", "mask7"
    *_patterns(rf"WORD(?:{SEPARATOR}+|(?=\d))(?P<key>.+)", MASK_WORD, IMAGE_WORD),
)
NNUNET_FOLDERS: dict[str, tuple[str, Role]] = {
    "imagesTr": ("train", "image"),
    "labelsTr": ("train", "mask"),
    "imagesTs": ("test", "image"),
    "labelsTs": ("test", "mask"),
}
HINT = re.compile(
    r"mask|label|annot|seg|semantic|gt|truth|trimap|matte|manual|_L\b|\.\w+\.\w+$", re.IGNORECASE
)


class PairKey(NamedTuple):
    """What an image and its mask have in common: their name without a word for either, and which of both it is."""

    key: str
    role: Role


def pair_key(name: str) -> PairKey:
    """Return the key of a file name: ("cat", "mask") of cat_mask.png and cat.jpg.png, ("7", "image") of img_7.jpg."""
    stem = Path(name).stem
    of_file = _is_image(stem)  # cat.jpg.png is the mask of cat.jpg
    stem = Path(stem).stem if of_file else stem
    for role, pattern in WORDS:
        if match := pattern.fullmatch(stem):
            key = match["key"]
            if role == "mask":  # img_7_mask.png is the mask of img_7.jpg
                key = Path(key).stem if _is_image(key) else key
                key = next((m["key"] for r, p in WORDS if r == "image" and (m := p.fullmatch(key))), key)
            return PairKey(key, "mask" if of_file else role)
    return PairKey(stem, "mask" if of_file else "")


def may_be_mask(name: str) -> bool:
    """Return whether the name of a file has a word for masks anywhere. Faster than `pair_key`."""
    return HINT.search(name) is not None


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in KNOWN_SUFFIXES


def folder_role(name: str, *, loose: bool = False) -> tuple[str, Role] | None:
    """Return the split ("" for none) and the role of a folder by its name: ("train", "mask") of "train_labels",
    ("val", "") of "val"; None of other names.

    Args:
        loose: allow other words before, as in "ISIC2018_Task1_Training_GroundTruth".
    """
    if split := SPLITS.get(name.lower()):
        return split, ""
    if name in NNUNET_FOLDERS:
        return NNUNET_FOLDERS[name]
    for role, pattern in FOLDERS:
        if match := pattern.fullmatch(name):
            return SPLITS[(match[1] or match[2]).lower()] if match[1] or match[2] else "", role
    before, _, last = name.rpartition("_")
    if loose and before and (ending := folder_role(last)) and ending[1]:
        splits = {SPLITS[word] for word in re.split(r"[\W_]+", before.lower()) if word in SPLITS}
        return "".join(splits) if len(splits) < 2 else "", ending[1]
    return None
