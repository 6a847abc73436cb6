"""Evaluation of generated images: requests, metrics and faithfulness."""

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
from triptych.errors import CheckpointError, ConfigError, DataError
from triptych.evaluation.feature_extractor import open_extractor
from triptych.evaluation.generation import GenerationRequest, evaluate_generation, make_requests
from triptych.evaluation.reconstruction import ReconstructionDistance
from triptych.evaluation.reference_statistics import load_or_measure_reference
from triptych.metrics.frechet_distance import Moments, frechet_distance
from triptych.metrics.generation import Statistics, compute_generation_metrics
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
def feature_net():
    """A small random network as feature extractor."""
    torch.manual_seed(0)
    tiny = {"depth": 1, "embed_dim": 12, "num_heads": 3, "mlp_ratio": 1.0, "patch_size": 8}
    net = tp.create("vit-ti16", **tiny, num_classes=3, image_size=16)
    net.card = ModelCard(preprocess=Preprocess(size=(16, 16), crop=1.0), classes=NAMES)
    return net


class Color(torch.nn.Module):
    """A perfect classifier of the color, blue, green or red, that an image has most of."""

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


# Requests


def test_captions_are_drawn_at_random_without_replacement_until_all_were():
    source = Subset(emoji("test"), range(10))
    requests = make_requests(TEXT, ModelCard(), source, 25, seed=3)
    assert [one.seed for one in requests] == list(range(3, 28))
    rows = [one.row for one in requests]
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))
    assert rows[:10] != rows[10:20] != list(range(10))
    assert all(one.prompt == source[one.row].caption for one in requests)
    assert make_requests(TEXT, ModelCard(), source, 7, seed=3) == requests[:7]
    assert [one.row for one in make_requests(TEXT, ModelCard(), source, 7, seed=4)] != rows[:7]
    assert make_requests(TEXT, ModelCard(), source, 2, seed=2**32 - 1)[1].seed == 0


def test_classes_are_drawn_from_the_data_by_name_or_are_equally_frequent(source):
    turned = ModelCard(classes=("red", "blue", "green"))
    requests = make_requests(CLASSES, turned, source, 42)
    assert {(source.classes[source.labels[one.row]], one.label) for one in requests} == {
        ("red", 0), ("blue", 1), ("green", 2)
    }  # fmt: skip
    for card, data in ((ModelCard(classes=("a", "b", "c")), source), (turned, None)):
        labels = [one.label for one in make_requests(CLASSES, card, data, 9)]
        assert [labels.count(i) for i in range(3)] == [3, 3, 3]
    assert make_requests(FREE, ModelCard(), source, 2) == [
        GenerationRequest(seed=0),
        GenerationRequest(seed=1),
    ]


def test_impossible_requests_are_refused(source):
    with pytest.raises(DataError, match="42 of 42 images of the data have no caption"):
        make_requests(TEXT, ModelCard(), source, 60)
    with pytest.raises(DataError, match="needs prompts"):
        make_requests(TEXT, ModelCard(), None, 5)
    with pytest.raises(ConfigError, match="needs image as condition"):
        make_requests(UPSCALER, ModelCard(), source, 5)
    with pytest.raises(ConfigError, match="samples is 1"):
        make_requests(FREE, ModelCard(), source, 1)


# Metrics


def test_metrics_are_those_of_the_features(source, feature_net, tmp_path):
    extractor = open_extractor(feature_net, image_size=(24, 24), device="cpu")
    images = [plain(name) for name in NAMES * 5]
    path = tmp_path / "r.safetensors"
    result = evaluate_generation(
        iter(images), extractor, source, reference_file=path, loading=LOADING, name="colors"
    )
    x = load_or_measure_reference(source, extractor, path, loading=LOADING).statistics
    y = extractor(extractor.prepare(images)).features
    expected = compute_generation_metrics(x, Statistics(Moments.of(y), y))
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert result.inception_score >= 1
    assert result.identity["data"]["name"] == "colors"
    # The file is enough, and the protocol is the same
    again = evaluate_generation(images, extractor, reference_file=path, loading=LOADING)
    assert again.to_json() == result.to_json()
    fewer = evaluate_generation(images[:-1], extractor, reference_file=path, loading=LOADING)
    assert fewer.protocol != result.protocol
    with pytest.raises(ConfigError, match="no real images"):
        evaluate_generation(images, extractor)
    other = open_extractor(feature_net, image_size=(20, 20), device="cpu")
    with pytest.raises(DataError, match=r"picture \[24, 24\], and \[20, 20\] is needed"):  # words: quoted
        evaluate_generation(images, other, reference_file=path)


