"""Window attention against the paper's definition: regions cut out one by one, without roll or mask, in fp64."""

import copy
import functools
import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, stack_module_state, vmap

from triptych.layers.capture import capture
from triptych.layers.position import resample_bias_table
from triptych.layers.window import (
    WindowAttention,
    attend,
    attend_gathered,
    partition,
    relative_index,
    reverse,
    shift_along,
    shift_mask,
)

V1 = {"cosine": False, "bias": "qkv"}
V2 = {"cosine": True, "bias": "qv"}
VERSIONS = pytest.mark.parametrize("form", [V1, V2], ids=["v1", "v2"])
CLOSE = {"atol": 1e-10, "rtol": 1e-10}


def make(window, form, dim=6, heads=2, dtype=torch.float64, **changes):
    """Return a window attention with random parameters."""
    part = WindowAttention(dim, heads, window, **{**form, **changes})
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return part.eval().to(dtype)


# The slow reference


def pieces(cells, window, shifted, single=False):
    """Figure 2 along one axis: windows start at the first cell or, if shifted, half a window before it. The last one
    may reach past the end of the map, where there are zeros. A window over the full axis is not shifted, except with
    `single`."""
    count = -(-cells // window)
    if not shifted or (count == 1 and not single) or window == 1:
        return [range(i * window, (i + 1) * window) for i in range(count)]
    cuts = [0, *range(window // 2, count * window, window), count * window]
    return [range(a, b) for a, b in pairwise(cuts)]


def slow_bias(part, p, dy, dx):
    """Return B for two cells at that offset: an entry of the table, or the MLP of the logarithms."""
    wh, ww = part.window
    if not part.cosine:
        return p["bias_table"].reshape(2 * wh - 1, 2 * ww - 1, -1)[dy + wh - 1, dx + ww - 1]
    logs = []
    for d, side, before in ((dy, wh, part.pretrained[0]), (dx, ww, part.pretrained[1])):
        d = 8 * d / max((before or side) - 1, 1)
        logs.append(math.copysign(math.log2(1 + abs(d)), d) / 3)
    hidden = p["bias_mlp.fc1.weight"] @ np.array(logs) + p["bias_mlp.fc1.bias"]
    return 16 / (1 + np.exp(-p["bias_mlp.fc2.weight"] @ np.maximum(hidden, 0)))


def along(x):
    """Normalize vectors; zero stays zero."""
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, lengths, out=np.zeros_like(x), where=lengths > 0)


def slow_attend(part, z, shifted, single=False):
    """(S)W-MSA on one map (H, W, D), by loops over regions, cells, heads and the cells attended to."""
    p = {name: value.double().numpy() for name, value in part.state_dict().items()}
    height, width, dim = z.shape
    heads, d = part.heads, dim // part.heads
    zeros = np.zeros(dim)
    b_q, b_k, b_v = np.split(p["qkv.bias"], 3) if "qkv.bias" in p else (zeros, zeros, zeros)
    b_q, b_v = p.get("q_bias", b_q), p.get("v_bias", b_v)
    w_q, w_k, w_v = np.split(p["qkv.weight"], 3)
    known = functools.cache(lambda dy, dx: slow_bias(part, p, dy, dx))

    def cell(y, x):
        return z[y, x] if y < height and x < width else zeros

    out = np.zeros_like(z)
    cuts = (
        pieces(size, window, shifted, single)
        for size, window in zip((height, width), part.window, strict=True)
    )
    for ys, xs in product(*cuts):
        region = list(product(ys, xs))
        keys = np.array([w_k @ cell(y, x) + b_k for y, x in region])
        values = np.array([w_v @ cell(y, x) + b_v for y, x in region])
        for y, x in region:
            if y >= height or x >= width:
                continue
            q, heard = w_q @ z[y, x] + b_q, np.zeros(dim)
            bias = np.array([known(y - y_k, x - x_k) for y_k, x_k in region])
            for head in range(heads):
                own = slice(head * d, (head + 1) * d)
                if part.cosine:
                    tau = 1 / math.exp(min(p["scale"][head, 0, 0], math.log(100)))
                    logits = along(keys[:, own]) @ along(q[own]) / tau + bias[:, head]
                else:
                    logits = keys[:, own] @ q[own] / math.sqrt(d) + bias[:, head]
                weights = np.exp(logits - logits.max())
                heard[own] = weights / weights.sum() @ values[:, own]
            out[y, x] = p["proj.weight"] @ heard + p["proj.bias"]
    return out


def same_as_slow(part, height, width, shifted, batch=1, single=False):
    z = torch.randn(batch, height, width, part.proj.in_features, dtype=torch.float64)
    wanted = torch.stack([torch.from_numpy(slow_attend(part, one.numpy(), shifted, single)) for one in z])
    torch.testing.assert_close(attend(z, part, shifted, single).detach(), wanted, **CLOSE)  # as in training
    with torch.no_grad():
        torch.testing.assert_close(attend(z, part, shifted, single), wanted, **CLOSE)
        torch.testing.assert_close(attend_gathered(z, part, shifted, single), wanted, **CLOSE)  # as in export


@VERSIONS
@pytest.mark.parametrize("shifted", [False, True], ids=["w-msa", "sw-msa"])
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (7, 5), (56, 56), (1, 1), (7, 8), (14, 7), (6, 30)])
def test_the_papers_attention(size, shifted, form):
    # Few channels on the large map, since the loop goes through its 3,136 cells one by one.
    same_as_slow(make((7, 7), form, *((2, 1) if size == (56, 56) else (6, 2))), *size, shifted)


