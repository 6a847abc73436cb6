"""`load`, `export` and `inspect` as a user calls them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import triptych as tp
from triptych.errors import TriptychError
from triptych.layers.position import resample_positions
from triptych.models.registry import config_for, create
from triptych.weights import export, fine_tuning_head, inspect, load, resize_positions, save
from triptych.weights.exporting import formats
from triptych.weights.mapping.defaults import imagenet_names

# Formats -> what of ours they can say, as changes to a small network.
CONFIG_JSON = {
    "triptych": [{}, {"pool": "token+mean", "stem": "conv", "stem_widths": (8,), "patch_size": 4}],
    "google": [
        {"mlp": "gelu_tanh"},
        {"mlp": "gelu_tanh", "head": "mlp", "head_dim": 24},
        {"mlp": "gelu_tanh", "num_classes": 0},
        {"mlp": "gelu_tanh", "stem": "resnet", "stem_widths": (32,), "stem_depths": (1, 2), "patch_size": 1},
    ],
    "big_vision": [
        {"mlp": "gelu_tanh", "class_token": False, "pool": "mean"},
        {"mlp": "gelu_tanh", "class_token": False, "pool": "attention", "head": "mlp"},
        {"mlp": "gelu_tanh", "prefix_positions": False},
    ],
    "torchvision": [{}, {"head": "mlp", "head_dim": 24}],
    "timm": [
        {"image_size": (24, 40)},
        {"class_token": False, "pool": "mean", "norm_after_pool": True, "num_registers": 4},
        {"class_token": False, "pool": "attention", "mlp": "gelu_tanh"},
        {"layer_scale": 1e-5, "prefix_positions": False, "num_registers": 4, "mlp": "swiglu"},
        {"distill_token": True},
        {
            "position": "rotary",
            "num_registers": 4,
            "qkv_bias": "qv",
            "norm_eps": 1e-5,
            "layer_scale": 1e-5,
            "num_classes": 0,
        },
        {"stem": "resnet", "stem_widths": (64,), "patch_size": 2},
        {"qkv_bias": "none"},
    ],
    "deit": [{"layer_scale": 1e-5, "prefix_positions": False}, {"distill_token": True}],
    "dinov2": [
        {"layer_scale": 1e-5, "num_registers": 4, "mlp": "swiglu", "num_classes": 0},
        {"layer_scale": 1e-5},
    ],
    "dinov3": [
        {
            "position": "rotary",
            "num_registers": 4,
            "qkv_bias": "qv",
            "norm_eps": 1e-5,
            "layer_scale": 1e-5,
            "num_classes": 0,
        }
    ],
    "hf": [
        {"norm_eps": 1e-12, "image_size": (24, 40)},
        {"head": "mlp", "num_classes": 0},
        {"distill_token": True},
        {"layer_scale": 1e-5, "num_registers": 4, "pool": "token+mean", "mlp_ratio": 2.0},
        {"position": "rotary", "qkv_bias": "qv", "layer_scale": 1e-5, "num_classes": 0, "rotary_base": 50.0},
    ],
}
WAYS = [(form, changes) for form, ways in CONFIG_JSON.items() for changes in ways]


def test_every_format_is_tried():
    assert set(CONFIG_JSON) == set(formats("vit"))


@pytest.mark.parametrize(("form", "changes"), WAYS)
def test_there_and_back_is_bit_for_bit(tiny, same_state, tmp_path, form, changes):
    net = tiny(**changes)
    net.card = replace(net.card, preprocess=replace(net.card.preprocess, interpolation="bilinear"))
    where = export(net, tmp_path / "out", form)
    assert where.exists()
    back = load(tmp_path / "out")
    same_state(net, back)
    if form in ("triptych", "hf", "timm"):
        assert back.card.preprocess == net.card.preprocess
    images = torch.randn(2, 3, *net.config.image_size)
    torch.testing.assert_close(back(images), net(images))


@pytest.mark.parametrize("form", CONFIG_JSON)
def test_bfloat16_goes_there_and_back_too(tiny, same_state, tmp_path, form):
    net = tiny(**CONFIG_JSON[form][0]).bfloat16()
    export(net, tmp_path / "out", form)
    same_state(net, load(tmp_path / "out"))


def test_formats_chain(tiny, same_state, tmp_path):
    """One network through every format that can say it."""
    net = tiny()
    here = net
    for i, form in enumerate(("timm", "torchvision", "hf", "triptych")):
        export(here, tmp_path / str(i), form)
        here = load(tmp_path / str(i))
    same_state(net, here)


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".bin"])
def test_a_single_file_of_a_folder_format(tiny, same_state, tmp_path, ending):
    net = tiny()
    assert export(net, tmp_path / f"net{ending}", "timm") == tmp_path / f"net{ending}"
    assert [p.name for p in tmp_path.iterdir()] == [f"net{ending}"]
    same_state(net, load(tmp_path / f"net{ending}"))


def test_export_refuses(tiny, tmp_path):
    net = tiny()
    with pytest.raises(
        TriptychError, match=r"no format is called '7z'; choose one of triptych, .*google, big_vision.*, onnx"
    ):
        export(net, tmp_path / "x", "7z")
    with pytest.raises(TriptychError, match=r"is written to a folder or to .npz, not to x.pth"):
        export(tiny(mlp="gelu_tanh"), tmp_path / "x.pth", "google")
    with pytest.raises(TriptychError, match="timm holds a Swin or a ViT, not Linear"):
        export(torch.nn.Linear(2, 2), tmp_path / "x", "timm")
    with pytest.raises(
        TriptychError, match=r"the config of timm cannot store norm_eps 0.001; write a single file"
    ):
        export(tiny(norm_eps=1e-3), tmp_path / "x", "timm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["vit-b16", "vit-s32", "vit-l16", "vit-h14", "deit-b16-distilled", "dinov2-g14"]
)
def test_published_sizes_are_found_by_shape_alone(name, tmp_path):
    """Full width, one block: heads come from the convention."""
    config = config_for(name, depth=1)
    net = create(name, depth=1)
    export(net, tmp_path / "net.pth", "dinov2" if "dino" in name else "timm")
    report = inspect(tmp_path / "net.pth")
    assert report["config"]["num_heads"] == config.num_heads
    assert report["config"]["image_size"] == list(config.image_size)
    assert report["parameters"] == sum(p.numel() for p in net.parameters())
    assert report["fits"] is None


# ------------------------------------------------------------------------------------- another head, another size


def test_another_number_of_classes_is_a_zero_head(tiny, tmp_path):
    net = tiny(head="mlp", num_classes=7)
    net.card = replace(net.card, classes=tuple("abcdefg"))
    save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", num_classes=3)
    assert (back.config.num_classes, back.config.head) == (3, "linear")
    assert back.card.classes is None
    assert torch.equal(back(torch.randn(2, 3, 32, 32)), torch.zeros(2, 3))
    assert torch.equal(back.encoder[1].mlp.fc1.weight, net.encoder[1].mlp.fc1.weight)
    remaining = load(tmp_path / "net.safetensors", num_classes=7)
    assert remaining.config.head == "mlp"
    assert remaining.card.classes == tuple("abcdefg")


def test_both_heads_of_a_distilled_network_are_replaced(tiny):
    net = fine_tuning_head(tiny(distill_token=True), 4)
    assert net.head.out_features == net.head_distill.out_features == 4
    with pytest.raises(TriptychError, match="must be at least 1"):
        fine_tuning_head(net, 0)


def test_a_headless_network_gets_a_head(tiny, tmp_path):
    export(tiny(num_classes=0), tmp_path, "timm")
    assert load(tmp_path, num_classes=2)(torch.randn(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize("size", [48, (24, 40), (16, 64)])
def test_another_image_size_moves_the_positions(tiny, tmp_path, size):
    net = tiny()
    save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", image_size=size)
    wanted = (size, size) if isinstance(size, int) else size
    assert back.config.image_size == back.card.preprocess.size == wanted
    expected = resample_positions(net.positions, (4, 4), back.config.grid, 1)
    assert torch.equal(back.positions, expected)
    assert torch.equal(back.positions[:, :1], net.positions[:, :1])
    images = torch.randn(1, 3, *wanted)
    torch.testing.assert_close(back(images), net(images))


def test_the_same_size_changes_nothing(tiny, tmp_path, same_state):
    net = tiny()
    save(net, tmp_path / "net.safetensors")
    same_state(net, load(tmp_path / "net.safetensors", image_size=32))
    with pytest.raises(TriptychError, match="positive numbers of pixels"):
        resize_positions(net, (0, 3))


def test_positions_that_are_computed_only_change_the_config(tiny, tmp_path):
    save(tiny(position="sincos"), tmp_path / "net.safetensors")
    assert load(tmp_path / "net.safetensors", image_size=48).config.image_size == (48, 48)


def test_a_window_is_refused(tiny, tmp_path):
    save(tiny(), tmp_path / "net.safetensors")
    with pytest.raises(TriptychError, match="has no windows"):
        load(tmp_path / "net.safetensors", window_size=7)


# ------------------------------------------------------------------------------------------------- bad input


def test_no_such_thing(tmp_path):
    for source in (tmp_path / "gone.pth", str(tmp_path / "gone"), "./gone", "gone.safetensors"):
        with pytest.raises(TriptychError, match="no file or folder"):
            tp.load(source)
    with pytest.raises(TriptychError, match="did you mean 'vit-emoji'"):
        tp.load("vit-emojis")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (
            ["layers.0.blocks.0.attn.relative_position_bias_table", "patch_embed.proj.weight"],
            "a Swin Transformer",
        ),
        (["features.1.0.attn.relative_position_bias_table"], "a Swin Transformer"),
        (
            ["swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table"],
            "a Swin Transformer",
        ),
        (
            ["model.diffusion_model.double_blocks.0.x", "first_stage_model.x"],
            "a latent diffusion model",
        ),
        (["stages.0.blocks.0.attn.meta_mlp.fc1.weight"], "timm's own SwinV2"),
        (["model.pixel_level_module.encoder.layers.0.blocks.0.layernorm_before.weight"], "a MaskFormer"),
        (["backbone.conv1.weight", "decode_head.conv_seg.weight"], "a segmentation network"),
        (["layer1.0.conv1.weight", "fc.weight"], "a ResNet"),
        (["visual.conv1.weight", "logit_scale"], "a CLIP"),
        (["some", "thing"], "2 tensors such as some, thing"),
    ],
)
def test_another_kind_of_network_is_named(tmp_path, names, what):
    save_file({name: torch.ones(2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(
        TriptychError, match=f"x.safetensors is no network of a known format: it looks like {what}"
    ):
        load(tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert report["format"] is None
    assert what in report["looks_like"]


def test_a_checkpoint_with_parts_missing_and_shuffled_lists_all(tiny, tmp_path):
    export(tiny(), tmp_path / "net.safetensors", "timm")
    state = load_file(tmp_path / "net.safetensors")
    state["blocks.0.attn.qkv.weight"], state["head.weight"] = (
        state.pop("head.weight"),
        state["blocks.0.attn.qkv.weight"],
    )
    state["blocks.1.mlp.fc3.weight"] = state.pop("blocks.1.mlp.fc2.weight")
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(TriptychError) as caught:
        load(tmp_path / "net.safetensors")
    message = str(caught.value)
    assert "net.safetensors read as timm" in message
    for name in (
        "blocks.0.attn.qkv.weight",
        "head.bias",
        "blocks.1.mlp.fc3.weight",
        "blocks.1.mlp.fc2.weight",
    ):
        assert name in message
    assert "\n" not in message


def test_a_gap_in_the_blocks_is_found(tiny, tmp_path):
    export(tiny(depth=3), tmp_path / "net.safetensors", "timm")
    state = load_file(tmp_path / "net.safetensors")
    save_file({k: v for k, v in state.items() if ".1." not in k}, tmp_path / "net.safetensors")
    with pytest.raises(TriptychError, match=r"that no rule knows \(blocks.2"):
        load(tmp_path / "net.safetensors")


def test_whole_numbers_are_no_weights(tiny, tmp_path):
    export(tiny(), tmp_path / "net.safetensors", "timm")
    state = {k: v.to(torch.int8) for k, v in load_file(tmp_path / "net.safetensors").items()}
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(TriptychError, match="needed are floating point numbers"):
        load(tmp_path / "net.safetensors")


def test_mixed_precision_becomes_the_widest(tiny, tmp_path):
    export(tiny(), tmp_path / "net.safetensors", "timm")
    state = load_file(tmp_path / "net.safetensors")
    state = {k: v.half() if "mlp" in k else v for k, v in state.items()}
    save_file(state, tmp_path / "net.safetensors")
    assert {p.dtype for p in load(tmp_path / "net.safetensors").parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------- class names


@pytest.mark.parametrize(
    ("count", "first"), [(1000, "tench"), (21841, "organism, being"), (21843, "organism, being")]
)
def test_imagenets_names(count, first):
    names = imagenet_names(count)
    assert len(names) == count
    assert names[0].startswith(first)
    assert imagenet_names(count + 1) is None


def test_imagenets_names_come_with_a_thousand_classes(tiny, tmp_path):
    export(tiny(num_classes=1000), tmp_path / "net.pth", "torchvision")
    net = tp.load(tmp_path / "net.pth")
    assert net.card.classes[207] == "golden retriever"
    assert "ImageNet-1k, by the number of classes" in net.card.source
    assert "convention: 32x32" in net.card.source


def test_inspect_is_plain_json(tiny, tmp_path):
    export(tiny(), tmp_path, "hf")
    json.dumps(inspect(tmp_path))