def test_images_are_rounded_before_features_are_extracted(source, feature_net, tmp_path):
    """An array, an image and its PNG give the same features; so do grayscale and RGB."""
    extractor = open_extractor(feature_net, device="cpu")
    gray = np.random.default_rng(0).integers(0, 256, (6, 20, 20), dtype=np.uint8)
    color = [np.repeat(one[..., None], 3, 2) for one in gray]
    files = [tmp_path / f"{i}.png" for i in range(6)]
    for one, file in zip(color, files, strict=True):
        Image.fromarray(one).save(file)
    forms = (gray, color, map(Image.fromarray, color), files)
    distances = [evaluate_generation(images, extractor, source, loading=LOADING).frechet for images in forms]
    assert len(set(distances)) == 1


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Reconstructions


def test_distance_of_reconstructions(source, feature_net):
    """The distance is that of the images' files, and 0 for perfect reconstructions at any count."""
    extractor = open_extractor(feature_net, image_size=(20, 20), device="cpu")
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
        extractor(extractor.prepare(side)).features for side in (pixels.permute(0, 2, 3, 1).numpy(), files)
    ]
    result = worse.compute()
    assert result["frechet"] == pytest.approx(frechet_distance(*map(Moments.of, sides)), rel=1e-6)
    assert result["kernel"] == pytest.approx(kernel_distance(*sides), rel=1e-6)
    single = ReconstructionDistance(extractor)
    single.update(images[:1], images[:1])
    assert single.compute() == {}


# Faithfulness


def test_faithfulness_is_the_fraction_of_images_of_the_requested_class(source, feature_net):
    """Half of the images have the requested class, and 10 of 12 the requested warmth."""
    extractor = open_extractor(feature_net, device="cpu")
    rows = [int(np.flatnonzero(source.labels == i)[k]) for k in range(4) for i in range(3)]
    requests = [GenerationRequest(seed=k, row=row) for k, row in enumerate(rows)]
    images = [plain(name) for name in ("blue", "green", "red") * 2 + ("green", "blue", "blue") * 2]
    faithfulness = evaluate_generation(
        images, extractor, source, requests=requests, classifier=Color(), loading=LOADING
    ).faithfulness
    assert faithfulness["generated"] == pytest.approx({"top1": 0.5, "warmth": 10 / 12})
    assert faithfulness["real"] == {"top1": 1.0, "warmth": 1.0}


def test_the_shipped_classifier_recognizes_the_built_in_drawings():
    """If real drawings stand for generated ones, both values are equal, and near the metrics on the card."""
    source = Subset(emoji("test"), np.random.default_rng(0).choice(1032, 24, replace=False))
    net = tp.load("vit-emoji")
    requests = [GenerationRequest(seed=i, row=i) for i in range(24)]
    extractor = open_extractor(net, image_size=(64, 64), device="cpu")
    images = [source[i].image for i in range(24)]
    result = evaluate_generation(
        images, extractor, source, requests=requests, classifier=net, loading=LOADING
    )
    faithfulness = result.faithfulness
    assert faithfulness["generated"] == faithfulness["real"]
    assert faithfulness["real"].keys() == {"top1", "subgroup", "group"}
    assert faithfulness["real"]["top1"] == pytest.approx(net.card.figures["top1"], abs=0.25)
    assert result.frechet < 1e-6
    assert (result.precision, result.recall, result.coverage) == (1, 1, 1)


def test_a_classifier_without_the_classes_is_refused(source, feature_net):
    extractor = open_extractor(feature_net, device="cpu")
    classifier = Color()
    classifier.card = replace(Color.card, classes=("blue", "green", "pink"))
    with pytest.raises(CheckpointError, match=r"does not have 1 of the data's classes \(red\)"):
        evaluate_generation(
            [],
            extractor,
            source,
            requests=[GenerationRequest(seed=0, row=0)],
            classifier=classifier,
            loading=LOADING,
        )
    with pytest.raises(ConfigError, match="leave --classifier out"):
        evaluate_generation(
            [], extractor, source, requests=[GenerationRequest(seed=0)], classifier=Color(), loading=LOADING
        )
