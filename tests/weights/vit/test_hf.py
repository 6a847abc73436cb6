"""Parity with transformers, both directions, at tiny random configs and at B/16."""

import json
from dataclasses import replace

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from triptych.errors import CheckpointError
from triptych.model_card import Preprocess
from triptych.models.registry import create
from triptych.weights import export, inspect, load

pytestmark = pytest.mark.proves("Checkpoints", "ViT: transformers", by="transformers", writes=True)

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
DINO = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
CASES = {
    "vit": (hf.ViTForImageClassification, hf.ViTConfig, SIZES),
    "vit rectangular": (hf.ViTForImageClassification, hf.ViTConfig, SIZES | {"image_size": [24, 40]}),
    "vit tall": (hf.ViTForImageClassification, hf.ViTConfig, SIZES | {"image_size": [48, 16]}),
    "vit tanh, no bias": (
        hf.ViTForImageClassification,
        hf.ViTConfig,
        SIZES | {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False, "layer_norm_eps": 1e-3},
    ),
    "vit pooler": (hf.ViTModel, hf.ViTConfig, SIZES),
    "vit pooler of another width": (hf.ViTModel, hf.ViTConfig, SIZES | {"pooler_output_size": 48}),
    "deit distilled": (hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig, SIZES),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config, DINO),
    "dinov2 classifier": (hf.Dinov2ForImageClassification, hf.Dinov2Config, DINO),
    "dinov2 swiglu": (hf.Dinov2Model, hf.Dinov2Config, DINO | {"use_swiglu_ffn": True}),
    "dinov2 registers": (
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig,
        DINO | {"num_register_tokens": 3},
    ),
    "dinov2 registers swiglu classifier": (
        hf.Dinov2WithRegistersForImageClassification,
        hf.Dinov2WithRegistersConfig,
        DINO | {"use_swiglu_ffn": True},
    ),
    "dinov3": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig, SIZES | {"num_register_tokens": 4}),
    "dinov3 rectangular": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig, SIZES | {"image_size": [16, 40]}),
    "dinov3 gated": (
        hf.DINOv3ViTModel,
        hf.DINOv3ViTConfig,
        SIZES | {"num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu", "rope_theta": 50.0},
    ),
}


def answer(model, images):
    with torch.no_grad():
        out = model.eval()(images)
    return out.logits if "logits" in out else out.pooler_output


@pytest.fixture
def theirs(request, scramble):
    torch.manual_seed(0)
    cls, config, sizes = CASES[request.param]
    return scramble(cls(config(**sizes)))


def images_for(size):
    size = (size, size) if isinstance(size, int) else tuple(size)
    return torch.randn(2, 3, *size)


def test_the_mask_token_of_masked_pretraining_is_left_out(scramble, tmp_path):
    options = {name: value for name, value in SIZES.items() if name != "num_labels"}
    theirs = scramble(hf.ViTForMaskedImageModeling(hf.ViTConfig(**options, encoder_stride=8)))
    theirs.save_pretrained(tmp_path)
    ours, images = load(tmp_path), images_for(32)
    with torch.no_grad():
        expected = theirs.vit(images).last_hidden_state
        torch.testing.assert_close(ours.norm(ours.encode(images)[0]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("cls", "config", "changes"),
    [
        ("BeitForImageClassification", "BeitConfig", {}),
        ("YolosForObjectDetection", "YolosConfig", {"image_size": [32, 32]}),
        (
            "ConvNextForImageClassification",
            "ConvNextConfig",
            {"hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4},
        ),
        ("CLIPVisionModel", "CLIPVisionConfig", {}),
    ],
)
def test_other_networks_of_transformers_are_refused_by_the_name_in_the_config(cls, config, changes, tmp_path):
    getattr(hf, cls)(getattr(hf, config)(**SIZES | changes)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"transformers' {cls} \(config.json\)"):
        load(tmp_path)


@pytest.mark.parametrize("theirs", ["vit", "dinov2", "dinov2 registers", "deit distilled"], indirect=True)
@pytest.mark.parametrize("size", [(24, 24), (72, 56)])
def test_positions_are_resampled_as_there(theirs, size, tmp_path):
    theirs.save_pretrained(tmp_path)
    images = torch.randn(2, 3, *size)
    options = {} if "dinov2" in theirs.config.model_type else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        out = theirs.eval()(images, **options)
        expected = out.logits if "logits" in out else out.pooler_output
        torch.testing.assert_close(load(tmp_path)(images), expected, atol=1e-5, rtol=0)
        ours = load(tmp_path, image_size=size)  # resampled once and for all
        torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("theirs", CASES, indirect=True)
def test_parity_in_both_directions(theirs, tmp_path, same_state):
    images = images_for(theirs.config.image_size)
    expected = answer(theirs, images)

    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=0)

    export(ours, tmp_path / "ours", "hf")
    back, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(answer(back, images), expected)
    again = load(tmp_path / "ours")
    same_state(ours, again)
    assert again.config == ours.config


@pytest.mark.parametrize("theirs", ["vit", "dinov2 registers", "dinov3"], indirect=True)
def test_last_hidden_state(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours, images = load(tmp_path), images_for(theirs.config.image_size)
    base = theirs.vit if hasattr(theirs, "vit") else theirs
    with torch.no_grad():
        expected = base(images).last_hidden_state
        got = ours.norm(ours.encode(images)[0])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("theirs", CASES, indirect=True)
def test_new_keys_are_read_as_old_ones(theirs, tmp_path, same_state):
    """transformers 5's names in memory, as someone saves a state_dict."""
    theirs.save_pretrained(tmp_path / "old")
    new = tmp_path / "new"
    new.mkdir()
    save_file({name: t.contiguous() for name, t in theirs.state_dict().items()}, new / "model.safetensors")
    (new / "config.json").write_text((tmp_path / "old" / "config.json").read_text())
    same_state(load(tmp_path / "old"), load(new))


def test_base_16_parity(tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):
        theirs = hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000)).eval()
    theirs.to_empty(device="cpu")
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.02)
    theirs.save_pretrained(tmp_path)
    ours, images = load(tmp_path), torch.randn(1, 3, 224, 224)
    assert ours.config.norm_eps == 1e-12
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, atol=1e-5, rtol=0)


