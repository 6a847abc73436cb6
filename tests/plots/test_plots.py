"""Figures of all supported sizes fit on their page, and do not change matplotlib's global state."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from triptych.errors import StorageError
from triptych.plots import style
from triptych.plots.attention import (
    attention_distance,
    attention_heads,
    distance_of_even_attention,
    rollout_overlay,
)
from triptych.plots.confusion import confusion
from triptych.plots.demo_sheet import ClassifiedCard, ClassifyPanel, demo_sheet
from triptych.plots.embedding import patch_filters, position_similarity
from triptych.plots.explanation import explanation_figures

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Draw a quarter of the pixels, since the tests check positions only."""
    monkeypatch.setattr(style, "DPI", 80)


def make_image(height=48, width=64):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def drawn(figure, folder):
    """Return the pixels of a figure, after checking that it is not empty and that nothing is cut off at its edge."""
    style.save(figure, folder / "figure.png")
    with Image.open(folder / "figure.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.std() > 5
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all(), "something touches the edge"
    return pixels


@pytest.mark.parametrize(
    ("blocks", "heads", "h", "w"), [(1, 1, 2, 2), (12, 3, 14, 14), (2, 16, 4, 9), (24, 1, 7, 3)]
)
def test_heads(tmp_path, blocks, heads, h, w):
    drawn(
        attention_heads(make_image(), rng.random((blocks, heads, h, w)).astype(np.float32), "class token"),
        tmp_path,
    )


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (1, 1), (600, 40)])
def test_rollout(tmp_path, size):
    drawn(
        rollout_overlay(make_image(*size), rng.random((6, 8)).astype(np.float32), below="cat 0.9"), tmp_path
    )


def test_overlay_is_red_where_the_heat_is():
    heat = np.zeros((8, 8), np.float32)
    heat[1, 6] = 1
    gray = np.full((64, 64, 3), 128, np.uint8)
    shown = style.overlay(gray, heat).astype(int)
    redness = shown[..., 0] - shown[..., 2]
    y, x = np.unravel_index(redness.argmax(), redness.shape)
    assert abs(y / len(shown) - 1.5 / 8) < 0.1
    assert abs(x / len(shown) - 6.5 / 8) < 0.1
    assert redness[len(shown) // 2 :].max() == 0


def test_overlay_of_uniform_heat_is_the_gray_image():
    shown = style.overlay(make_image(), np.ones((4, 4), np.float32))
    assert (shown[..., 0] == shown[..., 2]).all()


@pytest.mark.parametrize("blocks", [1, 12, 40])
def test_distances(tmp_path, blocks):
    drawn(
        attention_distance(rng.random((blocks, 6)).astype(np.float32) * 100, (224, 224), (14, 14)), tmp_path
    )


def test_uniform_attention_has_the_mean_distance_in_a_square():
    """The mean distance of two random points of a unit square is (2 + sqrt 2 + 5 ln(1 + sqrt 2)) / 15."""
    known = (2 + 2**0.5 + 5 * np.log(1 + 2**0.5)) / 15
    assert distance_of_even_attention((100, 100), (80, 80)) == pytest.approx(100 * known, rel=2e-3)


def test_uniform_attention_equals_the_mean_over_all_pairs():
    places = [(16 * y, 8 * x) for y in range(3) for x in range(5)]
    slow = np.mean([[np.hypot(a - c, b - d) for c, d in places] for a, b in places])
    assert distance_of_even_attention((48, 40), (3, 5)) == pytest.approx(slow)


@pytest.mark.parametrize("shape", [(28, 16, 16, 3), (3, 1, 1, 3), (5, 7, 7, 1)])
def test_filters(tmp_path, shape):
    share = np.full(len(shape) and shape[0], 1 / shape[0], np.float32)
    drawn(patch_filters(rng.normal(size=shape).astype(np.float32), share), tmp_path)


@pytest.mark.parametrize("grid", [(1, 1), (4, 9), (14, 14)])
def test_positions(tmp_path, grid):
    drawn(position_similarity(rng.uniform(-1, 1, (*grid, *grid)).astype(np.float32)), tmp_path)


@pytest.mark.parametrize(
    ("classes", "grouped"),
    [(1, False), (2, True), (16, False), (17, False), (80, False), (81, True), (1000, True), (1000, False)],
)
def test_confusion(tmp_path, classes, grouped):
    matrix = np.diag(rng.integers(1, 9, classes)) + (rng.random((classes, classes)) < 2 / classes)
    names = [f"a class with a $long$ name {i}" for i in range(classes)]
    groups = [f"group {i % 3}" for i in range(classes)] if grouped else None
    drawn(confusion(matrix.astype(np.int64), names, groups), tmp_path)


def test_confusion_of_classes_without_examples(tmp_path):
    matrix = np.zeros((3, 3), np.int64)
    matrix[0, 1] = 2
    drawn(confusion(matrix), tmp_path)


def test_sheet(tmp_path):
    guesses = [("a very long name that will not fit into its column", 0.5), ("b", 0.3), ("c", 0.001)]
    cards = [
        ClassifiedCard(
            image=make_image(40, 40 + 10 * i), rollout=rng.random((4, 4)), guesses=guesses, truth="b"
        )
        for i in range(3)
    ]
    two = [ClassifyPanel(cards=cards), ClassifyPanel(cards=cards[:1], title="Again")]
    one = drawn(demo_sheet(two[:1], below="three images"), tmp_path)
    assert len(drawn(demo_sheet(two, below="three images"), tmp_path)) > len(one)


def test_explanation_figures_by_name():
    arrays = {
        "image": make_image(),
        "rollout": rng.random((3, 4)),
        "heads": rng.random((3, 2, 3, 4)),
        "distances": rng.random((2, 2)),
        "filters": rng.normal(size=(4, 2, 2, 3)),
        "filter_share": np.full(4, 0.25),
    }
    assert set(explanation_figures(arrays)) == {"rollout", "heads", "distances", "filters"}
    arrays["positions"] = rng.random((3, 4, 3, 4))
    assert "positions" in explanation_figures(arrays)


def test_a_path_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        style.save(style.figure(1, 1), tmp_path / "file" / "x.png")


def test_global_state_is_unchanged(tmp_path):
    before = dict(matplotlib.rcParams)
    drawn(rollout_overlay(make_image(), rng.random((6, 8))), tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported():
    code = (
        "import sys; from triptych.plots import attention, confusion, curves, embedding, explanation, demo_sheet;"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
