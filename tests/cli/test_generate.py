"""`triptych generate`: its files, the same pixels from their metadata, and one-line errors."""

import copy
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import triptych as tp
from triptych import weights
from triptych.cli import main
from triptych.cli.generate import interruptible
from triptych.errors import ConfigError
from triptych.models.configs.autoencoder import AutoencoderConfig, TinyAutoencoderConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig, SemanticMapConfig
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.registry import build
from triptych.pipelines.diffusion.image_metadata import read
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.pipelines.diffusion.records import with_seeds

STAGE = AutoencoderConfig(
    regularization="kl",
    base_channels=8,
    channel_multipliers=(1, 1, 1),
    num_res_blocks=1,
    latent_channels=4,
    norm_groups=4,
)
UNET = UNetConfig(
    latent_size=(8, 8),
    base_channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_downsample_factors=(2,),
    num_heads=2,
    context_dim=24,
    norm_groups=8,
)
TEXT = TextConfig(
    type="clip", vocab_size=49408, embed_dim=24, depth=1, num_heads=2, mlp_ratio=1.0, pad_token=49407
)
CONFIGS = {
    "text": LatentDiffusionConfig(autoencoder=STAGE, network=UNET, text_encoder=TEXT),
    "classes": LatentDiffusionConfig(
        autoencoder=STAGE, network=UNET, text_encoder=ClassTokenConfig(num_classes=2, embed_dim=24)
    ),
    "map": LatentDiffusionConfig(
        autoencoder=STAGE,
        network=replace(UNET, context_dim=0, in_channels=7),
        concat="semantic_map",
        semantic_map=SemanticMapConfig(num_classes=256 - 1),
    ),
    "boxes": LatentDiffusionConfig(
        autoencoder=STAGE,
        network=UNET,
        text_encoder=replace(TEXT, type="ldm-bert", vocab_size=82, max_length=11, pad_token=0, boxes=True),
    ),
    "free": LatentDiffusionConfig(autoencoder=STAGE, network=replace(UNET, context_dim=0)),
    "upscaler": LatentDiffusionConfig(
        autoencoder=STAGE, network=replace(UNET, context_dim=0, in_channels=7), concat="image"
    ),
}


LOADED: dict = {}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folder of tiny models, images, LoRAs and embeddings."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        net = LatentDiffusion(config)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
        if name == "classes":
            net.card = replace(net.card, classes=("lynx", "owl"))
        tp.save(net, folder / f"{name}.safetensors")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 28, 3), dtype=np.uint8)).save(folder / "photo.png")
    mask = np.zeros((20, 28), np.uint8)
    mask[5:13, 7:19] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:8]).save(folder / "small_mask.png")
    Image.fromarray(mask).save(folder / "plain.png")
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    for name, width in (("style", 32), ("other", 48)):
        halves = {"lora_down": torch.randn(2, width), "lora_up": torch.randn(width, 2)}
        save_file({f"{layer}.{half}.weight": t for half, t in halves.items()}, folder / f"{name}.safetensors")
    odd = {f"lora_unet_joint_block.{half}.weight": torch.randn(2, 2) for half in ("lora_down", "lora_up")}
    save_file(odd, folder / "strange.safetensors")
    save_file({"<owl>": torch.randn(1, 24)}, folder / "owl.safetensors")
    save_file({"<wide>": torch.randn(1, 30)}, folder / "wide.safetensors")
    return folder


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Load each file once, since loading takes most of a tiny model's time."""
    load = tp.load  # cached by the package on first access, which must not be the replacement
    monkeypatch.setattr(
        weights,
        "load",
        lambda source, prediction=None: copy.deepcopy(  # a pipeline modifies the network that it has loaded
            LOADED.get((source, prediction))
            or LOADED.setdefault((source, prediction), load(source, prediction=prediction))
        ),
    )


