"""What the tests of sources share: pictures of 5 x 4 whose red is their number, and the containers they lie in."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from triptych.data.images import decode
from triptych.data.open import open_source
from triptych.errors import UserError


@pytest.fixture
def png():
    """Makes the bytes of picture `value`."""
    return _png


@pytest.fixture
def put():
    """Writes picture `value` to a path, and returns the path."""
    return _put


@pytest.fixture
def values():
    """The red of each picture of a source, decoded."""
    return lambda source: [int(decode(source[i].image)[0, 0, 0]) for i in range(len(source))]


@pytest.fixture
def refusal():
    """Opens a source that cannot be opened, and returns what the user is told."""

    def refused(*args, **options) -> str:
        with pytest.raises(UserError) as caught:
            open_source(*args, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


@pytest.fixture
def metadata():
    """Writes a metadata file and the pictures that it names, and returns their folder."""

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
    """Writes a tar of files by name, and returns its path."""

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
    """Writes a parquet file of columns by name, and returns its path."""

    def write(path: Path, columns: dict) -> Path:
        import pyarrow
        import pyarrow.parquet

        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path

    return write


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    """A cache of `datasets` that nobody else uses, and no hub."""
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
