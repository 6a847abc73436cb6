"""The suite with its quick plan, whose measurements are meaningless but must exist."""

import json

import numpy as np
import pytest

from triptych.bench.suites import approximate
from triptych.cli import main


def test_passes_are_compared_with_exact_ones():
    for table in (approximate.steps(approximate.QUICK), approximate.decoding(approximate.QUICK)):
        assert table.rows[0]["ratio"].median == 1
        assert all(row["seconds"].low > 0 for row in table.rows)


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    assert main(["bench", "approximate", "--quick", "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "benchmarks.json").read_text())["approximate"] == printed
    names = [[row["what"] for row in table["rows"]] for table in printed["tables"]]
    assert names == [
        ["exact", "merged tokens, 0.5", "deep cache, 2"],
        ["exact", "tiny decoder, taesd"],
        ["exact", "merged tokens, 0.5", "deep cache, 2", "guidance interval, 0.3 to 5.5"],
    ]
    for table in printed["tables"]:
        assert all(row["seconds"]["low"] > 0 and row["ratio"]["low"] > 0 for row in table["rows"])
        assert table["rows"][0]["ratio"]["median"] == 1
    exact, *others = printed["tables"][2]["rows"]
    assert exact["apart"]["high"] == 0  # generated twice
    assert all(row["apart"]["median"] > 0 and row["psnr"]["median"] < 99 for row in others[:2])


def test_psnr_is_its_definition():
    a = np.zeros((2, 2))
    assert approximate.psnr(a, a) == 99
    assert approximate.psnr(a, a + 255) == pytest.approx(0)
    assert approximate.psnr(a, a + 2.55) == pytest.approx(40)
