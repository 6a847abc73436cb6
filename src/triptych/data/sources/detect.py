"""Detect the layout of a data set: the reader that it needs, and its splits."""

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from triptych.data.sources.annotations import coco, read_annotations
from triptych.data.sources.annotations.other_tools import report_unread
from triptych.data.sources.folders import list_visible, metadata_file, read_metadata
from triptych.data.sources.image_folders import read_images
from triptych.data.sources.mask_folders import dataset_root, read_pairs
from triptych.data.sources.parquet_and_hub import HUB_ID, read_hub, read_parquet, read_saved
from triptych.data.sources.splits import by_split_column, split_folders, split_of_file
from triptych.data.sources.tar import read_shards
from triptych.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Spec = str | os.PathLike[str]


class DataTables(NamedTuple):
    """The tables of a data set by split, and the classes of its masks if an annotation file names them."""

    splits: "dict[str, Dataset]"
    mask_classes: tuple[str, ...] | None = None


def read_tables(spec: Spec, image_column: str | None, mask_column: str | None = None) -> DataTables:
    """Read the tables of a data set by split. Data without splits has one, named "".

    Args:
        spec: as in `triptych.data.open.open_source`, except for built-in data.
        image_column, mask_column: names of the columns, where the user has given them.

    Raises:
        DataError: the data does not exist, or its layout is unknown.
    """
    path = Path(spec).expanduser().absolute()
    if path.is_dir():
        folder = dataset_root(path)
        if _has_only_files(folder):
            if pairs := read_pairs(folder):
                return DataTables(pairs)
            if annotated := read_annotations(folder):
                return DataTables(annotated.splits, annotated.classes)
            report_unread(folder)
        return DataTables(_read_folder(folder, image_column, mask_column, path))
    if path.is_file() and path.suffix.lower() == ".json":
        annotated = coco.read_file(path)
        return DataTables(annotated.splits, annotated.classes)
    return DataTables(_read_other(path, spec, image_column, mask_column))


def _read_other(
    path: Path, spec: Spec, image_column: str | None, mask_column: str | None
) -> "dict[str, Dataset]":
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return {"": read_parquet([path])}
        if path.suffix.lower() in (".jsonl", ".csv"):
            return by_split_column(read_metadata(path, mask_column=mask_column))
        if ".tar" in path.suffixes or path.suffix == ".tgz":
            return {"": read_shards([path], image_column, mask_column)}
        raise DataError(
            f"{path} is a file of unknown type; give a folder, or a .tar, .parquet, .jsonl, .csv or COCO .json "
            "file"
        )
    if matches := [Path(name) for name in sorted(glob.glob(str(path)))] if glob.has_magic(str(path)) else []:
        return _read_files(matches, image_column, mask_column)
    if HUB_ID.fullmatch(os.fspath(spec)):
        return read_hub(os.fspath(spec))
    raise DataError(
        f"{os.fspath(spec)} does not exist; give a folder of images, or a hub id such as org/name"
    )


def _read_folder(
    folder: Path, image_column: str | None, mask_column: str | None, top: Path
) -> "dict[str, Dataset]":
    if _is_saved(folder):
        return read_saved(folder)
    splits = split_folders(folder) or {"": folder}
    images: dict[str, Path] = {}
    tables: dict[str, Any] = {}
    above = [place for place in folder.parents if place == top or top in place.parents]
    for split, below in splits.items():
        if metadata := metadata_file(below):
            tables[split] = read_metadata(metadata, f"{below.name}/" if split else "", mask_column)
        elif files := data_files(below):
            read = _read_files(files, image_column, mask_column)
            if split:
                tables[split] = next(iter(read.values()))
            else:
                tables.update(read)
        else:
            images[split] = below
    tables.update(read_images(images, [folder, *above]) if images else {})
    return by_split_column(tables[""]) if tables.keys() == {""} else tables


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _has_only_files(folder: Path) -> bool:
    """Return whether a folder holds images and annotations as files of their own: no tables and no shards."""
    return not (_is_saved(folder) or metadata_file(folder) or data_files(folder))


def data_files(folder: Path) -> list[Path]:
    """Return the tar shards or parquet files in a folder, or in its subfolder data/, as in repositories of the hub."""
    for place in (folder, folder / "data"):
        files = [path for path in list_visible(place) if path.is_file()] if place.is_dir() else []
        for suffix in (".parquet", ".tar"):
            if matches := [path for path in files if path.suffix.lower() == suffix]:
                return matches
    return []


def group_by_split(files: list[Path]) -> tuple[str, dict[str, list[Path]]]:
    """Group tar shards or parquet files by split.

    Returns:
        The suffix of the files, and the files by split; one split named "" unless each file name begins with that of a
        split, as in train-00000-of-00002.parquet.

    Raises:
        DataError: files with different suffixes.
    """
    suffixes = {path.suffix.lower() for path in files}
    if suffixes not in ({".tar"}, {".parquet"}):
        raise DataError(
            f"{files[0]} and the files with it end in {', '.join(sorted(suffixes))}; use only .tar or only .parquet"
        )
    groups: dict[str, list[Path]] = {}
    for path in files:
        groups.setdefault(split_of_file(path), []).append(path)
    return suffixes.pop(), {"": files} if "" in groups else groups


def _read_files(files: list[Path], image_column: str | None, mask_column: str | None) -> "dict[str, Dataset]":
    suffix, groups = group_by_split(files)
    if suffix == ".parquet":
        return {split: read_parquet(paths) for split, paths in groups.items()}
    return {split: read_shards(paths, image_column, mask_column) for split, paths in groups.items()}
