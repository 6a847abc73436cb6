"""Semantic maps against CompVis' module, and boxes against tokens written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from triptych.errors import ConfigError
from triptych.models.configs.latent_diffusion import SIZES, SemanticMapConfig
from triptych.models.configs.text import SIZES as TEXTS
from triptych.models.configs.text import TextConfig
from triptych.models.spatial_conditions import MapEncoder, box_tokens

SMALL = TextConfig(
    type="ldm-bert",
    vocab_size=17,
    max_length=11,
    embed_dim=8,
    depth=1,
    num_heads=1,
    mlp_ratio=1.0,
    boxes=True,
)


def test_a_map_is_halved_then_mixed():
    """SpatialRescaler: one-hot, twice F.interpolate by a half, a 1x1 convolution."""
    torch.manual_seed(0)
    net = MapEncoder(SemanticMapConfig(num_classes=7, channels=3))
    classes = torch.randint(8, (2, 12, 20))
    classes[classes == 7] = 255
    hot = torch.stack([classes == k for k in range(7)], dim=1).float()
    for _ in range(2):
        hot = F.interpolate(hot, scale_factor=0.5, mode="bilinear")
    torch.testing.assert_close(net(classes, 4), net.mix(hot), atol=1e-6, rtol=1e-6)


def test_the_published_sizes():
    config = SIZES["ldm-semantic"]
    assert config.network.in_channels == config.autoencoder.latent_channels + 3
    assert (config.process.beta_start, config.process.beta_end) == (0.0015, 0.0205)
    assert SIZES["ldm-layout"].text_encoder.boxes
    tokens = box_tokens(TEXTS["ldm-layout-text"], [])
    assert tokens.shape == (1, 92)
    assert tokens[0, :90].unique().tolist() == [8191]
    assert tokens[0, 90:].tolist() == [0, 90 * 90 - 1]


def test_boxes_as_tokens():
    """A vocabulary of 17 has 4 x 4 cells; 11 tokens are three boxes and the crop."""
    tokens = box_tokens(SMALL, [(5, 0.0, 0.0, 1.0, 1.0), (3, 1 / 3, 0.0, 0.7, 1 / 3)])
    assert tokens.tolist() == [[5, 0, 15, 3, 1, 6, 16, 16, 16, 0, 15]]


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([(1, 0.0, 0.0, 1.0, 1.0)] * 4, "4 boxes are given, but this model reads at most 3"),
        ([(16, 0.0, 0.0, 1.0, 1.0)], "class 16, which must be from 0 to 15"),
        ([(1, 0.5, 0.0, 0.4, 1.0)], "left, top, right and bottom"),
        ([(1, 0.0, -0.1, 0.4, 1.0)], "left, top, right and bottom"),
    ],
)
def test_boxes_that_are_none(boxes, words):
    with pytest.raises(ConfigError, match=words):
        box_tokens(SMALL, boxes)
