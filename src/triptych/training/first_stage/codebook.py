"""Training of a codebook, by its gradient or as a moving average; unused entries are reset."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from triptych import distributed
from triptych.device import copy_to_device
from triptych.evaluation.reconstruction import perplexity
from triptych.models.autoencoder import Autoencoder
from triptych.training.configs.first_stage import CodebookConfig

Latents = Float[Tensor, "b c h w"]


class Codebook(nn.Module):
    """Moving averages of a codebook: `counts` (K,), the number of latents of a batch that are nearest to each entry,
    and `sums` (K, c), the sum of these latents.

    Args:
        net: the autoencoder with the codebook.
        config: loss weights, decay, and when to reset entries.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, net: Autoencoder, config: CodebookConfig):
        super().__init__()
        self.config = config
        entries = net.codebook.weight
        self.register_buffer("counts", torch.ones(len(entries), device=entries.device))
        self.register_buffer("sums", entries.detach().clone())
        if config.update == "ema":
            entries.requires_grad_(False)

    def loss(
        self, net: Autoencoder, z: Latents, train: bool
    ) -> tuple[Latents, Float[Tensor, ""], dict[str, Tensor]]:
        """Return the entries nearest to z, with a straight-through gradient; the loss; and values for the log.

        The loss is that of van den Oord et al. 2017, Equation 3; with the moving average its first term is left out.

        Args:
            train: update the averages (with "ema" also the entries), and reset unused entries.
        """
        entries, indices = net.quantize(z.float())  # latents in training have no scale yet
        loss = self.config.commitment * F.mse_loss(z.float(), entries.detach())
        if self.config.update == "gradient":
            loss = loss + F.mse_loss(entries, z.detach().float())
        ones = torch.ones_like(indices.flatten(), dtype=torch.int32)
        count = ones.new_zeros(len(self.counts)).index_add_(0, indices.flatten(), ones)
        used = distributed.sum_over_batch(count.float())
        logs = {"perplexity": perplexity(used), "codes_used": (used > 0).float().mean()}
        if train:
            logs["codes_revived"] = self._update_averages(net, z.detach().float(), indices, used)
        return z + (entries - z).detach(), loss, logs

    @torch.no_grad()
    def _update_averages(
        self, net: Autoencoder, z: Latents, indices: Int[Tensor, "b h w"], used: Tensor
    ) -> Tensor:
        """N <- d N + (1 - d) n,  m <- d m + (1 - d) sum z,  e = m / N (van den Oord et al. 2017, Appendix A.1)."""
        flat, d = rearrange(z, "b c h w -> (b h w) c"), self.config.decay
        weight = net.codebook.weight
        # A NaN latent leaves its entry unchanged: the step will be skipped or stop the run, but the codebook stays.
        flat = torch.where(flat.isfinite(), flat, weight[indices.flatten()].to(flat))
        self.counts.lerp_(used, 1 - d)
        if self.config.update == "ema":
            sums = torch.zeros_like(self.sums).index_add_(0, indices.flatten(), flat)
            self.sums.lerp_(distributed.sum_over_batch(sums), 1 - d)
            # Laplace smoothing keeps the counts of rare entries above zero, and the total unchanged.
            total = self.counts.sum()
            counts = (self.counts + 1e-5) / (total + len(self.counts) * 1e-5) * total
            weight.copy_(self.sums / counts[:, None])
        dead = self.counts < self.config.revive_below
        # For all entries, since the number of dead ones is not known without waiting for the device.
        chosen = _random_latents(flat, dead, len(z))
        weight.copy_(torch.where(dead[:, None], chosen.to(weight), weight))
        self.sums.copy_(torch.where(dead[:, None], chosen, self.sums))
        self.counts.masked_fill_(dead, 1.0)
        return dead.float().mean()


def _random_latents(
    flat: Float[Tensor, "n c"], dead: Bool[Tensor, "k"], num_images: int
) -> Float[Tensor, "k c"]:
    """Return a random latent of the batch for each dead entry.

    They are drawn from a copy of torch's global RNG, which the training loop seeds by the step. If several processes
    share the batch, latents are drawn from all of it: each process contributes those that it has, and zeros.

    Args:
        flat: latents of this process.
        dead: which entries are dead; the values returned for others are arbitrary.
        num_images: number of images in this process's part of the batch.
    """
    shard, latents_per_image = distributed.current_shard(), len(flat) // num_images
    total, first = len(flat), 0
    if shard is not None:
        total, first = shard.total * latents_per_image, shard.start * latents_per_image
    generator = torch.Generator().set_state(torch.get_rng_state())
    drawn = copy_to_device(torch.randint(total, dead.shape, generator=generator), flat.device)
    index = drawn[(dead.cumsum(0) - 1).clamp(min=0)] - first
    if shard is None:
        return flat[index]
    own = (index >= 0) & (index < len(flat)) & (shard.weight > 0)
    return distributed.sum_over_batch(torch.where(own[:, None], flat[index.clamp(0, len(flat) - 1)], 0.0))
