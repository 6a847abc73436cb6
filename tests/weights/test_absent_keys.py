"""Keys that a config lacks: the default of the class of diffusers or transformers that reads it, by running that class
on the same folder."""

import inspect
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.data.resizing import resize_crop
from triptych.diffusion.process import betas
from triptych.errors import CheckpointError
from triptych.weights import load
from triptych.weights.diffusion import diffusers_defaults
from triptych.weights.diffusion.diffusers_config import read_process
from triptych.weights.mapping.defaults import from_processor, half_preprocess, to_processor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what importing them deprecates
    import diffusers
    import transformers

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.proves("Checkpoints", "Keys that a config of diffusers lacks", by="diffusers"),
    pytest.mark.proves("Checkpoints", "Keys that a config of transformers lacks", by="transformers"),
]


@pytest.fixture(autouse=True)
def in_double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def saved(net, scramble, folder, lacking):
    """Save their network with random weights and a config that lacks some keys; return it as they read it back."""
    scramble(net).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert set(lacking) <= set(config)
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in lacking}))
    return type(net).from_pretrained(folder, torch_dtype=torch.float64).eval()


# ---------------------------------------------------------------------------------------------------- diffusers

SCHEDULERS = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler")
    and not name.startswith("Flax")
    and "beta_start" in inspect.signature(getattr(diffusers, name).__init__).parameters
)
STORED = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0007,
    "beta_end": 0.013,
    "num_train_timesteps": 800,
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lacking", [(), *((key,) for key in STORED), tuple(STORED)])
def test_schedulers(name, lacking):
    config = {"_class_name": name} | {key: value for key, value in STORED.items() if key not in lacking}
    try:
        theirs = getattr(diffusers, name).from_config(config)
    except ImportError as problem:
        pytest.skip(str(problem).strip().splitlines()[0])
    if name not in diffusers_defaults.SCHEDULERS and lacking:
        with pytest.raises(CheckpointError, match="does not know"):
            read_process(config, "scheduler")
        return
    ours = read_process(config, "scheduler")
    torch.testing.assert_close(torch.tensor(betas(ours)), theirs.betas.double(), rtol=1e-5, atol=0)
    assert ours.prediction == theirs.config.get("prediction_type", "epsilon")[:3]
    assert ours.zero_terminal_snr == bool(theirs.config.get("rescale_betas_zero_snr", False))


UNET = {
    "norm_num_groups", "attention_head_dim", "sample_size", "act_fn", "flip_sin_to_cos", "freq_shift", "norm_eps",
    "only_cross_attention", "use_linear_projection", "layers_per_block", "transformer_layers_per_block",
}  # fmt: skip


@pytest.mark.parametrize(
    "lacking", [*({key} for key in sorted(UNET)), UNET | {"cross_attention_dim", "num_class_embeds"}]
)
@torch.no_grad()
def test_conditional_unet(lacking, scramble, tmp_path):
    types = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    theirs = diffusers.UNet2DConditionModel(block_out_channels=(32, 64), **types)
    theirs = saved(theirs, scramble, tmp_path, lacking)
    ours = load(tmp_path)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, 3, 1280)
    torch.testing.assert_close(ours(x, t, context), theirs(x, t, context).sample, rtol=1e-6, atol=1e-6)
    assert ours.config.num_heads == 8


@pytest.mark.parametrize(
    "lacking",
    [
        *(
            {key}
            for key in sorted(
                UNET - {"only_cross_attention", "use_linear_projection", "transformer_layers_per_block"}
            )
        ),
        UNET - {"only_cross_attention", "use_linear_projection", "transformer_layers_per_block"},
    ],
)
@torch.no_grad()
def test_unconditional_unet(lacking, scramble, tmp_path):
    types = {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    }
    theirs = saved(diffusers.UNet2DModel(block_out_channels=(32, 64), **types), scramble, tmp_path, lacking)
    ours = load(tmp_path)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 700])
    torch.testing.assert_close(ours(x, t), theirs(x, t).sample, rtol=1e-6, atol=1e-6)


STAGE = {
    "scaling_factor",
    "shift_factor",
    "norm_num_groups",
    "act_fn",
    "sample_size",
    "force_upcast",
    "layers_per_block",
    "use_quant_conv",
    "latent_channels",
}


