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
    images, made = pairs()
    metrics = ReconstructionMetrics(lambda x, y: (x - y).flatten(1).norm(dim=1))
    for start, stop in ((0, 4), (4, 6)):
        metrics.update(images[start:stop], made[start:stop])
    found = metrics.compute()
    x, y = ((z.clamp(-1, 1).numpy() + 1) / 2 for z in (images, made))
    each = [-10 * math.log10(np.square(a - b).mean()) for a, b in zip(x, y, strict=True)]
    assert found["psnr"] == pytest.approx(np.mean(each), abs=1e-4)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
    assert found["ssim"] == pytest.approx(float(ssim(torch.tensor(y), torch.tensor(x))), abs=1e-5)
    assert found["l1"] == pytest.approx(2 * np.abs(x - y).mean(), abs=1e-5)
    norms = [2 * np.linalg.norm(a - b) for a, b in zip(x, y, strict=True)]
    assert found["perceptual"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert found["count"] == 6
    whole = ReconstructionMetrics()
    whole.update(images, made)
    assert "perceptual" not in whole.compute()
    assert whole.compute()["psnr"] == found["psnr"]


def test_equal_pictures_are_as_near_as_levels_can_tell():
    images, _ = pairs()
    metrics = ReconstructionMetrics()
    metrics.update(images, images)
    assert metrics.compute()["psnr"] == pytest.approx(20 * math.log10(510), abs=1e-4)
    assert metrics.compute()["ssim"] == pytest.approx(1, abs=1e-6)
