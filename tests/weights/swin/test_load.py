"""Swin through `load` and `export`: every format there and back, other windows, other sizes, other heads."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from triptych.errors import TriptychError
from triptych.models.configs.swin import with_window
from triptych.models.registry import config_for
from triptych.weights import export, inspect, load, map_head, resize_windows, save
from triptych.weights.exporting import formats
from triptych.weights.mapping.defaults import imagenet_1k_in_22k, imagenet_names
from triptych.weights.mapping.families import build

V2 = {"version": 2}
# Formats -> what of ours they can say, as changes to a small network.
CONFIG_JSON = {
    "triptych": [{}, V2, {"window_size": ((3, 5), (4, 2), (7, 7))}, {"stem_widths": (8,), "patch_size": 2}],
    "microsoft": [
        {},
        {**V2, "window_size": (8, 8, 4), "pretrained_window_size": ((4, 4), (4, 4), (2, 2))},
        {"qkv_bias": "none", "num_classes": 0, "mlp_ratio": 2.6},
        {"image_size": (64, 128), "depths": (1, 2, 1)},
    ],
    "timm": [
        {"window_size": ((2, 4), (4, 4), (4, 2))},
        {"window_size": (2, 4), "image_size": (48, 80), "in_channels": 1},
        {**V2, "window_size": (8, 8, 4), "pretrained_window_size": ((4, 4), (4, 4), (2, 2))},
        {
            **V2,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "window_size": ((4, 8), (4, 8)),
            "image_size": (64, 64),
        },
        {"qkv_bias": "none", "num_classes": 0, "mlp_ratio": 2.6},
    ],
    "hf": [
        {"image_size": (64, 128)},
        {"map_norms": True, "num_classes": 0, "window_size": 8},
        {
            **V2,
            "window_size": (8, 8, 4),
            "pretrained_window_size": ((4, 4), (4, 4), (2, 2)),
            "qkv_bias": "none",
        },
    ],
    "torchvision": [
        {"window_size": (3, 5)},
        {**V2, "num_classes": 0},
        {"window_size": 8, "image_size": (48, 80)},
    ],
}
WAYS = [(form, changes) for form, ways in CONFIG_JSON.items() for changes in ways]


def test_every_format_is_tried():
    assert set(CONFIG_JSON) == set(formats("swin"))


@pytest.mark.parametrize(("form", "changes"), WAYS)
@pytest.mark.parametrize("ending", ["", ".safetensors"])
def test_there_and_back_is_bit_for_bit(tiny_swin, same_state, tmp_path, form, changes, ending):
    """As a folder, and as a bare file that leaves to conventions what it can, the rest to a JSON of ours."""
    net = tiny_swin(**changes)
    net.card = replace(net.card, preprocess=replace(net.card.preprocess, interpolation="bilinear"))
    export(net, tmp_path / f"out{ending}", form)
    back = load(tmp_path / f"out{ending}")
    same_state(net, back)
    assert back.config == replace(net.config, mlp_ratio=back.config.mlp_ratio)
    if form in ("triptych", "hf", "timm") and not ending:
        assert back.card.preprocess == net.card.preprocess
    images = torch.randn(1, net.config.in_channels, *net.config.image_size)
    run = net.features if net.config.map_norms else lambda x: [net(x)]
    again = back.features if net.config.map_norms else lambda x: [back(x)]
    for a, b in zip(run(images), again(images), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", CONFIG_JSON)
def test_bfloat16_goes_there_and_back_too(tiny_swin, same_state, tmp_path, form):
    net = tiny_swin(**CONFIG_JSON[form][-1]).bfloat16()
    export(net, tmp_path / "out", form)
    same_state(net, load(tmp_path / "out"))


@pytest.mark.parametrize("version", [1, 2])
def test_formats_chain(tiny_swin, same_state, tmp_path, version):
    """One network through every format."""
    net = tiny_swin(version=version)
    here = net
    for form in ("timm", "torchvision", "hf", "microsoft", "triptych"):
        export(here, tmp_path / form, form)
        here = load(tmp_path / form)
        assert here.config == net.config
    same_state(net, here)


def test_what_a_bare_file_leaves_out_lies_beside_it(tiny_swin, tmp_path, caplog):
    export(tiny_swin(**V2), tmp_path / "net.pth", "timm")
    message = json.loads((tmp_path / "net.pth.json").read_text())["triptych"]
    assert message["window_size"] == [[4, 4]] * 3
    assert "which other programs do not read" in caplog.text
    assert inspect(tmp_path / "net.pth")["facts"]["window_size"] == "net.pth.json"


@pytest.mark.parametrize(
    ("form", "changes", "part"),
    [
        ("microsoft", {"window_size": (4, 4, 2)}, "cannot store windows 2x2 and 4x4 for images of 64x64"),
        ("microsoft", {"window_size": (2, 4)}, "cannot store windows 2x4"),
        ("microsoft", {"image_size": (72, 72)}, r"a map of 18x18 does not divide into windows of 4x4"),
        ("microsoft", {"map_norms": True, "num_classes": 0}, "parameters without a key there"),
        ("microsoft", {**V2, "qkv_bias": "qkv"}, "attn.qkv.bias"),
        ("microsoft", {"qkv_bias": "qv"}, "attn.q_bias"),
        ("timm", {"window_size": 8}, "none larger than a map"),
        ("timm", {**V2, "window_size": (4, 4, 2)}, "version 2's are one for all stages"),
        ("timm", {"stem_widths": (8,), "patch_size": 2}, "stem"),
        ("timm", {"norm_eps": 1e-6}, "the config of timm cannot store norm_eps 1e-06; write a single file"),
        ("torchvision", {"window_size": (4, 4, 2)}, "torchvision cannot store windows"),
        ("torchvision", {"qkv_bias": "none"}, "qkv_bias 'none'"),
    ],
)
def test_what_a_format_cannot_say_is_refused(tiny_swin, tmp_path, form, changes, part):
    with pytest.raises(TriptychError, match=part):
        export(tiny_swin(**changes), tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_a_format_of_another_family_is_refused(tiny_swin, tmp_path):
    with pytest.raises(
        TriptychError, match=r"google holds a ViT, not Swin; choose one of triptych, timm, microsoft"
    ):
        export(tiny_swin(), tmp_path / "x", "google")


@pytest.mark.parametrize("name", ["swin-t", "swin-b", "swinv2-t"])
def test_published_sizes_are_found_by_shape_alone(name, tmp_path):
    """Full width, one block a stage."""
    config = config_for(name, depths=(1, 1, 1, 1))
    with torch.device("meta"):
        net = build(config)
    net.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    export(net, tmp_path / "net.pth", "microsoft")
    message = inspect(tmp_path / "net.pth")
    assert not (tmp_path / "net.pth.json").exists()
    assert message["config"]["num_heads"] == list(config.num_heads)
    assert message["config"]["image_size"] == list(config.image_size)
    assert message["config"]["window_size"] == [list(window) for window in config.window_size]
    assert message["parameters"] == sum(p.numel() for p in net.parameters())
    assert message["classes"]["names"][207] == "golden retriever"
    assert message["preprocess"]["crop"] == 0.875
    assert message["fits"] is None


# --------------------------------------------------------------------------- another window, another size, another head


def test_another_window_moves_the_tables(tiny_swin, tmp_path):
    net = tiny_swin(window_size=(4, 4, 3))
    save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", window_size=(6, 5, 3))
    assert back.config == replace(net.config, window_size=((6, 6), (5, 5), (3, 3)))
    for stage, (old, new) in enumerate(((4, 6), (4, 5), (3, 3))):
        for a, b in zip(net.stages[stage].blocks, back.stages[stage].blocks, strict=True):
            # Swin's own load_pretrained.
            table = a.attn.bias_table.T.reshape(1, -1, 2 * old - 1, 2 * old - 1)
            side = 2 * new - 1
            if old != new:
                table = F.interpolate(table, size=(side, side), mode="bicubic")
            expected = table.reshape(-1, side * side).T
            torch.testing.assert_close(b.attn.bias_table, expected, atol=1e-6, rtol=0)
            assert b.attn.window == (new, new)
    assert not torch.equal(back(torch.randn(1, 3, 64, 64)), net(torch.randn(1, 3, 64, 64)))
    assert all(torch.equal(a, b) for (n, a), b in zip(net.state_dict().items(), back.state_dict().values(), strict=True)
               if "table" not in n)  # fmt: skip


def test_version_2_keeps_its_scale_and_weights(tiny_swin, same_state, slow_swin, tmp_path):
    net = tiny_swin(**V2)
    export(net, tmp_path / "net.pth", "microsoft")
    back = load(tmp_path / "net.pth", window_size=8, image_size=128)
    same_state(net, back)
    assert back.config == replace(with_window(net.config, 8), image_size=(128, 128))
    assert back.config.pretrained_window_size == ((4, 4),) * 3
    names = torch.load(tmp_path / "net.pth", weights_only=True)["model"]
    images = torch.randn(1, 3, 128, 128)
    expected = slow_swin(names, images, (8, 8, 8), (4, 4, 4))
    with torch.no_grad():
        torch.testing.assert_close(back(images).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("before", [(), ((0, 0),) * 3, ((4, 0), (0, 4), (4, 4))])
def test_version_2_says_the_same_of_the_same_distance(tiny_swin, before):
    net = tiny_swin(**V2, pretrained_window_size=before)
    parts = [block.attn for block in net.blocks()]
    with torch.no_grad():
        old = [part.position_bias()[:, -1].view(-1, 4, 4) for part in parts]  # of the last cell to each
        resize_windows(net, 6)
        new = [part.position_bias()[:, -1].view(-1, *part.window)[:, -4:, -4:] for part in parts]
    for a, b in zip(old, new, strict=True):
        torch.testing.assert_close(b, a)


def test_a_kept_bias_is_forgotten(tiny_swin):
    net, images = tiny_swin(**V2), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        net(images)
        moved = resize_windows(net, 2)(images)
        fresh = build(net.config).eval()
        fresh.load_state_dict(net.state_dict())
        assert torch.equal(moved, fresh(images))


def test_one_window_for_all_is_no_larger_than_a_map(tiny_swin, tmp_path):
    """As the published networks are: window 12 to 24 at 384, the last stage's 12 (of 6)."""
    net = resize_windows(tiny_swin(), 8)
    assert net.config.window_size == ((8, 8), (8, 8), (4, 4))
    config = config_for("swinv2-b", window_size=(12, 12, 12, 6), image_size=192, depths=(1, 1, 1, 1))
    with torch.device("meta"):
        net = build(config)
    net.config = replace(net.config, image_size=(384, 384))
    resize_windows(net, 24)
    assert net.config.window_size == ((24, 24),) * 3 + ((12, 12),)
    assert net.config.pretrained_window_size == ((12, 12),) * 3 + ((6, 6),)


