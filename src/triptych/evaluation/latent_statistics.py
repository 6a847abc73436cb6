"""The scale and shift of a first stage's latents, measured over data (Rombach et al. 2022, Appendix G)."""

import functools
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from triptych.data.augment.batch import preprocess_batch
from triptych.data.example import Batch
from triptych.distributed import ProcessGroup
from triptych.models.autoencoder import Autoencoder, FirstStage

Normalisation = tuple[float | tuple[float, ...], float | tuple[float, ...]]


class LatentMoments:
    """Accumulates what the encoder of `net` ends in; `compute()` gives `scale` and `shift` for its config, with which
    its latents have mean 0 and variance 1.

    The variance is that of latents drawn from the posterior, in closed form: that of the means plus the mean of the
    variances. VQ's are the latents before quantisation. Whatever the config has already is not looked at.
    """

    def __init__(self, net: FirstStage) -> None:
        self.spreads = isinstance(net, Autoencoder) and net.config.regularization == "kl"
        self.count, self.total, self.squares = 0, torch.zeros(()).double(), torch.zeros(()).double()

    @torch.no_grad()
    def update(self, embedded: Float[Tensor, "b moments h w"]) -> None:
        """Add what `net.embed` made of a batch."""
        z, spread = embedded.float(), torch.zeros(())
        if self.spreads:
            z, logvar = Autoencoder.moments(z)
            spread = logvar.exp().double().sum((0, 2, 3)).cpu()
        z = z.double()
        self.total = self.total + z.sum((0, 2, 3)).cpu()
        self.squares = self.squares + z.square().sum((0, 2, 3)).cpu() + spread
        self.count += len(z) * z.shape[2] * z.shape[3]

    def pool(self, group: ProcessGroup) -> None:
        """Add up what all processes have accumulated."""
        every = group.all_gather((self.count, self.total, self.squares))
        self.count = sum(count for count, _, _ in every)
        self.total = functools.reduce(torch.add, [total for _, total, _ in every])
        self.squares = functools.reduce(torch.add, [squares for _, _, squares in every])

    def compute(self, per_channel: bool = False) -> Normalisation:
        """Scale and shift; of each channel by itself if asked, instead of one number for all."""
        mean, square = self.total / self.count, self.squares / self.count
        if not per_channel:
            mean, square = mean.mean(), square.mean()
        scale = (square - mean.square()).clamp(min=1e-12).rsqrt()
        if per_channel:
            return tuple(scale.tolist()), tuple(mean.tolist())
        return float(scale), float(mean)


@torch.no_grad()
def measure_latents(
    net: FirstStage, loader: Iterable[Batch], per_channel: bool = False, most: int | None = None
) -> Normalisation:
    """`scale` and `shift` of a first stage's latents over data; see `LatentMoments`.

    Args:
        loader: batches of uint8 images, as `make_loader(..., train=False)` gives them.
        per_channel: of each channel by itself, instead of one number for all.
        most: images that suffice; none means all.
    """
    net.eval()
    device, how = next(net.parameters()).device, net.card.preprocess
    found, seen = LatentMoments(net), 0
    for batch in loader:
        images = batch["image"] if most is None else batch["image"][: most - seen]
        found.update(net.embed(preprocess_batch(images.to(device), how.mean, how.std, how.background)))
        seen += len(images)
        if most is not None and seen >= most:
            break
    return found.compute(per_channel)
