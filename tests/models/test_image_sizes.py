"""One network, any image: rectangles both ways, sides that are no multiple of a patch, one pixel."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from triptych.layers.position import resample_positions
from triptych.models.configs.swin import SwinConfig
from triptych.models.configs.vit import grid_at
from triptych.models.registry import create
from triptych.models.swin import Swin

SIDE = st.integers(1, 50)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (37, 5), (32, 48), (48, 32), (64, 96)])
def test_any_size_in_any_form(form, scrambled, images, size):
    net, x = scrambled(form), images(form, 1, size)
    with torch.no_grad():
        assert net(x).isfinite().all()
        assert net.features(x)[0].shape[2:] == grid_at(form, size)


@settings(max_examples=10)
@given(h=SIDE, w=SIDE)
def test_what_is_missing_to_a_whole_patch_is_zero(small, scrambled, h, w):
    net, x = scrambled(small()), torch.randn(1, 3, h, w)
    padded = F.pad(x, (0, -w % 8, 0, -h % 8))
    with torch.no_grad():
        torch.testing.assert_close(net(x), net(padded))


def transposed(net, config):
    """Return the network for transposed images: its kernel and its positions are transposed."""
    turned = type(net)(replace(config, image_size=config.image_size[::-1])).eval()
    state = dict(net.state_dict())
    state["patch.proj.weight"] = state["patch.proj.weight"].mT
    if "positions" in state:
        (h, w), p = config.grid, net.placed
        table = state["positions"]
        grid = table[:, p:].unflatten(1, (h, w)).transpose(1, 2).flatten(1, 2)
        state["positions"] = torch.cat([table[:, :p], grid], dim=1)
    turned.load_state_dict(state)
    return turned


@settings(max_examples=8)
@example(h=40, w=1)
@example(h=32, w=48)
@given(h=SIDE, w=SIDE)
@pytest.mark.parametrize(("position", "registers"), [("learned", 2), ("none", 0)])
def test_a_transposed_image_gives_a_transposed_map(small, scrambled, position, registers, h, w):
    config = small(position=position, num_registers=registers)
    net, x = scrambled(config), torch.randn(1, 3, h, w)
    turned = transposed(net, config)
    with torch.no_grad():
        torch.testing.assert_close(turned.features(x.mT)[0].mT, net.features(x)[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(turned(x.mT), net(x), atol=1e-4, rtol=1e-4)


def test_landscape_and_portrait_in_one_network():
    net = create("vit-ti16", depth=1, num_classes=3, image_size=224).eval()
    torch.nn.init.normal_(net.positions)
    for size, grid in (((224, 320), (14, 20)), ((320, 224), (20, 14))):
        assert net.features(torch.randn(1, 3, *size))[0].shape[2:] == grid
        # The table that was added is the resampled one, each patch with the entry of its own row and column.
        z, _ = net.embed(torch.zeros(1, 3, *size))
        bias = net.patch.proj.bias
        table = resample_positions(net.positions, (14, 14), grid, 1)
        torch.testing.assert_close(z[:, 1:], table[:, 1:] + bias)


def test_native_size_adds_the_table_bit_for_bit(small, scrambled):
    net = scrambled(small())
    z, _ = net.embed(torch.zeros(1, 3, 32, 48))
    assert torch.equal(z[:, 1:], net.patch.proj.bias + net.positions[:, 1:])


def test_sizes_leave_no_trace(small, scrambled, images):
    # A network that remembers the last size (some do) would answer the first image differently the second time.
    net, x = scrambled(small()), images(small())
    before = net(x)
    net(images(small(), 1, (16, 80)))
    assert torch.equal(net(x), before)


def test_what_is_placed_at_the_left_stays_at_the_left(small, scrambled):
    """A change in one corner changes the tokens; a change in one patch changes only that patch's z_0."""
    net, x = scrambled(small()), torch.zeros(1, 3, 40, 24)
    z, (rows, columns) = net.embed(x)
    x[:, :, 16:24, 8:16] = 1.0
    changed = (net.embed(x)[0] - z).abs().sum(-1)[0, 1:].view(rows, columns)
    assert changed.nonzero().tolist() == [[2, 1]]


def test_empty_batches(small, scrambled):
    assert scrambled(small())(torch.zeros(0, 3, 32, 48)).shape == (0, 5)


SWIN = SwinConfig(
    image_size=(20, 30),
    patch_size=2,
    embed_dim=8,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=((3, 5), (4, 2)),
    num_classes=3,
)


def random_swin(**changes):
    net = Swin(replace(SWIN, **changes)).eval()
    for name, parameter in net.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return net


def transposed_swin(net):
    """Return the Swin for transposed images."""
    config = net.config
    turn = lambda windows: tuple((w, h) for h, w in windows)  # noqa: E731
    config = replace(
        config,
        image_size=config.image_size[::-1],
        window_size=turn(config.window_size),
        pretrained_window_size=turn(config.pretrained_window_size),
    )
    state = dict(net.state_dict())
    for name, value in state.items():
        stage = int(name.split(".")[1]) if name.startswith("stages") else 0
        if name == "patch.proj.weight":
            state[name] = value.mT
        elif name.endswith("bias_table"):
            h, w = net.config.window_size[stage]
            state[name] = value.unflatten(0, (2 * h - 1, 2 * w - 1)).transpose(0, 1).flatten(0, 1)
        elif name.endswith("bias_mlp.fc1.weight"):
            state[name] = value.flip(1)  # differences of rows, of columns
        elif name.endswith("reduction.weight"):
            state[name] = value.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1)
        elif ".merge.norm" in name and config.version == 1:
            state[name] = value.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten()
    turned = Swin(config).eval()
    turned.load_state_dict(state)
    return turned


@pytest.mark.parametrize(
    "changes",
    [{}, {"version": 2, "qkv_bias": "qv", "pretrained_window_size": ((6, 4), (2, 3))}],
    ids=["v1", "v2"],
)
@settings(max_examples=6)
@example(h=20, w=30)
@example(h=50, w=2)
@given(h=st.integers(2, 50), w=st.integers(2, 50))
def test_a_transposed_image_in_a_swin(changes, h, w):
    """Rows stay rows and columns columns: in windows, shifts, masks, biases and merging."""
    net, x = random_swin(**changes), torch.randn(1, 3, h, w)
    turned = transposed_swin(net)
    with torch.no_grad():
        for mine, its in zip(turned.features(x.mT), net.features(x), strict=True):
            torch.testing.assert_close(mine.mT, its, atol=1e-4, rtol=1e-4)
