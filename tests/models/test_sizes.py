"""Parameters and multiply-accumulates: the published numbers, the closed forms and the built networks, all equal."""

from dataclasses import replace

import pytest
import torch

from triptych.metrics.cost import count_macs, count_parameters
from triptych.models.configs import swin as swin_config
from triptych.models.configs.vit import SIZES, grid_at, macs, parameters
from triptych.models.registry import build, config_for
from triptych.models.vit import ViT

# Parameters and GMACs at 224 and 384, 1000 classes: vit_jax/models_test.py, torchvision and timm agree on them.
TABLE = {
    "vit-ti16": (5_717_416, 1.254, 5_790_376, 4.682),
    "vit-s32": (22_878_952, 1.143, 22_915_432, 3.443),
    "vit-s16": (22_050_664, 4.599, 22_196_584, 15.490),
    "vit-b32": (88_224_232, 4.409, 88_297_192, 13.044),
    "vit-b16": (86_567_656, 17.564, 86_859_496, 55.484),
    "vit-l32": (306_535_400, 15.378, 306_632_680, 45.276),
    "vit-l16": (304_326_632, 61.555, 304_715_752, 191.066),
}
# name, image size -> parameters (None: not published), GMACs
MORE = {
    ("vit-s14", 224): (22_004_584, 6.124),
    ("vit-s14", 518): (None, 46.697),
    ("vit-b14", 224): (86_475_496, 23.162),
    ("vit-b14", 518): (None, 151.574),
    ("vit-b8", 224): (86_576_872, 78.148),
    ("vit-l16", 512): (305_174_504, 361.986),
    ("vit-l14", 224): (304_203_752, 81.013),
    ("vit-l14", 336): (304_531_432, 190.960),
    ("vit-h14", 224): (632_045_800, 167.295),
    ("vit-h14", 518): (633_470_440, 1016.717),
    ("vit-h16", 224): (632_199_400, 127.315),
    ("vit-h32", 224): (634_960_360, 31.856),
}
GAP = {"class_token": False, "pool": "mean"}
# Parameters alone: name, changes to its config, count.
COUNTS = [
    ("vit-b16", GAP, 86_566_120),
    ("vit-s16", GAP, 22_049_896),
    ("vit-s32", GAP, 22_878_184),
    ("vit-b32", GAP, 88_222_696),
    ("vit-r-ti16", {}, 6_337_704),
    ("vit-r26-s32", {}, 36_431_912),
    ("vit-r26-b32", {}, 101_383_976),
    ("vit-r50-b16", {}, 98_659_112),
    ("vit-r50-l32", {}, 328_994_856),
    # Pre-training's head on ImageNet-21k, its hidden layer as wide as a token.
    ("vit-b16", {"head": "mlp", "num_classes": 21_843}, 103_186_515),
    ("vit-l16", {"head": "mlp", "num_classes": 21_843}, 326_740_307),
    ("vit-h14", {"head": "mlp", "num_classes": 21_843}, 660_385_363),
    ("vit-s16", {"num_classes": 0}, 21_665_664),
    ("vit-b16", {"num_classes": 0}, 85_798_656),
    ("vit-l16", {"num_classes": 0}, 303_301_632),
    ("deit-ti16-distilled", {}, 5_910_800),
    ("deit-s16-distilled", {}, 22_436_432),
    ("deit-b16-distilled", {}, 87_338_192),
    ("deit3-s16", {}, 22_059_496),
    ("deit3-m16", {}, 38_849_512),
    ("deit3-b16", {}, 86_585_320),
    ("deit3-l16", {}, 304_374_760),
    ("deit3-h14", {}, 632_126_440),
    ("dinov2-s14", {}, 22_056_192),
    ("dinov2-b14", {}, 86_579_712),
    # timm leaves DINOv3's biases of q and v out: those published are zero.
    ("dinov3-s16", {"qkv_bias": "none"}, 21_586_944),
    ("dinov3-b16", {"qkv_bias": "none"}, 85_641_216),
    ("dinov3-l16", {"qkv_bias": "none"}, 303_079_424),
]
# Swin: name, changes to its config, parameters, GMACs at the config's own size (None: not published).
# The paper's own code, timm and torchvision agree on them.
AT_384 = {"window_size": 12, "image_size": 384}
TORCHVISION = {"qkv_bias": "qkv"}
SWIN = [
    ("swin-t", {}, 28_288_354, 4.491),
    ("swin-s", {}, 49_606_258, 8.741),
    ("swin-b", {}, 87_768_224, 15.431),
    ("swin-l", {}, 196_532_476, 34.476),
    ("swin-t", AT_384, 28_338_034, 13.994),
    ("swin-s", AT_384, 49_707_778, 26.989),
    ("swin-b", AT_384, 87_903_584, 47.083),
    ("swin-l", AT_384, 196_735_516, 103.919),
    ("swin-t", {"num_classes": 0}, 27_519_354, None),
    ("swin-b", {"num_classes": 0}, 86_743_224, None),
    ("swinv2-t", {}, 28_347_154, None),
    ("swinv2-s", {}, 49_728_418, None),
    ("swinv2-b", {}, 87_918_816, None),
    ("swinv2-l", {}, 196_739_932, None),
    ("swinv2-t", TORCHVISION, 28_351_570, 5.940),
    ("swinv2-s", TORCHVISION, 49_737_442, 11.546),
    ("swinv2-b", TORCHVISION, 87_930_848, 20.325),
]


