import pytest
import torch
import torch.nn.functional as F

import triptych as tp
from triptych.evaluation.perceptual_distance import FeatureDistance


def spread(x, y):
    """LPIPS's term of one pair of maps: unit length at each place, squared differences, summed over channels."""
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    return (x - y).square().sum(1).mean((1, 2))


def test_of_a_swin_all_maps_are_compared_as_its_card_says():
    torch.manual_seed(0)
    net = tp.create("swin-emoji", image_size=32).eval()
    images, others = torch.rand(2, 2, 3, 48, 48) * 2 - 1
    how = net.card.preprocess
    fed = []
    for batch in (images, others):
        x = F.interpolate((batch + 1) / 2, size=how.size, mode="bicubic", antialias=True)
        fed.append((x - torch.tensor(how.mean)[:, None, None]) / torch.tensor(how.std)[:, None, None])
    pairs = list(zip(*(net.features(x) for x in fed), strict=True))
    expected = torch.stack([spread(x, y) for x, y in pairs]).mean(0)
    torch.testing.assert_close(FeatureDistance(net)(images, others), expected)


def test_of_a_plain_vit_two_blocks_are_compared_and_the_rest_is_left_out():
    torch.manual_seed(0)
    net = tp.create("vit-ti16", image_size=32, depth=8, embed_dim=24, mlp_ratio=2.0, num_classes=3).eval()
    images, others = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    how = net.card.preprocess
    normal = [((x + 1) / 2 - torch.tensor(how.mean)[:, None, None]) / torch.tensor(how.std)[:, None, None]
              for x in (images, others)]  # fmt: skip
    one, other = (net.features(x, blocks=(1, 3)) for x in normal)
    expected = torch.stack([spread(x, y) for x, y in zip(one, other, strict=True)]).mean(0)
    distance = FeatureDistance(net)
    torch.testing.assert_close(distance(images, others), expected)
    assert len(distance.net.encoder) == 4


def test_the_shipped_vit_tells_a_blur_from_noise_of_the_same_error():
    """What squared error cannot: pixels are as far off, edges are not."""
    distance = FeatureDistance(tp.load("vit-emoji"))
    assert len(distance.features(torch.zeros(1, 3, 64, 64))) == 4  # three steps of the stem, one block
    yard = torch.linspace(-1, 1, 64)
    picture = (yard[:, None] * 9).sin().sign().expand(1, 3, 64, 64) * 0.6
    shifted = picture + 0.1
    noisy = picture + torch.randn(picture.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    near, far = distance(picture, shifted), distance(picture, noisy)
    assert distance(picture, picture) == pytest.approx(0, abs=1e-5)
    assert far > 3 * near > 0
    made = picture.clone().requires_grad_()
    distance(made + 0.01 * noisy, picture).sum().backward()
    assert made.grad is not None
    assert made.grad.abs().max() > 0
    assert all(p.grad is None for p in distance.parameters())
