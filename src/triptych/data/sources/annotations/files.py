"""What the readers of annotation files share: finding json files and images."""

import json
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from triptych.data.sources.folders import ID_COLUMN, find_images, list_visible, make_table
from triptych.errors import DataError

HEAD = 65_536  # bytes of a json file that are looked at before it is read
FEW_ENTRIES, FEW_SUBFOLDERS = 5000, 200  # that are looked at where listing all would take long


def starts_with_key(file: Path, keys: tuple[str, ...]) -> bool:
    """Return whether a json file is an object whose first key is one of `keys`."""
    try:
        with open(file, "rb") as content:
            head = content.read(HEAD).decode("utf-8-sig", "replace")
    except OSError as problem:
        raise DataError(f"{file} cannot be read ({problem.strerror}); check its permissions") from problem
    return re.match(rf'\s*\{{\s*"({"|".join(keys)})"\s*:', head) is not None


def parse_json(file: Path) -> Any:
    """Read a json file.

    Raises:
        DataError: it is damaged.
    """
    try:
        return json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as problem:
        raise DataError(f"{file} cannot be read ({problem}); repair it") from problem


def json_files(folder: Path) -> Iterator[Path]:
    """Yield the json files in a folder, among the first of its entries."""
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, FEW_ENTRIES):
                if (
                    entry.name.lower().endswith(".json")
                    and not entry.name.startswith(".")
                    and entry.is_file()
                ):
                    yield Path(entry.path)
    except OSError as problem:
        raise DataError(f"{folder} cannot be read ({problem.strerror}); check its permissions") from problem


def nearby_folders(folder: Path) -> list[Path]:
    """Return a folder, its first subfolders and theirs."""
    below = [path for path in islice(list_visible(folder), FEW_SUBFOLDERS) if path.is_dir()]
    deeper = [path for top in below for path in islice(list_visible(top), FEW_SUBFOLDERS) if path.is_dir()]
    return [folder, *below, *deeper[:FEW_SUBFOLDERS]]


class ImageFinder:
    """Finds the images that annotation files name.

    Args:
        folders: folders that paths may be relative to, the likeliest first.
        root: folder that is searched for the name of the file otherwise.
    """

    def __init__(self, folders: list[Path], root: Path):
        self.folders, self.root = folders, root
        self._by_name: dict[str, list[str]] | None = None

    def find(self, name: str) -> Path | None:
        """Return the path of an image; None if there is none, or several files have its name."""
        relative = name.replace("\\", "/")
        for folder in self.folders:
            if (path := folder / relative).is_file():
                return path
        if self._by_name is None:
            self._by_name = {}
            for path, parts in find_images(self.root):
                self._by_name.setdefault(parts[-1], []).append(path)
        matches = self._by_name.get(Path(relative).name, [])
        return Path(matches[0]) if len(matches) == 1 else None


def make_mask_table(images: list[Path], masks: list[bytes], root: Path, *, masked: bool = True) -> Any:
    """Create the table of images and the descriptions of their masks.

    Args:
        images: path of each image.
        masks: description of each mask.
        root: folder of the data, which the names of examples are relative to.
        masked: add the masks; False for a split without annotations.
    """
    columns: dict[str, list[Any]] = {
        "image": [str(path) for path in images],
        ID_COLUMN: [os.path.relpath(path, root) for path in images],
    }
    if masked:
        columns["mask"] = [{"bytes": mask, "path": None} for mask in masks]
    return make_table(columns, masks="mask" if masked else None)