@pytest.mark.parametrize(("name", "changes", "count", "gmacs"), SWIN)
def test_published_swins(name, changes, count, gmacs):
    config = config_for(name, **changes)
    assert swin_config.parameters(config) == count
    assert gmacs is None or round(swin_config.macs(config) / 1e9, 3) == gmacs
    if name.startswith("swinv2"):  # made by an MLP, its bias has as many parameters in any window
        assert swin_config.parameters(config_for(name, **changes, window_size=(24, 12))) == count


DEEP = [name for name in swin_config.SIZES if name[-2:] in ("-s", "-b", "-l")]


@pytest.mark.parametrize("name", swin_config.SIZES)
def test_closed_forms_are_the_swins(name):
    config = swin_config.SIZES[name]
    net = on_meta(config)
    assert count_parameters(net) == swin_config.parameters(config)
    if name not in DEEP:
        assert count_macs(net, (1, 3, *config.image_size)) == swin_config.macs(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_products_of_deep_swins(name):
    config = swin_config.SIZES[name]
    assert count_macs(on_meta(config), (1, 3, *config.image_size)) == swin_config.macs(config)


@pytest.mark.parametrize(
    ("name", "changes", "size"),
    [
        ("swin-t", {}, (250, 333)),
        ("swin-t", {"window_size": (7, 9)}, (100, 50)),
        ("swinv2-t", TORCHVISION, (97, 260)),
    ],
)
def test_closed_forms_of_swins_at_other_sizes(name, changes, size):
    config = config_for(name, depths=(2, 2, 2, 2), **changes)
    net = on_meta(config)
    assert count_parameters(net) == swin_config.parameters(config)
    assert count_macs(net, (1, 3, *size)) == swin_config.macs(config, size)


@pytest.mark.parametrize("name", TABLE)
def test_the_papers_sizes(name):
    params, gmacs, params_384, gmacs_384 = TABLE[name]
    at_224, at_384 = config_for(name), config_for(name, image_size=384)
    assert (parameters(at_224), round(macs(at_224) / 1e9, 3)) == (params, gmacs)
    assert (parameters(at_384), round(macs(at_384) / 1e9, 3)) == (params_384, gmacs_384)


@pytest.mark.parametrize(("name", "size"), MORE)
def test_further_sizes(name, size):
    params, gmacs = MORE[name, size]
    config = config_for(name, image_size=size)
    assert params is None or parameters(config) == params
    assert round(macs(config) / 1e9, 3) == gmacs


@pytest.mark.parametrize(("name", "changes", "count"), COUNTS)
def test_published_counts(name, changes, count):
    config = config_for(name, **changes)
    assert parameters(config) == count
    assert count_parameters(on_meta(config)) == count


@pytest.mark.parametrize("name", SIZES)
def test_closed_forms_are_the_networks(name):
    config = SIZES[name]
    net = on_meta(config)
    assert count_parameters(net) == parameters(config)
    assert count_macs(net, (1, config.in_channels, *config.image_size)) == macs(config)


@pytest.mark.parametrize("name", ["vit-ti16", "vit-s32", "dinov3-s16", "vit-emoji", "vit-r-ti16"])
@pytest.mark.parametrize("size", [(384, 384), (224, 320), (64, 32)])
def test_closed_forms_at_other_sizes(name, size):
    config = SIZES[name]
    assert count_macs(on_meta(config), (2, 3, *size)) == 2 * macs(config, size)
    elsewhere = replace(config, image_size=size)
    assert count_parameters(on_meta(elsewhere)) == parameters(elsewhere)


def test_closed_forms_of_every_form(form, images):
    net = on_meta(form)
    assert count_parameters(net) == parameters(form)
    assert count_macs(net, (1, form.in_channels, *form.image_size)) == macs(form)


def test_counting_leaves_the_network_alone(small):
    net = ViT(small())
    net.encoder[0].requires_grad_(False)
    count_macs(net, (1, 3, 32, 48))
    assert net.training
    assert net.norm.weight.device.type == "cpu"
    frozen = sum(p.numel() for p in net.encoder[0].parameters())
    assert count_parameters(net) - count_parameters(net, trainable=True) == frozen


@pytest.mark.parametrize("size", [(1, 1), (7, 200), (33, 32), (48, 31)])
def test_the_grid_is_the_networks(form, size):
    _, grid = on_meta(form).eval().embed(torch.empty(1, form.in_channels, *size, device="meta"))
    assert grid == grid_at(form, size)


def on_meta(config):
    """The network on the meta device: H/14 takes no memory."""
    with torch.device("meta"):
        return build(config)
