"""Results as data and as a page."""

import json

import pytest

from triptych.bench.harness.report import Column, Report, Table, cell, grid, markdown, write
from triptych.bench.harness.timing import Spread


def make_report(suite="toy", value=2.0):
    columns = [Column(key="what", heading="what"), Column(key="speed", heading="a|b", form=".1f")]
    rows = [{"what": "x", "speed": Spread(value, 1.0, 3.0)}, {"what": "y", "speed": None}]
    table = Table(title="Speed", description="How fast.", columns=columns, rows=rows)
    return Report(
        suite=suite,
        command=f"triptych bench {suite}",
        machine={"cores": "2"},
        tables=[table],
        day="2000-01-01",
    )


@pytest.mark.parametrize(
    ("value", "form", "printed"),
    [
        (None, ".1f", "-"),
        ("words", ".1f", "words"),
        (0.256, ".0%", "26%"),
        (8, "d", "8"),
        (Spread(2.0, 1.0, 3.0), ".1f", "2.0 (1.0 to 3.0)"),
        (Spread(2.01, 2.0, 2.02), ".1f", "2.0"),
        ({"median": 5.0, "low": 4.0, "high": 6.0}, ".0f", "5 (4 to 6)"),
    ],
)
def test_cells(value, form, printed):
    assert cell(value, form) == printed


def test_grid_is_markdown_in_columns():
    assert grid(["name", "n"], [["a", "10"], ["b|c", "7"]], [False, True]) == [
        "| name |   n |",
        "| ---- | --: |",
        "| a    |  10 |",
        "| b\\|c |   7 |",
    ]


def test_section():
    report = make_report()
    report.notes.append("No peer.")
    page = markdown(report.as_json())
    assert page.startswith("## toy\n\nRepeat with `triptych bench toy`. Measured on 2000-01-01.\n")
    for line in (
        "No peer.",
        "### Speed",
        "| cores   | 2   |",
        "| x    | 2.0 (1.0 to 3.0) |",
        "| y    |                - |",
    ):
        assert line in page.splitlines()
    assert "a\\|b" in page


def test_a_suite_replaces_its_own_section_only(tmp_path):
    assert write(make_report("vit"), tmp_path) == [tmp_path / "benchmarks.json", tmp_path / "benchmarks.md"]
    write(make_report("swin"), tmp_path)
    write(make_report("vit", 2.5), tmp_path)
    data = json.loads((tmp_path / "benchmarks.json").read_text())
    assert set(data) == {"vit", "swin"}
    assert data["vit"]["tables"][0]["rows"][0]["speed"] == {"median": 2.5, "low": 1.0, "high": 3.0}
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.index("## swin") < page.index("## vit")
    assert page.count("2.5 (1.0 to 3.0)") == 1
    assert page.startswith("# Benchmarks\n")


def test_a_damaged_file_is_replaced(tmp_path):
    (tmp_path / "benchmarks.json").write_text("{")
    write(make_report(), tmp_path)
    assert set(json.loads((tmp_path / "benchmarks.json").read_text())) == {"toy"}
