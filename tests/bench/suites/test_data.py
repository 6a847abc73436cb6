"""The contents of the synthetic data sets, and the columns of the suite's table with its quick plan."""

import json

import pytest

from triptych.bench.suites import data
from triptych.data.images import decode
from triptych.data.open import open_source


@pytest.mark.parametrize("layout", ["parquet", "tar", "folder"])
def test_data_sets(layout, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "GROUP", 100)
    monkeypatch.setattr(data, "SHARD", 100)
    getattr(data, f"make_{layout}")(tmp_path / "set", 270)
    source = open_source(tmp_path / "set", stream=True)
    assert len(source) == 270
    assert len(source.classes) == data.CLASSES
    order = (
        [row for label in range(100) for row in range(label, 270, 100)] if layout == "folder" else range(270)
    )
    assert [source[i].label for i in range(270)] == [row % 100 for row in order]
    assert [decode(source[i].image)[0, 0, 0] for i in range(0, 270, 50)] == [
        list(order)[i] % 256 for i in range(0, 270, 50)
    ]


@pytest.mark.slow
def test_the_suite():
    (table,) = data.run(data.QUICK).tables
    assert [row["count"] for row in table.rows] == [300, 600, 300, 300]
    assert [row["format"] for row in table.rows] == ["parquet", "parquet", "tar", "folder"]
    assert [row["table"] is None for row in table.rows] == [False, True, False, False]
    assert all(set(row) == {column.key for column in table.columns} for row in table.rows)
    assert all(0 < row["grown"] < row["making"] + row["reading"] for row in table.rows)
    json.dumps(table.rows, allow_nan=False)
