"""Parity of Swin with transformers, both directions, at tiny random configs and at T."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from triptych.errors import CheckpointError
from triptych.model_card import Preprocess
from triptych.models.registry import create
from triptych.weights import export, inspect, load

pytestmark = pytest.mark.proves(
    "Checkpoints", "Swin and Swin V2: transformers", by="transformers", writes=True
)

SIZES = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2, 2],
    "num_heads": [2, 4, 4],
    "window_size": 4,
    "num_labels": 5,
}
ALL = {"out_features": ["stage1", "stage2", "stage3"]}
V1, V2 = (hf.SwinForImageClassification, hf.SwinConfig), (hf.Swinv2ForImageClassification, hf.Swinv2Config)
CASES = {
    "swin": (*V1, SIZES),
    "swin without a head": (hf.SwinModel, hf.SwinConfig, SIZES),
    "swin no bias, another ratio": (*V1, SIZES | {"qkv_bias": False, "mlp_ratio": 2.5}),
    "swin rectangular": (*V1, SIZES | {"image_size": [80, 112]}),
    "swin patches of 2, gray": (*V1, SIZES | {"patch_size": 2, "num_channels": 1, "image_size": 32}),
    "swin backbone": (hf.SwinBackbone, hf.SwinConfig, SIZES | ALL | {"image_size": 96}),
    "swinv2": (*V2, SIZES),
    "swinv2 without a head": (hf.Swinv2Model, hf.Swinv2Config, SIZES),
    "swinv2 no bias": (*V2, SIZES | {"qkv_bias": False}),
    "swinv2 smaller last window": (*V2, SIZES | {"window_size": 8}),
    "swinv2 larger windows than in pre-training": (
        *V2,
        SIZES | {"window_size": 8, "pretrained_window_sizes": [4, 4, 2]},
    ),
    "swinv2 one window known of several": (*V2, SIZES | {"pretrained_window_sizes": [3, 0, 0]}),
}


def answer(model, images):
    with torch.no_grad():
        out = model.eval()(images)
    if "feature_maps" in out:
        return out.feature_maps
    return (out.logits if "logits" in out else out.pooler_output,)


def ours_says(net, images):
    with torch.no_grad():
        return tuple(net.features(images)) if net.config.map_norms else (net(images),)


@pytest.fixture
def theirs(request, scramble):
    torch.manual_seed(0)
    cls, config, sizes = CASES[request.param]
    return scramble(cls(config(**sizes)))


def images_for(config):
    size = config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    return torch.randn(2, config.num_channels, *size)


@pytest.mark.parametrize("theirs", CASES, indirect=True)
def test_parity_in_both_directions(theirs, tmp_path, same_state):
    images = images_for(theirs.config)
    expected = answer(theirs, images)

    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    for got, wanted in zip(ours_says(ours, images), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)

    export(ours, tmp_path / "ours", "hf")
    back, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    state = theirs.state_dict()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, state[name]) or name.startswith("swin.layernorm"), name
    again = load(tmp_path / "ours")
    same_state(ours, again)
    assert again.config == ours.config


@pytest.mark.parametrize("theirs", ["swin", "swin backbone"], indirect=True)
def test_new_keys_are_read_as_old_ones(theirs, tmp_path, same_state):
    """transformers 5's names in memory, as someone saves a state_dict."""
    theirs.save_pretrained(tmp_path / "old")
    new = tmp_path / "new"
    new.mkdir()
    save_file({name: t.contiguous() for name, t in theirs.state_dict().items()}, new / "model.safetensors")
    (new / "config.json").write_text((tmp_path / "old" / "config.json").read_text())
    same_state(load(tmp_path / "old"), load(new))


