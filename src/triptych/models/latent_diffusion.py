"""A latent diffusion model (Rombach et al. 2022, Figure 3): a container of its parts."""

from dataclasses import replace
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from triptych.diffusion.inpainting import concat_channels
from triptych.diffusion.process import Denoiser, Process, network_denoiser
from triptych.errors import ConfigError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.autoencoder import Autoencoder, FirstStage
from triptych.models.configs.autoencoder import AutoencoderConfig
from triptych.models.configs.image_tokens import ImageTokensConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.text import TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.dit import DiT
from triptych.models.image_tokens import ImageTokens
from triptych.models.spatial_conditions import MapEncoder
from triptych.models.text import ClassToken, TextEncoder
from triptych.models.tiny_autoencoder import TinyAutoencoder
from triptych.models.unet import UNet
from triptych.network import Network

_HALF = (0.5, 0.5, 0.5)  # images are in [-1, 1]


class LatentDiffusion(Network):
    """An autoencoder (perceptual compression), a UNet or DiT on its latents (semantic compression), an encoder of the
    prompt, and the diffusion process. `network` is the UNet or DiT.

    ```python
    context = ldm.text_encoder(["a red apple"])
    denoise = ldm.denoiser(context)            # (x, t) -> x0, as every sampler takes it
    images = ldm.autoencoder.decode(latents)
    ```
    """

    def __init__(self, config: LatentDiffusionConfig):
        super().__init__()
        self._config = config
        self.card = ModelCard(preprocess=Preprocess(size=config.image_size, mean=_HALF, std=_HALF))
        known = isinstance(config.autoencoder, AutoencoderConfig)
        self.autoencoder: FirstStage = (Autoencoder if known else TinyAutoencoder)(config.autoencoder)  # type: ignore
        unet = isinstance(config.network, UNetConfig)
        self.network: UNet | DiT = (UNet if unet else DiT)(config.network)  # type: ignore[arg-type]
        self.text_encoder: TextEncoder | ClassToken | ImageTokens | None = None
        if isinstance(config.text_encoder, TextConfig):
            self.text_encoder = TextEncoder(config.text_encoder)
        elif isinstance(config.text_encoder, ImageTokensConfig):
            self.text_encoder = ImageTokens(config.text_encoder)
        elif config.text_encoder is not None:
            self.text_encoder = ClassToken(config.text_encoder)
        self.semantic_map = None if config.semantic_map is None else MapEncoder(config.semantic_map)
        self.process = Process(config.process)

    @property
    def config(self) -> LatentDiffusionConfig:  # type: ignore[override]
        """The config of the model, including tokens added to the text encoder (textual inversion)."""
        if self.text_encoder is not None and self.text_encoder.config != self._config.text_encoder:
            self._config = replace(self._config, text_encoder=self.text_encoder.config)
        return self._config

    @config.setter
    def config(self, config: LatentDiffusionConfig) -> None:
        self._config = config

    @property
    def unet(self) -> UNet | DiT:
        """The denoising network under its usual name."""
        return self.network

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the denoising network, which is what is trained."""
        return self.network.blocks()

    def replace_head(self, num_classes: int, head: Any = None) -> None:
        raise ConfigError("a latent diffusion model has no classifier to replace; leave num_classes out")

    def drop_text(self) -> None:
        """Free the memory of the text encoder, once all prompts are encoded."""
        self.text_encoder = None

    def denoiser(
        self,
        context: Float[Tensor, "b n d"] | None = None,
        *,
        concat: Float[Tensor, "b c h w"] | None = None,
        labels: Shaped[Tensor, "b ..."] | None = None,
    ) -> Denoiser:
        """Return the denoiser (x, t) -> x_0 under a context; for guidance the context of the prompts, then that of the
        negative prompts, for a batch twice as long.

        The prompt's keys and values are computed once, here. x keeps its dtype; the network computes in its own.

        Args:
            context: the encoded prompts; None for an unconditional model.
            concat: the channels that `config.concat` names, repeated for a batch that is a multiple of theirs.
            labels: labels for networks that take them: a DiT's classes, the upscaler's noise level.
        """
        if (concat is None) != (self.config.concat == "none"):
            needs = "takes no concatenated channels" if self.config.concat == "none" else f"needs {self.config.concat}"
            raise ConfigError(f"this model {needs}; pass `concat` accordingly")
        dtype = next(self.network.parameters()).dtype
        projected = None if context is None else self.network.project_context(context.to(dtype))

        def net(x: Tensor, t: Tensor) -> Tensor:
            return self.network(x, t, projected, labels)

        inner = net if concat is None else concat_channels(net, concat)
        return network_denoiser(inner, self.process, dtype)
