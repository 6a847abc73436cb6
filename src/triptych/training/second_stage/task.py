"""The second stage as a task: a denoiser learns to undo noise in the latents of a frozen first stage."""

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
from triptych.training.second_stage.samples import paint, save_samples
from triptych.training.task import LossOutput


class SecondStage(Network):
    """What learns of a latent diffusion model: the denoiser, and what reads its condition unless that is frozen. The
    first stage is not among it, so that no average, optimiser or checkpoint carries it along."""

    def __init__(self, config: LatentDiffusionConfig, unet: Network, text: Network | None):
        super().__init__()
        self.config = config
        self.card = ModelCard()
        self.network = unet
        self.text_encoder = text

    def blocks(self) -> list[nn.Module]:
        return self.network.blocks()


class Denoise:
    """The loss of `diffusion.loss` on latents, encoded here or taken from a cache.

    Args:
        config: how pictures are augmented before they are encoded.
        noise: times, weights and noise.
        first_stage: frozen; on the run's device.
        frozen_text: a text encoder that does not learn, which the finished model holds too.
        said, said_held: of the examples to learn from, and of those held back.
        drop: share of pictures whose condition is left out.
        card: of the finished model.
        samples: what to paint at each evaluation.
        bucketed: pictures come at the shape at which they are to be encoded.
    """

    headline = "loss"

    def __init__(
        self,
        config: AugmentConfig,
        noise: NoiseConfig,
        model: LatentDiffusionConfig,
        first_stage: FirstStage,
        frozen_text: Network | None,
        said: Condition,
        said_held: Condition,
        drop: float,
        card: ModelCard,
        samples: SamplesConfig,
        bucketed: bool = False,
    ):
        self.config, self.noise, self.model, self.card = config, noise, model, card
        self.first_stage = first_stage.eval().requires_grad_(False)
        self.frozen_text = frozen_text
        self.said, self.said_held, self.drop = said, said_held, drop
        self.process = Process(model.process)
        self.samples, self.bucketed = samples, bucketed
        self.painted: Float[Tensor, "n 3 h w"] | None = None  # at the last evaluation

    def loss(self, model: nn.Module, batch: TrainBatch) -> LossOutput:
        rng, generator = streams(batch["seed"], batch["label"].device)
        chosen = self.said.choose(batch["row"], rng)
        chosen = np.where(
            distributed.draw_rows(len(chosen), rng.random) < self.drop, self.said.nothing, chosen
        )
        x0 = self.latents(batch, rng, generator)
        return LossOutput(self.error(model, x0, self.said, chosen, generator), {})

    def error(
        self,
        model: Any,
        x0: Float[Tensor, "b c h w"],
        said: Condition,
        chosen: ConditionIndices,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        context = said.context(model.text_encoder, chosen)
        return diffusion_loss(
            lambda x, t: model.network(x, t, context), x0, self.process, self.noise, generator
        )

    @torch.no_grad()
    def latents(
        self, batch: Batch, rng: np.random.Generator | None, generator: torch.Generator
    ) -> Float[Tensor, "b c h w"]:
        """Scaled latents in fp32, drawn from the posterior; without `rng` its mean for pictures as they are."""
        if "mean" in batch:
            mean, std = batch["mean"], batch.get("std")  # b ways c h w
            way = torch.zeros(len(mean), dtype=torch.int64)
            if rng is not None:
                flipped = distributed.draw_rows(len(mean), rng.random) < self.config.flip
                way = torch.from_numpy(flipped.astype(np.int64))
            at = torch.arange(len(mean), device=mean.device), copy_to_device(way, mean.device)
            z = mean[at].float()
            return z if std is None or rng is None else z + std[at].float() * normal(z, generator)
        with torch.autocast(batch["image"].device.type, enabled=False):
            if rng is None:
                images = preprocess_batch(
                    batch["image"], self.config.mean, self.config.std, self.config.background
                )
            elif self.bucketed:
                how = replace(self.config, image_size=tuple(batch["image"].shape[-2:]))
                images, _ = augment(batch["image"], None, how, cast(TrainBatch, batch)["seed"])
            else:
                seed = cast(TrainBatch, batch)["seed"]
                images, _ = augment(batch["image"], None, self.config, seed, aspect=batch["aspect"])
        moments = self.first_stage.embed(images).float()
        z = self.first_stage.draw(moments)
        if rng is not None:
            z = self.first_stage.draw(moments, noise=normal(z, generator))
        return self.first_stage.scaled(z)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, loader: Iterable[Batch], group: ProcessGroup = SINGLE_PROCESS
    ) -> Iterator[tuple[str, float]]:
        """The loss on what was held back, at times and noise that are the same each time."""
        device = next(model.parameters()).device
        total, count = 0.0, 0
        for i, batch in enumerate(loader):
            batch = cast(Batch, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
            _, generator = streams((0, batch.get("number", i)), device)
            x0 = self.latents(batch, None, generator)
            chosen = self.said_held.choose(batch["row"], None)
            total += self.error(model, x0, self.said_held, chosen, generator).item() * len(x0)
            count += len(x0)
        total, count = group.all_sum(total, count)
        yield "loss", total / count
        yield "count", int(count)
        if self.samples.count and group.is_main:
            how = self.samples
            self.painted = paint(self.product(model), how.prompts, how.count, how.steps, how.guidance)

    def illustrate(self, out: Path, step: int) -> None:
        """Write what was painted at the last evaluation."""
        if self.painted is not None:
            save_samples(self.painted, self.samples.prompts, out / "samples" / f"step-{step:07d}.png")

    def rank(self, figures: dict[str, float]) -> tuple[float, ...]:
        """The newest: a denoiser's loss hardly tells how good its pictures are, and its average grows better to the
        end. Of two evaluations the one kept so far has its step beside it."""
        return (0.0 if "step" in figures else 1.0,)

    def product(self, net: Any) -> LatentDiffusion:
        """The whole latent diffusion model."""
        with torch.device("meta"):
            whole: Any = LatentDiffusion(net.config)
        whole.autoencoder, whole.network = self.first_stage, net.network
        seeing = whole.text_encoder
        whole.text_encoder = self.frozen_text if net.text_encoder is None else net.text_encoder
        if isinstance(net.text_encoder, TokenProjection):
            assert isinstance(self.frozen_text, ImageTokens)
            seeing.backbone, seeing.projection = self.frozen_text.backbone, net.text_encoder
            whole.text_encoder = seeing
        whole.card = self.card
        return whole.eval()


def streams(seed: Sequence[int], device: torch.device) -> tuple[np.random.Generator, torch.Generator]:
    """Two streams of chance from a step's seed: numpy's for what is chosen, torch's on the device for noise."""
    entropy = [len(seed), *(int(n) % 2**64 for n in seed)]
    choice, noise = np.random.SeedSequence(entropy).spawn(2)
    words = int(noise.generate_state(1, np.uint64)[0] >> 1)
    return np.random.default_rng(choice), torch.Generator(device).manual_seed(words)


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of a tensor's shape."""
    return distributed.draw_rows(
        len(like), lambda n: torch.randn((n, *like.shape[1:]), generator=generator, device=like.device)
    )
