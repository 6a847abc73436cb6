"""Samplers and noise levels, step for step, beside k-diffusion's own code in fp64."""

import itertools

import pytest
import torch
from tests.diffusion.k_diffusion_reference import k_diffusion_sampling

from triptych.diffusion.process import network_denoiser
from triptych.diffusion.sampler_steps import noise_ratio
from triptych.diffusion.samplers import SAMPLERS
from triptych.diffusion.schedule import Levels, from_strength, spaced_levels

pytestmark = pytest.mark.proves(
    "Samplers", "samplers and noise levels of k-diffusion, step for step", by="k-diffusion"
)

STEPS = 10
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
REFERENCES = {
    "euler": "sample_euler",
    "euler-ancestral": "sample_euler_ancestral",
    "heun": "sample_heun",
    "lms": "sample_lms",
    "dpm2": "sample_dpm_2",
    "dpm2-ancestral": "sample_dpm_2_ancestral",
    "dpm++2s-ancestral": "sample_dpmpp_2s_ancestral",
    "dpm++sde": "sample_dpmpp_sde",
    "dpm++2m": "sample_dpmpp_2m",
    "dpm++2m-sde": "sample_dpmpp_2m_sde",
    "dpm++2m-sde-heun": "sample_dpmpp_2m_sde",
    "dpm++3m-sde": "sample_dpmpp_3m_sde",
}
STOCHASTIC = [name for name in REFERENCES if "ancestral" in name or "sde" in name]


def reference_states(name, denoise, process, x, levels, noise_sampler):
    """k-diffusion's x / alpha where each step starts, and at the end."""
    states = []

    def model(x, sigma):
        level = process.level(process.time(sigma[0].item()))
        return denoise(level.alpha * x, level.times(x))

    more = {"noise_sampler": noise_sampler} if name in STOCHASTIC else {}
    if name == "dpm++2m-sde-heun":
        more["solver_type"] = "heun"
    sigmas = torch.tensor([noise_ratio(level) for level in levels], dtype=torch.float64)
    with torch.no_grad():
        last = getattr(k_diffusion_sampling(), REFERENCES[name])(
            model,
            x / levels[0].alpha,
            sigmas,
            callback=lambda row: states.append(row["x"]),
            disable=True,
            **more,
        )
    return [*states, last]


def brownian_noise(x, levels: Levels, name):
    """k-diffusion's Brownian motion as its samplers call it, and as ours do."""
    ratios = [noise_ratio(level) for level in levels]
    tree = k_diffusion_sampling().BrownianTreeNoiseSampler(x, 0.9 * ratios[-2], 1.1 * ratios[0], seed=5)
    halves = [noise_ratio(levels.between(*pair)) for pair in itertools.pairwise(levels[:-1])]

    def noise(index):
        step = index % (len(levels) - 1)
        ends = (ratios[step], ratios[step + 1])
        if name == "dpm++sde":
            ends = (ratios[step], halves[step]) if index == step else (halves[step], ratios[step + 1])
        return tree(*torch.tensor(ends, dtype=torch.float64))

    return tree, noise


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("spacing", ["karras", "exponential", "uniform", "sgm-uniform"])
@pytest.mark.parametrize("name", REFERENCES)
def test_each_step_is_k_diffusions(name, spacing, strength, net, process):
    process = process()
    levels = from_strength(spaced_levels(process, STEPS, spacing), strength)
    denoise = network_denoiser(net, process)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    theirs, ours = brownian_noise(x, levels, name)
    expected = reference_states(name, denoise, process, x, levels, theirs)
    steps = list(SAMPLERS[name](denoise, x, levels, noise=ours))
    for step, state in zip(steps, expected[1:], strict=True):
        torch.testing.assert_close(step.x, step.level.alpha * state, **TOLERANCE)


def test_k_diffusions_noise_levels(process):
    """Its model wrapper takes even times for "normal" and "SGM uniform"; its ramps are the paper's."""
    process, theirs = process(), k_diffusion_sampling()
    low, high = (noise_ratio(process.level(t)) for t in (process.first, process.last))
    for spacing, sigmas in {
        "karras": theirs.get_sigmas_karras(12, low, high),
        "exponential": theirs.get_sigmas_exponential(12, low, high),
    }.items():
        ratios = [noise_ratio(level) for level in spaced_levels(process, 12, spacing)]
        torch.testing.assert_close(torch.tensor(ratios), sigmas, rtol=1e-4, atol=1e-5)
    times = [level.t for level in spaced_levels(process, 12, "sgm-uniform")[:-1]]
    torch.testing.assert_close(torch.tensor(times), torch.linspace(999, 0, 13)[:-1])


@pytest.mark.parametrize("count", [7, 12, 30])
def test_noise_levels_of_comfyui_and_the_web_ui(count, process):
    """Their "simple" picks sigmas[-(1 + int(i * T / n))]; for DPM2 a ramp of n + 1 loses its last but one level."""
    process, theirs = process(), k_diffusion_sampling()
    table = [noise_ratio(process.level(t)) for t in range(process.last + 1)]
    picked = [table[-(1 + int(i * len(table) / count))] for i in range(count)]
    assert [noise_ratio(level) for level in spaced_levels(process, count, "simple")] == [*picked, 0]
    ramps = {"karras": theirs.get_sigmas_karras, "exponential": theirs.get_sigmas_exponential}
    for name, ramp in ramps.items():
        sigmas = ramp(count + 1, table[0], table[-1])
        levels = spaced_levels(process, count, f"multistep-{name}")
        ratios = torch.tensor([noise_ratio(level) for level in levels])
        torch.testing.assert_close(ratios, torch.cat([sigmas[:-2], sigmas[-1:]]), rtol=1e-4, atol=1e-5)
