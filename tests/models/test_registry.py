"""Networks by name, checks of their configs, and model cards."""

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest

import triptych as tp
from triptych.config import from_json, to_json
from triptych.errors import ConfigError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.swin import SwinConfig, fitting, with_window
from triptych.models.configs.vit import SIZES, ViTConfig
from triptych.models.registry import config_for


def test_names_match_shell_patterns():
    assert tp.list_models("vit-b*") == ["vit-b8", "vit-b14", "vit-b16", "vit-b32"]
    assert tp.list_models("DINO*") == []
    assert tp.list_models("nothing") == []
    assert [name for name in tp.list_models() if name in SIZES] == list(SIZES)
    plain = {f"vit-{size}{patch}" for size in ("ti", "s", "b", "l", "h") for patch in (8, 14, 16, 32)}
    assert plain <= set(tp.list_models())


def test_create_changes_fields():
    net = tp.create("vit-ti16", num_classes=10, image_size=64, depth=1)
    assert net.config == dataclasses.replace(SIZES["vit-ti16"], num_classes=10, image_size=(64, 64), depth=1)
    assert net.card.preprocess.size == (64, 64)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit-b61", {}, "no model is called 'vit-b61'; near names: vit-b16"),
        ("resnet", {}, "`triptych list` shows all"),
        ("vit-b16", {"num_class": 10}, "vit-b16 has no field 'num_class'; did you mean 'num_classes'?"),
        ("vit-b16", {"zzz": 1}, "vit-b16 has no field 'zzz'; it has image_size, patch_size"),
    ],
)
def test_mistakes_name_what_is_near(name, changes, message):
    with pytest.raises(ConfigError) as caught:
        config_for(name, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth is 0, which must be at least 1"),
        ({"patch_size": -16}, "patch_size is -16"),
        ({"num_heads": 5}, "embed_dim 24 is no multiple of num_heads 5"),
        ({"num_classes": -1}, "num_classes -1"),
        ({"image_size": (0, 32)}, "image_size (0, 32)"),
        ({"position": "sincos", "embed_dim": 6, "num_heads": 2}, "multiple of 4, got 6"),
        ({"position": "rotary", "num_heads": 4}, "heads of a multiple of 4 channels, got 6"),
        ({"class_token": False}, "pool='token' needs class_token=True"),
        ({"class_token": False, "pool": "token+mean"}, "needs class_token=True"),
        ({"pool": "token+mean", "norm_after_pool": True}, "norm_after_pool"),
        ({"distill_token": True, "head": "mlp"}, "distill_token needs"),
        ({"distill_token": True, "pool": "mean"}, "distill_token needs"),
        ({"drop_path_rate": 1.0}, "drop_path_rate 1.0"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"stem": "conv"}, "stem_widths, for example (32, 64, 128)"),
        ({"stem": "resnet", "stem_widths": (64, 64)}, "width of the root"),
        ({"stem": "resnet", "stem_widths": (48,)}, "a multiple of 32 such as (64,), got (48,)"),
        ({"head_dim": -1}, "head_dim"),
    ],
)
def test_configs_are_checked_when_made(small, changes, message):
    with pytest.raises(ConfigError) as caught:
        small(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


PAIRS = "give a number, (height, width), or one of these for each of 4 stages"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": 0}, "window_size is ((0, 0), (0, 0), (0, 0), (0, 0)), which must be at least 1"),
        ({"window_size": (7, -1)}, "which must be at least 1"),
        ({"window_size": "7"}, f"window_size is '7'; {PAIRS}"),
        ({"window_size": 7.5}, f"window_size is 7.5; {PAIRS}"),
        ({"window_size": None}, f"window_size is None; {PAIRS}"),
        ({"window_size": True}, f"window_size is True; {PAIRS}"),
        ({"window_size": (7, "7")}, f"window_size is (7, '7'); {PAIRS}"),
        ({"window_size": (7, 7, 7)}, PAIRS),
        ({"window_size": ((7, 7),) * 5}, PAIRS),
        ({"window_size": ((7, 7, 7),) * 4}, PAIRS),
        ({"window_size": ("77",) * 4}, PAIRS),
        ({"pretrained_window_size": ((7, 7),)}, "give (height, width) for each of 4 stages"),
        ({"pretrained_window_size": ((-7, 7),) * 4}, "give (height, width) for each of 4 stages"),
        ({"depths": ()}, "depths is (), which must be at least 1"),
        ({"depths": (2, 2)}, "num_heads has 4 entries for 2 stages of depths (2, 2)"),
        ({"depths": (2, 0, 6, 2)}, "depths is (2, 0, 6, 2)"),
        ({"num_heads": (3, 6)}, "num_heads has 2 entries for 4 stages"),
        ({"num_heads": (5, 5, 5, 5)}, "a stage of width 96 is no multiple of its 5 heads"),
        ({"num_heads": (0, 6, 12, 24)}, "num_heads is (0, 6, 12, 24)"),
        ({"embed_dim": 97}, "a stage of width 97 is no multiple of its 3 heads"),
        ({"stem_widths": (0,)}, "stem_widths is (0,)"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"image_size": 3}, "image_size (3, 3) must be at least one patch of 4 pixels"),
        ({"num_classes": -1}, "num_classes -1 cannot be negative"),
        ({"map_norms": True}, "give num_classes=0 with it"),
        ({"drop_path_rate": 1.0}, "drop_path_rate 1.0"),
        ({"mlp_ratio": 0.001}, "mlp_ratio 0.001"),
        ({"windows": 7}, "swin-t has no field 'windows'; did you mean 'window_size'?"),
    ],
)
def test_configs_of_swin_are_checked_when_made(changes, message):
    with pytest.raises(ConfigError) as caught:
        config_for("swin-t", **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("window", "stages", "wanted"),
    [
        (7, 3, ((7, 7),) * 3),
        (np.int64(7), 3, ((7, 7),) * 3),
        ([7, 9], 3, ((7, 9),) * 3),
        ((7, 9), 2, ((7, 7), (9, 9))),  # two stages: a side for each
        (((7, 9), (7, 9)), 2, ((7, 9),) * 2),
        ((7, (3, 5), [2, 4]), 3, ((7, 7), (3, 5), (2, 4))),
    ],
)
def test_windows_as_users_write_them(window, stages, wanted):
    heads = (1,) * stages
    config = config_for("swin-t", window_size=window, depths=heads, num_heads=heads)
    assert config.window_size == wanted
    assert from_json(SwinConfig, json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("window", "image_size", "wanted"),
    [
        (7, 224, ((7, 7),) * 4),  # maps of 56, 28, 14 and 7 cells
        (12, 224, ((12, 12),) * 3 + ((7, 7),)),
        (np.int64(12), 224, ((12, 12),) * 3 + ((7, 7),)),
        (12, 384, ((12, 12),) * 4),
        ((16, 8), 224, ((16, 8), (16, 8), (14, 8), (7, 7))),
        (7, (64, 224), ((7, 7), (7, 7), (4, 7), (2, 7))),
        (100, 4, ((1, 1),) * 4),
        ((12, 12, 12, 12), 224, ((12, 12),) * 4),  # stage by stage: as they are
        (((12, 12),) * 4, 224, ((12, 12),) * 4),
    ],
)
@pytest.mark.parametrize("name", ["swin-t", "swinv2-t"])
def test_one_window_for_all_is_no_larger_than_a_map(window, image_size, wanted, name):
    config = config_for(name, window_size=window, image_size=image_size)
    assert config.window_size == wanted == fitting(replace(config, window_size=((1, 1),) * 4), window)
    assert with_window(config_for(name, image_size=image_size), fitting(config, window)).window_size == wanted


