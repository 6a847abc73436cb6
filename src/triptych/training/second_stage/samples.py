"""Samples of a latent diffusion model during training, with the same prompts and noise at each evaluation."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from triptych.atomic_write import write_atomically
from triptych.diffusion.config import usual_spacing
from triptych.diffusion.guidance import guided
from triptych.diffusion.noise import seeded_noise
from triptych.diffusion.samplers import dpmpp_2m
from triptych.diffusion.schedule import spaced_levels
from triptych.errors import ConfigError
from triptych.models.image_tokens import ImageTokens
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.text import ClassToken, TextEncoder

GAP = 2  # white pixels between images


@torch.no_grad()
def generate_samples(
    ldm: LatentDiffusion, prompts: Sequence[str], count: int, steps: int, guidance: float
) -> Float[Tensor, "n 3 h w"]:
    """Generate images, with the prompts in turn and the seeds 0, 1, 2, ...

    Args:
        ldm: the model, on its device.
        prompts: captions, or names or numbers of classes; ignored by an unconditional model.
        count: number of images.
        steps: steps of DPM-Solver++(2M).
        guidance: scale of classifier-free guidance; 1 is off.

    Returns:
        Images in [0, 1].

    Raises:
        ConfigError: the condition of the model is an image, or a prompt is not a class.
    """
    if isinstance(ldm.text_encoder, ImageTokens):
        raise ConfigError(
            "samples are generated from prompts, but this model is conditioned on images; set samples.num_images to 0"
        )
    contexts, null_context = _contexts(
        ldm, [prompts[i % len(prompts)] for i in range(count)] if prompts else []
    )
    is_guided = null_context is not None and guidance != 1
    if is_guided and contexts is not None and null_context is not None:
        contexts = torch.cat([contexts, null_context.expand(count, -1, -1)])
    denoise = ldm.denoiser(contexts)
    if is_guided:
        denoise = guided(denoise, guidance)
    size = (ldm.config.autoencoder.latent_channels, *ldm.config.network.latent_size)
    x = seeded_noise(range(count), size, device=next(ldm.network.parameters()).device)
    levels = spaced_levels(ldm.process, steps, usual_spacing("dpm++2m", ldm.config.process))
    for step in dpmpp_2m(denoise, x, levels):
        x = step.x
    images = torch.cat([ldm.autoencoder.decode(latent[None]) for latent in x])
    return (images.float() / 2 + 0.5).clamp(0, 1)


def save_samples(images: Float[Tensor, "n 3 h w"], prompts: Sequence[str], path: Path) -> None:
    """Write all images into one PNG, in a nearly square grid. Its metadata has the prompts."""
    pixels = images.mul(255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    count, height, width, _ = pixels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        grid[top : top + height, left : left + width] = image
    metadata = PngInfo()
    metadata.add_itxt("prompts", "\n".join(prompts))
    write_atomically(path, lambda file: Image.fromarray(grid).save(file, "PNG", pnginfo=metadata))


def _contexts(ldm: LatentDiffusion, prompts: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
    """Return the contexts of the prompts, and the context without condition."""
    encoder: Any = ldm.text_encoder
    if isinstance(encoder, TextEncoder):
        # Without prompt syntax: brackets in a caption are no weights, and long captions are cut.
        ids = [
            encoder.tokenizer.framed(
                encoder.tokenizer.ids(prompt), encoder.config.max_length, encoder.config.pad_token
            )
            for prompt in (*prompts, "")
        ]
        contexts = encoder.encode_tokens(torch.tensor(ids, device=encoder.positions.device))
        return contexts[:-1], contexts[-1:]
    if isinstance(encoder, ClassToken):
        names = list(ldm.card.classes or ())
        numbers = [_class_of(prompt, names, encoder.config.num_classes) for prompt in prompts]
        return encoder(numbers), None if encoder.null is None else encoder([encoder.null])
    return None, None


def _class_of(prompt: str, names: Sequence[str], count: int) -> int:
    number = names.index(prompt) if prompt in names else int(prompt) if prompt.isdecimal() else count
    if number >= count:
        raise ConfigError(
            f"samples.prompts has {prompt!r}, which is not a class; give names or numbers of classes"
        )
    return number
