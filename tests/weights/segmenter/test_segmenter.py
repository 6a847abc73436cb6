"""Segmenters in files: ours, transformers' UperNet, mmsegmentation's names with a merging by nn.Unfold."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import save_file

from triptych.errors import TriptychError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.registry import config_for
from triptych.weights import export, inspect, load, save
from triptych.weights.exporting import formats
from triptych.weights.mapping.families import from_json, to_json

pytestmark = [
    pytest.mark.proves("Checkpoints", "UPerNet on Swin: transformers", by="transformers", writes=True),
    pytest.mark.proves("Checkpoints", "UPerNet on Swin: mmsegmentation", by="names", writes=True),
]

BACKBONE = {
    "image_size": 128,
    "embed_dim": 16,
    "depths": [2, 2, 1, 1],
    "num_heads": [2, 4, 4, 4],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


def upernet(scramble, **changes):
    config = hf.UperNetConfig(
        backbone_config=hf.SwinConfig(**BACKBONE),
        **{"hidden_size": 8, "auxiliary_channels": 6, "num_labels": 5, **changes},
    )
    return scramble(hf.UperNetForSemanticSegmentation(config))


@pytest.mark.parametrize("changes", [{}, {"use_auxiliary_head": False}, {"pool_scales": [1, 4]}])
def test_parity_with_transformers_in_both_directions(scramble, tmp_path, same_state, changes):
    theirs = upernet(scramble, **changes)
    theirs.config.id2label = dict(enumerate("abcde"))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    assert ours.card.classes == tuple("abcde")
    for size in ((128, 128), (100, 131)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), theirs(images).logits, atol=1e-5, rtol=0)

    export(ours, tmp_path / "ours", "hf")
    back, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    state = theirs.state_dict()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, state[name]) or name.startswith("backbone.swin.layernorm"), name
    assert back.config.id2label == dict(enumerate("abcde"))
    again = load(tmp_path / "ours")
    same_state(ours, again)
    assert again.config == ours.config


def test_the_auxiliary_head_answers_as_theirs(scramble, tmp_path):
    theirs = upernet(scramble)
    theirs.save_pretrained(tmp_path)
    ours, images = load(tmp_path), torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        expected = theirs.auxiliary_head(theirs.backbone(images).feature_maps)
        expected = F.interpolate(expected, size=(128, 128), mode="bilinear")
        torch.testing.assert_close(ours.with_aux(images)[1], expected, atol=1e-5, rtol=0)


def test_new_keys_and_the_oldest_are_read_as_those_between(scramble, tmp_path, same_state):
    """transformers 5's in memory; and as published, without the norm that nothing reads and with the index."""
    theirs = upernet(scramble)
    theirs.save_pretrained(tmp_path / "between")
    ours = load(tmp_path / "between")
    (tmp_path / "new").mkdir()
    config = (tmp_path / "between" / "config.json").read_text()
    save_file(theirs.state_dict(), tmp_path / "new" / "model.safetensors")
    (tmp_path / "new" / "config.json").write_text(config)
    same_state(ours, load(tmp_path / "new"))
    export(ours, tmp_path / "oldest", "hf")
    same_state(ours, load(tmp_path / "oldest"))


def test_preprocessing_and_classes_go_to_transformers_and_back(tiny_segmenter, tmp_path):
    net = tiny_segmenter(num_classes=2)
    net.card = ModelCard(
        preprocess=Preprocess(size=(128, 128), mode="squash", crop=1.0), classes=("sky", "sea")
    )
    export(net, tmp_path, "hf")
    message = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert message["image_processor_type"] == "SegformerImageProcessor"
    back = load(tmp_path)
    assert back.card.preprocess == net.card.preprocess
    assert back.card.classes == ("sky", "sea")


# --------------------------------------------------------------------------------------------------- mmsegmentation


def renamed(tensors, *pairs):
    out = {}
    for name, tensor in tensors.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        out[name] = tensor
    return out


# mmsegmentation's names <- ours; what stands in the file is also what the slow network is given.
HEAD = (
    (r"^decoder\.pooling\.pools\.(\d+)\.", r"decode_head.psp_modules.\1.1."),
    (r"^decoder\.pooling\.join\.", "decode_head.bottleneck."),
    (r"^decoder\.lateral\.", "decode_head.lateral_convs."),
    (r"^decoder\.smooth\.", "decode_head.fpn_convs."),
    (r"^decoder\.join\.", "decode_head.fpn_bottleneck."),
    (r"^classifier\.", "decode_head.conv_seg."),
    (r"^aux\.0\.", "auxiliary_head.convs.0."),
    (r"^aux\.1\.", "auxiliary_head.conv_seg."),
    (r"^((?:decode|auxiliary)_head\..*)\.norm\.", r"\1.bn."),
)
SWIN = (
    (r"^backbone\.patch\.proj", "backbone.patch_embed.proj"),
    (r"^backbone\.patch_norm", "backbone.patch_embed.norm"),
    (r"^backbone\.stages\.(\d+)\.merge", lambda m: f"backbone.layers.{int(m[1]) - 1}.downsample"),
    (r"^backbone\.stages", "backbone.layers"),
    (r"^backbone\.norms\.(\d+)", r"backbone.norm\1"),
    (r"attn\.bias_table", "attn.relative_position_bias_table"),
)
UNFOLD = (
    (r"^backbone\.layers", "backbone.stages"),
    (r"\.attn\.", ".attn.w_msa."),
    (r"mlp\.fc1", "ffn.layers.0.0"),
    (r"mlp\.fc2", "ffn.layers.1"),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
)