def run(places, tmp_path, typed: str, code: int = 0) -> None:
    words = [word.format(m=places, t=tmp_path) for word in typed.split()]
    assert main(["generate", *words, "--dtype", "fp32"]) == code


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_prompt_and_regeneration_from_the_file(places, tmp_path, capsys):
    typed = (
        "apple --negative-prompt blurry --model {m}/text.safetensors --num-steps 2 --seed 5 --num-images 2"
    )
    typed += " --size 40x24"
    run(
        places,
        tmp_path,
        typed
        + " --guidance-scale 3 --sampler euler-ancestral --guidance-rescale 0.5 --tiling x --out {t}/made",
    )
    files = sorted((tmp_path / "made").iterdir())
    assert [path.name for path in files] == ["0001-apple-5.png", "0002-apple-6.png"]
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/made/0001-apple-5.png: 40x24, seed 5",
        f"{tmp_path}/made/0002-apple-6.png: 40x24, seed 6",
    ]
    settings = read(files[0])
    assert settings.negative_prompt == "blurry"
    assert settings.size == (24, 40)
    assert settings.guidance_scale == 3
    assert settings.tiling == "x"
    run(
        places, tmp_path, "--from {t}/made/0002-apple-6.png --out {t}/again.png"
    )  # the file contains the name of the model
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(files[1]))
    run(places, tmp_path, "--from {t}/made/0001-apple-5.png --seed 6 --out {t}/other.png")
    assert np.array_equal(pixels(tmp_path / "other.png"), pixels(files[1]))
    run(places, tmp_path, "pear --from {t}/made/0001-apple-5.png --sampler ddim --out {t}/pear.png")
    pear = read(tmp_path / "pear.png")
    assert (pear.prompt, pear.sampler, pear.schedule, pear.seed) == ("pear", "ddim", "compvis", 5)


def test_a_lora_and_an_embedding(places, tmp_path):
    """By file and by name, and again from the image."""
    common = " --model {m}/text.safetensors --num-steps 2 --seed 3 --size 24x16"
    run(places, tmp_path, "apple --out {t}/plain.png" + common)
    run(places, tmp_path, "apple --lora {m}/style.safetensors:0.5 --out {t}/file.png" + common)
    run(places, tmp_path, "apple --lora style:0.5 --lora-dir {m} --out {t}/name.png" + common)
    run(places, tmp_path, "apple<lora:style:0.5> --out {t}/prompt.png" + common)
    assert np.array_equal(pixels(tmp_path / "file.png"), pixels(tmp_path / "name.png"))
    assert np.array_equal(pixels(tmp_path / "file.png"), pixels(tmp_path / "prompt.png"))
    assert not np.array_equal(pixels(tmp_path / "file.png"), pixels(tmp_path / "plain.png"))
    run(places, tmp_path, "--from {t}/file.png --out {t}/again.png")
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "file.png"))
    run(places, tmp_path, "apple --lora style:0.8:0.5 --lora-dir {m} --out {t}/pair.png" + common)
    run(places, tmp_path, "apple<lora:style:0.8:0.5> --out {t}/pair-prompt.png" + common)
    assert np.array_equal(pixels(tmp_path / "pair.png"), pixels(tmp_path / "pair-prompt.png"))
    run(places, tmp_path, "--from {t}/file.png --lora style:0 --out {t}/without.png")
    assert np.array_equal(pixels(tmp_path / "without.png"), pixels(tmp_path / "plain.png"))
    common += " --guidance-scale 1000"  # the tiny model hardly depends on the prompt
    run(places, tmp_path, "my-owl --embedding {m}/owl.safetensors:my-owl --out {t}/word.png" + common)
    run(places, tmp_path, "<owl> --embedding {m}/owl.safetensors --out {t}/own.png" + common)
    assert np.array_equal(pixels(tmp_path / "word.png"), pixels(tmp_path / "own.png"))
    assert read(tmp_path / "word.png").embeddings == {"my-owl": f"{places}/owl.safetensors"}
    run(places, tmp_path, "--from {t}/word.png --out {t}/word2.png")
    assert np.array_equal(pixels(tmp_path / "word2.png"), pixels(tmp_path / "word.png"))
    run(places, tmp_path, "my-owl --out {t}/unknown.png" + common)
    assert not np.array_equal(pixels(tmp_path / "unknown.png"), pixels(tmp_path / "word.png"))


def test_approximations_are_in_the_file(places, tmp_path):
    tp.save(
        build(TinyAutoencoderConfig(base_channels=8, num_levels=3, num_res_blocks=1)),
        tmp_path / "tiny.safetensors",
    )
    typed = "apple --model {m}/text.safetensors --num-steps 4 --size 32x32 --out {t}/"
    run(places, tmp_path, typed + "exact.png")
    run(places, tmp_path, typed + "made.png --merge-tokens 0.5 --deep-cache 2 --decoder {t}/tiny.safetensors")
    settings = read(tmp_path / "made.png")
    assert (settings.merge_tokens, settings.deep_cache) == (0.5, 2)
    assert settings.decoder == str(tmp_path / "tiny.safetensors")
    run(places, tmp_path, "--from {t}/made.png --out {t}/again.png")
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "made.png"))
    run(places, tmp_path, "--from {t}/exact.png --merge-tokens 0 --deep-cache 1 --out {t}/zero.png")
    assert np.array_equal(pixels(tmp_path / "zero.png"), pixels(tmp_path / "exact.png"))
    assert not np.array_equal(pixels(tmp_path / "made.png"), pixels(tmp_path / "exact.png"))


