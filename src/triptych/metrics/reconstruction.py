"""PSNR, SSIM, mean absolute error and a perceptual distance of reconstructions."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from triptych.metrics.torchmetrics_import import Metric, dim_zero_cat, structural_similarity_index_measure

Images = Float[Tensor, "b 3 h w"]


class ReconstructionMetrics(Metric):
    """Accumulates images and their reconstructions, both in [-1, 1]; `compute()` returns means over images.

    Reconstructions are clamped first. PSNR is in dB, computed for each image and limited to 54 dB, that of an error of
    half a level of 255. SSIM (Wang et al. 2004) is that of torchmetrics, with a Gaussian window of 11 pixels.

    Args:
        distance: distance of each image and its reconstruction, for the metric "perceptual"; None omits the metric.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    values: list[Tensor]

    def __init__(self, distance: Callable[[Images, Images], Float[Tensor, "b"]] | None = None) -> None:
        super().__init__()
        self.distance = [distance]  # in a list, so that a module is not registered as a submodule
        self.add_state("values", default=[], dist_reduce_fx="cat")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return ("psnr", "ssim", "l1") + (("perceptual",) if self.distance[0] is not None else ())

    def update(self, images: Images, reconstructions: Images) -> None:
        """Add a batch."""
        images, reconstructions = images.float(), reconstructions.float().clamp(-1, 1)
        x, y = (images + 1) / 2, (reconstructions + 1) / 2
        error = (x - y).square().mean((1, 2, 3)).clamp(min=(0.5 / 255) ** 2)
        ssim = structural_similarity_index_measure(y, x, data_range=1.0, reduction="none")
        assert isinstance(ssim, Tensor)
        rows = [-10 * error.log10(), ssim.reshape(len(x)), (images - reconstructions).abs().mean((1, 2, 3))]
        if self.distance[0] is not None:
            rows.append(self.distance[0](images, reconstructions).float())
        self.values.append(torch.stack(rows, 1).cpu())

    def compute(self) -> dict[str, float]:
        """Return the mean of each metric, and "count", the number of images."""
        values = dim_zero_cat(self.values)
        means = values.double().mean(0).tolist()
        return {**dict(zip(self.names, means, strict=True)), "count": len(values)}