@VERSIONS
@settings(max_examples=25)
@given(
    h=st.integers(1, 14),
    w=st.integers(1, 14),
    window=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    shifted=st.booleans(),
    heads=st.sampled_from([1, 3]),
)
def test_any_map_in_any_window(h, w, window, shifted, heads, form):
    same_as_slow(make(window, form, heads=heads), h, w, shifted)


@pytest.mark.parametrize("bias", ["qkv", "qv", "none"])
@pytest.mark.parametrize("cosine", [False, True])
def test_every_bias_of_the_projection(cosine, bias):
    same_as_slow(make((3, 4), {"cosine": cosine, "bias": bias}), 7, 9, True, batch=3)


@pytest.mark.parametrize("before", [(0, 0), (8, 8), (12, 3), (1, 0)])
def test_positions_on_the_scale_of_pre_training(before):
    same_as_slow(make((4, 6), V2, pretrained=before), 5, 13, True)


def test_a_temperature_is_at_least_a_hundredth():
    part = make((3, 3), V2)
    part.scale.data[:] = torch.tensor([4.0, 6.0]).view(2, 1, 1)  # e^4 = 55 and e^6 = 403
    same_as_slow(part, 5, 5, True)


def test_windows_of_one_cell_see_themselves():
    part = make((1, 1), V1)
    z = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    w_v, b_v = part.qkv.weight[12:], part.qkv.bias[12:]
    torch.testing.assert_close(attend(z, part, True), part.proj(z @ w_v.T + b_v), **CLOSE)


# Which cells attend to which


def seen(function, size, dim):
    """Return whether each output cell (row) depends on each cell of the map (column), from the full Jacobian: one
    copy of the map for each row, so that one backward pass is enough."""
    z = torch.randn(1, *size, dim).repeat(size[0] * size[1], 1, 1, 1).requires_grad_()
    (function(z) @ torch.randn(dim)).flatten(
        1
    ).diagonal().sum().backward()  # random: no channel cancels another
    return z.grad.ne(0).any(-1).flatten(1)


@VERSIONS
@pytest.mark.parametrize("size", [(4, 4), (3, 4), (4, 9), (2, 3)])
def test_backbones_shift_a_single_window_too(size, form):
    same_as_slow(make((4, 4), form), *size, shifted=True, single=True)


def together(height, width, window, shifted):
    """Return whether two cells share a region, by the cuts of the slow reference."""

    def of(cells, side):
        index = {c: i for i, piece in enumerate(pieces(cells, side, shifted)) for c in piece}
        return torch.tensor([index[c] for c in range(cells)])

    region = of(height, window[0])[:, None] * 1000 + of(width, window[1])[None, :]
    return region.flatten()[:, None] == region.flatten()[None, :]


@VERSIONS
@pytest.mark.parametrize(
    ("size", "window"), [((16, 16), (7, 7)), ((9, 5), (4, 3)), ((8, 12), (4, 12))], ids=str
)
@pytest.mark.parametrize("attend_path", [attend, attend_gathered])
def test_nothing_leaks_between_regions(size, window, attend_path, form):
    """The Jacobian is exactly zero between regions, and nowhere else."""
    part = make(window, form, dim=4, dtype=torch.float32)
    for shifted in (False, True):
        jacobian = seen(lambda z, s=shifted: attend_path(z, part, s), size, 4)
        assert torch.equal(jacobian, together(*size, window, shifted))


