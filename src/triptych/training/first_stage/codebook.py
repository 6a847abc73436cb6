"""How a VQ first stage's codebook learns: by its gradient or as a moving average, entries that nobody uses revived."""

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
    """What is remembered of a codebook from step to step: `counts` (K,), a moving average of the latents that were
    nearest to each entry in a batch, and `sums` (K, c), of their sums."""

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
        self, net: Autoencoder, z: Latents, learn: bool
    ) -> tuple[Latents, Float[Tensor, ""], dict[str, Tensor]]:
        """The entries nearest to z, with the gradient that passes straight through; the loss of van den Oord et al.
        2017, Equation 3, whose first term is left out with the moving average; and what to log.

        Args:
            learn: move the averages (and with "ema" the entries), and revive dead entries.
        """
        entries, indices = net.quantize(z.float())  # while it is trained, latents have no scale yet
        loss = self.config.commitment * F.mse_loss(z.float(), entries.detach())
        if self.config.update == "gradient":
            loss = loss + F.mse_loss(entries, z.detach().float())
        each = torch.ones_like(indices.flatten(), dtype=torch.int32)
        count = each.new_zeros(len(self.counts)).index_add_(0, indices.flatten(), each)
        used = distributed.sum_over_batch(count.float())
        logs = {"perplexity": perplexity(used), "codes_used": (used > 0).float().mean()}
        if learn:
            logs["codes_revived"] = self._update_averages(net, z.detach().float(), indices, used)
        return z + (entries - z).detach(), loss, logs

    @torch.no_grad()
    def _update_averages(
        self, net: Autoencoder, z: Latents, indices: Int[Tensor, "b h w"], used: Tensor
    ) -> Tensor:
        """N <- d N + (1 - d) n,  m <- d m + (1 - d) sum z,  e = m / N (van den Oord et al. 2017, Appendix A.1)."""
        flat, d = rearrange(z, "b c h w -> (b h w) c"), self.config.decay
        weight = net.codebook.weight
        # What is no number leaves its entry where it is: the step is not made, and the codebook must outlast it.
        flat = torch.where(flat.isfinite(), flat, weight[indices.flatten()].to(flat))
        self.counts.lerp_(used, 1 - d)
        if self.config.update == "ema":
            sums = torch.zeros_like(self.sums).index_add_(0, indices.flatten(), flat)
            self.sums.lerp_(distributed.sum_over_batch(sums), 1 - d)
            # Laplace's rule keeps the counts of rare entries from zero, and their sum.
            total = self.counts.sum()
            counts = (self.counts + 1e-5) / (total + len(self.counts) * 1e-5) * total
            weight.copy_(self.sums / counts[:, None])
        dead = self.counts < self.config.revive_below
        # For all entries, alive or dead: to know how many are dead would be to wait for the device.
        chosen = _random_latents(flat, dead, len(z))
        weight.copy_(torch.where(dead[:, None], chosen.to(weight), weight))
        self.sums.copy_(torch.where(dead[:, None], chosen, self.sums))
        self.counts.masked_fill_(dead, 1.0)
        return dead.float().mean()


def _random_latents(
    flat: Float[Tensor, "n c"], dead: Bool[Tensor, "k"], pictures: int
) -> Float[Tensor, "k c"]:
    """Any latent of a batch for each dead entry: one after another from torch's own stream, which the loop seeds by the
    step, and which is left where it is. Of all processes' where several share the batch, each of which adds those that
    it has to zeros."""
    share, each = distributed.current_shard(), len(flat) // pictures
    whole, first = (len(flat), 0) if share is None else (share.total * each, share.start * each)
    stream = torch.Generator().set_state(torch.get_rng_state())
    drawn = copy_to_device(torch.randint(whole, dead.shape, generator=stream), flat.device)
    at = drawn[(dead.cumsum(0) - 1).clamp(min=0)] - first
    if share is None:
        return flat[at]
    mine = (at >= 0) & (at < len(flat)) & (share.weight > 0)
    return distributed.sum_over_batch(torch.where(mine[:, None], flat[at.clamp(0, len(flat) - 1)], 0.0))
