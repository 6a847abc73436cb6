"""SimMIM (Xie et al. 2022, Figure 1): a backbone that sees masked patches, a linear head that guesses their pixels."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from triptych.layers.initialization import fill
from triptych.network import Network


class MaskedImageModel(Network):
    """Masked pre-training of any backbone that has a `patch` embedding.

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
        fill(self.decoder)

    def blocks(self) -> list[nn.Module]:
        return self.backbone.blocks()

    def forward(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b h w"]
    ) -> Float[Tensor, "b c h w"]:
        """The pixels of normalised `images`, guessed without those where `mask` is true.

        The mask is of whole patches; the token stands in their place. Their pixels are set to 0 as well, or the stem of
        a hybrid would see them.
        """

        def hide(_module: nn.Module, _inputs: Any, x: Tensor) -> Tensor:
            hidden = F.interpolate(mask[:, None].to(x.dtype), size=x.shape[-2:], mode="nearest")
            return x * (1 - hidden) + self.mask_token.to(x.dtype)[:, None, None] * hidden

        patch: Any = self.backbone.patch
        hook = patch.register_forward_hook(hide)
        try:
            last = self.backbone.features(images.masked_fill(mask[:, None], 0.0))[-1]
        finally:
            hook.remove()
        pixels = rearrange(
            self.decoder(last),
            "b (c p q) h w -> b c (h p) (w q)",
            p=self.stride,
            q=self.stride,
            c=self.inputs,
        )
        return pixels[..., : images.shape[-2], : images.shape[-1]]
