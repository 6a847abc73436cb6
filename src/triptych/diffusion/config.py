"""Configs of a diffusion process and its noise, and the names of samplers and spacings. Imports no torch, so that
`--help` is fast."""

from dataclasses import dataclass
from typing import Literal

from triptych.config import check, need
from triptych.errors import ConfigError, require_known

ADAPTIVE_SAMPLERS = ("dpm-adaptive", "dpm-adaptive-ancestral")
"""Samplers whose steps depend on the images: an image of a batch is not what it is alone."""

NUM_SEEDS = 2**32
"""Seeds are 0 to `NUM_SEEDS` - 1: torch's generator on the CPU reads 32 bits."""

Schedule = Literal["linear", "scaled_linear", "cosine", "flow"]
Prediction = Literal["eps", "v", "x0", "flow"]


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """How data turn into noise, x_t = alpha_t x_0 + sigma_t eps, and what the network predicts.

    The defaults are Stable Diffusion 1's.
    """

    schedule: Schedule = "scaled_linear"
    """linear: beta evenly spaced from `beta_start` to `beta_end` (Ho et al. 2020). scaled_linear: its square root
    evenly spaced (Rombach et al. 2022). cosine: Nichol and Dhariwal 2021, Equation 17. flow: alpha = 1 - t, sigma = t
    (rectified flow, Liu et al. 2023). The names are diffusers'; CompVis uses other names for two of them, see
    `COMPVIS_SCHEDULES`."""
    beta_start: float = 0.00085
    beta_end: float = 0.012
    """First and last beta; not used by cosine and flow."""
    num_timesteps: int = 1000
    """T: times of the network are 0 to T - 1, in flow above 0 to T."""
    zero_terminal_snr: bool = False
    """Rescale the table so that the last step has no signal (Lin et al. 2023, Algorithm 1)."""
    prediction: Prediction = "eps"
    """What the network's output stands for: the noise; v = alpha eps - sigma x_0 (Salimans and Ho 2022, Section 4);
    the clean data; or flow's velocity eps - x_0."""

    def __post_init__(self):
        check(self)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"beta_start {self.beta_start} and beta_end {self.beta_end} must lie between 0 and 1, in this order"
            )
        if not 2 <= self.num_timesteps <= 10**6:
            raise ConfigError(f"num_timesteps is {self.num_timesteps}, which must be from 2 to 1,000,000")
        if self.schedule == "flow" and self.zero_terminal_snr:
            raise ConfigError("schedule 'flow' ends in pure noise by itself; leave zero_terminal_snr out")
        if self.prediction == "eps" and self.ends_in_noise:
            raise ConfigError(
                "prediction 'eps' does not determine the image where there is only noise, as at the end of this "
                "schedule; use 'v', 'x0' or 'flow'"
            )

    @property
    def ends_in_noise(self) -> bool:
        """Whether alpha is exactly 0 at the last time."""
        return self.zero_terminal_snr or self.schedule == "flow"


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Noise of training: the distribution of times, the weight of each, and the noise itself."""

    times: Literal["uniform", "logit_normal"] = "uniform"
    """Uniform, or the logistic function of a normal number, which favors the middle (Esser et al. 2024, Equation
    19)."""
    logit_mean: float = 0.0
    """logit_normal: mean of that number; above 0 favors noisy times."""
    logit_std: float = 1.0
    """logit_normal: its standard deviation."""
    min_snr: float = 0.0
    """gamma of min-SNR weighting (Hang et al. 2023): the error of x_0 has weight min(SNR, gamma), whatever is
    predicted. 5 in the paper; 0 turns weighting off."""
    offset: float = 0.0
    """Standard deviation of additional noise that is constant over a channel, so that very dark and very bright images
    can be generated; 0.1 is usual, 0 is off."""

    def __post_init__(self) -> None:
        check(self)
        need(self.logit_std > 0, self, "logit_std", "above 0")
        need(self.min_snr >= 0, self, "min_snr", "at least 0")
        need(self.offset >= 0, self, "offset", "at least 0")


# CompVis' and diffusers' names of the schedules -> ours. "linear" has two meanings: in CompVis' code (and the LDM
# paper) it is even in the root of beta, `torch.linspace(b0**0.5, b1**0.5, T)**2`.
COMPVIS_SCHEDULES: dict[str, Schedule] = {
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "cosine": "cosine",
}
DIFFUSERS_SCHEDULES: dict[str, Schedule] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
}
DIFFUSERS_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}

# Name -> one-line description.
SAMPLERS: dict[str, str] = {
    "ddpm": "the original chain, with new noise at each step (Ho et al. 2020)",
    "ddim": "the same marginals without noise, first order (Song et al. 2021)",
    "plms": "pseudo linear multistep, Stable Diffusion's first sampler (Liu et al. 2022)",
    "euler": "first order (Karras et al. 2022)",
    "euler-ancestral": "Euler to below the next level, then noise up to it (k-diffusion)",
    "heun": "second order, two calls per step (Karras et al. 2022)",
    "heun++2": "slopes of three levels, weighted by noise; three calls per step (ComfyUI's heunpp2)",
    "restart": "heun that goes back to sigma 2 with new noise, from 20 steps on (Xu et al. 2023)",
    "lms": "linear multistep of order 4, one call per step (k-diffusion)",
    "dpm2": "second order, two calls per step: at its start and halfway (k-diffusion)",
    "dpm2-ancestral": "the same to below the next level, then noise up to it (k-diffusion)",
    "dpm-fast": "orders 3 to 1 in even steps of log sigma, one call per step (Lu et al. 2022)",
    "dpm-fast-ancestral": "the same to below the next level, then noise up to it (web UI)",
    "dpm-adaptive": "order 3 with an error estimate, which chooses the number of steps (Lu et al. 2022)",
    "dpm-adaptive-ancestral": "the same to below the next level, then noise up to it (web UI)",
    "dpm++2s-ancestral": "second order in x_0, two calls per step, new noise at each step (k-diffusion)",
    "dpm++sde": "the reverse SDE, two calls per step (k-diffusion)",
    "dpm++2m": "second order, one call per step (Lu et al. 2022)",
    "dpm++2m-sde": "the same for the reverse SDE, new noise at each step (Lu et al. 2022)",
    "dpm++2m-sde-heun": "the same, with the extrapolation integrated over the step (k-diffusion)",
    "dpm++3m-sde": "third order for the reverse SDE, one call per step (k-diffusion)",
    "deis": "second order in the noise, one call per step (Zhang and Chen 2023)",
    "unipc": "predictor and corrector, one call per step (Zhao et al. 2023)",
    "lcm": "2 to 8 steps, for networks distilled to consistency (Luo et al. 2023)",
}
SPACINGS: dict[str, str] = {
    "leading": "evenly spaced integer times that start a little above 0: 1, 21, 41, ...",
    "trailing": "evenly spaced integer times from the end of the schedule: 999, 979, ...",
    "linspace": "evenly spaced integer times that include both ends of the schedule",
    "uniform": "evenly spaced times, not rounded, that include both ends (k-diffusion)",
    "multistep": "linspace with one step more, without its last time (diffusers, for its multistep solvers)",
    "sgm-uniform": "the same, not rounded (Stability AI's generative-models, web UI)",
    "simple": "evenly spaced integer times from the last one down, rounded up (ComfyUI, web UI)",
    "multistep-leading": "leading with one step more, without its last time",
    "compvis": "leading, but ends at the schedule's first level instead of the clean image (CompVis)",
    "karras": "seventh root of sigma / alpha evenly spaced (Karras et al. 2022, Equation 5)",
    "exponential": "logarithm of sigma / alpha evenly spaced",
    "multistep-karras": "karras with one step more, without its last level (web UI, ComfyUI)",
    "multistep-exponential": "exponential with one step more, without its last level",
    "beta": "sigma / alpha as quantiles of Beta(0.6, 0.6) (Lee et al. 2024; diffusers, web UI)",
    "multistep-beta": "beta with one step more, without its last level",
    "beta-times": "integer times as quantiles of Beta(0.6, 0.6), each once (ComfyUI, ReForge)",
    "multistep-beta-times": "beta-times with one step more, without its last time (ComfyUI)",
    "kl-optimal": "arctangent of sigma / alpha evenly spaced (Sabour et al. 2024; ComfyUI)",
    "multistep-kl-optimal": "kl-optimal with one step more, without its last level",
    "kl-optimal-to-first": "kl-optimal with one step more, to the schedule's first level only (web UI)",
    "align-your-steps": "levels optimized for Stable Diffusion 1 (Sabour et al. 2024; web UI)",
    "multistep-align-your-steps": "the same levels with one step more, without its last level (ComfyUI, diffusers)",
    "lcm": "times chosen from the 50 of consistency distillation (Luo et al. 2023)",
}


def usual_spacing(sampler: str, config: ProcessConfig) -> str:
    """Return the default spacing of a sampler: that of its counterpart in diffusers for Stable Diffusion.

    Sampling in a schedule that ends in pure noise has to start at its very end (Lin et al. 2023, Section 3.3).
    """
    require_known(sampler, SAMPLERS, "sampler")
    if sampler == "lcm":
        return "lcm"
    if config.ends_in_noise:
        return "trailing"
    if sampler in ("dpm++2m", "dpm++2m-sde", "dpm++2m-sde-heun", "dpm++3m-sde", "deis", "unipc"):
        return "multistep"
    if sampler in ("ddim", "plms"):
        return "compvis"
    return {"ddpm": "leading", "restart": "karras"}.get(sampler, "uniform")
