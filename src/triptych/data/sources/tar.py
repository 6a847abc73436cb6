"""Read tar shards in the webdataset layout, in which the files of an example share their name up to the first dot.

The headers of a shard are read once for the offset of each image, and an image is read from the shard when it is
needed. The reader of `datasets` copies all bytes to its cache, requires the same suffixes throughout a data set, and
stops at the first unexpected file; here suffixes may differ, and only the table is kept.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from triptych.data.disk_index import FileStamp
from triptych.data.example import SourceChangedError
from triptych.data.image_formats import KNOWN_SUFFIXES
from triptych.data.sources.folders import ID_COLUMN, make_table
from triptych.errors import DataError, TriptychError

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_SUFFIXES = ("txt", "text", "caption")
LABEL_SUFFIXES = ("cls", "cls2", "index")
MAX_VALUE_BYTES = 1 << 20  # largest file that is read as a label or caption


def read_shards(
    shards: list[Path], image_field: str | None = None, mask_field: str | None = None
) -> "Dataset":
    """Read shards as a table. Its column "image" holds the place of each image in its shard (see `read_member`); .cls
    and .txt files become columns, and so do the top-level values of .json files.

    Args:
        shards: uncompressed tar files.
        image_field: part of the name after the first dot of the files with images, such as "jpg" or "seg.png"; needed
            if examples have several images.
        mask_field: the same of the files with masks.

    Raises:
        DataError: a shard is damaged, compressed or not a tar file; there are no images, or several in an example; or
            labels cannot be read.
    """
    examples: list[dict[str, Any]] = []
    for shard in shards:
        examples.extend(_examples(shard, image_field, mask_field))
    if not examples:
        raise DataError(
            f"{shards[0]} holds no images; a shard needs files such as key.jpg with key.cls, key.txt or key.json"
        )
    names = dict.fromkeys(name for example in examples for name in example)
    masks = mask_field if mask_field in names else None
    return make_table({name: [example.get(name) for example in examples] for name in names}, masks=masks)


class TarMember(NamedTuple):
    """A file in a shard: its name, and the offset and size of its content in bytes."""

    name: str
    offset: int
    size: int


def iter_members(shard: Path) -> Iterator[TarMember]:
    """Yield the regular files of an uncompressed tar file. Only headers are read.

    Raises:
        DataError: the file is damaged, truncated, compressed, or not a tar file.
    """
    known = FileStamp.of(shard)
    archive = None
    at = 0
    try:
        with open(shard, "rb", buffering=1 << 16) as file:
            while True:
                file.seek(at)
                header = file.read(512)
                if len(header) < 512:
                    raise tarfile.ReadError("its end marker is missing, so it is probably truncated")
                if not header.strip(b"\0"):
                    return
                parsed = _parse_header(header)
                if (
                    parsed is None
                ):  # a folder, a link or a long name: rare, so left to the slower standard library
                    archive = archive or tarfile.open(shard, "r:")  # noqa: SIM115
                    member, after = _read_with_tarfile(archive, at)
                    if member is None:
                        raise tarfile.ReadError(f"its header at byte {at} is damaged")
                    plain, name, offset, size = (
                        member.isfile(),
                        member.name,
                        member.offset_data,
                        member.size,
                    )
                else:
                    plain, (name, size), offset = True, parsed, at + 512
                    after = offset + -(-size // 512) * 512
                if offset + size > known.size:
                    raise tarfile.ReadError(f"it is truncated within {name}")
                if plain:
                    yield TarMember(name, offset, size)
                at = after
    except (tarfile.TarError, OSError) as problem:
        raise DataError(
            f"{shard} is not an intact, uncompressed tar file ({problem}); copy or decompress it again"
        ) from problem
    finally:
        if archive is not None:
            archive.close()


def _parse_header(header: bytes) -> tuple[str, int] | None:
    """Return name and size of a regular file with a short name; None for other and damaged headers."""
    if header[156:157] not in (b"0", b"\0"):
        return None
    try:
        total = int(header[148:156].strip(b" \0"), 8)
        size = int(header[124:136].strip(b" \0"), 8)
        name = header[:100].partition(b"\0")[0].decode()
        if header[257:263] == b"ustar\0" and (prefix := header[345:500].partition(b"\0")[0]):
            name = f"{prefix.decode()}/{name}"
    except ValueError:
        return None
    return (
        (name, size) if total == sum(header) - sum(header[148:156]) + 256 and not name.endswith("/") else None
    )


def _read_with_tarfile(archive: Any, at: int) -> tuple[tarfile.TarInfo | None, int]:
    """Read the member at an offset with `tarfile`; return it, and the offset of the next header."""
    archive.firstmember, archive.offset = None, at
    archive.members.clear()  # it would keep all of them
    if at == 0:
        archive.fileobj.seek(0)
    return archive.next(), archive.offset


def _examples(shard: Path, image_field: str | None, mask_field: str | None) -> list[dict[str, Any]]:
    examples: dict[str, dict[str, Any]] = {}
    for member in iter_members(shard):
        _add(examples, shard, member, image_field, mask_field)
    return [example for example in examples.values() if "image" in example]


def _add(
    examples: dict[str, dict[str, Any]],
    shard: Path,
    member: TarMember,
    image_field: str | None,
    mask_field: str | None,
) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, _, field = name.partition(".")
    if not stem or not field:
        return
    suffix = field.rpartition(".")[2].lower()
    key = f"{shard.name}/{folder + '/' if folder else ''}{stem}"
    example = examples.setdefault(key, {ID_COLUMN: key})
    place = f"{shard}{MEMBER_MARK}{member.offset}+{member.size}"
    if field == mask_field:
        example[field] = place
    elif f".{suffix}" in KNOWN_SUFFIXES if image_field is None else field == image_field:
        if "image" in example:
            raise DataError(
                f"{key} in {shard} has several images; choose one, for example image_column={field}"
            )
        example["image"] = place
    elif suffix in (*TEXT_SUFFIXES, *LABEL_SUFFIXES, "json") and member.size <= MAX_VALUE_BYTES:
        try:
            example.update(parse_values(field, suffix, read_member(place).decode()))
        except TriptychError:
            raise
        except ValueError as problem:
            raise DataError(f"{member.name} in {shard} cannot be read ({problem}); repair it") from problem


def parse_values(field: str, suffix: str, content: str) -> dict[str, Any]:
    """Parse a file with labels or captions into values by column.

    Args:
        field: name of the file after its first dot.
        suffix: name of the file after its last dot, in lower case.
        content: text of the file.

    Raises:
        ValueError: the content cannot be parsed.
    """
    if suffix in LABEL_SUFFIXES:
        return {field: int(content)}
    if suffix in TEXT_SUFFIXES:
        return {field: content.strip()}
    values = json.loads(content)
    if not isinstance(values, dict):
        return {field: values}
    reserved = (ID_COLUMN, "image")
    return {
        name: value for name, value in values.items() if isinstance(value, str | int) and name not in reserved
    }


MEMBER_MARK = "::tar@"


def read_member(place: str) -> bytes:
    """Read the file at a place in a shard.

    Args:
        place: a value of the column "image" of `read_shards`: the path of the shard, offset and size.

    Raises:
        SourceChangedError: the shard is missing or has become shorter.
    """
    shard, _, where = place.rpartition(MEMBER_MARK)
    offset, size = map(int, where.split("+"))
    try:
        with open(shard, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as problem:
        raise SourceChangedError(
            f"{shard} cannot be read ({problem.strerror}); it could be read before"
        ) from problem
    if len(content) < size:
        raise SourceChangedError(f"{shard} has become shorter since it was opened; start again")
    return content
