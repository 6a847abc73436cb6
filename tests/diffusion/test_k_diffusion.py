"""Samplers and noise levels, step for step, beside k-diffusion's own code in fp64."""

import itertools

import pytest
import torch
from tests.diffusion.k_diffusion_reference import k_diffusion_sampling

from triptych.diffusion.process import network_denoiser, noise_ratio
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


def scaled_model(denoise, process, calls=None):
    """The denoiser as k-diffusion calls it, with x / alpha and sigma / alpha."""

    def model(x, sigma):
        level = process.level(process.time(sigma.flatten()[0].item()))
        if calls is not None:
            calls.append(level.t)
        return denoise(level.alpha * x, level.times(x))

    return model


@pytest.fixture
def double():
    """Compute k-diffusion's own tables in fp64 too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 11, 12])
@pytest.mark.usefixtures("double")
def test_dpm_fast_is_k_diffusions(count, eta, net, process):
    """Each call of the network, and the sample, which keeps the noise of the first level."""
    process, theirs, ours = process(), [], []
    denoise = network_denoiser(net, process)
    levels = spaced_levels(process, count, "uniform")
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    draws = [torch.randn_like(x) for _ in range(count)]
    supply = iter(draws)
    low, high = (noise_ratio(process.level(t)) for t in (process.first, process.last))
    with torch.no_grad():
        solver = k_diffusion_sampling().DPMSolver(scaled_model(denoise, process, theirs))
        expected = solver.dpm_solver_fast(
            x / levels[0].alpha, *log_snrs(high, low), count, eta, 1.0, lambda *ends: next(supply)
        )
    name = "dpm-fast-ancestral" if eta else "dpm-fast"
    *_, last = SAMPLERS[name](scaled_times(denoise, ours), x, levels, noise=draws.__getitem__)
    assert ours == pytest.approx(theirs)
    torch.testing.assert_close(last.x, expected, **TOLERANCE)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("start", ["uniform", "image-to-image"])
@pytest.mark.usefixtures("double")
def test_dpm_adaptive_is_k_diffusions(start, eta, net, process):
    process, theirs, ours = process(), [], []
    denoise = network_denoiser(net, process)
    levels = from_strength(spaced_levels(process, 20, "uniform"), 1.0 if start == "uniform" else 0.5)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    draws = [torch.randn_like(x) for _ in range(200)]
    supply = iter(draws)
    ends = [noise_ratio(levels[0]), noise_ratio(process.level(process.first))]
    with torch.no_grad():
        solver = k_diffusion_sampling().DPMSolver(scaled_model(denoise, process, theirs))
        expected, info = solver.dpm_solver_adaptive(
            x / levels[0].alpha, *log_snrs(*ends), eta=eta, noise_sampler=lambda *ends: next(supply)
        )
    name = "dpm-adaptive-ancestral" if eta else "dpm-adaptive"
    steps = list(SAMPLERS[name](scaled_times(denoise, ours), x, levels, noise=draws.__getitem__))
    assert len(steps) == info["nfe"]
    assert ours == pytest.approx(theirs)
    torch.testing.assert_close(steps[-1].x, expected, **TOLERANCE)


def log_snrs(*ratios):
    """k-diffusion's times of its solver, which its functions round to fp32."""
    return [-torch.tensor(ratio, dtype=torch.float64).log() for ratio in ratios]


def scaled_times(denoise, calls):
    def counted(x, t):
        calls.append(t[0].item())
        return denoise(x, t)

    return counted


@pytest.mark.parametrize("count", [12, 20, 27, 36, 45])
def test_restart_is_heuns_method_with_returns(count, net, process):
    """The web UI's intervals, run with k-diffusion's Heun and Karras' levels, as its own code cannot be installed."""
    process, k = process(), k_diffusion_sampling()
    denoise = network_denoiser(net, process)
    levels = spaced_levels(process, count, "karras")
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    draws = [torch.randn_like(x) for _ in range(2)]
    sigmas = torch.tensor([noise_ratio(level) for level in levels], dtype=torch.float64)
    length, repeats = (0, 0) if count < 20 else (9, 1) if count < 36 else (count // 4, 2)

    def karras(steps, low, high):
        ramp = torch.linspace(float(high) ** (1 / 7), float(low) ** (1 / 7), steps, dtype=torch.float64)
        assert torch.allclose(ramp.float() ** 7, k.get_sigmas_karras(steps, low, high)[:-1], rtol=1e-4)
        return ramp**7

    def heun(state, sigmas):
        with torch.no_grad():
            return k.sample_heun(scaled_model(denoise, process), state, sigmas, disable=True)

    if repeats:
        sigmas = torch.cat([karras(count - length * repeats, sigmas[-2], sigmas[0]), sigmas.new_zeros(1)])
    bottom, top = int((sigmas - 0.1).abs().argmin()), int((sigmas - 2).abs().argmin())
    state = heun(x / levels[0].alpha, sigmas[: bottom + 1])
    for draw in draws[:repeats]:
        state = state + draw * (sigmas[top] ** 2 - sigmas[bottom] ** 2) ** 0.5
        state = heun(state, karras(length + 1, sigmas[bottom], sigmas[top]))
    state = heun(state, sigmas[bottom:])
    steps = list(SAMPLERS["restart"](denoise, x, levels, noise=draws.__getitem__))
    assert len(steps) == count
    torch.testing.assert_close(steps[-1].x, state, **TOLERANCE)


def test_heunpp2_by_its_definition(net, process):
    """ComfyUI's `heunpp2` is in no package: its sums, in its terms, for the first and the last two steps."""
    process = process()
    denoise = network_denoiser(net, process)
    levels = spaced_levels(process, 4, "karras")
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    s = [noise_ratio(level) for level in levels]

    def slope(y, sigma):
        with torch.no_grad():
            return (y - scaled_model(denoise, process)(y, torch.tensor([sigma], dtype=y.dtype))) / sigma

    y, states = x / levels[0].alpha, []
    for i in range(2):
        d = slope(y, s[i])
        y_1 = y + d * (s[i + 1] - s[i])
        d_1 = slope(y_1, s[i + 1])
        d_2 = slope(y_1 + d_1 * (s[i + 2] - s[i + 1]), s[i + 2])
        share_1, share_2 = s[i + 1] / (3 * s[0]), s[i + 2] / (3 * s[0])
        y = y + ((1 - share_1 - share_2) * d + share_1 * d_1 + share_2 * d_2) * (s[i + 1] - s[i])
        states.append(y)
    d = slope(y, s[2])
    d_1 = slope(y + d * (s[3] - s[2]), s[3])
    share = s[3] / (2 * s[0])
    y = y + ((1 - share) * d + share * d_1) * (s[3] - s[2])
    states.append(y)
    states.append(y - slope(y, s[3]) * s[3])
    for step, state in zip(SAMPLERS["heun++2"](denoise, x, levels), states, strict=True):
        torch.testing.assert_close(step.x, step.level.alpha * state, **TOLERANCE)
