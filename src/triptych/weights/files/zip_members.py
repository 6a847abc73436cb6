"""Locations of the members of a zip archive. PyTorch's and NumPy's checkpoints are zips."""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

from triptych.weights.files.tensor_entry import DamagedFileError

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of the name and of the extra field


@dataclass(frozen=True)
class Member:
    """A file in a zip archive."""

    name: str
    offset: int
    """Position of the first byte of its data in the archive; meaningless if it is compressed."""
    size: int
    """Number of bytes after unpacking."""
    compressed: bool


def list_members(path: Path) -> list[Member]:
    """Return the members of an archive, after checking their locations against the length of the file.

    Raises:
        DamagedFileError: the file is no zip, has two members of one name, a member without a name or encrypted, or one
            that extends past the end of the file.
    """
    length = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as problem:
        raise DamagedFileError(f"the archive is damaged or cut short ({problem})") from problem
    members, seen = [], set()
    with path.open("rb") as file:
        for info in infos:
            if info.filename in seen:
                raise DamagedFileError(f"it contains {info.filename} twice")
            if not info.filename:
                raise DamagedFileError("it contains a member without a name")
            if info.flag_bits & 1:
                raise DamagedFileError(f"{info.filename} is encrypted")
            seen.add(info.filename)
            file.seek(info.header_offset)
            raw = file.read(_LOCAL_HEADER.size)
            if len(raw) < _LOCAL_HEADER.size:
                raise DamagedFileError(f"{info.filename} lies past the end of the file")
            signature, name, extra = _LOCAL_HEADER.unpack(raw)
            offset = info.header_offset + _LOCAL_HEADER.size + name + extra
            if signature != b"PK\x03\x04" or offset + info.compress_size > length:
                raise DamagedFileError(
                    f"{info.filename} lies past the end of the file or its header is damaged"
                )
            compressed = info.compress_type != zipfile.ZIP_STORED
            if not compressed and info.compress_size != info.file_size:
                raise DamagedFileError(f"{info.filename} gives two lengths")
            members.append(Member(info.filename, offset, info.file_size, compressed))
    return members
