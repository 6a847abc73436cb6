"""The feed-forward blocks of a transformer encoder."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.kernels.linear import linear
from triptych.layers.residual import Dropout


class Mlp(nn.Module):
    """Two linear layers with a GELU between them (ViT, Section 3.1).

    `approximate` is "tanh" for checkpoints trained in Flax, where this is the default form of `gelu`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        approximate: Literal["none", "tanh"] = "none",
        dropout: float = 0.0,
        bias: bool = True,
    ):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.approximate: Literal["none", "tanh"] = approximate
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        x = self.dropout(linear(x, self.fc1.weight, self.fc1.bias, gelu=self.approximate))
        return self.dropout(linear(x, self.fc2.weight, self.fc2.bias))


class QuickMlp(Mlp):
    """The MLP with x sigmoid(1.702 x) in place of GELU, as in CLIP."""

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        x = linear(x, self.fc1.weight, self.fc1.bias)
        x = self.dropout(x * torch.sigmoid(1.702 * x))
        return self.dropout(linear(x, self.fc2.weight, self.fc2.bias))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x): Shazeer 2020, Equation 6, with biases as in DINOv2 and DINOv3."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.gate = nn.Linear(dim, hidden)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))
