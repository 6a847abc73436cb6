"""Microsoft's, timm's and torchvision's names against a slow Swin that takes the tensors as they are."""

import json
import math
import re
import sys
import types

import pytest
import torch
from torch import Tensor

from triptych.errors import CheckpointError
from triptych.weights import export, inspect, load

pytestmark = pytest.mark.proves(
    "Checkpoints", "Swin, Swin V2 and SimMIM: Microsoft's files", by="names", writes=True
)

DIM, DEPTHS, HEADS, SIZE, CLASSES = 16, (2, 2, 2), (2, 4, 4), 64, 5
SIDES = (4, 4, 4)


def index_of(side: int) -> Tensor:
    """As Swin's code makes it."""
    coordinates = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(
        1
    )
    relative = (coordinates[:, :, None] - coordinates[:, None, :]).permute(1, 2, 0).contiguous()
    relative[:, :, 0] += side - 1
    relative[:, :, 1] += side - 1
    relative[:, :, 0] *= 2 * side - 1
    return relative.sum(-1)


def coordinates_of(side: int, before: int) -> Tensor:
    axis = torch.arange(-(side - 1), side, dtype=torch.float32)
    table = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).permute(1, 2, 0).contiguous()[None]
    table /= before - 1
    table *= 8
    return torch.sign(table) * torch.log2(torch.abs(table) + 1.0) / math.log2(8)


def mask_of(rows: int, side: int) -> Tensor:
    shift, image = side // 2, torch.zeros(rows, rows)
    slices = (slice(0, -side), slice(-side, -shift), slice(-shift, None))
    for i, h in enumerate(slices):
        for j, w in enumerate(slices):
            image[h, w] = 3 * i + j
    n = rows // side
    regions = image.view(n, side, n, side).transpose(1, 2).reshape(n * n, side * side)
    apart = regions[:, None, :] != regions[:, :, None]
    return torch.zeros(apart.shape).masked_fill(apart, -100.0)


def microsoft(version=1, sides=SIDES, before=None, head=True) -> dict[str, Tensor]:
    """A checkpoint with all that Swin's own code saves, buffers too, at random."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (DIM, 3, 4, 4)}
    shapes |= dict.fromkeys(
        ("patch_embed.proj.bias", "patch_embed.norm.weight", "patch_embed.norm.bias"), (DIM,)
    )
    output: dict[str, Tensor] = {}
    for stage, (depth, heads, side) in enumerate(zip(DEPTHS, HEADS, sides, strict=True)):
        d, rows = DIM * 2**stage, SIZE // 4 // 2**stage
        for i in range(depth):
            b = f"layers.{stage}.blocks.{i}."
            shapes |= {
                f"{b}{n}.{p}": (d,) for n in ("norm1", "norm2", "attn.proj") for p in ("weight", "bias")
            }
            shapes |= {f"{b}attn.qkv.weight": (3 * d, d), f"{b}attn.proj.weight": (d, d)}
            shapes |= {f"{b}mlp.fc1.weight": (4 * d, d), f"{b}mlp.fc1.bias": (4 * d,)}
            shapes |= {f"{b}mlp.fc2.weight": (d, 4 * d), f"{b}mlp.fc2.bias": (d,)}
            output[f"{b}attn.relative_position_index"] = index_of(side)
            if i % 2 and rows > side:
                output[f"{b}attn_mask"] = mask_of(rows, side)
            if version == 1:
                shapes |= {f"{b}attn.qkv.bias": (3 * d,)}
                shapes |= {f"{b}attn.relative_position_bias_table": ((2 * side - 1) ** 2, heads)}
                continue
            shapes |= {
                f"{b}attn.q_bias": (d,),
                f"{b}attn.v_bias": (d,),
                f"{b}attn.logit_scale": (heads, 1, 1),
            }
            shapes |= {f"{b}attn.cpb_mlp.0.weight": (512, 2), f"{b}attn.cpb_mlp.0.bias": (512,)}
            shapes |= {f"{b}attn.cpb_mlp.2.weight": (heads, 512)}
            output[f"{b}attn.relative_coords_table"] = coordinates_of(side, (before or sides)[stage])
        if stage < len(DEPTHS) - 1:
            m, width = f"layers.{stage}.downsample.", 4 * d if version == 1 else 2 * d
            shapes |= {f"{m}reduction.weight": (2 * d, 4 * d)}
            shapes |= {f"{m}norm.weight": (width,), f"{m}norm.bias": (width,)}
    d = DIM * 4
    shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
    shapes |= {"head.weight": (CLASSES, d), "head.bias": (CLASSES,)} if head else {}
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()} | output


COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")


def renamed(tensors, *pairs, without=()):
    """The same tensors under other names; `pairs` are patterns and what they become."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(tuple(without)):
            continue
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        out[name] = tensor
    return out


