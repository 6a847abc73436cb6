"""SimMIM (Xie et al. 2022, Figure 1): a backbone that reads masked images and a linear head that predicts the masked
pixels."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from triptych.layers.initialization import initialize_weights
from triptych.layers.patch import PatchMask
from triptych.network import Network


class MaskedImageModel(Network):
    """Masked image modeling with any backbone whose `features` take `masked` patches.

    Args:
        backbone: a ViT or a Swin, without its head.
    """

    def __init__(self, backbone: Network):
        super().__init__()
        self.config, self.card, self.backbone = backbone.config, backbone.card, backbone
        patch: Any = backbone.patch
        self.stride, self.inputs = backbone.strides[-1], backbone.config.in_channels
        self.mask_token = nn.Parameter(torch.empty(patch.proj.out_channels))
        self.decoder = nn.Conv2d(backbone.channels[-1], self.stride**2 * self.inputs, 1)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        initialize_weights(self.decoder)

    def blocks(self) -> list[nn.Module]:
        return self.backbone.blocks()

    def forward(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b h w"]
    ) -> Float[Tensor, "b c h w"]:
        """Return the pixels of normalized `images`, predicted without those where `mask` is true.

        The mask covers full patches, whose embeddings are replaced by the mask token. Their pixels are set to 0 as
        well, since the stem of a hybrid would see them.
        """
        hidden = images.masked_fill(mask[:, None], 0.0)
        last = self.backbone.features(hidden, masked=PatchMask(mask, self.mask_token))[-1]
        pixels = rearrange(
            self.decoder(last),
            "b (c p q) h w -> b c (h p) (w q)",
            p=self.stride,
            q=self.stride,
            c=self.inputs,
        )
        return pixels[..., : images.shape[-2], : images.shape[-1]]
