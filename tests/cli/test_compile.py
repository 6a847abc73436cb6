"""Compiled blocks: equal to eager, cached for the next process, and a one-line error without a compiler."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import triptych as tp
from triptych import torch_compile
from triptych.cli import main
from triptych.models.configs.unet import UNetConfig
from triptych.models.unet import UNet

TWICE = """
import json, torch, triptych as tp
from torch._dynamo.utils import counters
torch.manual_seed(0)
net = tp.create("vit-ti16", depth=3, embed_dim=32, num_heads=2, mlp_ratio=2.0, num_classes=4, image_size=32)
torch.nn.init.normal_(net.head.weight)
x = torch.randn(2, 3, 32, 32)
eager = tp.ClassificationPipeline(net, dtype="fp32").logits(x)
compiled = tp.ClassificationPipeline(net, dtype="fp32", compile=True).logits(x)
torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
assert not hasattr(net.blocks()[0], "_compiled_call_impl") or net.blocks()[0]._compiled_call_impl is None
print(json.dumps(counters["inductor"]))
"""


@pytest.mark.slow
def test_a_second_process_uses_the_cache(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment["TRIPTYCH_CACHE"] = str(tmp_path)
    counters = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        counters.append(json.loads(done.stdout.splitlines()[-1]))
    cold, warm = counters
    assert cold["fxgraph_cache_miss"] == 1  # one graph for the three blocks
    assert warm["fxgraph_cache_hit"] == 1
    assert "fxgraph_cache_miss" not in warm
    assert (tmp_path / "inductor").is_dir()


def test_no_compiler_is_one_line(model, images, capsys):
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert main(["classify", str(images / "0.png"), "--model", str(model), "--compile"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "needs a C++ compiler" in message


@pytest.fixture
def noted(monkeypatch):
    """Modules that would be compiled; none of them is."""
    done = []
    monkeypatch.setattr(torch_compile, "_check_compiler", lambda: None)
    monkeypatch.setattr(nn.Module, "compile", lambda part, **_options: done.append(part))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    return done


def test_each_block_is_compiled_and_the_limit_is_raised(noted):
    net = UNet(
        UNetConfig(
            base_channels=8, channel_multipliers=(1, 1, 1), num_res_blocks=2, norm_groups=4, num_heads=2
        )
    )
    with torch._dynamo.config.patch(recompile_limit=8):
        torch_compile.compile_blocks(net)
        assert torch._dynamo.config.recompile_limit >= len(net.blocks()) > 8
    assert noted == net.blocks()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"  # the user's setting is kept
    single = nn.Linear(1, 1)
    torch_compile.compile_blocks(single)
    assert noted[-1] is single


def test_pipelines_compile_their_own_copy(noted, model, parser):
    for pipeline, source in ((tp.ClassificationPipeline, model), (tp.SegmentationPipeline, parser)):
        net = tp.load(source)
        pipe = pipeline(net, dtype="fp32", compile=True)
        assert noted[-1] is pipe.net.blocks()[-1]
        assert noted[-1] is not net.blocks()[-1]


def test_the_location_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("TRIPTYCH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(torch_compile.cache_folder()) == "/home/someone/.cache/triptych"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(torch_compile.cache_folder()) == "/cache/triptych"
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    assert torch_compile.cache_folder() == tmp_path
