"""Where the members of a zip archive lie, for the two kinds of checkpoint that are zips."""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

from triptych.weights.files.tensor_entry import Broken

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of the name and of the extra field


@dataclass(frozen=True)
class Member:
    """A file inside the archive."""

    name: str
    offset: int
    """First byte of its data in the archive (meaningless if compressed)."""
    size: int
    """Bytes after unpacking."""
    compressed: bool


def open_zip(path: Path) -> list[Member]:
    """The members of an archive, their places checked against the file's length.

    Raises:
        Broken: no zip, two members of one name, an encrypted member, or one that reaches past the end.
    """
    length = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as problem:
        raise Broken(f"the archive is damaged or cut short ({problem})") from problem
    members, seen = [], set()
    with path.open("rb") as file:
        for info in infos:
            if info.filename in seen:
                raise Broken(f"it holds {info.filename} twice")
            if info.flag_bits & 1:
                raise Broken(f"{info.filename} is encrypted")
            seen.add(info.filename)
            file.seek(info.header_offset)
            raw = file.read(_LOCAL_HEADER.size)
            if len(raw) < _LOCAL_HEADER.size:
                raise Broken(f"{info.filename} lies past the end of the file")
            signature, name, extra = _LOCAL_HEADER.unpack(raw)
            offset = info.header_offset + _LOCAL_HEADER.size + name + extra
            if signature != b"PK\x03\x04" or offset + info.compress_size > length:
                raise Broken(f"{info.filename} lies past the end of the file or its header is damaged")
            compressed = info.compress_type != zipfile.ZIP_STORED
            if not compressed and info.compress_size != info.file_size:
                raise Broken(f"{info.filename} gives two lengths")
            members.append(Member(info.filename, offset, info.file_size, compressed))
    return members
