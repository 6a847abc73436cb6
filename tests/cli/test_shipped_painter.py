"""The latent diffusion model that ships: what it paints is what was asked for, and the demo has three panels."""

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

ASKED = (
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


def test_what_was_asked_for_is_found_in_the_pictures(pipe):
    """Its card has 1,000 images' figures; here a few prompts stand far above chance, which is 1 in 65."""
    each = [GenerationRecord(prompt=f"{name}, noto style", seed=seed) for name in ASKED for seed in range(2)]
    images = pipe.generate(each, batch_size=len(each), progress=False)
    classify: Callable = tp.ClassificationPipeline("vit-emoji", device="cpu")
    net = tp.load("vit-emoji")
    kinds = dict(zip(net.card.classes, net.card.groupings["subgroup"], strict=True))
    found = [kinds[classify(image)[0].name] for image in images]
    wanted = [kinds[name] for name in ASKED for _ in range(2)]
    assert np.mean([a == b for a, b in zip(found, wanted, strict=True)]) >= 0.7


def test_its_card_and_files_are_as_small_as_said(pipe):
    assert isinstance(pipe.net, LatentDiffusion)
    files = list(hub.locate("ldm-emoji").iterdir())
    assert max(file.stat().st_size for file in files) <= 12_000_000
    assert sum(file.stat().st_size for file in files) <= 20_000_000
    figures = pipe.card.figures
    assert figures["subgroup"] >= 0.7 * figures["subgroup_real"]
    assert pipe.card.license
    (card,) = [file for file in files if file.name == "card.json"]
    assert json.loads(card.read_text())["card"]["figures"] == figures


def test_generate_takes_it_by_itself_and_again_from_its_picture(tmp_path, capsys):
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
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["see", "parse", "paint"]
    assert found["paint"] == list(PROMPTS)
    with Image.open(out) as whole:
        tall = whole.height
    assert main(["demo", "--out", str(out), "--generator", ""]) == 0
    with Image.open(out) as two:
        assert two.height < tall
