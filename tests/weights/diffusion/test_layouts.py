"""Stable Diffusion 1 at its full size, random, in every layout: one file of ours, CompVis' two, diffusers' folder."""

import gc

import numpy as np
import pytest
import torch
from torch import nn

import triptych as tp
from triptych.models.configs.latent_diffusion import SIZES
from triptych.models.registry import build


@pytest.fixture(scope="module")
def sd1():
    """In bf16, 2.1 GB; numbers whose size keeps activations near one, so that a layer out of place shows."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net = build(SIZES["sd1"])
    net = net.to(torch.bfloat16).to_empty(device="cpu")
    for part in net.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fan = parameter[0].numel() if parameter.ndim > 1 else 100
            nn.init.normal_(parameter, std=fan**-0.5)
            if isinstance(part, nn.LayerNorm | nn.GroupNorm) and name == "weight":
                nn.init.normal_(parameter, mean=1.0, std=0.1)
    return net.eval().requires_grad_(False)


def generated_pixels(source) -> np.ndarray:
    pipe = tp.DiffusionPipeline(source, device="cpu", dtype="bf16")
    options = {"num_steps": 2, "seed": 7, "height": 64, "width": 64, "progress": False}
    (image,) = pipe.text_to_image("a (red:1.2) apple", "blurry", **options)
    return np.asarray(image)


@pytest.mark.slow
def test_the_same_pixels_from_every_layout(sd1, tmp_path):
    expected = generated_pixels(sd1)
    assert expected.std() > 10
    for name, form in (
        ("ours.safetensors", "triptych"),
        ("it.safetensors", "compvis"),
        ("it.ckpt", "compvis"),
        ("folder", "diffusers"),
    ):
        path = tmp_path / name
        tp.export(sd1, path, form)
        net = tp.load(path)
        assert net.config == sd1.config, name
        assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in sd1.parameters())
        assert np.array_equal(generated_pixels(net), expected), name
        del net
        gc.collect()
        for file in sorted(tmp_path.rglob("*"), reverse=True):  # 2 GB each
            file.rmdir() if file.is_dir() else file.unlink()
