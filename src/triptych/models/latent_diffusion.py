"""A latent diffusion model (Rombach et al. 2022, Figure 3): it holds its parts, nothing else."""

from dataclasses import replace
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from triptych.diffusion.inpainting import concat_channels
from triptych.diffusion.process import Denoiser, Process, network_denoiser
from triptych.errors import UserError
from triptych.model_card import Card, Preprocess
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

HALF = (0.5, 0.5, 0.5)  # images are in [-1, 1]


class LatentDiffusion(Network):
    """An autoencoder (perceptual compression), a UNet or a DiT on its latents (semantic compression), what reads the
    prompt, and the process that it undoes. `unet` is the denoiser, whichever it is.

    ```python
    context = ldm.text(["a red apple"])
    denoise = ldm.denoiser(context)            # (x, t) -> x0, what every sampler takes
    images = ldm.autoencoder.decode(latents)
    ```
    """

    def __init__(self, config: LatentDiffusionConfig):
        super().__init__()
        self._config = config
        self.card = Card(preprocess=Preprocess(size=config.image_size, mean=HALF, std=HALF))
        known = isinstance(config.autoencoder, AutoencoderConfig)
        self.autoencoder: FirstStage = (Autoencoder if known else TinyAutoencoder)(config.autoencoder)  # type: ignore
        self.unet: UNet | DiT = UNet(config.unet) if isinstance(config.unet, UNetConfig) else DiT(config.unet)
        self.text: TextEncoder | ClassToken | ImageTokens | None = None
        if isinstance(config.text, TextConfig):
            self.text = TextEncoder(config.text)
        elif isinstance(config.text, ImageTokensConfig):
            self.text = ImageTokens(config.text)
        elif config.text is not None:
            self.text = ClassToken(config.text)
        self.map = None if config.map is None else MapEncoder(config.map)
        self.process = Process(config.process)

    @property
    def config(self) -> LatentDiffusionConfig:  # type: ignore[override]
        """What it is; words added to the text encoder (textual inversion) are counted."""
        if self.text is not None and self.text.config != self._config.text:
            self._config = replace(self._config, text=self.text.config)
        return self._config

    @config.setter
    def config(self, config: LatentDiffusionConfig) -> None:
        self._config = config

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the denoising network, which is what is trained."""
        return self.unet.blocks()

    def replace_head(self, num_classes: int, head: Any = None) -> None:
        raise UserError("a latent diffusion model has no classifier to replace; leave num_classes out")

    def drop_text(self) -> None:
        """Free the memory of the text encoder, once all prompts are encoded."""
        self.text = None

    def denoiser(
        self,
        context: Float[Tensor, "b n d"] | None = None,
        *,
        beside: Float[Tensor, "b c h w"] | None = None,
        labels: Shaped[Tensor, "b ..."] | None = None,
    ) -> Denoiser:
        """Return the denoiser (x, t) -> x_0 under a context; for guidance the context of the prompts, then that of the
        negative prompts, for a batch twice as long.

        The prompt's keys and values are computed once, here. x keeps its dtype; the network computes in its own.

        Args:
            context: the encoded prompts; None for an unconditional model.
            beside: what `config.beside` names; repeated where the batch is a multiple of its own.
            labels: for networks that take them: a DiT's classes, the upscaler's noise level.
        """
        if (beside is None) != (self.config.beside == "nothing"):
            said = "takes nothing" if self.config.beside == "nothing" else f"needs {self.config.beside}"
            raise UserError(f"this model {said} beside its latents; give it so")
        dtype = next(self.unet.parameters()).dtype
        projected = None if context is None else self.unet.project_context(context.to(dtype))

        def net(x: Tensor, t: Tensor) -> Tensor:
            return self.unet(x, t, projected, labels)

        inner = net if beside is None else concat_channels(net, beside)
        return network_denoiser(inner, self.process, dtype)
