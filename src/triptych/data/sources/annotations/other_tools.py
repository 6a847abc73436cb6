"""Recognize annotation files of programs whose formats are not read, and say what to export instead."""

import logging
import re
from pathlib import Path

from triptych.data.sources.folders import list_visible

log = logging.getLogger(__name__)

HEAD = 20_000  # bytes of a file that are looked at
LOOKED_AT = 20  # files and folders of each level
# Program, suffix, what the beginning of a file contains, and what to export.
FORMATS = (
    ("VGG VIA", (".json",), re.compile(r'"shape_attributes"|"_via_'), "COCO"),
    ("Label Studio", (".json",), re.compile(r'"(?:polygon|brush|rectangle|keypoint)?labels"|"from_name"'), "COCO"),
    ("Supervisely", (".json",), re.compile(r'"classTitle"|"geometryType"'), "COCO, or masks"),
    ("Labelbox", (".json", ".ndjson"), re.compile(r'"data_row"|"Labeled Data"'), "masks"),
    ("CVAT for images", (".xml",), re.compile(r"<image [^>]*>\s*<(?:polygon|mask|box|polyline)\b"), "COCO 1.0"),
    ("PASCAL VOC boxes", (".xml",), re.compile(r"<bndbox>"), "masks: boxes outline no shapes"),
    ("VGG VIA", (".csv",), re.compile(r"region_shape_attributes"), "COCO"),
    ("run lengths in a table", (".csv",), re.compile(r"\b(?:rle_mask|EncodedPixels|segmentation)\b"), "PNG masks"),
)  # fmt: skip


def report_unread(folder: Path) -> None:
    """Log annotation files in a folder, or in folders up to two below, that are not read."""
    places = [folder]
    for _ in range(2):
        below = [path for place in places for path in list_visible(place)[:LOOKED_AT] if path.is_dir()]
        places += [path for path in below if path not in places][:LOOKED_AT]
    for place in places:
        files = [
            path
            for path in list_visible(place)
            if path.suffix.lower() in (".json", ".ndjson", ".xml", ".csv")
        ]
        for file in files[:LOOKED_AT]:
            if unread := _format_of(file):
                program, export = unread
                log.warning(
                    "%s holds annotations that are not read (%s): there are no masks; for segmentation export %s",
                    file,
                    program,
                    export,
                )
                return


def _format_of(file: Path) -> tuple[str, str] | None:
    try:
        with open(file, encoding="utf-8", errors="replace") as text:
            head = text.read(HEAD)
    except OSError:
        return None
    for program, suffixes, pattern, export in FORMATS:
        if file.suffix.lower() in suffixes and pattern.search(head):
            return program, export
    return None
