import math

import numpy as np
import pytest
import torch
from torchmetrics.image import StructuralSimilarityIndexMeasure

from triptych.metrics.reconstruction import ReconstructionMetrics


def pairs():
    images = torch.rand(6, 3, 20, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images, images + torch.randn(images.shape, generator=torch.Generator().manual_seed(1)) * 0.2


def test_figures_are_means_over_images_whatever_the_batches():
    images, reconstructions = pairs()
    metrics = ReconstructionMetrics(lambda x, y: (x - y).flatten(1).norm(dim=1))
    for start, stop in ((0, 4), (4, 6)):
        metrics.update(images[start:stop], reconstructions[start:stop])
    values = metrics.compute()
    x, y = ((z.clamp(-1, 1).numpy() + 1) / 2 for z in (images, reconstructions))
    each = [-10 * math.log10(np.square(a - b).mean()) for a, b in zip(x, y, strict=True)]
    assert values["psnr"] == pytest.approx(np.mean(each), abs=1e-4)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
    assert values["ssim"] == pytest.approx(float(ssim(torch.tensor(y), torch.tensor(x))), abs=1e-5)
    assert values["l1"] == pytest.approx(2 * np.abs(x - y).mean(), abs=1e-5)
    norms = [2 * np.linalg.norm(a - b) for a, b in zip(x, y, strict=True)]
    assert values["perceptual"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert values["count"] == 6
    expected = ReconstructionMetrics()
    expected.update(images, reconstructions)
    assert "perceptual" not in expected.compute()
    assert expected.compute()["psnr"] == values["psnr"]


def test_psnr_of_equal_images_is_limited_by_8_bits():
    images, _ = pairs()
    metrics = ReconstructionMetrics()
    metrics.update(images, images)
    assert metrics.compute()["psnr"] == pytest.approx(20 * math.log10(510), abs=1e-4)
    assert metrics.compute()["ssim"] == pytest.approx(1, abs=1e-6)
