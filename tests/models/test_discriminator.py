import pytest
import torch

from triptych.models.discriminator import Discriminator


def test_the_published_one_has_2765633_parameters():
    assert sum(p.numel() for p in Discriminator().parameters()) == 2_765_633


@pytest.mark.parametrize(("layers", "seen"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_so_many_pixels(layers, seen):
    net = Discriminator(8, layers).eval()
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = net(images)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    assert images.grad is not None
    rows = images.grad[0].abs().sum((0, 2)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == seen
