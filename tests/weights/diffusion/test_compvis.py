"""CompVis' and A1111's single files, both directions: twins of every published model, and what lies beside weights."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import triptych as tp
from triptych.errors import CheckpointError
from triptych.models.configs import autoencoder as autoencoder_config
from triptych.models.configs import latent_diffusion as latent_diffusion_config
from triptych.models.configs import unet as unet_config
from triptych.models.configs.autoencoder import TinyAutoencoderConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.registry import build
from triptych.models.text import add_embedding
from triptych.network import on_meta_device
from triptych.weights import inspect, load
from triptych.weights.diffusion import compvis, schedule
from triptych.weights.diffusion.diffusers_config import read_process
from triptych.weights.mapping.format import Hints, draft_keys, state_dict_shapes
from triptych.weights.mapping.round_trip import canonical
from triptych.weights.mapping.rules import plan_rules

pytestmark = pytest.mark.proves(
    "Checkpoints",
    "Latent diffusion and Stable Diffusion 1 and 2: one file, as CompVis and A1111 write it",
    by="names",
    writes=True,
)

SIZES = {
    name: size for name, size in latent_diffusion_config.SIZES.items() if isinstance(size.network, UNetConfig)
}
STATED = {"sd2": "v", "sd2-base": "eps"}
# One of each form; the others are slow.
FORMS = (
    "sd1",
    "sd2",
    "sd-x4-upscaler",
    "ldm-churches",
    "ldm-cin256-v2",
    "ldm-txt2img-1p4b",
    "ldm-inpainting",
)
TWINS = [name if name in FORMS else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]
FULL = [name if name in FORMS[:3] else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]


@pytest.mark.parametrize("name", FULL)
def test_published_sizes_are_inferred_from_keys_and_shapes(name, tmp_path, monkeypatch):
    """Without a byte of weights: everything is on the meta device but the tables of the process."""
    config = SIZES[name]
    with torch.device("meta"):
        net = build(config)
    monkeypatch.setattr(compvis, "cpu_state_dict", lambda net: dict(net.state_dict()))
    names = draft_keys(compvis.draft(net), tmp_path / "net.ckpt", "pickle")
    if name in STATED:
        with pytest.raises(CheckpointError, match=r'Stable Diffusion 2.*prediction="v".*prediction="eps"'):
            compvis.read(names, Hints())
    reading = compvis.read(names, Hints(prediction=STATED.get(name)))
    plan_rules(reading.rules, names.shapes, state_dict_shapes(net), "it")
    assert reading.config == config


@pytest.mark.parametrize("name", TWINS)
def test_there_and_back_bit_for_bit(name, tiny_ldm, same_state, tmp_path, caplog):
    net = tiny_ldm(name)
    path = tmp_path / ("net.ckpt" if name in ("sd1", "ldm-churches") else "net.safetensors")
    tp.export(net, path, "compvis")
    back = tp.load(path)
    same_state(net, back)
    assert canonical(back.config) == canonical(net.config)
    again = tmp_path / "again.safetensors"
    tp.export(back, again, "compvis")
    if path.suffix == ".safetensors":
        assert again.read_bytes() == path.read_bytes()
    else:
        held = torch.load(path)["state_dict"]
        assert held.keys() == load_file(again).keys()
        assert all(torch.equal(t, held[name]) for name, t in load_file(again).items())


def test_the_usual_buffers_are_compvis_own():
    """`make_beta_schedule("linear")` and `register_schedule`, spelled out."""
    output = schedule.buffers(SIZES["sd1"].process)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    variance = betas * (1 - before) / (1 - alphas)
    expected = {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": before,
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - alphas),
    }
    for name, values in expected.items():
        torch.testing.assert_close(output[name], values.float(), rtol=1e-6, atol=1e-7)
    assert len(output) == 12


def test_the_upscalers_betas_are_the_published_ones():
    """x4-upscaling.yaml says 0.0001 to 0.02 and leaves the schedule to `make_beta_schedule`, whose "linear" is even in
    the root; its diffusers folder says scaled_linear for both of its schedulers."""
    message = {
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    }
    config = SIZES["sd-x4-upscaler"]
    assert read_process(message | {"prediction_type": "v_prediction"}, "it") == config.process
    assert read_process(message | {"prediction_type": "epsilon"}, "it") == config.low_res_process
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(schedule.buffers(config.process)["betas"], betas.float())


@pytest.fixture
def sd1(tiny_ldm, tmp_path):
    """A small Stable Diffusion 1 and its single file, with what A1111's files hold."""
    net = tiny_ldm("sd1")
    tp.export(net, tmp_path / "sd1.safetensors", "compvis")
    return net, tmp_path / "sd1.safetensors"


