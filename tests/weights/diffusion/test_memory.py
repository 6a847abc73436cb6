"""A Stable Diffusion 1 in bf16 takes its weights once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triptych.models.configs.latent_diffusion import SIZES
from triptych.models.registry import build
from triptych.weights import export

MEASURE = """
import sys, torch
from triptych.weights import load
import triptych.models.latent_diffusion, triptych.models.tokenization.files
def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
net = load(sys.argv[1])
for tensor in net.state_dict().values():
    tensor.reshape(-1)[::1024].sum()  # touch every page
print((memory("VmHWM") - before) / sum(t.nbytes for t in net.state_dict().values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("form", ["compvis", "diffusers"])
def test_sd1_in_bf16_takes_at_most_1_15_of_its_weights(form, tmp_path):
    """2.1 GB, random."""
    with torch.device("meta"):
        net = build(SIZES["sd1"]).bfloat16()
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    path = tmp_path / ("sd1.safetensors" if form == "compvis" else "sd1")
    try:
        export(net, path, form)
        del net
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, path], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        print(form, done.stdout)
        assert float(done.stdout) <= 1.15
    finally:
        for file in tmp_path.rglob("*.safetensors"):
            file.unlink()
