"""Figures of an image with its segmentation and legend, and the segmentation panel of the demo, for all shapes."""

import numpy as np
import pytest
from PIL import Image

from triptych.plots import style
from triptych.plots.demo_samples import GeneratedCard, GeneratePanel
from triptych.plots.demo_sheet import (
    AttentionCard,
    ClassifiedCard,
    ClassifyPanel,
    SegmentedCard,
    SegmentPanel,
    demo_sheet,
)
from triptych.plots.segmentation import MOST, Entry, parse_figure, percent

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Draw a quarter of the pixels, since the tests check positions only."""
    monkeypatch.setattr(style, "DPI", 80)


def make_image(height=48, width=64):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def drawn(figure, folder):
    """Return the pixels of a figure, after checking that nothing is cut off at its edge."""
    style.save(figure, folder / "figure.png")
    with Image.open(folder / "figure.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all(), "something touches the edge"
    return pixels


def entries(count):
    return [
        Entry(f"class {'of a long name ' * (i % 3)}{i}", tuple(rng.integers(0, 256, 3).tolist()), 1 / count)
        for i in range(count)
    ]


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (1, 1), (600, 40), (30, 900)])
@pytest.mark.parametrize("count", [1, 7])
def test_images_of_all_shapes(tmp_path, size, count):
    image = make_image(*size)
    assert drawn(parse_figure(image, image, entries(count), "an image.png"), tmp_path).std() > 5


@pytest.mark.parametrize("count", [MOST, MOST + 1, 150])
def test_many_classes(tmp_path, count):
    drawn(parse_figure(make_image(), make_image(), entries(count), "a/very/long/path" * 9 + ".png"), tmp_path)


def test_the_legend_has_each_color(tmp_path):
    shades = [(200, 30, 40), (20, 160, 90), (30, 60, 220)]
    named = [Entry(f"$x_{i}$", shade, 0.3) for i, shade in enumerate(shades)]
    white = np.full((40, 40, 3), 255, np.uint8)
    pixels = drawn(parse_figure(white, white, named), tmp_path)
    for shade in shades:
        assert (np.abs(pixels.astype(int) - shade).sum(-1) < 12).sum() > 40


def test_fractions_are_rounded_percentages():
    assert [percent(share) for share in (1, 0.341, 0.0346, 0.001, 0.0002)] == [
        "100%",
        "34%",
        "3.5%",
        "0.1%",
        "<0.1%",
    ]


def panel(blocks=8, size=(64, 64), cards=2):
    attention_cards = [
        AttentionCard(
            words=f"{'SW' if i % 2 else 'W'}-MSA, stage {i // 2 + 1}, 8 × 8 cells",
            heat=rng.random((8, 8)).astype(np.float32),
            stride=8,
            window=np.array([32.0, 32.0]),
            shift=np.array([16.0, 16.0]) * (i % 2),
        )
        for i in range(blocks)
    ]
    images = [
        SegmentedCard(image=make_image(*size), overlay=make_image(*size), words="mIoU 0.81")
        for _ in range(cards)
    ]
    legend = [(entry.name, entry.color, "0.71") for entry in entries(7)]
    image = make_image(64, 64) if blocks else None
    return SegmentPanel(
        cards=images, legend=legend, attention_cards=attention_cards, image=image, point=(40.0, 20.0)
    )


@pytest.mark.parametrize("blocks", [0, 1, 8, 12])
def test_the_panel(tmp_path, blocks):
    drawn(demo_sheet([panel(blocks)]), tmp_path)


def test_the_sheet_stacks_both_panels(tmp_path):
    card = ClassifiedCard(
        image=make_image(), rollout=rng.random((6, 8)).astype(np.float32), guesses=[("cat", 0.9)]
    )
    both = drawn(
        demo_sheet([ClassifyPanel(cards=[card] * 4), panel(size=(128, 128))], below="words"), tmp_path
    )
    alone = drawn(demo_sheet([ClassifyPanel(cards=[card] * 4)], below="words"), tmp_path)
    assert len(both) > len(alone) + 300


@pytest.mark.parametrize(("cards", "frames"), [(1, 0), (8, 8), (11, 3)])
def test_the_panel_of_generated_images(tmp_path, cards, frames):
    generated = [
        GeneratedCard(image=make_image(64, 64), words=f"an image {'of a long prompt ' * i}")
        for i in range(cards)
    ]
    steps = [make_image(64, 64) for _ in range(frames)]
    labels = [f"step {i}, noise {i * 0.01:.3g}" for i in range(frames)]
    drawn(demo_sheet([GeneratePanel(cards=generated, frames=steps, labels=labels)]), tmp_path)