def test_a_network_of_ours_runs_in_transformers(tmp_path, scramble):
    ours = scramble(create("vit-ti16", depth=2, image_size=48, num_classes=3))
    ours.card = ours.card.__class__(
        preprocess=Preprocess(size=(48, 48), crop=0.9, mean=(0.5,) * 3, std=(0.5,) * 3),
        classes=("a", "b", "c"),
    )
    export(ours, tmp_path, "hf")
    theirs = hf.AutoModelForImageClassification.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(answer(theirs, images), ours(images).detach(), atol=1e-5, rtol=0)
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    again = load(tmp_path)
    assert again.card.classes == ("a", "b", "c")
    assert again.card.preprocess == ours.card.preprocess
    assert "preprocessor_config.json" in again.card.source


@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_preprocessing_goes_there_and_back(tmp_path, tiny, mode):
    net = tiny()
    preprocess = Preprocess(
        size=(32, 32),
        mode=mode,
        crop=0.8 if mode == "crop" else 1.0,
        interpolation="lanczos",
        mean=(0.1, 0.2, 0.3),
    )
    net.card = net.card.__class__(preprocess=preprocess)
    export(net, tmp_path, "hf")
    assert load(tmp_path).card.preprocess == preprocess


@pytest.mark.parametrize(
    ("result", "size", "crop", "mode"),
    [
        ({"size": 224, "do_resize": True}, (224, 224), 1.0, "squash"),
        ({"size": {"height": 384, "width": 256}}, (384, 256), 1.0, "squash"),
        (
            {"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True},
            (224, 224),
            0.875,
            "crop",
        ),
        (
            {
                "size": {"height": 256, "width": 256},
                "crop_size": {"height": 224, "width": 224},
                "do_center_crop": True,
            },
            (224, 224),
            0.875,
            "squash",
        ),
        ({"size": {"shortest_edge": 224}, "do_center_crop": False}, (224, 224), 1.0, "crop"),
    ],
)
def test_processors_of_several_ages(tmp_path, tiny, result, size, crop, mode):
    export(tiny(), tmp_path, "hf")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(result | {"resample": 3}))
    preprocess = load(tmp_path).card.preprocess
    assert (preprocess.size, preprocess.crop, preprocess.mode) == (size, crop, mode)
    assert preprocess.interpolation == "bicubic"


def test_without_a_config_conventions_are_named(tmp_path, tiny):
    net = tiny(norm_eps=1e-12)
    export(net, tmp_path, "hf")
    (tmp_path / "config.json").unlink()
    (tmp_path / "preprocessor_config.json").unlink()
    message = inspect(tmp_path)
    assert message["facts"]["num_heads"].startswith("guess: heads of 64 channels;")  # no published width
    assert message["facts"]["norm_eps"] == "convention: transformers' default 1e-12"
    assert "mean and std 0.5" in message["facts"]["preprocess"]
    assert load(tmp_path).config == replace(net.config, position_resampling="bicubic")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"image_size": 48}, "image_size \\(48, 48\\), which does not have the 16 patches"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"num_attention_heads": 5}, "no multiple of num_heads 5"),
        ({"layer_norm_eps": "small"}, None),
        ({"num_attention_heads": "4"}, None),
        ({"id2label": {"a": "b"}}, None),
    ],
)
def test_a_config_that_does_not_fit(tmp_path, tiny, changes, part):
    export(tiny(), tmp_path, "hf")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    if part is None:
        load(tmp_path)  # a value of the wrong type is passed over for the convention
        return
    with pytest.raises(CheckpointError, match=part):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"pool": "mean"}, "cannot store pool \\(here 'mean', read back as 'token'\\)"),
        ({"head": "mlp"}, "parameters without a key there \\(head.hidden.weight"),
        ({"qk_norm": True}, "q_norm"),
        ({"class_token": False, "pool": "mean"}, "class_token"),
    ],
)
def test_what_transformers_cannot_say_is_refused(tmp_path, tiny, changes, part):
    with pytest.raises(CheckpointError, match=part):
        export(tiny(**changes), tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_deits_unread_pooler_is_dropped(tmp_path):
    config = hf.DeiTConfig(**SIZES)
    theirs = hf.DeiTModel(config)
    theirs.save_pretrained(tmp_path)
    assert any("pooler" in name for name in load_file(tmp_path / "model.safetensors"))
    assert load(tmp_path).config.distill_token


def test_sharded_save_pretrained(tmp_path, same_state):
    theirs = hf.ViTForImageClassification(hf.ViTConfig(**SIZES))
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    same_state(load(tmp_path / "whole"), load(tmp_path / "shards"))


def test_half_precision_stays_half(tmp_path):
    theirs = hf.ViTForImageClassification(hf.ViTConfig(**SIZES)).bfloat16()
    theirs.save_pretrained(tmp_path)
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.bfloat16}
