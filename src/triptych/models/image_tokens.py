"""An image as a prompt: features of a ViT or a Swin as tokens for cross-attention."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from triptych.model_card import ModelCard
from triptych.models.configs.image_tokens import ImageTokensConfig
from triptych.models.registry import build
from triptych.network import Network


class TokenProjection(Network):
    """The trained part of `ImageTokens`: a projection of features to tokens, and the token for no image."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.card = ModelCard()
        self.norm = nn.LayerNorm(channels)
        self.proj = nn.Linear(channels, width)
        self.null = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.null, std=0.02)

    def blocks(self) -> list[nn.Module]:
        return []

    def forward(self, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b n d"]:
        return self.proj(self.norm(features))

    def null_tokens(self, tokens: int) -> Float[Tensor, "1 n d"]:
        """Return the context without an image, of as many tokens as an image has."""
        return self.null.expand(1, tokens, -1)


class ImageTokens(Network):
    """A backbone and a projection of the cells of its last map.

    ```python
    context = ldm.text_encoder(images)                           # (B, 3, H, W) in [-1, 1] -> (B, rows * columns, D)
    null_tokens = ldm.text_encoder.null_tokens(context.shape[1])     # the unconditional context of guidance
    ```
    """

    def __init__(self, config: ImageTokensConfig):
        super().__init__()
        self.config = config
        self.card = ModelCard()
        self.backbone: Any = build(config.backbone)
        self.projection = TokenProjection(self.backbone.channels[-1], config.embed_dim)

    def blocks(self) -> list[nn.Module]:
        return []

    def null_tokens(self, tokens: int) -> Float[Tensor, "1 n d"]:
        """Return the context without an image, of as many tokens as an image has."""
        return self.projection.null_tokens(tokens)

    def cells(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n k"]:
        """Return the cells of the last map, of images normalized for the backbone."""
        return rearrange(self.backbone.features(images)[-1], "b k h w -> b (h w) k")

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Return the context of images in [-1, 1], of any size."""
        config = self.config
        images = nn.functional.interpolate(images, size=config.image_size, mode="bicubic", antialias=True)
        mean, std = (images.new_tensor(v)[:, None, None] for v in (config.mean, config.std))
        return self.projection(self.cells(((images / 2 + 0.5).clamp(0, 1) - mean) / std))
