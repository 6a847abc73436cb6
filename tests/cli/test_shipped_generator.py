"""The shipped latent diffusion model: its images show what the prompts say, and the demo has three panels."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

import triptych as tp
from triptych.cli import main
from triptych.cli.demo import PROMPTS
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.weights import hub

CONCEPTS = (
    "red apple",
    "fox",
    "sailboat",
    "guitar",
    "grinning face",
    "hamburger",
    "rocket",
    "cactus",
    "owl",
    "pizza",
)


@pytest.fixture(scope="module")
def pipe() -> tp.DiffusionPipeline:
    return tp.DiffusionPipeline("ldm-emoji", device="cpu", dtype="fp32")


def test_a_classifier_finds_the_prompts_in_the_images(pipe):
    """The model card has the metrics of 1,000 images; a few prompts are far above chance, which is 1 in 65."""
    records = [
        GenerationRecord(prompt=f"{name}, noto style", seed=seed) for name in CONCEPTS for seed in range(2)
    ]
    images = pipe.generate(records, batch_size=len(records), progress=False)
    classify: Callable = tp.ClassificationPipeline("vit-emoji", device="cpu")
    net = tp.load("vit-emoji")
    subgroups = dict(zip(net.card.classes, net.card.groupings["subgroup"], strict=True))
    predicted = [subgroups[classify(image)[0].name] for image in images]
    expected = [subgroups[name] for name in CONCEPTS for _ in range(2)]
    assert np.mean([a == b for a, b in zip(predicted, expected, strict=True)]) >= 0.7


def test_its_card_and_the_size_of_its_files(pipe):
    assert isinstance(pipe.net, LatentDiffusion)
    files = list(hub.locate("ldm-emoji").iterdir())
    assert max(file.stat().st_size for file in files) <= 12_000_000
    assert sum(file.stat().st_size for file in files) <= 20_000_000
    figures = pipe.card.figures
    assert figures["subgroup"] >= 0.7 * figures["subgroup_real"]
    assert pipe.card.license
    (card,) = [file for file in files if file.name == "card.json"]
    assert json.loads(card.read_text())["card"]["figures"] == figures


def test_generate_uses_it_by_default_and_regenerates_from_the_file(tmp_path, capsys):
    assert (
        main(["generate", "a red apple, noto style", "--num-steps", "4", "--out", str(tmp_path / "a.png")])
        == 0
    )
    assert main(["generate", "--from", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]) == 0
    with Image.open(tmp_path / "a.png") as first, Image.open(tmp_path / "b.png") as second:
        assert np.array_equal(first, second)
        assert first.size == (64, 64)


def test_the_demo_has_three_panels(tmp_path, capsys):
    out = tmp_path / "triptych.png"
    assert main(["demo", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["see", "parse", "paint"]  # words: quoted
    assert result["paint"] == list(PROMPTS)  # words: quoted
    with Image.open(out) as three:
        height = three.height
    assert main(["demo", "--out", str(out), "--generator", ""]) == 0
    with Image.open(out) as two:
        assert two.height < height
