"""Damaged files of every kind are read or refused, see `tools/fuzz_readers.py`."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def fuzz_readers():
    spec = importlib.util.spec_from_file_location(
        "fuzz_readers", Path(__file__).parents[1] / "tools/fuzz_readers.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_damaged_files_are_read_or_refused(fuzz_readers, tmp_path):
    assert fuzz_readers.fuzz(200, seed=0, names=[], root=tmp_path) == []


def test_a_failure_is_reported(fuzz_readers, tmp_path):
    (tmp_path / "file").write_bytes(b"x")

    def read(path):
        raise KeyError("w")

    assert "KeyError: 'w'" in fuzz_readers.attempt(fuzz_readers.one_file(tmp_path / "file", read), 1)

    def grow(path):
        return bytearray(200 * 2**20).count(0)

    held = [np.ones(1000) for _ in range(40_000)]  # free memory of the process, as earlier tests leave it
    del held
    fuzz_readers.release_memory()

    assert "MB for a file" in fuzz_readers.attempt(fuzz_readers.one_file(tmp_path / "file", grow), 1)
