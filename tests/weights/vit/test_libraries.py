"""timm's and torchvision's own ViTs in double precision, both ways: theirs is read here, ours is loaded there."""

import json
import logging

import pytest
import torch

from triptych.errors import CheckpointError
from triptych.weights import export, inspect, load

pytestmark = [
    pytest.mark.proves("Checkpoints", "ViT: timm", by="timm", writes=True),
    pytest.mark.proves("Checkpoints", "ViT: torchvision", by="torchvision", writes=True),
]

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

#   architecture: arguments that make it small, or {} where only the depth may change
ARCHITECTURES = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch32_224": {"img_size": 64},
    "vit_base_patch16_gap_224": {},
    "vit_base_patch8_224": {"img_size": 32},
    "vit_tiny_r_s16_p8_224": {},
    "vit_small_r26_s32_224": {"img_size": (64, 96)},
    "vit_base_patch32_clip_224": {},
    "vit_base_patch32_clip_quickgelu_224": {},
    "vit_base_patch16_siglip_224": {"img_size": 64},
    "vit_base_patch32_siglip_gap_256": {},
    "vit_so400m_patch14_siglip_gap_384": {"img_size": 48},
    "vit_medium_patch16_reg4_gap_256": {"img_size": 64},
    "vit_so150m_patch16_reg4_gap_256": {"img_size": 64},
    "vit_so150m2_patch16_reg1_gap_256": {"img_size": 64},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "vit_giant_patch14_dinov2": {"img_size": 56, "embed_dim": 96, "num_heads": 3},
    "vit_small_patch16_dinov3": {},
    "vit_small_plus_patch16_dinov3_qkvb": {},
    "flexivit_small": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
}
# torchvision's and timm's hybrids normalize with other epsilons than Google's.
LOOSE = {"vit_tiny_r_s16_p8_224": 1e-3, "vit_small_r26_s32_224": 1e-3}


@pytest.fixture(autouse=True)
def in_double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def compare(ours, theirs, size, tolerance=1e-6):
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = theirs(images)
        rows, columns = ours.config.image_size if ours.config.position == "learned" else size
        result = ours(images[..., :rows, :columns])
        assert (result - expected).norm() < tolerance * expected.norm()


def of_timm(name, scramble, folder, **more):
    options = {"depth": 2, **ARCHITECTURES.get(name, {}), **more}
    net = timm.create_model(name, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1)
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    config = {
        "architecture": name,
        "num_classes": net.num_classes,
        "model_args": options,
        "global_pool": net.global_pool,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return net.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_timm(name, scramble, tmp_path):
    theirs = of_timm(name, scramble, tmp_path)
    size, tolerance = tuple(theirs.patch_embed.img_size or (64, 64)), LOOSE.get(name, 1e-6)
    ours = load(tmp_path)
    compare(ours, theirs, size, tolerance)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.1)
    if "clip" in name:
        ours.patch.proj.bias.data.zero_()
    export(ours, tmp_path / "ours", "timm")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    again = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], **config["model_args"]
    )
    timm.models.load_checkpoint(again, str(tmp_path / "ours" / "model.safetensors"), strict=True)
    compare(ours, again.double().eval(), ours.config.image_size, tolerance)


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb", "deit3_small_patch16_224"]
)
def test_timms_state_dict_alone(name, scramble, tmp_path):
    theirs = of_timm(name, scramble, tmp_path)
    (tmp_path / "config.json").unlink()
    compare(load(tmp_path), theirs, tuple(theirs.patch_embed.img_size or (64, 64)))


@pytest.mark.parametrize(
    ("name", "width", "heads"),
    [
        ("vit_huge_plus_patch16_dinov3", 1280, 20),
        ("vit_7b_patch16_dinov3", 4096, 32),
        ("vit_giantopt_patch16_siglip_gap_256", 1536, 16),
    ],
)
def test_heads_of_wide_networks(name, width, heads, hollow_file, tmp_path):
    torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        theirs = timm.create_model(name, depth=1)
    assert theirs.blocks[0].attn.num_heads == heads
    assert theirs.embed_dim == width
    hollow_file(theirs, tmp_path / "net.safetensors")
    described = inspect(tmp_path / "net.safetensors")
    assert described["config"]["num_heads"] == heads
    assert described["fits"] is None


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_rope_224",
        "vit_small_patch16_rope_ape_224",
        "vit_base_patch16_rpn_224",
        "vit_medium_patch16_rope_reg1_gap_256",
    ],
)
def test_other_networks_are_refused_by_their_names(name, scramble, tmp_path):
    of_timm(name, scramble, tmp_path)
    with pytest.raises(CheckpointError, match=f"is timm's {name} \\(architecture in config.json\\)"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "pytorch_model.bin").rename(tmp_path / f"{name}-0123abcd.pth")
    with pytest.raises(CheckpointError, match=f"is timm's {name} \\(name of the file\\)"):
        load(tmp_path / f"{name}-0123abcd.pth")


