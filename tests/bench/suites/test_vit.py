"""The suite with its quick plan, whose measurements are meaningless but must exist."""

import json
from dataclasses import replace

import pytest
import torch

from triptych.bench.harness import forward, machine, subprocesses
from triptych.bench.harness.cpu_contention import CpuContention
from triptych.bench.harness.timing import UnequalError
from triptych.bench.measurements.load_time import loading
from triptych.bench.peers import build as peers
from triptych.bench.suites import vit
from triptych.cli import main


def test_throughput_compared_with_transformers():
    table = vit.throughput(vit.QUICK, ("transformers",), {"fp32": 1e12, "bf16": 1e12})
    assert [(row["network"], row["dtype"], row["batch"]) for row in table.rows] == [
        ("vit-ti16", "fp32", 2),
        ("vit-ti16", "bf16", 2),
    ]
    for row in table.rows:
        assert row["ours"].low > 0
        assert row["ratio to transformers"].median > 0
        assert 0 < row["utilization"] < 1
        assert row["apart"] <= forward.TOLERANCES[row["dtype"]]
    assert {column.key for column in table.columns} == set(table.rows[0])


def test_another_network_is_refused():
    net = vit.make(vit.QUICK, "vit-ti16")
    theirs = peers.build(net, torch.float32, ("transformers",))
    net.norm.bias.data.add_(0.1)
    with pytest.raises(UnequalError, match="ours and transformers are"):
        forward.compare({"ours": net, **theirs}, vit.images(net, 2, torch.float32), 1e-5, vit.QUICK)


def test_ours_is_measured_without_another_library():
    plan = replace(vit.QUICK, peers=("no_such_library",))
    report = vit.run(plan, "triptych bench vit --quick")
    assert report.notes == ["no_such_library is not measured: No module named 'no_such_library'."]
    limits, images, loaded, started = report.tables
    assert [row["what"] for row in limits.rows] == [
        "matrix product, fp32",
        "matrix product, bf16",
        "copy of 4 MiB",
    ]
    assert [column.key for column in images.columns] == [
        "mode",
        "network",
        "dtype",
        "batch",
        "ours",
        "utilization",
        "apart",
        "others",
    ]
    assert [column.key for column in loaded.columns] == ["what", "ours"]
    assert [row["what"] for row in started.rows][-1] == "import to first result, vit-ti16"
    assert {"CPU", "cores", "versions", "used by others"} <= set(report.machine)
    json.dumps(report.as_json(), allow_nan=False)


def test_memory_is_that_of_the_program_itself():
    """The parent's memory does not count, as it would in `ru_maxrss`."""
    ballast = bytearray(b"x" * 300_000_000)
    process = subprocesses.run_code(
        "from triptych.bench.children.process_memory import memory, report\n"
        "held = bytearray(b'x' * 50_000_000)\nreport(**memory()._asdict())"
    )
    assert len(ballast) > 50_000_000 < process.reported["peak"] < 200_000_000
    assert process.reported["current"] <= process.reported["peak"]
    assert process.seconds > 0


def test_the_error_of_a_failed_program_is_reported():
    with pytest.raises(RuntimeError, match=r"ended with 1: ZeroDivisionError"):
        subprocesses.run_code("1 / 0")


def test_peaks_and_versions():
    assert machine.product_peak(torch.float32, (64,), 2) > 1e6
    assert machine.copy_peak(2**16, 2) > 1e6
    share = CpuContention().share()
    assert share is None or 0 <= share <= 1
    assert machine.version_of("torch") == torch.__version__
    assert machine.version_of("no-such-distribution") is None


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    """With processes of transformers, which start slowly."""
    assert main(["bench", "vit", "--quick", "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "benchmarks.json").read_text())["vit"] == printed
    assert "| vit-ti16" in (tmp_path / "benchmarks.md").read_text()


@pytest.mark.slow
def test_loading_compared_with_transformers(tmp_path):
    table = loading("vit-ti16", vit.make(vit.QUICK, "vit-ti16"), tmp_path, ("transformers",), 1)
    assert [column.key for column in table.columns] == ["what", "ours", "transformers", "ratio"]


def test_errors_are_one_line(capsys):
    assert main(["bench", "cnn"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
