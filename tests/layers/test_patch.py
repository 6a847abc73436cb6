"""Patch partition and the stems, against sums written out pixel by pixel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from triptych.layers.patch import ConvStem, PatchEmbed, ResNetStem, ResNetUnit, StdConv2d, pad_same

PIXELS = st.integers(1, 40)


@given(h=PIXELS, w=PIXELS, patch=st.integers(1, 9))
def test_a_token_is_the_product_of_its_patch(h, w, patch):
    embed = PatchEmbed(2, 5, patch)
    image = torch.randn(1, 2, h, w)
    out = embed(image)
    rows, columns = -(-h // patch), -(-w // patch)
    assert out.shape == (1, 5, rows, columns)
    padded = torch.zeros(2, rows * patch, columns * patch)  # padded with zeros at the right and the bottom
    padded[:, :h, :w] = image[0]
    for row, column in {(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2)}:
        cut = padded[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        wanted = (embed.proj.weight * cut).sum((1, 2, 3)) + embed.proj.bias
        torch.testing.assert_close(out[0, :, row, column], wanted, atol=1e-5, rtol=1e-4)


def test_the_matrix_product_is_the_convolution():
    embed, images = PatchEmbed(3, 8, 4), torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(embed(images), embed.proj(images), atol=1e-5, rtol=1e-5)


def test_the_projection_may_have_no_bias():
    assert PatchEmbed(3, 8, 4, bias=False)(torch.zeros(1, 3, 8, 8)).eq(0).all()


def slow_same(x, kernel, stride, reduce):
    """TensorFlow's "SAME" for one channel: window o covers o * stride - before and the `kernel` cells from there."""
    axes = []
    for n in x.shape:
        outputs = -(-n // stride)
        before = max((outputs - 1) * stride + kernel - n, 0) // 2
        cells = [[(i, o * stride - before + i) for i in range(kernel)] for o in range(outputs)]
        axes.append([[(i, j) for i, j in window if 0 <= j < n] for window in cells])
    return np.array(
        [[reduce([(i, k, x[j, m]) for i, j in ys for k, m in xs]) for xs in axes[1]] for ys in axes[0]]
    )


@given(
    h=st.integers(1, 12), w=st.integers(1, 12), kernel=st.sampled_from([1, 3, 7]), stride=st.integers(1, 3)
)
def test_same_padding_is_tensorflows(h, w, kernel, stride):
    x, weight = torch.randn(h, w, dtype=torch.float64), torch.randn(kernel, kernel, dtype=torch.float64)
    got = F.conv2d(pad_same(x[None, None], kernel, stride), weight[None, None], stride=stride)[0, 0]
    wanted = slow_same(
        x.numpy(), kernel, stride, lambda cells: sum(weight[i, k].item() * v for i, k, v in cells)
    )
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-9)


def test_same_padding_of_a_maximum_is_minus_infinity():
    x = -torch.rand(7, 10, dtype=torch.float64) - 1  # all negative: a zero at the edge would be the maximum
    got = F.max_pool2d(pad_same(x[None, None], 3, 2, value=-torch.inf), 3, 2)[0, 0]
    np.testing.assert_array_equal(
        got.numpy(), slow_same(x.numpy(), 3, 2, lambda cells: max(v for *_, v in cells))
    )


def slow_standardized(weight):
    out = np.empty_like(weight)
    for o, kernel in enumerate(weight):
        mean = kernel.sum() / kernel.size
        std = np.sqrt(((kernel - mean) ** 2).sum() / kernel.size)
        out[o] = (kernel - mean) / (std + 1e-5)
    return out


@pytest.mark.parametrize(("kernel", "stride", "scale"), [(1, 1, 1.0), (3, 2, 1.0), (7, 2, 1.0), (3, 1, 1e-5)])
def test_standardized_convolution(kernel, stride, scale):
    conv = StdConv2d(2, 3, kernel, stride)
    conv.weight.data = (
        scale * torch.randn_like(conv.weight) + 0.3
    )  # at a small scale the epsilon of 1e-5 matters
    x = torch.randn(1, 2, 9, 6)
    weight = slow_standardized(conv.weight.detach().double().numpy())
    pixels = x[0].double().numpy()
    for o in range(3):
        wanted = 0.0
        for c in range(2):
            w = weight[o, c]
            wanted += slow_same(
                pixels[c], kernel, stride, lambda cells, w=w: sum(w[i, k] * v for i, k, v in cells)
            )
        np.testing.assert_allclose(conv(x)[0, o].detach().numpy(), wanted, atol=2e-2 if scale < 1 else 1e-4)


def test_a_constant_kernel_gives_zero_not_nan():
    conv = StdConv2d(1, 1, 3)
    torch.nn.init.constant_(conv.weight, 2.0)
    assert conv(torch.randn(1, 1, 5, 5)).abs().max() < 1e-3


def test_a_unit_projects_its_shortcut_where_shapes_differ():
    assert ResNetUnit(64, 32, 1).project
    assert ResNetUnit(128, 32, 2).project
    plain = ResNetUnit(128, 32, 1)
    assert not plain.project
    # With the last norm at zero the branch adds nothing, and the (positive) shortcut is the output.
    torch.nn.init.zeros_(plain.gn3.weight)
    x = torch.rand(1, 128, 4, 4)
    torch.testing.assert_close(plain(x), x)


@pytest.mark.parametrize("depths", [(), (1,), (1, 2), (1, 1, 1)])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 33), (17, 2), (32, 16)])
def test_resnet_stem_shapes(h, w, depths):
    stem = ResNetStem(3, depths, 64)
    out = stem(torch.randn(1, 3, h, w))
    assert out.shape == (1, stem.channels, -(-h // stem.stride), -(-w // stem.stride))
    assert stem.stride == 4 * 2 ** max(len(depths) - 1, 0)


@pytest.mark.parametrize("widths", [(4,), (4, 6), (4, 6, 8)])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 33), (17, 2), (32, 16)])
def test_conv_stem_shapes(h, w, widths):
    stem = ConvStem(3, widths).eval()
    assert stem(torch.randn(1, 3, h, w)).shape == (1, widths[-1], -(-h // stem.stride), -(-w // stem.stride))
    assert stem.channels == widths[-1]
    assert stem.stride == 2 ** len(widths)
