"""Tiles cover everything, their weights sum to one, and local operations are unchanged."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from triptych.layers.tiling import blend_weights, run_in_tiles, tile_starts


@given(size=st.integers(1, 60), tile=st.integers(1, 20), data=st.data())
def test_tiles_cover_and_overlap(size, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    begins = tile_starts(size, tile, overlap)
    if size <= tile:
        assert begins == [0]
        return
    assert begins[0] == 0
    assert begins[-1] == size - tile
    assert all(0 < b - a <= tile - overlap for a, b in pairwise(begins))
    total = torch.zeros(size * 2)
    for begin, share in zip(begins, blend_weights(begins, size, tile, overlap // 4, 2), strict=True):
        assert share.min() >= 0
        total[begin * 2 : (begin + tile) * 2] += share
    torch.testing.assert_close(total, torch.ones(size * 2))


def test_weights_fall_linearly_and_leave_the_edges_out():
    first, second = blend_weights([0, 6], 16, 10, 1)
    assert first[:7].eq(1).all()
    torch.testing.assert_close(first[7:], torch.tensor([3, 1, 0]) / torch.tensor([4, 4, 1]))
    torch.testing.assert_close(second[:4] + first[6:], torch.ones(4))
    assert second[4:].eq(1).all()


@pytest.mark.parametrize(("stride", "cells"), [(1, (11, 5)), (4, (5, 13))])
def test_pointwise_operations_are_unchanged(stride, cells):
    x = torch.randn(2, 3, *(n * stride for n in cells))
    torch.testing.assert_close(run_in_tiles(lambda part: part * 2, x, 4, 1, stride, stride), x * 2)


def test_a_receptive_field_of_a_quarter_of_the_overlap_is_unchanged():
    x = torch.randn(1, 1, 40, 25)
    blur = torch.ones(1, 1, 5, 5) / 25

    def run(part):
        return F.conv2d(part, blur, padding=2)

    torch.testing.assert_close(run_in_tiles(run, x, 12, 8), run(x))
    assert not torch.allclose(run_in_tiles(run, x, 12, 4), run(x))
