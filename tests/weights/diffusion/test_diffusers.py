"""diffusers' folders, both directions, run beside diffusers itself at tiny random sizes."""

import json
import shutil
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import triptych as tp
from triptych.errors import TriptychError
from triptych.models.configs.text import TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.registry import build
from triptych.weights import inspect, load
from triptych.weights.diffusion.diffusers_config import process_settings, read_process

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what importing it deprecates is its own affair
    from diffusers import DiffusionPipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.proves(
        "Checkpoints",
        "Latent diffusion and Stable Diffusion 1 and 2: diffusers folder",
        by="diffusers",
        writes=True,
    ),
]


def with_words(make, name):
    """A twin whose text encoder has CLIP's whole vocabulary, as its tokenizer needs."""
    config = make(name).config
    if not isinstance(config.text_encoder, TextConfig):
        return make(name)
    pad = 49407 if config.text_encoder.type == "clip" else 0
    return make(
        name, text_encoder=replace(config.text_encoder, vocab_size=49408, max_length=77, pad_token=pad)
    )


@pytest.mark.parametrize("name", ["sd1", "sd2", "sd-x4-upscaler", "ldm-celeba"])
@torch.no_grad()
def test_a_pipeline_runs_in_diffusers_and_comes_back(name, tiny_ldm, same_state, tmp_path):
    net = with_words(tiny_ldm, name)
    tp.export(net, tmp_path / "ours", "diffusers")
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "ours", local_files_only=True)
    x, t, inputs = torch.randn(1, net.config.network.in_channels, 16, 16), torch.tensor([500]), {}
    if net.text_encoder is not None:
        prompts = ["a red apple"]
        ids = theirs.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        assert torch.equal(ids, net.text_encoder.tokenize(prompts))
        context = theirs.text_encoder(ids)[0]
        torch.testing.assert_close(context, net.text_encoder(prompts), atol=1e-5, rtol=1e-5)
        inputs = {"encoder_hidden_states": context}
    labels = torch.tensor([3]) if net.config.network.num_classes else None
    more = {} if labels is None else {"class_labels": labels}
    expected = net.network(x, t, inputs.get("encoder_hidden_states"), labels)
    torch.testing.assert_close(theirs.unet(x, t, **inputs, **more).sample, expected, atol=1e-5, rtol=1e-5)
    stage = theirs.vae if net.text_encoder is not None else theirs.vqvae
    z = torch.randn(1, net.config.autoencoder.latent_channels, 8, 8)
    decoded = stage.decode(z / stage.config.scaling_factor).sample
    torch.testing.assert_close(decoded, net.autoencoder.decode(z), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        back = load(tmp_path / folder)
        same_state(net, back)
        assert back.config == net.config
        assert net.text_encoder is None or back.text_encoder.tokenizer.added == {}


def decoded(seen, pixels, z, *options):
    seen.append(z)
    return pixels(z, *options)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
@torch.no_grad()
def test_the_whole_pipeline_gives_the_same_latents(name, tiny_ldm, tmp_path, monkeypatch):
    """From a prompt to the latents that are decoded, ours and diffusers' of the folder that we wrote; and ours of the
    folder that diffusers writes."""
    net = with_words(tiny_ldm, name)
    for norm in (part for part in net.modules() if isinstance(part, nn.LayerNorm | nn.GroupNorm)):
        norm.weight.add_(1)
    tp.export(net, tmp_path / "ours", "diffusers")
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "ours", local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16)
    options = {"negative_prompt": "blurry", "guidance_scale": 5.0, "num_inference_steps": 4}
    expected = theirs("a red apple", latents=noise, output_type="latent", **options).images
    theirs.save_pretrained(tmp_path / "theirs")
    for source in (net, tmp_path / "theirs"):
        pipe, seen = tp.DiffusionPipeline(source, device="cpu", dtype="fp32"), []
        pixels = pipe.model.codec.decode
        monkeypatch.setattr(pipe.model.codec, "decode", partial(decoded, seen, pixels))
        pipe.text_to_image(
            "a red apple", "blurry", num_steps=4, guidance_scale=5.0, sampler="ddim", latents=noise
        )
        assert expected.std() > 0.1
        torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd1-inpaint", "ldm-txt2img-1p4b", "ldm-bsr-sr"])
def test_other_pipelines_there_and_back(name, tiny_ldm, same_state, tmp_path):
    net = with_words(tiny_ldm, name)
    tp.export(net, tmp_path / "it", "diffusers")
    back = load(tmp_path / "it")
    same_state(net, back)
    assert back.config == net.config