def test_a_window_is_fitted_to_the_maps_of_the_changed_network():
    small = {
        "depths": (1, 1, 1),
        "num_heads": (1, 1, 1),
        "image_size": (32, 64),
        "patch_size": 2,
        "window_size": 8,
    }
    assert config_for("swin-t", **small).window_size == ((8, 8), (8, 8), (4, 8))
    assert config_for("swin-t", **small, stem_widths=(8,)).window_size == ((8, 8), (4, 8), (2, 4))


@pytest.mark.parametrize(
    ("before", "window", "wanted"),
    [
        ((), 6, ((8, 8),) * 4),
        ((), 8, ()),
        (((0, 0),) * 4, 8, ()),
        (((0, 0),) * 4, 6, ((8, 8),) * 4),
        (((12, 0), (0, 12), (0, 0), (6, 6)), 16, ((12, 8), (8, 12), (8, 8), (6, 6))),
    ],
)
def test_the_scale_of_pre_training_outlives_a_change_of_windows(before, window, wanted):
    config = replace(config_for("swinv2-t"), pretrained_window_size=before)
    moved = with_window(config, window)
    assert moved.pretrained_window_size == wanted
    assert with_window(moved, 10).pretrained_window_size == (wanted or ((8, 8),) * 4)


def test_names_of_swin():
    assert tp.list_models("swin-?") == ["swin-t", "swin-s", "swin-b", "swin-l"]
    assert tp.list_models("swinv2-?") == ["swinv2-t", "swinv2-s", "swinv2-b", "swinv2-l"]
    with pytest.raises(ConfigError, match="near names: swin-"):
        config_for("swin-tiny")


def test_configs_are_frozen_and_named(small):
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().depth = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        ViTConfig(16, 192)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (0, 224)}, "size"),
        ({"crop": 0.0}, "crop"),
        ({"crop": 1.1}, "crop"),
        ({"std": (0.2, 0.0, 0.2)}, "std"),
    ],
)
def test_preprocessing_is_checked(changes, message):
    with pytest.raises(ConfigError, match=message):
        Preprocess(**changes)


def test_an_empty_card_has_defaults():
    assert ModelCard().preprocess == Preprocess()
    assert ModelCard().classes is None
    assert ModelCard().figures == {}


def test_strides_and_grids():
    emoji = SIZES["vit-emoji"]
    assert emoji.stride == 8
    assert emoji.grid == (8, 8)
    assert emoji.prefix == 0
    assert SIZES["vit-r50-b16"].stride == 16
    assert SIZES["vit-r-ti16"].stride == 32
    assert config_for("vit-b16", image_size=(230, 320)).grid == (15, 20)
    assert SIZES["dinov3-s16"].prefix == 5
    assert SIZES["deit-s16-distilled"].prefix == 2