@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_rope_224", "vit_base_patch16_rope_mixed_224", "vit_medium_patch16_rope_reg1_gap_256"],
)
def test_positions_that_nothing_tells_are_refused(name, scramble, tmp_path):
    of_timm(name, scramble, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="positions"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "eva02_small_patch14_336", "vit_pe_core_tiny_patch16_384"]
)
def test_rotary_positions_next_to_a_table_are_refused(name, scramble, tmp_path):
    of_timm(name, scramble, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has rotary positions of another form"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("beitv2_base_patch16_224", "has relative positions"),
        ("cait_xxs24_224", "has talking heads"),
        ("samvit_base_patch16", "has"),
    ],
)
def test_relatives_of_the_vit_are_refused_by_name_or_by_what_they_have(name, what, tmp_path):
    theirs = timm.create_model(name, depth=1, img_size=32, embed_dim=96, num_heads=3)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=what):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    with pytest.raises(CheckpointError, match=f"is timm's {name} \\(config.json\\)"):
        load(tmp_path)


def test_heads_of_an_unpublished_width_are_a_guess(scramble, tmp_path, caplog):
    for width, warned in ((192, False), (256, True)):
        theirs = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, embed_dim=width, num_heads=4)
        torch.save(theirs.state_dict(), tmp_path / "net.pth")
        caplog.clear()
        load(tmp_path / "net.pth")
        assert ("num_heads is a guess: heads of 64 channels" in caplog.text) == warned


def test_a_classifier_without_bias(scramble, tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, embed_dim=64, num_heads=1)
    theirs.head = torch.nn.Linear(64, 3, bias=False)
    theirs = scramble(theirs).eval()
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    compare(load(tmp_path / "net.pth"), theirs, (32, 32))


def test_the_keys_of_deit_3_may_be_a_rope_vits(scramble, tmp_path, caplog):
    of_timm("vit_small_patch16_rope_ape_224", scramble, tmp_path)
    (tmp_path / "config.json").unlink()
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    assert "RoPE-ViT has the same keys" in caplog.text


@pytest.mark.parametrize(
    "options",
    [{"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}, {"reg_tokens": 3, "class_token": False}],
)
def test_registers_with_and_without_positions(options, scramble, tmp_path):
    pool = "avg" if "class_token" in options else "token"
    theirs = timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=64, num_classes=5, global_pool=pool, **options
    )
    theirs = scramble(theirs.double()).eval()
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    compare(load(tmp_path / "net.pth"), theirs, (64, 64))


def test_a_clip_tower_without_config_says_that_its_activation_is_a_guess(scramble, tmp_path, caplog):
    of_timm("vit_base_patch32_clip_224", scramble, tmp_path)
    load(tmp_path)
    assert not caplog.records
    (tmp_path / "config.json").unlink()
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    assert "quick_gelu" in caplog.text


def of_torchvision(**options):
    sizes = {
        "image_size": 64,
        "patch_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 128,
        "mlp_dim": 96,
    }
    return torchvision.models.VisionTransformer(**sizes, num_classes=5, **options)


@pytest.mark.parametrize("options", [{}, {"representation_size": 24}])
def test_torchvision(options, scramble, tmp_path):
    theirs = scramble(of_torchvision(**options))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = load(tmp_path / "theirs.pth")
    compare(ours, theirs, (64, 64))
    export(scramble(ours), tmp_path / "ours.pth", "torchvision")
    again = of_torchvision(**options)
    again.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True), strict=True)
    compare(ours, again.eval(), (64, 64))


def test_torchvisions_positions_are_resampled_as_by_its_function(scramble, tmp_path):
    theirs = scramble(of_torchvision())
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    resampled = torchvision.models.vision_transformer.interpolate_embeddings(96, 16, theirs.state_dict())
    larger = torchvision.models.VisionTransformer(96, 16, 2, 2, 128, 96, num_classes=5)
    larger.load_state_dict(resampled)
    compare(load(tmp_path / "net.pth", image_size=96), larger.double().eval(), (96, 96))


def test_timms_positions_are_resampled_as_there(scramble, tmp_path):
    theirs = of_timm("vit_tiny_patch16_224", scramble, tmp_path, img_size=64, dynamic_img_size=True)
    images = torch.randn(1, 3, 96, 48)
    with torch.no_grad():
        expected = theirs(images)
        assert (load(tmp_path)(images) - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"])
def test_torchvisions_preprocessing(name, hollow_file, tmp_path):
    torch.set_default_dtype(torch.float32)
    weights = torchvision.models.get_model_weights(name)
    for published in weights:
        if "LINEAR" in published.name:
            continue
        sizes = published.transforms()
        with torch.device("meta"):
            theirs = torchvision.models.get_model(name, image_size=sizes.crop_size[0])
        hollow_file(theirs, tmp_path / "net.safetensors")
        ours = inspect(tmp_path / "net.safetensors")["preprocess"]
        assert ours["size"] == [sizes.crop_size[0]] * 2
        assert round(ours["size"][0] / ours["crop"]) == sizes.resize_size[0], published
        assert ours["interpolation"] == sizes.interpolation.value