def test_a_block_that_nothing_reads_stays_behind(tiny_ldm, tmp_path):
    """Single files of Stable Diffusion 2 hold 24 blocks of which 23 are read; diffusers' folders hold those."""
    net = with_words(tiny_ldm, "sd2")
    full = tiny_ldm("sd2", text_encoder=replace(net.config.text_encoder, depth=3, skip_last_blocks=1))
    tp.export(full, tmp_path / "it", "diffusers")
    back = load(tmp_path / "it")
    assert (back.config.text_encoder.depth, back.config.text_encoder.skip_last_blocks) == (2, 0)
    ids = torch.randint(60, (1, 9))
    assert torch.equal(back.text_encoder.encode_tokens(ids), full.text_encoder.encode_tokens(ids))


def test_folders_of_a_training_next_to_the_parts_are_left_out(tiny_ldm, same_state, tmp_path):
    """diffusers' training scripts write checkpoint-500 into the folder of the pipeline, and some unet_ema."""
    net = with_words(tiny_ldm, "sd1")
    tp.export(net, tmp_path / "out", "diffusers")
    (tmp_path / "out" / "checkpoint-500").mkdir()
    torch.save({"state": {}}, tmp_path / "out" / "checkpoint-500" / "optimizer.bin")
    shutil.copytree(tmp_path / "out" / "unet", tmp_path / "out" / "unet_ema")
    same_state(net, tp.load(tmp_path / "out"))
    assert {"checkpoint-500 left out", "unet_ema left out"} <= set(inspect(tmp_path / "out")["notes"])


def test_parts_alone(tiny_ldm, same_state, tmp_path):
    net = tiny_ldm("sd2")
    tp.export(net.network, tmp_path / "unet", "diffusers")
    tp.export(net.autoencoder, tmp_path / "vae", "diffusers")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    for part, ours in (("unet", net.network), ("vae", net.autoencoder)):
        back = load(tmp_path / part)
        same_state(ours, back)
        assert back.config == ours.config


def test_what_diffusers_cannot_say_is_refused(tiny_ldm, tmp_path):
    for name, words in (
        ("ldm-cin256-v2", "table of classes"),
        ("sd2-depth", "depth"),
        ("ldm-churches", "8 heads"),
    ):
        with pytest.raises(TriptychError, match=words):
            tp.export(tiny_ldm(name), tmp_path / "it", "diffusers")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TriptychError, match=r"not to it\.ckpt"):
        tp.export(tiny_ldm("ldm-celeba"), tmp_path / "it.ckpt", "diffusers")


def test_damaged_folders_are_one_line(tiny_ldm, tmp_path):
    folder = tmp_path / "it"
    tp.export(tiny_ldm("ldm-celeba"), folder, "diffusers")
    index = (folder / "model_index.json").read_text()
    (folder / "model_index.json").write_text("[")
    with pytest.raises(TriptychError, match=r"model_index\.json is not JSON"):
        load(folder)
    (folder / "model_index.json").write_text(index)
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(path.read_text())
    path.write_text(json.dumps(scheduler | {"beta_schedule": "sigmoid"}))
    with pytest.raises(TriptychError, match="beta_schedule 'sigmoid'"):
        load(folder)
    path.write_text(json.dumps(scheduler | {"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    with pytest.raises(TriptychError, match="runs a flow"):
        load(folder)
    path.unlink()
    with pytest.raises(TriptychError, match=r"scheduler_config\.json, which says .* is not there"):
        load(folder)
    path.write_text(json.dumps(scheduler))
    (folder / "vqvae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(TriptychError, match="no vae or vqvae"):
        load(folder)


def test_processes_there_and_back(tiny_ldm):
    process = tiny_ldm("sd2").config.process
    for changes in (
        {},
        {"zero_terminal_snr": True},
        {"schedule": "linear"},
        {"prediction": "x0", "num_timesteps": 50},
    ):
        config = replace(process, **changes)
        assert read_process(process_settings(config), "it") == config


def test_heads_by_level_are_a_size(same_state, tmp_path, scramble):
    config = UNetConfig(
        base_channels=16,
        norm_groups=16,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_downsample_factors=(1, 2),
        head_dim=8,
        context_dim=12,
    )
    net = scramble(build(config))
    tp.export(net, tmp_path / "it", "diffusers")
    config_json = json.loads((tmp_path / "it" / "config.json").read_text())
    assert config_json["attention_head_dim"] == [2, 4]
    assert load(tmp_path / "it").config == config