@pytest.mark.parametrize("theirs", ["swin backbone"], indirect=True)
def test_the_backbone_at_other_sizes(theirs, tmp_path):
    """Where every map is larger than a window; transformers shifts inside a single one, too."""
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    for size in ((100, 84), (82, 131), (96, 200)):
        images = torch.randn(1, 3, *size)
        for got, wanted in zip(ours_says(ours, images), answer(theirs, images), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_tiny_parity(tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):
        theirs = hf.SwinForImageClassification(hf.SwinConfig(num_labels=1000)).eval()
    theirs.to_empty(device="cpu")
    for module in theirs.modules():
        if hasattr(module, "relative_position_index"):
            module.relative_position_index.copy_(module._create_relative_position_index().view(-1))
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.02)
    theirs.save_pretrained(tmp_path)
    ours, images = load(tmp_path), torch.randn(1, 3, 224, 224)
    assert ours.config == create("swin-t").config
    assert ours.card.classes[207] == "golden retriever"
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, atol=1e-5, rtol=0)


def test_masked_pre_training_is_read_without_its_decoder(tmp_path, scramble):
    theirs = scramble(hf.SwinForMaskedImageModeling(hf.SwinConfig(**SIZES, encoder_stride=16)))
    theirs.save_pretrained(tmp_path)
    assert "swin.embeddings.mask_token" in load_file(tmp_path / "model.safetensors")
    ours, images = load(tmp_path), images_for(theirs.config)
    assert ours.config.num_classes == 0
    with torch.no_grad():
        expected = theirs.swin(images).last_hidden_state.mean(1)
        torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=0)


def test_a_network_of_ours_runs_in_transformers(tmp_path, tiny_swin):
    ours = tiny_swin(num_classes=3, drop_path_rate=0.25)
    ours.card = ours.card.__class__(
        preprocess=Preprocess(size=(64, 64), crop=0.9, mean=(0.5,) * 3, std=(0.5,) * 3),
        classes=("a", "b", "c"),
    )
    export(ours, tmp_path, "hf")
    theirs = hf.AutoModelForImageClassification.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(answer(theirs, images)[0], ours(images).detach(), atol=1e-5, rtol=0)
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert theirs.config.drop_path_rate == 0.25
    again = load(tmp_path)
    assert again.card.classes == ("a", "b", "c")
    assert again.card.preprocess == ours.card.preprocess


@pytest.mark.parametrize("version", [1, 2])
def test_without_a_config_conventions_are_named(tmp_path, tiny_swin, version):
    net = tiny_swin(version=version)
    export(net, tmp_path, "hf")
    (tmp_path / "config.json").unlink()
    (tmp_path / "preprocessor_config.json").unlink()
    if version == 2:
        with pytest.raises(CheckpointError, match="window_size="):
            inspect(tmp_path)
        return
    facts = inspect(tmp_path)["facts"]
    assert facts["norm_eps"] == "convention: 1e-05"
    assert "squash" in facts["preprocess"]
    assert facts["window_size"].startswith("shape of the bias tables")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"window_size": 7}, "whose bias tables do not have the rows"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06; needed is 1e-05"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps 'small'"),
        ({"window_size": {"a": 1}}, "window_size is"),
        ({"image_size": "large"}, None),
        ({"id2label": {"a": "b"}}, None),
    ],
)
def test_a_config_that_does_not_fit(tmp_path, tiny_swin, changes, part):
    export(tiny_swin(), tmp_path, "hf")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    if part is None:
        load(tmp_path)  # a value of the wrong type is passed over for the convention
        return
    with pytest.raises(CheckpointError, match=part) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"window_size": (4, 8), "image_size": (64, 128)}, "cannot store windows 4x8"),
        ({"window_size": (4, 4, 2)}, "cannot store windows 2x2 and 4x4"),
        ({"window_size": 8}, "it has one square window, no larger than a map"),
        ({"norm_eps": 1e-6}, "cannot store norm_eps 1e-06"),
        ({"stem_widths": (8,), "patch_size": 2}, "stem"),
        ({"version": 2, "map_norms": True, "num_classes": 0}, "Swinv2Backbone has no norms"),
        ({"version": 2, "qkv_bias": "qkv"}, "attn.qkv.bias"),
        ({"qkv_bias": "qv"}, "attn.q_bias"),
        ({"version": 2, "pretrained_window_size": ((2, 4), (2, 4), (2, 4))}, "which are not square"),
    ],
)
def test_what_transformers_cannot_say_is_refused(tmp_path, tiny_swin, changes, part):
    with pytest.raises(CheckpointError, match=part):
        export(tiny_swin(**changes), tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
