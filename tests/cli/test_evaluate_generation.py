"""`triptych evaluate` of generators: the images that `generate` would write, compared with the data."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import triptych as tp
from triptych import weights
from triptych.cli import main
from triptych.evaluation.feature_extractor import open_extractor
from triptych.evaluation.reference_statistics import read_reference
from triptych.models.configs.autoencoder import AutoencoderConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.latent_diffusion import LatentDiffusion

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
    attention_downsample_factors=(),
    num_heads=2,
    norm_groups=8,
)
READING = replace(UNET, context_dim=24)
TEXT = TextConfig(
    type="clip", vocab_size=49408, embed_dim=24, depth=1, num_heads=2, mlp_ratio=1.0, pad_token=49407
)
CLASSES = ClassTokenConfig(num_classes=4, embed_dim=24)
CONFIGS = {
    "text": LatentDiffusionConfig(autoencoder=STAGE, network=READING, text_encoder=TEXT),
    "classes": LatentDiffusionConfig(autoencoder=STAGE, network=READING, text_encoder=CLASSES),
    "free": LatentDiffusionConfig(autoencoder=STAGE, network=replace(UNET, context_dim=0)),
}
CAPTIONS = ("a red fox", "an owl (asleep) [1.3]", "cat " * 90, "BREAK a dog")
LOADED: dict = {}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Tiny models, a folder with captions, and a folder of samples."""
    folder = tmp_path_factory.mktemp("measured")
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        net = LatentDiffusion(config)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
        if name == "classes":
            net.card = replace(net.card, classes=("cat", "dog", "fox", "owl"))
        tp.save(net, folder / f"{name}.safetensors")
    rng = np.random.default_rng(0)
    for name, count in (("data", 9), ("samples", 8)):
        (folder / name).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(
                folder / name / f"{i}.png"
            )
    lines = [{"file_name": f"{i}.png", "text": CAPTIONS[i % 4]} for i in range(9)]
    (folder / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Load each file once, and do not share cached statistics between tests."""
    load = tp.load  # cached by the package on first access, which must not be the replacement
    monkeypatch.setattr(
        weights,
        "load",
        lambda source, **options: (
            LOADED.get(str(source)) or LOADED.setdefault(str(source), load(source, **options))
        ),
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def measured(capsys, *args):
    assert main(["evaluate", *map(str, args), "--workers", "0", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *args):
    assert main(["evaluate", *map(str, args)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    (line,) = [line for line in lines if " on cpu" not in line]  # the precision is logged once per process
    return line


def test_samples_of_captions_are_those_of_generate(places, model, tmp_path, capsys, monkeypatch):
    """With successive seeds, and with captions taken literally."""
    from triptych.pipelines.diffusion.pipeline import DiffusionPipeline

    samples = []
    original = DiffusionPipeline.generate

    def spy(self, records, **options):
        images = original(self, records, **options)
        samples.extend(images)
        return images

    args = (places / "text.safetensors", "--data", places / "data", "--samples", 6, "--extractor", model)
    args = (*args, "--num-steps", 2, "--guidance-scale", 2, "--seed", 5, "--dtype", "fp32", "--batch-size", 3)
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionPipeline, "generate", spy)
        metrics = measured(capsys, *args, "--out", tmp_path / "out")
    assert [sample.info["seed"] for sample in samples] == list(range(5, 11))
    assert {sample.info["prompt"] for sample in samples} == {
        "a red fox", r"an owl \(asleep\) \[1.3\]", "cat " * 90, r"BREA\K a dog"
    }  # fmt: skip
    pipe = DiffusionPipeline(str(places / "text.safetensors"), dtype="fp32")
    for sample in samples:
        options = {name: sample.info[name] for name in ("prompt", "seed", "num_steps", "guidance_scale")}
        (single,) = pipe.text_to_image(**options)
        assert np.abs(np.asarray(single).astype(int) - np.asarray(sample)).max() <= 1
    assert metrics["task"] == "generation"
    assert (metrics["count"], metrics["real_count"], metrics["num_steps"], metrics["seed"]) == (6, 9, 2, 5)
    assert metrics["identity"]["preparation"]["picture"] == [32, 32]  # words: quoted
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert "faithfulness" not in metrics

    # The metrics of a folder with the same images are equal.
    folder = tmp_path / "samples"
    pipe.save(samples, folder)
    again = measured(capsys, "--samples", folder, "--data", places / "data", "--extractor", model)
    for name in ("frechet", "kernel_exact", "precision"):
        assert again[name] == pytest.approx(metrics[name], rel=1e-5)  # batches differ
    assert again["protocol"] == metrics["protocol"]


def test_samples_of_classes_are_of_the_classes_of_the_data(places, model, labeled, capsys):
    args = (
        places / "classes.safetensors",
        "--data",
        labeled,
        "--samples",
        6,
        "--num-steps",
        1,
        "--extractor",
        model,
    )
    metrics = measured(capsys, *args, "--classifier", model)
    faithfulness = metrics["faithfulness"]
    assert faithfulness.keys() == {"generated", "real"}
    assert 0 <= faithfulness["generated"]["top1"] <= 1
    assert "inception_score" in metrics
    assert "faithfulness" not in measured(capsys, *args, "--classifier", "none")


def test_an_unconditional_model_needs_images_only(places, model, images, tmp_path, capsys):
    file = tmp_path / "real.safetensors"
    args = ("--samples", 4, "--num-steps", 1, "--extractor", model, "--reference", file)
    metrics = measured(capsys, places / "free.safetensors", "--data", images, *args)
    assert read_reference(file).identity == metrics["identity"]
    # With the file no data is needed, and another size is refused.
    again = measured(capsys, places / "free.safetensors", *args)
    assert again["frechet"] == metrics["frechet"]
    line = refused(capsys, places / "free.safetensors", *args, "--size", "40x32")
    assert "picture [32, 32], and [32, 40] is needed" in line  # words: quoted


def test_folders_are_compared_at_the_size_that_all_samples_have(places, model, images, tmp_path, capsys):
    args = ("--samples", places / "samples", "--data", images, "--extractor", model)
    metrics = measured(capsys, *args)
    assert (metrics["count"], metrics["real_count"]) == (8, 5)
    assert metrics["identity"]["preparation"]["picture"] == [40, 36]  # words: quoted
    extractor = open_extractor(str(model), image_size=(40, 36), device="cpu")
    assert metrics["identity"]["extractor"] == extractor.identity["extractor"]
    Image.new("L", (9, 9)).save(tmp_path / "gray.png")
    Image.new("RGBA", (8, 9)).save(tmp_path / "clear.png")
    args = ("--samples", tmp_path, "--data", images, "--extractor", model)
    sizes = [
        measured(capsys, *args, *more)["identity"]["preparation"]["picture"]  # words: quoted
        for more in ((), ("--size", "20x30"))
    ]
    assert sizes == [None, [30, 20]]


def test_the_distance_of_equal_images_is_zero(images, model, capsys):
    metrics = measured(capsys, "--samples", images, "--data", images, "--extractor", model)
    assert metrics["frechet"] < 1e-6
    assert metrics["kernel_exact"] < 0
    assert main(["evaluate", "--samples", str(images), "--data", str(images), "--extractor", str(model)]) == 0
    out = capsys.readouterr().out
    for words in ("Fréchet distance", "its floor at this count", "kernel distance", "±", "protocol"):
        assert words in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("{f}/text.safetensors --samples 3", "no data was named; give --data, a folder of real images"),
        ("{f}/text.safetensors --samples 1 --data {f}/data", "samples is 1"),
        ("{f}/text.safetensors --samples {f}/samples --data {f}/data", "give one of the two"),
        ("{f}/text.safetensors --samples 3 --data {f}/samples", "3 of 3 images of the data have no caption"),
        (
            "{f}/text.safetensors --samples 3 --data {f}/data --extractor {f}/free.safetensors",
            "a ViT or Swin classifier",
        ),
        (
            "{f}/free.safetensors --samples 3 --data {f}/data --extractor inception",
            "pip install torch-fidelity",
        ),
        ("{f}/free.safetensors --samples 3 --data {f}/data --sampler best", "no sampler is called 'best'"),
        ("{f}/free.safetensors --samples 3 --data {f}/data --num-steps 0", "num_steps is 0"),
        ("{f}/free.safetensors --samples 3 --data {f}/data --size 33x33", "must be multiples of 4"),
        ("{f}/free.safetensors --samples 3 --data {f}/data --classifier {m}", "leave --classifier out"),
        (
            "{f}/free.safetensors --samples 3 --data {f}/data --reference {m}",
            "not a file of reference statistics",
        ),
        ("--samples {f}/nowhere --data {f}/data", "neither a number nor a folder"),
        ("--samples {f}/samples", "no data was named"),
        ("--samples 30 --data {f}/data", "needs MODEL-or-RUN"),
        ("{m} --samples 30 --data {f}/data", "generates no images"),
    ],
)
def test_mistakes_are_one_line(places, model, args, words, capsys):
    assert words in refused(capsys, *args.format(f=places, m=model).split(), "--workers", 0)
