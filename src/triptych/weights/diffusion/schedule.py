"""The diffusion process of a CompVis file: its table of betas, and the buffers derived from it."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from triptych.diffusion.config import ProcessConfig, Schedule
from triptych.diffusion.process import betas
from triptych.errors import CheckpointError
from triptych.weights.diffusion.rule_helpers import shortest_decimal
from triptych.weights.mapping.format import StateDictKeys
from triptych.weights.mapping.rules import Rule, drop

ALPHAS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)
POSTERIOR = (
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def buffers(config: ProcessConfig) -> dict[str, Tensor]:
    """Return the buffers of CompVis' `DDPM.register_schedule`, each (T,) in fp32, computed in double precision as
    there."""
    beta = np.array(betas(config), dtype=np.float64)
    cumulative = np.cumprod(1 - beta)
    before = np.append(1.0, cumulative[:-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = beta * (1 - before) / (1 - cumulative)
        tensors = {
            "betas": beta,
            "alphas_cumprod": cumulative,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": np.sqrt(cumulative),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - cumulative),
            "log_one_minus_alphas_cumprod": np.log(1 - cumulative),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / cumulative),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / cumulative - 1),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": beta * np.sqrt(before) / (1 - cumulative),
            "posterior_mean_coef2": (1 - before) * np.sqrt(1 - beta) / (1 - cumulative),
        }
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in tensors.items()}


def rules(config: ProcessConfig | None, prefix: str = "", posterior: bool = True) -> list[Rule]:
    """Return rules that drop these buffers, and create them on export if the process has betas."""
    if config is None or config.schedule == "flow":
        return [drop(prefix + name, "there is no such table") for name in ALPHAS + POSTERIOR]
    cached_buffers = functools.cache(lambda: buffers(config))

    def restore(name: str) -> Callable[[], Tensor]:
        return lambda: cached_buffers()[name]

    names = ALPHAS + (POSTERIOR if posterior else ())
    return [drop(prefix + name, "derived from the schedule", restore(name)) for name in names]


def read(
    keys: StateDictKeys, prefix: str, usual: ProcessConfig, where: str = ""
) -> tuple[ProcessConfig, str]:
    """Return the process of a file's betas, and its origin. Without betas it is `usual`, from `where`.

    Raises:
        CheckpointError: the betas are of no known schedule.
    """
    table = keys.read_small(f"{prefix}betas", 2**20)
    if table is None or table.ndim != 1 or len(table) < 2 or not table.is_floating_point():
        return usual, where or "convention"
    rough = 2e-2 if table.dtype in (torch.float16, torch.bfloat16) else 1e-3
    for config in _candidates(table, replace(usual, num_timesteps=len(table))):
        if torch.allclose(torch.tensor(betas(config)), table.float(), rtol=rough, atol=1e-7):
            return config, "betas in the file"
    raise CheckpointError(
        f"{keys.path}: its {len(table)} betas, from {float(table[0]):g} to {float(table[-1]):g}, are no linear, "
        "scaled-linear or cosine schedule; take them out of the file to have the usual one"
    )


def _candidates(table: Tensor, usual: ProcessConfig) -> Iterator[ProcessConfig]:
    yield usual
    if usual.prediction != "eps":
        yield replace(usual, zero_terminal_snr=True)
    first, last = shortest_decimal(table[:1]), shortest_decimal(table[-1:])
    schedules: tuple[Schedule, ...] = ("scaled_linear", "linear")
    for schedule in schedules:
        if 0 < first <= last < 1:
            yield replace(usual, schedule=schedule, beta_start=first, beta_end=last)
    yield replace(usual, schedule="cosine")