def timm(tensors):
    later = (r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample")
    return renamed(tensors, later, (r"^head\.", "head.fc."), without=COMPUTED)


def torchvision(tensors):
    out = renamed(
        tensors,
        (r"^patch_embed\.proj", "features.0.0"),
        (r"^patch_embed\.norm", "features.0.2"),
        (r"^layers\.(\d+)\.downsample", lambda m: f"features.{2 * int(m[1]) + 2}"),
        (r"^layers\.(\d+)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}"),
        (r"mlp\.fc1", "mlp.0"),
        (r"mlp\.fc2", "mlp.3"),
        without=("attn_mask",),
    )
    for name in list(out):
        if name.endswith("relative_position_index"):
            out[name] = out[name].flatten()
        if name.endswith("q_bias"):
            q, v = out.pop(name), out.pop(name.replace("q_bias", "v_bias"))
            out[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return out


V2 = {"version": 2}
LARGER = {"version": 2, "sides": (8, 8, 4), "before": (4, 4, 2)}
#        name: (format, how it is made of Microsoft's, of which tensors)
LAYOUTS = {
    "microsoft": ("microsoft", dict, {}),
    "microsoft headless": ("microsoft", dict, {"head": False}),
    "microsoft v2": ("microsoft", dict, V2),
    "microsoft v2 fine-tuned with larger windows": ("microsoft", dict, LARGER),
    "timm": ("timm", timm, {}),
    "timm headless": ("timm", timm, {"head": False}),
    "timm v2": ("timm", timm, V2),
    "torchvision": ("torchvision", torchvision, {}),
    "torchvision v2": ("torchvision", torchvision, V2),
}


def written(folder, layout):
    """The layout's file, its tensors, the same under Microsoft's names, and how they were made."""
    form, change, options = LAYOUTS[layout]
    tensors = microsoft(**options)
    theirs = change(tensors)
    torch.save({"model": theirs} if form == "microsoft" else theirs, folder / "net.pth")
    if form == "timm" and options.get("version") == 2:  # nothing in its tensors tells the window
        (folder / "config.json").write_text(json.dumps({"model_args": {"window_size": 4, "img_size": 64}}))
    return folder / "net.pth", theirs, tensors, options


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_with_the_slow_network(tmp_path, slow_swin, layout):
    path, _, tensors, options = written(tmp_path, layout)
    said = inspect(path)
    assert (said["format"], said["family"], said["fits"]) == (LAYOUTS[layout][0], "swin", None)
    net, images = load(path), torch.randn(2, 3, 64, 64)
    sides, before = options.get("sides", SIDES), options.get("before")
    assert net.config.window_size == tuple((side, side) for side in sides)
    assert net.config.pretrained_window_size == (tuple((s, s) for s in before) if before else ())
    assert net.config.image_size == (64, 64)
    expected = slow_swin(tensors, images, sides, before)
    with torch.no_grad():
        torch.testing.assert_close(net(images).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_back_every_tensor_is_the_same(tmp_path, layout):
    path, theirs, _, _ = written(tmp_path, layout)
    form = LAYOUTS[layout][0]
    (tmp_path / "back").mkdir()
    export(load(path), tmp_path / "back" / "net.pth", form)
    back = torch.load(tmp_path / "back" / "net.pth", weights_only=True)
    assert list(back) == ["model"] if form == "microsoft" else "model" not in back
    back = back.get("model", back)
    assert set(back) == set(theirs)
    for name, tensor in theirs.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name


def test_what_torchvision_has_for_keys_counts_for_nothing(tmp_path):
    path, theirs, _, _ = written(tmp_path, "torchvision v2")
    images = torch.randn(1, 3, 64, 64)
    expected = load(path)(images)
    for name, tensor in theirs.items():
        if name.endswith("qkv.bias"):
            tensor[len(tensor) // 3 : -len(tensor) // 3] = 9.0
    torch.save(theirs, path)
    net = load(path)
    assert net.config.qkv_bias == "qv"
    assert torch.equal(net(images), expected)
    assert inspect(path)["facts"]["qkv_bias"] == "keys; the keys' third counts for nothing"


def test_simmim_is_read_without_its_decoder(tmp_path, slow_swin):
    tensors = microsoft(sides=(4, 4, 2), head=False)
    saved = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    saved |= {"encoder.mask_token": torch.zeros(1, 1, DIM)}
    saved |= {"decoder.0.weight": torch.randn(192, 64, 1, 1), "decoder.0.bias": torch.randn(192)}
    torch.save({"model": saved}, tmp_path / "net.pth")
    net, images = load(tmp_path / "net.pth"), torch.randn(1, 3, 64, 64)
    # microsoft/SimMIM#30: the tables of a stage whose map is smaller than the window are smaller.
    assert net.config.window_size == ((4, 4), (4, 4), (2, 2))
    assert net.config.num_classes == 0
    expected = slow_swin(tensors, images, (4, 4, 2))
    with torch.no_grad():
        torch.testing.assert_close(net(images).double(), expected, atol=1e-5, rtol=0)


def test_simmims_first_name_of_the_small_mlp(tmp_path):
    old = renamed(microsoft(**V2, head=False), ("cpb_mlp", "rpe_mlp"), (r"^", "encoder."))
    torch.save({"model": old}, tmp_path / "old.pth")
    net = load(tmp_path / "old.pth")
    assert torch.equal(
        net.stages[0].blocks[0].attn.bias_mlp.fc1.weight,
        old["encoder.layers.0.blocks.0.attn.rpe_mlp.0.weight"],
    )


# ---------------------------------------------------------------------------------------- what is beside the tensors


def yacs(module, **values):
    """A node of a yacs config: a dict with a state of its own, pickled by the name of its class."""
    node = module.CfgNode({k: yacs(module, **v) if isinstance(v, dict) else v for k, v in values.items()})
    node.__dict__["__immutable__"] = True
    return node


@pytest.fixture
def yacs_module(monkeypatch):
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return module


@pytest.mark.parametrize("modern", [True, False])
def test_a_training_run_says_more_in_its_config(tmp_path, yacs_module, modern):
    tensors = renamed(microsoft(**LARGER), without=COMPUTED)
    config = yacs(
        yacs_module,
        DATA={"IMG_SIZE": 64, "INTERPOLATION": "bilinear", "DATA_PATH": None},
        MODEL={
            "TYPE": "swinv2",
            "SWIN": {"WINDOW_SIZE": 7},
            "SWINV2": {"WINDOW_SIZE": 8, "PRETRAINED_WINDOW_SIZES": [4, 4, 2]},
        },
        TEST={"CROP": False},
    )
    saved = {
        "model": tensors,
        "config": config,
        "epoch": 3,
        "optimizer": {"state": {0: {"step": torch.ones(1)}}},
    }
    torch.save(saved, tmp_path / "net.pth", _use_new_zipfile_serialization=modern)
    monkeypatched = sys.modules.pop("yacs.config")  # reading needs no such module
    try:
        net = load(tmp_path / "net.pth")
    finally:
        sys.modules["yacs.config"] = monkeypatched
    assert net.config.window_size == ((8, 8), (8, 8), (4, 4))
    assert net.config.pretrained_window_size == ((4, 4), (4, 4), (2, 2))
    assert (net.card.preprocess.mode, net.card.preprocess.interpolation) == ("squash", "bilinear")
    facts = inspect(tmp_path / "net.pth")["facts"]
    assert facts["window_size"] == facts["image_size"] == facts["preprocess"] == "config in the file"


def test_conventions_are_named(tmp_path):
    path, _, _, _ = written(tmp_path, "torchvision")
    facts = inspect(path)["facts"]
    assert facts["window_size"] == "shape of the bias tables"
    assert facts["image_size"] == "convention: the last map is one window"
    assert facts["num_heads"] == "shape of the bias tables"
    assert facts["norm_eps"] == "convention: 1e-05"
    path, _, _, _ = written(tmp_path, "microsoft v2 fine-tuned with larger windows")
    facts = inspect(path)["facts"]
    assert facts["window_size"] == "shape of the tables of coordinates"
    assert facts["pretrained_window_size"] == "values of the coordinate tables"
    assert facts["image_size"] == "the shift's mask"


def test_a_bare_version_2_takes_its_window_from_the_call(tmp_path, slow_swin):
    tensors = microsoft(**V2)
    torch.save(timm(tensors), tmp_path / "net.pth")
    for read in (load, inspect):
        with pytest.raises(
            CheckpointError, match=r"SwinV2 whose windows no tensor determines; .*window_size=8"
        ):
            read(tmp_path / "net.pth")
    net, images = load(tmp_path / "net.pth", window_size=4, image_size=64), torch.randn(1, 3, 64, 64)
    assert (net.config.window_size, net.config.pretrained_window_size) == (((4, 4),) * 3, ())
    with torch.no_grad():
        expected = slow_swin(tensors, images, SIDES)
        torch.testing.assert_close(net(images).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "window", "before", "size"),
    [
        ("swinv2_tiny_window8_256", (8, 8, 8), (), 256),
        ("swinv2_tiny_window16_256", (16, 16, 16), (), 256),
        ("swinv2_base_window12_192", (12, 12, 12), (), 192),
        ("swinv2_base_window12to24_192to384.ms_in22k_ft_in1k", (24, 24, 24), (12, 12, 12), 384),
        ("swinv2_tiny_window16_64", (16, 8, 4), (), 64),
    ],
)
def test_timms_architectures_say_their_windows(tmp_path, architecture, window, before, size):
    torch.save(timm(microsoft(**V2)), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
    config = load(tmp_path).config
    assert config.window_size == tuple((side, side) for side in window)
    assert config.pretrained_window_size == tuple((side, side) for side in before)
    assert config.image_size == (size, size)


def test_timms_config_is_heeded(tmp_path):
    torch.save(timm(microsoft()), tmp_path / "pytorch_model.bin")
    cfg = {"input_size": [3, 96, 80], "crop_pct": 0.95, "crop_mode": "squash", "mean": [0.1, 0.2, 0.3]}
    config = {"architecture": "swin_tiny_patch4_window7_224", "pretrained_cfg": cfg | {"license": "mit"}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"label_names": list("abcde")}))
    net = load(tmp_path)
    assert net.config.image_size == net.card.preprocess.size == (96, 80)
    assert (net.card.preprocess.crop, net.card.preprocess.mode) == (0.95, "squash")
    assert net.card.classes == tuple("abcde")
    assert net.card.license == "mit"


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_args": {"window_size": 7}}, "whose bias tables do not have the rows of the tensors"),
        ({"model_args": {"window_size": "seven"}}, "window_size is 'seven'"),
        ({"model_args": {"window_size": [4, 4, 4, 4]}}, "for each of 3 stages"),
        ({"model_args": {"window_size": -4, "img_size": 64}}, "do not have the rows"),
        ({"model_args": {"act_layer": "relu"}}, "act_layer 'relu'"),
        ({"model_args": 3}, "config.json is damaged"),
    ],
)
def test_timm_configs_that_do_not_fit(tmp_path, config, part):
    torch.save(timm(microsoft()), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=part) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_everything_wrong_is_in_one_error(tmp_path):
    tensors = microsoft()
    tensors["layers.0.blocks.0.attn.qkv.weight"] = torch.ones(3, 3)
    tensors["layers.1.blocks.1.mlp.fc3.weight"] = tensors.pop("layers.1.blocks.1.mlp.fc2.weight")
    del tensors["patch_embed.norm.bias"]
    tensors["absolute_pos_embed"] = torch.ones(1, 256, 16)
    torch.save({"model": tensors}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "net.pth")
    message = str(caught.value)
    assert "net.pth read as microsoft" in message
    assert "\n" not in message
    for name in (
        "2 missing (patch_embed.norm.bias, layers.1.blocks.1.mlp.fc2.weight)",
        "layers.0.blocks.0.attn.qkv.weight: [3, 3], for [48, 16]",
        "2 that no rule knows (layers.1.blocks.1.mlp.fc3.weight, absolute_pos_embed)",
    ):
        assert name in message


