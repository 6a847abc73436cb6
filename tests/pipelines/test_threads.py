"""Calls of a pipeline from several threads give what the same calls give one after the other."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.pipelines.conftest import CONFIGS, UNET

import triptych as tp
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.weights.diffusion.lora import save_kohya

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _switch_often():
    """Let threads take turns a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def test_generation_with_options_that_change_the_network(tmp_path):
    torch.manual_seed(1)
    net = LatentDiffusion(
        replace(CONFIGS["text"], network=replace(UNET, attention_downsample_factors=(1, 2)))
    )
    for parameter in net.parameters():  # the zeros of a new network too, so that every layer has an effect
        torch.nn.init.normal_(parameter, std=0.1)
    layers = {
        "unet.mid_block.attentions.0.proj_in": (torch.randn(2, 32), torch.randn(32, 2), 2.0),
        "unet.conv_in": (torch.randn(2, 4, 3, 3), torch.randn(16, 2, 1, 1), 2.0),
    }
    save_kohya(net, tmp_path / "style.safetensors", layers)
    pipe = tp.DiffusionPipeline(net, dtype="fp32", device="cpu", lora_dir=tmp_path)
    other = tp.DiffusionPipeline(net, dtype="fp32", device="cpu", lora_dir=tmp_path)  # of the same network
    common = {"num_steps": 4, "guidance_scale": 2.0, "height": 32, "width": 32, "progress": False}
    options = [
        ("a cat", {}),
        ("a cat <lora:style:1>", {}),
        ("a cat", {"tiling": "xy"}),
        ("a cat", {"deep_cache": 2}),
        ("a cat", {"merge_tokens": 0.5}),
        ("a cat <lora:style:-1>", {"tiling": "x"}),
    ]

    def call(pipe, prompt, more):
        return lambda: np.asarray(pipe.text_to_image(prompt, **common, **more)[0])

    alone = [call(pipe, prompt, more)() for prompt, more in options]
    assert len({image.tobytes() for image in alone}) == len(alone)  # each option has an effect
    for results_together in (
        in_threads([call(pipe, prompt, more) for prompt, more in options]),
        in_threads(
            [call(p, prompt, more) for p, (prompt, more) in zip([pipe, other] * 3, options, strict=True)]
        ),
    ):
        for one, expected in zip(results_together, alone, strict=True):
            assert np.array_equal(one, expected)


def test_a_callback_may_use_the_pipeline(ldm):
    pipe = tp.DiffusionPipeline(ldm("text"), dtype="fp32", device="cpu")
    options = {"num_steps": 2, "height": 16, "width": 16, "progress": False}
    inner = []

    def on_image(image):
        inner.extend(pipe.image_to_image("a dog", image, **options))

    pipe.text_to_image("a cat", on_image=on_image, **options)
    assert len(inner) == 1


def test_classification():
    net = tp.create("vit-ti16", depth=2, embed_dim=48, num_heads=3, num_classes=4, image_size=32)
    torch.nn.init.normal_(net.head.weight)
    pipe = tp.ClassificationPipeline(net, dtype="fp32", batch_size=2)
    images = [rng.integers(0, 256, (40, 50, 3), np.uint8) for _ in range(6)]
    alone = [[(guess.name, guess.probability) for guess in pipe(image)] for image in images]
    results_together = in_threads([lambda i=i: [list(pipe(images[i:])) for _ in range(3)] for i in range(6)])
    for i, several in enumerate(results_together):
        for results in several:
            for result, expected in zip(results, alone[i:], strict=True):
                assert [guess.name for guess in result] == [name for name, _ in expected]
                assert [guess.probability for guess in result] == pytest.approx(
                    [p for _, p in expected], abs=1e-5
                )


def test_segmentation():
    torch.manual_seed(3)
    backbone = tp.create(
        "swin-t", embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, image_size=32, num_classes=0
    )
    backbone.prepare_maps()
    config = SegmenterConfig(backbone=backbone.config, head=HeadConfig(type="fpn", channels=8, num_classes=3))
    segmenter = Segmenter(config, backbone)
    torch.nn.init.normal_(segmenter.classifier.weight, std=3)
    pipe = tp.SegmentationPipeline(segmenter, dtype="fp32")
    image = rng.integers(0, 256, (60, 72, 3), np.uint8)
    options = [{}, {"window": (32, 32)}, {"size": 48}, {"scales": (0.5, 1.0), "flip": True}]
    alone = [pipe(image, **more).labels for more in options]
    results_together = in_threads(
        [lambda more=more: [pipe(image, **more).labels for _ in range(4)] for more in options]
    )
    for several, expected in zip(results_together, alone, strict=True):
        assert all(np.array_equal(labels, expected) for labels in several)
