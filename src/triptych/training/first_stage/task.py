"""What a first stage of latent diffusion learns from (Rombach et al. 2022, Section 3.1 and Appendix G)."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych import distributed
from triptych.data.augment.batch import augment
from triptych.data.config import AugmentConfig
from triptych.data.example import Batch, TrainBatch
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.evaluation.feature_extractor import Extractor
from triptych.evaluation.latent_statistics import LatentNormalization
from triptych.evaluation.reconstruction import measure_reconstruction
from triptych.models.autoencoder import Autoencoder
from triptych.models.discriminator import Discriminator
from triptych.network import Network
from triptych.training.configs.first_stage import CompressConfig, DiscriminatorConfig
from triptych.training.first_stage.codebook import Codebook
from triptych.training.monitoring.image_grid import make_grid, save_png
from triptych.training.task import AdversaryInputs, LossOutput

Images = Float[Tensor, "b 3 h w"]
Scalar = Float[Tensor, ""]

MOST = 1e4  # of the adaptive weight, as in the paper's code


class Compression(Network):
    """An autoencoder as it is trained, with what only training needs: `codebook`, what is remembered of a VQ's entries,
    and `logvar`, the log variance of pixels about their reconstruction."""

    def __init__(self, autoencoder: Autoencoder, config: CompressConfig):
        super().__init__()
        self.config, self.card, self.autoencoder = autoencoder.config, autoencoder.card, autoencoder
        self.codebook = (
            Codebook(autoencoder, config.codebook) if autoencoder.config.regularization == "vq" else None
        )
        self.logvar = nn.Parameter(torch.zeros(()), requires_grad=config.logvar)

    def blocks(self) -> list[nn.Module]:
        return self.autoencoder.blocks()


class Compress:
    """Reconstruction, perceptual distance, a bound on the latents, and a discriminator to pass.

    All terms are means over the values of pixels, so that they add up alike at any size of picture.
    """

    headline = "psnr"

    def __init__(
        self,
        config: CompressConfig,
        augmentation: AugmentConfig,
        distance: nn.Module | None = None,
        discriminator: Discriminator | None = None,
        steps: int = 1,
        extractor: Extractor | None = None,
    ):
        self.config, self.how = augmentation, config
        self.distance, self.discriminator, self.extractor = distance, discriminator, extractor
        start = config.discriminator.start
        self.start = start if start < 1 else start / max(steps, 1)
        self.shown: tuple[Images, Images] | None = None
        self.normalisation: LatentNormalization | None = None

    def loss(self, model: nn.Module, batch: TrainBatch) -> LossOutput:
        with torch.autocast(batch["image"].device.type, enabled=False):
            images, _ = augment(batch["image"], None, self.config, batch["seed"], aspect=batch["aspect"])
        assert isinstance(model, Compression)
        made, bound, logs = self.through(model, images)
        # What is said of each pixel is added up there and goes back through the decoder once: neither the perceptual
        # network nor the discriminator is walked through again for the adaptive weight.
        seen = made.detach().requires_grad_()
        error, found = self.error(seen, images)
        logs |= found
        (pull,) = torch.autograd.grad(error, seen)
        error, spread = error.detach(), model.logvar
        loss = error * torch.exp(-spread) + spread + bound
        pull = pull * torch.exp(-spread.detach())
        if spread.requires_grad:
            logs["logvar"] = spread.detach().clone()
        inputs = None
        if self.discriminator_is_active(batch):
            assert self.discriminator is not None
            inputs = AdversaryInputs(images, made.detach())
            fooled = fool(self.discriminator(seen).float(), self.how.discriminator)
            # Batch norms let a picture feel what is said of those of other processes, each by its weight; this one's
            # is left for the loop to give.
            (push,) = torch.autograd.grad(fooled * distributed.shard_weight(), seen)
            push = push / (distributed.shard_weight() or 1.0)
            weight = torch.full((), self.how.discriminator.weight, device=made.device)
            if self.how.discriminator.adaptive:
                last = model.autoencoder.decoder.conv_out.weight
                weight = weight * adaptive_weight(
                    made, last, pull * distributed.shard_weight(), push * distributed.shard_weight()
                )
            pull, loss = pull + weight * push, loss + weight * fooled.detach()
            logs |= {"fooled": fooled.detach(), "adaptive": weight}
        way = (made * pull).sum()
        return LossOutput(loss + (way - way.detach()), logs, inputs)

    def through(
        self, model: Compression, images: Images, learn: bool = True
    ) -> tuple[Images, Scalar, dict[str, Tensor]]:
        """Reconstructions of drawn or quantised latents, what bounds the latents as a loss, and what to log."""
        net = model.autoencoder
        moments = net.embed(images)
        with torch.autocast(images.device.type, enabled=False):
            if model.codebook is not None:
                z, bound, logs = model.codebook.loss(net, moments.float(), learn)
                bound = self.how.codebook.weight * bound
            else:
                mean, logvar = net.moments(moments.float())
                z = net.draw(moments.float(), sample=learn)
                nats = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
                bound, logs = self.how.kl * nats / images[0].numel(), {"kl": nats.detach()}
        return net.decoder(net.post_quant(z)).float(), bound, logs

    def error(self, made: Images, images: Images) -> tuple[Scalar, dict[str, Tensor]]:
        """The error of pixels and the weighted distance, means over the batch, and both to log."""
        pixels = F.l1_loss(made, images) if self.how.pixels == "l1" else F.mse_loss(made, images)
        logs = {self.how.pixels: pixels.detach()}
        if self.distance is None:
            return pixels, logs
        apart = self.distance(made, images).mean()
        return pixels + self.how.perceptual.weight * apart, {**logs, "perceptual": apart.detach()}

    def discriminator_is_active(self, batch: TrainBatch) -> bool:
        """Whether the discriminator does by now."""
        return self.discriminator is not None and batch["progress"] >= self.start

    def against(self, inputs: AdversaryInputs) -> tuple[Scalar, dict[str, Tensor]]:
        """The discriminator's loss on pictures and their reconstructions."""
        assert self.discriminator is not None
        real = self.discriminator(inputs.real).float()
        made = self.discriminator(inputs.generated).float()
        if self.how.discriminator.loss == "hinge":
            loss = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
        else:
            loss = (F.softplus(-real).mean() + F.softplus(made).mean()) / 2
        logs = {"discriminator": loss.detach(), "real": real.mean().detach(), "made": made.mean().detach()}
        return loss, logs

    def evaluate(
        self, model: nn.Module, loader: Iterable[Batch], group: ProcessGroup = SINGLE_PROCESS
    ) -> Iterator[tuple[str, float]]:
        assert isinstance(model, Compression)
        result = measure_reconstruction(
            model.autoencoder,
            loader,
            distance=self.distance,
            extractor=self.extractor,
            per_channel=self.how.scale_per_channel,
            group=group,
        )
        self.shown, self.normalisation = result.examples, result.normalization
        yield from result.metrics.items()

    def rank(self, figures: dict[str, float]) -> tuple[float, ...]:
        """By the perceptual distance, else by PSNR. With a discriminator the latest is the best: neither figure counts
        the textures that it asks for."""
        if self.discriminator is not None:
            return (figures.get("step", float("inf")),)
        return (-figures.get("perceptual", -figures["psnr"]),)

    def product(self, net: Any) -> Any:
        """The autoencoder, with the scale and shift of the last evaluation: a run that is broken off leaves latents of
        about unit variance, too."""
        made = net.autoencoder
        if self.normalisation is not None:
            scale, shift = self.normalisation
            made.config = replace(made.config, scale=scale, shift=shift)
        return made

    def illustrate(self, folder: Path, step: int) -> None:
        """`folder`/reconstructions/step-N.png: pictures above, what the autoencoder makes of them below."""
        if self.shown is not None:
            save_png(folder / "reconstructions" / f"step-{step:09d}.png", make_grid(*self.shown))


def fool(logits: Float[Tensor, "b 1 h w"], config: DiscriminatorConfig) -> Scalar:
    """What the autoencoder loses where its reconstructions are found out."""
    return -logits.mean() if config.loss == "hinge" else F.softplus(-logits).mean()


def adaptive_weight(made: Images, last: Tensor, pull: Images, push: Images) -> Scalar:
    """|| grad of the other losses || / || grad of the discriminator's ||, both at the weights of the decoder's `last`
    layer (Esser et al. 2021, Equation 7).

    Args:
        made: reconstructions, with their graph.
        pull, push: gradients of the two at `made`.
    """
    (one,) = torch.autograd.grad(made, last, pull, retain_graph=True)
    (other,) = torch.autograd.grad(made, last, push, retain_graph=True)
    one, other = (distributed.mean_over_processes(each) for each in (one, other))
    return (one.float().norm() / (other.float().norm() + 1e-4)).clamp(0, MOST)
