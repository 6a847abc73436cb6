"""Parameters and multiply-accumulates of the published UNets: by their own code, in closed form, and as built."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from triptych.config import from_json, to_json
from triptych.errors import ConfigError
from triptych.metrics.cost import count_parameters
from triptych.models.configs.unet import SIZES, UNetConfig, macs, parameters
from triptych.models.unet import UNet

# Counted from the code and the configs that came with the checkpoints.
TABLE = {
    "sd1": 859_520_964,
    "sd1-inpaint": 859_535_364,
    "sd2": 865_910_724,
    "sd2-base": 865_910_724,
    "sd2-inpaint": 865_925_124,
    "sd2-depth": 865_913_604,
    "sd2-unclip-l": 869_517_764,
    "sd2-unclip-h": 870_173_124,
    "x4-upscaler": 473_398_020,
    "celeba": 274_056_163,
    "ffhq": 274_056_163,
    "bedrooms": 274_056_163,
    "churches": 294_966_916,
    "cin256": 394_984_196,
    "cin256-v2": 400_920_579,
    "txt2img-1p4B": 872_300_484,
    "text2img256": 403_623_939,
    "layout": 246_277_379,
    "semantic": 215_229_315,
    "inpainting-big": 387_245_827,
    "bsr-sr": 113_622_563,
}
OWN = {"unet-s", "unet-emoji"}  # not published: trained in this project
SDXL = UNetConfig(  # without a name in the registry, since its two text encoders are not supported
    latent_size=(128, 128),
    base_channels=320,
    channel_multipliers=(1, 2, 4),
    attention_downsample_factors=(2, 4),
    transformer_depth=(1, 2, 10),
    head_dim=64,
    context_dim=2048,
    projection="linear",
    vector_dim=2816,
)


def on_meta(config):
    """The network on the meta device, without weights."""
    with torch.device("meta"):
        return UNet(config)


def counted(config, size, tokens=77):
    """Count the multiply-accumulates of the network when it runs on the meta device."""
    net = on_meta(config).eval()
    shapes = {"x": (1, config.in_channels, *size), "t": (1,)}
    if config.context_dim:
        shapes["context"] = (1, tokens, config.context_dim)
    if config.vector_dim:
        shapes["labels"] = (1, config.vector_dim)
    shapes = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if config.num_classes:
        shapes["labels"] = torch.empty(1, device="meta", dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(**shapes)
    return counter.get_total_flops() // 2


def test_every_size_is_in_the_table():
    assert set(TABLE) | OWN == set(SIZES)


@pytest.mark.parametrize("name", TABLE)
def test_published_counts(name):
    assert parameters(SIZES[name]) == TABLE[name]
    assert count_parameters(on_meta(SIZES[name])) == TABLE[name]


def test_transformers_of_another_depth_at_each_level():
    assert parameters(SDXL) == count_parameters(on_meta(SDXL)) == 2_567_463_684


@pytest.mark.parametrize(
    "changes",
    [
        {"context_dim": 12, "in_channels": 9, "projection": "linear"},
        {"context_dim": 12, "cross_only_downsample_factors": (2,), "transformer_depth": 2, "num_classes": 5},
        {"vector_dim": 6, "resample": "resnet", "scale_shift": True},
    ],
    ids=["text", "cross only", "resampled by blocks"],
)
def test_products_of_small_forms(changes):
    config = UNetConfig(
        latent_size=(8, 12),
        base_channels=32,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_downsample_factors=(2,),
        num_heads=4,
        **changes,
    )
    assert count_parameters(on_meta(config)) == parameters(config)
    assert counted(config, config.latent_size) == macs(config)
    assert counted(config, (7, 5), tokens=9) == macs(config, (7, 5), tokens=9)


def test_products_of_a_step():
    assert counted(SIZES["sd1"], (64, 64)) == macs(SIZES["sd1"])


def test_a_step_of_stable_diffusion():
    assert round(macs(SIZES["sd1"]) / 1e9) == 402
    assert round(macs(SIZES["sd2-base"]) / 1e9) == 402


@pytest.mark.parametrize("name", SIZES)
def test_json_round_trip(name):
    assert from_json(UNetConfig, to_json(SIZES[name])) == SIZES[name]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_channels": 0}, "base_channels is 0"),
        ({"base_channels": 100}, "32 groups"),
        ({"channel_multipliers": ()}, "channel_multipliers"),
        ({"num_heads": 0}, "give one of the two"),
        ({"num_heads": 8, "head_dim": 64}, "give one of the two"),
        ({"num_heads": 7}, "num_heads 7 does not divide the 320 channels"),
        ({"num_heads": 0, "head_dim": 48}, "head_dim 48 does not divide the 320 channels"),
        ({"attention_downsample_factors": (0, 1)}, "attention_downsample_factors"),
        ({"context_dim": 0, "cross_only_downsample_factors": (1,)}, "cross_only_downsample_factors"),
        ({"num_classes": 10, "vector_dim": 10}, "labels or vectors"),
        ({"transformer_depth": (1, 2)}, "2 numbers for 4 levels"),
        ({"transformer_depth": 0}, "transformer_depth is 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_classes": -1}, "num_classes is -1"),
    ],
)
def test_mistakes_are_reported(changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        replace(SIZES["sd1"], **changes)
    assert "\n" not in str(caught.value)


def test_no_heads_are_asked_for_where_nothing_attends():
    config = replace(SIZES["semantic"], num_heads=0, middle_attention=False)
    assert not any("attention" in name for name, _ in on_meta(config).named_parameters())
    assert parameters(config) == count_parameters(on_meta(config))
