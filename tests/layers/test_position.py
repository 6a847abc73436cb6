"""Position tables resampled to other grids, the fixed table and rotary angles, each against its definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from triptych.layers.position import RotaryPositions, resample_positions, sincos_positions

SIDE = st.integers(1, 12)


def table_of(grid, values):
    """Return a table (1, h w, 2) whose entry at row y, column x is `values(y, x)` and its negative."""
    entries = [values(y, x) for y in range(grid[0]) for x in range(grid[1])]
    return torch.tensor([[entry, -entry] for entry in entries], dtype=torch.float32)[None]


def slow_weights(old, new):
    """Return the weight of each old cell in each new one: Keys' cubic (a = -1/2), widened when the grid shrinks."""
    scale = max(old / new, 1.0)
    weights = np.zeros((new, old))
    for i in range(new):
        for j in range(old):
            t = abs((j + 0.5) - (i + 0.5) * old / new) / scale
            if t < 1:
                weights[i, j] = 1.5 * t**3 - 2.5 * t**2 + 1
            elif t < 2:
                weights[i, j] = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return weights / weights.sum(1, keepdims=True)


@given(h=SIDE, w=SIDE, new_h=SIDE, new_w=SIDE, dim=st.integers(2, 4))
@example(h=5, w=2, new_h=7, new_w=1, dim=3)  # one column: PyTorch 2.13 is wrong for some layouts in memory
def test_resampling_is_antialiased_bicubic(h, w, new_h, new_w, dim):
    table = torch.randn(1, h * w + 1, dim)
    moved = resample_positions(table, (h, w), (new_h, new_w), 1)
    grid = table[0, 1:].view(h, w, dim).double().numpy()
    wanted = np.einsum("yh,xw,hwd->yxd", slow_weights(h, new_h), slow_weights(w, new_w), grid)
    np.testing.assert_allclose(moved[0, 1:].view(new_h, new_w, dim).numpy(), wanted, atol=1e-4)


@given(h=SIDE, w=SIDE, prefix=st.integers(0, 3))
def test_the_same_grid_returns_the_table_itself(h, w, prefix):
    table = torch.randn(1, h * w + prefix, 4)
    assert resample_positions(table, (h, w), (h, w), prefix) is table


@given(h=SIDE, w=SIDE, new_h=SIDE, new_w=SIDE, prefix=st.integers(0, 3))
def test_the_prefix_is_kept_and_sizes_are_right(h, w, new_h, new_w, prefix):
    table = torch.randn(1, h * w + prefix, 4)
    moved = resample_positions(table, (h, w), (new_h, new_w), prefix)
    assert moved.shape == (1, new_h * new_w + prefix, 4)
    assert torch.equal(moved[:, :prefix], table[:, :prefix])