def published(net, form):
    """A checkpoint of that format with tensors of its own, random everywhere; merging is not moved to ours."""
    torch.manual_seed(1)
    state = {
        name: t if t.ndim == 0 or "running_var" in name else torch.randn_like(t) * 0.2
        for name, t in net.state_dict().items()
    }
    state = renamed(state, *HEAD, *SWIN, *(UNFOLD if form == "mmseg" else ()))
    inside = "attn.w_msa." if form == "mmseg" else "attn."
    for name in [n for n in state if n.endswith("relative_position_bias_table")]:
        # mmsegmentation's double_step_seq, the older code's sum of coordinates: the same numbers.
        row = (7 * torch.arange(4)[:, None] + torch.arange(4)[None]).reshape(1, -1)
        index = (row + row.T).flip(1).contiguous()
        state[name.replace("relative_position_bias_table", "relative_position_index")] = index
        assert inside in name
    return state


@pytest.mark.parametrize("form", ["mmseg", "swin_seg"])
def test_parity_with_the_slow_backbone(tiny_segmenter, slow_swin, tmp_path, form):
    """The tensors as published in a network that merges by nn.Unfold, ours after the permutation."""
    net = tiny_segmenter()
    state = published(net, form)
    torch.save({"meta": {"CLASSES": tuple("abcde")}, "state_dict": state}, tmp_path / "net.pth")
    message = inspect(tmp_path / "net.pth")
    assert (message["format"], message["family"], message["fits"]) == (form, "segmenter", None)
    assert message["classes"] == {"number": 5, "names": list("abcde")}
    assert message["config"]["backbone"]["config"]["image_size"] == [512, 512]
    ours, images = load(tmp_path / "net.pth"), torch.randn(1, 3, 128, 96)
    names = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    if form == "mmseg":
        names = renamed(
            names,
            ("^stages", "layers"),
            (r"attn\.w_msa", "attn"),
            (r"ffn\.layers\.0\.0", "mlp.fc1"),
            (r"ffn\.layers\.1", "mlp.fc2"),
            ("projection", "proj"),
        )
    expected = slow_swin(names, images, (4, 4, 4, 4), unfold=form == "mmseg", single=True)
    with torch.no_grad():
        maps = ours.backbone.features(images)
        for got, wanted in zip(maps, expected, strict=True):
            torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=0)
        # With the other merging the answer is another one: the test would see a missing permutation.
        other = slow_swin(names, images, (4, 4, 4, 4), unfold=form != "mmseg", single=True)
        assert (maps[1].double() - other[1]).abs().max() > 0.1
        # Of a small image the second map is one window, which these backbones shift and a classifier does not.
        small = torch.randn(1, 3, 32, 32)
        maps = ours.backbone.features(small)
        for single in (True, False):
            expected = slow_swin(names, small, (4, 4, 4, 4), unfold=form == "mmseg", single=single)
            assert ((maps[1].double() - expected[1]).abs().max() < 1e-5) == single


@pytest.mark.parametrize("form", ["mmseg", "swin_seg"])
def test_written_back_every_tensor_is_the_same(tiny_segmenter, tmp_path, form):
    state = published(tiny_segmenter(), form)
    torch.save(
        {"state_dict": state, "meta": {"dataset_meta": {"classes": list("vwxyz")}}}, tmp_path / "net.pth"
    )
    net = load(tmp_path / "net.pth")
    assert net.card.classes == tuple("vwxyz")
    export(net, tmp_path / "back.pth", form)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back["meta"] == {"CLASSES": tuple("vwxyz"), "dataset_meta": {"classes": tuple("vwxyz")}}
    assert set(back["state_dict"]) == set(state)
    for name, tensor in state.items():
        assert back["state_dict"][name].dtype == tensor.dtype
        assert torch.equal(back["state_dict"][name], tensor), name


