"""Tables of levels against those of diffusers and CompVis."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from triptych.diffusion.beta_distribution import beta_quantile
from triptych.diffusion.config import SPACINGS
from triptych.diffusion.process import noise_ratio
from triptych.diffusion.schedule import CLEAN, from_strength, spaced_levels
from triptych.errors import ConfigError

# diffusers passes a tensor to np.array, about which numpy 2 warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.proves("Samplers", "timesteps and noise levels of diffusers", by="diffusers"),
]


TO_FIRST = ("compvis", "kl-optimal-to-first")


def times(levels):
    return [level.t for level in levels[:-1]]


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 16, 25, 30, 48, 50, 80, 333, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "multistep", "multistep-leading"])
def test_times_are_diffusers(spacing, steps, process):
    schedulers = pytest.importorskip("diffusers.schedulers")
    cls = schedulers.DDPMScheduler
    if spacing.startswith("multistep"):
        cls = schedulers.UniPCMultistepScheduler
        steps = min(steps, 999)
    theirs = {"multistep": "linspace", "multistep-leading": "leading"}.get(spacing, spacing)
    peer = cls(timestep_spacing=theirs, steps_offset=1)
    peer.set_timesteps(steps)
    expected = peer.timesteps.tolist()
    if steps == 1 and spacing == "linspace":
        expected = [999]  # theirs is 0, from which there is nothing to denoise
    if expected[0] == 1000:
        expected = [t - 1 for t in expected]  # past the end of their table
    assert times(spaced_levels(process(), steps, spacing)) == expected


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 200, 250, 500])
def test_compvis_times_and_end(steps, process):
    process = process()
    levels = spaced_levels(process, steps, "compvis")
    # make_ddim_timesteps: range(0, 1000, 1000 // n) + 1; make_ddim_sampling_parameters starts alphas_prev at alpha_0.
    assert times(levels)[::-1] == [t + 1 for t in range(0, 1000, 1000 // steps)]
    assert levels[-1] == (process.alphas[0], process.sigmas[0], 0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prediction": "v", "zero_terminal_snr": True},
        {"schedule": "cosine"},
        {"schedule": "flow", "prediction": "v"},
    ],
    ids=["sd", "zero-snr", "cosine", "flow"],
)
def test_noise_only_falls(spacing, settings, process):
    process = process(**settings)
    for steps in (1, 2, 5, 20, 50):
        levels = spaced_levels(process, steps, spacing)
        assert len(levels) == steps + 1
        assert all(math.isfinite(value) for level in levels for value in level)
        ratios = [level.alpha / level.sigma if level.sigma else math.inf for level in levels]
        assert all(before < after for before, after in pairwise(ratios))
        assert all(before.t > after.t for before, after in pairwise(levels[:-1]))
        assert levels[-1] == (process.level(process.first) if spacing in TO_FIRST else CLEAN)
        if spacing in ("trailing", "linspace", "uniform", "multistep", "karras", "exponential"):
            assert levels[0] == process.level(process.last)


def test_karras_is_equation_5(process):
    process = process()
    levels = spaced_levels(process, 8, "karras")
    low, high = process.sigmas[0] / process.alphas[0], process.sigmas[-1] / process.alphas[-1]
    for i, level in enumerate(levels[:-1]):
        sigma = (high ** (1 / 7) + i / 7 * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        assert level.sigma / level.alpha == pytest.approx(sigma)
    assert spaced_levels(process, 8, "karras", rho=1e9)[4].t == pytest.approx(
        spaced_levels(process, 8, "exponential")[4].t, rel=1e-6
    )


def test_a_shift_moves_flow_towards_noise(process):
    process = process(schedule="flow", prediction="flow")
    plain, shifted = (spaced_levels(process, 4, "trailing", shift=shift) for shift in (1.0, 3.0))
    assert [level.sigma for level in plain] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert [level.sigma for level in shifted] == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert [level.alpha for level in shifted] == pytest.approx([0, 0.1, 0.25, 0.5, 1])


@pytest.mark.parametrize(("strength", "left"), [(0, 0), (0.05, 0), (0.3, 3), (0.55, 5), (1, 10)])
def test_strength_is_the_share_of_steps_that_is_left(strength, left, process):
    levels = spaced_levels(process(), 10, "trailing")
    assert from_strength(levels, strength) == levels[10 - left :]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda process: spaced_levels(process, 0), "from 1 to 1000"),
        (lambda process: spaced_levels(process, -3), "-3"),
        (lambda process: spaced_levels(process, 1001), "from 1 to 1000"),
        (lambda process: spaced_levels(process, 51, "lcm"), "from 1 to 50"),
        (lambda process: spaced_levels(process, 1000, "multistep"), "from 1 to 999"),
        (lambda process: spaced_levels(process, 10, "kerras"), "near names: karras"),
        (lambda process: spaced_levels(process, 10, shift=3.0), "only|flow"),
        (lambda process: from_strength(spaced_levels(process, 10), 1.2), "strength is 1.2"),
        (lambda process: from_strength(spaced_levels(process, 10), -0.1), "strength is -0.1"),
    ],
)
def test_what_cannot_be_is_one_line(ask, words, process):
    with pytest.raises(ConfigError, match=words) as raised:
        ask(process())
    assert "\n" not in str(raised.value)


def test_a_level_knows_its_batch(process):
    level = process().level(12)
    assert torch.equal(level.times(torch.zeros(3, 2)), torch.full((3,), 12.0))
    assert torch.equal(level.noised(torch.ones(2), torch.zeros(2)), torch.full((2,), level.alpha))


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("count", [5, 10, 31])
def test_beta_is_diffusers(count, process):
    """Its schedulers convert between an array of sigmas and times; the sigmas are compared."""
    schedulers, process = pytest.importorskip("diffusers.schedulers"), process()
    peer = schedulers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_beta_sigmas=True
    )
    peer.set_timesteps(count)
    ratios = torch.tensor([noise_ratio(level) for level in spaced_levels(process, count, "beta")])
    torch.testing.assert_close(ratios, peer.sigmas, rtol=1e-4, atol=1e-5)


def test_quantiles_of_the_beta_distribution_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for shapes in ((0.6, 0.6), (0.5, 0.7), (2, 3), (0.1, 5), (1, 1)):
        for percent in range(101):
            expected = float(stats.beta.ppf(percent / 100, *shapes))
            assert beta_quantile(percent / 100, *shapes) == pytest.approx(expected, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("count", [1, 4, 20, 50, 150])
def test_beta_over_times_is_comfyuis(count, process):
    """By its definition, with scipy's quantiles: times are rounded, and one that occurs again is left out."""
    stats, process = pytest.importorskip("scipy.stats"), process()
    quantiles = stats.beta.ppf(1 - np.linspace(0, 1, count, endpoint=False), 0.6, 0.6)
    expected = np.rint(quantiles * 999)
    expected = expected[np.append(True, expected[1:] != expected[:-1])]
    assert times(spaced_levels(process, count, "beta-times")) == expected.tolist()
    assert (len(expected) < count) == (count == 150)


