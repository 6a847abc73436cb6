"""The suite with its quick plan, whose measurements are meaningless but must exist."""

import json

import pytest
import torch

from triptych.bench.harness.forward import DTYPES, TOLERANCES
from triptych.bench.harness.subprocesses import FinishedProcess
from triptych.bench.harness.timing import UnequalError
from triptych.bench.measurements import image_generation
from triptych.bench.suites import ldm
from triptych.cli import main

PEAKS = {"fp32": 1e12, "bf16": 1e12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ldm")
    ldm.write(ldm.TINY, path, True)
    return path


@pytest.mark.parametrize("measure", [ldm.steps, ldm.decoding])
def test_comparison_with_diffusers(folder, measure):
    for label in DTYPES:
        row = measure(ldm.QUICK, label, folder, True, PEAKS)
        assert (row["mode"], row["dtype"]) == ("eager", label)
        assert row["ours"].low > 0
        assert row["ratio to diffusers"].median > 0
        assert 0 < row["utilization"] < 1
        assert row["apart"] <= TOLERANCES[label]
        assert {column.key for column in ldm.table("", "", True).columns} == set(row)


@pytest.mark.parametrize(
    "part", ["down.0.blocks.0.transformer.blocks.0.cross.proj.weight", "middle.res2.conv2.bias"]
)
def test_a_wrong_weight_shows(folder, part, monkeypatch):
    """Each branch contributes enough that an error in it exceeds the tolerance, even that of bf16."""
    right = ldm.loaded

    def wrong(folder):
        net = right(folder)
        parameter = dict(net.network.named_parameters())[part]
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        return net

    monkeypatch.setattr(ldm, "loaded", wrong)
    with pytest.raises(UnequalError):
        ldm.steps(ldm.QUICK, "bf16", folder, True, PEAKS)


def test_operations_are_those_of_a_convolution():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1, device="meta")
    assert ldm.flops(conv, torch.empty(2, 3, 7, 8, device="meta")) == 2 * 2 * 7 * 8 * 5 * 3 * 9


def test_programs_and_the_rows_of_their_reports(monkeypatch, tmp_path):
    calls = []

    def run_child(program, path, options):
        calls.append((program, path.name, json.loads(options)))
        ours = program == "generate_ours"
        reported = {"load": 1.0, "image": 10.0 if ours else 40.0, "peak": 4e9 if ours else 8e9}
        return FinishedProcess(2.0 if ours else 8.0, reported)

    def run_code(code):
        calls.append((code,))
        return FinishedProcess(2.0 if "triptych" in code else 8.0, {})

    monkeypatch.setattr(image_generation, "run_child", run_child)
    monkeypatch.setattr(image_generation, "run_code", run_code)
    table = image_generation.generating(tmp_path, True, (3, 5), rounds=1)
    assert calls == [
        ("generate_ours", "model.safetensors", {"num_steps": 3}),
        ("generate_diffusers", "diffusers", {"num_inference_steps": 5}),
        ("generate_ours", "model.safetensors", {"num_steps": 3, "low_memory": True}),
    ]
    assert [row.get("ratio") and row["ratio"].median for row in table.rows] == [1.0, 0.25, 0.5, None]
    calls.clear()
    table = image_generation.starting({"a": tmp_path, "b": tmp_path}, True, 1)
    assert calls[2:4] == [
        ("generate_ours", "model.safetensors", {"first": True}),
        ("generate_diffusers", "diffusers", {"first": True}),
    ]
    assert [row["ratio"].median for row in table.rows] == [0.25] * 3


@pytest.mark.parametrize("flag", ["--short", "--compiled"])
def test_flags_of_one_suite(flag, capsys):
    assert main(["bench", "vit", flag]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    """With the programs of both libraries, which generate images, or stop after the first step."""
    assert main(["bench", "ldm", "--quick", "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "benchmarks.json").read_text())["ldm"] == printed
    assert [table["title"] for table in printed["tables"]][1:] == [
        "A step of the denoiser",
        "Decoding",
        "Generating an image",
        "Startup",
    ]
    assert all(row["ratio"] for row in printed["tables"][-1]["rows"])