@VERSIONS
@torch.no_grad()
def test_nothing_leaks_without_gradients(form):
    """Without gradients there is no Jacobian: changing a cell changes no bit outside its region."""
    part, z = make((7, 7), form, dim=4, dtype=torch.float32), torch.randn(1, 16, 16, 4)
    before, shared = attend(z, part, True), together(16, 16, (7, 7), True)
    for cell in range(0, 256, 5):
        moved = z.clone()
        moved[0, cell // 16, cell % 16] += 3
        changed = (attend(moved, part, True) != before).any(-1).flatten()
        assert torch.equal(changed, shared[cell])


# What is added to the logits


def test_masks_are_zero_or_minus_infinity():
    mask = shift_mask(3, 4, (4, 6), (2, 3), torch.device("cpu"), torch.float32)
    assert mask.shape == (12, 1, 24, 24)
    assert set(mask.unique().tolist()) == {-math.inf, 0.0}
    assert mask[0].eq(0).all()  # only the last row and the last column of windows hold more than one region
    assert mask.isfinite().any(-1).all()  # every cell attends at least to itself, so no softmax is empty
    regions = [len({tuple(row) for row in window[0].tolist()}) for window in mask]
    assert regions == [1, 1, 1, 2, 1, 1, 1, 2, 2, 2, 2, 4]


def test_only_an_axis_of_several_windows_is_shifted():
    assert [shift_along(cells, 7) for cells in (1, 6, 7, 8, 14, 15)] == [0, 0, 0, 3, 3, 3]
    assert [shift_along(cells, 4) for cells in (4, 5)] == [0, 2]
    assert shift_along(9, 1) == 0


@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 5), (7, 7)])
def test_the_index_counts_differences(window):
    index = relative_index(window)
    cells = list(product(range(window[0]), range(window[1])))
    for (i, a), (j, b) in product(enumerate(cells), enumerate(cells)):
        row, column = a[0] - b[0] + window[0] - 1, a[1] - b[1] + window[1] - 1
        assert index[i, j] == row * (2 * window[1] - 1) + column


def test_partition_takes_windows_row_by_row_and_back():
    x = torch.arange(2 * 6 * 8 * 3).view(2, 6, 8, 3).float()
    windows = partition(x, (3, 4))
    assert windows.shape == (2, 4, 12, 3)
    assert torch.equal(windows[:, 1].view(2, 3, 4, 3), x[:, :3, 4:])
    assert torch.equal(windows[:, 2].view(2, 3, 4, 3), x[:, 3:, :4])
    assert torch.equal(reverse(windows, (3, 4), 2, 2), x)


@VERSIONS
def test_the_default_device_does_not_matter(form):
    part, z = make((3, 2), form), torch.randn(1, 13, 11, 6, dtype=torch.float64)
    with torch.no_grad():
        with torch.device("meta"):
            result = attend(z, part, True)
        torch.testing.assert_close(result, attend(z, part, True))


@VERSIONS
def test_capture_shows_each_window(form):
    part, z = make((3, 4), form, dtype=torch.float32), torch.randn(2, 7, 9, 6)
    plain = attend(z, part, True)
    with capture(part) as maps:
        torch.testing.assert_close(attend(z, part, True), plain, atol=1e-5, rtol=1e-5)
    (weights,) = maps.values()
    assert weights.shape == (2, 9, 2, 12, 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    apart = shift_mask(3, 3, (3, 4), (1, 2), z.device, z.dtype).isinf().expand(2, 9, 2, 12, 12)
    assert weights[apart].eq(0).all()


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_finite_where_cells_are_padding(dtype, form):
    """A padding cell's key is zero where keys have no bias; its cosine must be 0, not 0 / 0."""
    part, z = make((7, 7), form, dtype=torch.float32), torch.randn(1, 9, 10, 6)
    wanted = attend(z, part, True)
    part, z = part.to(dtype), z.to(dtype).requires_grad_()
    got = attend(z, part, True)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, atol=0.15, rtol=0.1)
    got.sum().backward()
    assert z.grad.isfinite().all()
    assert [name for name, p in part.named_parameters() if not p.grad.isfinite().all()] == []


