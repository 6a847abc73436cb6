"""torchvision's and timm's own Swins in double precision, both ways: theirs is read here, ours is loaded there."""

import json
import math

import pytest
import torch

from triptych.errors import CheckpointError
from triptych.weights import export, inspect, load

pytestmark = [
    pytest.mark.proves("Checkpoints", "Swin and Swin V2: timm", by="timm", writes=True),
    pytest.mark.proves("Checkpoints", "Swin and Swin V2: torchvision", by="torchvision", writes=True),
]

timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision.models.swin_transformer")

SMALL = {"embed_dim": 24, "depths": (2, 2, 2), "num_heads": (2, 4, 4)}
SIZES = [(64, 64), (56, 88)]


@pytest.fixture(autouse=True)
def in_double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def of_torchvision(version):
    parts = {}
    if version == 2:
        parts = {"block": models.SwinTransformerBlockV2, "downsample_layer": models.PatchMergingV2}
    sizes = {name: value if name == "embed_dim" else list(value) for name, value in SMALL.items()}
    return models.SwinTransformer(patch_size=[4, 4], window_size=[4, 4], num_classes=5, **sizes, **parts)


def equal(ours, theirs, sizes=SIZES):
    for height, width in sizes:
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("version", [1, 2])
def test_torchvision(version, scramble, tmp_path):
    theirs = scramble(of_torchvision(version)).double()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    described, ours = inspect(tmp_path / "theirs.pth"), load(tmp_path / "theirs.pth")
    assert (described["format"], described["family"], described["fits"]) == ("torchvision", "swin", None)
    assert ours.config.version == version
    equal(ours, theirs)
    export(scramble(ours), tmp_path / "ours.pth", "torchvision")
    again = of_torchvision(version)
    again.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True), strict=True)
    equal(ours, again.double().eval())


@pytest.mark.parametrize("name", ["swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b"])
def test_torchvisions_published_sizes_are_known(name, hollow_file, tmp_path):
    import torchvision

    torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    hollow_file(theirs, tmp_path / "net.safetensors")
    described = inspect(tmp_path / "net.safetensors")
    assert described["fits"] is None
    assert described["parameters"] == weights.meta["num_params"] - (
        _keys_of_bias(theirs) if "v2" in name else 0
    )
    sizes = weights.transforms()
    ours = described["preprocess"]
    assert ours["size"] == [sizes.crop_size[0]] * 2
    assert math.floor(ours["size"][0] / ours["crop"] + 1e-9) == sizes.resize_size[0]


def _keys_of_bias(net):
    """Parameters of version 2 that count for nothing: the keys' third of each bias."""
    return sum(t.numel() // 3 for key, t in net.state_dict().items() if key.endswith("qkv.bias"))


def of_timm(version, **changes):
    architecture = "swin_tiny_patch4_window7_224" if version == 1 else "swinv2_tiny_window8_256"
    options = {"img_size": 64, "window_size": 4, "num_classes": 5, **SMALL, **changes}
    return timm.create_model(architecture, **options), architecture, options


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}, {"img_size": (64, 96), "window_size": (2, 4)}])
def test_timm(version, changes, scramble, tmp_path):
    theirs, architecture, options = of_timm(version, **changes)
    scramble(theirs)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture, "model_args": options}))
    ours, size = load(tmp_path), theirs.patch_embed.img_size
    equal(ours, theirs, [size])
    assert ours.config.image_size == tuple(size)
    export(scramble(ours), tmp_path / "ours", "timm")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    again = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], **config["model_args"]
    )
    timm.models.load_checkpoint(again, str(tmp_path / "ours" / "model.safetensors"), strict=True)
    equal(ours, again.eval().double(), [size])


@pytest.mark.parametrize(
    ("name", "window", "before"),
    [
        ("swinv2_base_window12to24_192to384", 24, (12, 12, 12, 6)),
        ("swinv2_base_window12to16_192to256", 16, (12, 12, 12, 6)),
    ],
)
def test_timm_version_2_fine_tuned_at_another_window(name, window, before, tmp_path, scramble):
    """The architecture tells both windows: in config.json, in the file that timm's training writes, or its name."""
    theirs = scramble(
        timm.create_model(name, embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 2), num_classes=3)
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"architecture": name}))
    torch.save({"arch": name, "state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "last.pth.tar")
    torch.save(theirs.state_dict(), tmp_path / f"{name}.pth")
    images = torch.randn(1, 3, *theirs.patch_embed.img_size)
    with torch.no_grad():
        expected = theirs(images)
        for source in (folder, tmp_path / "last.pth.tar", tmp_path / f"{name}.pth"):
            ours = load(source)
            torch.testing.assert_close(ours(images), expected, rtol=1e-6, atol=1e-6)
            assert ours.config.window_size[0] == (window, window)
            assert ours.config.pretrained_window_size == tuple((side, side) for side in before)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="window_size=8"):
        load(folder)
