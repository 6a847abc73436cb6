"""The suite with its quick plan, whose measurements are meaningless but must exist."""

import json

import pytest
import torch

from triptych.bench.harness.forward import DTYPES, TOLERANCES, compare
from triptych.bench.harness.subprocesses import FinishedProcess, run_code
from triptych.bench.harness.timing import Spread, UnequalError
from triptych.bench.measurements import peak_memory as memory_module
from triptych.bench.measurements import scaling as scaling_module
from triptych.bench.suites import swin
from triptych.cli import main
from triptych.layers.window import WindowAttention

PEAKS = {"fp32": 1e12, "bf16": 1e12}


def test_throughput_compared_with_transformers():
    """At a size of complete windows and at one that is padded."""
    table = swin.throughput(swin.QUICK, ("transformers",), PEAKS)
    assert [(row["mode"], row["size"], row["dtype"], row["batch"]) for row in table.rows] == [
        ("eager", size, dtype, 2) for dtype in ("fp32", "bf16") for size in ("56 x 56", "64 x 72")
    ]
    for row in table.rows:
        assert row["ours"].low > 0
        assert row["ratio to transformers"].median > 0
        assert 0 < row["utilization"] < 1
        assert row["apart"] <= TOLERANCES[row["dtype"]]
        assert {column.key for column in table.columns} == set(row)


def test_timm_is_left_out_where_maps_are_padded(monkeypatch):
    built = []
    monkeypatch.setattr(swin.peers, "build", lambda net, dtype, names: built.append(names) or {})
    swin.throughput(swin.QUICK, ("transformers", "timm"), PEAKS)
    assert built == [("transformers", "timm"), ("transformers",)] * 2


def test_a_wrong_mask_or_bias_shows():
    """The random weights are large enough that each error exceeds the tolerance, even that of bf16."""
    net = swin.make(swin.QUICK)
    x = swin.random_images(net, (64, 72), 2, torch.float32)
    for change in (forget_masks, forget_positions):
        other = change(swin.make(swin.QUICK))
        with pytest.raises(UnequalError):
            compare({"ours": net, "other": other}, x, TOLERANCES["bf16"], swin.QUICK)


def forget_masks(net):
    for part in net.modules():
        if isinstance(part, WindowAttention):
            part.forward = lambda x, mask, order, forward=part.forward: forward(x, None, order)
    return net


def forget_positions(net):
    for part in net.modules():
        if isinstance(part, WindowAttention):
            torch.nn.init.zeros_(part.bias_table)
    return net


def test_exponents_are_those_of_the_costs():
    rows = [
        {"pixels": n, "a seconds": Spread.of([3 * n**1.5]), "a memory": Spread.of([2 * n])}
        for n in (10, 100, 200)
    ]
    (row,) = scaling_module.exponents(rows, ("a",)).rows
    assert row["network"] == "a"
    assert row["seconds"] == pytest.approx(1.5)
    assert row["last seconds"] == pytest.approx(1.5)
    assert row["memory"] == pytest.approx(1.0)
    nothing = [{"pixels": n, "a seconds": Spread.of([1.0]), "a memory": Spread.of([0.0])} for n in (10, 100)]
    (row,) = scaling_module.exponents(nothing, ("a",)).rows
    assert (row["seconds"], row["memory"]) == (pytest.approx(0.0), None)


def test_growth_is_measured_drawn_and_written(monkeypatch):
    calls = []

    def run_child(program, name, changes, side, *rest):
        assert program == "scaling"
        calls.append((name, changes, side))
        return FinishedProcess(1.0, {"seconds": int(side) ** 2 / 1e6, "grown": int(side) ** 2 * 100})

    monkeypatch.setattr(scaling_module, "run_child", run_child)
    networks = {"swin-t": {"depths": (1, 1)}, "vit-s16": {}}
    grown, exponents = scaling_module.scaling(networks, (32, 64), 2, 0.0)
    assert calls[:2] == [("swin-t", "{'depths': (1, 1)}", "32"), ("vit-s16", "{}", "32")]
    assert len(calls) == 8
    assert [row["pixels"] for row in grown.rows] == [1024, 4096]
    assert {column.key for column in grown.columns} == set(grown.rows[0])
    assert exponents.rows[1]["memory"] == pytest.approx(1.0)
    figure = swin.growth_figure(grown, exponents, tuple(networks))
    assert len(figure.axes) == 2


def test_memory_of_both_libraries(monkeypatch, tmp_path):
    def run_child(program, library, path, dtype, *sizes):
        ours = library == "ours"
        assert program == "peak_memory"
        assert path.name == ("model.safetensors" if ours else "hf")
        assert path.exists()
        logits = [1.0, 2.0 if ours or dtype == "float32" else 2.01]
        return FinishedProcess(1.0, {"before": 1e9, "peak": 2e9 if ours else 3e9, "logits": logits})

    monkeypatch.setattr(memory_module, "run_child", run_child)
    net = swin.make(swin.QUICK)

    def table(tolerances):
        return memory_module.memory(
            "swin-t", net, tmp_path, ("transformers",), ((56, 56),), 2, DTYPES, tolerances
        )

    row = table(TOLERANCES).rows[0]
    assert (row["ours"].median, row["grown ours"].median) == (2.0, 1.0)
    assert (row["ratio"].median, row["grown ratio"].median) == (pytest.approx(2 / 3), 0.5)
    with pytest.raises(UnequalError):
        table({"fp32": 0.0, "bf16": 0.0})


def test_the_peak_is_reset():
    process = run_code(
        "from triptych.bench.children.process_memory import memory, report, reset_peak\n"
        "x = bytearray(b'x' * 200_000_000)\ndel x\nreset_peak()\nreport(**memory()._asdict())"
    )
    assert process.reported["peak"] < process.reported["current"] + 50_000_000


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    assert main(["bench", "swin", "--quick", "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "benchmarks.json").read_text())["swin"] == printed
    page = (tmp_path / "benchmarks.md").read_text()
    assert "![Exponents](images/swin_scaling.png)" in page
    assert (tmp_path / "images" / "swin_scaling.png").stat().st_size > 10_000


COMPILED = """
from dataclasses import replace
from triptych.bench.children.process_memory import report
from triptych.bench.suites import swin
plan = replace(swin.QUICK, compiled=((56, 56),))
table = swin.throughput(plan, ("transformers",), {"fp32": 1e12, "bf16": 1e12}, compiled=True)
report(modes=[row["mode"] for row in table.rows])
"""


@pytest.mark.slow
def test_compiled():
    """In a process without the shape checks, which cannot be traced."""
    assert run_code(COMPILED).reported["modes"] == ["compiled"] * 2
