"""The task of the second stage: train a denoiser on the latents of a frozen first stage."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from triptych import distributed
from triptych.data.augment.batch import augment, preprocess_batch
from triptych.data.config import AugmentConfig
from triptych.data.example import Batch, TrainBatch
from triptych.device import copy_to_device
from triptych.diffusion.config import NoiseConfig
from triptych.diffusion.loss import diffusion_loss
from triptych.diffusion.process import Process
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.model_card import ModelCard
from triptych.models.autoencoder import FirstStage
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.image_tokens import ImageTokens, TokenProjection
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.network import Network
from triptych.training.configs.second_stage import SamplesConfig
from triptych.training.second_stage.conditions import Condition, ConditionIndices
from triptych.training.second_stage.samples import generate_samples, save_samples
from triptych.training.task import LossOutput


class SecondStage(Network):
    """The trained part of a latent diffusion model: the denoiser, and the encoder of its condition unless it is frozen.

    The first stage is not a submodule, so it is in no moving average, optimizer or checkpoint.

    Args:
        config: config of the complete model.
        network: the denoiser.
        text_encoder: the trained encoder of the condition; None if there is none.
    """

    def __init__(self, config: LatentDiffusionConfig, network: Network, text_encoder: Network | None):
        super().__init__()
        self.config = config
        self.card = ModelCard()
        self.network = network
        self.text_encoder = text_encoder

    def blocks(self) -> list[nn.Module]:
        return self.network.blocks()


class Denoise:
    """The loss of `diffusion.loss` on latents, which are encoded here or read from a cache.

    Args:
        config: how images are augmented before they are encoded.
        noise: noise levels, loss weights and noise.
        model: config of the complete model.
        first_stage: the autoencoder, on the run's device; it gets frozen.
        frozen_encoder: frozen encoder of the condition, which becomes a part of the saved model; None if there is none.
        condition, held_out_condition: conditions of the training and of the held-out examples.
        drop_condition: fraction of images that are trained without condition.
        card: model card of the saved model.
        samples: what to generate at each evaluation.
        bucketed: whether batches have the shape at which they are encoded.
    """

    headline = "loss"

    def __init__(
        self,
        config: AugmentConfig,
        noise: NoiseConfig,
        model: LatentDiffusionConfig,
        first_stage: FirstStage,
        frozen_encoder: Network | None,
        condition: Condition,
        held_out_condition: Condition,
        drop_condition: float,
        card: ModelCard,
        samples: SamplesConfig,
        bucketed: bool = False,
    ):
        self.config, self.noise, self.model, self.card = config, noise, model, card
        self.first_stage = first_stage.eval().requires_grad_(False)
        self.frozen_encoder = frozen_encoder
        self.condition, self.held_out_condition = condition, held_out_condition
        self.drop_condition = drop_condition
        self.process = Process(model.process)
        self.samples, self.bucketed = samples, bucketed
        self.sample_images: Float[Tensor, "n 3 h w"] | None = None  # at the last evaluation

    def loss(self, model: nn.Module, batch: TrainBatch) -> LossOutput:
        rng, generator = random_streams(batch["seed"], batch["label"].device)
        indices = self.condition.choose(batch["row"], rng)
        dropped = distributed.draw_rows(len(indices), rng.random) < self.drop_condition
        indices = np.where(dropped, self.condition.null_index, indices)
        x0 = self.latents(batch, rng, generator)
        return LossOutput(self.error(model, x0, self.condition, indices, generator), {})

    def error(
        self,
        model: Any,
        x0: Float[Tensor, "b c h w"],
        condition: Condition,
        indices: ConditionIndices,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Return the diffusion loss of latents.

        Args:
            model: a `SecondStage`, or the network that changes it (`Tune`).
            x0: scaled latents.
            condition, indices: the conditions of the images.
            generator: RNG of noise levels and noise.
        """
        context = condition.context(model.text_encoder, indices)
        return diffusion_loss(
            lambda x, t: model.network(x, t, context), x0, self.process, self.noise, generator
        )

    @torch.no_grad()
    def latents(
        self, batch: Batch, rng: np.random.Generator | None, generator: torch.Generator
    ) -> Float[Tensor, "b c h w"]:
        """Return scaled latents in fp32, sampled from the posterior of augmented images; without `rng`, the posterior's
        mean for images without augmentation."""
        if "mean" in batch:
            mean, std = batch["mean"], batch.get("std")  # b views c h w
            view = torch.zeros(len(mean), dtype=torch.int64)
            if rng is not None:
                flipped = distributed.draw_rows(len(mean), rng.random) < self.config.flip
                view = torch.from_numpy(flipped.astype(np.int64))
            index = torch.arange(len(mean), device=mean.device), copy_to_device(view, mean.device)
            z = mean[index].float()
            return z if std is None or rng is None else z + std[index].float() * standard_normal(z, generator)
        with torch.autocast(batch["image"].device.type, enabled=False):
            if rng is None:
                images = preprocess_batch(
                    batch["image"], self.config.mean, self.config.std, self.config.background
                )
            elif self.bucketed:
                options = replace(self.config, image_size=tuple(batch["image"].shape[-2:]))
                images, _ = augment(batch["image"], None, options, cast(TrainBatch, batch)["seed"])
            else:
                seed = cast(TrainBatch, batch)["seed"]
                images, _ = augment(batch["image"], None, self.config, seed, aspect=batch["aspect"])
        moments = self.first_stage.embed(images).float()
        z = self.first_stage.draw(moments)
        if rng is not None:
            z = self.first_stage.draw(moments, noise=standard_normal(z, generator))
        return self.first_stage.scaled(z)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, loader: Iterable[Batch], group: ProcessGroup = SINGLE_PROCESS
    ) -> Iterator[tuple[str, float]]:
        """Yield the loss on the held-out examples, with the same noise levels and noise at each evaluation."""
        device = next(model.parameters()).device
        total, count = 0.0, 0
        for i, batch in enumerate(loader):
            batch = cast(Batch, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
            _, generator = random_streams((0, batch.get("number", i)), device)
            x0 = self.latents(batch, None, generator)
            indices = self.held_out_condition.choose(batch["row"], None)
            total += self.error(model, x0, self.held_out_condition, indices, generator).item() * len(x0)
            count += len(x0)
        total, count = group.all_sum(total, count)
        yield "loss", total / count
        yield "count", int(count)
        if self.samples.num_images and group.is_main:
            options = self.samples
            self.sample_images = generate_samples(
                self.product(model),
                options.prompts,
                options.num_images,
                options.num_steps,
                options.guidance_scale,
            )

    def save_images(self, out: Path, step: int) -> None:
        """Write the images that were generated at the last evaluation."""
        if self.sample_images is not None:
            save_samples(self.sample_images, self.samples.prompts, out / "samples" / f"step-{step:07d}.png")

    def rank(self, metrics: dict[str, float], /) -> tuple[float, ...]:
        """Rank by the loss on the held-out examples, which rises when the model starts to memorize its images."""
        return (-metrics["loss"],)

    def product(self, net: Any) -> LatentDiffusion:
        """Return the complete latent diffusion model."""
        with torch.device("meta"):
            model: Any = LatentDiffusion(net.config)
        model.autoencoder, model.network = self.first_stage, net.network
        image_tokens = model.text_encoder
        model.text_encoder = self.frozen_encoder if net.text_encoder is None else net.text_encoder
        if isinstance(net.text_encoder, TokenProjection):
            assert isinstance(self.frozen_encoder, ImageTokens)
            image_tokens.backbone, image_tokens.projection = self.frozen_encoder.backbone, net.text_encoder
            model.text_encoder = image_tokens
        model.card = self.card
        return model.eval()


def random_streams(seed: Sequence[int], device: torch.device) -> tuple[np.random.Generator, torch.Generator]:
    """Return two RNGs seeded by a step: numpy's for random choices, and torch's on the device for noise."""
    entropy = [len(seed), *(int(n) % 2**64 for n in seed)]
    choice, noise = np.random.SeedSequence(entropy).spawn(2)
    noise_seed = int(noise.generate_state(1, np.uint64)[0] >> 1)
    return np.random.default_rng(choice), torch.Generator(device).manual_seed(noise_seed)


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal noise of a tensor's shape."""
    return distributed.draw_rows(
        len(like), lambda n: torch.randn((n, *like.shape[1:]), generator=generator, device=like.device)
    )