def test_names_are_those_of_the_originals(sd1):
    tensors = load_file(sd1[1])
    for name, shape in {
        "model.diffusion_model.input_blocks.0.0.weight": (16, 4, 3, 3),
        "model.diffusion_model.time_embed.2.bias": (64,),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (16, 16, 1, 1),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (16, 24),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (128, 16),
        "model.diffusion_model.input_blocks.2.0.op.weight": (16, 16, 3, 3),
        "model.diffusion_model.middle_block.1.norm.weight": (64,),
        "model.diffusion_model.output_blocks.1.1.conv.weight": (64, 64, 3, 3),
        "model.diffusion_model.output_blocks.3.2.conv.weight": (64, 64, 3, 3),
        "model.diffusion_model.out.2.weight": (4, 16, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (64, 64, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (64, 64, 3, 3),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (16, 32, 1, 1),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.bias": (24,),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 9),
        "betas": (1000,),
    }.items():
        assert tuple(tensors[name].shape) == shape, name


def test_what_training_leaves_is_dropped_and_said(sd1, same_state, tmp_path):
    """A Lightning checkpoint with averaged weights, a discriminator, and callbacks that are objects."""
    net, path = sd1
    tensors = load_file(path)
    weights = {n: t for n, t in tensors.items() if n.startswith("model.diffusion_model.")}
    tensors |= {"model_ema." + n.removeprefix("model.").replace(".", ""): t + 1 for n, t in weights.items()}
    tensors |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    tensors |= {
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(3),
        "logvar": torch.zeros(1000),
    }
    full = {
        "state_dict": tensors,
        "epoch": 3,
        "callbacks": {Marker: Marker()},
        "optimizer_states": [{"state": {}}],
    }
    torch.save(full, tmp_path / "net.ckpt")
    (tmp_path / "sd1.safetensors.json").rename(tmp_path / "net.ckpt.json")
    same_state(net, load(tmp_path / "net.ckpt"))
    message = inspect(tmp_path / "net.ckpt")
    assert message["facts"]["weights"] == "raw, not model_ema.* (convention, as web UIs do)"
    assert (message["format"], message["family"], message["fits"]) == ("compvis", "latent-diffusion", None)
    json.dumps(message)


class Marker:
    """Stands for a Lightning callback; unpickling it would say so."""

    def __setstate__(self, state):
        raise AssertionError("the file was run")


def test_halves_and_betas_in_halves(sd1, tmp_path):
    net, path = sd1
    halves = {n: t.half() if t.is_floating_point() else t for n, t in load_file(path).items()}
    save_file(halves, tmp_path / "half.safetensors")
    (tmp_path / "sd1.safetensors.json").rename(tmp_path / "half.safetensors.json")
    back = load(tmp_path / "half.safetensors")
    assert next(back.parameters()).dtype == torch.float16
    assert back.config == net.config


def test_a_file_without_betas_has_the_usual_ones(sd1, tmp_path):
    bare = {n: t for n, t in load_file(sd1[1]).items() if "." in n}
    save_file(bare, tmp_path / "bare.safetensors")
    process = load(tmp_path / "bare.safetensors").config.process
    assert process == SIZES["sd1"].process
    assert inspect(tmp_path / "bare.safetensors")["facts"]["process"] == "convention"


def test_betas_of_no_schedule_are_refused(sd1, tmp_path):
    tensors = load_file(sd1[1]) | {"betas": torch.rand(1000).sort().values}
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"its 1000 betas.* are no linear"):
        load(tmp_path / "odd.safetensors")


def test_prediction_comes_from_the_call_the_file_or_its_keys(tiny_ldm, tmp_path, caplog):
    net = tiny_ldm("sd2")
    path = tmp_path / "sd2.safetensors"
    with caplog.at_level(logging.WARNING):
        tp.export(net, path, "compvis")
    assert "process.prediction 'v'" in caplog.text
    assert load(path).config.process.prediction == "v"
    assert load(path, prediction="eps").config.process.prediction == "eps"
    (tmp_path / "sd2.safetensors.json").unlink()
    with pytest.raises(CheckpointError, match='prediction="v"') as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert load(path, prediction="v").config.process.prediction == "v"
    save_file(load_file(path), path, {"modelspec.prediction_type": "v"})
    assert load(path).config.process.prediction == "v"


def test_offenders_are_named(sd1, tmp_path):
    tensors = load_file(sd1[1])
    tensors["model.diffusion_model.stranger"] = torch.zeros(2)
    del tensors["first_stage_model.decoder.mid.block_1.conv1.weight"]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 missing \(first_stage_model.decoder.mid.*no rule knows.*stranger"
    ):
        load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("model.diffusion_model.out.2.weight", "lacks out.2.weight"),
        ("model.diffusion_model.output_blocks.", "0 output blocks"),
        ("first_stage_model.encoder.conv_in.weight", "lacks encoder.conv_in.weight"),
        ("cond_stage_model.", "4 channels|16 channels"),
    ],
)
def test_damaged_files_are_one_line(sd1, tmp_path, gone, words):
    tensors = {n: t for n, t in load_file(sd1[1]).items() if not n.startswith(gone)}
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        load(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shapes_that_lie_are_one_line(sd1, tmp_path):
    for name in ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quant_conv.weight"):
        tensors = load_file(sd1[1]) | {name: torch.zeros(0, 3, 1)}
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match="needs 4 axes"):
            load(tmp_path / "bad.safetensors")


