"""LoRAs and embeddings in a pipeline: by file, by name and in the prompt; recorded, reproduced and removed."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import triptych as tp
from triptych.errors import TriptychError
from triptych.pipelines.diffusion.image_metadata import parse_parameters, read
from triptych.pipelines.diffusion.pipeline import DiffusionPipeline
from triptych.weights.diffusion.lora import save_kohya

LAYERS = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (32, 24),
    "unet.mid_block.attentions.0.proj_in": (32, 32),
    "text_encoder.text_model.encoder.layers.1.self_attn.q_proj": (24, 24),
}
CALL = {"num_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16, "progress": False}


@pytest.fixture
def folder(ldm, tmp_path):
    """A folder with a model, two LoRAs and an embedding."""
    net = ldm("text")
    tp.save(net, tmp_path / "model.safetensors")
    for seed, name in enumerate(("style", "detail")):
        torch.manual_seed(seed)
        layers = {at: (torch.randn(2, i), torch.randn(o, 2), 2.0) for at, (o, i) in LAYERS.items()}
        save_kohya(net, tmp_path / f"{name}.safetensors", layers)
    save_file({"<cat>": torch.randn(2, 24)}, tmp_path / "cat.safetensors")
    return tmp_path


@pytest.fixture
def pipe(folder):
    return DiffusionPipeline(folder / "model.safetensors", dtype="fp32")


def array(images):
    return np.asarray(images[0])


def test_a_lora_by_file_name_and_prompt_is_the_same(pipe, folder, ldm):
    bare = array(pipe.text_to_image("an apple", **CALL))
    by_file = pipe.text_to_image("an apple", loras={folder / "style.safetensors": 0.5}, **CALL)
    assert not np.array_equal(array(by_file), bare)
    assert np.array_equal(array(pipe.text_to_image("an apple", loras={"style": 0.5}, **CALL)), array(by_file))
    in_prompt = pipe.text_to_image("an apple <lora:Style:0.5>", **CALL)
    assert np.array_equal(array(in_prompt), array(by_file))
    assert in_prompt[0].info["prompt"] == "an apple"
    assert in_prompt[0].info["loras"] == {str(folder / "style.safetensors"): 0.5}
    twice = pipe.text_to_image("an apple <lora:style:0.25>", loras={"style": 0.25}, **CALL)
    assert np.array_equal(array(twice), array(by_file))
    merged = tp.load(folder / "model.safetensors")
    tp.load_lora(merged, {folder / "style.safetensors": 0.5})
    of_merged = DiffusionPipeline(merged, dtype="fp32").text_to_image("an apple", **CALL)
    assert np.array_equal(array(of_merged), array(by_file))
    assert np.array_equal(array(pipe.text_to_image("an apple", **CALL)), bare)


def test_the_callers_network_stays_as_it_is(ldm, folder):
    net = ldm("text")
    before = {name: t.clone() for name, t in net.state_dict().items()}
    pipe = DiffusionPipeline(net, dtype="fp32", lora_dir=folder)
    pipe.text_to_image("a <cat> <lora:style:1>", embeddings={"<cat>": folder / "cat.safetensors"}, **CALL)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert net.config.text_encoder.num_added_tokens == 0


def test_an_image_with_loras_is_regenerated(pipe, folder, tmp_path, caplog):
    words = {"embeddings": {"<cat>": folder / "cat.safetensors"}}
    images = pipe.text_to_image("a <cat> <lora:style:0.7> <lora:detail:-1>", **words, **CALL)
    plain = pipe.text_to_image("a <cat> <lora:style:0.7> <lora:detail:-1>", **CALL)
    assert not np.array_equal(array(images), array(plain))
    pipe.save(images, tmp_path / "made.png")
    other = DiffusionPipeline(folder / "model.safetensors", dtype="fp32")
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(array(other.regenerate(tmp_path / "made.png", progress=False)), array(images))
        assert np.array_equal(array(other.regenerate(images[0], progress=False)), array(images))
        assert not caplog.records
        # A moved LoRA is found by its name; a changed one is reported.
        (folder / "moved").mkdir()
        for name in ("style", "detail"):
            (folder / f"{name}.safetensors").rename(folder / "moved" / f"{name}.safetensors")
        moved = DiffusionPipeline(folder / "model.safetensors", dtype="fp32", lora_dir=folder / "moved")
        assert np.array_equal(array(moved.regenerate(tmp_path / "made.png", progress=False)), array(images))
        assert not caplog.records
        (folder / "moved" / "style.safetensors").write_bytes(
            (folder / "moved" / "detail.safetensors").read_bytes()
        )
        assert not np.array_equal(
            array(moved.regenerate(tmp_path / "made.png", progress=False)), array(images)
        )
        assert "the LoRA style is not the one that the image was made from" in caplog.text
    with pytest.raises(TriptychError, match=r"no LoRA .*detail\.safetensors, nor"):
        other.regenerate(tmp_path / "made.png", progress=False)


def test_other_programs_can_read_the_loras(pipe, folder):
    (image,) = pipe.text_to_image("an apple", loras={"style": 0.5}, **CALL)
    text = image.info["parameters"]
    assert text.startswith("an apple <lora:style:0.5>\n")
    assert f'Lora hashes: "style: {image.info["hashes"]["LoRA style"]}"' in text
    again = parse_parameters(text)
    assert again.prompt == "an apple <lora:style:0.5>"
    assert np.array_equal(array(pipe.regenerate(again, progress=False)), np.asarray(image))
    pipe.save([image], folder / "images")
    (file,) = (folder / "images").iterdir()
    assert file.name == "0001-an-apple-0.png"
    assert json.loads(json.dumps(read(file).loras)) == image.info["loras"]


def test_half_precision_weights_are_restored_too(ldm, folder):
    pipe = DiffusionPipeline(ldm("text"), dtype="bf16", lora_dir=folder)
    before = {name: t.clone() for name, t in pipe.net.state_dict().items()}
    first = array(pipe.text_to_image("an apple", **CALL))
    for weight in (0.1, 0.7, -2.0):
        pipe.text_to_image(f"an apple <lora:style:{weight}>", **CALL)
    assert np.array_equal(array(pipe.text_to_image("an apple", **CALL)), first)
    assert all(torch.equal(t, before[name]) for name, t in pipe.net.state_dict().items())


def test_what_does_not_fit_is_one_line_and_leaves_the_network_bare(pipe, folder):
    bare = array(pipe.text_to_image("an apple", **CALL))
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 2)}, folder / "half.safetensors")
    save_file({"<wide>": torch.randn(1, 30)}, folder / "wide.safetensors")
    for prompt, more, words in (
        ("an apple <lora:stile:1>", {}, "no LoRA is called 'stile'.*near names: style"),
        ("an apple <lora:style:much>", {}, "must be a number"),
        ("an apple <lora:half>", {}, "not the other half"),
        ("an apple", {"negative_prompt": "<lora:style:1>"}, "negative prompt asks for the LoRA"),
        ("an apple", {"loras": {folder / "none.safetensors": 1}}, "no LoRA .*none.safetensors"),
        ("an apple", {"loras": {"style": 1e9}}, "weight 1000000000.0"),
        ("an apple", {"embeddings": {"<wide>": folder / "wide.safetensors"}}, "vectors of 30 numbers"),
        ("an apple", {"embeddings": {"apple": folder / "none.pt"}}, "none.pt"),
    ):
        with pytest.raises(TriptychError, match=words) as caught:
            pipe.text_to_image(prompt, **more, **CALL)
        assert "\n" not in str(caught.value)
        assert np.array_equal(array(pipe.text_to_image("an apple", **CALL)), bare)


def test_with_the_text_encoder_given_back(folder):
    pipe = DiffusionPipeline(folder / "model.safetensors", dtype="fp32", low_memory=True)
    prompt = "an apple <lora:style:0.5>"
    first = array(pipe.text_to_image(prompt, **CALL))
    assert np.array_equal(array(pipe.text_to_image(prompt, **CALL)), first)
    with pytest.raises(TriptychError, match="make a new pipeline for other LoRAs"):
        pipe.text_to_image("an apple", **CALL)


def test_text_encoder_and_unet_weights_travel(pipe, folder):
    """In a prompt, as an argument and in the text that the web UI reads: one meaning."""
    typed = pipe.text_to_image("an apple <lora:style:0.8:0.5>", **CALL)
    by_name = pipe.text_to_image("an apple <lyco:style:te=0.8:unet=0.5>", **CALL)
    from_argument = pipe.text_to_image("an apple", loras={"style": (0.8, 0.5)}, **CALL)
    assert np.array_equal(array(typed), array(by_name))
    assert np.array_equal(array(typed), array(from_argument))
    assert not np.array_equal(array(typed), array(pipe.text_to_image("an apple <lora:style:0.8>", **CALL)))
    assert typed[0].info["loras"] == {str(folder / "style.safetensors"): [0.8, 0.5]}
    assert typed[0].info["parameters"].startswith("an apple <lora:style:0.8:0.5>\n")
    assert np.array_equal(array(pipe.regenerate(typed[0], progress=False)), array(typed))
    again = parse_parameters(typed[0].info["parameters"])
    assert np.array_equal(array(pipe.regenerate(again, progress=False)), array(typed))
    summed = pipe.text_to_image("an apple <lora:style:0.3:0.5>", loras={"style": (0.5, 0.0)}, **CALL)
    assert np.array_equal(array(summed), array(typed))


def test_a_word_that_a_lora_brings(pipe, folder):
    layers = load_file(folder / "style.safetensors")
    words = {"bundle_emb.<owl>.string_to_param.*": torch.randn(2, 24)}
    save_file(layers | words, folder / "owl.safetensors")
    plain = array(pipe.text_to_image("an <owl> <lora:style:1>", **CALL))
    assert not np.array_equal(array(pipe.text_to_image("an <owl> <lora:owl:1>", **CALL)), plain)
    assert np.array_equal(array(pipe.text_to_image("an <owl> <lora:style:1>", **CALL)), plain)
