"""Embeddings of a diffusion process's time."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn


def sinusoids(
    t: Shaped[Tensor, "b"], dim: int, longest: float = 10_000.0, closed: bool = False
) -> Float[Tensor, "b {dim}"]:
    """Return cos(t w_i), then sin(t w_i), with w_i = longest^(-i / (dim / 2)) for i from 0: Ho et al. 2020, Appendix B,
    after Vaswani et al. 2017, Section 3.5.

    Always fp32, because bf16 rounds 999 to 1000. Cosines come first, as in every published UNet; an odd `dim` ends in
    0.

    Args:
        t: times in steps of the process (0 to 1000); may be fractional.
        dim: channels of the embedding.
        longest: 2 pi of it is the longest period.
        closed: whether the last w is 1 / longest: -i / (dim / 2 - 1) in the exponent.
    """
    half = dim // 2
    # In the published order of operations: at t = 999 another rounding of w changes the fifth decimal.
    w = torch.exp(-math.log(longest) * torch.arange(half, device=t.device, dtype=torch.float32) / (half - closed))
    angles = t.float()[:, None] * w                                                      # b dim/2
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class TimeEmbedding(nn.Module):
    """Sinusoids of the time, or a given vector, through two linear layers with a SiLU between them."""

    def __init__(self, inputs: int, dim: int, closed: bool = False):
        super().__init__()
        self.inputs, self.closed = inputs, closed
        self.fc1 = nn.Linear(inputs, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Shaped[Tensor, "b *inputs"]) -> Float[Tensor, "b dim"]:
        x = sinusoids(t, self.inputs, closed=self.closed) if t.ndim == 1 else t
        return self.fc2(F.silu(self.fc1(x.to(self.fc1.weight.dtype))))
