"""Loading takes the weights' memory once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triptych.models.registry import create
from triptych.weights import export, save

# The peak is the kernel's own, of this process alone (ru_maxrss would carry the parent's over), set to the present
# memory after the imports; pages of mapped files count.
MEASURE = """
import sys, torch
from triptych.weights import load
import triptych.weights.vit, triptych.models.vit
def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
net = load(sys.argv[1])
for tensor in net.state_dict().values():
    tensor.reshape(-1)[::512].sum()  # touch every page
print((memory("VmHWM") - before) / sum(t.nbytes for t in net.state_dict().values()))
"""
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


def ratio(path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True, timeout=300
    )
    return float(done.stdout)


def quick(name: str, **changes):
    """A network without the time that random initialization takes."""
    with torch.device("meta"):
        net = create(name, **changes)
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    return net


FORMATS = ["triptych", "timm", "hf", "torchvision", "google"]


def written(folder, form, name, **changes):
    net = quick(name, **changes)
    if form == "triptych":
        save(net, folder / "net.safetensors")
        return folder / "net.safetensors"
    return export(net, folder / ("net.npz" if form == "google" else "out"), form)


@pytest.mark.parametrize("form", ["triptych", "hf", "google"])
def test_a_large_network_takes_its_weights_once(tmp_path, form):
    """L/16 in all but depth: 4 of 24 blocks, 210 MB."""
    mlp = "gelu_tanh" if form == "google" else "gelu"
    path = written(tmp_path, form, "vit-l16", depth=4, mlp=mlp)
    # Beyond 1.1: the largest tensor and the libraries that a first product loads, 40 MB that a sixth cannot dilute.
    assert ratio(path) <= 1.1 + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_large_16_takes_at_most_1_1_of_its_weights(tmp_path, form):
    mlp = "gelu_tanh" if form == "google" else "gelu"
    assert ratio(written(tmp_path, form, "vit-l16", mlp=mlp)) <= 1.1