def test_sdxl_is_named(sd1, tmp_path):
    save_file(load_file(sd1[1]) | {"conditioner.embedders.0.x": torch.zeros(1)}, tmp_path / "xl.safetensors")
    with pytest.raises(CheckpointError, match="Stable Diffusion XL"):
        load(tmp_path / "xl.safetensors")


def test_what_the_format_cannot_say_is_refused(tiny_ldm, tmp_path):
    net = tiny_ldm("sd1", autoencoder=TinyAutoencoderConfig(base_channels=8))
    with pytest.raises(CheckpointError, match="no key for a tiny autoencoder"):
        tp.export(net, tmp_path / "a.safetensors", "compvis")
    net = tiny_ldm("ldm-layout")
    net.text_encoder.config = replace(net.text_encoder.config, num_added_tokens=1)
    with pytest.raises(CheckpointError, match="no key for added words"):
        tp.export(net, tmp_path / "a.safetensors", "compvis")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- parts alone

STAGES = {
    name: replace(
        config,
        base_channels=16,
        norm_groups=16,
        num_res_blocks=1,
        codebook_size=min(config.codebook_size, 12),
    )
    for name, config in autoencoder_config.SIZES.items()
    if not isinstance(config, TinyAutoencoderConfig)
}


@pytest.mark.parametrize("name", ["kl-f8", "kl-f32", "vq-f4-noattn", "vq-f8", "sd3-vae"])
def test_first_stages_alone(name, scramble, same_state, tmp_path):
    net = scramble(build(STAGES[name]))
    tp.export(net, tmp_path / "vae.ckpt", "compvis")
    back = load(tmp_path / "vae.ckpt")
    same_state(net, back)
    assert back.config == net.config