def test_the_head_of_mmsegmentation_is_transformers(tiny_segmenter, scramble, tmp_path, same_state):
    """One network through all formats that can say it."""
    net = tiny_segmenter()
    here = net
    for form in ("hf", "mmseg", "swin_seg", "triptych"):
        export(here, tmp_path / form, form)
        here = load(tmp_path / form)
        always = form != "hf"  # the authors' backbones shift a map of one window, transformers' do not
        backbone = replace(net.config.backbone, shift_single_windows=always)
        assert here.config == replace(net.config, backbone=backbone)
    same_state(net, here)


# ------------------------------------------------------------------------------------------------------------- ours


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"type": "fpn", "aux_channels": 0},
        {"type": "unet", "image_branch_channels": 4},
        {"backbone": config_for("vit-ti16", image_size=(64, 48), depth=4, num_classes=0)},
        {"backbone": config_for("convnet-unet", widths=(4, 8)), "type": "unet"},
    ],
)
def test_a_saved_segmenter_comes_back_bit_for_bit(tiny_segmenter, same_state, tmp_path, changes):
    net = tiny_segmenter(**changes)
    save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors")
    same_state(net, back)
    assert back.config == net.config
    assert inspect(tmp_path / "net.safetensors")["family"] == "segmenter"


def test_batch_statistics_come_back_in_the_networks_own_type(tiny_segmenter, tmp_path):
    net = tiny_segmenter()
    save(net, tmp_path / "small.safetensors", dtype=torch.float16)
    back = load(tmp_path / "small.safetensors")
    assert {t.dtype for t in back.state_dict().values()} == {torch.float32, torch.int64}
    back(torch.randn(1, 3, 64, 64))


def test_configs_with_parts_go_to_json_and_back(tiny_segmenter):
    config = tiny_segmenter().config
    data = json.loads(json.dumps(to_json(config)))
    assert data["backbone"]["family"] == "swin"
    assert from_json("segmenter", data) == config
    for damage in ({"backbone": 3}, {"backbone": {"family": "octopus", "config": {}}}, {"backbone": {}}):
        with pytest.raises(TriptychError):
            from_json("segmenter", data | damage)


def test_a_segmenter_is_moved_like_its_backbone(tiny_segmenter, tmp_path):
    save(tiny_segmenter(), tmp_path / "net.safetensors")
    net = load(tmp_path / "net.safetensors", num_classes=3, image_size=64, window_size=2)
    assert (net.config.num_classes, net.classifier.out_channels, net.aux[1].out_channels) == (3, 3, 3)
    assert net.config.image_size == net.backbone.config.image_size == net.card.preprocess.size == (64, 64)
    assert net.config.backbone.window_size == ((2, 2),) * 4
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)


def test_what_the_formats_hold(tiny_segmenter, tiny, tmp_path):
    assert formats("segmenter") == ["triptych", "hf", "mmseg", "swin_seg"]
    with pytest.raises(
        TriptychError, match="timm holds a Swin or a ViT, not Segmenter; choose one of triptych, hf, mm"
    ):
        export(tiny_segmenter(), tmp_path / "x", "timm")
    with pytest.raises(TriptychError, match="mmseg holds a Segmenter, not ViT"):
        export(tiny(), tmp_path / "x", "mmseg")
    for form in ("hf", "mmseg", "swin_seg"):
        with pytest.raises(
            TriptychError, match="holds UPerNet on a Swin with norms on its maps, not fpn on Swin"
        ):
            export(tiny_segmenter(type="fpn"), tmp_path / "x", form)
        # Neither transformers' Swinv2Backbone nor mmsegmentation's Swin could read it.
        second = replace(tiny_segmenter().config.backbone, version=2, qkv_bias="qv")
        with pytest.raises(
            TriptychError, match="has no SwinV2 with norms on its maps; choose triptych's own"
        ):
            export(tiny_segmenter(backbone=second), tmp_path / "x", form)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"pool_scales": [1, 2, 3]}, r"pool_scales \[1, 2, 3\], the tensors have 4"),
        ({"pool_scales": 3}, "pool_scales 3"),
        ({"backbone_config": 3}, None),
        ({"backbone_config": {"window_size": 7}}, "whose bias tables do not have the rows"),
    ],
)
def test_configs_that_do_not_fit(tiny_segmenter, tmp_path, changes, part):
    export(tiny_segmenter(), tmp_path, "hf")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    if part is None:
        load(tmp_path)
        return
    with pytest.raises(TriptychError, match=part):
        load(tmp_path)


def test_missing_and_foreign_names_are_in_one_error(tiny_segmenter, tmp_path):
    state = published(tiny_segmenter(), "mmseg")
    state["decode_head.stranger"] = state.pop("decode_head.bottleneck.bn.running_var")
    torch.save({"state_dict": state}, tmp_path / "net.pth")
    with pytest.raises(
        TriptychError, match=r"1 missing \(decode_head.bottleneck.bn.running_var\).*\(decode_head.stranger\)"
    ):
        load(tmp_path / "net.pth")
