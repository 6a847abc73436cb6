"""TAESD (Ollin Boer Bohan 2023): a first stage small enough for previews, on the latents of a large one."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.layers.resnet import Conv
from triptych.models.autoencoder import FirstStage, Images, Latents
from triptych.models.configs.autoencoder import TinyAutoencoderConfig


class TinyBlock(nn.Module):
    """Three convolutions with ReLU and a skip connection, without a norm."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = Conv(width, width), Conv(width, width), Conv(width, width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        h = F.relu(self.conv1(x))
        h = F.relu(self.conv2(h))
        return F.relu(self.conv3(h) + x)


class TinyAutoencoder(FirstStage):
    """A small autoencoder: `encode` approximates the scaled latents of the large first stage, `decode` takes them."""

    config: TinyAutoencoderConfig

    def __init__(self, config: TinyAutoencoderConfig):
        super().__init__(config)
        w, c = config.base_channels, config.latent_channels
        self.encoder = nn.Sequential(Conv(config.in_channels, w), TinyBlock(w))
        self.decoder = nn.Sequential(Conv(c, w), nn.ReLU())
        for _ in range(config.num_levels - 1):
            self.encoder.append(Conv(w, w, stride=2, bias=False))
            self.encoder.extend(TinyBlock(w) for _ in range(config.num_res_blocks))
            self.decoder.extend(TinyBlock(w) for _ in range(config.num_res_blocks))
            self.decoder.extend([nn.Upsample(scale_factor=2), Conv(w, w, bias=False)])
        self.encoder.append(Conv(w, c))
        self.decoder.extend([TinyBlock(w), Conv(w, config.out_channels)])
        self.initialize()

    def blocks(self) -> list[nn.Module]:
        """Return residual blocks in order, encoder first."""
        return [part for part in self.modules() if isinstance(part, TinyBlock)]

    def embed(self, images: Images) -> Latents:
        """Return the latents of images in [-1, 1]; the network's own range is [0, 1]."""
        return self.encoder(images / 2 + 0.5)

    def render(self, z: Latents) -> Images:
        """Return images in about [-1, 1]. Latents are first squashed into [-3, 3] by tanh."""
        return self.decoder(3 * torch.tanh(z / 3)) * 2 - 1
