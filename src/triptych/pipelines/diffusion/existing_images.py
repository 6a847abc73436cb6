"""Which pictures are there already, made in just one way."""

import json
import logging
import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from triptych.config import to_json
from triptych.errors import UserError
from triptych.pipelines.diffusion import image_metadata
from triptych.pipelines.diffusion.settings import Settings


def made_in(out: str | os.PathLike[str]) -> frozenset[int]:
    """The ways in which pictures were made that are in a folder, or in a .png file and those beside it that have a seed
    behind its name; to be asked of `among`. What is no picture of ours is passed over, and so are those of which not
    all steps were done.
    """
    out = Path(out)
    if out.suffix and not out.is_dir():
        named = re.compile(re.escape(out.stem) + r"(-\d+)?" + re.escape(out.suffix))
        files = [file for file in out.parent.glob("*") if named.fullmatch(file.name)]
    else:
        files = list(out.glob("*.png"))
    ways = set()
    quiet = logging.getLogger(image_metadata.__name__)
    before, quiet.disabled = quiet.disabled, True  # of foreign pictures it would say what it cannot read
    try:
        for file in files:
            try:
                ways.add(_way(image_metadata.read(file)))
            except UserError:
                continue
    finally:
        quiet.disabled = before
    return frozenset(ways)


def among(settings: Settings, made: Collection[int]) -> bool:
    """Whether a picture of these settings, complete, is one of those."""
    return bool(made) and _way(settings) in made


def _way(settings: Settings) -> int:
    """A number for all that a picture's pixels come from: the model by its weights, wherever it lies."""
    plain = replace(settings, model="", model_hash="", made_by="", class_name=None)
    return hash(json.dumps(to_json(plain), sort_keys=True))
