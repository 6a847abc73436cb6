"""Encode and decode in tiles: equal to one pass where a tile holds everything, else close to it and without seams."""

import pytest
import torch
from torch import nn

from triptych.errors import ConfigError
from triptych.layers.resnet import seamless
from triptych.models.autoencoder import Autoencoder
from triptych.models.configs.autoencoder import AutoencoderConfig, TinyAutoencoderConfig
from triptych.models.tiny_autoencoder import TinyAutoencoder

CONFIG = AutoencoderConfig(
    regularization="kl",
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    latent_channels=4,
    norm_groups=4,
    scale=0.5,
    shift=0.1,
)


@pytest.fixture
def net() -> Autoencoder:
    return Autoencoder(CONFIG).eval()


@pytest.fixture
def local() -> TinyAutoencoder:
    """A network with a receptive field of 7 latents: a quarter of an overlap of 28."""
    return TinyAutoencoder(TinyAutoencoderConfig(base_channels=4, num_levels=2, num_res_blocks=1)).eval()


def test_one_tile_is_the_whole(net):
    with torch.no_grad():
        latents, images = torch.randn(2, 4, 9, 7), torch.randn(2, 3, 18, 14)
        assert torch.equal(net.decode_tiled(latents, tile=9, overlap=2), net.decode(latents))
        assert torch.equal(net.encode_tiled(images, tile=9, overlap=2), net.encode(images))


@pytest.mark.parametrize("size", [(60, 47), (25, 62), (44, 20)])
def test_tiles_equal_one_pass_for_a_small_receptive_field(local, size):
    with torch.no_grad():
        latents = torch.randn(1, 4, *size)
        expected = local.decode(latents)
        torch.testing.assert_close(local.decode_tiled(latents, 40, 28), expected, atol=1e-5, rtol=1e-5)
        images = torch.rand_like(expected)
        encoded = local.encode(images)
        torch.testing.assert_close(local.encode_tiled(images, 40, 28), encoded, atol=1e-5, rtol=1e-5)


def test_tiles_have_no_seams_for_a_large_receptive_field(net):
    """Norms and attention see one tile only; still there is no step from one column to the next."""
    with torch.no_grad():
        latents = torch.randn(1, 4, 24, 40)
        latents = nn.functional.avg_pool2d(latents, 5, 1, 2)  # smooth, so that a seam would show
        untiled, tiled = net.decode(latents), net.decode_tiled(latents, 20, 8)
        steps, expected = ((x[..., 1:] - x[..., :-1]).abs().mean((0, 1, 2)) for x in (tiled, untiled))
    assert steps.max() < 1.3 * expected.max()


def test_memory_is_bounded_by_a_tile(net):
    """No layer's input is larger than a tile."""
    seen = []
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[-2:]))
    with torch.no_grad():
        assert net.decode_tiled(torch.randn(1, 4, 21, 17), tile=8, overlap=2).shape == (1, 3, 42, 34)
        assert net.encode_tiled(torch.randn(1, 3, 42, 34), tile=8, overlap=2).shape == (1, 4, 21, 17)
    assert max(max(size) for size in seen) <= 17  # 16 pixels, and one that the encoder pads


def test_gradients_flow_through_tiles(local):
    latents = torch.randn(1, 4, 9, 9, requires_grad=True)
    local.decode_tiled(latents, 6, 2).square().sum().backward()
    assert latents.grad.abs().min() > 0


def test_halves_stay_halves(local):
    with torch.no_grad():
        assert local.bfloat16().decode_tiled(torch.randn(1, 4, 9, 9).bfloat16(), 6, 2).dtype == torch.bfloat16


@pytest.mark.parametrize(("x", "y"), [(True, False), (True, True), (False, True)])
def test_seamless_images_are_seamless_in_tiles(local, x, y):
    with torch.no_grad(), seamless(local, x, y):
        for size in ((60, 47), (20, 47)):  # several tiles high, or one
            latents = torch.randn(1, 4, *size)
            expected = local.decode(latents)
            torch.testing.assert_close(local.decode_tiled(latents, 40, 28), expected, atol=1e-5, rtol=1e-5)
            images = torch.rand_like(expected)
            encoded = local.encode(images)
            torch.testing.assert_close(local.encode_tiled(images, 40, 28), encoded, atol=1e-5, rtol=1e-5)
        assert local.encoder[0].wrap == (x, y)


def test_an_overlap_as_large_as_a_tile_is_refused(net):
    with pytest.raises(ConfigError, match=r"overlap is 8, which must be 0 or more and below .* 8"):
        net.decode_tiled(torch.zeros(1, 4, 20, 20), tile=8, overlap=8)