def test_from_the_web_uis_text(places, tmp_path, capsys):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(
        "parameters",
        "an apple\nNegative prompt: blurry\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 7, Size: 24x16, Model: x",
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "web.png", pnginfo=info)
    run(places, tmp_path, "--from {t}/web.png --out {t}/a.png", code=2)
    assert "web.png was made with the model x; name its file with --model FILE" in capsys.readouterr().err
    run(places, tmp_path, "--from {t}/web.png --model {m}/text.safetensors --out {t}/a.png")
    settings = read(tmp_path / "a.png")
    assert (settings.prompt, settings.sampler, settings.seed, settings.size) == (
        "an apple",
        "euler-ancestral",
        7,
        (16, 24),
    )


def test_from_an_image(places, tmp_path):
    photo, mask = pixels(places / "photo.png"), pixels(places / "mask.png")
    common = " --model {m}/text.safetensors --num-steps 2 --init-image {m}/photo.png"
    run(places, tmp_path, "apple --mask-image {m}/mask.png --out {t}/in.png" + common)
    inpainted = pixels(tmp_path / "in.png")
    assert np.array_equal(inpainted[mask == 0], photo[mask == 0])
    assert read(tmp_path / "in.png").strength == 1
    run(places, tmp_path, "--from {t}/in.png --out {t}/in2.png")
    assert np.array_equal(pixels(tmp_path / "in2.png"), inpainted)
    run(places, tmp_path, "apple --out {t}/over.png" + common)
    assert pixels(tmp_path / "over.png").shape == photo.shape
    assert read(tmp_path / "over.png").strength == 0.6
    run(places, tmp_path, "--from {t}/over.png --strength 1 --out {t}/over2.png")
    assert read(tmp_path / "over2.png").strength == 1
    run(places, tmp_path, "--from {t}/over.png --mask-image {m}/mask.png --out {t}/in3.png")
    assert np.array_equal(pixels(tmp_path / "in3.png"), inpainted)
    run(
        places, tmp_path, "--from {t}/in.png --init-image {t}/over.png --out {t}/in4.png"
    )  # with the mask of in.png
    assert np.array_equal(pixels(tmp_path / "in4.png")[mask == 0], pixels(tmp_path / "over.png")[mask == 0])
    run(
        places,
        tmp_path,
        "--init-image {m}/photo.png --model {m}/upscaler.safetensors --num-steps 1 --out {t}/large.png",
    )
    assert pixels(tmp_path / "large.png").shape == (80, 112, 3)


def test_classes_and_unconditional_generation(places, tmp_path, capsys):
    run(places, tmp_path, "--class owl --model {m}/classes.safetensors --num-steps 1 --json --out {t}/a.png")
    (printed,) = json.loads(capsys.readouterr().out)
    assert printed["file"] == str(tmp_path / "a.png")
    assert (printed["label"], printed["class_name"], printed["guidance_scale"]) == (1, "owl", 1.5)
    run(places, tmp_path, "--class 1 --model {m}/classes.safetensors --num-steps 1 --out {t}/b.png")
    run(places, tmp_path, "--from {t}/a.png --out {t}/c.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "c.png"))
    run(places, tmp_path, "--model {m}/free.safetensors --num-steps 1 --size 16x16 --out {t}/d.png")
    assert pixels(tmp_path / "d.png").shape == (16, 16, 3)


def test_maps_and_boxes(places, tmp_path):
    run(
        places, tmp_path, "--class-map {m}/mask.png --model {m}/map.safetensors --num-steps 1 --out {t}/a.png"
    )
    assert pixels(tmp_path / "a.png").shape == (20, 28, 3)
    run(places, tmp_path, "--from {t}/a.png --out {t}/a2.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "a2.png"))
    typed = "--box 3:0,0,0.5,1 --box 4:0.5,0.5,1,1 --model {m}/boxes.safetensors --num-steps 1"
    run(places, tmp_path, typed + " --out {t}/b.png")
    assert read(tmp_path / "b.png").boxes == ((3, 0, 0, 0.5, 1), (4, 0.5, 0.5, 1, 1))
    run(places, tmp_path, "--from {t}/b.png --out {t}/b2.png")
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "b2.png"))


