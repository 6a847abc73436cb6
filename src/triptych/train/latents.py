"""The scale and shift of a first stage's latents, measured over data (Rombach et al. 2022, Appendix G)."""

from collections.abc import Iterable
from typing import Any

import torch

from triptych.data.augment import prepare
from triptych.models.autoencoder import Autoencoder, FirstStage

Normalisation = tuple[float | tuple[float, ...], float | tuple[float, ...]]


@torch.no_grad()
def measure_latents(
    net: FirstStage, loader: Iterable[dict[str, Any]], per_channel: bool = False, most: int | None = None
) -> Normalisation:
    """`scale` and `shift` for the config of a first stage, with which its latents have mean 0 and variance 1.

    The variance is that of latents drawn from the posterior, in closed form: that of the means plus the mean of the
    variances. VQ's are the latents before quantisation. Whatever the config has already is not looked at.

    Args:
        loader: batches of uint8 images, as `make_loader(..., train=False)` gives them.
        per_channel: of each channel by itself, instead of one number for all.
        most: images that suffice; none means all.
    """
    net.eval()
    device, how = next(net.parameters()).device, net.card.preprocess
    count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
    seen = 0
    for batch in loader:
        images = batch["image"] if most is None else batch["image"][: most - seen]
        images = prepare(images.to(device), how.mean, how.std, how.background)
        moments = net.embed(images).float()
        spread = torch.zeros(())
        if isinstance(net, Autoencoder) and net.config.kind == "kl":
            moments, logvar = net.moments(moments)
            spread = logvar.exp().double().sum((0, 2, 3)).cpu()
        z = moments.double()
        total = total + z.sum((0, 2, 3)).cpu()
        squares = squares + z.square().sum((0, 2, 3)).cpu() + spread
        count += len(z) * z.shape[2] * z.shape[3]
        seen += len(images)
        if most is not None and seen >= most:
            break
    mean, square = total / count, squares / count
    if not per_channel:
        mean, square = mean.mean(), square.mean()
    scale = (square - mean.square()).clamp(min=1e-12).rsqrt()
    if per_channel:
        return tuple(scale.tolist()), tuple(mean.tolist())
    return float(scale), float(mean)