@pytest.mark.parametrize("lacking", [*({key} for key in sorted(STAGE)), STAGE])
@torch.no_grad()
def test_autoencoder(lacking, scramble, tmp_path):
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    theirs = saved(diffusers.AutoencoderKL(block_out_channels=(32, 64), **types), scramble, tmp_path, lacking)
    ours, images = load(tmp_path), torch.randn(1, 3, 16, 16)
    assert (ours.config.scale, ours.config.shift) == (
        theirs.config.scaling_factor,
        theirs.config.shift_factor or 0,
    )
    latents = theirs.encode(images).latent_dist.mean * theirs.config.scaling_factor
    torch.testing.assert_close(ours.encode(images), latents, rtol=1e-6, atol=1e-6)
    decoded = theirs.decode(latents / theirs.config.scaling_factor).sample
    torch.testing.assert_close(ours.decode(latents), decoded, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "lacking", [{"scaling_factor"}, {"shift_factor"}, {"scaling_factor", "shift_factor", "act_fn"}]
)
@torch.no_grad()
def test_tiny_autoencoder(lacking, scramble, tmp_path):
    theirs = saved(diffusers.AutoencoderTiny(), scramble, tmp_path, lacking)
    ours, latents = load(tmp_path), torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, rtol=1e-6, atol=1e-6)


def test_settings_of_other_networks_are_refused(scramble, tmp_path):
    types = {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    }
    for setting in (
        {"freq_shift": 1},
        {"flip_sin_to_cos": False},
        {"act_fn": "gelu"},
        {"downsample_padding": 0},
    ):
        net = diffusers.UNet2DModel(block_out_channels=(32, 64), **types, **setting)
        saved(net, scramble, tmp_path, ())
        with pytest.raises(CheckpointError, match=f"says {next(iter(setting))}"):
            load(tmp_path)


# ------------------------------------------------------------------------------------------------- transformers

SMALL = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 64, "patch_size": 56}
SWIN = {"embed_dim": 12, "depths": [1, 2], "num_heads": [3, 3], "patch_size": 8, "image_size": 224}
ACT = {"hidden_act", "layer_norm_eps"}
#       config: (arguments, keys to leave out)
NETWORKS = {
    "ViT": (SMALL, {"num_attention_heads", "image_size", "num_channels", "qkv_bias", *ACT}),
    "DeiT": (SMALL, {"num_attention_heads", "image_size", *ACT}),
    "Dinov2": ({**SMALL, "mlp_ratio": 2}, {"num_attention_heads", "image_size", "layerscale_value", *ACT}),
    "Dinov2WithRegisters": (SMALL, {"num_attention_heads", "image_size", "num_register_tokens", *ACT}),
    "DINOv3ViT": (SMALL, {"num_attention_heads", "image_size", "rope_theta", "key_bias", *ACT}),
    "Swin": (SWIN, {"window_size", "image_size", "mlp_ratio", *ACT}),
    "Swinv2": (SWIN, {"window_size", "image_size", "pretrained_window_sizes", *ACT}),
}
CASES = [
    (name, lacking)
    for name, (_, keys) in NETWORKS.items()
    for lacking in (*({key} for key in sorted(keys)), keys)
]


@pytest.mark.parametrize(("name", "lacking"), CASES)
@torch.no_grad()
def test_backbones(name, lacking, scramble, tmp_path):
    arguments, _ = NETWORKS[name]
    heads = {} if "num_heads" in arguments else {"hidden_size": 96 if name == "DINOv3ViT" else 48}
    config = getattr(transformers, f"{name}Config")(**arguments | heads)
    more = {"add_pooling_layer": False} if name in ("ViT", "DeiT", "Swin", "Swinv2") else {}
    theirs = saved(getattr(transformers, f"{name}Model")(config, **more), scramble, tmp_path, lacking)
    ours, images = load(tmp_path), torch.randn(1, 3, 224, 224)
    expected = theirs(images).last_hidden_state
    # A headless DeiT gives the mean of its two tokens, as the mean of its two heads' answers would be.
    expected = expected.mean(1) if name.startswith("Swin") else expected[:, : 1 + (name == "DeiT")].mean(1)
    torch.testing.assert_close(ours(images), expected, rtol=1e-6, atol=1e-6)
    assert ours.config.image_size == (224, 224)


