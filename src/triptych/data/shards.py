"""Tar shards in the webdataset layout: files that share a name up to its first dot are one example.

The shards are read once for where each picture lies, and pictures are read from there when they are asked
for. `datasets` has a reader too, but it copies every byte to its cache, wants the same suffixes throughout a
set, and stops at the first surprise; here .jpg beside .png is fine and the table is all that is kept.
"""

import json
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.data.folders import ID, SUFFIXES, table
from triptych.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

TEXT = ("txt", "text", "caption")
NUMBER = ("cls", "cls2", "index")
SMALL = 1 << 20  # bytes; labels and captions are smaller


def read_shards(
    shards: list[Path], image_field: str | None = None, mask_field: str | None = None
) -> "Dataset":
    """The table of some shards: "image" says where the bytes lie; .cls, .txt and .json become columns.

    The top-level values of a .json are columns by their own names.

    Args:
        shards: uncompressed tar files.
        image_field: which file of an example is the picture, "jpg" or "seg.png", where there are several.
        mask_field: which file of an example is the mask, "seg.png".

    Raises:
        UserError: a damaged, compressed or foreign shard, no pictures, unreadable labels.
    """
    examples: list[dict[str, Any]] = []
    for shard in shards:
        examples.extend(_examples(shard, image_field, mask_field))
    if not examples:
        raise UserError(
            f"{shards[0]} holds no images; a shard holds key.jpg beside key.cls, key.txt or key.json"
        )
    names = dict.fromkeys(name for example in examples for name in example)
    masks = mask_field if mask_field in names else None
    return table({name: [example.get(name) for example in examples] for name in names}, masks=masks)


def _examples(shard: Path, image_field: str | None, mask_field: str | None) -> list[dict[str, Any]]:
    if not shard.is_file():
        raise UserError(f"{shard} does not exist; check the path")
    examples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile():
                    _add(examples, shard, tar, member, image_field, mask_field)
    except (tarfile.TarError, OSError) as problem:
        raise UserError(
            f"{shard} is no intact uncompressed tar ({problem}); copy or unpack it again"
        ) from problem
    return [example for example in examples.values() if "image" in example]


def _add(
    examples: dict[str, dict[str, Any]],
    shard: Path,
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    image_field: str | None,
    mask_field: str | None,
) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, _, field = name.partition(".")
    if not stem or not field:
        return
    suffix = field.rpartition(".")[2].lower()
    key = f"{shard.name}/{folder + '/' if folder else ''}{stem}"
    example = examples.setdefault(key, {ID: key})
    place = f"{shard}{MARK}{member.offset_data}+{member.size}"
    if field == mask_field:
        example[field] = place
    elif f".{suffix}" in SUFFIXES if image_field is None else field == image_field:
        if "image" in example:
            raise UserError(
                f"{key} in {shard} has several images; name the one to use, such as image_column={field}"
            )
        example["image"] = place
    elif suffix in (*TEXT, *NUMBER, "json") and member.size <= SMALL:
        file = tar.extractfile(member)
        content = file.read() if file is not None else b""
        try:
            example.update(_values(field, suffix, content.decode()))
        except ValueError as problem:
            raise UserError(f"{member.name} in {shard} cannot be read ({problem}); repair it") from problem


def _values(field: str, suffix: str, content: str) -> dict[str, Any]:
    if suffix in NUMBER:
        return {field: int(content)}
    if suffix in TEXT:
        return {field: content.strip()}
    values = json.loads(content)
    if not isinstance(values, dict):
        return {field: values}
    taken = (ID, "image")
    return {
        name: value for name, value in values.items() if isinstance(value, str | int) and name not in taken
    }


MARK = "::tar@"


def read_member(place: str) -> bytes:
    """The bytes at a place that `read_shards` noted.

    Raises:
        UserError: the shard is gone or shorter than it was.
    """
    shard, _, where = place.rpartition(MARK)
    offset, size = map(int, where.split("+"))
    try:
        with open(shard, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as problem:
        raise UserError(f"{shard} cannot be read ({problem.strerror}); it was there before") from problem
    if len(content) < size:
        raise UserError(f"{shard} has become shorter since it was opened; start again")
    return content
