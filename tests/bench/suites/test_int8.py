"""The suite with its quick plan, whose measurements are meaningless but must exist."""

import pytest

pytest.importorskip("torchao")

from triptych.bench.suites import int8


def test_speed_and_accuracy():
    speed, accuracy = int8.speed(int8.QUICK), int8.accuracy(int8.QUICK)
    assert [row["what"] for row in speed.rows] == ["bf16", "fp32", "bf16, int8", "bf16, int8-dynamic"]
    assert all(row["seconds"].low > 0 and row["ratio"].low > 0 for row in speed.rows)
    sizes = {row["what"]: row["megabytes"] for row in speed.rows}
    assert sizes["bf16, int8"] < sizes["bf16"] == sizes["fp32"] / 2
    exact, *others = accuracy.rows
    assert (exact["apart"], exact["same"]) == (0, 1)
    assert all(0 < row["apart"] < 0.2 and row["megabytes"] < exact["megabytes"] / 2 for row in others)