def test_strip_and_preview(places, tmp_path):
    run(
        places,
        tmp_path,
        "apple --model {m}/text.safetensors --num-steps 3 --strip {t}/s.png --preview {t}/p.png --out {t}/a.png",
    )
    assert pixels(tmp_path / "p.png").shape == (32, 32, 3)
    assert pixels(tmp_path / "s.png").shape[1] > 600


def test_one_interrupt_stops_at_the_step(places, tmp_path, capsys, monkeypatch):
    from triptych.pipelines.diffusion.sampling_loop import SamplingLoop

    make = SamplingLoop.run

    def pressed_early(self, *args, preview=None, **more):
        return make(self, *args, preview=lambda now: os.kill(os.getpid(), signal.SIGINT), **more)

    monkeypatch.setattr(SamplingLoop, "run", pressed_early)
    run(
        places,
        tmp_path,
        "apple --model {m}/text.safetensors --num-steps 9 --num-images 3 --out {t}/made",
        code=130,
    )
    (path,) = (tmp_path / "made").iterdir()
    assert read(path).stopped_at == 1
    assert "stopped at step 1, 1 of 3" in capsys.readouterr().err
    with interruptible() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_finished_images_are_kept_after_an_error(places, tmp_path, capsys, monkeypatch):
    from triptych.pipelines.diffusion.sampling_loop import SamplingLoop

    sample, calls = SamplingLoop._sample_batch, []

    def fails_the_second_time(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise ConfigError("the latents became NaN")
        return sample(self, *arguments)

    monkeypatch.setattr(SamplingLoop, "_sample_batch", fails_the_second_time)
    typed = "apple --model {m}/text.safetensors --num-steps 1 --seed 4 --num-images 3 --out {t}/made.jpg"
    run(places, tmp_path, typed, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["made-4.jpg"]
    assert capsys.readouterr().out == f"{tmp_path}/made-4.jpg: 32x32, seed 4\n"
    run(places, tmp_path, typed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made-4.jpg", "made-5.jpg", "made-6.jpg"]


def test_a_file_without_a_prediction_type(places, tmp_path, capsys):
    """Stable Diffusion 2 has linear projections and a prompt, but nothing in the file tells eps from v."""
    net = LatentDiffusion(
        replace(
            CONFIGS["text"], network=replace(UNET, attention_downsample_factors=(1,), projection="linear")
        )
    )
    tp.export(net, tmp_path / "sd2.safetensors", "compvis")
    (tmp_path / "sd2.safetensors.json").unlink()
    typed = "apple --model {t}/sd2.safetensors --num-steps 1 --size 16x16 --out {t}/a.png"
    run(places, tmp_path, typed, code=2)
    assert "--prediction v" in capsys.readouterr().err
    run(places, tmp_path, typed + " --prediction v")
    converted = tmp_path / "ours.safetensors"
    typed = ["convert", str(tmp_path / "sd2.safetensors"), str(converted), "--format", "triptych"]
    assert main([*typed, "--prediction", "v"]) == 0
    assert tp.load(converted).config.process.prediction == "v"
    with pytest.raises(ConfigError, match="set it in the network's config"):
        tp.DiffusionPipeline(net, prediction="v")


MISTAKES = [
    ("", "ldm-emoji needs a prompt, and none was given"),
    ("apple --model {t}/none.safetensors", "none.safetensors"),
    ("apple --model vit-emoji", "ViT, which generates no images"),
    ("--model {m}/text.safetensors", "needs a prompt, and none was given"),
    ("apple --model {m}/classes.safetensors", "takes a class, not a prompt"),
    ("--model {m}/classes.safetensors", "needs a class, and none was given"),
    ("apple --model {m}/free.safetensors", "takes neither prompt nor class"),
    ("--class owl --model {m}/text.safetensors", "is not conditioned on classes"),
    ("--class owel --model {m}/classes.safetensors", "near names: owl"),
    ("--class 7 --model {m}/classes.safetensors", "class 7 is not from 0 to 1"),
    ("apple --class owl", "give the one that the model takes"),
    ("apple --sampler euller", "near names: euler"),
    ("apple --schedule karas", "near names: karras"),
    ("apple --size 41x24 --model {m}/text.safetensors", "multiples of 4, such as 40x24"),
    ("apple --size 40", "WIDTHxHEIGHT"),
    ("apple --num-steps -3", "num_steps is -3"),
    ("apple --num-steps 0", "num_steps is 0"),
    ("apple --num-steps many", "--num-steps"),
    ("apple --seed -1", "seed is -1"),
    ("apple --num-images 0", "num_images 0"),
    ("apple --guidance-rescale 3", "guidance_rescale is 3"),
    ("apple --tiling z", "'z'"),
    ("apple --guidance-scale nan", "guidance_scale is nan"),
    ("apple --strength 0.5", "--init-image"),
    ("apple --init-image {m}/photo.png --strength 1.5", "strength is 1.5"),
    ("apple --init-image {m}/nowhere.png", "nowhere.png does not exist"),
    (
        "apple --init-image {m}/photo.png --mask-image {m}/small_mask.png",
        "make the mask as large as the image",
    ),
    ("apple --mask-image {m}/mask.png", "--init-image"),
    (
        "apple --depth-map {m}/mask.png --model {m}/text.safetensors",
        "does not use depth_map; leave depth_map (--depth-map) out",
    ),
    (
        "--init-image {m}/photo.png --mask-image {m}/mask.png --model {m}/upscaler.safetensors",
        "upscale of this model does not use mask_image",
    ),
    (
        "--class owl --init-image {m}/photo.png --model {m}/classes.safetensors",
        "does not use init_image; leave init_image (--init-image)",
    ),
    ("--from {m}/plain.png", "has no generation metadata"),
    ("--from {t}/none.png", "none.png does not exist"),
    ("apple --out {t}/x.tiff", "written as .png"),
    ("apple --strip {t}/x.gif", "x.gif must be a PNG"),
    ("apple --preview {t}", "name a .png file"),
    ("apple --out {m}/photo.png/x.png", "is not a writable folder"),
    ("--model {m}/map.safetensors", "semantic needs class_map (--class-map)"),
    ("--class-map {m}/photo.png --model {m}/map.safetensors", "one class number per pixel"),
    ("--class-map {m}/mask.png --model {m}/free.safetensors", "not semantic"),
    ("--box 1:0,0,1 --model {m}/boxes.safetensors", "CLASS:LEFT,TOP,RIGHT,BOTTOM"),
    ("--box 1:0,0,1,2 --model {m}/boxes.safetensors", "from 0 to 1"),
    ("apple --model {m}/boxes.safetensors", "takes boxes, not a prompt"),
    ("--box 1:0,0,1,1 --model {m}/free.safetensors", "takes no boxes"),
    ("apple --sampeler euler", "did you mean --sampler"),
    ("apple<lora:stile:1> --model {m}/text.safetensors", "near names: style"),
    ("apple<lora:style:x> --model {m}/text.safetensors", "must be a number such as 0.8"),
    ("apple --lora {m}/style.safetensors:x --model {m}/text.safetensors", "the weight is 'x'"),
    ("apple --lora {t}/none.safetensors --model {m}/text.safetensors", "none.safetensors"),
    ("apple --lora {m}/other.safetensors --model {m}/text.safetensors", "a LoRA of another family"),
    ("apple --lora {m}/strange.safetensors --model {m}/text.safetensors", "no layer lora_unet_joint_block"),
    ("apple --lora {m}/photo.png --model {m}/text.safetensors", "photo.png"),
    ("apple --lora {m}/owl.safetensors --model {m}/text.safetensors", "is no LoRA"),
    ("apple --lora style --lora-dir {t}/none --model {m}/text.safetensors", "no folder"),
    ("apple --embedding {m}/wide.safetensors --model {m}/text.safetensors", "vectors of 30 numbers"),
    (
        "apple --embedding {m}/text.safetensors --model {m}/text.safetensors",
        "an embedding of textual inversion has one",
    ),
    ("apple --embedding {t}/none.pt --model {m}/text.safetensors", "none.pt"),
    (
        "apple --embedding {m}/owl.safetensors: --model {m}/text.safetensors",
        "there is no word after the colon",
    ),
    ("apple --embedding {m}/owl.safetensors:apple --model {m}/text.safetensors", "apple"),
    ("--class owl --embedding {m}/owl.safetensors --model {m}/classes.safetensors", "reads no text"),
]


@pytest.mark.parametrize(("typed", "named"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_mistakes(typed, named, places, tmp_path, capsys):
    run(places, tmp_path, typed, code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("fp32 on")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("triptych: ")
    assert named in lines[0], lines[0]


def test_an_empty_prompt_and_one_of_5000_words(places, tmp_path):
    common = [
        "--model",
        str(places / "text.safetensors"),
        "--num-steps",
        "1",
        "--dtype",
        "fp32",
        "--size",
        "8x8",
    ]
    assert main(["generate", "", *common, "--out", str(tmp_path / "a.png")]) == 0
    assert main(["generate", "red apple " * 2500, *common, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "0001-red-apple-red-apple-red-apple-red-apple-0.png").exists()


def test_the_demo_generates_its_prompts_and_the_steps_of_the_first(places):
    from triptych.cli.demo import PROMPTS, generate_panel

    panel = generate_panel(str(places / "text.safetensors"))
    assert [card.words for card in panel.cards] == list(PROMPTS)
    assert {card.image.shape for card in panel.cards} == {(32, 32, 3)}
    assert len(panel.frames) == len(panel.labels) == 8
    assert np.array_equal(panel.frames[-1], panel.cards[0].image)


def test_a_file_of_prompts_equals_single_commands(places, tmp_path, capsys):
    """Each image, generated in batches with others, and in a command that resumes another one."""
    file = tmp_path / "prompts.txt"
    long = " ".join(["apple"] * 90)  # two chunks of tokens, so it is never in a batch with the others
    file.write_text(f"a red apple\n\n  a blue owl\n{long}\na fox\n")
    args = ("generate", "--model", str(places / "text.safetensors"), "--num-steps", "2", "--dtype", "fp32")
    many = (*args, "--prompts", str(file), "--seed", "5", "--num-images", "2", "--batch-size", "3", "--json")
    assert main([*many, "--out", str(tmp_path / "many")]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["seed"] for result in results] == list(range(5, 13))
    assert [result["prompt"] for result in results] == [
        p for p in ("a red apple", "a blue owl", long, "a fox") for _ in "ab"
    ]
    for result in (results[0], results[3], results[5], results[6]):
        single = tmp_path / "single.png"
        assert main([*args, result["prompt"], "--seed", str(result["seed"]), "--out", str(single)]) == 0
        with Image.open(single) as a, Image.open(result["file"]) as b:
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
    capsys.readouterr()
    for result in (results[2], results[7]):
        os.unlink(result["file"])
    assert main([*many, "--out", str(tmp_path / "many"), "--skip-existing"]) == 0
    output = capsys.readouterr()
    assert [result["seed"] for result in json.loads(output.out)] == [7, 12]
    assert "6 of 8 already exist" in output.err
    assert main([*many, "--out", str(tmp_path / "many"), "--skip-existing", "--guidance-scale", "3"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 8  # the settings differ, so no image exists


def test_images_that_are_not_returned(places):
    pipe = tp.DiffusionPipeline(tp.load(places / "text.safetensors"), dtype="fp32")
    settings = with_seeds([GenerationRecord(prompt="a red apple", num_steps=2, seed=3)], 5)
    returned, passed = pipe.generate(settings, batch_size=2), []
    assert pipe.generate(settings, batch_size=2, on_image=passed.append, return_images=False) == []
    assert [image.tobytes() for image in passed] == [image.tobytes() for image in returned]
    some = pipe.generate(
        settings,
        should_generate=lambda record: (
            record.seed % 2 == 0 and record.weights_hash == pipe.model.weights_hash
        ),
    )
    assert [image.info["seed"] for image in some] == [4, 6]
    for image, other in zip(some, (returned[1], returned[3]), strict=True):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(other)).max() <= 1


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("--prompts {t}/none.txt", "none.txt cannot be read (No such file"),
        ("--prompts {t}/empty.txt", "empty.txt contains no prompt"),
        ("--prompts {t}/bytes.txt", "bytes.txt cannot be read (not UTF-8 text)"),
        ("owl --prompts {t}/good.txt", "with a prompt or --class"),
    ],
)
def test_mistakes_about_a_file_of_prompts(places, tmp_path, capsys, typed, named):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\xd8")
    (tmp_path / "good.txt").write_text("an owl")
    args = typed.format(t=tmp_path).split()
    assert main(["generate", *args, "--model", str(places / "text.safetensors")]) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
