"""The source distribution and the wheel contain what they should, and nothing else."""

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "triptych"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, built from a copy of the sources; the wheel from the source distribution."""
    out = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(out),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def sources() -> set[str]:
    """Files of the package in the work tree, relative to `src`."""
    paths = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(PACKAGE.parent)) for path in paths}


def test_the_wheel_has_the_package_with_its_assets_and_licenses(built):
    (path,) = built.glob("*.whl")
    assert path.name.startswith("triptych-0.1.0-py3-none-any")
    with zipfile.ZipFile(path) as wheel:
        names = {info.filename for info in wheel.infolist() if not info.is_dir()}
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        message = message_from_bytes(wheel.read(metadata))
        entry_points = wheel.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert {name for name in names if ".dist-info/" not in name} == sources()
    licenses = {name.rpartition("/")[2] for name in names if "/licenses/" in name}
    assert licenses == {"LICENSE", "NOTICE"}
    assert "triptych = triptych.cli:main" in entry_points
    assert message["Author"] == "The Triptych developers"
    assert message["License-Expression"] == "Apache-2.0"
    assert {"test", "docs", "track", "int8"} <= set(message.get_all("Provides-Extra"))
    assert path.stat().st_size < 60_000_000


def test_the_source_distribution_has_what_the_tests_need(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    needed = (
        "README.md",
        "LICENSE",
        "NOTICE",
        "CITATION.cff",
        "SECURITY.md",
        "Makefile",
        "mkdocs.yml",
        ".ci/run",
    )
    assert set(needed) <= names
    assert {f"src/{name}" for name in sources()} <= names
    for folder in ("docs", "tests", "tools"):
        files = [
            path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        assert {str(path.relative_to(ROOT)) for path in files} <= names, folder
    assert not [
        name for name in names if "__pycache__" in name or name.startswith((".venv", "site/", "runs/"))
    ]
