"""Find images that were already generated with the same settings, so that a run can be resumed."""

import json
import logging
import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from triptych.config import to_json
from triptych.errors import TriptychError
from triptych.pipelines.diffusion import image_metadata
from triptych.pipelines.diffusion.options import GenerationRecord


def existing_images(out: str | os.PathLike[str]) -> frozenset[int]:
    """Return keys of the images in a folder, or of a .png file and the files of the same name with a seed appended.

    Images without Triptych's metadata, and those of canceled runs, are left out. See `already_generated`.
    """
    out = Path(out)
    if out.suffix and not out.is_dir():
        pattern = re.compile(re.escape(out.stem) + r"(-\d+)?" + re.escape(out.suffix))
        files = [file for file in out.parent.glob("*") if pattern.fullmatch(file.name)]
    else:
        files = list(out.glob("*.png"))
    keys = set()
    reader_log = logging.getLogger(image_metadata.__name__)
    disabled, reader_log.disabled = (
        reader_log.disabled,
        True,
    )  # parsing logs warnings for images of other programs
    try:
        for file in files:
            try:
                keys.add(_key(image_metadata.read(file)))
            except TriptychError:
                continue
    finally:
        reader_log.disabled = disabled
    return frozenset(keys)


def already_generated(record: GenerationRecord, existing: Collection[int]) -> bool:
    """Return whether an image of a complete record is among `existing_images`."""
    return bool(existing) and _key(record) in existing


def _key(record: GenerationRecord) -> int:
    """Return a hash of everything that the pixels depend on; weights, not a path, identify the model."""
    plain = replace(record, model="", model_hash="", software="", class_name=None)
    return hash(json.dumps(to_json(plain), sort_keys=True))