@pytest.mark.parametrize(
    "lacking", [{"num_attention_heads"}, {"hidden_act"}, {"layer_norm_eps"}, {"num_attention_heads", *ACT}]
)
@torch.no_grad()
def test_text_encoder(lacking, scramble, tmp_path):
    from triptych.weights.diffusion import text
    from triptych.weights.files.opening import open_checkpoint
    from triptych.weights.mapping.format import StateDictKeys

    config = transformers.CLIPTextConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=2, vocab_size=60
    )
    theirs = saved(transformers.CLIPTextModel(config), scramble, tmp_path, lacking)
    keys = StateDictKeys(open_checkpoint(tmp_path))
    layout, prefix = text.layout_of(keys)
    ours, _ = text.read(keys.subset(prefix), layout, keys.settings["config"])
    assert (ours.num_heads, ours.activation, ours.norm_eps) == (
        theirs.config.num_attention_heads, theirs.config.hidden_act, theirs.config.layer_norm_eps,
    )  # fmt: skip


def test_a_gated_mlp_without_its_activation_is_refused(scramble, tmp_path):
    config = transformers.DINOv3ViTConfig(
        **SMALL | {"hidden_size": 96}, use_gated_mlp=True, hidden_act="silu"
    )
    net = transformers.DINOv3ViTModel(config)
    scramble(net).save_pretrained(tmp_path)
    load(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["hidden_act"]
    path.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="hidden_act 'gelu'"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------ preprocessing

PROCESSORS = (
    "ViTImageProcessor",
    "DeiTImageProcessor",
    "BitImageProcessor",
    "CLIPImageProcessor",
    "SegformerImageProcessor",
)
CHANGES = (
    {},
    {"size": {"height": 40, "width": 30}, "do_center_crop": False},
    {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
    {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
    {"image_mean": [0.1, 0.2, 0.3]},
    {"image_std": [0.1, 0.2, 0.3]},
    {"do_normalize": False},
    {"resample": 1},
    {"rescale_factor": 1 / 127.5},
    {"do_rescale": False},
)


def pixels(preprocess, image):
    options = {"crop": preprocess.crop, "mode": preprocess.mode, "interpolation": preprocess.interpolation}
    out = resize_crop(np.asarray(image), preprocess.size, **options) / 255
    return (out - np.array(preprocess.mean)) / np.array(preprocess.std)


def theirs_of(name, stored, image):
    cls = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return np.asarray(cls(**stored)(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("stored", CHANGES, ids=lambda change: "+".join(change) or "nothing")
def test_image_processors(name, stored):
    """Keys that preprocessor_config.json lacks have the default of its class, in pixels."""
    if (
        "size" in stored
        and name in ("ViTImageProcessor", "SegformerImageProcessor")
        and stored["do_center_crop"]
    ):
        pytest.skip("does not crop")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 48, 3), dtype=np.uint8))
    expected = theirs_of(name, stored, image)
    settings = {"preprocessor_config": {"image_processor_type": name, **stored}}
    preprocess, where = from_processor(settings, half_preprocess((7, 7)))
    assert where == "preprocessor_config.json"
    np.testing.assert_allclose(pixels(preprocess, image), expected, atol=1e-4 * max(1, abs(expected).max()))
    back, _ = from_processor({"preprocessor_config": to_processor(preprocess)}, half_preprocess((7, 7)))
    np.testing.assert_allclose(pixels(back, image), pixels(preprocess, image), atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("vit", "ViT"),
        ("swin", "ViT"),
        ("swinv2", "ViT"),
        ("deit", "DeiT"),
        ("dinov2", "Bit"),
        ("dinov2_with_registers", "Bit"),
    ],
)
def test_a_processor_without_a_class_is_that_of_the_model(model_type, name):
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    known = IMAGE_PROCESSOR_MAPPING_NAMES[model_type.removesuffix("_with_registers")]
    known = known if isinstance(known, str | tuple) else " ".join(map(str, known.values()))
    assert f"{name}ImageProcessor" in str(known)
    named = {"preprocessor_config": {"image_processor_type": f"{name}ImageProcessor"}}
    unnamed = {"preprocessor_config": {}, "config": {"model_type": model_type}}
    assert from_processor(named, half_preprocess((7, 7))) == from_processor(unnamed, half_preprocess((7, 7)))