@pytest.mark.parametrize(
    "harm",
    [
        {"layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(48, 2)},
        {"layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(49)},
        {"layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(36, 2)},
        {"patch_embed.proj.weight": torch.ones(16, 3)},
        {"patch_embed.proj.weight": torch.ones(0, 3, 4, 4)},
        {"layers.0.blocks.0.mlp.fc1.weight": torch.ones(0, 16)},
        {"layers.0.blocks.1.attn_mask": torch.ones(0, 16, 16)},
        {"layers.0.blocks.0.attn.relative_position_index": torch.full((16, 16), 1 << 40)},
    ],
)
def test_odd_tensors_are_one_line(tmp_path, harm):
    """Those of computed tables are read or passed over; all others are refused."""
    torch.save({"model": microsoft() | harm}, tmp_path / "net.pth")
    if "attn_mask" in next(iter(harm)) or "index" in next(iter(harm)):
        assert load(tmp_path / "net.pth").config.window_size == ((4, 4),) * 3
        return
    with pytest.raises(CheckpointError, match=r"net\.pth") as caught:
        load(tmp_path / "net.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0, 1e-30, 1e30])
def test_odd_coordinates_fall_back_to_convention(tmp_path, value):
    tensors = microsoft(**V2)
    for name in tensors:
        if name.endswith("relative_coords_table"):
            tensors[name] = torch.full_like(tensors[name], value)
    torch.save({"model": tensors}, tmp_path / "net.pth")
    assert load(tmp_path / "net.pth").config.pretrained_window_size == ()


def test_rectangular_windows_come_from_the_index_or_the_call(tmp_path, tiny_swin, same_state):
    net = tiny_swin(window_size=((3, 5), (3, 5), (2, 4)), image_size=(48, 80))
    with pytest.raises(CheckpointError, match="torchvision cannot store windows"):
        export(net, tmp_path / "a.pth", "torchvision")
    net = tiny_swin(window_size=(3, 5), image_size=(48, 80))
    export(net, tmp_path / "a.pth", "torchvision")
    assert inspect(tmp_path / "a.pth")["facts"]["window_size"] == "the index of relative positions"
    same_state(net, load(tmp_path / "a.pth"))
    state = {k: v for k, v in torch.load(tmp_path / "a.pth").items() if "index" not in k}
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"of no square windows; give window_size=\(height, width\)"):
        load(tmp_path / "b.pth")
    reported = load(tmp_path / "b.pth", window_size=(3, 5), image_size=(48, 80))
    same_state(net, reported)
    assert reported.config == net.config