@given(h=SIDE, w=SIDE, new_h=SIDE, new_w=SIDE)
def test_rows_stay_rows_and_columns_columns(h, w, new_h, new_w):
    profile = torch.randn(max(h, w)).tolist()
    by_row = resample_positions(table_of((h, w), lambda y, x: profile[y]), (h, w), (new_h, new_w))
    by_column = resample_positions(table_of((h, w), lambda y, x: profile[x]), (h, w), (new_h, new_w))
    by_row, by_column = by_row.view(new_h, new_w, 2), by_column.view(new_h, new_w, 2)
    torch.testing.assert_close(by_row, by_row[:, :1].expand(-1, new_w, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_column, by_column[:1].expand(new_h, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("old", "new"), [((14, 20), (28, 40)), ((20, 14), (20, 33)), ((9, 6), (31, 7))])
def test_a_linear_table_stays_linear(old, new):
    moved = resample_positions(table_of(old, lambda y, x: 10 * y + x), old, new).view(*new, 2)[..., 0]
    # A patch's center in units of the old grid, without the outermost cells, which use repeated edges.
    y, x = ((torch.arange(n) + 0.5) * o / n - 0.5 for n, o in zip(new, old, strict=True))
    inner_y, inner_x = ((c >= 1.5) & (c <= o - 2.5) for c, o in zip((y, x), old, strict=True))
    wanted = 10 * y[:, None] + x[None]
    torch.testing.assert_close(moved[inner_y][:, inner_x], wanted[inner_y][:, inner_x], atol=1e-3, rtol=0)


@given(h=SIDE, w=SIDE, new_h=SIDE, new_w=SIDE)
def test_a_transposed_table_gives_a_transposed_table(h, w, new_h, new_w):
    table = torch.randn(1, h, w, 3)
    moved = resample_positions(table.reshape(1, h * w, 3), (h, w), (new_h, new_w))
    turned = resample_positions(table.transpose(1, 2).reshape(1, h * w, 3), (w, h), (new_w, new_h))
    torch.testing.assert_close(
        turned.view(new_w, new_h, 3).transpose(0, 1), moved.view(new_h, new_w, 3), atol=1e-5, rtol=1e-5
    )


def test_a_smaller_grid_averages_instead_of_skipping():
    board = table_of(
        (16, 16), lambda y, x: (-1.0) ** (y + x)
    )  # the finest pattern, which must fade and not alias
    assert resample_positions(board, (16, 16), (5, 5)).abs().max() < 0.1


def test_half_precision_tables_stay_what_they_are():
    moved = resample_positions(torch.randn(1, 5, 4, dtype=torch.bfloat16), (2, 2), (3, 5), 1)
    assert moved.dtype == torch.bfloat16
    assert moved.shape == (1, 16, 4)


def test_gradients_reach_the_table():
    table = torch.zeros(1, 5, 2, requires_grad=True)
    resample_positions(table, (2, 2), (3, 3), 1).sum().backward()
    torch.testing.assert_close(table.grad.sum(), torch.tensor(20.0))


@pytest.mark.parametrize(("h", "w", "dim"), [(1, 1, 4), (3, 5, 8), (4, 2, 20)])
def test_sincos_is_the_formula(h, w, dim):
    table = sincos_positions((h, w), dim)
    quarter = dim // 4
    for y in range(h):
        for x in range(w):
            omega = [10_000.0 ** -(i / max(quarter - 1, 1)) for i in range(quarter)]
            wanted = [
                f(c * o)
                for c, f in ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos))
                for o in omega
            ]
            torch.testing.assert_close(table[0, y * w + x], torch.tensor(wanted), atol=1e-5, rtol=0)


@given(h=SIDE, w=SIDE, prefix=st.integers(0, 5))
def test_rotation_keeps_lengths_and_leaves_the_prefix(h, w, prefix):
    rotary = RotaryPositions(8)
    x = torch.randn(2, 3, h * w + prefix, 8)
    turned = rotary(x, rotary.angles((h, w), x.device))
    assert torch.equal(turned[..., :prefix, :], x[..., :prefix, :])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("h", "w"), [(1, 6), (3, 3), (4, 6), (5, 2)])
def test_scores_depend_on_the_way_from_patch_to_patch_alone(h, w):
    rotary = RotaryPositions(16)
    q, k = torch.randn(16), torch.randn(16)
    angles = rotary.angles((h, w), torch.device("cpu"))
    turned_q = rotary(q.expand(1, 1, h * w, 16), angles)[0, 0]
    turned_k = rotary(k.expand(1, 1, h * w, 16), angles)[0, 0]
    scores = (turned_q @ turned_k.T).view(h, w, h, w)
    for dy in range(h):
        for dx in range(w):
            same = torch.stack([scores[y, x, y + dy, x + dx] for y in range(h - dy) for x in range(w - dx)])
            torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-4, rtol=0)


def test_rotary_is_a_rotation_of_complex_numbers():
    rotary, (h, w), d = RotaryPositions(12, base=100.0), (3, 5), 12
    x = torch.randn(1, 1, h * w, d)
    turned = rotary(x, rotary.angles((h, w), x.device))
    periods = [100.0 ** (4 * i / d) for i in range(d // 4)]
    for row in range(h):
        for column in range(w):
            center = (2 * (row + 0.5) / h - 1, 2 * (column + 0.5) / w - 1)
            angles = [2 * math.pi * c / period for c in center for period in periods]
            before, after = x[0, 0, row * w + column], turned[0, 0, row * w + column]
            for i, angle in enumerate(angles):
                number = complex(before[i], before[i + d // 2]) * complex(math.cos(angle), math.sin(angle))
                assert abs(number - complex(after[i], after[i + d // 2])) < 1e-4


def test_rotary_keeps_the_dtype():
    rotary = RotaryPositions(8)
    x = torch.randn(1, 1, 4, 8, dtype=torch.bfloat16)
    assert rotary(x, rotary.angles((2, 2), x.device)).dtype == torch.bfloat16
