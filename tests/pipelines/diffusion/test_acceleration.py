"""Approximations in a pipeline: exact at zero strength, recorded, reproducible, independent of the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.pipelines.conftest import CONFIGS, scrambled

import triptych as tp
from triptych import torch_compile
from triptych.errors import TriptychError
from triptych.models.configs.autoencoder import TinyAutoencoderConfig
from triptych.models.registry import build
from triptych.pipelines.diffusion.image_metadata import parse_parameters, read
from triptych.pipelines.diffusion.pipeline import DiffusionPipeline

CALL = {"num_steps": 4, "guidance_scale": 2.0, "height": 32, "width": 32, "progress": False}
BOTH = {"merge_tokens": 0.5, "deep_cache": 2}


@pytest.fixture(scope="module")
def pipe():
    config = CONFIGS["text"]
    return DiffusionPipeline(
        scrambled(replace(config, network=replace(config.network, attention_downsample_factors=(1, 2)))),
        dtype="fp32",
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small first stage on the model's latents."""
    path = tmp_path_factory.mktemp("tiny") / "taesd.safetensors"
    tp.save(build(TinyAutoencoderConfig(base_channels=8, num_levels=3, num_res_blocks=1)), path)
    return path


def array(images, k=0):
    return np.asarray(images[k]).astype(int)


def test_nothing_at_zero_strength_and_nothing_left_behind(pipe):
    exact = array(pipe.text_to_image("an apple", **CALL))
    zero = pipe.text_to_image("an apple", merge_tokens=0.0, deep_cache=1, decoder="", **CALL)
    assert np.array_equal(array(zero), exact)
    for option in ({"merge_tokens": 0.5}, {"deep_cache": 2}):
        assert not np.array_equal(array(pipe.text_to_image("an apple", **option, **CALL)), exact)
        assert np.array_equal(array(pipe.text_to_image("an apple", **CALL)), exact)


def test_recorded_and_regenerated(pipe, tiny, tmp_path):
    images = pipe.text_to_image("an apple", decoder=tiny, **BOTH, **CALL)
    (path,) = pipe.save(images, tmp_path / "a.png")
    settings = read(path)
    assert (settings.merge_tokens, settings.deep_cache, settings.decoder) == (0.5, 2, str(tiny))
    assert len(settings.hashes["decoder"]) == 12
    assert np.array_equal(array(pipe.regenerate(path, progress=False)), array(images))
    assert not np.array_equal(
        array(pipe.regenerate(path, progress=False)), array(pipe.text_to_image("an apple", **CALL))
    )
    assert parse_parameters(images[0].info["parameters"]).merge_tokens == 0.5


def test_image_k_is_the_same_in_any_batch(pipe):
    """An image does not depend on its batch, nor on the images before it."""
    several = pipe.text_to_image(
        "an apple", num_images=3, seed=4, batch_size=2, guidance_interval=(0.5, 5.0), **BOTH, **CALL
    )
    for k in range(3):
        alone = pipe.text_to_image("an apple", seed=4 + k, guidance_interval=(0.5, 5.0), **BOTH, **CALL)
        assert np.abs(array(several, k) - array(alone)).max() <= 1
    one_by_one = pipe.text_to_image(
        "an apple", num_images=2, seed=5, guidance_interval=(0.5, 5.0), **BOTH, **CALL
    )
    assert np.array_equal(array(one_by_one, 1), array(alone))


def test_another_decoder_decodes(pipe, tiny):
    latents = pipe.text_to_image("an apple", decoder=tiny, **CALL)
    small = tp.load(tiny)
    reference = DiffusionPipeline(pipe.net, dtype="fp32")
    reference.model.codec = type(reference.model.codec)(small)
    assert np.array_equal(array(latents), array(reference.text_to_image("an apple", **CALL)))


def test_options_that_do_not_fit_are_reported(pipe, tiny, tmp_path):
    tp.save(
        build(TinyAutoencoderConfig(base_channels=8, num_levels=4, num_res_blocks=1)),
        tmp_path / "f8.safetensors",
    )
    tp.save(pipe.net.network, tmp_path / "unet.safetensors")
    for words, options in {
        "merge_tokens is 0.9": {"merge_tokens": 0.9},
        "deep_cache is 0": {"deep_cache": 0},
        "4 channels at 1/8, the model's have 4 at 1/4": {"decoder": tmp_path / "f8.safetensors"},
        "is a UNet; give an autoencoder": {"decoder": tmp_path / "unet.safetensors"},
        "nothing.safetensors": {"decoder": tmp_path / "nothing.safetensors"},
    }.items():
        with pytest.raises(TriptychError, match=words):
            pipe.text_to_image("an apple", **options, **CALL)


def test_what_is_compiled_is_not_changed(pipe, monkeypatch):
    done = []
    monkeypatch.setattr(torch_compile, "_check_compiler", lambda: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, **_options: done.append(part))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    compiled = DiffusionPipeline(pipe.net, dtype="fp32", compile=True)
    assert done == compiled.net.network.blocks()
    for options in ({"merge_tokens": 0.5}, {"deep_cache": 2}):
        with pytest.raises(TriptychError, match="give one or the other"):
            compiled.text_to_image("an apple", **options, **CALL)
    plain = array(pipe.text_to_image("an apple", **CALL))  # nothing was compiled: the same network
    assert np.array_equal(array(compiled.text_to_image("an apple", **CALL)), plain)
