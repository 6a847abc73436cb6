"""Read annotation files that describe masks by shapes: COCO json, YOLO segmentation text, labelme json."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset


class AnnotatedTables(NamedTuple):
    """Tables by split, whose column "mask" holds descriptions (`triptych.data.drawn_masks`), and the mask classes."""

    splits: "dict[str, Dataset]"
    classes: tuple[str, ...]


def find_annotations(folder: Path) -> str | None:
    """Return the name of the format of a folder's annotation files; None if there are none."""
    from triptych.data.sources.annotations import coco, labelme, yolo

    formats = {"COCO": coco, "YOLO": yolo, "labelme": labelme}
    return next((name for name, module in formats.items() if module.find(folder)), None)


def read_annotations(folder: Path) -> AnnotatedTables | None:
    """Read a folder of images and annotation files; None if it has another layout, or its annotations are boxes.

    Raises:
        DataError: a file is damaged or malformed, or an image is missing.
    """
    from triptych.data.sources.annotations import coco, labelme, yolo

    return coco.read(folder) or yolo.read(folder) or labelme.read(folder)
