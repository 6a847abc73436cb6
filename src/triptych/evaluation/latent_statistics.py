"""Scale and shift that normalize the latents of a first stage, measured on data (Rombach et al. 2022, Appendix G)."""

import functools
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from triptych.data.augment.batch import preprocess_batch
from triptych.data.example import Batch
from triptych.distributed import ProcessGroup
from triptych.models.autoencoder import Autoencoder, FirstStage

LatentNormalization = tuple[float | tuple[float, ...], float | tuple[float, ...]]


class LatentMoments:
    """Accumulates outputs of an encoder; `compute()` returns the `scale` and `shift` of its config, with which latents
    have mean 0 and variance 1.

    The variance is that of latents drawn from the posterior, in closed form: the variance of the means plus the mean
    of the variances. For VQ, latents are those before quantization. The present scale and shift are ignored.

    Args:
        net: the autoencoder; only its type and its config are used.
    """

    def __init__(self, net: FirstStage) -> None:
        self.has_variance = isinstance(net, Autoencoder) and net.config.regularization == "kl"
        self.count, self.total, self.squares = 0, torch.zeros(()).double(), torch.zeros(()).double()

    @torch.no_grad()
    def update(self, embedded: Float[Tensor, "b moments h w"]) -> None:
        """Add what `net.embed` returned for a batch."""
        z, variance = embedded.float(), torch.zeros(())
        if self.has_variance:
            z, logvar = Autoencoder.moments(z)
            variance = logvar.exp().double().sum((0, 2, 3)).cpu()
        z = z.double()
        self.total = self.total + z.sum((0, 2, 3)).cpu()
        self.squares = self.squares + z.square().sum((0, 2, 3)).cpu() + variance
        self.count += len(z) * z.shape[2] * z.shape[3]

    def pool(self, group: ProcessGroup) -> None:
        """Add up what all processes have accumulated."""
        sums = group.all_gather((self.count, self.total, self.squares))
        self.count = sum(count for count, _, _ in sums)
        self.total = functools.reduce(torch.add, [total for _, total, _ in sums])
        self.squares = functools.reduce(torch.add, [squares for _, _, squares in sums])

    def compute(self, per_channel: bool = False) -> LatentNormalization:
        """Return scale and shift: one number each, or with `per_channel` one for each channel."""
        mean, square = self.total / self.count, self.squares / self.count
        if not per_channel:
            mean, square = mean.mean(), square.mean()
        scale = (square - mean.square()).clamp(min=1e-12).rsqrt()
        if per_channel:
            return tuple(scale.tolist()), tuple(mean.tolist())
        return float(scale), float(mean)


@torch.no_grad()
def measure_latents(
    net: FirstStage, loader: Iterable[Batch], per_channel: bool = False, max_images: int | None = None
) -> LatentNormalization:
    """Return `scale` and `shift` of a first stage's latents over data; see `LatentMoments`.

    Args:
        net: the first stage, on its device; it is set to evaluation mode.
        loader: batches of uint8 images, as `make_loader(..., train=False)` yields them.
        per_channel: measure each channel separately.
        max_images: number of images to stop at; None is all.
    """
    net.eval()
    device, preprocess = next(net.parameters()).device, net.card.preprocess
    moments, count = LatentMoments(net), 0
    for batch in loader:
        images = batch["image"] if max_images is None else batch["image"][: max_images - count]
        normalized = preprocess_batch(
            images.to(device), preprocess.mean, preprocess.std, preprocess.background
        )
        moments.update(net.embed(normalized))
        count += len(images)
        if max_images is not None and count >= max_images:
            break
    return moments.compute(per_channel)
