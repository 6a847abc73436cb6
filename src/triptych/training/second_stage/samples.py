"""Pictures of a latent diffusion model while it learns: the same prompts and noise at each evaluation."""

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
from triptych.errors import UserError
from triptych.models.image_tokens import ImageTokens
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.text import ClassToken, TextEncoder

GAP = 2  # white pixels between pictures


@torch.no_grad()
def paint(
    ldm: LatentDiffusion, prompts: Sequence[str], count: int, steps: int, guidance: float
) -> Float[Tensor, "n 3 h w"]:
    """Pictures from 0 to 1: of each prompt in turn, with the seeds 0, 1, 2, ...

    Args:
        prompts: captions, or names or numbers of classes; not looked at by a model that takes neither.
        steps: of DPM-Solver++(2M).
        guidance: 1 is the prompt alone.
    """
    if isinstance(ldm.text_encoder, ImageTokens):
        raise UserError(
            "samples are painted from prompts, and this model is shown pictures; set samples.count to 0"
        )
    contexts, nothing = _contexts(ldm, [prompts[i % len(prompts)] for i in range(count)] if prompts else [])
    guides = nothing is not None and guidance != 1
    if guides and contexts is not None and nothing is not None:
        contexts = torch.cat([contexts, nothing.expand(count, -1, -1)])
    denoise = ldm.denoiser(contexts)
    if guides:
        denoise = guided(denoise, guidance)
    size = (ldm.config.autoencoder.latent_channels, *ldm.config.network.latent_size)
    x = seeded_noise(range(count), size, device=next(ldm.network.parameters()).device)
    levels = spaced_levels(ldm.process, steps, usual_spacing("dpm++2m", ldm.config.process))
    for step in dpmpp_2m(denoise, x, levels):
        x = step.x
    images = torch.cat([ldm.autoencoder.decode(one[None]) for one in x])
    return (images.float() / 2 + 0.5).clamp(0, 1)


def save_samples(images: Float[Tensor, "n 3 h w"], prompts: Sequence[str], path: Path) -> None:
    """All of them on one page, as square as can be; the prompts are in the file."""
    pixels = images.mul(255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    count, height, width, _ = pixels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    page = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, one in enumerate(pixels):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        page[top : top + height, left : left + width] = one
    said = PngInfo()
    said.add_itxt("prompts", "\n".join(prompts))
    write_atomically(path, lambda file: Image.fromarray(page).save(file, "PNG", pnginfo=said))


def _contexts(ldm: LatentDiffusion, prompts: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
    """Of the prompts, and of none."""
    reader: Any = ldm.text_encoder
    if isinstance(reader, TextEncoder):
        # As they are: a caption's brackets are no weights, and what is too long is cut off without a word.
        ids = [
            reader.tokenizer.framed(
                reader.tokenizer.ids(p), reader.config.max_length, reader.config.pad_token
            )
            for p in (*prompts, "")
        ]
        read = reader.encode_tokens(torch.tensor(ids, device=reader.positions.device))
        return read[:-1], read[-1:]
    if isinstance(reader, ClassToken):
        names = list(ldm.card.classes or ())
        numbers = [_class_of(prompt, names, reader.config.num_classes) for prompt in prompts]
        return reader(numbers), None if reader.null is None else reader([reader.null])
    return None, None


def _class_of(prompt: str, names: Sequence[str], count: int) -> int:
    number = names.index(prompt) if prompt in names else int(prompt) if prompt.isdecimal() else count
    if number >= count:
        raise UserError(
            f"samples.prompts has {prompt!r}, which is no class; give names or numbers of classes"
        )
    return number
