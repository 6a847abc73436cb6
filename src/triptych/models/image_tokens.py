"""A picture as a prompt: what a ViT or a Swin sees in it, as tokens for cross-attention."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from triptych.model_card import Card
from triptych.models.configs.image_tokens import ImageTokensConfig
from triptych.models.registry import build
from triptych.network import Network


class TokenProjection(Network):
    """Features to tokens, and the token that stands for no picture: the part of `ImageTokens` that learns."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.card = Card()
        self.norm = nn.LayerNorm(channels)
        self.proj = nn.Linear(channels, width)
        self.null = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.null, std=0.02)

    def blocks(self) -> list[nn.Module]:
        return []

    def forward(self, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b n d"]:
        return self.proj(self.norm(features))

    def nothing(self, tokens: int) -> Float[Tensor, "1 n d"]:
        """The context of no picture, as long as a picture's."""
        return self.null.expand(1, tokens, -1)


class ImageTokens(Network):
    """A backbone and what projects the cells of its last map.

    ```python
    context = ldm.text(images)                       # (B, 3, H, W) in [-1, 1] -> (B, rows * columns, D)
    nothing = ldm.text.nothing(context.shape[1])     # what guidance is measured against
    ```
    """

    def __init__(self, config: ImageTokensConfig):
        super().__init__()
        self.config = config
        self.card = Card()
        self.backbone: Any = build(config.backbone)
        self.projection = TokenProjection(self.backbone.channels[-1], config.width)

    def blocks(self) -> list[nn.Module]:
        return []

    def nothing(self, tokens: int) -> Float[Tensor, "1 n d"]:
        """The context of no picture, as long as a picture's."""
        return self.projection.nothing(tokens)

    def cells(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n k"]:
        """The cells of the last map, of images that are normalised as the backbone's are."""
        return rearrange(self.backbone.features(images)[-1], "b k h w -> b (h w) k")

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """The context of images in [-1, 1], of any size."""
        config = self.config
        images = nn.functional.interpolate(images, size=config.size, mode="bicubic", antialias=True)
        mean, std = (images.new_tensor(v)[:, None, None] for v in (config.mean, config.std))
        return self.projection(self.cells(((images / 2 + 0.5).clamp(0, 1) - mean) / std))
