import pytest
import torch
import torch.nn.functional as F

import triptych as tp
from triptych.evaluation.perceptual_distance import FeatureDistance


def map_distance(x, y):
    """The term of LPIPS for a pair of maps: scale to unit length at each position, sum squared differences."""
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    return (x - y).square().sum(1).mean((1, 2))


def test_all_maps_of_a_swin_are_compared():
    torch.manual_seed(0)
    net = tp.create("swin-emoji", image_size=32).eval()
    images, others = torch.rand(2, 2, 3, 48, 48) * 2 - 1
    preprocess = net.card.preprocess
    inputs = []
    for batch in (images, others):
        x = F.interpolate((batch + 1) / 2, size=preprocess.size, mode="bicubic", antialias=True)
        inputs.append(
            (x - torch.tensor(preprocess.mean)[:, None, None]) / torch.tensor(preprocess.std)[:, None, None]
        )
    pairs = list(zip(*(net.features(x) for x in inputs), strict=True))
    expected = torch.stack([map_distance(x, y) for x, y in pairs]).mean(0)
    torch.testing.assert_close(FeatureDistance(net)(images, others), expected)


def test_two_blocks_of_a_plain_vit_are_compared_and_later_ones_removed():
    torch.manual_seed(0)
    net = tp.create("vit-ti16", image_size=32, depth=8, embed_dim=24, mlp_ratio=2.0, num_classes=3).eval()
    images, others = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    preprocess = net.card.preprocess
    inputs = [((x + 1) / 2 - torch.tensor(preprocess.mean)[:, None, None]) / torch.tensor(preprocess.std)[:, None, None]
              for x in (images, others)]  # fmt: skip
    one, other = (net.features(x, blocks=(1, 3)) for x in inputs)
    expected = torch.stack([map_distance(x, y) for x, y in zip(one, other, strict=True)]).mean(0)
    distance = FeatureDistance(net)
    torch.testing.assert_close(distance(images, others), expected)
    assert len(distance.net.encoder) == 4


def test_the_shipped_vit_weighs_noise_more_than_an_offset_of_the_same_error():
    """The squared error of both is the same."""
    distance = FeatureDistance(tp.load("vit-emoji"))
    assert len(distance.features(torch.zeros(1, 3, 64, 64))) == 4  # three steps of the stem, one block
    positions = torch.linspace(-1, 1, 64)
    image = (positions[:, None] * 9).sin().sign().expand(1, 3, 64, 64) * 0.6
    shifted = image + 0.1
    noisy = image + torch.randn(image.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    near, far = distance(image, shifted), distance(image, noisy)
    assert distance(image, image) == pytest.approx(0, abs=1e-5)
    assert far > 3 * near > 0
    changed = image.clone().requires_grad_()
    distance(changed + 0.01 * noisy, image).sum().backward()
    assert changed.grad is not None
    assert changed.grad.abs().max() > 0
    assert all(p.grad is None for p in distance.parameters())
