"""Random numbers that depend on the seed of an image only: not on the batch, the device or the order of draws.

Image k of a call with seed s has the seed s + k, as in A1111, so that one number in an image's file is enough to
generate it again. All numbers are drawn on the CPU in fp32.

- "start", the noise that sampling starts from, is the first draw of `torch.Generator().manual_seed(s + k)`: what
  diffusers draws for the generator of that seed.
- Every other draw has its own generator, seeded with the first word of numpy's
  `SeedSequence([s + k, purpose, step])`, where purpose is an index into `PURPOSES`.
- With the generator "cuda", "start" and "step" are what PyTorch draws on an NVIDIA GPU, one draw after the other:
  AUTOMATIC1111's web UI draws there by default.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.diffusion.config import NUM_SEEDS
from triptych.errors import ConfigError

Purpose = Literal["start", "step", "encode", "condition"]
"""What noise is for: the start of sampling, a step of a stochastic sampler, an encoder's posterior, a conditioning
image."""
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

Rng = Literal["cpu", "cuda"]
"""Generator of the noise of sampling: PyTorch's on the CPU, or its numbers on a GPU."""

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
    rng: Rng = "cpu",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return standard normal noise (len(seeds), *shape), with one seed for each image."""
    if rng == "cuda" and purpose in ("start", "step"):
        draw = step + 1 if purpose == "step" else 0
        return torch.stack([cuda_normal(seed, shape, draw) for seed in seeds]).to(device=device, dtype=dtype)
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(_word(seed, purpose, step))
        rows.append(torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.float32))
    return torch.stack(rows).to(device=device, dtype=dtype)


def mix_noise(noise: Tensor, other: Tensor, share: float) -> Tensor:
    """Return noise (b, c, h, w) with a share of another, on the arc between the two, as AUTOMATIC1111's web UI mixes
    in a variation seed: the angle is that of each column, and nearly parallel noise is mixed linearly."""
    angle_cosine = (F.normalize(noise, dim=2, eps=0) * F.normalize(other, dim=2, eps=0)).sum(2, keepdim=True)
    angle = torch.acos(angle_cosine.clamp(-1, 1))
    arc = (torch.sin((1 - share) * angle) * noise + torch.sin(share * angle) * other) / torch.sin(angle)
    parallel = angle_cosine.mean((1, 2, 3), keepdim=True) > 0.9995
    return torch.where(parallel, share * noise + (1 - share) * other, arc)


def noise_for(
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    rng: Rng = "cpu",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Noise:
    """Return the noise of stochastic samplers: that of step i is drawn from (seed, i)."""
    return lambda step: seeded_noise(seeds, shape, "step", step, rng=rng, device=device, dtype=dtype)


def cuda_normal(seed: int, shape: Sequence[int], draw: int = 0) -> Tensor:
    """Return what `torch.randn(shape)` gives on an NVIDIA GPU after `manual_seed(seed)` and `draw` earlier draws.

    It is equal up to rounding in the last digit, for as many numbers as the GPU has threads (over 100,000).

    Each number is the first of a pair by Box and Muller, of two uniform numbers of Philox4x32-10 (Salmon et al. 2011)
    with the seed as its key and the draw and the number's index as its counter.
    """
    index = np.arange(math.prod(shape), dtype=np.uint64)
    counter = (np.full_like(index, draw), np.zeros_like(index), index, np.zeros_like(index))
    first, second, _, _ = philox(counter, seed)
    unit = np.float32(2.0**-32)
    radius = np.sqrt(-2 * np.log(first.astype(np.float32) * unit + unit / 2))
    angle = second.astype(np.float32) * (unit * np.float32(2 * math.pi)) + unit * np.float32(2 * math.pi) / 2
    return torch.from_numpy((radius * np.sin(angle)).astype(np.float32)).reshape(tuple(shape))


def philox(counter: Sequence[np.ndarray], key: int) -> tuple[np.ndarray, ...]:
    """Return four 32-bit random words for each counter of four (Philox4x32 with ten rounds).

    Args:
        counter: four arrays of uint64 that hold 32-bit words.
        key: 64 bits.
    """
    mask = np.uint64(2**32 - 1)
    c0, c1, c2, c3 = counter
    key_low, key_high = key % 2**32, key >> 32
    for _ in range(10):
        product_0, product_2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product_2 >> np.uint64(32)) ^ c1 ^ np.uint64(key_low),
            product_2 & mask,
            (product_0 >> np.uint64(32)) ^ c3 ^ np.uint64(key_high),
            product_0 & mask,
        )
        key_low, key_high = (key_low + 0x9E3779B9) % 2**32, (key_high + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def _word(seed: int, purpose: Purpose, step: int) -> int:
    if purpose == "start":
        return seed
    return int(np.random.SeedSequence([seed, PURPOSES.index(purpose), step]).generate_state(1)[0])
