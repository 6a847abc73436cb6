"""What is painted for a measurement, the figures of it, and whether pictures show what they were to show."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import triptych as tp
from triptych.data.builtin.emoji import emoji
from triptych.data.config import DataConfig
from triptych.data.open import open_source
from triptych.data.source import Subset
from triptych.errors import UserError
from triptych.evaluation.feature_extractor import open_extractor
from triptych.evaluation.generation import Asked, ask, evaluate_generation
from triptych.evaluation.reconstruction import ReconstructionDistance
from triptych.evaluation.reference_statistics import reference
from triptych.metrics.frechet_distance import Moments, frechet_distance
from triptych.metrics.generation import Statistics, generation_figures
from triptych.metrics.kernel_distance import kernel_distance
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.autoencoder import AutoencoderConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.models.configs.unet import UNetConfig

LOADING = DataConfig(workers=0, eval_batch_size=6)
NAMES = ("blue", "green", "red")
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
TEXT = LatentDiffusionConfig(
    autoencoder=STAGE,
    network=replace(UNET, context_dim=24),
    text_encoder=TextConfig(
        type="clip", vocab_size=49408, embed_dim=24, depth=1, num_heads=2, mlp_ratio=1.0, pad_token=49407
    ),
)
CLASSES = replace(TEXT, text_encoder=ClassTokenConfig(num_classes=3, embed_dim=24))
UPSCALER = LatentDiffusionConfig(
    autoencoder=STAGE, network=replace(UNET, context_dim=0, in_channels=7), concat="image"
)
FREE = LatentDiffusionConfig(autoencoder=STAGE, network=replace(UNET, context_dim=0))


@pytest.fixture(scope="module")
def eye():
    """Sees the mean color, and little else."""
    torch.manual_seed(0)
    tiny = {"depth": 1, "embed_dim": 12, "num_heads": 3, "mlp_ratio": 1.0, "patch_size": 8}
    net = tp.create("vit-ti16", **tiny, num_classes=3, image_size=16)
    net.card = ModelCard(preprocess=Preprocess(size=(16, 16), crop=1.0), classes=NAMES)
    return net


class Color(torch.nn.Module):
    """A classifier that is right: which of blue, green, red is most of a picture."""

    config = type("Config", (), {"num_classes": 3, "in_channels": 3})()
    card = ModelCard(
        preprocess=Preprocess(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1)),
        classes=NAMES,
        groupings={"warmth": ("cold", "cold", "warm")},
    )

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(50.0))

    def forward(self, images):
        return images.mean((2, 3)).flip(1) * self.scale


@pytest.fixture
def source(color_images):
    return open_source(str(color_images))


def plain(color):
    return Image.new("RGB", (20, 20), {"blue": "#2030d0", "green": "#20c030", "red": "#d02020"}[color])


# What is asked for


def test_captions_come_in_a_random_order_each_once_before_any_again():
    source = Subset(emoji("test"), range(10))
    asked = ask(TEXT, ModelCard(), source, 25, seed=3)
    assert [one.seed for one in asked] == list(range(3, 28))
    rows = [one.row for one in asked]
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))
    assert rows[:10] != rows[10:20] != list(range(10))
    assert all(one.prompt == source[one.row].caption for one in asked)
    assert ask(TEXT, ModelCard(), source, 7, seed=3) == asked[:7]
    assert [one.row for one in ask(TEXT, ModelCard(), source, 7, seed=4)] != rows[:7]
    assert ask(TEXT, ModelCard(), source, 2, seed=2**32 - 1)[1].seed == 0


def test_classes_are_those_of_the_data_by_name_or_all_equally_often(source):
    turned = ModelCard(classes=("red", "blue", "green"))
    asked = ask(CLASSES, turned, source, 42)
    assert {(source.classes[source.labels[one.row]], one.label) for one in asked} == {
        ("red", 0), ("blue", 1), ("green", 2)
    }  # fmt: skip
    for card, data in ((ModelCard(classes=("a", "b", "c")), source), (turned, None)):
        labels = [one.label for one in ask(CLASSES, card, data, 9)]
        assert [labels.count(i) for i in range(3)] == [3, 3, 3]
    assert ask(FREE, ModelCard(), source, 2) == [Asked(seed=0), Asked(seed=1)]


def test_what_cannot_be_asked_is_said(source):
    with pytest.raises(UserError, match="42 of 42 images of the data have no caption"):
        ask(TEXT, ModelCard(), source, 60)
    with pytest.raises(UserError, match="reads prompts"):
        ask(TEXT, ModelCard(), None, 5)
    with pytest.raises(UserError, match="is shown image besides"):
        ask(UPSCALER, ModelCard(), source, 5)
    with pytest.raises(UserError, match="samples is 1"):
        ask(FREE, ModelCard(), source, 1)


# The figures


def test_figures_are_those_of_the_features(source, eye, tmp_path):
    extractor = open_extractor(eye, picture=(24, 24), device="cpu")
    made = [plain(name) for name in NAMES * 5]
    path = tmp_path / "r.safetensors"
    found = evaluate_generation(
        iter(made), extractor, source, reference_file=path, loading=LOADING, name="colors"
    )
    x = reference(source, extractor, path, loading=LOADING).statistics
    y = extractor(extractor.fitted(made)).features
    known = generation_figures(x, Statistics(Moments.of(y), y))
    for name, value in known.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert found.inception_score >= 1
    assert found.identity["data"]["name"] == "colors"
    # The file alone is enough, and the same figures are of the same protocol
    again = evaluate_generation(made, extractor, reference_file=path, loading=LOADING)
    assert again.to_json() == found.to_json()
    fewer = evaluate_generation(made[:-1], extractor, reference_file=path, loading=LOADING)
    assert fewer.protocol != found.protocol
    with pytest.raises(UserError, match="no real pictures"):
        evaluate_generation(made, extractor)
    other = open_extractor(eye, picture=(20, 20), device="cpu")
    with pytest.raises(UserError, match=r"picture \[24, 24\], and this is \[20, 20\]"):
        evaluate_generation(made, other, reference_file=path)


def test_pictures_are_rounded_before_they_are_measured(source, eye, tmp_path):
    """An array, an image and a PNG of it are one picture; so are grey and RGB."""
    extractor = open_extractor(eye, device="cpu")
    grey = np.random.default_rng(0).integers(0, 256, (6, 20, 20), dtype=np.uint8)
    color = [np.repeat(one[..., None], 3, 2) for one in grey]
    files = [tmp_path / f"{i}.png" for i in range(6)]
    for one, file in zip(color, files, strict=True):
        Image.fromarray(one).save(file)
    kinds = (grey, color, map(Image.fromarray, color), files)
    found = [evaluate_generation(kind, extractor, source, loading=LOADING).frechet for kind in kinds]
    assert len(set(found)) == 1


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Reconstructions


def test_distance_of_reconstructions(source, eye):
    """What the pictures' files would be measured at; nothing of perfect ones, however few."""
    extractor = open_extractor(eye, picture=(20, 20), device="cpu")
    pixels = torch.randint(256, (7, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = pixels / 127.5 - 1
    perfect = ReconstructionDistance(extractor)
    perfect.update(images[:4], images[:4])
    perfect.update(images[4:], images[4:] + 0.4 / 127.5)  # the same after rounding
    assert perfect.compute()["frechet"] < 1e-9
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    worse = ReconstructionDistance(extractor)
    worse.update(images, blurred * 1.37)
    files = ((blurred * 1.37).clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    sides = [
        extractor(extractor.fitted(side)).features for side in (pixels.permute(0, 2, 3, 1).numpy(), files)
    ]
    found = worse.compute()
    assert found["frechet"] == pytest.approx(frechet_distance(*map(Moments.of, sides)), rel=1e-6)
    assert found["kernel"] == pytest.approx(kernel_distance(*sides), rel=1e-6)
    one = ReconstructionDistance(extractor)
    one.update(images[:1], images[:1])
    assert one.compute() == {}


# Faithfulness


def test_a_classifier_finds_what_pictures_were_to_show(source, eye):
    """Two of three pictures are right, and one of the wrong ones is of the right warmth."""
    extractor = open_extractor(eye, device="cpu")
    rows = [int(np.flatnonzero(source.labels == i)[k]) for k in range(4) for i in range(3)]
    asked = [Asked(seed=k, row=row) for k, row in enumerate(rows)]
    painted = [plain(name) for name in ("blue", "green", "red") * 2 + ("green", "blue", "blue") * 2]
    found = evaluate_generation(
        painted, extractor, source, asked=asked, classifier=Color(), loading=LOADING
    ).faithfulness
    assert found["generated"] == pytest.approx({"top1": 0.5, "warmth": 10 / 12})
    assert found["real"] == {"top1": 1.0, "warmth": 1.0}


def test_the_shipped_classifier_reads_the_built_in_drawings():
    """Of real drawings in place of generated ones both figures are the same, and what its card promises."""
    source = Subset(emoji("test"), np.random.default_rng(0).choice(1032, 24, replace=False))
    net = tp.load("vit-emoji")
    asked = [Asked(seed=i, row=i) for i in range(24)]
    extractor = open_extractor(net, picture=(64, 64), device="cpu")
    pictures = [source[i].image for i in range(24)]
    found = evaluate_generation(pictures, extractor, source, asked=asked, classifier=net, loading=LOADING)
    figures = found.faithfulness
    assert figures["generated"] == figures["real"]
    assert figures["real"].keys() == {"top1", "subgroup", "group"}
    assert figures["real"]["top1"] == pytest.approx(net.card.figures["top1"], abs=0.25)
    assert found.frechet < 1e-6
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)


def test_a_classifier_that_does_not_know_the_classes_is_refused(source, eye):
    extractor = open_extractor(eye, device="cpu")
    stranger = Color()
    stranger.card = replace(Color.card, classes=("blue", "green", "pink"))
    with pytest.raises(UserError, match=r"does not know 1 of the data's classes \(red\)"):
        evaluate_generation(
            [], extractor, source, asked=[Asked(seed=0, row=0)], classifier=stranger, loading=LOADING
        )
    with pytest.raises(UserError, match="leave --classifier out"):
        evaluate_generation([], extractor, source, asked=[Asked(seed=0)], classifier=Color(), loading=LOADING)