# What is cached between calls


def cached_bias(part):
    """Return the bias of a second call, which the first one cached."""
    with torch.no_grad():
        part.position_bias()
        assert part._cached_bias is not None
        return part.position_bias().clone()


def fresh(part):
    with torch.no_grad():
        return part._position_bias()


def sources(part):
    return [part.bias_table] if not part.cosine else list(part.bias_mlp.parameters())


def step(part, optimizer_class=torch.optim.SGD, **options):
    optimizer = optimizer_class(part.parameters(), lr=0.1, **options)
    (part.position_bias() * torch.randn(9, 9)).sum().backward()
    optimizer.step()


def fused_step(part):
    step(part, torch.optim.AdamW, fused=True)  # increments no version counter


def compiled_step(part):
    """A step whose forward pass was compiled, so that only the change of mode can be noticed."""
    (part._position_bias() * torch.randn(9, 9)).sum().backward()
    part.train()
    torch.optim.AdamW(part.parameters(), lr=0.1, fused=True).step()
    part.eval()


def load(part):
    part.load_state_dict({name: value + 1 for name, value in part.state_dict().items()})


def assign(part):
    part.load_state_dict({name: value + 1 for name, value in part.state_dict().items()}, assign=True)


def average(part):
    with torch.no_grad():
        torch._foreach_lerp_(sources(part), [s + 1 for s in sources(part)], 0.5)


def reset(part):
    for source in sources(part):
        torch.nn.init.normal_(source)


