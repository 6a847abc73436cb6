"""Residual blocks, down- and upsampling, padded with zeros or wrapped around."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triptych.layers.resnet import (
    Conv,
    Downsample,
    ResnetBlock,
    Upsample,
    seamless,
)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (8, 12)])
@pytest.mark.parametrize("time_dim", [None, 5])
def test_a_block_is_its_formula(inputs, outputs, time_dim):
    block = ResnetBlock(inputs, outputs, time_dim, groups=4, eps=1e-5)
    x = torch.randn(2, inputs, 5, 6)
    time = None if time_dim is None else torch.randn(2, time_dim)
    h = F.conv2d(F.silu(F.group_norm(x, 4, eps=1e-5)), block.conv1.weight, block.conv1.bias, padding=1)
    if time is not None:
        h = h + block.time(F.silu(time))[:, :, None, None]
    h = F.conv2d(F.silu(F.group_norm(h, 4, eps=1e-5)), block.conv2.weight, block.conv2.bias, padding=1)
    skip = x if inputs == outputs else F.conv2d(x, block.skip.weight, block.skip.bias)
    torch.testing.assert_close(block(x, time), h + skip)
    assert isinstance(block.skip, nn.Identity) == (inputs == outputs)


def test_dropout_is_between_the_second_norm_and_its_convolution():
    block = ResnetBlock(8, 8, groups=4, dropout=0.9)
    x = torch.randn(1, 8, 5, 5)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize("sides", [(6, 8), (7, 5)])
def test_downsampling_pads_all_around_or_after(sides):
    x = torch.randn(1, 4, *sides)
    around, after = Downsample(4, 6), Downsample(4, 6, pad_after=True)
    torch.testing.assert_close(around(x), F.conv2d(x, around.conv.weight, around.conv.bias, 2, padding=1))
    torch.testing.assert_close(
        after(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), after.conv.weight, after.conv.bias, stride=2)
    )
    assert around(x).shape[2:] == tuple((side + 1) // 2 for side in sides)
    assert after(x).shape[2:] == tuple(side // 2 for side in sides)


@pytest.mark.parametrize("size", [None, (9, 11), (10, 11)])
def test_upsampling_repeats_then_convolves(size):
    up, x = Upsample(4, 6), torch.randn(1, 4, 5, 6)
    wide = F.interpolate(x, size=size or (10, 12))
    expected = F.conv2d(wide, up.conv.weight, up.conv.bias, padding=1)
    torch.testing.assert_close(up(x, size), expected)
    with torch.no_grad():
        torch.testing.assert_close(up(x, size), expected, atol=1e-5, rtol=1e-5)


def test_a_block_leaves_its_input_alone():
    block, x = ResnetBlock(8, 8, groups=4), torch.randn(1, 8, 5, 5)
    before = x.clone()
    with torch.no_grad():
        without = block(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(block(x), without)


@pytest.mark.parametrize("wrap", [(True, True), (True, False), (False, True)])
def test_seamless_convolutions_join_the_edges(wrap):
    for conv in (Conv(3, 4), Conv(3, 4, stride=2), Conv(3, 4, stride=2, pad_after=True)):
        x = torch.randn(1, 3, 6, 8)
        pads = conv.pads
        modes = ["circular" if by else "constant" for by in wrap]
        wide = F.pad(F.pad(x, (*pads, 0, 0), mode=modes[0]), (0, 0, *pads), mode=modes[1])
        plain = conv(x)
        with seamless(conv, *wrap):
            torch.testing.assert_close(conv(x), F.conv2d(wide, conv.weight, conv.bias, conv.stride))
        assert torch.equal(conv(x), plain)


def test_seamless_may_be_nested_and_ends_when_the_block_raises():
    net = nn.Sequential(Conv(2, 2), Upsample(2))
    with seamless(net, y=False):
        with seamless(net, x=False):
            assert net[0].wrap == (False, True)
        assert net[1].conv.wrap == (True, False)
    with pytest.raises(ZeroDivisionError), seamless(net):
        raise ZeroDivisionError
    assert net[0].wrap == (False, False)
