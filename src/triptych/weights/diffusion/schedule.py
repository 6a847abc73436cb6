"""The process of a CompVis file: its table of betas, and the buffers that follow from them."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from triptych.diffusion.config import ProcessConfig, Schedule
from triptych.diffusion.process import betas
from triptych.errors import UserError
from triptych.weights.diffusion.rule_helpers import shortest
from triptych.weights.mapping.format import Names
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
    """What CompVis' `DDPM.register_schedule` makes, each (T,) in fp32, by double precision as there."""
    beta = np.array(betas(config), dtype=np.float64)
    cumulative = np.cumprod(1 - beta)
    before = np.append(1.0, cumulative[:-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = beta * (1 - before) / (1 - cumulative)
        made = {
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
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in made.items()}


def rules(config: ProcessConfig | None, prefix: str = "", posterior: bool = True) -> list[Rule]:
    """Those buffers dropped, and made again where the process has such a table."""
    if config is None or config.schedule == "flow":
        return [drop(prefix + name, "there is no such table") for name in ALPHAS + POSTERIOR]
    made = functools.cache(lambda: buffers(config))

    def restore(name: str) -> Callable[[], Tensor]:
        return lambda: made()[name]

    names = ALPHAS + (POSTERIOR if posterior else ())
    return [drop(prefix + name, "it follows from the schedule", restore(name)) for name in names]


def read(names: Names, prefix: str, usual: ProcessConfig, where: str = "") -> tuple[ProcessConfig, str]:
    """The process that a file's betas are the table of, and where it came from: without betas `usual`, from `where`.

    Raises:
        UserError: a table that belongs to no schedule here.
    """
    table = names.numbers(f"{prefix}betas", 2**20)
    if table is None or table.ndim != 1 or len(table) < 2 or not table.is_floating_point():
        return usual, where or "convention"
    rough = 2e-2 if table.dtype in (torch.float16, torch.bfloat16) else 1e-3
    for config in _candidates(table, replace(usual, num_timesteps=len(table))):
        if torch.allclose(torch.tensor(betas(config)), table.float(), rtol=rough, atol=1e-7):
            return config, "betas in the file"
    raise UserError(
        f"{names.path}: its {len(table)} betas, from {float(table[0]):g} to {float(table[-1]):g}, are no linear, "
        "scaled-linear or cosine schedule; take them out of the file to have the usual one"
    )


def _candidates(table: Tensor, usual: ProcessConfig) -> Iterator[ProcessConfig]:
    yield usual
    if usual.prediction != "eps":
        yield replace(usual, zero_terminal_snr=True)
    first, last = shortest(table[:1]), shortest(table[-1:])
    schedules: tuple[Schedule, ...] = ("scaled_linear", "linear")
    for schedule in schedules:
        if 0 < first <= last < 1:
            yield replace(usual, schedule=schedule, beta_start=first, beta_end=last)
    yield replace(usual, schedule="cosine")
