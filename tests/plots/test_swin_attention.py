"""Figures of windows and of the feature pyramid: complete at all sizes, with everything in its place."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from triptych.layers.window import shift_mask, window_sources
from triptych.plots import style
from triptych.plots.explanation import explanation_figures
from triptych.plots.swin_attention import gathered, on_pixels, point_attention
from triptych.plots.swin_partition import cyclic_shift, hierarchy, position_bias
from triptych.plots.swin_pyramid import feature_pyramid

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(style, "DPI", 60)


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


def arrays(depths, size, window_size=4, stride=4):
    """Return the arrays of a SwinExplanation of such a network."""
    result = {
        "image": make_image(*size),
        "point": np.array([size[1] / 2, 1], np.float32),
        "rollout": rng.random((-(-size[0] // stride), -(-size[1] // stride))),
        "strides": stride * 2 ** np.arange(len(depths)),
        "windows": np.repeat(window_size * stride * 2.0 ** np.arange(len(depths)), depths)[:, None].repeat(
            2, 1
        ),
        "share": np.full((len(depths), 3), 0.3),
        "filters": rng.normal(size=(4, 2, 2, 3)),
        "filter_share": np.full(4, 0.25),
    }
    result["shifts"] = result["windows"] / 2 * (np.arange(sum(depths)) % 2)[:, None]
    result["point_rollout"] = np.stack([result["rollout"]] * len(depths))
    for s, depth in enumerate(depths):
        cells = [-(-side // (stride * 2**s)) for side in size]
        result[f"attention_{s + 1}"] = rng.random((depth, 3, *cells))
        result[f"colors_{s + 1}"] = rng.random((*cells, 3))
        result[f"norms_{s + 1}"] = rng.random(cells) + 1
    return result


@pytest.mark.parametrize(
    ("depths", "size"), [((2, 2, 6, 2), (64, 64)), ((1,), (30, 90)), ((1, 1, 10), (90, 30))], ids=str
)
def test_figures_of_a_swin(tmp_path, depths, size):
    figures = explanation_figures(arrays(depths, size), "cat 90%", "mean of the last map")
    assert list(figures) == ["point", "rollout", "pyramid", "filters"]
    for figure in figures.values():
        drawn(figure, tmp_path)


def test_heat_is_at_the_cell_and_the_frame_around_the_window():
    """A block attends to one cell; the blue frame is the region that contains the point."""
    heat = np.zeros((1, 1, 8, 8), np.float32)
    heat[0, 0, 3, 2] = 1
    white = np.full((64, 64, 3), 255, np.uint8)
    figure = point_attention(
        white,
        [heat],
        np.array([[32.0, 32.0]]),
        np.array([[16.0, 16.0]]),
        np.array([8]),
        np.array([20.0, 20.0]),
    )
    (ax,) = figure.axes
    shown = ax.images[0].get_array().astype(int)
    redness = shown[..., 0] - shown[..., 2]
    y, x = np.argwhere(redness > 100).mean(0) / len(shown)
    assert (y, x) == pytest.approx((3.5 / 8, 2.5 / 8), abs=0.03)
    (frame,) = ax.patches
    side = len(shown)
    box = [frame.get_x() + 0.5, frame.get_y() + 0.5, frame.get_width(), frame.get_height()]
    assert np.array(box) / side == pytest.approx([0.25, 0.25, 0.5, 0.5])  # from 16 to 48 of 64 pixels
    lines = sorted(line.get_xdata()[0] / side for line in ax.lines if len(set(line.get_xdata())) == 1)
    assert [round(at, 2) for at in lines if at < 1][:2] == [0.25, 0.31]  # a border, and the point


def test_cells_are_squares_that_are_cropped_at_the_image():
    heat = np.arange(6.0).reshape(2, 3)
    shown = on_pixels(heat, (7, 10), 4)
    assert shown.shape == (7, 10)
    assert (shown[:4, :4] == 0).all()
    assert (shown[4:, 8:] == 5).all()


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [((8, 8), (4, 4), (2, 2)), ((6, 12), (3, 4), (1, 2)), ((4, 8), (4, 4), (0, 2)), ((7, 5), (4, 4), (2, 2))],
)
def test_cyclic_shift(tmp_path, size, window, shift):
    """Numbers follow the cyclic shift of the package, colors mark its regions, and the mask is dark for pairs of
    different colors."""
    rows, columns = (-(-side // w) for side, w in zip(size, window, strict=True))
    sources = window_sources(*size, rows, columns, window, shift).numpy()
    mask = shift_mask(rows, columns, window, shift, torch.device("cpu"), torch.float32)[:, 0].numpy()
    figure = cyclic_shift(size, window, shift, sources, mask)
    drawn(figure, tmp_path)
    map_, _, rolled, *masks = figure.axes
    assert [int(text.get_text()) for text in map_.texts] == list(range(size[0] * size[1]))
    padded = np.full((rows * window[0], columns * window[1]), -1)
    padded[: size[0], : size[1]] = np.arange(size[0] * size[1]).reshape(size)
    padded = np.roll(padded, (-shift[0], -shift[1]), (0, 1))
    assert [int(text.get_text()) for text in rolled.texts] == padded[padded >= 0].tolist()
    tints = rolled.images[0].get_array()
    for n, ax in enumerate(masks):
        r, c = divmod(n, columns)
        part = np.s_[r * window[0] : (r + 1) * window[0], c * window[1] : (c + 1) * window[1]]
        color, real = tints[part].reshape(-1, 3), padded[part].ravel() >= 0
        apart = (color[:, None] != color[None]).any(-1)
        dark = np.isclose(ax.images[0].get_array(), to_rgb(style.SOFT)).all(-1)
        assert (dark == apart)[real][:, real].all()  # padding is paler than the cells of its region


def test_hierarchy_and_bias(tmp_path):
    drawn(hierarchy(make_image(64, 64), (4, 8), (40, 80), ((4, 4), (8, 8))), tmp_path)
    drawn(hierarchy(make_image(50, 90), (4,), (40,), ((7, 5),)), tmp_path)
    drawn(position_bias([rng.normal(size=(heads, 7, 7)) for heads in (1, 2, 32)]), tmp_path)
    drawn(position_bias([np.zeros((1, 1, 1))]), tmp_path)


def test_pyramid_and_rollout_of_one_cell(tmp_path):
    one = np.ones((1, 1))
    drawn(
        feature_pyramid(make_image(), [np.ones((1, 1, 3))], [one], np.ones((1, 3)), np.array([64])), tmp_path
    )
    drawn(gathered(make_image(), one, one[None], np.array([0.0, 0.0]), "mean"), tmp_path)