def test_a_first_stage_taken_out_of_a_whole_file(sd1, same_state, tmp_path):
    tensors = load_file(sd1[1])
    stage = {n: t for n, t in tensors.items() if n.startswith("first_stage_model.")}
    save_file(stage, tmp_path / "a.safetensors")
    save_file({n.removeprefix("first_stage_model."): t for n, t in stage.items()}, tmp_path / "b.safetensors")
    for name in "ab":
        same_state(sd1[0].autoencoder, load(tmp_path / f"{name}.safetensors"))


def test_the_scale_of_a_bare_first_stage_is_the_published_one(tmp_path, monkeypatch):
    for name in ("sd-vae", "sd-x4-vae", "sd3-vae"):
        with torch.device("meta"):
            net = build(autoencoder_config.SIZES[name])
        monkeypatch.setattr(compvis, "cpu_state_dict", lambda net: dict(net.state_dict()))
        names = draft_keys(compvis.draft_stage(net), tmp_path / "vae.pt", "pickle")
        assert compvis.read_stage(names, Hints()).config == net.config


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_a_unet_alone(sd1, same_state, tmp_path, prefix):
    unet = {n: t for n, t in load_file(sd1[1]).items() if n.startswith("model.diffusion_model.")}
    unet = {n.replace("model.diffusion_model.", prefix): t for n, t in unet.items()}
    save_file(unet, tmp_path / "unet.safetensors")
    same_state(sd1[0].network, load(tmp_path / "unet.safetensors"))
    tp.export(sd1[0].network, tmp_path / "back.safetensors", "compvis")
    same_state(sd1[0].network, load(tmp_path / "back.safetensors"))


@pytest.mark.parametrize(
    "config",
    [
        TinyAutoencoderConfig(base_channels=8),
        TinyAutoencoderConfig(base_channels=8, num_levels=3, num_res_blocks=2),
    ],
)
def test_taesd(config, scramble, same_state, tmp_path):
    net = scramble(build(config))
    tp.export(net, tmp_path / "taesd.safetensors", "taesd")
    assert "decoder.1.weight" in load_file(tmp_path / "taesd.safetensors")
    same_state(net, load(tmp_path / "taesd.safetensors"))


def test_a_taesd_is_written_as_its_authors_two_files(scramble, same_state, tmp_path):
    """taesd_encoder.pth and taesd_decoder.pth have the keys of an nn.Sequential each, whose decoder begins with a
    clamp; a folder of both is read again, with what they do not store."""
    net = scramble(build(TinyAutoencoderConfig(base_channels=8, scale=0.5)))
    assert tp.export(net, tmp_path / "out", "taesd") == tmp_path / "out"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["taesd_decoder.pth", "taesd_decoder.pth.json", "taesd_encoder.pth"]
    encoder, decoder = (torch.load(tmp_path / "out" / f"taesd_{half}.pth") for half in ("encoder", "decoder"))
    assert encoder["0.weight"].shape == (8, 3, 3, 3)
    assert {"1.conv.4.bias", "2.weight", "14.bias"} <= set(encoder)
    assert "2.bias" not in encoder
    assert decoder["1.weight"].shape == (8, 4, 3, 3)
    assert {"3.conv.0.weight", "7.weight", "18.conv.2.bias", "19.bias"} <= set(decoder)
    assert "0.weight" not in decoder
    for place in ("out", "out/taesd_encoder.pth", "out/taesd_decoder.pth"):
        back = load(tmp_path / place)
        same_state(net, back)
        assert back.config == net.config


def test_stable_diffusion_2_has_what_strict_loaders_need(tiny_ldm, tmp_path):
    """OpenCLIP's text_projection and logit_scale, which no sampler reads."""
    tp.export(tiny_ldm("sd2"), tmp_path / "sd2.safetensors", "compvis")
    tensors = load_file(tmp_path / "sd2.safetensors")
    assert tensors["cond_stage_model.model.text_projection"].shape == (24, 24)
    assert tensors["cond_stage_model.model.logit_scale"].shape == ()


