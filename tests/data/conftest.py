"""Fixtures for the tests of sources: images of 5 x 4 pixels whose red channel is their number, and files with them."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from triptych.data.images import decode
from triptych.data.open import open_source
from triptych.errors import TriptychError


@pytest.fixture
def png():
    """Return the bytes of image `value`."""
    return _png


@pytest.fixture
def put():
    """Write image `value` to a path; return the path."""
    return _put


@pytest.fixture
def values():
    """Return the red channel of each decoded image of a source."""
    return lambda source: [int(decode(source[i].image)[0, 0, 0]) for i in range(len(source))]


@pytest.fixture
def refusal():
    """Open a source that cannot be opened; return the error message."""

    def refused(*args, **options) -> str:
        with pytest.raises(TriptychError) as caught:
            open_source(*args, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


@pytest.fixture
def metadata():
    """Write a metadata file and the images that it lists; return their folder."""

    def write(folder: Path, rows: list[dict], name: str = "metadata.jsonl") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if name.endswith("csv"):
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        else:
            lines = [json.dumps(row) for row in rows]
        (folder / name).write_text("\n".join(lines) + "\n")
        for number, row in enumerate(rows):
            if row.get("file_name"):
                _put(folder / str(row["file_name"]), number)
        return folder

    return write


@pytest.fixture
def shard():
    """Write a tar file with the given files; return its path."""

    def write(path: Path, files: dict[str, bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return path

    return write


@pytest.fixture
def parquet():
    """Write a parquet file with the given columns; return its path."""

    def write(path: Path, columns: dict) -> Path:
        import pyarrow
        import pyarrow.parquet

        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path

    return write


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    """Give `datasets` an empty cache and an unreachable hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")


def _png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def _put(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_png(value))
    return path
