"""The denoising strip: each frame once, in its aspect ratio, in rows of limited length."""

import numpy as np
import pytest

from triptych.plots.denoising_strip import denoising_strip


def frames(count, height=20, width=30, channels=3):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, channels), dtype=np.uint8) for _ in range(count)]


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (8, 1), (9, 2)])
def test_every_frame_and_its_label(count, rows):
    labels = [f"step {i}" for i in range(count)]
    page = denoising_strip(frames(count), labels, below="a $5 red apple")
    assert len(page.axes) == count
    assert len({round(ax.get_position().y0, 4) for ax in page.axes}) == rows
    words = [text.get_text() for text in page.texts]
    assert words == ["Denoising", r"a \$5 red apple", *labels]
    for ax in page.axes:
        box = ax.get_window_extent()
        assert box.width / box.height == pytest.approx(1.5, rel=0.01)
        assert 0 <= box.x0 < box.x1 <= page.bbox.width
        assert 0 <= box.y0 < box.y1 <= page.bbox.height


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 64), (64, 8)])
def test_any_aspect_is_drawn(height, width):
    page = denoising_strip(frames(5, height, width), list("abcde"))
    page.canvas.draw()
    sides = page.get_size_inches()
    assert max(sides) < 30