def test_copies_of_the_first_stage_are_left_out(tiny_ldm, same_state, tmp_path):
    """inpainting_big conditions on its own first stage, whose tensors are in its file twice."""
    net = tiny_ldm("ldm-inpainting")
    tp.export(net, tmp_path / "net.safetensors", "compvis")
    tensors = load_file(tmp_path / "net.safetensors")
    stage = {n: t for n, t in tensors.items() if n.startswith("first_stage_model.")}
    copies = {n.replace("first_stage_model.", "cond_stage_model."): t.clone() for n, t in stage.items()}
    save_file(tensors | copies, tmp_path / "net.safetensors")
    same_state(net, load(tmp_path / "net.safetensors"))
    assert any(f"{len(copies)} tensors" in note for note in inspect(tmp_path / "net.safetensors")["notes"])


def test_the_words_of_dreambooth_are_left_out(sd1, same_state, tmp_path):
    net, path = sd1
    word = "embedding_manager.string_to_param_dict.*"
    save_file(
        load_file(path)
        | {word: torch.ones(1, 24), "embedding_manager.initial_embeddings.*": torch.ones(1, 24)},
        path,
    )
    same_state(net, load(path))
    assert any("embedding_manager" in note for note in inspect(path)["notes"])


def test_what_else_a_clip_has_is_left_out(sd1, same_state, tmp_path):
    """Some programs save the whole CLIP of transformers, or its projection and scale next to the text encoder."""
    net, path = sd1
    text = "cond_stage_model."
    names = (
        "logit_scale",
        "text_projection",
        "transformer.text_projection.weight",
        "transformer.vision_model.x.bias",
    )
    save_file(load_file(path) | {text + name: torch.ones(2) for name in names}, path)
    same_state(net, load(path))
    state = {name.replace(".text_model.", "."): tensor for name, tensor in load_file(path).items()}
    save_file(state, path)
    same_state(net, load(path))


def test_guessed_heads_are_said(tmp_path, monkeypatch):
    """Neither keys nor shapes tell a UNet's heads; only published ones and Stable Diffusion's relatives are known."""
    monkeypatch.setattr(compvis, "cpu_state_dict", lambda net: dict(net.state_dict()))
    for name, changes in (
        ("sd1", {"in_channels": 5}),
        ("celeba", {"base_channels": 32, "num_heads": 8, "head_dim": 0}),
    ):
        config = replace(unet_config.SIZES[name], num_res_blocks=1, **changes)
        with on_meta_device():
            net = build(config)
        names = draft_keys(compvis.draft_unet(net), tmp_path / "unet.pt", "pickle")
        fact = compvis.read_unet(names, Hints()).facts["num_heads"]
        assert fact.startswith("guess: 8 heads" if name == "celeba" else "convention: 8 heads")


def test_the_semantic_models_latents_have_128_cells():
    """semantic_synthesis512: images of 512 pixels, of which the first stage makes a quarter."""
    assert SIZES["ldm-semantic"].image_size == (512, 512)


# ---------------------------------------------------------------------------------------- our own format


@pytest.mark.parametrize("name", ["sd2", "ldm-cin256-v2", "ldm-bsr-sr"])
def test_our_own_file_bit_for_bit(name, tiny_ldm, same_state, tmp_path):
    net = tiny_ldm(name).bfloat16()
    tp.save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors")
    same_state(net, back)
    assert back.config == net.config


def test_our_own_file_keeps_an_added_word(tiny_ldm, same_state, tmp_path):
    text = replace(SIZES["sd1"].text_encoder, embed_dim=24, depth=1, num_heads=2, mlp_ratio=1.0)
    net = tiny_ldm("sd1", text_encoder=text)
    add_embedding(net.text_encoder, "<cat>", torch.randn(2, 24))
    tp.save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors")
    same_state(net, back)
    assert back.config == net.config
    assert torch.equal(back.text_encoder(["a <cat>"]), net.text_encoder(["a <cat>"]))