def replace(part):
    for name, value in list(part.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(part.get_submodule(owner), leaf, torch.nn.Parameter(value.detach() + 1))


def new_data(part):
    for source in sources(part):
        source.data = source.data + 1


def write_behind_autograds_back(part):
    """Old code writes through `.data`, which increments no version counter."""
    for source in sources(part):
        source.data.add_(1)


def write_through_numpy(part):
    for source in sources(part):
        source.detach().numpy()[...] += 1


def step_in_eval_mode(part):
    """A fused step on old gradients: no call in between, no change of mode, no version counter."""
    for p in part.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(part.parameters(), lr=0.1, fused=True).step()


def widen(part):
    """Change the window size in place."""
    part.window = (4, 2)
    if not part.cosine:
        part.bias_table = torch.nn.Parameter(torch.randn(7 * 3, 2, dtype=torch.float64))


@VERSIONS
@pytest.mark.parametrize(
    "change",
    [
        step,
        fused_step,
        compiled_step,
        load,
        assign,
        average,
        reset,
        replace,
        new_data,
        write_behind_autograds_back,
        write_through_numpy,
        step_in_eval_mode,
        widen,
    ],
    ids=lambda change: change.__name__,
)
def test_a_kept_bias_is_that_of_the_weights(change, form):
    part = make((3, 3), form)
    before = cached_bias(part)
    change(part)
    after = cached_bias(part)
    assert torch.equal(after, fresh(part))
    assert not torch.equal(after, before)


@VERSIONS
def test_a_kept_bias_follows_dtype_and_copies(form):
    part = make((3, 3), form)
    cached_bias(part)
    single = copy.deepcopy(part)
    assert single._cached_bias is None
    assert torch.equal(cached_bias(single), fresh(single))
    step(single)
    assert torch.equal(cached_bias(single), fresh(single))
    assert torch.equal(cached_bias(part), fresh(part))
    single.float()
    assert cached_bias(single).dtype == torch.float32
    assert torch.equal(cached_bias(single), fresh(single))
    single.double()
    assert torch.equal(cached_bias(single), fresh(single))
    other = {name: value + 1 for name, value in part.state_dict().items()}
    z = torch.randn(1, 4, 9, 6, dtype=torch.float64)
    with torch.no_grad():
        called = functional_call(part, other, (z,))
        part.load_state_dict(other)
        assert torch.equal(called, part(z))


@VERSIONS
def test_keeping_changes_no_answer(form):
    part, z = make((3, 4), form, dtype=torch.float32), torch.randn(2, 7, 9, 6)
    learning = attend(z, part, True).detach()
    with torch.no_grad():
        first = attend(z, part, True)
        torch.testing.assert_close(
            first, learning, atol=1e-5, rtol=1e-5
        )  # PyTorch has another kernel for each
    for mode in (torch.no_grad, torch.inference_mode):
        for training in (False, False, True, False):
            part.train(training)
            with mode():
                assert torch.equal(attend(z, part, True), first)
        assert torch.equal(attend(z, part, True), learning)


@VERSIONS
def test_autocast_leaves_nothing_behind(form):
    """A bias cached in bf16 is not used for fp32, nor the other way round."""
    z = torch.randn(1, 7, 9, 6)
    with torch.no_grad():
        torch.manual_seed(1)
        part = make((3, 4), form, dtype=torch.float32)
        plain = attend(z, part, True)
        with torch.autocast("cpu", torch.bfloat16):
            after_plain = attend(z, part, True)
        again = attend(z, part, True)
        torch.manual_seed(1)
        part = make((3, 4), form, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            first = attend(z, part, True)
        assert torch.equal(attend(z, part, True), plain)
    assert torch.equal(again, plain)
    assert torch.equal(first, after_plain)


@VERSIONS
def test_learning_after_inference_mode(form):
    part, z = make((3, 3), form, dtype=torch.float32), torch.randn(1, 8, 8, 6)
    wanted = torch.autograd.grad(attend(z, part, True).square().sum(), sources(part))
    with torch.inference_mode():
        attend(z, part, True)  # masks and biases cached here must not be inference tensors
    with torch.no_grad():
        attend(z, part, True)
    got = torch.autograd.grad(attend(z, part, True).square().sum(), sources(part))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@VERSIONS
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_several_networks_at_once(form):
    parts, z = [make((3, 3), form) for _ in range(3)], torch.randn(1, 4, 5, 6, dtype=torch.float64)
    weights, _ = stack_module_state(parts)
    with torch.no_grad():
        wanted = torch.stack([attend(z, part, True) for part in parts])
        mapped = vmap(lambda w: functional_call(Attend(parts[0]), w, (z,)))(
            {f"part.{name}": value for name, value in weights.items()}
        )
    torch.testing.assert_close(mapped, wanted, **CLOSE)


class Attend(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, z):
        return attend(z, self.part, True)


@VERSIONS
def test_weights_made_in_inference_mode(form):
    with torch.inference_mode():
        part = make((3, 3), form)
        z = torch.randn(1, 5, 5, 6, dtype=torch.float64)
        before = attend(z, part, True)
        load(part)
        assert not torch.equal(attend(z, part, True), before)


# Bias tables moved to another window


def test_the_same_window_returns_the_table():
    table = torch.randn(13 * 13, 3)
    assert resample_bias_table(table, (7, 7), (7, 7)) is table


@settings(max_examples=20)
@given(
    old=st.tuples(st.integers(1, 9), st.integers(1, 9)), new=st.tuples(st.integers(1, 12), st.integers(1, 12))
)
def test_a_moved_table_keeps_what_it_can(old, new):
    constant = resample_bias_table(torch.full(((2 * old[0] - 1) * (2 * old[1] - 1), 2), 3.5), old, new)
    assert constant.shape == ((2 * new[0] - 1) * (2 * new[1] - 1), 2)
    torch.testing.assert_close(constant, torch.full_like(constant, 3.5))
    # A symmetric table stays symmetric: the entry of offset 0 stays in the middle.
    table = torch.randn(2 * old[0] - 1, 2 * old[1] - 1, 2)
    table = table + table.flip(0, 1)
    moved = resample_bias_table(table.flatten(0, 1), old, new).unflatten(0, (2 * new[0] - 1, 2 * new[1] - 1))
    torch.testing.assert_close(moved, moved.flip(0, 1), atol=1e-5, rtol=1e-5)


def test_a_moved_table_on_its_side():
    table = torch.randn(2 * 4 - 1, 2 * 6 - 1, 3)
    moved = resample_bias_table(table.flatten(0, 1), (4, 6), (7, 9)).unflatten(0, (13, 17))
    turned = resample_bias_table(table.transpose(0, 1).flatten(0, 1), (6, 4), (9, 7)).unflatten(0, (17, 13))
    torch.testing.assert_close(turned, moved.transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_heads_and_dtype_stay_as_they_are():
    table = torch.randn(15 * 15, 4).bfloat16()
    moved = resample_bias_table(table, (8, 8), (12, 12))
    assert moved.dtype == torch.bfloat16
    assert torch.equal(resample_bias_table(table[:, 2:3], (8, 8), (12, 12)), moved[:, 2:3])
