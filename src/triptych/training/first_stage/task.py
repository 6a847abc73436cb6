"""The losses of a first stage of latent diffusion (Rombach et al. 2022, Section 3.1 and Appendix G)."""

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

MAX_ADAPTIVE_WEIGHT = 1e4  # as in the paper's code


class Compression(Network):
    """An autoencoder in training, with what only training needs: `codebook`, the moving averages of a VQ's codebook,
    and `logvar`, the log variance of pixels around their reconstruction."""

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
    """The task of training an autoencoder: reconstruction error, perceptual distance, a loss that regularizes latents,
    and an adversarial loss.

    All terms are means over the values of pixels, so their weights are independent of the image size.

    Args:
        config: losses and their weights.
        augmentation: how images are augmented.
        distance: the perceptual distance; None is none.
        discriminator: the network of the adversarial loss; None is none.
        steps: number of steps of the run.
        extractor: feature extractor of the Fréchet distance at evaluations; None is none.
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
        self.config, self.options = augmentation, config
        self.distance, self.discriminator, self.extractor = distance, discriminator, extractor
        start = config.discriminator.start
        self.start = start if start < 1 else start / max(steps, 1)
        self.examples: tuple[Images, Images] | None = None
        self.latent_normalization: LatentNormalization | None = None

    def loss(self, model: nn.Module, batch: TrainBatch) -> LossOutput:
        with torch.autocast(batch["image"].device.type, enabled=False):
            images, _ = augment(batch["image"], None, self.config, batch["seed"], aspect=batch["aspect"])
        assert isinstance(model, Compression)
        reconstructions, bound, logs = self.reconstruct(model, images)
        # Gradients of all terms are summed at the reconstructions and pass through the decoder once. So the adaptive
        # weight needs no second backward pass through the perceptual network and the discriminator.
        detached = reconstructions.detach().requires_grad_()
        error, error_logs = self.error(detached, images)
        logs |= error_logs
        (gradient,) = torch.autograd.grad(error, detached)
        error, logvar = error.detach(), model.logvar
        loss = error * torch.exp(-logvar) + logvar + bound
        gradient = gradient * torch.exp(-logvar.detach())
        if logvar.requires_grad:
            logs["logvar"] = logvar.detach().clone()
        inputs = None
        if self.discriminator_is_active(batch):
            inputs = AdversaryInputs(images, reconstructions.detach())
            weight, adversarial, adversarial_gradient = self._adversarial_terms(
                model, reconstructions, detached, gradient
            )
            gradient, loss = gradient + weight * adversarial_gradient, loss + weight * adversarial
            logs |= {"fooled": adversarial, "adaptive": weight}
        surrogate = (reconstructions * gradient).sum()  # its gradient at the reconstructions is `gradient`
        return LossOutput(loss + (surrogate - surrogate.detach()), logs, inputs)

    def _adversarial_terms(
        self, model: Compression, reconstructions: Images, detached: Images, gradient: Images
    ) -> tuple[Scalar, Scalar, Images]:
        """Return weight, value and gradient of the adversarial loss.

        Args:
            reconstructions: with their graph.
            detached: the same without a graph, as a leaf that requires a gradient.
            gradient: gradient of the other losses at the reconstructions.
        """
        assert self.discriminator is not None
        options, shard_weight = self.options.discriminator, distributed.shard_weight()
        value = adversarial_loss(self.discriminator(detached).float(), options)
        # Through batch norms, an image gets gradients of the losses of other processes, each with its weight; the
        # weight of this process is applied by the training loop.
        (adversarial_gradient,) = torch.autograd.grad(value * shard_weight, detached)
        adversarial_gradient = adversarial_gradient / (shard_weight or 1.0)
        weight = torch.full((), options.weight, device=reconstructions.device)
        if options.adaptive:
            last_weight = model.autoencoder.decoder.conv_out.weight
            weight = weight * adaptive_weight(
                reconstructions, last_weight, gradient * shard_weight, adversarial_gradient * shard_weight
            )
        return weight, value.detach(), adversarial_gradient

    def reconstruct(
        self, model: Compression, images: Images, train: bool = True
    ) -> tuple[Images, Scalar, dict[str, Tensor]]:
        """Return reconstructions of sampled or quantized latents, the loss that regularizes latents, and values for the
        log."""
        net = model.autoencoder
        moments = net.embed(images)
        with torch.autocast(images.device.type, enabled=False):
            if model.codebook is not None:
                z, bound, logs = model.codebook.loss(net, moments.float(), train)
                bound = self.options.codebook.weight * bound
            else:
                mean, logvar = net.moments(moments.float())
                z = net.draw(moments.float(), sample=train)
                nats = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
                bound, logs = self.options.kl * nats / images[0].numel(), {"kl": nats.detach()}
        return net.decoder(net.post_quant(z)).float(), bound, logs

    def error(self, reconstructions: Images, images: Images) -> tuple[Scalar, dict[str, Tensor]]:
        """Return the error of pixels plus the weighted perceptual distance, averaged over the batch, and both terms."""
        pixels = (
            F.l1_loss(reconstructions, images)
            if self.options.pixels == "l1"
            else F.mse_loss(reconstructions, images)
        )
        logs = {self.options.pixels: pixels.detach()}
        if self.distance is None:
            return pixels, logs
        distance = self.distance(reconstructions, images).mean()
        return pixels + self.options.perceptual.weight * distance, {**logs, "perceptual": distance.detach()}

    def discriminator_is_active(self, batch: TrainBatch) -> bool:
        """Return whether the run has reached the start of the adversarial loss."""
        return self.discriminator is not None and batch["progress"] >= self.start

    def discriminator_loss(self, inputs: AdversaryInputs) -> tuple[Scalar, dict[str, Tensor]]:
        """Return the discriminator's loss on images and their reconstructions, and values for the log."""
        assert self.discriminator is not None
        real = self.discriminator(inputs.real).float()
        generated = self.discriminator(inputs.generated).float()
        if self.options.discriminator.loss == "hinge":
            loss = (F.relu(1 - real).mean() + F.relu(1 + generated).mean()) / 2
        else:
            loss = (F.softplus(-real).mean() + F.softplus(generated).mean()) / 2
        logs = {
            "discriminator": loss.detach(),
            "real": real.mean().detach(),
            "made": generated.mean().detach(),
        }
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
            per_channel=self.options.scale_per_channel,
            group=group,
        )
        self.examples, self.latent_normalization = result.examples, result.normalization
        yield from result.metrics.items()

    def rank(self, metrics: dict[str, float], /) -> tuple[float, ...]:
        """Rank by the perceptual distance, else by PSNR. With a discriminator rank by the Fréchet distance if it is
        measured, since the others do not measure the textures that the discriminator is for; else by the perceptual
        distance; with neither, the newest weights are the best (those of earlier evaluations have a "step")."""
        if self.discriminator is not None and "frechet" in metrics:
            return (-metrics["frechet"],)
        if self.discriminator is not None and "perceptual" not in metrics:
            return (metrics.get("step", float("inf")),)
        return (-metrics.get("perceptual", -metrics["psnr"]),)

    def product(self, net: Any) -> Any:
        """Return the autoencoder with the scale and shift of the last evaluation, so that latents have about unit
        variance even if the run is interrupted."""
        autoencoder = net.autoencoder
        if self.latent_normalization is not None:
            scale, shift = self.latent_normalization
            autoencoder.config = replace(autoencoder.config, scale=scale, shift=shift)
        return autoencoder

    def save_images(self, folder: Path, step: int) -> None:
        """Write `folder`/reconstructions/step-N.png: images above, their reconstructions below."""
        if self.examples is not None:
            save_png(folder / "reconstructions" / f"step-{step:09d}.png", make_grid(*self.examples))


def adversarial_loss(logits: Float[Tensor, "b 1 h w"], config: DiscriminatorConfig) -> Scalar:
    """Return the adversarial loss of the autoencoder, from the discriminator's logits for its reconstructions."""
    return -logits.mean() if config.loss == "hinge" else F.softplus(-logits).mean()


def adaptive_weight(
    reconstructions: Images, last_weight: Tensor, gradient: Images, adversarial_gradient: Images
) -> Scalar:
    """Return |gradient of the other losses| / |gradient of the adversarial loss|, both with respect to the weights of
    the decoder's last layer (Esser et al. 2021, Equation 7).

    Args:
        reconstructions: with their graph.
        last_weight: weights of the last layer.
        gradient, adversarial_gradient: gradients of the two losses at the reconstructions.
    """
    (last,) = torch.autograd.grad(reconstructions, last_weight, gradient, retain_graph=True)
    (adversarial,) = torch.autograd.grad(
        reconstructions, last_weight, adversarial_gradient, retain_graph=True
    )
    last, adversarial = (distributed.mean_over_processes(value) for value in (last, adversarial))
    return (last.float().norm() / (adversarial.float().norm() + 1e-4)).clamp(0, MAX_ADAPTIVE_WEIGHT)
