"""The published first stages: their exact counts, closed forms, and configs that make no sense."""

from dataclasses import replace

import pytest
import torch

import triptych as tp
from triptych.config import from_json, to_json
from triptych.errors import TriptychError
from triptych.metrics.cost import count_macs
from triptych.models.autoencoder import Autoencoder
from triptych.models.configs.autoencoder import (
    SIZES,
    AutoencoderConfig,
    TinyAutoencoderConfig,
    macs,
    parameters,
)
from triptych.models.tiny_autoencoder import TinyAutoencoder

PUBLISHED = {
    "kl-f4": 55_312_063,
    "kl-f8": 83_653_863,
    "kl-f16": 69_610_963,
    "kl-f32": 103_880_131,
    "vq-f4": 55_322_782,
    "vq-f4-noattn": 53_219_486,
    "vq-f8": 67_717_295,
    "vq-f8-n256": 67_652_783,
    "vq-f16": 69_593_371,
    "sd-vae": 83_653_863,
    "sd-x4-vae": 55_325_927,
    "sdxl-vae": 83_653_863,
    "sd3-vae": 83_819_683,
    "flux-vae": 83_819_683,
    "taesd": 2_445_063,
}
TINY = TinyAutoencoderConfig(base_channels=4, num_levels=3, num_res_blocks=2, image_size=(16, 24))
SMALL = AutoencoderConfig(
    regularization="kl",
    base_channels=8,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=1,
    latent_channels=4,
    attention_downsample_factors=(2,),
    norm_groups=4,
    image_size=(16, 24),
)


def build(config):
    return (Autoencoder if isinstance(config, AutoencoderConfig) else TinyAutoencoder)(config)


def count(net) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_counts(name):
    with torch.device("meta"):
        net = build(SIZES[name])
    assert parameters(SIZES[name]) == count(net)
    assert parameters(SIZES[name], "encoder") == count(net.encoder)
    assert parameters(SIZES[name], "decoder") == count(net.decoder)
    assert PUBLISHED.get(name, count(net)) == count(net)


def test_counts_of_the_halves():
    assert parameters(SIZES["kl-f8"], "encoder") == 34_163_592
    assert parameters(SIZES["kl-f8"], "decoder") == 49_490_179
    assert parameters(SIZES["taesd"], "encoder") == 1_222_532
    assert parameters(SIZES["taesd"], "decoder") == 1_222_531


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, quant_convs=False),
        replace(SMALL, patch_size=2),
        replace(SMALL, regularization="vq", codebook_size=9, bottleneck_channels=6),
        TINY,
    ],
)
def test_closed_forms(config):
    net = build(config)
    assert parameters(config) == count(net)
    expected = count_macs(net, (1, 3, *config.image_size))
    if config != TINY and config.regularization == "vq":
        expected -= 4 * 6 * config.codebook_size * config.latent_channels  # finding the entries
    assert macs(config) == expected
    assert macs(config, part="encoder") + macs(config, part="decoder") <= macs(config)
    assert macs(config, (32, 24)) > macs(config)


@pytest.mark.parametrize("name", SIZES)
def test_through_json(name):
    assert from_json(type(SIZES[name]), to_json(SIZES[name])) == SIZES[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_multipliers": ()}, "channel_multipliers"),
        ({"base_channels": 6}, "base_channels 6 is not a multiple of the 4 groups"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"regularization": "vq"}, "codebook_size is 0, which must be at least 1"),
        ({"codebook_size": 4}, "codebook_size is 4, which must be 0 with regularization='kl'"),
        ({"attention_downsample_factors": (8,)}, "factors are 1, 2, 4"),
        ({"scale": (1.0, 2.0)}, "scale has 2 numbers for latents of 4 channels"),
        ({"scale": 0.0}, "scale is 0.0, which must be positive"),
        ({"shift": (1.0,)}, "shift has 1 numbers"),
        ({"bottleneck_channels": 8, "quant_convs": False}, "needs quant_convs=True"),
        ({"bottleneck_channels": -1}, "bottleneck_channels is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"image_size": (0, 4)}, "image_size"),
        ({"patch_size": 0}, "patch_size is 0"),
    ],
)
def test_configs_that_make_no_sense(changes, message):
    with pytest.raises(TriptychError, match=message):
        replace(SMALL, **changes)


def test_factor():
    assert [SIZES[name].downsample_factor for name in ("kl-f4", "kl-f8", "kl-f16", "kl-f32", "taesd")] == [
        4,
        8,
        16,
        32,
        8,
    ]


def test_a_patch_is_folded_into_channels_and_unfolded(tmp_path):
    """The factor and the cost follow it; no other library's format has a place for it."""
    config = replace(SMALL, patch_size=2)
    assert config.downsample_factor == 8
    net = build(config).eval()
    images = torch.randn(2, 3, 16, 24)
    latents = net.encode(images)
    assert latents.shape == (2, 4, 2, 3)
    assert net.decode(latents).shape == images.shape
    folded = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
    torch.testing.assert_close(net.encoder.fold(images), folded)
    torch.testing.assert_close(net.decoder.unfold(folded), images)
    assert macs(config, (32, 48)) < 1.1 * macs(replace(config, patch_size=1))
    for name in ("compvis", "diffusers"):
        with pytest.raises(TriptychError, match="patch"):
            tp.export(net, tmp_path / name, format=name)
    tp.save(net, tmp_path / "a.safetensors")
    assert torch.equal(tp.load(tmp_path / "a.safetensors").encode(images), latents)