@pytest.mark.parametrize("count", [2, 10, 33])
def test_kl_optimal_spaces_arctangents_evenly(count, process):
    """Sabour et al. 2024, Theorem 3.1: to the clean image in ComfyUI, to the first level in the web UI."""
    process = process()
    low, high = (math.atan(noise_ratio(process.level(t))) for t in (process.first, process.last))
    angles = [math.atan(noise_ratio(level)) for level in spaced_levels(process, count, "kl-optimal")]
    assert angles == pytest.approx([*np.linspace(high, low, count), 0])
    angles = [math.atan(noise_ratio(level)) for level in spaced_levels(process, count, "kl-optimal-to-first")]
    assert angles == pytest.approx(np.linspace(high, low, count + 1).tolist())
    angles = [
        math.atan(noise_ratio(level)) for level in spaced_levels(process, count, "multistep-kl-optimal")
    ]
    assert angles == pytest.approx([*np.linspace(high, low, count + 1)[:-1], 0])


def test_align_your_steps_is_the_table_that_diffusers_has(process):
    utils = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    process, table = process(), utils.AysSchedules
    levels = spaced_levels(process, 10, "multistep-align-your-steps")
    assert [round(t) for t in times(levels)] == table["StableDiffusionTimesteps"]
    ratios = [noise_ratio(level) for level in spaced_levels(process, 11, "align-your-steps")]
    assert ratios[:10] == pytest.approx(table["StableDiffusionSigmas"][:10], rel=1e-4)
    assert ratios[10:] == pytest.approx([noise_ratio(process.level(0)), 0])  # 0.029 is below the first level
    for count in (5, 24):  # between entries logarithms are interpolated
        places = np.linspace(0, 10, count)
        logs = np.interp(places, np.arange(11), np.log([*table["StableDiffusionSigmas"][:10], 0.02917]))
        ratios = [noise_ratio(level) for level in spaced_levels(process, count, "align-your-steps")]
        assert ratios[:-1] == pytest.approx(np.exp(logs).tolist(), rel=1e-2)


def test_align_your_steps_needs_its_levels(process):
    with pytest.raises(ConfigError, match="sigma / alpha from 0\\.029 to"):
        spaced_levels(process(beta_end=0.002), 10, "align-your-steps")