def test_another_image_size_changes_no_weight(tiny_swin, same_state, tmp_path):
    net = tiny_swin()
    save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", image_size=(80, 48))
    same_state(net, back)
    assert back.config.image_size == back.card.preprocess.size == (80, 48)


def test_another_number_of_classes_is_a_zero_head(tiny_swin, tmp_path):
    save(tiny_swin(), tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", num_classes=3)
    assert torch.equal(back(torch.randn(2, 3, 64, 64)), torch.zeros(2, 3))


@pytest.mark.parametrize("window", ["7", (1, 2, 3, 4), 0, ((1, 2), (3, 4))])
def test_windows_that_are_none(tiny_swin, tmp_path, window):
    save(tiny_swin(), tmp_path / "net.safetensors")
    with pytest.raises(TriptychError):
        load(tmp_path / "net.safetensors", window_size=window)


def test_imagenet_1k_out_of_22k(tiny_swin):
    net = tiny_swin(num_classes=21841)
    net.card = replace(net.card, classes=imagenet_names(21841))
    images, places = torch.randn(1, 3, 64, 64), imagenet_1k_in_22k()
    with torch.no_grad():
        before = net(images)
        after = map_head(net, None)(images)
    assert net.config.num_classes == 1000
    torch.testing.assert_close(after, before[:, places])
    assert net.card.classes == imagenet_names(1000)
    named = imagenet_names(21841)
    differing = [i for i, place in enumerate(places) if named[place] != net.card.classes[i]]
    assert differing == [850]  # the teddy bear is in no list but ImageNet-1k's
    assert len(set(places)) == 1000


def test_any_classes_are_kept_in_order(tiny, tiny_swin):
    for net in (tiny(), tiny_swin()):
        net.card = replace(net.card, classes=tuple("abcde"), figures={"top1": 0.5})
        head = net.head.weight.clone()
        map_head(net, [4, 0])
        assert torch.equal(net.head.weight, head[[4, 0]])
        assert (net.config.num_classes, net.card.classes, net.card.figures) == (2, ("e", "a"), {})


@pytest.mark.parametrize(
    ("changes", "indices", "part"),
    [
        ({}, None, "has 5 classes, not ImageNet-22k's 21841"),
        ({}, [5], "classes from 0 to 4"),
        ({}, [-1], "classes from 0 to 4"),
        ({}, [], "classes from 0 to 4"),
        ({"num_classes": 0}, [0], "no single linear head"),
    ],
)
def test_heads_that_cannot_be_mapped(tiny_swin, changes, indices, part):
    with pytest.raises(TriptychError, match=part):
        map_head(tiny_swin(**changes), indices)
