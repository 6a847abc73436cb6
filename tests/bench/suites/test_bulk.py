"""The tables of the suite, with programs replaced; `triptych bench bulk --quick` tests the programs."""

import pytest

from triptych.bench.harness.report import markdown
from triptych.bench.harness.subprocesses import FinishedProcess
from triptych.bench.harness.timing import UnequalError
from triptych.bench.peers import build as peers
from triptych.bench.suites import bulk
from triptych.data.images import decode


@pytest.fixture
def programs(monkeypatch):
    """Replace programs by reports of 12 ms per image for a folder, and of 10 and 8 ms for the network before and after;
    return the calls."""
    calls = []

    def run_child(program, *arguments):
        calls.append((program, [str(argument) for argument in arguments]))
        reported = {"seconds": 0.012, "before": 2**20, "peak": 3 * 2**20}
        if program == "folder_ours":
            reported |= {"network": [0.01, 0.008], "private": 2**21, "count": int(arguments[6])}
        return FinishedProcess(1.0, reported | {"first": [{"a": 0.75, "b": 0.25}]})

    monkeypatch.setattr(bulk, "run_child", run_child)
    monkeypatch.setattr(peers, "present", lambda names: (names, []))
    return calls


def test_every_run_of_the_plan_is_a_row(programs):
    report = bulk.run(bulk.QUICK)
    classified, segmented, compared, generated = report.tables
    assert [(row["count"], row["workers"]) for row in classified.rows] == [(40, 0), (40, 1)]
    assert [(row["count"], row["workers"]) for row in segmented.rows] == [(8, 1)]
    assert classified.rows[0]["private"] is None
    assert classified.rows[1]["private"] == 2
    assert classified.rows[1]["folder"] == pytest.approx(1 / 0.012)
    assert classified.rows[1]["ratio"].low == pytest.approx(8 / 12)
    assert classified.rows[1]["ratio"].high == pytest.approx(10 / 12)
    assert (classified.rows[1]["peak"], classified.rows[1]["grown"]) == (3, 2)
    assert [row["ratio"] for row in compared.rows] == [1.0, 1.0]
    assert [(row["count"], row["batch"]) for row in generated.rows] == [(2, 2)]
    for table in report.tables:
        assert {column.key for column in table.columns} == set(table.rows[0])
    assert "### Generating many images" in markdown(report.as_json())
    assert len(programs) == 3 + 2 * 2 + 1


def test_different_probabilities_are_reported():
    ours = [{"a": 0.7, "b": 0.3}]
    bulk.check_first(ours, [{"b": 0.3, "a": 0.7}], 1e-3)
    for theirs in ({"a": 0.3, "b": 0.7}, {"b": 0.9}):
        with pytest.raises(UnequalError):
            bulk.check_first(ours, [theirs], 1e-3)


def test_a_missing_result_is_reported(programs, monkeypatch, tmp_path):
    monkeypatch.setattr(bulk, "run_child", lambda *_: FinishedProcess(1.0, {"count": 7}))
    with pytest.raises(RuntimeError, match="7 results for 8 images"):
        bulk.folders("classify", "vit-emoji", tmp_path, tmp_path, 4, 0, 8, bulk.QUICK)


def test_images_are_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bulk, "FOLDER", 3)
    bulk.make(tmp_path, 4)
    (tmp_path / "0000" / "0000001.png").write_bytes(b"unchanged")
    bulk.make(tmp_path, 8)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert [file[:12] for file in files] == [f"{i // 3:04d}/{i:07d}" for i in range(8)]
    assert (tmp_path / "0000" / "0000001.png").read_bytes() == b"unchanged"
    assert decode(tmp_path / "0002" / "0000006.jpg").shape == (bulk.SIDE, bulk.SIDE, 3)
