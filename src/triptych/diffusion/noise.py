"""Random numbers that depend on the seed of an image only: not on the batch, the device or the order of draws.

Image k of a call with seed s has the seed s + k, as in A1111, so that one number in an image's file is enough to
generate it again. All numbers are drawn on the CPU in fp32.

- "start", the noise that sampling starts from, is the first draw of `torch.Generator().manual_seed(s + k)`: what
  diffusers draws for the generator of that seed.
- Every other draw has its own generator, seeded with the first word of numpy's
  `SeedSequence([s + k, purpose, step])`, where purpose is an index into `PURPOSES`.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from triptych.diffusion.config import NUM_SEEDS
from triptych.errors import ConfigError

Purpose = Literal["start", "step", "encode", "condition"]
"""What noise is for: the start of sampling, a step of a stochastic sampler, an encoder's posterior, a conditioning
image."""
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

Noise = Callable[[int], Tensor]
"""Index of a step -> standard normal noise like x."""


def image_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """Return the seeds of images `first` to `first + count - 1` of a call with this seed.

    Raises:
        ConfigError: a seed outside 0 to 2^32 - 1.
    """
    if not 0 <= seed < NUM_SEEDS:
        raise ConfigError(f"seed is {seed}, which must be from 0 to {NUM_SEEDS - 1}")
    return [(seed + first + k) % NUM_SEEDS for k in range(count)]


def seeded_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    purpose: Purpose = "start",
    step: int = 0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return standard normal noise (len(seeds), *shape), with one seed for each image."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(_word(seed, purpose, step))
        rows.append(torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.float32))
    return torch.stack(rows).to(device=device, dtype=dtype)


def noise_for(
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Noise:
    """Return the noise of stochastic samplers: that of step i is drawn from (seed, i)."""
    return lambda step: seeded_noise(seeds, shape, "step", step, device=device, dtype=dtype)


def _word(seed: int, purpose: Purpose, step: int) -> int:
    if purpose == "start":
        return seed
    return int(np.random.SeedSequence([seed, PURPOSES.index(purpose), step]).generate_state(1)[0])
