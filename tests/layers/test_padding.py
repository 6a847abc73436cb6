"""Zeros at the right and the bottom up to a whole number of patches or windows, and no copy where none are needed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triptych.layers.padding import pad_to_multiple

SIDE = st.integers(1, 20)


@given(h=SIDE, w=SIDE, multiple=st.tuples(st.integers(1, 7), st.integers(1, 7)), last=st.booleans())
def test_zeros_come_after_the_end(h, w, multiple, last):
    """The middle axes of a channels-last map are padded, or the last axes of an image."""
    axes = (2, 3) if last else (1, 2)
    x = torch.rand(2, 3, h, w) + 1 if last else torch.rand(2, h, w, 3) + 1
    padded = pad_to_multiple(x, multiple, axes)
    for axis, side, before in zip(axes, multiple, (h, w), strict=True):
        assert padded.shape[axis] % side == 0
        assert 0 <= padded.shape[axis] - before < side
    assert torch.equal(padded.narrow(axes[0], 0, h).narrow(axes[1], 0, w), x)
    assert padded.count_nonzero() == x.numel()


@pytest.mark.parametrize("multiple", [(1, 1), (2, 3), (4, 6)])
def test_nothing_is_copied_where_all_is_whole(multiple):
    x = torch.rand(1, 4, 6, 3)
    assert pad_to_multiple(x, multiple, (1, 2)) is x


def test_each_axis_has_its_own_multiple():
    x = torch.ones(1, 5, 5, 1)
    assert pad_to_multiple(x, (3, 4), (1, 2)).shape == (1, 6, 8, 1)
    assert pad_to_multiple(x, (5, 7), (1, 2)).shape == (1, 5, 7, 1)
    assert pad_to_multiple(x, (7, 5), (1, 2)).shape == (1, 7, 5, 1)
    assert pad_to_multiple(x, (9, 1), (1, 2)).shape == (1, 9, 5, 1)


def test_gradients_of_what_was_there():
    x = torch.rand(1, 5, 7, 2, requires_grad=True)
    pad_to_multiple(x, (4, 4), (1, 2)).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8])
def test_dtypes_stay(dtype):
    assert pad_to_multiple(torch.ones(1, 1, 3, 3, dtype=dtype), (2, 2), (2, 3)).dtype == dtype


def test_sides_that_export_left_open():
    """When traced, a gather appends the zeros without a branch on the size: one program for all sizes."""

    class Pad(torch.nn.Module):
        def forward(self, x):
            return pad_to_multiple(x, (3, 4), (1, 2))

    open_sides = {1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    program = torch.export.export(Pad(), (torch.rand(1, 6, 8, 2),), dynamic_shapes=(open_sides,)).module()
    for size in ((6, 8), (7, 8), (5, 11), (2, 2), (12, 13)):
        x = torch.rand(1, *size, 2)
        assert torch.equal(program(x), pad_to_multiple(x, (3, 4), (1, 2)))
